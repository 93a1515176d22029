"""Line searches: by values alone for Newton steps, by values and slopes for quasi-Newton ones."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from curvature._errors import calling
from curvature._numerics import dot, norm
from curvature._types import Scalar, Status, Vector
from curvature.optimizers._globalize import MAX_TRIALS, first_length, hides, search_status, shrink_factor, trial_status
from curvature.optimizers._method import Local, Slope, choose, evaluate

_ARMIJO = 1e-4  # N&W (3.6a)
_WOLFE = 0.9  # N&W (3.7b): the share of the slope that may be left
_EXPANSION = (2.0, 10.0)  # how much longer the next trial is while every one is too short
_MARGIN = 0.1  # a trial keeps this share of the bracket away from its ends
_BISECT = 3  # every so many trials the bracket is halved instead of following the cubic
_FAIR = 4.0  # by how much a step of guessed length may miss the fall that a parabola with its two slopes has


def with_gradients(local: Local, is_guess: Bool[Array, ""] | None = None) -> Local:
    """The objective, made NaN wherever its gradient is not finite: no Newton step can start there.

    Where the length of the steps ``is_guess``, it is NaN after any step that does not look like one along a parabola.
    """

    @calling("value_fn")
    def value_after(step: Vector) -> Scalar:
        value, grad = evaluate(local.value_after, step)
        usable = jnp.all(jnp.isfinite(grad))
        if is_guess is not None:
            parabola = -dot(local.grad + grad, step) / 2
            usable &= ~is_guess | _is_fair(local.value - value, parabola, local.noise)
        return jnp.where(usable | (value == -jnp.inf), value, jnp.nan)

    return local._replace(value_after=value_after)


def _is_fair(fall: Scalar, parabola: Scalar, noise: Scalar) -> Bool[Array, ""]:
    """Whether a step falls as a parabola with its two slopes does, to a factor; by the trapezoidal rule."""
    return (_FAIR * fall >= parabola - noise) & (fall <= _FAIR * parabola + noise)


class ValueSearch(NamedTuple):
    """A search by values alone: the last trial, and the best one so far of those that grow."""

    step_size: Scalar
    value: Scalar
    best_size: Scalar
    best_value: Scalar
    accepted: Bool[Array, ""]
    is_unbounded: Bool[Array, ""]  # whether a trial was minus infinity
    count: Int[Array, ""]


def search_values(
    local: Local, direction: Vector, slope: Scalar, grows: Bool[Array, ""] | bool = False
) -> tuple[Vector, dict[str, Array]]:
    """Backtrack from the full step to sufficient decrease, N&W (3.4); where it ``grows``, lengthen it while that pays.

    Only the value is evaluated at each trial. A trial at minus infinity is too long. Returns the step, zero where none
    is accepted, and the fields ``step_size``, ``num_trials`` and ``status`` of the state after it.
    """

    def running(search: ValueSearch) -> Bool[Array, ""]:
        return (search.count == 0) | (~search.accepted & ~jnp.isnan(slope) & (search.count < MAX_TRIALS))

    def attempt(search: ValueSearch) -> ValueSearch:
        grown = search.best_size > 0
        shrunk = search.step_size * shrink_factor(local.value, search.step_size * slope, search.value)
        size = jnp.where(search.count == 0, search.step_size, jnp.where(grown, 2 * search.step_size, shrunk))
        value = local.value_after(size * direction)
        is_unbounded = search.is_unbounded | (value == -jnp.inf)
        noise = jnp.where(is_unbounded, -local.noise, local.noise)  # where the value ends, steps within it are no gain
        lower = jnp.isfinite(value) & (value <= local.value + _ARMIJO * size * slope + noise)
        lower |= hides(local, size * direction, value)
        growing = grows & lower & (value < search.best_value) & (grown | (search.count == 0))
        growing = growing & (search.count + 1 < MAX_TRIALS)
        return ValueSearch(
            step_size=jnp.where(grown & ~growing, search.best_size, size),
            value=jnp.where(grown & ~growing, search.best_value, value),
            best_size=jnp.where(growing, size, search.best_size),
            best_value=jnp.where(growing, value, search.best_value),
            accepted=(lower | grown) & ~growing,
            is_unbounded=is_unbounded,
            count=search.count + 1,
        )

    zero = jnp.zeros_like(slope)
    start = ValueSearch(zero + 1, local.value, zero, local.value, zero > 0, zero > 0, jnp.zeros_like(zero, jnp.int32))
    last = jax.lax.while_loop(running, attempt, start)
    status = trial_status(last.accepted, jnp.where(last.is_unbounded, -jnp.inf, last.value), slope)
    step = jnp.where(last.accepted, last.step_size * direction, 0)
    return step, {"step_size": last.step_size, "num_trials": last.count, "status": status}


class LinePoint(NamedTuple):
    """A point of the line: how far along it, the value, the slope."""

    t: Scalar
    value: Scalar
    slope: Scalar


class LineSearch(NamedTuple):
    """The state of the search. All of ``low`` is too short a step, all of ``high`` too long a one.

    A trial at minus infinity is too long; ``is_unbounded`` says that there was one.
    """

    low: LinePoint
    high: LinePoint  # infinite before any trial was too long
    trial: LinePoint
    grad: Vector  # at the trial
    grad_low: Vector
    accepted: Bool[Array, ""]
    is_unbounded: Bool[Array, ""]
    count: Int[Array, ""]


def wolfe_search(local: Slope, direction: Vector, is_guess: Bool[Array, ""]) -> LineSearch:
    """A step along a descent direction that satisfies the strong Wolfe conditions, N&W (3.7), or the approximate ones.

    A bracket grows until a trial is too long, and shrinks by the cubic through its ends. Where the value changes by no
    more than its rounding, the slope decides alone: the approximate Wolfe conditions of Hager and Zhang (2005),
    equation (4.1), doi:10.1137/030601880. A NaN is too long a step. When no trial is accepted the best one that was too
    short is returned, if its value is lower.

    The first trial is the whole ``direction``. Where its length ``is_guess``, a trial must also look like a step along
    a parabola, whose fall is ``-t`` times the mean of the slopes at both ends: to a factor, by the trapezoidal rule. A
    step from a slope to a plateau far away satisfies the Wolfe conditions, but falls by far less or far more than that.
    """
    slope = dot(local.grad, direction)
    start = LinePoint(jnp.zeros_like(slope), local.value, slope)
    beyond = LinePoint(jnp.full_like(slope, jnp.inf), jnp.full_like(slope, jnp.inf), jnp.zeros_like(slope))
    trial = start._replace(t=jnp.ones_like(slope))
    no, zero = jnp.zeros_like(slope, bool), jnp.zeros_like(slope, jnp.int32)
    search = LineSearch(start, beyond, trial, local.grad, local.grad, no, no, zero)

    def running(search: LineSearch) -> Bool[Array, ""]:
        return ~search.accepted & (slope < 0) & (search.count < MAX_TRIALS)

    search = jax.lax.while_loop(running, lambda search: _attempt(search, local, direction, start, is_guess), search)
    rescued = (search.low.t > 0) & (search.low.value < local.value)
    trial, grad = choose(search.accepted, (search.trial, search.grad), (search.low, search.grad_low))
    return search._replace(trial=trial, grad=grad, accepted=search.accepted | rescued)


class Pair(NamedTuple):
    """A step and the change of the gradient over it, both times the factor that makes their sizes reciprocal.

    No update of a quasi-Newton matrix depends on that factor, and with it no square or product leaves the range,
    however large or small the gradients.
    """

    step: Vector
    change: Vector
    factor: Scalar


class Descent(NamedTuple):
    """A quasi-Newton step: zero, and where it started, if the search failed."""

    step: Vector
    value: Scalar
    grad: Vector
    pair: Pair
    expected: Scalar  # the curvature s'Bs that the memory had along the step of the pair
    fresh: Bool[Array, ""]  # whether the memory was empty, or had to be dropped
    status: Int[Array, ""]
    search: LineSearch


def descend(local: Slope, direction: Vector, remembers: Bool[Array, ""]) -> Descent:
    """Search along ``direction``, or along steepest descent where nothing is remembered or it does not descend."""
    slope = dot(direction, local.grad)
    fresh = ~remembers | ~(slope < 0)
    direction = choose(fresh, first_step(local), direction)
    search = wolfe_search(local, direction, fresh)
    accepted, trial = search.accepted, search.trial
    step = jnp.where(accepted, trial.t * direction, 0)  # no multiple of a direction that may be NaN
    value, grad = choose(accepted, (trial.value, search.grad), (local.value, local.grad))
    pair = pair_of(step, grad - local.grad)
    status = search_status(accepted, ~fresh, trial.value, trial.slope)
    return Descent(
        step=step,
        value=value,
        grad=grad,
        pair=pair,
        expected=-trial.t * dot(pair.step, pair.factor * local.grad),  # as B s = -t g
        fresh=fresh,
        status=jnp.where(search.is_unbounded & ~accepted, Status.UNBOUNDED, status).astype(jnp.int32),
        search=search,
    )


def first_step(local: Slope) -> Vector:
    """The step of steepest descent, whose direction says nothing of its length."""
    size = norm(local.grad)
    inverse = jax.lax.rsqrt(jnp.where(size > 0, size, 1))  # of a large norm the reciprocal would be flushed to zero
    return -first_length(local, size) * (local.grad * inverse * inverse)


def pair_of(step: Vector, change: Vector) -> Pair:
    """The pair that a step and the change of the gradient over it make."""
    sizes = jnp.sqrt(jnp.max(jnp.abs(step))) * jnp.sqrt(jnp.max(jnp.abs(change)))
    factor = 1 / jnp.where(sizes > 0, sizes, 1)
    return Pair(factor * step, factor * change, factor)


def shows_curvature(step: Vector, change: Vector) -> Bool[Array, ""]:
    """Whether ``s'y`` exceeds the rounding of the sum that forms it; units of the variables do not matter."""
    products = step * change
    return jnp.sum(products) > jnp.finfo(step.dtype).eps * jnp.sum(jnp.abs(products))


