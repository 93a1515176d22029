"""SR1 in a trust region, with a dense Hessian approximation."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvature._errors import public
from curvature._numerics import dot, matmul, norm
from curvature._types import Matrix, Scalar, Status, Tree, Vector
from curvature.linalg._subproblems import factor_model, solve_region
from curvature.optimizers._line_search import Pair, pair_of
from curvature.optimizers._method import (
    MAX_TRIALS,
    FirstOrder,
    Slope,
    Stored,
    first_length,
    first_order,
    hides,
    nothing_stored,
    search_status,
    shortest_radius,
    shrink_factor,
)

_ACCEPT = 1e-4  # N&W algorithm 6.2: the least ratio of actual to predicted reduction that is a step
_POOR, _GOOD = 0.1, 0.75
_SKIP = 1e-8  # N&W (6.26)
_FAIR = 4.0  # by how much the fall of a step of guessed length may miss what the model foresees
_FAR = 10  # a trial that raises the value by more than this times the predicted reduction: the model says nothing there


class SR1State(NamedTuple):
    """The state of ``sr1``: plain arrays, ready for a checkpoint.

    Attributes:
        hessian: the approximation of the Hessian, in the order of ``jax.flatten_util.ravel_pytree``.
        num_updates: the pairs of steps and gradient changes in it since it was last zero.
        radius: the radius for the next step; 0 where the first update is to guess it.
        num_trials: the points that the last update evaluated.
        status: a ``Status``: running, or why the last update could not move.
        stored: value and gradient at the new point, for optax.
    """

    hessian: Float[Array, "n n"]
    num_updates: Int[Array, ""]
    radius: Float[Array, ""]
    num_trials: Int[Array, ""]
    status: Int[Array, ""]
    stored: Stored


class _Trial(NamedTuple):
    hessian: Matrix
    num_updates: Int[Array, ""]
    radius: Scalar
    step: Vector
    value: Scalar
    grad: Vector
    predicted: Scalar
    accepted: Bool[Array, ""]
    count: Int[Array, ""]


@functools.lru_cache(maxsize=64)
@public
def sr1() -> FirstOrder:
    """SR1 in a trust region: an optax transformation for smooth objectives, convex or not; gradients only.

    The approximation ``B`` of the Hessian need not be positive definite, and comes close to the Hessian itself: after a
    trial step ``s`` that changed the gradient by ``y``::

        B+ = B + r r' / r's,    r = y - B s

    unless ``abs(r's) <= 1e-8 norm(r) norm(s)``. Rejected trials teach it too, but not where the value rose by more than
    ten times what the model had it fall: B would not forget a curvature from so far off. The subproblem is solved to
    rounding, and the region shrinks until a trial is accepted. When none is, B starts again from zero. Nothing depends
    on the scale of the objective.

    Use it where ``optax.lbfgs()`` stands; ``optax.value_and_grad_from_state`` finds value and gradient in the state.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is an ``SR1State``.

    Raises:
        ValueError: from ``update`` when an argument is missing.

    Cost: for each trial one value and gradient, and about 9 n^3 FLOPs; memory for 3 n^2 numbers.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> f = lambda x: jnp.sum(jnp.cosh(x - jnp.arange(3.0)))
        >>> x, solver = jnp.zeros(3), curvature.sr1()
        >>> state = solver.init(x)
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = optax.value_and_grad_from_state(f)(x, state=state)
        ...     updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=f)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(14):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3) + 0.0
        Array([0., 1., 2.], dtype=float32)

    References: Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), algorithm 6.2; Conn, Gould and Toint (1991),
        doi:10.1007/BF01594934.
    """
    return first_order(_init, _step)


def _init(x: Vector, params: Tree) -> SR1State:
    zero = jnp.asarray(0, jnp.int32)
    return SR1State(
        hessian=jnp.zeros((x.size, x.size), x.dtype),
        num_updates=zero,
        radius=jnp.asarray(0, x.dtype),
        num_trials=zero,
        status=jnp.asarray(Status.RUNNING, jnp.int32),
        stored=nothing_stored(params),
    )


def _step(state: SR1State, local: Slope) -> tuple[Vector, Scalar, Vector, SR1State]:
    is_guess = state.radius == 0
    radius = jnp.where(is_guess, first_length(local, norm(local.grad)), state.radius)
    start = _Trial(
        hessian=state.hessian,
        num_updates=state.num_updates,
        radius=radius,
        step=jnp.zeros_like(local.grad),
        value=local.value,
        grad=local.grad,
        predicted=jnp.zeros_like(local.value),
        accepted=jnp.zeros_like(local.value, bool),
        count=jnp.zeros_like(local.value, jnp.int32),
    )

    def running(trial: _Trial) -> Bool[Array, ""]:
        hopeless = jnp.isnan(trial.predicted) | (trial.value == -jnp.inf)
        return ~trial.accepted & ~hopeless & (trial.count < MAX_TRIALS)

    last = jax.lax.while_loop(running, lambda trial: _attempt(trial, local, is_guess), start)
    accepted = last.accepted
    status = search_status(accepted, last.num_updates > 0, last.value, last.predicted)
    return (
        jnp.where(accepted, last.step, 0),
        jnp.where(accepted, last.value, local.value),
        jnp.where(accepted, last.grad, local.grad),
        state._replace(
            hessian=jnp.where(accepted, last.hessian, jnp.where(local.usable, 0, state.hessian)),
            num_updates=jnp.where(accepted, last.num_updates, jnp.where(local.usable, 0, state.num_updates)),
            radius=jnp.where(accepted, last.radius, jnp.where(local.usable, radius / 4, state.radius)),
            num_trials=last.count,
            status=status,
        ),
    )


def _attempt(trial: _Trial, local: Slope, is_guess: Bool[Array, ""]) -> _Trial:
    """Minimize the model in the region, evaluate the trial, update the matrix, and accept or reject the trial."""
    noise = local.noise + jnp.finfo(local.noise.dtype).tiny
    step, predicted, _ = solve_region(
        factor_model(trial.hessian, local.grad), jnp.maximum(trial.radius, shortest_radius(local))
    )
    value, grad = local.value_and_grad_after(step)
    finite = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
    ratio = (local.value - value + noise) / (jnp.maximum(predicted, 0) + noise)
    ratio = jnp.where(hides(local, step, value), 1, jnp.where(finite, ratio, -jnp.inf))
    near = ratio > -_FAR
    hessian, learned = _learn(trial.hessian, trial.num_updates, pair_of(step, grad - local.grad))
    learned = learned & near
    length = norm(step)
    slope = dot(local.grad, step)
    shrink = jnp.where(near, 0.5, shrink_factor(local.value, slope, value))
    grown = jnp.where((ratio > _GOOD) & (length > 0.8 * trial.radius), 2 * trial.radius, trial.radius)
    grown = jnp.minimum(grown, jnp.finfo(grown.dtype).max / 8)
    least, most = jnp.where(is_guess, 1 / _FAIR, _ACCEPT), jnp.where(is_guess, _FAIR, jnp.inf)
    accepted = (ratio >= least) & (ratio <= most)
    radius = jnp.where((ratio < _POOR) | ~accepted, shrink * jnp.minimum(length, trial.radius), grown)
    return _Trial(
        hessian=jnp.where(learned, hessian, trial.hessian),
        num_updates=trial.num_updates + learned.astype(jnp.int32),
        radius=radius,
        step=step,
        value=value,
        grad=grad,
        predicted=predicted,
        accepted=accepted,
        count=trial.count + 1,
    )


def _learn(B: Matrix, num_updates: Int[Array, ""], pair: Pair) -> tuple[Matrix, Bool[Array, ""]]:
    """``B+``; before the first pair B is the multiple of the identity that its curvature suggests."""
    step, change = pair.step, pair.change
    sy = dot(step, change)
    yy = dot(change, change)
    scale = jnp.where(sy > 0, yy / jnp.where(sy > 0, sy, 1), 0)  # N&W (6.20)
    B = jnp.where(num_updates == 0, scale * jnp.eye(step.size, dtype=step.dtype), B)
    r = change - matmul(B, step)
    rs = dot(r, step)
    useful = (jnp.abs(rs) > _SKIP * norm(r) * norm(step)) & jnp.any(step != 0)
    updated = B + jnp.outer(r, r) / jnp.where(useful, rs, 1)
    useful = useful & jnp.all(jnp.isfinite(updated))
    return jnp.where(useful, updated, B), useful | (num_updates == 0) & (sy != 0)
