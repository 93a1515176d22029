"""L-BFGS within bounds: the limited-memory matrix as the model of a projected trust region."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, matmul, norm
from curvature._types import Scalar, Tree, Vector
from curvature.optimizers._bounds import around, downhill, stay_inside
from curvature.optimizers._box_subproblem import BoxModel, conjugate_gradients, minimize_in_box
from curvature.optimizers._globalize import FAR, POOR, Attempt, guess_radius, search
from curvature.optimizers._method import FirstOrder, Slope, Stored, choose, first_order

_DAMPING = 0.1  # N&W take 0.2 in section 18.3
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
        radius: the radius for the next step; 0 where the first update is to guess it.
        memory: the steps and the changes of the gradient that make the matrix.
        num_trials: the points that the last update tried.
        status: a ``Status``: running, or why the last update could not move.
        stored: value and gradient at the new point, where ``optax.value_and_grad_from_state`` finds them.
    """

    radius: Float[Array, ""]
    memory: LBFGSBMemory
    num_trials: Int[Array, ""]
    status: Int[Array, ""]
    stored: Stored


@public
def lbfgsb(lower: Tree = None, upper: Tree = None, *, memory_size: int = 10) -> FirstOrder:
    """L-BFGS within ``lower <= x <= upper``: an optax transformation that needs gradients only.

    A step minimizes ``f + g's + s'Bs / 2`` over the box and a trust region, with the BFGS matrix ``B`` of the last
    ``memory_size`` steps and of a multiple of the identity, which is L-BFGS-B's model. The way to its minimizer is
    that of ``projected_newton``, where L-BFGS-B walks the breakpoints of the path one by one, which a vector machine
    would do in as many steps; and a region replaces the line search, so that each trial is one value and gradient and,
    whether taken or not, teaches ``B`` the curvature along it, damped where that is not positive.

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
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = optax.value_and_grad_from_state(rosenbrock)(x, state=state)
        ...     updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=rosenbrock)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(42):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3)
        Array([0.5 , 0.25], dtype=float32)

    References: Byrd, Lu, Nocedal and Zhu (1995), doi:10.1137/0916069; Lin and Moré (1999),
        doi:10.1137/S1052623498345075; Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), sections 7.2
        and 18.3.
    """
    _checks.check_static_count("memory_size", memory_size, 1)

    def start(x: Vector) -> dict[str, Any]:
        none, newest = jnp.zeros((memory_size, x.size), x.dtype), jnp.asarray(memory_size - 1, jnp.int32)
        return {"memory": LBFGSBMemory(none, none, newest, jnp.asarray(0, x.dtype))}

    return first_order(LBFGSBState, _step, start=start, bounds=(lower, upper))


def _step(state: LBFGSBState, slope: Slope) -> tuple[Vector, Scalar, Vector, LBFGSBState]:
    """Every trial has a gradient and teaches the matrix, whether it is accepted or not."""
    assert slope.box is not None
    box, steps = slope.box, around(slope.box, slope.x)
    limit = jnp.asarray(4 * len(state.memory.steps) + 10, jnp.int32)
    solve_face = conjugate_gradients(jnp.asarray(_FORCING, slope.grad.dtype), limit)

    def attempt(radius: Scalar, learned: tuple[Vector, LBFGSBMemory]) -> Attempt:
        memory = learned[1]
        product = _product(memory, norm(downhill(steps, slope.grad)) / radius)
        region, inner_steps = minimize_in_box(BoxModel(slope.grad, product, None, steps), radius, solve_face)
        region = region._replace(step=stay_inside(box, slope.x, region.step))
        value, grad = slope.value_and_grad_after(region.step)
        taught = _remember(memory, product, region.step, grad - slope.grad)
        usable = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
        return Attempt(region, value, usable, inner_steps, lambda ratio: (grad, choose(ratio > -FAR, taught, memory)))

    radius, is_guess = guess_radius(slope, state.radius)
    last = search(slope, attempt, radius, learned=(slope.grad, state.memory), is_guess=is_guess)
    grad, memory = last.learned
    rejected = jnp.where(slope.usable, POOR * radius, state.radius)
    step, state = last.take_step(state, accepted=last.next_radius(), rejected=rejected, memory=memory)
    value, grad = choose(last.accepted, (last.value, grad), (slope.value, slope.grad))
    return step, value, grad, state


def _product(memory: LBFGSBMemory, first: Scalar) -> Callable[[Vector], Vector]:
    """The product with the BFGS matrix ``B = c I + sum_i (b_i b_i' - a_i a_i')``, oldest pair first.

    Before anything is known ``c`` is ``first``, which leads to the boundary.
    ``b_i = y_i / sqrt(y_i's_i)`` and ``a_i = B_i s_i / sqrt(s_i'B_i s_i)``, N&W (7.24) unrolled: it solves nothing, and
    stays positive semidefinite where the middle matrix of the compact form would be singular.
    """
    size, scale = len(memory.steps), jnp.where(memory.scale > 0, memory.scale, first)
    order = (memory.newest + 1 + jnp.arange(size, dtype=jnp.int32)) % size
    pairs = memory.steps[order], memory.changes[order]

    def add(
        carry: tuple[Array, Array], pair: tuple[Int[Array, ""], Vector, Vector]
    ) -> tuple[tuple[Array, Array], None]:
        (a, b), (i, step, change) = carry, pair
        product = apply(a, b, step)
        return (a.at[i].set(_unit(product, dot(step, product))), b.at[i].set(_unit(change, dot(step, change)))), None

    def apply(a: Array, b: Array, v: Vector) -> Vector:
        ahead, back = (matmul(rows, v) for rows in (b, a))
        return scale * v + matmul(ahead, b) - matmul(back, a)

    none = jnp.zeros_like(memory.steps)
    (a, b), _ = jax.lax.scan(add, (none, none), (jnp.arange(size, dtype=jnp.int32), *pairs))
    return functools.partial(apply, a, b)


def _unit(vector: Vector, square: Scalar) -> Vector:
    """``vector / sqrt(square)``, 0 for a pair that is not there."""
    return jnp.where(square > 0, vector / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _remember(memory: LBFGSBMemory, product: Callable[[Vector], Vector], step: Vector, change: Vector) -> LBFGSBMemory:
    """The memory with one pair more, damped to a curvature of at least ``_DAMPING`` times that of ``B``.

    So ``B`` stays positive definite where the objective is not convex, and falls geometrically along steps on which it
    promises too much curvature, as a line search would lengthen them. N&W (18.14) and (18.15), on a step of length 1.
    """
    length = norm(step)
    step, change = (vector / jnp.where(length > 0, length, 1) for vector in (step, change))
    expected = product(step)
    most, curvature = dot(step, expected), dot(step, change)
    damped = curvature < _DAMPING * most
    share = jnp.where(damped, (1 - _DAMPING) * most / jnp.where(damped, most - curvature, 1), 1)
    change = jnp.where(damped, share * change + (1 - share) * expected, change)
    curvature, row = dot(step, change), (memory.newest + 1) % len(memory.steps)
    usable = jnp.all(jnp.isfinite(change)) & (curvature > 0)
    scale = dot(change / jnp.where(usable, curvature, 1), change)
    rows = memory.steps.at[row].set(step), memory.changes.at[row].set(change)
    return jax.tree.map(lambda new, old: jnp.where(usable, new, old), LBFGSBMemory(*rows, row, scale), memory)
