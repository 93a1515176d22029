"""Sophia: momentum divided by a running diagonal of the curvature, entry by entry, and clipped."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._types import Tree
from curvature.operators._outputs import Likelihood
from curvature.optimizers._stochastic import (
    Key,
    KeyData,
    gauss_newton_bartlett,
    hutchinson,
    key_data,
    key_of_step,
    product_of_extras,
    running_mean,
)

DiagonalEstimator = Literal["hutchinson", "gauss-newton-bartlett"]
Mask = Tree | Callable[[Tree], Tree]
"""What optax takes for a mask: a tree of booleans, a prefix of one, or a function of the parameters that makes one."""


class SophiaState(NamedTuple):
    """The state of ``scale_by_sophia``: plain arrays, ready for a checkpoint.

    Attributes:
        count: the updates so far.
        momentum: the running mean of the gradients.
        diagonal: the running mean of the estimates of the diagonal.
        unclipped: the share of entries that the last update did not clip: raise ``gamma`` where it is below 0.1, lower
            it where it is above 0.5.
        key: the words of the key; the probes of a step follow from them and ``count``.
    """

    count: Int[Array, ""]
    momentum: Tree
    diagonal: Tree
    unclipped: Float[Array, ""]
    key: KeyData


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
        learning_rate: a number or an optax schedule. No entry moves by more in a step, decay apart.
        key: the randomness of the estimates.
        estimator: as for ``scale_by_sophia``, and so are all others but the last two.
        model: for ``"gauss-newton-bartlett"``.
        loss: likewise.
        likelihood: likewise.
        b1: the decay of the momentum.
        b2: the decay of the diagonal.
        gamma: what the diagonal is multiplied by.
        eps: the least denominator.
        refresh_every: how many steps an estimate serves.
        weight_decay: the decoupled decay of the parameters.
        mask: which parameters decay, as for ``optax.add_decayed_weights``; None is all.

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
    _checks.check_schedule("sophia", "learning_rate", learning_rate)
    _checks.check_nonnegative("sophia", "weight_decay", weight_decay)
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
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(scale, decay, optax.scale_by_learning_rate(learning_rate))


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
    """Divide running means of gradients by those of the curvature's diagonal, entry by entry, and clip to [-1, 1].

    With gradients ``g`` and, every ``refresh_every`` steps, estimates ``d`` of the diagonal:

        m <- b1 m + (1 - b1) g,   h <- b2 h + (1 - b2) d,   u = clip(m / max(gamma h, eps), -1, 1)

    so that negative curvature, or none, leaves the sign of the momentum.

    The curvature may be that of another batch than the gradient's, which removes a bias. ``"hutchinson"`` takes ``z *
    (H z)`` with random signs ``z``, where ``H`` is what the extra argument ``hvp_fn=`` of ``update`` multiplies by, or
    the Hessian of its ``value_fn=``. ``"gauss-newton-bartlett"`` squares one gradient at labels drawn from the model
    on the extra argument ``args=``: a diagonal of the Gauss-Newton matrix, which is never negative.

    Args:
        key: the randomness of the estimates.
        estimator: one of the two above.
        model: for the second, ``model(params, *args) -> outputs``.
        loss: likewise, ``loss(outputs, *args) -> scalar``, a weighted sum of negative log-likelihoods.
        likelihood: likewise, ``"categorical"``, ``"bernoulli"`` or ``"normal"``, as for ``GaussNewtonOperator``.
        b1: the decay of the momentum.
        b2: the decay of the diagonal.
        gamma: what the diagonal is multiplied by: about 0.01 for the first estimator, 0.05 for the second.
        eps: the least denominator.
        refresh_every: how many steps an estimate serves.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``SophiaState``. Its updates point uphill, as
        those of optax's ``scale_by_*`` do.

    Raises:
        TypeError: when the key is none, or a function is not callable.
        ValueError: for an unknown estimator, or one without what it draws labels from, or a number out of range; from
            ``update`` when an argument is missing.

    Cost: a Hessian product, or a gradient, every ``refresh_every`` steps; memory for two trees like the parameters.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> f = lambda x: jnp.sum(jnp.array([1.0, 4.0]) * x**2)
        >>> x, scale = jnp.array([0.001, 1.0]), curvature.scale_by_sophia(key=jax.random.key(0), gamma=1.0, b2=0.0)
        >>> u, state = scale.update(jax.grad(f)(x), scale.init(x), x, value_fn=f)
        >>> u, state.diagonal  # 0.04 of the gradient by the diagonal: nothing to clip yet
        (Array([4.e-05, 4.e-02], dtype=float32), Array([2., 8.], dtype=float32))

    References: Liu et al. (arXiv:2305.14342), algorithms 1 to 3; Gaussian probes there are signs here, whose estimate
        varies less.
    """
    name = "scale_by_sophia"
    data = key_data(name, key)
    _checks.check_choice(name, "estimator", estimator, DiagonalEstimator)
    for option, value in {"b1": b1, "b2": b2}.items():
        _checks.check_decay(name, option, value)
    for option, value in {"gamma": gamma, "eps": eps}.items():
        _checks.check_positive(name, option, value)
    _checks.check_static_count(name, "refresh_every", refresh_every, 1)
    if estimator == "gauss-newton-bartlett":
        _checks.check_drawn_gradient(name, model, loss, likelihood)
        _checks.check_choice(name, "likelihood", likelihood, Likelihood)

    def init_fn(params: Tree) -> SophiaState:
        params = _checks.check_point(name, "params", params)
        zeros = jax.tree.map(jnp.zeros_like, params)
        return SophiaState(jnp.asarray(0, jnp.int32), zeros, zeros, jnp.asarray(0, jnp.float32), data)

    def update_fn(
        updates: Tree,
        state: SophiaState,
        params: Tree | None = None,
        *,
        args: Any = None,
        hvp_fn: Callable[[Tree], Tree] | None = None,
        value_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, SophiaState]:
        params = _checks.check_point(name, "params", _checks.require_extra(name, "params", params))
        updates = _checks.check_direction(name, "updates", updates, "params", params)
        step_key = key_of_step(key, state.key, state.count)
        if model is not None and loss is not None and likelihood is not None and estimator != "hutchinson":
            batch = _checks.require_data(name, args)
            estimate = lambda: gauss_newton_bartlett(name, model, loss, likelihood, params, batch, step_key)  # noqa: E731
        else:
            product = product_of_extras(name, params, hvp_fn, value_fn, extra_args)
            estimate = lambda: hutchinson(params, step_key, product)  # noqa: E731
        momentum = running_mean(state.momentum, updates, b1)
        diagonal = jax.lax.cond(
            state.count % refresh_every == 0,
            lambda: running_mean(state.diagonal, estimate(), b2),
            lambda: state.diagonal,
        )
        ratios = jax.tree.map(lambda m, h: m / jnp.maximum(gamma * h, eps).astype(m.dtype), momentum, diagonal)
        clipped = jax.tree.map(lambda ratio: jnp.clip(ratio, -1, 1), ratios)
        return clipped, SophiaState(state.count + 1, momentum, diagonal, _share_inside(ratios), state.key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _share_inside(ratios: Tree) -> Float[Array, ""]:
    leaves = jax.tree.leaves(ratios)
    inside = [jnp.sum(jnp.abs(leaf) < 1, dtype=jnp.int32).astype(jnp.float32) for leaf in leaves]
    return sum(inside[1:], inside[0]) / max(sum(leaf.size for leaf in leaves), 1)
