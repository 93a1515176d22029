"""`check_derivatives` catches wrong derivatives with the right sentence, and raises no false alarm."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.diagnostics import _check_derivatives, _differences
from curvature.transforms import _mean_hessian
from tests.scenarios import SCENARIOS, forward_only, make_mlp, mlp_loss, reverse_only

X = np.array([0.3, 1.0])


def check(fun, x=X, *args, **options):
    return curvature.check_derivatives(fun, x, *args, **{"num_directions": 2, **options})


def verdicts(report):
    return {check.name: check.verdict for check in report.checks}


FIRST = "first derivatives: differences of f"
OF_GRADIENT = "second derivatives: differences of the gradient"
OF_VALUES = "second derivatives: second differences of f"
ASSEMBLED_PRODUCT = "assembled Hessian: agrees with H v"
ASSEMBLED_DIFFERENCES = "assembled Hessian: differences of the gradient"
ASSEMBLED = {"logistic"}  # the scenarios that are means over examples


# ---- no false alarm --------------------------------------------------------------------------------------------------


@pytest.mark.thin
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_right_derivatives_pass(scenario, dtype):
    x, args = scenario.make(dtype)
    report = check(scenario.fun, x, *args)
    assert report.ok, report
    takes_taps = scenario.name in ASSEMBLED
    assert len(report.checks) == (10 if takes_taps else 8)
    assert {ASSEMBLED_PRODUCT, ASSEMBLED_DIFFERENCES}.issubset(verdicts(report)) == takes_taps


def rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


R = np.array([-1.2, 1.0, 0.5], np.float32)
RIGHT = {
    "small": (lambda x: 1e-9 * rosenbrock(x), R),
    "large": (lambda x: 1e12 * rosenbrock(x), R),
    "offset": (lambda x: 1e6 + rosenbrock(x), R),
    "at the minimum": (rosenbrock, np.ones(3)),
    "offset at the minimum": (lambda x: 1e6 + rosenbrock(x), np.ones(3)),
    "scaled apart": (lambda x: jnp.sum(jnp.sin(x * jnp.array([1e6, 1e-6]))), np.array([1e-6, 1e6])),
    "tiny beside large": (lambda x: jnp.sum(jnp.exp(x)), np.array([1e-12, 1.0])),
    "tiny": (lambda x: jnp.exp(2 * x), 1e-12),
    "zeros": (lambda x: jnp.sum(jnp.exp(x) * x), np.zeros(2)),
    "edge of the domain": (lambda x: jnp.sum(jnp.log(x)), np.array([1e-5, 1.0])),
    "constant": (lambda x: 5.0 + 0 * jnp.sum(x), X),
    "linear": (lambda x: jnp.sum(x), X),
    "saturated": (jax.nn.logsumexp, np.array([100.0, 1.0, -300.0])),
    "relu": (lambda x: jnp.sum(jax.nn.relu(x) ** 3 + jax.nn.relu(x)), np.array([1.0, -0.5])),
    "huber near its joint": (
        lambda x: jnp.sum(jnp.where(jnp.abs(x) < 1, x * x / 2, jnp.abs(x) - 0.5)),
        np.array([0.999, 2.0, 1.001]),
    ),
    "sharp softplus": (lambda x: jnp.sum(jax.nn.softplus(1000 * x)), np.array([0.0, 1.0])),
    "forward only": (lambda x: jnp.sum(forward_only(x)), X),
    "reverse only": (lambda x: jnp.sum(reverse_only(x)), X),
    "vector": (lambda x: {"a": jnp.outer(jnp.sin(x), x), "b": x[0]}, X),
    "branch": (lambda x: x[0] ** 2 * x[1] if x[0] > 0 else x[1], X),
    "single precision inside": (lambda x: jnp.sum(jnp.sin(x.astype(jnp.float32))), X),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", RIGHT)
def test_right_derivatives_pass_however_scaled(name):
    report = check(*RIGHT[name])
    assert report.ok, report


def test_a_network_passes():
    """More entries than are tried one by one: a direction in each leaf."""
    report = check(mlp_loss, *make_mlp((5, 6, 1), 16))
    assert report.ok, report


def test_double_precision_is_used_where_single_is_all_there_is():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        report = check(lambda x: jnp.sum(jnp.sin(x)), jnp.array([0.3, 1.0]))
    assert report.ok, report
    assert max(check.tolerance for check in report.checks) < 1e-5


# ---- wrong rules are caught ------------------------------------------------------------------------------------------


def test_it_catches_i0_of_jax():
    """jax-ml/jax#40627: at 0 its derivative is 1 and its second derivative 1.5; they are 0 and 1/2."""
    report = check(jax.scipy.special.i0, 0.0)
    if jax.grad(jax.scipy.special.i0)(0.0) == 0 and jax.hessian(jax.scipy.special.i0)(0.0) == 0.5:
        pytest.skip("this JAX has it right")
    assert verdicts(report)[OF_VALUES] == "wrong"
    assert "d^2 f / d x^2 is 1.5, differences give 0.5" in str(report).replace("\n  ", " ")


