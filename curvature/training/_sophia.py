"""Sophia: momentum divided by a running estimate of the curvature's diagonal, clipped entry by entry."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._errors import caller, public
from curvature._types import Tree
from curvature.operators._likelihoods import Likelihood
from curvature.training import _stochastic
from curvature.training._stochastic import Key, KeyData, Mask, ScaledByDiagonal

DiagonalEstimator = Literal["hutchinson", "gauss-newton-bartlett"]


class SophiaState(NamedTuple):
    """The state of ``scale_by_sophia``: plain arrays, ready for a checkpoint.

    Attributes:
        count: the number of updates, not counting updates skipped because a value was not finite.
        momentum: the running mean of the gradients, in at least single precision.
        diagonal: the running mean of the estimates of the diagonal.
        unclipped: the share of entries that the last update did not clip: raise ``gamma`` if it is below 0.1, lower
            ``gamma`` if it is above 0.5.
        key: the words of the key; ``key`` and ``count`` determine the probes of a step.
    """

    count: Int[Array, ""]
    momentum: Tree
    diagonal: Tree
    unclipped: Float[Array, ""]
    key: KeyData


@public
def sophia(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key,
    estimator: DiagonalEstimator = "hutchinson",
    model: Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
    likelihood: Likelihood | None = None,
    b1: float | Array = 0.96,
    b2: float | Array = 0.99,
    gamma: float | Array = 0.01,
    eps: float | Array = 1e-12,
    refresh_every: int = 10,
    weight_decay: float | Array = 0.0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Sophia: ``x <- x - learning_rate (u + weight_decay x)`` with the clipped ``u`` of ``scale_by_sophia``.

    Args:
        learning_rate: a number or an optax schedule. Without weight decay, no entry moves by more in a step.
        key: the random key of the estimates.
        estimator: ``"hutchinson"`` or ``"gauss-newton-bartlett"``; see ``scale_by_sophia``.
        model: for ``"gauss-newton-bartlett"``; see ``scale_by_sophia``.
        loss: for ``"gauss-newton-bartlett"``; see ``scale_by_sophia``.
        likelihood: for ``"gauss-newton-bartlett"``; see ``scale_by_sophia``.
        b1: the decay rate of the momentum.
        b2: the decay rate of the diagonal.
        gamma: the factor of the diagonal.
        eps: the smallest denominator.
        refresh_every: the number of steps that use one estimate.
        weight_decay: the decoupled weight decay.
        mask: the parameters that decay, as for ``optax.add_decayed_weights``; None is all.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Raises:
        TypeError: as ``scale_by_sophia``.
        ValueError: as ``scale_by_sophia``.

    Cost: as ``scale_by_sophia``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> f = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2)
        >>> x, solver = jnp.ones(2), curvature.sophia(0.1, key=jax.random.key(0), gamma=1.0, b1=0.0, refresh_every=1)
        >>> state, update = solver.init(x), jax.jit(lambda *a: solver.update(jax.grad(f)(a[1]), *a, value_fn=f))
        >>> for _ in range(10):
        ...     step, state = update(state, x)
        ...     x = optax.apply_updates(x, step)
        >>> bool(jnp.allclose(x[0], x[1])), bool(x[0] < 0.4)  # badly scaled entries go together
        (True, True)

    References: Liu, Li, Hall, Liang and Ma, Sophia (2023), arXiv:2305.14342, algorithm 3.
    """
    scale = scale_by_sophia(
        key=key,
        estimator=estimator,
        model=model,
        loss=loss,
        likelihood=likelihood,
        b1=b1,
        b2=b2,
        gamma=gamma,
        eps=eps,
        refresh_every=refresh_every,
    )
    return _stochastic.with_learning_rate(scale, learning_rate, weight_decay, mask)


