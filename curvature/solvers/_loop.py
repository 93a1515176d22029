"""The loop that drives any optax transformation: evaluate, judge, step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from curvature._numerics import norm
from curvature._trees import ravel
from curvature._types import Status, Tree
from curvature.optimizers._bounds import Box, around, downhill, projected_gradient_norm
from curvature.optimizers._globalize import MAX_TRIALS
from curvature.optimizers._method import (
    DenseSecondOrder,
    FirstOrder,
    SecondOrder,
    Stored,
    WithStatus,
    choose,
    evaluate,
    noise_of,
    value_and_grad,
)
from curvature.optimizers._stationary import examine
from curvature.programs._traced import Program
from curvature.solvers._limits import Limits
from curvature.solvers._progress import Watch, observe
from curvature.transforms._compositions import linearize_program, trace_objective
from curvature.transforms._modes import choose_for_solver

_PATIENCE = 10  # steps without a lower value or a smaller gradient, beyond rounding, before a method has stalled
# Heuristic: a method has stalled if so many steps neither halve the gradient nor lower the value by ``_ROUNDINGS``
# times its noise: that of the current value for the short window, that of the largest value seen for the long one.
_WINDOWS = (100, 500)
_ROUNDINGS = 100
_CUT = 0.25  # the factor by which a step is shortened if it ends where derivatives are NaN or infinite
_INTERVAL = np.int32(64)  # the best point is examined after so many steps even if each of them lowers the value
# Heuristic: a method without the Hessian is first examined after so many steps without a lower value, because its
# memory still improves during them.
_LEARNING = 5
# Heuristic: in a long solve the windows are a tenth and half of all steps, so that slow convergence does not count as
# stalled.
_SHARES = (10, 2)


class MinimizeStep(NamedTuple):
    """What ``minimize`` passes to its callback at each iterate.

    Attributes:
        num_steps: the steps taken so far.
        value: the objective.
        grad_norm: the largest absolute entry of its gradient; with bounds of the projected one.
        state: the state of the method: what the step that led here has left, and what the next one starts from.
    """

    num_steps: Int[Array, ""]
    value: Float[Array, ""]
    grad_norm: Float[Array, ""]
    state: Any


class Point(NamedTuple):
    x: Tree
    value: Float[Array, ""]
    grad: Tree
    grad_norm: Float[Array, ""]
    noise: Float[Array, ""]


class Mark(NamedTuple):
    """The last iterate that lowered the value by more than rounding or halved the gradient: short window, long window.

    Attributes:
        value: the lowest value up to the mark.
        grad_norm: the smallest norm of the gradient up to the mark.
        noise: the noise with which a decrease is compared.
        num_steps: the number of steps at the mark.
    """

    value: Float[Array, "2"]
    grad_norm: Float[Array, "2"]
    noise: Float[Array, "2"]
    num_steps: Int[Array, "2"]


class Origin(NamedTuple):
    """Where the last step began, its value with what rounding may add, and how often the step was cut since."""

    x: Tree
    value: Float[Array, ""]
    num_cuts: Int[Array, ""]


class Check(NamedTuple):
    """When the best point is examined, and whether it may pass."""

    due: Bool[Array, ""]
    num_steps: Int[Array, ""]  # at which it was last, or the value was last lowered
    wait: Int[Array, ""]  # how many steps later it may be again: 0 after the end
    has_leveled: Bool[Array, ""]  # whether the last step lowered the value by rounding at most: ``_test_convergence``


class Loop(NamedTuple):
    """The state of a solve: ``minimize`` carries it from step to step, ``minimize_batched`` from block to block."""

    x: Tree
    state: Any
    best: Point
    tolerance: Float[Array, ""]
    num_steps: Int[Array, ""]
    idle_steps: Int[Array, ""]
    mark: Mark
    status: Int[Array, ""]
    start: Tree
    check: Check
    watch: Watch = Watch()
    origin: Origin | None = None  # for methods whose trials are values alone


def is_running(loop: Any) -> Bool[Array, ""]:
    """Whether the loop has not ended yet."""
    return loop.status == Status.RUNNING


def may_step(loop: Loop) -> Bool[Array, ""]:
    """Whether the loop can take a step before ``settle`` examines the best point."""
    return is_running(loop) & ~loop.check.due


class Solve(NamedTuple):
    """What a loop minimizes, how, and to which limits; its methods are the parts of the loop."""

    value_fn: Callable[[Tree], Any]
    limits: Limits
    transformation: optax.GradientTransformation
    args: tuple[Any, ...] = ()
    hessian: Callable[..., Tree] | None = None
    callback: Callable[[MinimizeStep], None] | None = None
    box: Box | None = None

    def start(self, x0: Tree, watch: Watch) -> Loop:
        """The loop before the first step; the tolerance is ``gtol`` until the first gradient is known."""
        transformation, limits = self.transformation, self.limits
        zero = jnp.asarray(0, jnp.int32)
        infinity = jnp.full_like(limits.gtol, jnp.inf)
        never = jnp.full_like(infinity, jnp.inf, shape=(len(_WINDOWS),))
        wait = np.int32(1 if isinstance(transformation, SecondOrder) else _LEARNING)
        loop = Loop(
            x=x0,
            state=jax.lax.stop_gradient(transformation.init(x0)),
            best=Point(x0, infinity, jax.tree.map(jnp.zeros_like, x0), infinity, jnp.zeros_like(infinity)),
            tolerance=limits.gtol,
            num_steps=zero,
            idle_steps=zero,
            mark=Mark(never, never, jnp.zeros_like(never), jnp.zeros_like(never, jnp.int32)),
            status=jnp.asarray(Status.RUNNING, jnp.int32),
            start=x0,
            check=Check(jnp.zeros_like(zero, bool), zero, zero + wait, jnp.ones_like(zero, bool)),
            watch=watch,
        )
        if isinstance(transformation, SecondOrder):
            loop = loop._replace(origin=Origin(x0, infinity, zero))
        if isinstance(transformation, FirstOrder):
            stored = jax.lax.stop_gradient(Stored(*evaluate(self.value_fn, x0), x0))
            loop = loop._replace(state=loop.state._replace(stored=stored))
            point = self._report(loop, _stored_point(loop))
            loop = _record(_begin(loop, point, limits), point)
        return loop

    def advance(self, loop: Loop) -> Loop:
        """The body of the loop: a step, and the convergence test at the point that it reaches.

        A method that keeps value and gradient in its state tests the point that it has reached, so that nothing is done
        in vain at the last one. Any other evaluates the point and tests it before the next step, unless it ends there.
        """
        if isinstance(self.transformation, FirstOrder):
            loop = self._update(loop, _stored_point(loop), {"value": loop.state.stored.value})
            return self._arrive(loop, _stored_point(loop))
        point, extras = self._evaluate(loop)
        point = jax.lax.stop_gradient(point)
        arrived = self._arrive(loop, point)
        after = jax.lax.cond(
            is_running(arrived), lambda loop: self._update(loop, point, extras), lambda loop: loop, arrived
        )
        return after if loop.origin is None else _cut_step(loop, loop.origin, point, after)

    def settle(self, loop: Loop) -> Loop:
        """Examine the best point where that is due, or where a solve without an absolute tolerance has ended."""
        due, num_steps, wait, has_leveled = loop.check
        wanted = self.limits.to_rounding & (due | ~is_running(loop)) & (wait > 0)
        is_stuck = (loop.status == Status.STALLED) | (loop.status == Status.SETTLED)
        verdict = examine(self.value_fn, loop.start, loop.best, self.box, wanted, is_stuck)
        is_stationary = verdict.is_stationary & (has_leveled | is_stuck)
        status = _status_if(is_stationary, Status.CONVERGED, loop.status)
        status = _status_if(verdict.drifts, Status.NO_MINIMUM, status)
        wait = choose(due, jnp.minimum(2 * wait, _INTERVAL), wait)
        return loop._replace(
            status=_status_if(verdict.is_unbounded, Status.UNBOUNDED, status),
            num_steps=choose(due & is_stationary, num_steps, loop.num_steps),  # an update after it is not counted
            check=Check(jnp.zeros_like(due), num_steps, choose(is_running(loop), wait, np.int32(0)), has_leveled),
        )

    def _evaluate(self, loop: Loop) -> tuple[Point, dict[str, Any]]:
        """The objective at the current point, once, and what else the update takes of a method that stores nothing."""
        extras: dict[str, Any] = {}
        program = trace_objective("fun", self.value_fn, loop.x, ())
        if (hessian := self.hessian) is not None:
            value, grad = value_and_grad(program)
            extras["hessian_fn"] = lambda x: hessian(x, *self.args)
        elif isinstance(self.transformation, SecondOrder):
            forms_hessian = isinstance(self.transformation, DenseSecondOrder)
            composition = choose_for_solver(program, forms_hessian=forms_hessian)
            value, grad, extras["hvp_fn"], _ = linearize_program(program, composition)
        else:
            value, grad = _stored_or_fresh(program, loop)
        extras["value"] = value = jnp.asarray(value)
        return _point(loop, value, grad), extras

    def _update(self, loop: Loop, point: Point, extras: dict[str, Any]) -> Loop:
        """The loop after an update of the method."""

        def objective(x: Tree, args: Any = None) -> Any:  # optax's line searches pass every extra, and here is ``args``
            return self.value_fn(x)

        extras = extras | {"grad": point.grad, "value_fn": objective, "args": self.args}
        update_fn: Callable[..., tuple[Tree, Any]] = optax.with_extra_args_support(self.transformation).update
        updates, state = update_fn(point.grad, loop.state, loop.x, **extras)
        status = state.status if isinstance(self.transformation, WithStatus) else loop.status
        moved = status == Status.RUNNING
        if isinstance(self.transformation, FirstOrder):  # a line search that is unbounded may end at a lower point
            moved |= (status == Status.UNBOUNDED) & (state.stored.value < point.value)
        x, state = jax.lax.stop_gradient((optax.apply_updates(loop.x, updates), state))  # it may close over tracers
        return loop._replace(x=x, state=state, status=status, num_steps=loop.num_steps + moved.astype(jnp.int32))

    def _arrive(self, loop: Loop, point: Point) -> Loop:
        """Test the current point for convergence and report it, unless the last update has ended the solve."""
        point = self._report(loop, point)
        tested = _test_convergence(loop, point, self.limits, isinstance(self.transformation, WithStatus))
        return _record(tested._replace(status=choose(is_running(loop), tested.status, loop.status)), point)

    def _report(self, loop: Loop, point: Point) -> Point:
        """The point with the norm of its projected gradient, after a call of the callback.

        With bounds and ``gtol`` that is the norm of ``P(x - g) - x``, which mixes the units of ``x`` and of the
        objective. Without ``gtol`` it is that of the gradient without the entries that point out of the box at a bound.
        """
        if self.box is not None:
            free = downhill(around(self.box, point.x), ravel(point.grad)[0])
            clipped = projected_gradient_norm(self.box, point.x, point.grad)
            grad_norm = jnp.where(self.limits.to_rounding, jnp.max(jnp.abs(free)), clipped)
            point = point._replace(grad_norm=grad_norm.astype(point.grad_norm.dtype))
        if (callback := self.callback) is not None:
            step = MinimizeStep(loop.num_steps, point.value, point.grad_norm, loop.state)
            jax.lax.cond(is_running(loop), lambda: jax.debug.callback(callback, step), lambda: None)
        return point


def _cut_step(loop: Loop, origin: Origin, point: Point, after: Loop) -> Loop:
    """``after``, or a shorter step from the origin, where the last one led to derivatives that are NaN or infinite.

    Methods that form or apply the Hessian judge a trial by its value, because derivatives at each would cost as much as
    a step. So a step that was accepted by its value is rejected here if the derivatives at its end are not finite. It
    is cut by ``_CUT`` until they are, and the value is no higher than at the origin up to rounding.
    """
    rejected = (after.status == Status.NONFINITE) | ((origin.num_cuts > 0) & (point.value > origin.value))
    rejected &= (loop.num_steps > 0) & (origin.num_cuts < MAX_TRIALS)
    step = jax.tree.map(lambda x, start: _CUT * (x - start), loop.x, origin.x)
    state = after.state
    if hasattr(state, "radius"):
        state = state._replace(radius=choose(rejected, norm(ravel(step)[0]), state.radius))
    return after._replace(
        x=choose(rejected, optax.apply_updates(origin.x, step), after.x),
        state=state,
        status=choose(rejected, loop.status, after.status),
        num_steps=choose(rejected, loop.num_steps, after.num_steps),
        origin=Origin(
            choose(rejected, origin.x, loop.x),
            choose(rejected, origin.value, point.value + point.noise),
            (origin.num_cuts + 1) * rejected.astype(jnp.int32),
        ),
    )


def _record(loop: Loop, point: Point) -> Loop:
    watch = observe(loop.watch, loop.num_steps, point.value, point.grad_norm, loop.tolerance)
    return loop._replace(watch=watch)


def _stored_point(loop: Loop) -> Point:
    stored = loop.state.stored
    return _point(loop, stored.value, stored.grad)


def _point(loop: Loop, value: Float[Array, ""], grad: Tree) -> Point:
    dtype = loop.tolerance.dtype
    grad_norm = jnp.max(jnp.abs(ravel(grad)[0]))
    return Point(loop.x, value.astype(dtype), grad, grad_norm, noise_of(value).astype(dtype))


def _stored_or_fresh(program: Program, loop: Loop) -> tuple[Float[Array, ""], Tree]:
    """Value and gradient, from the state if a line search that comes last has left those of the point it chose.

    A line search that is not last in the chain is ignored, because later transformations change its step.
    """
    last = loop.state
    while isinstance(last, tuple) and last and not hasattr(last, "_fields"):
        last = last[-1]
    value, grad = getattr(last, "value", None), getattr(last, "grad", None)
    if value is None or jax.tree.structure(grad) != jax.tree.structure(loop.x):
        return value_and_grad(program)
    dtype = program.out.dtype
    return jax.lax.cond(jnp.isfinite(value), lambda: (jnp.asarray(value, dtype), grad), lambda: value_and_grad(program))


def _begin(loop: Loop, point: Point, limits: Limits) -> Loop:
    """``_test_convergence`` at the first point, written out because it traces and compiles faster."""
    tolerance = limits.gtol + limits.rtol * point.grad_norm
    finite = jnp.isfinite(point.value) & jnp.isfinite(point.grad_norm)
    status = jnp.where(limits.max_steps > 0, Status.RUNNING, Status.MAX_STEPS)
    status = jnp.where(point.grad_norm <= tolerance, Status.CONVERGED, status)
    status = jnp.where(finite, status, Status.NONFINITE_START).astype(jnp.int32)
    value, grad_norm, noise = (jnp.broadcast_to(a, len(_WINDOWS)) for a in (point.value, point.grad_norm, point.noise))
    mark = Mark(value, grad_norm, noise, loop.mark.num_steps)
    return loop._replace(best=point, tolerance=tolerance, mark=mark, status=status)


def _test_convergence(loop: Loop, point: Point, limits: Limits, has_status: bool) -> Loop:
    """Update the best point and the status: is it converged, out of steps, stuck, or broken?

    Only methods that descend at every step can be stuck; others may wander and recover. A method is stuck if

    1. ``_PATIENCE`` steps in a row lower neither the value by more than its rounding nor the gradient, or
    2. the steps of a window neither lower the value by ``_ROUNDINGS`` times its noise nor halve the gradient. The long
       window measures the noise at the largest value seen, so that a descent without end along a valley ends too.

    The value has leveled if the step lowers it by at most its noise, or ``eps`` times the noise of the largest value.
    """
    first = loop.best.value == jnp.inf
    tolerance = choose(first, loop.tolerance + limits.rtol * point.grad_norm, loop.tolerance)
    finite = jnp.isfinite(point.value) & jnp.isfinite(point.grad_norm)
    converged = finite & (point.grad_norm <= tolerance)

    lower = point.value < loop.best.value - loop.best.noise
    flatter = (point.value <= loop.best.value + loop.best.noise) & (point.grad_norm < loop.best.grad_norm)
    better = finite & (lower | flatter)
    # Where gains are below rounding, the best point moves along: the value is no higher, the gradient at most doubles.
    no_worse = (point.value <= loop.best.value) & (point.grad_norm <= 2 * loop.best.grad_norm)
    best = choose(better | converged | first | (finite & no_worse), point, loop.best)
    idle_steps = choose(better, np.int32(0), loop.idle_steps + 1)
    mark = _update_mark(loop, point)

    status = _status_if(loop.num_steps >= limits.max_steps, Status.MAX_STEPS, Status.RUNNING)
    if has_status:
        windows = jnp.maximum(np.array(_WINDOWS, np.int32), jax.lax.div(loop.num_steps, np.array(_SHARES, np.int32)))
        stuck = (idle_steps >= _PATIENCE) | jnp.any(loop.num_steps - mark.num_steps >= windows)
        status = _status_if(stuck, _status_if(limits.to_rounding, Status.SETTLED, Status.STALLED), status)
    status = choose(finite, status, _status_if(first, Status.NONFINITE_START, Status.NONFINITE))
    status = _status_if(converged, Status.CONVERGED, status)
    checked = choose(lower, loop.num_steps, loop.check.num_steps)
    due = (loop.num_steps - checked >= loop.check.wait) | (jax.lax.rem(loop.num_steps, _INTERVAL) == _INTERVAL - 1)
    next_to_nothing = jnp.maximum(loop.best.noise, jnp.finfo(tolerance.dtype).eps * mark.noise[1])
    has_leveled = ~(point.value < loop.best.value - next_to_nothing)
    check = Check(limits.to_rounding & due, choose(due, loop.num_steps, checked), loop.check.wait, has_leveled)
    return loop._replace(best=best, tolerance=tolerance, idle_steps=idle_steps, mark=mark, status=status, check=check)


def _status_if(condition: Bool[Array, ""], status: Any, other: Any) -> Int[Array, ""]:
    return choose(condition, *(jnp.asarray(one, jnp.int32) for one in (status, other)))


def _update_mark(loop: Loop, point: Point) -> Mark:
    """The mark, moved here for each window in which the value fell by ``_ROUNDINGS`` noises or the gradient halved."""
    mark = loop.mark
    noise = jnp.maximum(point.noise, mark.noise * np.array([0, 1], mark.noise.dtype))
    lower = point.value < mark.value - _ROUNDINGS * noise
    flatter = point.grad_norm < mark.grad_norm / 2
    steps = jnp.broadcast_to(loop.num_steps, mark.num_steps.shape)
    here = Mark(jnp.minimum(point.value, mark.value), jnp.minimum(point.grad_norm, mark.grad_norm), noise, steps)
    return choose(lower | flatter, here, mark)
