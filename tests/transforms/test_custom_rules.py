"""Custom derivative rules that are no derivatives, or that not every mode can use."""

import jax
import jax.numpy as jnp
import pytest

from curvature.transforms._pushforward import asymmetric_rule

A = jnp.asarray([[0.3, -0.7, 0.2], [0.5, 0.1, -0.4], [-0.2, 0.6, 0.9]])
X = jnp.asarray([0.7, -0.4, 1.3])


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


SYMMETRIC = {
    "entrywise": lambda x: jnp.sum(straight_through(A @ x) ** 2),
    "relu": lambda x: jnp.sum(jax.nn.relu(A @ x) ** 2),
    "silu": lambda x: jnp.sum(jax.nn.silu(A @ x) ** 2),
    "softplus": lambda x: jnp.sum(jax.nn.softplus(A @ x)),
    "one active argument": lambda x: jnp.sum(half_product(A @ x, jnp.ones_like(x)) ** 2),
    "stopped": lambda x: jnp.sum(clip_cotangent(jax.lax.stop_gradient(x)) * x),
    "unused": lambda x: (clip_cotangent(x), jnp.sum(x**2))[1],
}


@pytest.mark.parametrize("f", SYMMETRIC.values(), ids=SYMMETRIC)
def test_a_rule_that_cannot_give_an_asymmetric_hessian_is_passed_over(f):
    assert asymmetric_rule(jax.make_jaxpr(f)(X).jaxpr) is None
