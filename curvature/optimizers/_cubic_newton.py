"""Newton's method with adaptive cubic regularization."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvature._errors import public
from curvature._numerics import norm
from curvature._types import Scalar, Vector
from curvature.linalg._subproblems import QuadraticModel, factor_model, solve_cubic
from curvature.optimizers._globalize import GOOD, Attempt, Trial, first_length, search, trial_status
from curvature.optimizers._method import Local, SecondOrder, Unevaluated, resolved, second_order

_ACCEPT = 0.1  # Cartis, Gould and Toint (2011), algorithm 2.1: the least ratio that is a step
_LESS = (0.01, 0.5)  # by which a weight falls after a good step, and grows after none
_MORE = (2.0, 100.0)


class CubicNewtonState(NamedTuple):
    """The state of ``cubic_newton``: plain arrays, ready for a checkpoint.

    Attributes:
        weight: the weight of the cubic term for the next step; 0 before the first.
        num_trials: the points that the last update tried.
        status: a ``Status``: running, or why the last update could not move.
        stored: nothing, for optax.
    """

    weight: Float[Array, ""]
    num_trials: Int[Array, ""]
    status: Int[Array, ""]
    stored: Unevaluated


@functools.lru_cache(maxsize=64)
@public
def cubic_newton() -> SecondOrder:
    """Newton's method with adaptive cubic regularization: an optax transformation for smooth objectives, convex or not.

    A step minimizes ``f + g's + s'Hs / 2 + w norm(s)^3 / 3`` over all ``s``, to rounding, by one eigendecomposition of
    the Hessian. The weight ``w`` grows until the value falls by a fair share of what that promises, and falls where the
    model is good: it follows half the Lipschitz constant of the Hessian, as the last trial shows it. Nothing depends on
    the scale of the objective.

    Use it where ``optax.lbfgs()`` stands: ``update(grad, state, params, value=, grad=, value_fn=)`` returns the step to
    an accepted point. If there is none, the step is zero and ``state.status`` says why.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``CubicNewtonState``.

    Raises:
        ValueError: from ``update`` when an argument is missing.

    Cost: for each update one linearization of the gradient, n Hessian products, about 9 n^3 FLOPs, and for each trial
        one value and O(n^2); memory for 3 n^2 numbers.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> f = lambda x: jnp.sum(jnp.cosh(x - jnp.arange(2.0)))
        >>> x, solver = jnp.zeros(2), curvature.cubic_newton()
        >>> state = solver.init(x)
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = optax.value_and_grad_from_state(f)(x, state=state)
        ...     updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=f)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(11):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3) + 0.0
        Array([0., 1.], dtype=float32)

    References: Nesterov and Polyak (2006), doi:10.1007/s10107-006-0706-8; Cartis, Gould and Toint (2011), algorithm
        2.1, doi:10.1007/s10107-009-0286-5.
    """
    return second_order(CubicNewtonState, _step, dense=True)


def _step(state: CubicNewtonState, local: Local) -> tuple[Vector, CubicNewtonState]:
    local, d = resolved(local)
    size = norm(local.grad)
    length, unit = _power_of_two(first_length(local, size)), _power_of_two(size)
    local, size = _in_units(local, length, unit), size / unit
    first = size / first_length(local, size) ** 2  # where there is no curvature the first step is that long
    weight = jnp.where(state.weight > 0, state.weight * (length / unit) * length, first)
    model = factor_model(local.hessian(), local.grad)
    last = search(local, _attempt(local, model), weight, _heavier, learned=jnp.zeros_like(weight), accept=_ACCEPT)
    accepted = last.ratio >= _ACCEPT
    return jnp.where(accepted, length * last.step / d, 0), state._replace(
        weight=_next_weight(last, size) * (unit / length) / length,
        num_trials=last.count,
        status=trial_status(accepted, last.value, last.predicted),
    )


def _power_of_two(size: Scalar) -> Scalar:
    """The power of two next to a number, by which all divisions are exact; 1 for none."""
    share = jnp.frexp(size)[0]
    return jnp.where((share > 0) & jnp.isfinite(size), size / jnp.where(share > 0, share, 1), 1)


def _in_units(local: Local, length: Scalar, unit: Scalar) -> Local:
    """The objective in these units of ``x`` and of the gradient, in which no third power overflows."""
    return local._replace(
        x=local.x / length,
        value=local.value / unit / length,
        noise=local.noise / unit / length,
        grad=local.grad / unit,
        hvp=lambda v: local.hvp(v) * (length / unit),
        hessian=lambda: local.hessian() * (length / unit),
        value_after=lambda step: local.value_after(length * step) / unit / length,
    )


def _attempt(local: Local, model: QuadraticModel) -> Callable[[Scalar, Scalar], Attempt]:
    """Trials teach the weight for which the cubic model would have been exact: half a Lipschitz constant."""

    def attempt(weight: Scalar, _: Scalar) -> Attempt:
        region = solve_cubic(model, weight)
        value, length = local.value_after(region.step), norm(region.step)
        cubic = weight * length * length * length / 3
        exact = 3 * (value - local.value + region.predicted) / jnp.where(length > 0, length, 1) ** 3
        predicted = region.predicted - cubic
        region = region._replace(predicted=jnp.where(jnp.isinf(cubic), 0, predicted))  # a heavier weight is tried next
        return Attempt(region, value, jnp.isfinite(value), learn=lambda ratio: exact)

    return attempt


def _heavier(trial: Trial) -> Scalar:
    low, high = _MORE
    wanted = jnp.where(jnp.isfinite(trial.learned), trial.learned, jnp.inf)
    return jnp.clip(wanted, low * trial.size, high * trial.size)


def _next_weight(last: Trial, size: Scalar) -> Scalar:
    """A smaller weight after a good step, at which the cubic term still exceeds the rounding of the gradient."""
    low, high = _LESS
    wanted = jnp.where(jnp.isfinite(last.learned), last.learned, 0)
    lighter = jnp.clip(wanted, low * last.size, high * last.size)
    length = norm(last.step)
    felt = jnp.finfo(size.dtype).eps * size / jnp.where(length > 0, length, 1) ** 2
    weight = jnp.where(last.ratio > GOOD, jnp.maximum(lighter, felt), last.size)
    weight = jnp.where(last.ratio >= _ACCEPT, weight, _heavier(last))
    limits = jnp.finfo(weight.dtype)
    return jnp.clip(weight, limits.tiny, limits.max / 8)
