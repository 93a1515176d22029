"""AdaHessian: Adam with the curvature's diagonal in the place of the gradient in the second moment."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from curvature import _checks
from curvature._types import Tree
from curvature.optimizers._wrappers import wrappable
from curvature.training._sophia import Mask
from curvature.training._stochastic import (
    Key,
    KeyData,
    hutchinson,
    keep_if_finite,
    key_data,
    key_of_step,
    product_of_extras,
    running_mean,
    unbiased,
    wide_zeros,
    widened,
)

SpatialAxes = Callable[[tuple[int, ...]], tuple[int, ...]]

_NAME = "scale_by_adahessian"


class AdaHessianState(NamedTuple):
    """The state of ``scale_by_adahessian``: plain arrays, ready for a checkpoint.

    Attributes:
        count: the updates so far, without those that a value that is not finite kept from being made.
        momentum: the running mean of the gradients, not corrected for its start at zero; in single precision at least.
        second_moment: that of the squared diagonals.
        key: the words of the key; the probes of a step follow from them and ``count``.
    """

    count: Int[Array, ""]
    momentum: Tree
    second_moment: Tree
    key: KeyData


def kernel_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """All axes but the last two: those of space in a kernel as flax lays it out, and none of a matrix."""
    _checks.check_shape(_NAME, shape)
    return tuple(range(len(shape) - 2))


def adahessian(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key: Key,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    power: float | Array = 1.0,
    spatial_axes: SpatialAxes = kernel_axes,
    refresh_every: int = 1,
    weight_decay: float | Array = 0.0,
    mask: Mask | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaHessian: ``x <- x - learning_rate (u + weight_decay x)`` with the ``u`` of ``scale_by_adahessian``.

    Args:
        learning_rate: a number or an optax schedule. The steps are those of Newton's method on a separable quadratic,
            so 0.1 is a usual size.
        key: the randomness of the estimates.
        b1: as for ``scale_by_adahessian``, and so are all others but the last two.
        b2: the decay of the second moment.
        eps: what is added to the denominator.
        power: the power of the diagonal.
        spatial_axes: the axes of a leaf over which the diagonal is averaged.
        refresh_every: how many steps an estimate serves.
        weight_decay: the decoupled decay of the parameters.
        mask: which parameters decay, as for ``optax.add_decayed_weights``; None is all.

    Returns:
        An ``optax.GradientTransformationExtraArgs``.

    Raises:
        TypeError: as ``scale_by_adahessian``.
        ValueError: as ``scale_by_adahessian``.

    Cost: as ``scale_by_adahessian``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> f = lambda x: jnp.sum(jnp.array([1.0, 100.0]) * x**2)
        >>> x, solver = jnp.ones(2), curvature.adahessian(0.1, key=jax.random.key(0))
        >>> state, update = solver.init(x), jax.jit(lambda *a: solver.update(jax.grad(f)(a[1]), *a, value_fn=f))
        >>> for _ in range(10):
        ...     step, state = update(state, x)
        ...     x = optax.apply_updates(x, step)
        >>> bool(jnp.allclose(x[0], x[1])), bool(x[0] < 0.4)  # badly scaled entries go together
        (True, True)

    References: Yao, Gholami, Shen, Mustafa, Keutzer and Mahoney, AdaHessian (2021), arXiv:2006.00719, algorithm 1.
    """
    _checks.check_schedule("adahessian", "learning_rate", learning_rate)
    _checks.check_nonnegative("adahessian", "weight_decay", weight_decay)
    scale = scale_by_adahessian(
        key=key, b1=b1, b2=b2, eps=eps, power=power, spatial_axes=spatial_axes, refresh_every=refresh_every
    )
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(scale, decay, optax.scale_by_learning_rate(learning_rate))


