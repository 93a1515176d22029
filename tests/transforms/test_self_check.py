"""`check=True` finds wrong derivatives, names the equation, raises no false alarm, and changes no compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.transforms import _hessian, _laplacian, _mean_hessian, _per_example_grads
from tests.scenarios import forward_only, reverse_only

RNG = np.random.default_rng(0)
W, B = RNG.standard_normal((3, 2)), RNG.standard_normal(2)
XS, YS = RNG.standard_normal((5, 3)), RNG.standard_normal((5, 2))


def loss(params, x, y):
    return jnp.sum((jnp.tanh(x @ params["w"] + params["b"]) - y) ** 2)


def mean(params, x, y):
    return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, x, y))


def arguments(dtype):
    return {"w": jnp.asarray(W, dtype), "b": jnp.asarray(B, dtype)}, jnp.asarray(XS, dtype), jnp.asarray(YS, dtype)


CHECKED = {
    "hessian": lambda check: curvature.hessian(mean, check=check),
    "mean_hessian": lambda check: curvature.mean_hessian(loss, check=check),
    "per_example_grad_norm": lambda check: curvature.per_example_grad_norm(loss, check=check),
    "clipped_grad": lambda check: curvature.clipped_grad(loss, 1.0, check=check),
    "per_example_grad_moments": lambda check: curvature.per_example_grad_moments(loss, check=check),
    "hessian_diagonal": lambda check: lambda *args: curvature.hessian_diagonal(mean, *args, check=check),
    "laplacian": lambda check: curvature.laplacian(mean, check=check),
}


# ---- planted faults --------------------------------------------------------------------------------------------------


def transposed(result):
    """A Hessian whose block of ``w`` with itself has the rows and columns of each matrix exchanged."""
    block = result["w"]["w"]
    turned = block.reshape(3, 2, 2, 3).transpose(0, 1, 3, 2).reshape(block.shape)
    return result | {"w": result["w"] | {"w": turned}}


def plant(monkeypatch, name):
    """Make the rule that a function stands on wrong, in one leaf where it can."""
    if name in ("hessian", "mean_hessian"):
        right = _mean_hessian._assemble
        monkeypatch.setattr(_mean_hessian, "_assemble", lambda *args: transposed(right(*args)))
    elif name == "hessian_diagonal":
        right = _hessian._curvature_along

        def doubled(program, composition, leaf):
            along = right(program, composition, leaf)
            return lambda v: along(v) * (1 if leaf.leaves.start else 2)

        monkeypatch.setattr(_hessian, "_curvature_along", doubled)
    elif name == "laplacian":
        right = _laplacian.push_jets
        halve = lambda jets: [jet._replace(lap=jet.lap / 2) for jet in jets]
        monkeypatch.setattr(_laplacian, "push_jets", lambda *args: halve(right(*args)))
    else:
        right = _per_example_grads.trace_taps
        wrong = lambda p, x, y: loss({"w": p["w"], "b": 2 * p["b"] - jax.lax.stop_gradient(p["b"])}, x, y)

        def trace(of_example, params, example):
            alone = not isinstance(params, dict)  # one leaf alone: only that of ``b`` is wrong
            if alone and params.ndim == 2:
                return right(of_example, params, example)
            if alone:
                return right(lambda p, *e: of_example(2 * p - jax.lax.stop_gradient(p), *e), params, example)
            return right(wrong, params, example)

        monkeypatch.setattr(_per_example_grads, "trace_taps", trace)


FAULTS = {
    "hessian": r"H v \(the block of 'w' and 'w' is farthest off\) differs from forward over reverse mode applied to f",
    "mean_hessian": r"H v \(the block of 'w' and 'w' is farthest off\) differs from forward over reverse",
    "per_example_grad_norm": r"result for three examples differs from jax\.vmap\(jax\.grad\(loss\)\).*Leaf 'b' enters",
    "clipped_grad": r"result for three examples differs from jax\.vmap\(jax\.grad\(loss\)\).*Leaf 'b' enters",
    "per_example_grad_moments": r"result for three examples differs from jax\.vmap.*Leaf 'b' enters",
    "hessian_diagonal": r"an entry of the diagonal differs from that of forward over reverse mode.*Leaf 'b' enters",
    "laplacian": r"the Laplacian along two random directions differs from v' H v",
}


EAGER = ("hessian", "mean_hessian", "per_example_grad_norm", "laplacian")


@pytest.mark.thin
@pytest.mark.parametrize(("name", "traced"), [*((name, False) for name in EAGER), *((name, True) for name in CHECKED)])
def test_a_planted_fault_raises(monkeypatch, name, traced):
    args = arguments("float32")
    plant(monkeypatch, name)
    checked, unchecked = CHECKED[name](True), CHECKED[name](False)
    unchecked(*args)  # the fault passes without the check
    with pytest.raises(RuntimeError, match=f"^{name}: check=True found that .*{FAULTS[name]}") as error:
        (jax.jit(checked) if traced else checked)(*args)
    assert re.search(r"through \w+ at \S*test_self_check\.py:\d+", str(error.value)), error.value


def test_the_error_names_rule_and_line(monkeypatch):
    plant(monkeypatch, "hessian")
    with pytest.raises(
        RuntimeError, match=r"Leaf 'w' enters through dot_general at .*, taken by the rule: taps along 2"
    ):
        curvature.hessian(mean, check=True)(*arguments("float32"))


def test_a_fault_in_one_small_block_is_found(monkeypatch):
    """Rows are compared leaf by leaf: the block that is wrong here is a hundredth of the largest one."""
    right = _mean_hessian._assemble

    def wrong(*args):
        result = right(*args)
        return result | {"b": result["b"] | {"b": 2 * result["b"]["b"]}}

    monkeypatch.setattr(_mean_hessian, "_assemble", wrong)
    with pytest.raises(RuntimeError, match="the block of 'b' and 'b' is farthest off"):
        curvature.mean_hessian(lambda p, x, y: loss({"w": p["w"], "b": 0.1 * p["b"]}, x, y), check=True)(
            *arguments("float32")
        )


@pytest.mark.parametrize("blocks", ["diagonal", ("w", ""), ("", "w")], ids=str)
def test_blocks_are_checked(monkeypatch, blocks):
    args = arguments("float32")
    assert curvature.hessian(mean, blocks=blocks, check=True)(*args)
    right = _hessian.hessian_of_examples
    monkeypatch.setattr(_hessian, "hessian_of_examples", lambda *args: jax.tree.map(lambda a: 2 * a, right(*args)))
    with pytest.raises(RuntimeError, match="H v"):
        curvature.hessian(mean, blocks=blocks, check=True)(*args)


def test_a_nan_where_the_product_is_finite_is_found(monkeypatch):
    right = _hessian.hessian_of_examples
    monkeypatch.setattr(
        _hessian, "hessian_of_examples", lambda *args: jax.tree.map(lambda a: a * jnp.nan, right(*args))
    )
    with pytest.raises(RuntimeError, match="by inf of its size"):
        curvature.hessian(mean, check=True)(*arguments("float32"))


# ---- no false alarm, and nothing changes -----------------------------------------------------------------------------


OTHER_DTYPES = [(name, dtype) for name in ("hessian", "clipped_grad") for dtype in ("float64", "bfloat16")]


@pytest.mark.thin
@pytest.mark.parametrize(("name", "dtype"), [*((name, "float32") for name in CHECKED), *OTHER_DTYPES])
def test_right_results_pass_unchanged(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        args = arguments(dtype)
        checked, plain = CHECKED[name](True)(*args), CHECKED[name](False)(*args)
        for one, other in zip(jax.tree.leaves(checked), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(np.asarray(one, float), np.asarray(other, float))


@pytest.mark.parametrize("name", CHECKED)
def test_the_compiled_program_is_the_same(name):
    args = arguments("float32")
    assert str(jax.make_jaxpr(CHECKED[name](True))(*args)) == str(jax.make_jaxpr(CHECKED[name](False))(*args))


@pytest.mark.slow
def test_closed_over_tracers_are_checked(monkeypatch):
    """Parameters, data and other constants may all come from an outer ``jit``, ``vmap`` or ``grad``."""
    params, x, y = arguments("float32")

    def scaled(scale, x):
        found = curvature.hessian(lambda p: scale * mean(p, x, y), check=True)(params)
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(found))

    scales, two = jnp.arange(1.0, 4.0, dtype="float32"), jnp.float32(2)
    value = float(scaled(two, x)) / 2
    assert jax.jit(scaled)(two, x) == pytest.approx(2 * value, rel=1e-4)
    np.testing.assert_allclose(jax.vmap(scaled, (0, None))(scales, x), scales * value, rtol=1e-4)
    assert jax.grad(scaled)(two, x) == pytest.approx(value, rel=1e-4)
    plant(monkeypatch, "hessian")
    over_lanes = lambda f: lambda scale, x: jax.vmap(f, (0, None))(scale * scales, x)
    for transform in (jax.jit, jax.grad, over_lanes):
        fresh = lambda scale, x: scaled(scale, x)  # jit has a program for ``scaled`` from before
        with pytest.raises(RuntimeError, match="the block of 'w' and 'w'"):
            transform(fresh)(two, x)


SPECIAL = {
    "vector-valued": (lambda x: {"a": jnp.sin(x) * x[0], "b": x[1] * x[2]}, np.arange(1.0, 4.0)),
    "logarithm": (lambda x: jnp.sum(jnp.log(x) * x), np.arange(1.0, 4.0)),
    "lookup": (
        lambda x: jnp.mean(jnp.tanh(x[jnp.array([2, 0, 1, 1, 2])] * np.arange(5.0)) ** 2),
        np.arange(1.0, 4.0),
    ),
    "linear": (lambda x: jnp.sum(x), np.arange(3.0)),
    "cancels": (lambda x: jnp.sum(x**2) - jnp.sum(x * x) + x[0], np.arange(3.0) + 0.1),
    "relu at its kink": (lambda x: jnp.mean(jax.nn.relu(jnp.eye(3) @ x) ** 2), np.zeros(3)),
    "no forward mode": (lambda x: jnp.sum(reverse_only(x)), np.arange(1.0, 4.0)),
    "no reverse mode": (lambda x: jnp.sum(forward_only(x)), np.arange(1.0, 4.0)),
    "no entries": (lambda x: jnp.sum(x**2), np.zeros(0)),
    "random numbers": (lambda x: jnp.sum(x * jax.random.normal(jax.random.key(0), (3,))) ** 2, np.arange(3.0)),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", SPECIAL)
def test_special_functions_pass(name):
    fun, x = SPECIAL[name]
    curvature.hessian(fun, check=True)(x)
    jax.jit(curvature.hessian(fun, check=True))(x)


def test_a_function_that_branches_on_values_has_nothing_to_check():
    fun = lambda x: x**2 if x > 0 else -x
    assert curvature.hessian(fun, check=True)(2.0) == 2
    assert curvature.hessian_diagonal(fun, 2.0, check=True) == 2
    assert curvature.laplacian(fun, check=True)(2.0) == 2


def test_traced_keys_tokens_and_flags_get_valid_values():
    table = jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)

    def fun(table, tokens, flags, key):
        noise = jax.random.normal(key, (3,), "float32")
        rows = jnp.where(flags[:, None], table[tokens], jnp.float32(0))
        return jnp.mean(jnp.sum(jnp.tanh(rows * noise[None]) ** 2, axis=1))

    args = table, jnp.array([0, 3, 1, 1, 2]), jnp.array([True, False, True, True, True]), jax.random.key(1)
    found = jax.jit(curvature.hessian(fun, check=True))(*args)
    np.testing.assert_allclose(found, jax.hessian(fun)(*args), rtol=1e-4, atol=1e-6)


def test_integer_data_of_per_example_gradients_is_checked():
    """Labels are data without a rounding; where they are traced, valid ones are drawn."""
    cross_entropy = lambda w, x, label: -jax.nn.log_softmax(x @ w)[label]
    w, x, labels = jnp.asarray(W, jnp.float32), jnp.asarray(XS, jnp.float32), jnp.array([0, 1, 1, 0, 1])
    gradients = jax.vmap(jax.grad(cross_entropy), (None, 0, 0))(w, x, labels)
    expected = jnp.sqrt(jnp.sum(gradients**2, (1, 2)))
    checked = curvature.per_example_grad_norm(cross_entropy, check=True)
    np.testing.assert_allclose(checked(w, x, labels), expected, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(checked)(w, x, labels), expected, rtol=1e-5)


def test_mixed_precision_inside_is_judged_by_the_coarser_dtype():
    """Products in half precision of float32 parameters differ by half-precision rounding."""

    def half(params, x, y):
        return mean(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params), x, y).astype(jnp.float32)

    params, x, y = arguments("float32")
    curvature.hessian(half, check=True)(params, x.astype(jnp.bfloat16), y.astype(jnp.bfloat16))


def test_a_rule_that_is_no_derivative_gives_what_jax_gives():
    """The matrix is the derivative of what reverse mode returns, symmetric or not, in both compositions."""

    @jax.custom_vjp
    def skew(x):
        return jnp.sum(x**2)

    skew.defvjp(lambda x: (jnp.sum(x**2), x), lambda x, d: (d * (x + jnp.roll(x, 1) ** 2),))
    x = np.arange(1.0, 4.0)
    expected = np.eye(3) + 2 * np.roll(np.diag(np.roll(x, 1)), -1, 1)  # g[i] = x[i] + x[i - 1]**2
    for mode in ("fwd_over_rev", "rev_over_rev"):
        found = curvature.hessian(lambda x: skew(x), mode=mode, check=True)(x)
        np.testing.assert_allclose(found, expected)
