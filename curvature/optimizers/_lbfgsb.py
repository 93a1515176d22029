"""L-BFGS within bounds: the limited-memory matrix as the model of a projected trust region."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._types import Status, Tree, ravel
from curvature.linalg._dense import RegionStep, norm
from curvature.linalg._system import dot
from curvature.optimizers._bounds import Box, StepBox, around, box_of, downhill, flat, stay_inside
from curvature.optimizers._box_region import BoxModel, conjugate_gradients, minimize_in_box
from curvature.optimizers._protocol import (
    MAX_TRIALS,
    FirstOrder,
    Scalar,
    Slope,
    Stored,
    Vector,
    first_order,
    shrink_factor,
    trial_status,
    unevaluated,
)
from curvature.optimizers._trust_region import _ACCEPT, _POOR, _next_radius, _Trial

_FORCING = 1e-3  # the relative residual on a face: products with the matrix cost no evaluation


class LBFGSBMemory(NamedTuple):
    """The last steps and what they did to the gradient, in a ring.

    Attributes:
        steps: ``m`` steps, each scaled to length 1; zero where none has been stored.
        changes: the changes of the gradient along them, scaled likewise.
        newest: the row stored last.
        scale: the multiple of the identity that the matrix starts from; 0 before there is any.
    """

    steps: Float[Array, "m n"]
    changes: Float[Array, "m n"]
    newest: Int[Array, ""]
    scale: Float[Array, ""]


class LBFGSBState(NamedTuple):
    """The state of ``lbfgsb``: plain arrays, ready for a checkpoint.

    Attributes:
        radius: the radius for the next step.
        memory: the steps and the changes of the gradient that make the matrix.
        num_trials: the points that the last update tried.
        status: a ``Status``: running, or why the last update could not move.
        stored: value and gradient at the new point, where ``optax.value_and_grad_from_state`` finds them.
    """

    radius: Float[Array, ""]
    memory: LBFGSBMemory
    num_trials: Int[Array, ""]
    status: Int[Array, ""]
    stored: Any


class _Tried(NamedTuple):
    """One radius tried, the gradient there, and what is remembered of it."""

    trial: _Trial
    grad: Vector
    memory: LBFGSBMemory


def lbfgsb(lower: Tree = None, upper: Tree = None, *, memory_size: int = 10) -> FirstOrder:
    """L-BFGS within ``lower <= x <= upper``: an optax transformation that needs gradients only.

    A step minimizes ``f + g's + s'Bs / 2`` over the box and a trust region, with the BFGS matrix ``B`` of the last
    ``memory_size`` steps and of a multiple of the identity. This is the model of L-BFGS-B. The way to its minimizer is
    that of ``projected_newton``, where L-BFGS-B walks the breakpoints of the path one by one, which a vector machine
    would do in as many steps; and a region replaces the line search, so that each trial is one value and gradient and,
    whether taken or not, teaches ``B`` the curvature along it.

    Every point it tries is in the box, which the objective never leaves. ``params`` must be in it to begin with. If
    there is no step, it is zero and ``state.status`` says why.

    Args:
        lower: the lower bounds: a tree like ``params`` or a prefix of one, where a number stands for all entries below
            it; ``None`` and minus infinity are no bound.
        upper: the upper bounds, likewise; equal bounds fix a variable.
        memory_size: how many steps are remembered.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is an ``LBFGSBState``. ``minimize(bounds=...)`` with
        ``method="l-bfgs"`` is the loop around it, whose program takes the bounds as operands.

    Raises:
        TypeError, ValueError: for a memory that is no positive integer; from ``init`` and ``update`` when the bounds do
            not match ``params`` or cross, or an argument is missing.

    Cost: for each trial one value and gradient, about 2 m^2 n FLOPs for the matrix of m steps and 8 m n for each of its
        products; memory for 4 m n numbers.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        >>> x, solver = jnp.array([-1.2, 1.0]), curvature.lbfgsb(upper=jnp.array([0.5, jnp.inf]))
        >>> state = solver.init(x)
        >>> for _ in range(40):
        ...     value, grad = jax.value_and_grad(rosenbrock)(x)
        ...     step, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=rosenbrock)
        ...     x = optax.apply_updates(x, step)
        >>> jnp.round(x, 3)
        Array([0.5 , 0.25], dtype=float32)

    References: Byrd, Lu, Nocedal and Zhu (1995), doi:10.1137/0916069; Lin and Moré (1999),
        doi:10.1137/S1052623498345075; Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), section 7.2.
    """
    _checks.check_count("lbfgsb", "memory_size", memory_size, least=1)
    init = functools.partial(_init, memory_size)

    def init_fn(params: Tree) -> LBFGSBState:
        params = _checks.check_point("lbfgsb", "params", params)
        box_of("lbfgsb", lower, upper, "params", params)
        return init(ravel(params)[0], params)

    def update_fn(updates: Tree, state: Any, params: Tree | None = None, **extra_args: Any) -> tuple[Tree, Any]:
        params = _checks.require_extra("lbfgsb", "params", params)
        box = box_of("lbfgsb", lower, upper, "params", params)
        inner = first_order("lbfgsb", init, functools.partial(_step, flat(box)))
        updates, state = inner.update(updates, state, params, **extra_args)
        return stay_inside(box, params, updates), state

    return FirstOrder(init_fn, update_fn)


def _init(memory_size: int, x: Vector, params: Tree) -> LBFGSBState:
    zero, none = jnp.asarray(0, x.dtype), jnp.zeros((memory_size, x.size), x.dtype)
    return LBFGSBState(
        radius=jnp.maximum(1, norm(x)),
        memory=LBFGSBMemory(none, none, jnp.asarray(memory_size - 1, jnp.int32), zero),
        num_trials=jnp.asarray(0, jnp.int32),
        status=jnp.asarray(Status.RUNNING, jnp.int32),
        stored=Stored(*unevaluated(x, params)),
    )


def _step(box: Box, state: LBFGSBState, slope: Slope) -> tuple[Vector, Scalar, Vector, LBFGSBState]:
    last, grad, memory = _search_radius(box, state, slope)
    accepted = last.ratio >= _ACCEPT
    state = state._replace(
        radius=jnp.where(accepted, _next_radius(last), _POOR * state.radius),
        memory=memory,
        num_trials=last.count,
        status=trial_status(accepted, last.value, last.predicted),
    )
    value, grad = jnp.where(accepted, last.value, slope.value), jnp.where(accepted, grad, slope.grad)
    return jnp.where(accepted, last.step, 0), value, grad, state


def _search_radius(box: Box, state: LBFGSBState, slope: Slope) -> _Tried:
    """Shrink the region until the model's step is accepted; every trial has a gradient, and is remembered."""
    noise = slope.noise + jnp.finfo(slope.noise.dtype).tiny
    steps = around(box, slope.x)

    def running(tried: _Tried) -> Bool[Array, ""]:
        trial = tried.trial
        hopeless = jnp.isnan(trial.predicted) | (trial.value == -jnp.inf)
        return (trial.count == 0) | (~(trial.ratio >= _ACCEPT) & ~hopeless & (trial.count < MAX_TRIALS))

    def attempt(tried: _Tried) -> _Tried:
        last = tried.trial
        shrunk = norm(last.step) * shrink_factor(slope.value, dot(slope.grad, last.step), last.value)
        radius = jnp.where(last.count == 0, last.radius, shrunk)
        (step, predicted, on_boundary), inner_steps = _model_step(tried.memory, steps, slope.grad, radius)
        step = stay_inside(box, slope.x, step)
        value, grad = slope.value_and_grad_after(step)
        ratio = (slope.value - value + noise) / (jnp.maximum(predicted, 0) + noise)
        finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
        ratio = jnp.where(finite, ratio, -jnp.inf).astype(radius.dtype)
        trial = _Trial(radius, step, value, predicted, on_boundary, ratio, last.count + 1, inner_steps)
        return _Tried(trial, grad, _remember(tried.memory, step, grad - slope.grad))

    zero, none = jnp.zeros_like(slope.grad[0]), jnp.zeros_like(slope.grad[0], jnp.int32)
    nowhere, no = jnp.zeros_like(slope.grad), jnp.zeros_like(zero, bool)
    start = _Trial(state.radius + zero, nowhere, slope.value, zero, no, zero, none, none)
    return jax.lax.while_loop(running, attempt, _Tried(start, slope.grad, state.memory))


