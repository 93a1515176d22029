"""L-BFGS in compact form, on a ring buffer of steps and gradient changes."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, matmul
from curvature._types import Scalar, Vector
from curvature.optimizers._line_search import descend, shows_curvature
from curvature.optimizers._method import FirstOrder, Slope, Stored, first_order

# Pairs by default. XLA's CPU compiler runs a program whose arrays take at most 512 bytes each in one thread, others on
# a pool of threads, which costs more than a few variables are worth: 8 x 8 doubles are 512 bytes.
_MEMORY, _FEW_VARIABLES, _MEMORY_OF_FEW = 20, 4, 8
_MOST_GROWTH = 0.5  # the power of 1 / eps to which scales may add up: beyond, the oldest pairs would drown the newest


class Pairs(NamedTuple):
    """The last steps ``s`` and gradient changes ``y`` in the places of a ring, with what products with them need.

    Attributes:
        steps: a step in each row, times a factor; the newest stands at ``(count - 1) % m``.
        changes: the change of the gradient over each step, times the same factor, which makes the product of their
            largest entries 1.
        inverse: of the matrix of the ``s_i' y_j`` whose pair i is no later than j; zero where there is no pair.
        yy: ``y_i' y_j``.
        sy: ``s_i' y_i``.
        growth: the logarithm of how much later updates scaled down the curvature that was known before them.
        gamma: ``s' y / y' y`` of the newest pair: the inverse curvature along what no pair knows.
        count: how many pairs were written since the memory was last empty.
    """

    steps: Float[Array, "m n"]
    changes: Float[Array, "m n"]
    inverse: Float[Array, "m m"]
    yy: Float[Array, "m m"]
    sy: Float[Array, " m"]
    growth: Float[Array, " m"]
    gamma: Float[Array, ""]
    count: Int[Array, ""]


class LBFGSState(NamedTuple):
    """The state of ``lbfgs``: plain arrays, ready for a checkpoint.

    Attributes:
        pairs: the memory.
        step_size: the share of the quasi-Newton step that the last update took.
        num_trials: the points that it evaluated.
        status: a ``Status``: running, or why the last update could not move.
        stored: value and gradient at the new point, for optax.
    """

    pairs: Pairs
    step_size: Float[Array, ""]
    num_trials: Int[Array, ""]
    status: Int[Array, ""]
    stored: Stored


@public
def lbfgs(memory_size: int | None = None) -> FirstOrder:
    """L-BFGS: an optax transformation for smooth objectives of any size; gradients only.

    The direction is ``-H g`` with the inverse Hessian that the last m updates make of ``(y's / y'y) I``, in compact
    form: two passes over the memory, and three products with matrices of its size m. The updates are those of the
    self-scaled BFGS method: where a step shows less curvature than the memory had along it, ``tau = y's / s'Bs < 1``,
    all that was known before is scaled down by ``tau``. The memory is a ring: a step writes one row. The line search
    satisfies the strong Wolfe conditions, or, where rounding hides the value, decides by the slope, so that single
    precision ends by its gradient. When it fails, the memory is emptied. Nothing depends on the scale of the objective.

    Use it where ``optax.lbfgs()`` stands; ``optax.value_and_grad_from_state`` finds value and gradient in the state.

    Args:
        memory_size: m, the pairs of steps and gradient changes that are kept. By default 20, or 8 for at most four
            variables, where small matrices save more time than pairs beyond twice as many as variables are worth.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is an ``LBFGSState``.

    Raises:
        ValueError: when ``memory_size`` is not a positive integer; from ``update`` when an argument is missing.

    Cost: for each update one value and gradient at each trial, mostly one, and about 12 m n FLOPs; memory for 2 m n
        numbers.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> f = lambda x: jnp.sum(jnp.cosh(x - jnp.arange(3.0)))
        >>> x, solver = jnp.zeros(3), curvature.lbfgs()
        >>> state = solver.init(x)
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = optax.value_and_grad_from_state(f)(x, state=state)
        ...     updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=f)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(12):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3) + 0.0
        Array([0., 1., 2.], dtype=float32)

    References: Byrd, Nocedal and Schnabel (1994), theorem 2.2, doi:10.1007/BF01582063; Al-Baali (1999), doi:
        10.1023/A:1019142304382; Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), section 7.2.
    """
    if memory_size is not None:
        _checks.check_static_count("memory_size", memory_size, 1)
    return _build(memory_size)


@functools.lru_cache(maxsize=64)  # so that equal settings find the compiled solve again
def _build(memory_size: int | None) -> FirstOrder:
    def start(x: Vector) -> dict[str, Any]:
        few = _MEMORY if x.size > _FEW_VARIABLES else _MEMORY_OF_FEW
        return {"pairs": no_pairs(memory_size or few, x.size, x.dtype)}

    return first_order(LBFGSState, _step, start=start)


def _step(state: LBFGSState, local: Slope) -> tuple[Vector, Scalar, Vector, LBFGSState]:
    found = descend(local, -inverse_product(state.pairs, local.grad), state.pairs.count > 0)
    accepted = found.search.accepted
    drops = local.usable & (found.fresh | ~accepted)
    pairs = state.pairs._replace(count=jnp.where(drops, 0, state.pairs.count))
    state = state._replace(
        pairs=remember(pairs, found.pair.step, found.pair.change, found.expected),
        step_size=jnp.where(local.usable, found.search.trial.t, state.step_size),
        num_trials=found.search.count,
        status=found.status,
    )
    return found.step, found.value, found.grad, state


def no_pairs(memory_size: int, size: int, dtype: jnp.dtype) -> Pairs:
    rows, products = jnp.zeros((memory_size, size), dtype), jnp.zeros((memory_size, memory_size), dtype)
    numbers, one, zero = products[0], jnp.asarray(1, dtype), jnp.asarray(0, jnp.int32)
    return Pairs(rows, rows, products, products, numbers, numbers, one, zero)


def remember(pairs: Pairs, step: Vector, change: Vector, expected: Scalar) -> Pairs:
    """Write a pair over the oldest one, unless it shows no positive curvature.

    ``expected`` is the curvature ``s'Bs`` that the memory had along the step. The triangle ``[[R, c], [0, d]]`` of
    inner products has the inverse ``[[R^-1, -R^-1 c / d], [0, 1 / d]]``, and without its first row and column the
    inverse is that of what remains. So the inverse is updated where the oldest pair was, and never solved for.
    """
    most = len(pairs.sy)
    place = pairs.count % most
    here = jnp.arange(most, dtype=jnp.int32) == place
    known = ~here & (pairs.count > 0)
    curvature = dot(step, change)
    useful = shows_curvature(step, change)

    # A useless pair leaves its row unchanged, without a copy of the other rows.
    def write(rows: Array, row: Array) -> Array:
        old = jax.lax.dynamic_index_in_dim(rows, place, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(rows, jnp.where(useful, row, old), place, 0)

    steps, changes = write(pairs.steps, step), write(pairs.changes, change)
    sy, yy = matmul(steps, change), matmul(changes, change)
    inverse = jnp.where(known[:, None] & known[None, :], pairs.inverse, 0)
    column = jnp.where(here, 1, -matmul(inverse, sy)) / curvature
    scales = (pairs.count > 0) & (curvature < expected)
    growth = jnp.where(scales, jnp.log(jnp.where(scales, expected, 1) / curvature), 0)
    written = {
        "inverse": jnp.where(here[None, :], column[:, None], inverse),
        "yy": jnp.where(here[None, :], yy[:, None], jnp.where(here[:, None], yy[None, :], pairs.yy)),
        "sy": jnp.where(here, curvature, pairs.sy),
        "growth": jnp.where(here, 0, pairs.growth + growth),
        "gamma": curvature / yy[place],
        "count": pairs.count + 1,
    }
    kept = {name: jnp.where(useful, new, getattr(pairs, name)) for name, new in written.items()}
    return pairs._replace(steps=steps, changes=changes, **kept)


def inverse_product(pairs: Pairs, vector: Vector) -> Vector:
    """``H v`` with the inverse Hessian of the pairs: Byrd, Nocedal and Schnabel (1994), equation (2.6).

    With ``D = diag(s_i'y_i)``, the upper triangle R of ``S'Y`` and the later scales ``c_i = prod_{j > i} 1 / tau_j``::

        H = gamma (I - S R^-T Y') (I - Y R^-1 S') + S R^-T diag(c) D R^-1 S'
    """
    most = -_MOST_GROWTH * jnp.log(jnp.finfo(vector.dtype).eps)
    growth = jnp.exp(jnp.minimum(pairs.growth, most))
    inverse = jnp.where(pairs.count > 0, pairs.inverse, 0)
    gamma = jnp.where(pairs.count > 0, pairs.gamma, 1)
    q = matmul(inverse, matmul(pairs.steps, vector))
    projected = matmul(pairs.yy, q) - matmul(pairs.changes, vector)
    p = matmul(growth * pairs.sy * q + gamma * projected, inverse)
    return gamma * vector + matmul(p, pairs.steps) - gamma * matmul(q, pairs.changes)
