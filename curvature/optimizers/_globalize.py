"""The trial loop over a trust radius or a cubic weight, the update of the radius, and what all searches share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from curvature._numerics import dot, norm
from curvature._types import Scalar, Status, Vector
from curvature.linalg._subproblems import RegionStep
from curvature.optimizers._method import Local, Slope, choose

ACCEPT = 1e-4  # N&W algorithm 4.1: the smallest ratio of actual to predicted reduction at which a step is accepted
POOR, GOOD = 0.25, 0.75  # the region shrinks below the first ratio and grows above the second
FAR = 10  # a trial that raises the value by more than this times the predicted reduction: the model says nothing there
MAX_TRIALS = 40
_SHRINK = (0.1, 0.5)  # a rejected step is cut to a length between these shares of it
_GROWTH = 4.0  # Heuristic: the ratio of the next radius to this one after a good step to the boundary
_DOUBLING = 2.0  # the ratio of the radii that one update tries
# Heuristic: a larger step is kept, though its ratio is below ``GOOD``, if it lowers the value by so many times as much.
_LASTING = 1.25

Flag = Bool[Array, ""] | bool
"""A boolean of Python or of a trace. For Python's False the code for True is not compiled."""


class Trial(NamedTuple):
    """The last trial step, or the accepted one before it where the last is no better."""

    size: Scalar  # the radius, or the weight of the cubic term
    step: Vector
    value: Scalar
    predicted: Scalar  # the reduction that the model predicts
    on_boundary: Bool[Array, ""]
    ratio: Scalar  # of the actual to the predicted reduction
    count: Int[Array, ""]
    inner_steps: Int[Array, ""]
    learned: Any = None  # the memory of the method after all trials

    @property
    def accepted(self) -> Bool[Array, ""]:
        """Whether the trial is a step of a trust-region method."""
        return self.ratio >= ACCEPT

    def next_radius(self) -> Scalar:
        """The radius after an accepted step: N&W algorithm 4.1, but by 4, and to a quarter of the step."""
        grown = jnp.where((self.ratio > GOOD) & self.on_boundary, _GROWTH * self.size, self.size)
        grown = jnp.minimum(grown, jnp.finfo(grown.dtype).max / 8)
        return jnp.where(self.ratio < POOR, POOR * norm(self.step), grown)

    def take_step(
        self, state: Any, units: Vector | None = None, *, accepted: Scalar, rejected: Scalar, **fields: Any
    ) -> tuple[Vector, Any]:
        """The step if it is accepted, and the state after it: its radius is ``accepted`` or else ``rejected``.

        A step in variables ``units * x`` is divided by the units. These are NaN where a curvature is infinite.
        """
        fields["radius"] = jnp.where(self.accepted, accepted, rejected)
        fields["status"] = trial_status(self.accepted, self.value, self.predicted)
        step = self.step if units is None else self.step / units
        return jnp.where(self.accepted, step, 0), state._replace(num_trials=self.count, **fields)


class Attempt(NamedTuple):
    """The step of the model at a size, and the objective there."""

    region: RegionStep
    value: Scalar
    usable: Bool[Array, ""]  # whether the value, and the gradient where it is evaluated, is finite
    inner_steps: Any = 0
    learn: Callable[[Scalar], Any] = lambda ratio: None  # the memory of the method after a trial of this ratio


class _Search(NamedTuple):
    trial: Trial
    done: Bool[Array, ""]


def search(
    local: Slope | Local,
    attempt: Callable[[Scalar, Any], Attempt],
    start: Scalar,
    resize: Callable[[Trial], Scalar] | None = None,
    *,
    learned: Any = None,
    accept: float = ACCEPT,
    is_guess: Flag = False,
    grows: Flag = False,
    inner_steps: Int[Array, ""] | int = 0,
) -> Trial:
    """Try the step at ``start``, and after each rejection at the size that ``resize`` gives, until one is accepted.

    ``attempt(size, learned)`` evaluates a trial. Without ``resize`` the size is a trust radius, which shrinks to the
    minimizer of the parabola along the rejected step. Where the size ``is_guess``, a trial is also rejected while the
    fall is not what the model foresees, to a factor of 4. A reduction within the rounding of the value counts as
    predicted and delivered: Conn, Gould and Toint (2000), section 17.4.2.

    Where the first step is accepted and ends on the boundary, a region that ``grows`` is doubled for as long as that
    lowers the value, as the model foresees or else by a quarter as much again: the internal doubling of Dennis and
    Schnabel (1996), algorithm A6.4.5, doi:10.1137/1.9781611971200. It pays where a solve at another radius is cheap
    beside another Hessian. The model need not be good: on a slope with ripples the Hessian is that of the ripples. A
    quarter more of a decrease is asked for, so that the doubling stops before a plateau.
    """
    noise = local.noise + jnp.finfo(local.noise.dtype).tiny
    smallest = shortest_radius(local) if resize is None else 0

    def shrink(last: Trial) -> Scalar:
        length = norm(last.step) * shrink_factor(local.value, dot(local.grad, last.step), last.value)
        return jnp.maximum(length, smallest)

    least, most = jnp.where(is_guess, POOR, accept), jnp.where(is_guess, 1 / POOR, jnp.inf)

    def is_fair(trial: Trial) -> Bool[Array, ""]:
        if is_guess is False:
            return trial.ratio >= accept
        return (trial.ratio >= least) & (trial.ratio <= most)

    def try_next(last: Trial) -> _Search:
        # 1. Choose the size.
        size = (resize or shrink)(last)
        if grows is not False:
            size = jnp.where(is_fair(last), _DOUBLING * last.size, size)
        size = jnp.where(last.count == 0, last.size, size)
        # 2. Evaluate the trial, and compare the actual with the predicted reduction.
        (step, predicted, on_boundary), value, usable, inner_steps, learn = attempt(size, last.learned)
        ratio = (local.value - value + noise) / (jnp.maximum(predicted, 0) + noise)
        ratio = jnp.where(usable, ratio, -jnp.inf).astype(size.dtype)
        ratio = jnp.where(hides(local, step, value), 1, ratio)
        inner_steps += last.inner_steps
        trial = Trial(size, step, value, predicted, on_boundary, ratio, last.count + 1, inner_steps, learn(ratio))
        # 3. Accept or reject it.
        ends = jnp.isnan(predicted) | (value == -jnp.inf) | (trial.count >= MAX_TRIALS)
        if grows is False:
            return _Search(trial, is_fair(trial) | ends)
        fair, found = is_fair(trial), is_fair(last)
        kept, goes_on = _keep_better(local, trial, last, fair, found)
        return _Search(kept, ((fair | found) & ~(goes_on & grows)) | ends)

    zero = jnp.zeros_like(local.grad[0])
    none, no = jnp.zeros_like(zero, jnp.int32), jnp.zeros_like(zero, bool)
    nowhere, never = jnp.zeros_like(local.grad), jnp.full_like(zero, -jnp.inf)
    start = start if resize else jnp.maximum(start, smallest)
    first = Trial(start + zero, nowhere, local.value, zero, no, never, none, none + inner_steps, learned)
    return jax.lax.while_loop(lambda last: ~last.done, lambda last: try_next(last.trial), _Search(first, no)).trial


