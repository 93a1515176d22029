"""``auto`` is as finite as ``jax.hessian``: reverse over reverse is taken only where it cannot make a NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.programs import _traced
from curvature.transforms import _modes
from tests.oracles import assert_close

A = np.random.default_rng(0).normal(size=(4, 4))
Z = np.array([0.0, 1.0, 0.0, 2.0])


def guarded(value, slope):
    """An entrywise function with a ``custom_jvp`` rule."""
    function = jax.custom_jvp(value)
    function.defjvp(lambda primals, tangents: (function(primals[0]), tangents[0] * slope(primals[0])))
    return function


def safe_quotient(x):
    s = jnp.where(x == 0, 1.0, x)
    return jnp.where(x == 0, 1.0, jnp.expm1(s) / s)


expm1_over_x = guarded(safe_quotient, lambda x: jnp.where(x == 0, 0.5, (x * jnp.exp(x) - jnp.expm1(x)) / x**2))
guarded_sqrt = guarded(jnp.sqrt, lambda x: jnp.where(x > 0, 0.5 / jnp.sqrt(x), 0.0))
guarded_softplus = guarded(
    lambda x: jnp.where(x > 20, x, jnp.log1p(jnp.exp(jnp.minimum(x, 20.0)))),
    lambda x: jnp.where(x > 20, 1.0, jnp.exp(x) / (1 + jnp.exp(x))),
)

CASES = {
    "expm1(x) / x": (lambda x: jnp.sum(expm1_over_x(x) * (A @ x) ** 2), Z),
    "within a network": (lambda x: jnp.sum((A @ jnp.tanh(A @ expm1_over_x(x))) ** 2), Z),
    "sqrt": (lambda x: jnp.sum((A @ guarded_sqrt(x)) ** 2), Z),
    "overflow": (lambda x: jnp.sum((A @ guarded_softplus(x)) ** 2), 1000 * Z),
    "where": (lambda x: jnp.sum((A @ jnp.where(x == 0, 1.0, jnp.expm1(x) / jnp.where(x == 0, 1.0, x))) ** 2), Z),
    "jit": (lambda x: jnp.sum((A @ jax.jit(expm1_over_x)(x)) ** 2), Z),
    "scan": (
        lambda x: jnp.sum((A @ jax.lax.scan(lambda c, _: (expm1_over_x(c) - 1, None), x, length=2)[0]) ** 2),
        Z,
    ),
    "a group of zero norm": (
        lambda x: jnp.sum((A @ x) ** 2) + jnp.linalg.norm(x[:2]) + jnp.linalg.norm(x[2:]),
        np.array([1.0, 2.0, 0.0, 0.0]),
    ),
    "a power of zero": (lambda x: jnp.sum((A @ x) ** 2) + jnp.sum(x**1.5), Z),
    "entropy at zero": (lambda x: jnp.sum((A @ x) ** 2) + jnp.sum(jax.scipy.special.entr(x)), Z),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", CASES)
def test_auto_is_finite_wherever_jax_is(name):
    f, x = CASES[name]
    want = jax.hessian(f)(x)
    finite = np.isfinite(want)
    assert finite.any()
    for got in (
        curvature.hessian(f, chunk_size=None)(x),
        curvature.per_example_hessian(lambda x, _: f(x))(x, np.zeros(1))[0],
    ):
        assert np.isfinite(got)[finite].all()
        assert_close(np.where(finite, got, 0), np.where(finite, want, 0), roundings=1e3)


def network(p, x, act):
    return act(act(x @ p["a"]) @ p["b"]) @ p["c"]


SIZES = {"a": (3, 4), "b": (4, 4), "c": (4, 3)}
P = {name: np.random.default_rng(1).normal(size=shape) for name, shape in SIZES.items()}
X = np.random.default_rng(2).normal(size=(5, 3))
LABELS = np.arange(5) % 3


def squares(p, act):
    return jnp.mean((network(p, X, act) - X) ** 2)


def cross_entropy(p, act):
    scores = jax.nn.log_softmax(network(p, X, act))
    return -jnp.mean(jnp.take_along_axis(scores, LABELS[:, None], axis=1))


def by_logsumexp(p, act):
    scores = network(p, X, act)
    return jnp.mean(jax.nn.logsumexp(scores, axis=1) - scores[:, 0])


def normalized(x):
    centered = x - jnp.mean(x, -1, keepdims=True)
    return centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5)


def choice(f):
    program = _traced.trace(lambda p: (f(p), None), P)
    return _modes.choose_composition(program, "auto", whole=True)


@pytest.mark.parametrize("loss", [squares, cross_entropy, by_logsumexp])
@pytest.mark.parametrize("act", [jnp.tanh, jax.nn.relu, jax.nn.gelu, jax.nn.softmax, normalized])
def test_ordinary_networks_keep_reverse_over_reverse_on_a_cpu(loss, act):
    assert choice(lambda p: loss(p, act)) == "rev_over_rev"


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x / jnp.sum(x),
        lambda x: jnp.log(jnp.sum(jnp.exp(x)) + x),
        lambda x: x - jnp.log(jnp.sum(jnp.exp(x - jnp.max(x, 0, keepdims=True)), 1, keepdims=True)),
        lambda x: x * jnp.log(jnp.sum(jnp.exp(x - jnp.min(x, 1, keepdims=True)), 1, keepdims=True)),
        lambda x: jnp.abs(x) ** 1.5,
        lambda x: jnp.sqrt(jnp.sum(x**2, 1, keepdims=True)) * x,
        jnp.arcsin,
        lambda x: jnp.abs(jax.lax.complex(x, x)),
    ],
)
def test_what_may_be_singular_is_taken_forward_over_reverse(act):
    assert choice(lambda p: squares(p, act)) == "fwd_over_rev"


def test_the_largest_entry_must_be_that_of_the_same_slice():
    """The maxima over rows, subtracted from columns, bound nothing."""
    square = np.eye(3)

    def wrong(p):
        z = p["b"][:3, :3] @ square
        shifted = z - jax.lax.stop_gradient(jnp.max(z, axis=0))[:, None]
        return jnp.sum(jnp.log(jnp.sum(jnp.exp(shifted), axis=0)))

    def right(p):
        z = p["b"][:3, :3] @ square
        shifted = z - jax.lax.stop_gradient(jnp.max(z, axis=0))[None]
        return jnp.sum(jnp.log(jnp.sum(jnp.exp(shifted), axis=0)))

    def over_the_other_axis(p):
        z = p["b"][:3, :3] @ square
        shifted = z - jax.lax.stop_gradient(jnp.max(z, axis=0))[None]
        return jnp.sum(jnp.log(jnp.sum(jnp.exp(shifted), axis=1)))

    assert [choice(wrong), choice(right), choice(over_the_other_axis)] == [
        "fwd_over_rev",
        "rev_over_rev",
        "fwd_over_rev",
    ]
