"""Line searches: by values alone for Newton steps, by values and slopes for quasi-Newton ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from curvature.linalg._dense import norm
from curvature.optimizers._protocol import (
    MAX_TRIALS,
    Local,
    Scalar,
    Slope,
    Vector,
    evaluate,
    first_length,
    shrink_factor,
)

_ARMIJO = 1e-4  # N&W (3.6a)
_WOLFE = 0.9  # N&W (3.7b): the share of the slope that may be left
_EXPANSION = (2.0, 10.0)  # how much longer the next trial is while every one is too short
_MARGIN = 0.1  # a trial keeps this share of the bracket away from its ends
_BISECT = 3  # every so many trials the bracket is halved, whatever the cubic says


def with_gradients(local: Local) -> Local:
    """The objective that is NaN wherever its gradient is not finite: from there no Newton step leads on."""

    def value_after(step: Vector) -> Scalar:
        value, grad = evaluate("value_fn", local.value_after, step)
        return jnp.where(jnp.all(jnp.isfinite(grad)), value, jnp.nan)

    return local._replace(value_after=value_after)


class ValueSearch(NamedTuple):
    """A search by values alone: the last trial, and the best one so far of those that grow."""

    step_size: Scalar
    value: Scalar
    best_size: Scalar
    best_value: Scalar
    accepted: Bool[Array, ""]
    count: Int[Array, ""]


def search_values(local: Local, direction: Vector, slope: Scalar, grows: Bool[Array, ""] | bool = False) -> ValueSearch:
    """From the full step down to one of sufficient decrease, N&W (3.4), or, where it ``grows``, up while that pays.

    Only the value is evaluated at each trial.
    """

    def running(search: ValueSearch) -> Bool[Array, ""]:
        hopeless = jnp.isnan(slope) | (search.value == -jnp.inf)
        return (search.count == 0) | (~search.accepted & ~hopeless & (search.count < MAX_TRIALS))

    def attempt(search: ValueSearch) -> ValueSearch:
        grown = search.best_size > 0
        shrunk = search.step_size * shrink_factor(local.value, search.step_size * slope, search.value)
        size = jnp.where(search.count == 0, search.step_size, jnp.where(grown, 2 * search.step_size, shrunk))
        value = local.value_after(size * direction)
        lower = jnp.isfinite(value) & (value <= local.value + _ARMIJO * size * slope + local.noise)
        growing = grows & lower & (value < search.best_value) & (grown | (search.count == 0))
        growing = growing & (search.count + 1 < MAX_TRIALS)
        return ValueSearch(
            step_size=jnp.where(grown & ~growing, search.best_size, size),
            value=jnp.where(grown & ~growing, search.best_value, value),
            best_size=jnp.where(growing, size, search.best_size),
            best_value=jnp.where(growing, value, search.best_value),
            accepted=(lower | grown) & ~growing,
            count=search.count + 1,
        )

    zero = jnp.zeros_like(slope)
    start = ValueSearch(zero + 1, local.value, zero, local.value, zero > 0, jnp.zeros_like(zero, jnp.int32))
    return jax.lax.while_loop(running, attempt, start)


class LinePoint(NamedTuple):
    """A point of the line: how far along it, the value, the slope."""

    t: Scalar
    value: Scalar
    slope: Scalar


class LineSearch(NamedTuple):
    """Where the search stands. All of ``low`` is too short a step, all of ``high`` too long a one."""

    low: LinePoint
    high: LinePoint  # infinite before any trial was too long
    trial: LinePoint
    grad: Vector  # at the trial
    grad_low: Vector
    accepted: Bool[Array, ""]
    count: Int[Array, ""]


def wolfe_search(local: Slope, direction: Vector, first: Scalar) -> LineSearch:
    """A step along a descent direction that satisfies the strong Wolfe conditions, N&W (3.7), or the approximate ones.

    A bracket grows until a trial is too long, and shrinks by the cubic through its ends. Where the value changes by no
    more than its rounding, the slope decides alone: the approximate Wolfe conditions of Hager and Zhang (2005),
    equation (4.1), doi:10.1137/030601880. A NaN is too long a step. When no trial is accepted the best one that was too
    short is returned, if its value is lower.
    """
    slope = jnp.vdot(local.grad, direction, precision="highest")
    start = LinePoint(jnp.zeros_like(slope), local.value, slope)
    beyond = LinePoint(jnp.full_like(slope, jnp.inf), jnp.full_like(slope, jnp.inf), jnp.zeros_like(slope))
    trial = start._replace(t=first)
    zero = jnp.zeros_like(slope, jnp.int32)
    search = LineSearch(start, beyond, trial, local.grad, local.grad, jnp.zeros_like(slope, bool), zero)

    def running(search: LineSearch) -> Bool[Array, ""]:
        hopeless = ~(slope < 0) | (search.trial.value == -jnp.inf)
        return ~search.accepted & ~hopeless & (search.count < MAX_TRIALS)

    search = jax.lax.while_loop(running, lambda search: _attempt(search, local, direction, start), search)
    failed = ~search.accepted & (search.trial.value != -jnp.inf)
    keep = lambda ours, other: jnp.where(failed, ours, other)  # noqa: E731
    rescued = failed & (search.low.t > 0) & (search.low.value < local.value)
    return search._replace(
        trial=jax.tree.map(keep, search.low, search.trial),
        grad=keep(search.grad_low, search.grad),
        accepted=search.accepted | rescued,
    )


class Descent(NamedTuple):
    """A quasi-Newton step: zero, and where it started, if the search failed."""

    step: Vector
    value: Scalar
    grad: Vector
    expected: Scalar  # the curvature s'Bs that the memory had along the step
    fresh: Bool[Array, ""]  # whether the memory was empty, or had to be dropped
    search: LineSearch


def descend(local: Slope, direction: Vector, remembers: Bool[Array, ""]) -> Descent:
    """Search along ``direction``, or along steepest descent where nothing is remembered or it does not descend."""
    slope = jnp.vdot(direction, local.grad, precision="highest")
    fresh = ~remembers | ~(slope < 0)
    direction = jnp.where(fresh, -local.grad, direction)
    search = wolfe_search(local, direction, jnp.where(fresh, _first_step_size(local), 1))
    accepted = search.accepted
    step = jnp.where(accepted, search.trial.t * direction, 0)  # no multiple of a direction that may be NaN
    return Descent(
        step=step,
        value=jnp.where(accepted, search.trial.value, local.value),
        grad=jnp.where(accepted, search.grad, local.grad),
        expected=-search.trial.t * jnp.vdot(step, local.grad, precision="highest"),  # as B s = -t g
        fresh=fresh,
        search=search,
    )


def shows_curvature(step: Vector, change: Vector) -> Bool[Array, ""]:
    """Whether ``s'y`` is positive beyond the rounding of its own sum, in whatever units each variable comes."""
    products = step * change
    return jnp.sum(products) > jnp.finfo(step.dtype).eps * jnp.sum(jnp.abs(products))