def scale_by_adahessian(
    *,
    key: Key,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    power: float | Array = 1.0,
    spatial_axes: SpatialAxes = kernel_axes,
    refresh_every: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Divide running means of gradients by the root mean square of estimates of the Hessian's diagonal.

    With gradients ``g`` and estimates ``d = average(z * (H z))`` for random signs ``z``:

        m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) d**2,   u = m' / (v'**(power / 2) + eps)

    where ``m' = m / (1 - b1**t)`` after t terms, and ``v'`` likewise. ``H`` is what the extra argument ``hvp_fn=`` of
    ``update`` multiplies by, which may be the Hessian, or a Gauss-Newton matrix, on another batch than the gradient's;
    without it the Hessian of its ``value_fn=``. A gradient or an estimate that is not finite is skipped: the update is
    zero, and the state stays.

    Args:
        key: the randomness of the estimates.
        b1: the decay of the momentum.
        b2: the decay of the second moment.
        eps: what is added to the denominator, in the units of the curvature.
        power: the power of the diagonal: 1 is Newton's, 0 momentum's.
        spatial_axes: from the shape of a leaf the axes over which the diagonal is averaged, to vary less: by default
            all but the last two, the space of a convolution's kernel in flax; ``lambda shape: ()`` for none.
        refresh_every: how many steps an estimate serves.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is an ``AdaHessianState``. Its updates point uphill, as
        those of optax's ``scale_by_*`` do.

    Raises:
        TypeError: when the key is none, or ``spatial_axes`` is not callable.
        ValueError: for a number out of range; from ``update`` when an argument is missing.

    Cost: a Hessian product every ``refresh_every`` steps, about two gradients; memory for two trees like the
        parameters.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> f = lambda x: jnp.sum(jnp.array([1.0, 4.0]) * x**2)
        >>> x, scale = jnp.array([3.0, 5.0]), curvature.scale_by_adahessian(key=jax.random.key(0))
        >>> u, _ = scale.update(jax.grad(f)(x), scale.init(x), x, value_fn=f)
        >>> jnp.round(u, 4)  # the Newton step of a separable quadratic
        Array([3., 5.], dtype=float32)

    References: Yao et al. (arXiv:2006.00719), equations 8 to 12 and section 3.
    """
    data = key_data(_NAME, key)
    for option, value in {"b1": b1, "b2": b2}.items():
        _checks.check_decay(_NAME, option, value)
    for option, value in {"eps": eps, "power": power}.items():
        _checks.check_nonnegative(_NAME, option, value)
    _checks.check_callable(_NAME, "spatial_axes", spatial_axes)
    _checks.check_static_count(_NAME, "refresh_every", refresh_every, 1)

    setting = _Setting(key, data, b1, b2, eps, power, spatial_axes, refresh_every)
    functions = wrappable(_NAME, partial(_init, setting), partial(_update, setting))
    return optax.GradientTransformationExtraArgs(*functions)


class _Setting(NamedTuple):
    """The arguments of ``scale_by_adahessian``."""

    key: Key
    data: KeyData
    b1: float | Array
    b2: float | Array
    eps: float | Array
    power: float | Array
    spatial_axes: SpatialAxes
    refresh_every: int


def _init(setting: _Setting, params: Tree) -> Any:
    zeros = wide_zeros(params)
    return AdaHessianState(jnp.asarray(0, jnp.int32), zeros, zeros, setting.data)


def _update(
    setting: _Setting,
    updates: Tree,
    state: Any,
    params: Tree | None = None,
    *,
    hvp_fn: Callable[[Tree], Tree] | None = None,
    value_fn: Callable[..., Any] | None = None,
    **extra_args: Any,
) -> tuple[Tree, Any]:
    params = _checks.check_point(_NAME, "params", _checks.require_extra(_NAME, "params", params))
    updates = _checks.check_direction(_NAME, "updates", updates, "params", params)
    product = product_of_extras(_NAME, params, hvp_fn, value_fn, extra_args)

    def refreshed() -> Tree:
        diagonal = hutchinson(params, key_of_step(setting.key, state.key, state.count), product)
        squares = jax.tree.map(lambda leaf: jnp.square(_averaged(leaf, setting.spatial_axes)), widened(diagonal))
        return running_mean(state.second_moment, squares, setting.b2)

    momentum = running_mean(state.momentum, updates, setting.b1)
    due = state.count % setting.refresh_every == 0
    second = jax.lax.cond(due, refreshed, lambda: state.second_moment)

    def scaled(m: Array, v: Array, like: Array) -> Array:
        u = m / (v ** jnp.asarray(setting.power / 2, v.dtype) + jnp.asarray(setting.eps, v.dtype))
        return u.astype(like.dtype)

    means = unbiased(momentum, setting.b1, state.count + 1)
    squares = unbiased(second, setting.b2, state.count // setting.refresh_every + 1)
    after = AdaHessianState(state.count + 1, momentum, second, state.key)
    return keep_if_finite((momentum, second), jax.tree.map(scaled, means, squares, updates), after, state)


def _averaged(diagonal: Array, spatial_axes: SpatialAxes) -> Array:
    """The diagonal with each entry replaced by the mean over its block."""
    axes = spatial_axes(diagonal.shape)
    return jnp.broadcast_to(jnp.mean(diagonal, axes, keepdims=True), diagonal.shape) if axes else diagonal
