"""Functions with hand-derived gradients and Hessians: asymmetric shapes, nested trees, scalar and size-1 leaves."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Scenario:
    """A scalar function of a tree, with its derivatives in NumPy on the vector of all entries.

    ``make`` gives ``(x, args)`` in a precision; ``gradient`` and ``hessian`` take float64 vectors and the args.
    """

    name: str
    fun: Callable[..., Any]
    make: Callable[[Any], tuple[Any, tuple[Any, ...]]]
    gradient: Callable[..., np.ndarray]
    hessian: Callable[..., np.ndarray]


def _rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def _quadratic(x, matrix):
    flat = jnp.concatenate([x["a"].reshape(-1), x["b"][0].reshape(-1), x["b"][1].reshape(-1)])
    return flat @ matrix @ flat / 2 + jnp.sum(jnp.sin(flat))


def _make_quadratic(dtype):
    rng = _rng(0)
    x = {"a": jnp.asarray(rng.normal(size=(2, 3)), dtype), "b": (jnp.asarray(0.3, dtype), jnp.asarray([0.7], dtype))}
    matrix = rng.normal(size=(8, 8))
    return x, (jnp.asarray(matrix + matrix.T, dtype),)


def _rosenbrock(x):
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def _rosenbrock_gradient(x):
    g = np.zeros_like(x)
    gap = x[1:] - x[:-1] ** 2
    g[:-1] += -400 * x[:-1] * gap - 2 * (1 - x[:-1])
    g[1:] += 200 * gap
    return g


def _rosenbrock_hessian(x):
    h = np.zeros((x.size, x.size))
    for i in range(x.size - 1):
        h[i, i] += 1200 * x[i] ** 2 - 400 * x[i + 1] + 2
        h[i + 1, i + 1] += 200
        h[i, i + 1] -= 400 * x[i]
        h[i + 1, i] -= 400 * x[i]
    return h


def _logistic(w, inputs, labels):
    margins = labels * (inputs @ w["w"] + w["b"])
    return jnp.mean(jnp.logaddexp(0.0, -margins)) + 0.05 * jnp.sum(w["w"] ** 2)


def _logistic_terms(w, inputs, labels):
    ones = np.concatenate([np.ones((len(inputs), 1)), np.asarray(inputs, float)], axis=1)  # b sorts before w
    sigma = 1 / (1 + np.exp(np.asarray(labels, float) * (ones @ w)))
    penalty = 0.1 * np.diag([0.0] + [1.0] * (w.size - 1))
    return ones, sigma, penalty


def _logistic_gradient(w, inputs, labels):
    ones, sigma, penalty = _logistic_terms(w, inputs, labels)
    return -ones.T @ (np.asarray(labels, float) * sigma) / len(ones) + penalty @ w


def _logistic_hessian(w, inputs, labels):
    ones, sigma, penalty = _logistic_terms(w, inputs, labels)
    return ones.T @ (ones * (sigma * (1 - sigma))[:, None]) / len(ones) + penalty


def _make_logistic(dtype):
    rng = _rng(1)
    w = {"b": jnp.asarray(0.2, dtype), "w": jnp.asarray(rng.normal(size=3), dtype)}
    labels = np.where(rng.normal(size=7) > 0, 1, -1)
    return w, (jnp.asarray(rng.normal(size=(7, 3)), dtype), jnp.asarray(labels, dtype))


SCENARIOS = [
    Scenario(
        "nested_quadratic",
        _quadratic,
        _make_quadratic,
        lambda x, matrix: np.asarray(matrix, float) @ x + np.cos(x),
        lambda x, matrix: np.asarray(matrix, float) - np.diag(np.sin(x)),
    ),
    Scenario(
        "rosenbrock",
        _rosenbrock,
        lambda dtype: (jnp.asarray([-1.2, 1.0, 0.5], dtype), ()),
        _rosenbrock_gradient,
        _rosenbrock_hessian,
    ),
    Scenario("logistic", _logistic, _make_logistic, _logistic_gradient, _logistic_hessian),
    Scenario(
        "scalar",
        lambda x: jnp.exp(2 * x),
        lambda dtype: (jnp.asarray(0.3, dtype), ()),
        lambda x: 2 * np.exp(2 * x),
        lambda x: 4 * np.exp(2 * x)[:, None],
    ),
]


def mlp_loss(params, inputs, targets):
    """Mean squared error of a tanh network: the function behind the cost tests."""
    for layer in params[:-1]:
        inputs = jnp.tanh(inputs @ layer["w"] + layer["b"][None])
    return jnp.mean((inputs @ params[-1]["w"] + params[-1]["b"][None] - targets) ** 2)


def make_mlp(sizes, batch, dtype=jnp.float32):
    """Parameters and a batch for ``mlp_loss``."""
    rng = _rng(2)
    params = [
        {"w": jnp.asarray(rng.normal(size=(m, n)) / m**0.5, dtype), "b": jnp.asarray(rng.normal(size=n), dtype)}
        for m, n in itertools.pairwise(sizes)
    ]
    return params, jnp.asarray(rng.normal(size=(batch, sizes[0])), dtype), jnp.zeros((batch, sizes[-1]), dtype)


# ---- functions that some modes cannot differentiate ----------------------------------------------------------------


@jax.custom_vjp
def reverse_only(x):
    """The sine, whose rule calls itself forward, so that its gradient has no forward derivative either."""
    return jnp.sin(x)


reverse_only.defvjp(lambda x: (reverse_only(x), x), lambda x, ct: (ct * jnp.cos(x),))


@jax.custom_jvp
def implicit_root(a):
    """The square root by a loop whose length is not known, with a rule that has no loop."""
    return jax.lax.while_loop(lambda y: jnp.abs(y * y - a) > 1e-12 * a, lambda y: (y + a / y) / 2, a)


@implicit_root.defjvp
def _implicit_root_jvp(primals, tangents):
    root = implicit_root(*primals)
    return root, tangents[0] / (2 * root)


@jax.custom_jvp
def looping_rule(x):
    """The square, whose rule computes its tangent in a loop whose length is not known."""
    return x**2


@looping_rule.defjvp
def _looping_rule_jvp(primals, tangents):
    (x,), (t,) = primals, tangents
    return x**2, forward_only_scale(t) * x


def forward_only_scale(t):
    """Twice ``t``, by a loop whose length is not known while tracing."""
    return jax.lax.while_loop(lambda carry: carry[0] < 2, lambda carry: (carry[0] + 1, carry[1] + t), (0, 0 * t))[1]


def forward_only(x):
    """The cube of every entry, by a loop whose length is not known while tracing."""
    return jax.lax.while_loop(lambda carry: carry[0] < 3, lambda carry: (carry[0] + 1, carry[1] * x), (0, x**0))[1]
