"""Laplacians against closed forms and the traces of dense Hessians; derivatives along a direction."""

import functools

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvature
from tests.oracles import assert_close, assert_trees_close, flat
from tests.scenarios import SCENARIOS, forward_only, implicit_root, looping_rule, make_mlp, reverse_only

X = np.array([0.7, 1.3, 0.9, 1.1])
A = np.random.default_rng(0).normal(size=(4, 4))


def hessian_trace(fun, x, *args, jacobian=jax.jacfwd):
    """The trace of the Hessian of each output by all entries of ``x``."""
    vector, unravel = ravel_pytree(x)
    hessian = jax.jit(jacobian(jacobian(lambda v: fun(unravel(v), *args))))(vector)
    return jax.tree.map(lambda h: jnp.trace(h, axis1=-2, axis2=-1), hessian)


# ---- closed forms ------------------------------------------------------------------------------------------------


def test_polynomials(dtype):
    got = curvature.laplacian(lambda x: x[0] ** 4 * x[1] + x[1] ** 3)(jnp.asarray([2.0, 5.0], dtype))
    assert got.dtype == dtype
    assert got == 12 * 2**2 * 5 + 6 * 5


def test_radial_functions():
    """The Laplacian of r^p in n dimensions is p (p + n - 2) r^(p - 2)."""
    r = np.linalg.norm(X)
    for power in (3.0, -1.0):
        got = curvature.laplacian(lambda x, power=power: jnp.linalg.norm(x) ** power)(X)
        assert_close(got, power * (power + 2) * r ** (power - 2))


@pytest.mark.parametrize(
    "harmonic",
    [
        lambda x: jnp.exp(x[0]) * jnp.sin(x[1]),
        lambda x: jnp.log(x[0] ** 2 + x[1] ** 2),
        lambda x: jnp.arctan2(x[1], x[0]),
        lambda x: ((x[0] + 1j * x[1]) ** 5).imag,
    ],
)
def test_harmonic_functions_have_none(harmonic):
    with jax.numpy_dtype_promotion("standard"):
        assert abs(curvature.laplacian(harmonic)(np.array([0.4, 1.3]))) <= 1e-13


def test_laplacian_of_laplacian():
    """The biharmonic of r^4 in n dimensions is 8 n (n + 2)."""
    biharmonic = curvature.laplacian(curvature.laplacian(lambda x: jnp.sum(x**2) ** 2))
    assert_close(jax.jit(biharmonic)(X), 8 * 4 * 6)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_scenarios(scenario, dtype):
    x, args = scenario.make(dtype)
    value, got = jax.jit(curvature.laplacian(scenario.fun, with_value=True))(x, *args)
    assert got.dtype == value.dtype == dtype
    assert_close(got, np.trace(scenario.hessian(flat(x), *args)), dtype, roundings=256)
    assert_close(value, scenario.fun(x, *args), dtype)


# ---- every rule against the trace of the Hessian -----------------------------------------------------------------


def scan_network(x):
    def layer(carry, weights):
        hidden, count = carry
        return (jnp.tanh(weights @ hidden), count + 1), jnp.sum(hidden * hidden)

    (hidden, _), norms = jax.lax.scan(layer, (x, 0), jnp.stack([A, A.T, A]))
    return hidden, norms**2 * norms[0]


def spd(x):
    return jnp.outer(x, x) + 5 * jnp.eye(4) + x[0] * (A + A.T)