def test_it_catches_betaln_of_jax():
    """jax-ml/jax#34353: at small arguments the gradient is right and the Hessian is not."""
    fun = lambda a: jax.scipy.special.betaln(a, 0.1)
    report = check(fun, 0.1, num_directions=1)
    if abs(jax.hessian(fun)(0.1) - 75.16592) < 1e-4:
        pytest.skip("this JAX has it right")
    assert verdicts(report)[FIRST] == "passed"
    assert verdicts(report)[OF_GRADIENT] == verdicts(report)[OF_VALUES] == "wrong"
    assert "d^2 f / d x^2 is 24.44927" in str(report).replace("\n  ", " ")


def planted(value, derivative):
    """A function whose rule for both modes says ``derivative``."""

    @jax.custom_jvp
    def fun(x):
        return value(x)

    fun.defjvp(lambda primals, tangents: (fun(*primals), derivative(*primals) * tangents[0]))
    return fun


def test_a_wrong_first_derivative_is_caught_and_named():
    sine = planted(jnp.sin, lambda x: 1.001 * jnp.cos(x))
    report = check(lambda x: jnp.sum(x["good"] ** 2) + sine(x["bad"][1]), {"good": X, "bad": X})
    assert not report.ok
    assert verdicts(report)[FIRST] == verdicts(report)[OF_VALUES] == "wrong"
    assert verdicts(report)[OF_GRADIENT] == "passed"  # it is the derivative of the wrong gradient
    assert "x['bad'][1]" in report.failures[0].sentence


def test_a_wrong_second_derivative_is_caught_where_the_first_is_right():
    cosine = planted(jnp.cos, lambda x: -0.99 * jnp.sin(x))
    sine = planted(jnp.sin, cosine)
    report = check(lambda x: jnp.sum(x[0] ** 2) + sine(x[1]))
    assert verdicts(report) == {
        **dict.fromkeys(verdicts(report), "passed"),
        OF_GRADIENT: "wrong",
        OF_VALUES: "wrong",
    }
    assert f"d^2 f / d x[1] d x[1] is {-0.99 * np.sin(1):.6f}" in report.failures[0].sentence


def test_an_asymmetric_hessian_is_caught():
    @jax.custom_vjp
    def fun(x):
        return jnp.sum(x**2)

    def pull(x, cotangent):
        return (cotangent * (2 * x + 0.01 * jnp.array([x[1], -x[0]])),)

    fun.defvjp(lambda x: (fun(x), x), pull)
    report = check(fun)
    found = {check.name: check for check in report.failures}
    assert found["H is symmetric"].verdict == "wrong"
    assert "u'Hv is" in found["H is symmetric"].sentence


def test_a_gradient_of_no_function_names_the_rule():
    """Every mode gives ``D g v`` for the ``g`` that JAX computes, which is the gradient of no function."""

    @jax.custom_vjp
    def fun(x):
        return jnp.sum(x**2)

    fun.defvjp(lambda x: (jnp.sum(x**2), x), lambda x, cotangent: (cotangent * (2 * x + jnp.roll(x, 1) ** 2),))
    found = {check.name: check for check in check(lambda x: fun(x), np.arange(1.0, 4.0)).failures}
    assert found["H is symmetric"].verdict == "wrong"
    sentence = found["H is symmetric"].sentence
    assert "the gradient of no function" in sentence
    assert re.search(r"is that of custom_vjp_call at \S*test_check_derivatives\.py:\d+", sentence)


def batch_mean(params, x):
    return jnp.mean(jnp.sum(jnp.tanh(x @ params["w"]) ** 2, 1)) + 0 * params["b"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 12], ids=["by coordinates", "by leaves"])
def test_a_wrong_assembled_hessian_is_caught(monkeypatch, size):
    """The matrix that ``hessian`` assembles is held against products and differences that know nothing of it."""
    x = np.random.default_rng(0).standard_normal((5, size))
    params = {"w": np.random.default_rng(1).standard_normal((size, 3)), "b": np.ones(())}
    assert check(batch_mean, params, x).ok
    right = _mean_hessian._assemble

    def wrong(*args):
        result = right(*args)
        block = result["w"]["w"].reshape(size, 3, 3, size)  # rows and columns of the second matrix exchanged
        return result | {"w": result["w"] | {"w": block.transpose(0, 1, 3, 2).reshape(size, 3, size, 3)}}

    monkeypatch.setattr(_mean_hessian, "_assemble", wrong)
    report = check(batch_mean, params, x)
    failed = {check.name: check for check in report.failures}
    assert {*failed} == {ASSEMBLED_PRODUCT, ASSEMBLED_DIFFERENCES}
    sentence = r"x\['w'\]\[\d+, \d\].* in the assembled Hessian \('taps', .*\) and .* by fwd_over_rev"
    assert re.search(sentence, failed[ASSEMBLED_PRODUCT].sentence), failed[ASSEMBLED_PRODUCT].sentence
    assert "differences give" in failed[ASSEMBLED_DIFFERENCES].sentence


