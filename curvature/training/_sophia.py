"""Sophia: momentum divided by a running diagonal of the curvature, entry by entry, and clipped."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._types import Tree
from curvature.operators._likelihoods import Likelihood
from curvature.optimizers._wrappers import wrappable
from curvature.training._stochastic import (
    Key,
    KeyData,
    gauss_newton_bartlett,
    hutchinson,
    keep_if_finite,
    key_data,
    key_of_step,
    product_of_extras,
    running_mean,
    wide_zeros,
)

DiagonalEstimator = Literal["hutchinson", "gauss-newton-bartlett"]
Mask = Tree | Callable[[Tree], Tree]
"""What optax takes for a mask: a tree of booleans, a prefix of one, or a function of the parameters that makes one."""

_NAME = "scale_by_sophia"


class SophiaState(NamedTuple):
    """The state of ``scale_by_sophia``: plain arrays, ready for a checkpoint.

    Attributes:
        count: the updates so far, without those that a value that is not finite kept from being made.
        momentum: the running mean of the gradients, in single precision at least.
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

    so that negative curvature, or none, leaves the sign of the momentum. A gradient or an estimate that is not finite
    is skipped: the update is zero, and the state stays.

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
    data = key_data(_NAME, key)
    _checks.check_choice(_NAME, "estimator", estimator, DiagonalEstimator)
    for option, value in {"b1": b1, "b2": b2}.items():
        _checks.check_decay(_NAME, option, value)
    for option, value in {"gamma": gamma, "eps": eps}.items():
        _checks.check_positive(_NAME, option, value)
    _checks.check_static_count(_NAME, "refresh_every", refresh_every, 1)
    estimate: Callable[..., Any] = _from_products
    if estimator == "gauss-newton-bartlett":
        _checks.check_drawn_gradient(_NAME, model, loss, likelihood)
        _checks.check_choice(_NAME, "likelihood", likelihood, Likelihood)
        estimate = partial(_from_labels, model, loss, likelihood)
    setting = _Setting(estimate, key, data, b1, b2, gamma, eps, refresh_every)
    functions = wrappable(_NAME, partial(_init, setting), partial(_update, setting))
    return optax.GradientTransformationExtraArgs(*functions)


class _Setting(NamedTuple):
    """The arguments of ``scale_by_sophia``, those of the estimator as one function."""

    estimate: Callable[..., Any]
    key: Key
    data: KeyData
    b1: float | Array
    b2: float | Array
    gamma: float | Array
    eps: float | Array
    refresh_every: int


def _from_products(
    params: Tree, key: Any, args: Any, hvp_fn: Any, value_fn: Any, extra_args: dict[str, Any]
) -> Callable[[], Tree]:
    product = product_of_extras(_NAME, params, hvp_fn, value_fn, extra_args)
    return lambda: hutchinson(params, key, product)


def _from_labels(
    model: Any, loss: Any, likelihood: Any, params: Tree, key: Any, args: Any, *_: Any
) -> Callable[[], Tree]:
    batch = _checks.require_data(_NAME, args)
    return lambda: gauss_newton_bartlett(_NAME, model, loss, likelihood, params, batch, key)


def _init(setting: _Setting, params: Tree) -> Any:
    zeros = wide_zeros(params)
    return SophiaState(jnp.asarray(0, jnp.int32), zeros, zeros, jnp.asarray(0, jnp.float32), setting.data)


def _update(
    setting: _Setting,
    updates: Tree,
    state: Any,
    params: Tree | None = None,
    *,
    args: Any = None,
    hvp_fn: Callable[[Tree], Tree] | None = None,
    value_fn: Callable[..., Any] | None = None,
    **extra_args: Any,
) -> tuple[Tree, Any]:
    params = _checks.check_point(_NAME, "params", _checks.require_extra(_NAME, "params", params))
    updates = _checks.check_direction(_NAME, "updates", updates, "params", params)
    step_key = key_of_step(setting.key, state.key, state.count)
    estimate = setting.estimate(params, step_key, args, hvp_fn, value_fn, extra_args)
    momentum = running_mean(state.momentum, updates, setting.b1)
    diagonal = jax.lax.cond(
        state.count % setting.refresh_every == 0,
        lambda: running_mean(state.diagonal, estimate(), setting.b2),
        lambda: state.diagonal,
    )

    def ratio(m: Array, h: Array) -> Array:
        return m / jnp.maximum(jnp.asarray(setting.gamma, h.dtype) * h, jnp.asarray(setting.eps, h.dtype))

    ratios = jax.tree.map(ratio, momentum, diagonal)
    clipped = jax.tree.map(lambda leaf, like: jnp.clip(leaf, -1, 1).astype(like.dtype), ratios, updates)
    after = SophiaState(state.count + 1, momentum, diagonal, _share_inside(ratios), state.key)
    return keep_if_finite((momentum, diagonal), clipped, after, state)


def _share_inside(ratios: Tree) -> Float[Array, ""]:
    leaves = jax.tree.leaves(ratios)
    inside = [jnp.sum(jnp.abs(leaf) < 1, dtype=jnp.int32).astype(jnp.float32) for leaf in leaves]
    return sum(inside[1:], inside[0]) / max(sum(leaf.size for leaf in leaves), 1)
