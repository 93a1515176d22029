"""AdaHessian: Adam whose second moment averages the squared diagonal of the Hessian."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from curvature import _checks
from curvature._errors import caller, calling, public
from curvature._types import Tree
from curvature.training import _stochastic
from curvature.training._stochastic import Key, KeyData, Mask, ScaledByDiagonal

SpatialAxes = Callable[[tuple[int, ...]], tuple[int, ...]]


class AdaHessianState(NamedTuple):
    """The state of ``scale_by_adahessian``: plain arrays, ready for a checkpoint.

    Attributes:
        count: the number of updates, not counting updates skipped because a value was not finite.
        momentum: the running mean of the gradients, without bias correction, in at least single precision.
        second_moment: the running mean of the squared diagonals, without bias correction.
        key: the words of the key; ``key`` and ``count`` determine the probes of a step.
    """

    count: Int[Array, ""]
    momentum: Tree
    second_moment: Tree
    key: KeyData


@calling("scale_by_adahessian")
def kernel_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """All axes but the last two: the spatial axes of a convolution kernel in flax's layout, none for a matrix."""
    _check_shape(shape)
    return tuple(range(len(shape) - 2))


@public
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
        learning_rate: a number or an optax schedule. At 1, a step is the Newton step of a separable quadratic; 0.1 is
            a usual value.
        key: the random key of the estimates.
        b1: the decay rate of the momentum.
        b2: the decay rate of the second moment.
        eps: the number added to the denominator; see ``scale_by_adahessian``.
        power: the power of the diagonal; see ``scale_by_adahessian``.
        spatial_axes: the axes of a leaf over which the diagonal is averaged; see ``scale_by_adahessian``.
        refresh_every: the number of steps that use one estimate.
        weight_decay: the decoupled weight decay.
        mask: the parameters that decay, as for ``optax.add_decayed_weights``; None is all.

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
    scale = scale_by_adahessian(
        key=key, b1=b1, b2=b2, eps=eps, power=power, spatial_axes=spatial_axes, refresh_every=refresh_every
    )
    return _stochastic.with_learning_rate(scale, learning_rate, weight_decay, mask)


@public
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

    where ``m' = m / (1 - b1**t)`` after t gradients, and ``v' = v / (1 - b2**s)`` after s estimates. ``H`` is the
    matrix that the extra argument ``hvp_fn=`` of ``update`` applies: the Hessian or a Gauss-Newton matrix, possibly on
    another batch than the gradient. Without ``hvp_fn=``, ``H`` is the Hessian of ``value_fn=``. If a gradient or an
    estimate is not finite, the update is zero and the state is unchanged.

    Args:
        key: the random key of the estimates.
        b1: the decay rate of the momentum.
        b2: the decay rate of the second moment.
        eps: the number added to the denominator, in the units of the curvature.
        power: the power of the diagonal: 1 gives Newton steps, 0 momentum.
        spatial_axes: a function from the shape of a leaf to the axes over which the diagonal is averaged, to reduce its
            variance. The default is all axes but the last two, the spatial axes of a convolution kernel in flax;
            ``lambda shape: ()`` averages over none.
        refresh_every: the number of steps that use one estimate.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is an ``AdaHessianState``. Its updates point uphill, as
        the updates of optax's ``scale_by_*`` do.

    Raises:
        TypeError: if ``key`` is not a random key, or ``spatial_axes`` is not callable.
        ValueError: for a number out of range; from ``update`` if an argument is missing.

    Cost: a Hessian-vector product every ``refresh_every`` steps, about two gradients; memory for two trees like the
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
    for option, value in {"b1": b1, "b2": b2}.items():
        _checks.check_decay(option, value)
    for option, value in {"eps": eps, "power": power}.items():
        _checks.check_nonnegative(option, value)
    _checks.check_callable("spatial_axes", spatial_axes)
    _checks.check_static_count("refresh_every", refresh_every, 1)

    def estimate(params: Tree, extras: dict[str, Any]) -> Callable[[Key], Tree]:
        diagonal = _stochastic.estimate_by_products(params, extras)
        return lambda key: jax.tree.map(
            lambda leaf: jnp.square(_block_means(leaf, spatial_axes)), _stochastic.widened(diagonal(key))
        )

    def scale(momentum: Tree, second: Tree, updates: Tree, count: Array) -> tuple[Tree]:
        def scaled(m: Array, v: Array, like: Array) -> Array:
            u = m / (v ** jnp.asarray(power / 2, v.dtype) + jnp.asarray(eps, v.dtype))
            return u.astype(like.dtype)

        means = _stochastic.unbiased(momentum, b1, count + 1)
        squares = _stochastic.unbiased(second, b2, count // refresh_every + 1)
        return (jax.tree.map(scaled, means, squares, updates),)

    return ScaledByDiagonal(key, b1, b2, refresh_every).transformation(AdaHessianState, estimate, scale)


def _block_means(diagonal: Array, spatial_axes: SpatialAxes) -> Array:
    """The diagonal with each entry replaced by the mean over its block."""
    axes = spatial_axes(diagonal.shape)
    return jnp.broadcast_to(jnp.mean(diagonal, axes, keepdims=True), diagonal.shape) if axes else diagonal


def _check_shape(shape: Any) -> None:
    """Refuse what is no shape: ``optax.inject_hyperparams`` calls each function among hyperparameters with the step."""
    if not isinstance(shape, tuple):
        raise TypeError(
            f"{caller()}: spatial_axes was called with {shape!r}, expected the shape of a leaf; name it in the "
            "static_args of optax.inject_hyperparams, which takes other functions for schedules."
        )