def _attempt(
    search: LineSearch, local: Slope, direction: Vector, start: LinePoint, is_guess: Bool[Array, ""]
) -> LineSearch:
    """Evaluate the trial; accept it, or make it an end of the bracket and choose the next."""
    t = search.trial.t
    value, grad = local.value_and_grad_after(t * direction)
    trial = LinePoint(t, value, dot(grad, direction))
    finite = jnp.isfinite(value) & jnp.isfinite(trial.slope)
    steep, lower = _WOLFE * jnp.abs(start.slope), value <= start.value + _ARMIJO * t * start.slope
    # Changes in the last half of the digits of the value are left to the slopes.
    noise = float(jnp.finfo(start.value.dtype).eps) ** 0.5 * jnp.abs(start.value)
    same = (value <= start.value + noise) & (trial.slope <= (2 * _ARMIJO - 1) * start.slope)
    fall, parabola = start.value - value, -t / 2 * (start.slope + trial.slope)
    low_enough = finite & (lower | same) & (~is_guess | _is_fair(fall, parabola, noise))
    accepted = low_enough & (jnp.abs(trial.slope) <= steep)
    long = ~low_enough | (trial.slope > 0)

    low, grad_low = choose(long, (search.low, search.grad_low), (trial, grad))
    high = choose(long, trial, search.high)
    following = _next_trial(search.low, low, high, search.count, noise)
    trial = trial._replace(t=choose(accepted, t, following))
    is_unbounded = search.is_unbounded | (value == -jnp.inf)
    return LineSearch(low, high, trial, grad, grad_low, accepted, is_unbounded, search.count + 1)