def _keep_better(
    local: Slope | Local, trial: Trial, last: Trial, fair: Bool[Array, ""], found: Bool[Array, ""]
) -> tuple[Trial, Bool[Array, ""]]:
    """The trial, or the step ``found`` before it; and whether a larger region is worth an evaluation."""
    good = trial.ratio > GOOD
    falls_on = local.value - trial.value >= _LASTING * (local.value - last.value)
    improves = fair & (~found | ((trial.value < last.value - local.noise) & (good | falls_on)))
    kept = last._replace(
        on_boundary=last.on_boundary & good,  # if not good, ``next_radius`` does not grow either
        count=trial.count,
        inner_steps=trial.inner_steps,
    )
    promising = trial.on_boundary & (trial.size < jnp.finfo(trial.size.dtype).max / 64)
    return choose(found & ~improves, kept, trial), improves & promising & (found | (trial.count == 1))


def guess_radius(local: Slope | Local, radius: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
    """The radius of a state, or a guess where it has none, and whether it is a guess."""
    is_guess = radius == 0
    return jnp.where(is_guess, first_length(local, norm(local.grad)), radius), is_guess


def first_length(local: Slope | Local, grad_norm: Scalar) -> Scalar:
    """A guess of how long a first step may be: a hundredth of ``norm(x)``, or of ``abs(f) / norm(g)`` where ``x = 0``.

    Both follow the units of ``x`` and of ``f``. Without either it is a hundredth. Heuristic: a length that is too short
    costs a few evaluations. One that is too long may end on a plateau, so a first step is accepted only if its ratio is
    within a factor of 4 of 1: ``is_guess`` in ``search``.
    """
    size = norm(local.x)
    unit = jnp.where(size > 0, size, jnp.abs(local.value) / grad_norm)
    return jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1) / 100


def shortest_radius(local: Slope | Local) -> Scalar:
    """Below this ``grad / radius`` overflows: a subproblem in a smaller region would be NaN, though nothing else is."""
    limits = jnp.finfo(local.grad.dtype)
    return limits.tiny + 8 * local.grad.size * (norm(local.grad) / limits.max)


def hides(local: Slope | Local, step: Vector, value: Scalar) -> Bool[Array, ""]:
    """Whether a step of at most ``sqrt(eps) norm(x)`` leaves the value exactly equal.

    ``log(1 + r^2)`` is 0 for every ``abs(r) < sqrt(eps)``, and ten roundings of 0 are 0, so that the noise of the value
    does not cover it. Such a step is accepted, and the gradient at its end decides.
    """
    root = float(jnp.finfo(step.dtype).eps) ** 0.5
    return (value == local.value) & (norm(step) <= root * norm(local.x))


def shrink_factor(value: Scalar, slope: Scalar, trial: Scalar) -> Scalar:
    """The share of a rejected step to try next: the minimizer of the parabola through what is known along it.

    ``slope`` is the gradient times the step. N&W (3.57), kept within ``_SHRINK``, whose lesser end serves a trial that
    is NaN or infinite.
    """
    low, high = map(slope.dtype.type, _SHRINK)
    factor = -slope / (2 * (trial - value - slope))
    return jnp.where(jnp.isfinite(factor) & jnp.isfinite(trial), jax.lax.clamp(low, factor, high), low)


def trial_status(accepted: Bool[Array, ""], trial: Scalar, model: Scalar) -> Int[Array, ""]:
    """The status of an update from its last trial value and from what the model promised for it."""
    running, stalled, nonfinite, unbounded = map(
        np.int32, (Status.RUNNING, Status.STALLED, Status.NONFINITE, Status.UNBOUNDED)
    )
    failed = jax.lax.select(trial == -jnp.inf, unbounded, jax.lax.select(jnp.isnan(model), nonfinite, stalled))
    return jax.lax.select(accepted, jnp.asarray(running), failed)


def search_status(
    accepted: Bool[Array, ""], remembers: Bool[Array, ""], value: Scalar, slope: Scalar
) -> Int[Array, ""]:
    """The status of a quasi-Newton update: a failed search is the end only if there is no memory left to drop."""
    status = trial_status(accepted, value, slope)
    return jnp.where((status == Status.STALLED) & remembers, Status.RUNNING, status).astype(jnp.int32)