FUNCTIONS = {
    # entry by entry: composed before they meet the directions
    "activations": lambda x: (jax.nn.softplus(A @ x), jax.nn.gelu(A @ x), jax.nn.relu(A @ x) ** 2),
    "two roots": lambda x: (x / (A @ x), x ** x[::-1], jnp.arctan2(x, x[::-1]), jnp.logaddexp(A @ x, x)),
    "piecewise": lambda x: (jnp.clip(x**2, 0.6, 1.5) * x, jnp.floor(x) * x[0] ** 2, jnp.where(x > 1, x**2, jnp.sin(x))),
    "inactive": lambda x: (jax.lax.stop_gradient(x) * x**2, jnp.ones(3), x[jnp.argmax(x)] ** 2),
    # linear and bilinear
    "movement": lambda x: ((x**2).at[1].set(x[0] ** 3), x[np.array([0, 2, 2])] ** 3, jnp.roll(x**2, 1).reshape(2, 2)),
    "sums": lambda x: (jnp.cumsum(x * x) ** 2, jnp.zeros(3).at[np.array([1, 1, 2, 0])].add(x**2)),
    "products": lambda x: (jnp.outer(x, x) @ A @ jnp.outer(x, jnp.sin(x)), x @ x),
    "batched product": lambda x: jnp.einsum("bi,bij->bj", jnp.outer(x, x), jnp.sin(x[:, None, None] * A[None])),
    "fft": lambda x: jnp.abs(jnp.fft.fft(x * x)) ** 2,
    # jvp of jvp of one equation
    "softmax": lambda x: (jax.nn.softmax(A @ x), jax.nn.standardize(A @ x), jax.nn.logsumexp(A @ x)),
    "order": lambda x: (jnp.sort(x) ** 2 * x, jnp.max(x * x) * x),
    "reductions": lambda x: (jnp.prod(x), jnp.cumprod(x)),
    "convolution": lambda x: jnp.convolve(x * x, jnp.sin(x[:2])),
    "linear algebra": lambda x: (jnp.linalg.solve(spd(x) + A, x * x), jnp.linalg.cholesky(spd(x))),
    "determinant": lambda x: (jnp.linalg.slogdet(spd(x))[1], jnp.linalg.norm(x)),
    # calls, branches and loops
    "remat": jax.checkpoint(lambda x: jnp.sin(A @ x) ** 2),
    "cond": lambda x: jax.lax.cond(x[0] > 0.5, lambda x: jnp.sum(x**3), lambda x: jnp.ones(()), x),
    "switch": lambda x: jax.lax.switch(1, [lambda x: x, lambda x: x**2 * x[0]], x),
    "scan": scan_network,
    "scan over x": lambda x: jax.lax.scan(lambda c, y: (jnp.sin(c * y) + y, c), x, A[:3] * x[None], reverse=True),
    "while": lambda x: forward_only(A @ x),
    # custom rules
    "custom_jvp of a loop": lambda x: implicit_root(jnp.sum(x**2)),
    "custom_jvp with a loop": lambda x: looping_rule(jnp.sum(x * x)),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", FUNCTIONS)
def test_trace_of_the_hessian(name):
    value, got = jax.jit(curvature.laplacian(FUNCTIONS[name], with_value=True))(X)
    assert_trees_close(got, hessian_trace(FUNCTIONS[name], X), roundings=512)
    assert_trees_close(value, jax.jit(FUNCTIONS[name])(X))


def test_without_jit():
    assert_trees_close(curvature.laplacian(scan_network)(X), hessian_trace(scan_network, X))


def test_the_rule_of_a_custom_jvp_counts_and_not_its_body():
    @jax.custom_jvp
    def wrong(x):
        return jnp.sin(x)

    wrong.defjvp(lambda primals, tangents: (wrong(*primals), primals[0] ** 3 * tangents[0]))
    assert_close(curvature.laplacian(lambda x: jnp.sum(wrong(x)))(X), np.sum(3 * X**2))


def test_a_rule_that_mixes_entries_is_not_taken_entry_by_entry():
    @jax.custom_jvp
    def mixing(x):
        return 2 * x

    mixing.defjvp(lambda primals, tangents: (mixing(*primals), jnp.cumsum(primals[0] * tangents[0])))
    # with y = 2 x by the body, J[k] = cumsum(x_k e_k) and L = (1, 2, 3, 4) by the rule
    got = curvature.laplacian(lambda x: mixing(x) ** 2)(X)
    assert_close(got, 2 * np.cumsum(X**2) + 2 * (2 * X) * np.arange(1, 5))


def test_a_custom_vjp_is_differentiated_by_reverse_mode_and_said_to_be():
    fun = lambda x: jnp.prod(reverse_only(jnp.asarray(A) @ x))
    laplacian = curvature.laplacian(fun)
    assert_close(jax.jit(laplacian)(X), hessian_trace(fun, X, jacobian=jax.jacrev))
    (step,) = laplacian.explain(X).fallbacks
    assert (step.primitive, step.rule) == ("custom_vjp_call", "each direction, by reverse mode")
    assert "test_laplacian.py" in step.where
    assert "fallback: custom_vjp_call at " in str(laplacian.explain(X))


def test_a_branch_on_a_value_is_taken_whole():
    fun = lambda x: jnp.sum(x**3) if x[0] > 0 else x[0]
    laplacian = curvature.laplacian(fun, with_value=True)
    value, got = laplacian(jnp.asarray(X))
    assert_close(got, 6 * X.sum())
    assert_close(value, np.sum(X**3))
    assert [step.primitive for step in laplacian.explain(X).fallbacks] == ["a branch on a value"]


def test_explain_names_the_rules():
    fun = lambda x: jnp.sum(jnp.tanh(A @ x) @ jnp.outer(x, x)) + jnp.prod(x)
    steps = {step.primitive: step.rule for step in curvature.laplacian(fun).explain(X).steps}
    assert steps["tanh"] == "entry by entry"
    assert steps["dot_general"] == steps["mul"] == "bilinear"
    assert steps["reduce_prod"] == "each direction"
    assert steps["reduce_sum"] == "linear"
    assert curvature.laplacian(fun).explain(X).fallbacks == ()


# ---- weighted sums -----------------------------------------------------------------------------------------------


def test_a_factor_weighs_the_second_derivatives():
    x, args = SCENARIOS[0].make(jnp.float64)
    rng = np.random.default_rng(1)
    factor = jax.tree.map(lambda leaf: rng.normal(size=(3, *leaf.shape)), x)
    rows = np.concatenate([leaf.reshape(3, -1) for leaf in jax.tree.leaves(factor)], axis=1)
    got = curvature.laplacian(SCENARIOS[0].fun, factor=factor)(x, *args)
    assert_close(got, np.trace(rows @ SCENARIOS[0].hessian(flat(x), *args) @ rows.T))


def test_points_inside_f_share_directions():
    points = np.random.default_rng(2).normal(size=(5, 3))
    shared = np.broadcast_to(np.eye(3)[:, None], (3, 5, 3))
    got = curvature.laplacian(lambda x: jnp.prod(x, axis=1) * jnp.sum(x**2, axis=1), factor=shared)(points)
    want = jax.vmap(curvature.laplacian(lambda x: jnp.prod(x) * jnp.sum(x**2)))(points)
    assert_close(got, want)


# ---- under transformations ---------------------------------------------------------------------------------------


def network(x, params):
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return (x @ params[-1]["w"] + params[-1]["b"])[0]


def residual(laplacian, params, points):
    return jnp.mean(jax.vmap(laplacian, (0, None))(points, params) ** 2)


@pytest.mark.slow
def test_gradient_by_parameters_over_many_points(dtype):
    params, points, _ = make_mlp((3, 5, 1), 4, dtype)
    got = jax.jit(jax.grad(functools.partial(residual, curvature.laplacian(network))))(params, points)
    trace = lambda x, params: jnp.trace(jax.hessian(network)(x, params))
    want = jax.grad(functools.partial(residual, trace))(params, points)
    assert_trees_close(got, want, dtype, roundings=512)


def test_gradient_and_map_through_control_flow():
    got = jax.jit(jax.grad(lambda x: jnp.sum(curvature.laplacian(scan_network)(x)[0])))(X)
    assert_close(got, jax.grad(lambda x: jnp.sum(hessian_trace(scan_network, x)[0]))(jnp.asarray(X)), roundings=512)
    points = np.stack([X, -X])
    assert_close(
        jax.vmap(curvature.laplacian(FUNCTIONS["cond"]))(points),
        [hessian_trace(FUNCTIONS["cond"], x) for x in points],
    )


def equations(jaxpr):
    for eqn in jaxpr.eqns:
        yield eqn
        for body in jex.core.jaxprs_in_params(eqn.params):
            yield from equations(body)


def test_each_layer_costs_one_product_of_all_directions_and_two_of_one():
    """No second derivative has an axis of directions, and nothing is as large as a Hessian of a layer."""
    params, points, _ = make_mlp((7, 11, 13, 1), 1)
    jaxpr = jax.make_jaxpr(curvature.laplacian(network))(points[0], params).jaxpr
    products = [eqn.outvars[0].aval.shape for eqn in equations(jaxpr) if eqn.primitive.name == "dot_general"]
    # the first layer has no Laplacian to pass on
    assert sorted(products) == sorted([(11,), (7, 11), (13,), (7, 13), (13,), (1,), (7, 1), (1,)])
    assert max(v.aval.size for eqn in equations(jaxpr) for v in eqn.outvars) <= 7 * 13


def test_a_new_point_traces_nothing():
    traces = []

    def counted(x):
        traces.append(1)
        return jnp.sum(x**3)

    laplacian = jax.jit(curvature.laplacian(counted))
    laplacian(X)
    laplacian(2 * X)
    assert len(traces) == 1


# ---- along one direction -----------------------------------------------------------------------------------------


def test_directional_derivatives(dtype):
    x, v = jnp.asarray(0.3, dtype), jnp.asarray(2.0, dtype)
    got = jax.jit(functools.partial(curvature.directional_derivatives, jnp.sin, order=4))(x, v)
    want = (2 * np.cos(0.3), -4 * np.sin(0.3), -8 * np.cos(0.3), 16 * np.sin(0.3))
    for one, other in zip(got, want, strict=True):
        assert one.dtype == dtype
        assert_close(one, other, dtype)


def test_directional_derivatives_of_trees():
    x, v = {"a": X, "b": np.array(2.0)}, {"a": -X, "b": np.array(0.5)}
    got = curvature.directional_derivatives(lambda x, c: {"y": c * x["a"] * x["b"] ** 2}, x, v, 3.0, order=2)
    assert_trees_close(got, ({"y": jnp.asarray(3 * X * (-4 + 2))}, {"y": jnp.asarray(3 * X * (0.5 - 4))}))


def test_directional_derivatives_without_forward_mode():
    got = curvature.directional_derivatives(reverse_only, X, np.ones(4), order=3)
    assert_trees_close(got, tuple(map(jnp.asarray, (np.cos(X), -np.sin(X), -np.cos(X)))))