def test_a_large_assembled_hessian_is_left_out_and_said_so(monkeypatch):
    monkeypatch.setattr(_check_derivatives, "_MOST_ASSEMBLED", 5)
    x = np.random.default_rng(0).standard_normal((5, 2))
    report = check(batch_mean, {"w": np.ones((2, 3)), "b": np.ones(())}, x)
    assert ASSEMBLED_PRODUCT not in verdicts(report)
    assert "The assembled Hessian of 7 rows was left out." in report.remarks


def test_a_product_that_is_not_linear_is_caught():
    @jax.custom_jvp
    def clipped(x):
        return x**2

    clipped.defjvp(lambda primals, tangents: (clipped(*primals), jnp.clip(tangents[0], -0.5, 0.5) * 2 * primals[0]))

    @jax.custom_vjp
    def fun(x):
        return jnp.sum(x**3) / 3

    fun.defvjp(lambda x: (jnp.sum(x**3) / 3, x), lambda x, cotangent: (cotangent * clipped(x),))
    found = {check.name: check.verdict for check in check(fun).failures}
    assert found["H v is linear in v"] == "wrong"


def test_modes_that_disagree_are_caught():
    fun = planted(jnp.sin, jnp.cos)

    @jax.custom_jvp
    def odd(x):
        return fun(x)

    def rule(primals, tangents):
        tangent = jax.custom_derivatives.linear_call(  # whose transpose is wrong
            lambda _, t: t, lambda _, ct: 2 * ct, (), jnp.cos(primals[0]) * tangents[0]
        )
        return odd(*primals), tangent

    odd.defjvp(rule)
    found = {check.name: check for check in check(odd, 0.3, order=1).failures}
    assert found["gradient: modes agree"].verdict == "wrong"
    assert "fwd and rev differ by 5.0e-01" in found["gradient: modes agree"].sentence


# ---- kinks and NaN ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fun", [jax.nn.relu, jnp.abs])
def test_a_kink_is_no_wrong_derivative(fun):
    report = check(lambda x: jnp.sum(fun(x)), np.array([1.0, 0.0]))
    assert not report.ok
    assert verdicts(report)[FIRST] == "kink"
    assert "wrong" not in verdicts(report).values()
    assert "one-sided limits differ" in str(report).replace("\n  ", " ")


def test_a_kink_of_the_gradient_is_told():
    report = check(lambda x: jnp.sum(jax.nn.relu(x) ** 2), np.array([1.0, 0.0]))
    assert verdicts(report)[FIRST] == "passed"
    assert verdicts(report)[OF_GRADIENT] == verdicts(report)[OF_VALUES] == "kink"
    assert "the gradient has a kink at x" in str(report).replace("\n  ", " ")


def test_nan_are_told_by_leaf_and_mode():
    def fun(x):
        return jnp.sum(x["a"] ** 2) + jnp.sum(jnp.where(x["b"] > 0, jnp.sqrt(x["b"]), 0.0))

    report = check(fun, {"a": X, "b": np.array([0.0, 1.0])})
    assert report.nonfinite["gradient by rev"] == ("x['b']",)
    assert "gradient by fwd" not in report.nonfinite
    assert not report.ok
    assert "gradient by rev: x['b']" in str(report)


def test_a_norm_at_zero_is_not_finite():
    report = check(lambda x: jnp.linalg.norm(x) ** 2, np.zeros(2))
    assert set(verdicts(report).values()) == {"not finite"}


# ---- the report, and the differences themselves ----------------------------------------------------------------------


def test_the_first_order_alone():
    report = check(lambda x: jnp.sum(jnp.sin(x)), order=1)
    assert [check.name for check in report.checks] == ["finite values", FIRST, "gradient: modes agree"]
    assert report.ok, report


def test_a_key_makes_other_directions():
    fun = lambda x: jnp.sum(jnp.sin(x))
    one, same, other = (check(fun, key=key, order=1) for key in (None, jax.random.key(0), jax.random.key(1)))
    assert one.checks == same.checks
    assert one.checks != other.checks


@pytest.mark.parametrize("t", [0.0, 0.7])
def test_the_error_estimate_bounds_the_error(t):
    steps, fun = _differences.STEPS, lambda s: np.exp(np.sin(3 * s))
    first = 3 * np.cos(3 * t) * fun(t)
    second = (9 * np.cos(3 * t) ** 2 - 9 * np.sin(3 * t)) * fun(t)
    samples = _differences.Samples(plus=fun(t + steps), minus=fun(t - steps), center=np.asarray(fun(t)))
    eps = np.finfo(np.float64).eps
    for estimate, want in (
        (_differences.first_derivative(samples, eps), first),
        (_differences.second_derivative(samples, eps), second),
    ):
        assert abs(estimate.value - want) <= 4 * estimate.error + 8 * eps * abs(want)
        assert estimate.error < 1e-6 * abs(want)


def test_an_output_may_be_a_plain_number():
    assert check(lambda x: [1.0, jnp.sin(x)]).ok