@public
def scale_by_sophia(
    *,
    key: Key,
    estimator: DiagonalEstimator = "hutchinson",
    model: Callable[..., Any] | None = None,
    loss: Callable[..., Any] | None = None,
    likelihood: Likelihood | None = None,
    b1: float | Array = 0.96,
    b2: float | Array = 0.99,
    gamma: float | Array = 0.01,
    eps: float | Array = 1e-12,
    refresh_every: int = 10,
) -> optax.GradientTransformationExtraArgs:
    """Divide running means of gradients by running means of the curvature's diagonal, and clip entries to [-1, 1].

    With gradients ``g`` and, every ``refresh_every`` steps, estimates ``d`` of the diagonal:

        m <- b1 m + (1 - b1) g,   h <- b2 h + (1 - b2) d,   u = clip(m / max(gamma h, eps), -1, 1)

    For zero or negative curvature the update is the sign of the momentum. If a gradient or an estimate is not finite,
    the update is zero and the state is unchanged.

    The curvature may be evaluated on another batch than the gradient, which removes a bias. ``"hutchinson"`` estimates
    ``d = z * (H z)`` with random signs ``z``; ``H`` is the matrix that the extra argument ``hvp_fn=`` of ``update``
    applies, or the Hessian of ``value_fn=``. ``"gauss-newton-bartlett"`` squares one gradient at labels drawn from the
    model on the extra argument ``args=``: it estimates the diagonal of the Gauss-Newton matrix and is never negative.

    Args:
        key: the random key of the estimates.
        estimator: ``"hutchinson"`` or ``"gauss-newton-bartlett"``, as above.
        model: for ``"gauss-newton-bartlett"``: ``model(params, *args) -> outputs``.
        loss: for ``"gauss-newton-bartlett"``: ``loss(outputs, *args) -> scalar``, a weighted sum of negative log
            likelihoods.
        likelihood: for ``"gauss-newton-bartlett"``: ``"categorical"``, ``"bernoulli"`` or ``"normal"``; see
            ``GaussNewtonOperator``.
        b1: the decay rate of the momentum.
        b2: the decay rate of the diagonal.
        gamma: the factor of the diagonal: about 0.01 for ``"hutchinson"``, 0.05 for ``"gauss-newton-bartlett"``.
        eps: the smallest denominator.
        refresh_every: the number of steps that use one estimate.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``SophiaState``. Its updates point uphill, as
        the updates of optax's ``scale_by_*`` do.

    Raises:
        TypeError: if ``key`` is not a random key, or a function is not callable.
        ValueError: for an unknown estimator, ``"gauss-newton-bartlett"`` without model, loss and likelihood, or a
            number out of range; from ``update`` if an argument is missing.

    Cost: a Hessian-vector product, or a gradient, every ``refresh_every`` steps; memory for two trees like the
        parameters.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> f = lambda x: jnp.sum(jnp.array([1.0, 4.0]) * x**2)
        >>> x, scale = jnp.array([0.001, 1.0]), curvature.scale_by_sophia(key=jax.random.key(0), gamma=1.0, b2=0.0)
        >>> u, state = scale.update(jax.grad(f)(x), scale.init(x), x, value_fn=f)
        >>> u, state.diagonal  # 0.04 of the gradient by the diagonal: nothing to clip yet
        (Array([4.e-05, 4.e-02], dtype=float32), Array([2., 8.], dtype=float32))

    References: Liu et al. (arXiv:2305.14342), algorithms 1 to 3, with random signs instead of Gaussian probes, which
        reduces the variance.
    """
    _checks.check_choice("estimator", estimator, DiagonalEstimator)
    for option, value in {"b1": b1, "b2": b2}.items():
        _checks.check_decay(option, value)
    for option, value in {"gamma": gamma, "eps": eps}.items():
        _checks.check_positive(option, value)
    _checks.check_static_count("refresh_every", refresh_every, 1)
    if estimator == "gauss-newton-bartlett":
        _check_drawn_gradient(model, loss, likelihood)
        _checks.check_choice("likelihood", likelihood, Likelihood)

    def estimate(params: Tree, extras: dict[str, Any]) -> Callable[[Key], Tree]:
        args = extras.pop("args", None)
        if estimator == "hutchinson":
            return _stochastic.estimate_by_products(params, extras)
        batch = _checks.require_data(args)
        square: Callable[..., Tree] = _stochastic.gauss_newton_bartlett
        return lambda key: square(model, loss, likelihood, params, batch, key)

    def ratio(m: Array, h: Array) -> Array:
        return m / jnp.maximum(jnp.asarray(gamma, h.dtype) * h, jnp.asarray(eps, h.dtype))

    def scale(momentum: Tree, diagonal: Tree, updates: Tree, count: Array) -> tuple[Tree, Array]:
        ratios = jax.tree.map(ratio, momentum, diagonal)
        clipped = jax.tree.map(lambda leaf, like: jnp.clip(leaf, -1, 1).astype(like.dtype), ratios, updates)
        leaves = jax.tree.leaves(ratios)
        inside = [jnp.sum(jnp.abs(leaf) < 1, dtype=jnp.int32).astype(jnp.float32) for leaf in leaves]
        return clipped, sum(inside[1:], inside[0]) / max(sum(leaf.size for leaf in leaves), 1)

    frame = ScaledByDiagonal(key, b1, b2, refresh_every)
    return frame.transformation(SophiaState, estimate, scale, jnp.asarray(0, jnp.float32))


def _check_drawn_gradient(model: Any, loss: Any, likelihood: str | None) -> None:
    """Refuse to draw labels for a gradient without a model, a loss and a likelihood."""
    if model is None or loss is None or likelihood is None:
        raise ValueError(
            f"{caller()}: estimator='gauss-newton-bartlett' draws labels and needs model=, loss= and "
            "likelihood='categorical', 'bernoulli' or 'normal'; estimator='hutchinson' needs none of them."
        )