def _model_step(
    memory: LBFGSBMemory, steps: StepBox, grad: Vector, radius: Scalar
) -> tuple[RegionStep, Int[Array, ""]]:
    """Minimize the model within box and radius; before anything is known it leads to the boundary."""
    scale = jnp.where(memory.scale > 0, memory.scale, norm(downhill(steps, grad)) / radius)
    model = BoxModel(grad, _product(memory._replace(scale=scale)), None, steps)
    limit = jnp.asarray(4 * len(memory.steps) + 10, jnp.int32)
    return minimize_in_box(model, radius, conjugate_gradients(jnp.asarray(_FORCING, grad.dtype), limit))


def _product(memory: LBFGSBMemory) -> Callable[[Vector], Vector]:
    """The product with the BFGS matrix ``B = c I + sum_i (b_i b_i' - a_i a_i')``, oldest pair first.

    ``b_i = y_i / sqrt(y_i's_i)`` and ``a_i = B_i s_i / sqrt(s_i'B_i s_i)``, N&W (7.24) unrolled: it solves nothing, and
    stays positive semidefinite where the middle matrix of the compact form would be singular.
    """
    size = len(memory.steps)
    order = (memory.newest + 1 + jnp.arange(size, dtype=jnp.int32)) % size
    pairs = memory.steps[order], memory.changes[order]

    def add(
        carry: tuple[Array, Array], pair: tuple[Int[Array, ""], Vector, Vector]
    ) -> tuple[tuple[Array, Array], None]:
        (a, b), (i, step, change) = carry, pair
        product = apply(a, b, step)
        return (a.at[i].set(_unit(product, dot(step, product))), b.at[i].set(_unit(change, dot(step, change)))), None

    def apply(a: Array, b: Array, v: Vector) -> Vector:
        ahead, back = (jnp.matmul(rows, v, precision="highest") for rows in (b, a))
        return memory.scale * v + jnp.matmul(ahead, b, precision="highest") - jnp.matmul(back, a, precision="highest")

    none = jnp.zeros_like(memory.steps)
    (a, b), _ = jax.lax.scan(add, (none, none), (jnp.arange(size, dtype=jnp.int32), *pairs))
    return functools.partial(apply, a, b)


def _unit(vector: Vector, square: Scalar) -> Vector:
    """``vector / sqrt(square)``, 0 for a pair that is not there."""
    return jnp.where(square > 0, vector / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _remember(memory: LBFGSBMemory, step: Vector, change: Vector) -> LBFGSBMemory:
    """The memory with one pair more, scaled to a step of length 1, if its curvature is positive beyond rounding."""
    length = norm(step)
    step, change = (vector / jnp.where(length > 0, length, 1) for vector in (step, change))
    curvature, size = dot(step, change), norm(change)
    usable = jnp.isfinite(size) & (curvature > jnp.finfo(step.dtype).eps * size)
    row = (memory.newest + 1) % len(memory.steps)
    new = LBFGSBMemory(
        steps=memory.steps.at[row].set(step),
        changes=memory.changes.at[row].set(change),
        newest=row,
        scale=size / jnp.where(usable, curvature / jnp.where(size > 0, size, 1), 1),
    )
    return jax.tree.map(lambda new, old: jnp.where(usable, new, old), new, memory)