def _next_trial(before: LinePoint, low: LinePoint, high: LinePoint, count: Int[Array, ""], noise: Scalar) -> Scalar:
    """Inside the bracket, or beyond ``low`` while nothing was too long."""
    least, most = _EXPANSION
    is_bracket = jnp.isfinite(high.t)
    start, end = choose(is_bracket, (low, high), (before, low))
    minimizer = _cubic_minimizer(start, end, noise)
    longer = jnp.clip(minimizer, least * low.t, most * low.t)
    width = high.t - low.t
    inside = jnp.clip(minimizer, low.t + _MARGIN * width, high.t - _MARGIN * width)
    inside = jnp.where(count % _BISECT == _BISECT - 1, low.t + width / 2, inside)
    inside = jnp.where(jnp.isfinite(high.value) & jnp.isfinite(high.slope), inside, low.t + _MARGIN * width)
    return choose(is_bracket, inside, longer)


def _cubic_minimizer(a: LinePoint, b: LinePoint, noise: Scalar) -> Scalar:
    """Of the cubic with these values and slopes, N&W (3.59); by the slopes alone where the values are noise.

    Infinity where there is no minimizer: the callers clip it.
    """
    width = b.t - a.t
    safe = jnp.where(width > 0, width, 1)
    mean = (b.value - a.value) / safe
    unit = jnp.maximum(jnp.maximum(jnp.abs(a.slope), jnp.abs(b.slope)), jnp.abs(mean))
    unit = jnp.where(unit > 0, unit, 1)  # in which the squares of slopes stay in the range
    start, end = a.slope / unit, b.slope / unit
    secant = start + end - 3 * (mean / unit)
    root = jnp.sqrt(jnp.maximum(secant**2 - start * end, 0))
    rise = end - start
    denominator = rise + 2 * root
    share = (end + root - secant) / jnp.where(denominator == 0, 1, denominator)
    cubic = jnp.where((denominator > 0) & (secant**2 >= start * end), b.t - share * width, jnp.inf)
    by_slopes = jnp.where(rise > 0, b.t - end / jnp.where(rise > 0, rise, 1) * width, jnp.inf)
    return jnp.where(jnp.abs(b.value - a.value) > noise, cubic, by_slopes)
