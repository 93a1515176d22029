"""Custom derivative rules that are no derivatives, or that not every mode can use."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.programs._pushforward import asymmetric_rule
from tests.oracles import assert_close

A = np.array([[0.3, -0.7, 0.2], [0.5, 0.1, -0.4], [-0.2, 0.6, 0.9]])
X = np.array([0.7, -0.4, 1.3])


@jax.custom_vjp
def clip_cotangent(x):
    return x


clip_cotangent.defvjp(lambda x: (x, None), lambda _, ct: (jnp.clip(ct, -0.5, 0.5),))


@jax.custom_jvp
def straight_through(x):
    return jnp.round(x)


straight_through.defjvp(lambda primals, tangents: (jnp.round(primals[0]), tangents[0]))


@jax.custom_jvp
def half_product(x, y):
    return x * y


half_product.defjvp(lambda primals, tangents: (primals[0] * primals[1], tangents[0] * primals[1]))


@jax.custom_jvp
def reverse_tangent(x):
    return x**2


reverse_tangent.defjvp(lambda primals, tangents: (primals[0] ** 2, 2 * primals[0] * tangents[0][::-1]))

ASYMMETRIC = {
    "vjp": lambda x: jnp.sum(clip_cotangent(A @ x) ** 2),
    "by another value": lambda x: jnp.sum(straight_through(A @ x) * (A.T @ x)),
    "two arguments": lambda x: jnp.sum(half_product(A @ x, x**2)),
    "across entries": lambda x: jnp.sum(reverse_tangent(A @ x) ** 2),
    "jit": lambda x: jnp.sum(jax.jit(clip_cotangent)(A @ x) ** 2),
    "remat": lambda x: jnp.sum(jax.checkpoint(clip_cotangent)(A @ x) ** 2),
    "vmap": lambda x: jnp.sum(jax.vmap(clip_cotangent)(A * x[None]) ** 2),
    "scan": lambda x: jnp.sum(jax.lax.scan(lambda c, _: (clip_cotangent(A @ c), None), x, length=2)[0] ** 2),
    "while": lambda x: jnp.sum(jax.lax.fori_loop(0, jnp.asarray(2), lambda _, c: clip_cotangent(A @ c), x) ** 2),
    "cond": lambda x: jnp.sum(jax.lax.cond(x[0] > 0, clip_cotangent, jnp.sin, A @ x) ** 2),
}


@pytest.mark.parametrize("f", ASYMMETRIC.values(), ids=ASYMMETRIC)
def test_a_rule_that_may_give_an_asymmetric_hessian_is_found(f):
    assert asymmetric_rule(jax.make_jaxpr(f)(X).jaxpr).primitive in ("custom_vjp_call", "custom_jvp_call")


@jax.custom_jvp
def steep(x):
    return jnp.tanh(x)


steep.defjvp(lambda primals, tangents: (steep(primals[0]), 2 * tangents[0]))

SYMMETRIC = {
    "entrywise": lambda x: jnp.sum(steep(A @ x) ** 2),
    "relu": lambda x: jnp.sum(jax.nn.relu(A @ x) ** 2),
    "silu": lambda x: jnp.sum(jax.nn.silu(A @ x) ** 2),
    "softplus": lambda x: jnp.sum(jax.nn.softplus(A @ x)),
    "stopped": lambda x: jnp.sum(clip_cotangent(jax.lax.stop_gradient(x)) * x),
    "unused": lambda x: (clip_cotangent(x), jnp.sum(x**2))[1],
}


@pytest.mark.parametrize("f", SYMMETRIC.values(), ids=SYMMETRIC)
def test_a_rule_that_cannot_give_an_asymmetric_hessian_is_passed_over(f):
    assert asymmetric_rule(jax.make_jaxpr(f)(X).jaxpr) is None


COMPOSITIONS = ["auto", "fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd"]
HAS_ONLY_JVPS = {name: ASYMMETRIC[name] for name in ("two arguments", "across entries", "by another value")}


@pytest.mark.thin
@pytest.mark.parametrize("mode", COMPOSITIONS)
@pytest.mark.parametrize("f", HAS_ONLY_JVPS.values(), ids=HAS_ONLY_JVPS)
def test_of_a_rule_that_is_no_derivative_every_mode_gives_the_jacobian_of_jaxs_gradient(f, mode):
    want = jax.jacfwd(jax.grad(f))(X)
    assert jnp.max(jnp.abs(want - want.T)) > 0.1
    _, _, hvp_fn = curvature.linearize_grad(f, X, mode=mode)
    basis = jnp.eye(3, dtype=X.dtype)
    assert_close(curvature.hessian(f, mode=mode)(X), want, roundings=1e3)
    assert_close(jax.vmap(hvp_fn, 1, 1)(basis), want, roundings=1e3)
    assert_close(jax.vmap(lambda v: curvature.hvp(f, X, v, mode=mode), 1, 1)(basis), want, roundings=1e3)
    assert_close(curvature.hessian_diagonal(f, X, mode=mode), jnp.diag(want), roundings=1e3)
    assert_close(curvature.HessianOperator(f, X, mode=mode).as_matrix(), want, roundings=1e3)


def test_reverse_over_reverse_through_a_custom_vjp_gives_products_with_the_hessian_and_not_its_transpose():
    f = ASYMMETRIC["scan"]
    want = jax.jacfwd(jax.grad(f))(X)
    assert jnp.max(jnp.abs(want - want.T)) > 0.1
    v = jnp.asarray([1.0, -2.0, 0.5], X.dtype)
    for mode in ("auto", "fwd_over_rev", "rev_over_rev"):
        assert_close(curvature.hvp(f, X, v, mode=mode), want @ v, roundings=1e3)
        assert_close(curvature.linearize_grad(f, X, mode=mode)[2](v), want @ v, roundings=1e3)


def test_a_block_of_an_operator_by_reverse_over_reverse_is_not_the_transpose():
    f = lambda x: HAS_ONLY_JVPS["two arguments"](jnp.concatenate([x["a"], x["b"]]))
    x = {"a": X[:1], "b": X[1:]}
    want = jax.jacfwd(jax.grad(HAS_ONLY_JVPS["two arguments"]))(X)[:1, 1:]
    op = curvature.HessianOperator(f, x, mode="rev_over_rev").block("a", "b")
    assert_close(op.as_matrix(), want, roundings=1e3)


# ---- rules that reverse mode cannot transpose ------------------------------------------------------------------------


def sine_with(tangent_of):
    """A loss through a sine whose rule makes its tangent with ``tangent_of``, which changes no value."""

    @jax.custom_jvp
    def sine(x):
        return jnp.sin(x)

    sine.defjvp(lambda primals, tangents: (sine(primals[0]), tangent_of(tangents[0]) * jnp.cos(primals[0])))
    return lambda x: jnp.sum(sine(A @ x) ** 2)


NOT_TRANSPOSABLE = {
    "stop_gradient": jax.lax.stop_gradient,
    "ne": jnp.nan_to_num,
    "max": lambda t: jnp.maximum(t, -1e9),
    "abs": lambda t: jnp.abs(t) * jnp.sign(t),
    "gt": lambda t: jnp.where(t > 0, t, t),
    "sort": lambda t: t + 0 * jnp.sort(t),
    "mul": lambda t: t + 0 * t * t,
    "integer_pow": lambda t: t**1,
    "jit": jax.jit(lambda t: jnp.maximum(t, -1e9)),
    "scan": lambda t: jax.lax.scan(lambda c, _: (jnp.maximum(c, -1e9), None), t, length=2)[0],
    "cond": lambda t: jax.lax.cond(t[0] > 0, lambda t: t, lambda t: jnp.maximum(t, -1e9), t),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", NOT_TRANSPOSABLE)
def test_where_a_rule_cannot_be_transposed_auto_takes_a_forward_mode(name):
    f, want = sine_with(NOT_TRANSPOSABLE[name]), jax.hessian(lambda x: jnp.sum(jnp.sin(A @ x) ** 2))(X)
    assert_close(curvature.hessian(f)(X), want, roundings=1e3)
    assert_close(curvature.jacobian(f)(X), jax.grad(lambda x: jnp.sum(jnp.sin(A @ x) ** 2))(X), roundings=1e3)
    v = jnp.asarray([1.0, -2.0, 0.5], X.dtype)
    assert_close(curvature.hvp(f, X, v), want @ v, roundings=1e3)
    assert_close(curvature.per_example_grad(lambda x, _: f(x))(X, jnp.zeros(2))[0], jax.jacfwd(f)(X), roundings=1e3)
    if name == "stop_gradient" and "lineax" in sys.modules:  # importing lineax gives JAX its transpose
        assert_close(curvature.hessian(f, mode="fwd_over_rev")(X), want, roundings=1e3)
        return
    with pytest.raises(TypeError, match=r"(?s)hessian: .*fwd_over_rev.* at .*test_custom_rules.py"):
        curvature.hessian(f, mode="fwd_over_rev")(X)


TRANSPOSABLE = {
    "scaled": lambda t: 2 * t / 2,
    "scan": lambda t: jax.lax.scan(lambda c, _: (2 * c / 2, None), t, length=2)[0],
    "gather": lambda t: t[jnp.array([0, 1, 2])],
    "solve": lambda t: jnp.linalg.solve(A, A @ t),
    "fft": lambda t: jnp.fft.irfft(jnp.fft.rfft(t), 3),
    "scatter": lambda t: jnp.zeros_like(t).at[:2].set(t[:2]).at[2].add(t[2]),
    "remat": jax.checkpoint(lambda t: 2 * t / 2),
    "cast": lambda t: t.astype(jnp.float16).astype(t.dtype),
}


@pytest.mark.parametrize("name", TRANSPOSABLE)
def test_where_a_rule_can_be_transposed_reverse_mode_stays_legal(name):
    f = sine_with(TRANSPOSABLE[name])
    assert_close(curvature.jacobian(f, mode="rev")(X), jax.grad(f)(X), roundings=1e3)


@pytest.mark.parametrize("f", [ASYMMETRIC[name] for name in ("vjp", "across entries", "scan", "by another value")])
def test_the_laplacian_is_the_trace_of_the_hessian_that_jax_computes(f):
    got, along = jax.jit(lambda x: (curvature.laplacian(f)(x), curvature.laplacian(f, factor=x[None])(x)))(X)
    want = np.asarray(jax.jit(jax.hessian(f))(X))
    assert_close(got, np.trace(want), roundings=1e3)
    assert_close(along, X @ want @ X, roundings=1e3)


def test_the_laplacian_of_several_outputs_through_a_custom_vjp():
    f = lambda x: {"a": jnp.tanh(clip_cotangent(jnp.asarray(A) @ x)) * x[0], "b": jnp.sum(clip_cotangent(x**3))}
    got, want = jax.jit(curvature.laplacian(f))(X), jax.jit(jax.hessian(f))(X)
    assert_close(got["a"], np.trace(want["a"], axis1=1, axis2=2), roundings=1e3)
    assert_close(got["b"], np.trace(want["b"]), roundings=1e3)
