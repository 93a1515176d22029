"""Which compositions are legal: auto never raises where one works, and says why where none does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from tests.oracles import assert_close
from tests.scenarios import forward_only, implicit_root, looping_rule, reverse_only

X = np.array([0.3, 0.7])


def through_jit(fun):
    return lambda x: jnp.sum(jax.jit(fun)(x) ** 2)


def through_scan(fun):
    return lambda x: jnp.sum(jax.lax.scan(lambda carry, _: (fun(carry), None), x, None, length=2)[0])


def through_cond(fun):
    return lambda x: jnp.sum(jax.lax.cond(x[0] > 0, fun, jnp.cos, x))


def through_remat(fun):
    return lambda x: jnp.sum(jax.checkpoint(fun)(x))


def through_vmap(fun):
    return lambda x: jnp.sum(jax.vmap(fun)(x))


WRAPPERS = [through_jit, through_scan, through_cond, through_remat, through_vmap]
wrapped = pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)


@wrapped
def test_custom_vjp_takes_reverse_over_reverse(wrap):
    fun, plain = wrap(reverse_only), wrap(jnp.sin)
    v = jnp.array([1.0, 2.0])
    with pytest.raises((TypeError, NotImplementedError), match="custom_vjp"):
        jax.hessian(fun)(X)
    want = jax.hessian(plain)(X)
    assert_close(curvature.hessian(fun)(X), want)
    assert_close(curvature.hvp(fun, X, v), want @ v)
    assert_close(curvature.linearize_grad(fun, X)[2](v), want @ v)
    with pytest.raises(TypeError, match=r"mode='fwd_over_rev' is not legal for f because of custom_vjp_call at .*"):
        curvature.hvp(fun, X, v, mode="fwd_over_rev")


@pytest.mark.thin
@wrapped
def test_a_loop_of_unknown_length_takes_forward_over_forward(wrap):
    fun, plain = wrap(forward_only), wrap(lambda x: x**3)
    v = jnp.array([1.0, 2.0])
    want = jax.hessian(plain)(X)
    assert_close(curvature.hessian(fun)(X), want)
    assert_close(curvature.hvp(fun, X, v), want @ v)
    value, grad, hvp_fn = curvature.linearize_grad(fun, X)
    assert_close(value, plain(X))
    assert_close(grad, jax.grad(plain)(X))
    assert_close(hvp_fn(v), want @ v)
    assert_close(curvature.jacobian(fun)(X), jax.grad(plain)(X))
    with pytest.raises(TypeError, match=r"mode='rev_over_rev' is not legal for f because of while at .*scenarios.py"):
        curvature.hessian(fun, mode="rev_over_rev")(X)


def test_no_composition_is_a_clear_error():
    fun = lambda x: jnp.sum(reverse_only(forward_only(x)))
    for call in (lambda: curvature.hvp(fun, X, X), lambda: curvature.hessian(fun)(X)):
        with pytest.raises(TypeError, match=r"no composition .* blocked by while at .*; .* blocked by custom_vjp_call"):
            call()


def test_a_callback_has_no_derivative_and_says_so():
    def fun(x):
        return jnp.sum(jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x))

    with pytest.raises(TypeError, match=r"pure_callback at .*test_modes.py"):
        curvature.hvp(fun, X, X)


def test_a_custom_jvp_is_judged_by_its_rule():
    root = lambda a: jnp.sum(jnp.stack([implicit_root(a[0]), implicit_root(a[1])]))
    want = jax.hessian(lambda a: jnp.sum(jnp.sqrt(a)))(X)
    assert_close(curvature.hessian(root)(X), want, roundings=1e4)
    assert_close(curvature.hvp(root, X, X, mode="fwd_over_rev"), want @ X, roundings=1e4)
    looping = lambda x: jnp.sum(looping_rule(x))
    assert_close(curvature.hessian(looping)(X), 2 * jnp.eye(2))
    with pytest.raises(TypeError, match="because of while"):
        curvature.hvp(looping, X, X, mode="fwd_over_rev")


@pytest.mark.thin
@pytest.mark.parametrize(
    "fun",
    [
        lambda x: jnp.sum(x * jax.lax.stop_gradient(forward_only(x))),
        lambda x: jnp.sum(x**2) + 0 * jax.lax.while_loop(lambda i: i < 3, lambda i: i + 1, 0),
        lambda x: jnp.sum(x**2 * forward_only(jnp.ones(2))),
        lambda x: jnp.sum(jax.lax.fori_loop(0, 3, lambda i, y: y * x, x)),
        lambda x: jax.jit(lambda x: (jnp.sum(x**3), forward_only(x)))(x)[0],
        lambda x: jnp.sum(
            jax.lax.scan(lambda c, _: ((jnp.sin(c[0]), forward_only(c[1])), c[1]), (x, x), None, length=2)[0][0]
        ),
        lambda x: jnp.sum(jax.scipy.sparse.linalg.cg(lambda v: (2 + x[0] ** 2) * v, x)[0]),
        lambda x: jnp.sum(jax.nn.relu(x) ** 3 + jax.nn.softplus(x)),
    ],
    ids=[
        "stop_gradient",
        "integer_loop",
        "loop_over_data",
        "static_fori",
        "unused_by_jit",
        "unused_by_scan",
        "linear_solve",
        "library_custom_jvp",
    ],
)
def test_what_does_not_carry_a_derivative_blocks_nothing(fun):
    want = jax.hessian(fun)(X)
    assert_close(curvature.hvp(fun, X, X, mode="fwd_over_rev"), want @ X, roundings=1e3)
    assert_close(curvature.hessian(fun, mode="rev_over_rev")(X), want, roundings=1e3)


def test_a_carry_becomes_active_in_a_later_iteration():
    def fun(x):  # the second carry sees x only from the second iteration on
        def body(carry, _):
            a, b = carry
            return (a * x[0], reverse_only(b) + a), None

        (_, b), _ = jax.lax.scan(body, (x[1], jnp.asarray(1.0)), None, length=3)
        return b

    plain = lambda x: fun_with_sine(x)
    assert_close(curvature.hessian(fun)(X), jax.hessian(plain)(X))


def fun_with_sine(x):
    a, b = x[1], 1.0
    for _ in range(3):
        a, b = a * x[0], jnp.sin(b) + a
    return b


def test_per_example_derivatives_of_a_forward_only_loss():
    loss = lambda w, x: jnp.sum(forward_only(w) * x)
    w, batch = jnp.array([1.0, 2.0]), jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert_close(curvature.per_example_grad(loss)(w, batch), 3 * w[None] ** 2 * batch)
    hessians = curvature.per_example_hessian(loss)(w, batch)
    assert_close(hessians, jax.vmap(lambda x: jnp.diag(6 * w * x))(batch))


def test_the_condition_of_a_while_loop_may_close_over_values():
    """From x = (1, 2) the loop multiplies once: ``f = u**2 + sum(x**3)`` with ``u = 1.5 x1 + 3 x1**2``."""

    def f(x):
        limit, factor = 10 * x[0], 1.5 + 3 * x[1]
        grown = jax.lax.while_loop(lambda c: c < limit, lambda c: c * factor, x[1])
        return grown**2 + jnp.sum(x**3)

    x = jnp.array([1.0, 2.0])
    assert_close(curvature.jacobian(f)(x), [3.0, 2 * 15.0 * 13.5 + 12.0], x.dtype)
    assert_close(curvature.hvp(f, x, jnp.array([1.0, 0.5])), [6.0, (2 * 13.5**2 + 2 * 15.0 * 6.0 + 12.0) / 2], x.dtype)


def test_a_padding_value_alone_has_no_reverse_mode():
    """JAX cannot transpose it. ``f = (12 x**2 + 23) x``: padding lies at the even places, data at the odd ones."""

    def f(x):
        return jnp.sum(jax.lax.pad(jnp.arange(3.0), x, ((1, 1, 1),)) ** 2 * jnp.arange(7.0)) * x

    x = jnp.array(2.0)
    assert_close(curvature.jacobian(f)(x), 3 * 12 * 2.0**2 + 23.0)
    assert_close(curvature.hessian(f)(x), 2 * 3 * 12 * 2.0)
    assert_close(curvature.mean_hessian(lambda x, a: a * f(x))(x, jnp.array([1.0, 2.0])), 1.5 * 2 * 3 * 12 * 2.0)