def _first_step_size(local: Slope) -> Scalar:
    """For steepest descent, whose direction says nothing of its length; the search goes on from there."""
    return first_length(local.x) / norm(local.grad)


def _attempt(search: LineSearch, local: Slope, direction: Vector, start: LinePoint) -> LineSearch:
    """Evaluate the trial; accept it, or make it an end of the bracket and choose the next."""
    t = search.trial.t
    value, grad = local.value_and_grad_after(t * direction)
    trial = LinePoint(t, value, jnp.vdot(grad, direction, precision="highest"))
    finite = jnp.isfinite(value) & jnp.isfinite(trial.slope)
    steep, lower = _WOLFE * jnp.abs(start.slope), value <= start.value + _ARMIJO * t * start.slope
    same = (value <= start.value + local.noise) & (trial.slope <= (2 * _ARMIJO - 1) * start.slope)
    accepted = finite & (lower | same) & (jnp.abs(trial.slope) <= steep)
    long = ~finite | ~(lower | same) | (trial.slope > 0)

    low = jax.tree.map(lambda new, old: jnp.where(long, old, new), trial, search.low)
    high = jax.tree.map(lambda new, old: jnp.where(long, new, old), trial, search.high)
    grad_low = jnp.where(long, search.grad_low, grad)
    following = _next_trial(search.low, low, high, search.count, local.noise)
    trial = trial._replace(t=jnp.where(accepted | (value == -jnp.inf), t, following))
    return LineSearch(low, high, trial, grad, grad_low, accepted, search.count + 1)


def _next_trial(before: LinePoint, low: LinePoint, high: LinePoint, count: Int[Array, ""], noise: Scalar) -> Scalar:
    """Inside the bracket, or beyond ``low`` while nothing was too long."""
    least, most = _EXPANSION
    longer = jnp.clip(_cubic_minimizer(before, low, noise), least * low.t, most * low.t)
    width = high.t - low.t
    inside = jnp.clip(_cubic_minimizer(low, high, noise), low.t + _MARGIN * width, high.t - _MARGIN * width)
    inside = jnp.where(count % _BISECT == _BISECT - 1, low.t + width / 2, inside)
    inside = jnp.where(jnp.isfinite(high.value) & jnp.isfinite(high.slope), inside, low.t + _MARGIN * width)
    return jnp.where(jnp.isfinite(high.t), inside, longer)


def _cubic_minimizer(a: LinePoint, b: LinePoint, noise: Scalar) -> Scalar:
    """Of the cubic with these values and slopes, N&W (3.59); by the slopes alone where the values are noise.

    Infinity where there is no minimizer: the callers clip it.
    """
    width = b.t - a.t
    safe = jnp.where(width > 0, width, 1)
    secant = a.slope + b.slope - 3 * (b.value - a.value) / safe
    root = jnp.sqrt(jnp.maximum(secant**2 - a.slope * b.slope, 0))
    rise = b.slope - a.slope
    denominator = rise + 2 * root
    share = (b.slope + root - secant) / jnp.where(denominator == 0, 1, denominator)
    cubic = jnp.where((denominator > 0) & (secant**2 >= a.slope * b.slope), b.t - share * width, jnp.inf)
    by_slopes = jnp.where(rise > 0, b.t - b.slope * width / jnp.where(rise > 0, rise, 1), jnp.inf)
    return jnp.where(jnp.abs(b.value - a.value) > noise, cubic, by_slopes)
