"""The Gauss-Newton method with a line search."""

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, matmul, norm
from curvature._types import Vector
from curvature.optimizers import _residual_method
from curvature.optimizers._forcing import first_norm, inner_solve
from curvature.optimizers._line_search import search_values
from curvature.optimizers._method import Unevaluated
from curvature.optimizers._residual_method import Request, ResidualMethod
from curvature.optimizers._residuals import Linearized, where_positive
from curvature.optimizers._trust_region import steihaug

GaussNewtonSolver = Literal["exact", "cg"]

_SHORTER = 0.1  # heuristic: of a step that led to where derivatives are not finite, the share to try next


class GaussNewtonState(NamedTuple):
    """The state of ``gauss_newton``: plain arrays, ready for a checkpoint.

    Attributes:
        step_size: the share of the Gauss-Newton step that the last update took.
        num_trials: the points that it tried.
        grad_norm: the norm of the first scaled gradient, by which the inner tolerance of ``"cg"`` is measured.
        status: a ``Status``: running, or why the last update could not move.
        decrement: the Newton decrement where the update started; infinite where it was not asked for.
        stored: nothing, for optax.
    """

    step_size: Float[Array, ""]
    num_trials: Int[Array, ""]
    grad_norm: Float[Array, ""]
    decrement: Float[Array, ""]
    status: Int[Array, ""]
    stored: Unevaluated


@functools.lru_cache(maxsize=64)
@public
def gauss_newton(solver: GaussNewtonSolver = "exact") -> ResidualMethod:
    """The Gauss-Newton method with a line search: an optax transformation for sums of squares ``norm(r)^2 / 2``.

    The direction is the least-squares solution of ``J s = -r``, the shortest in variables scaled by the norms of the
    columns of ``J`` where there are many. The step is cut from 1 until the sum falls by ``1e-4`` of what the slope
    promises, give or take the rounding of the sum. Fast close to a solution with small residuals; far from one, or
    where ``J`` loses rank, ``levenberg_marquardt`` is the safe choice. Where ``least_squares`` asks for the Newton
    decrement and the Hessian is positive, the direction is Newton's.

    Use it where ``optax.lbfgs()`` stands: ``update(grad, state, params, value=, grad=, value_fn=, residual_fn=)``; see
    ``levenberg_marquardt``.

    Args:
        solver: ``"exact"`` forms ``J`` and solves by a singular value decomposition; ``"cg"`` never forms it, and
            stops conjugate gradients on ``J'J`` at a residual that falls with the gradient.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``GaussNewtonState``.

    Raises:
        ValueError: for an unknown solver; from ``update`` when an argument is missing.

    Cost: for each update one linearization of the residuals, one evaluation at each trial, and about
        ``6 m n^2 + 20 n^3`` FLOPs for m residuals of n variables; or for ``"cg"`` a JVP and a VJP for each step of
        conjugate gradients.

    Example:
        >>> import jax.numpy as jnp, optax, curvature
        >>> t, y = jnp.arange(4.0), jnp.array([3.0, 1.1, 0.41, 0.15])
        >>> x, solver = jnp.array([2.0, 0.5]), curvature.gauss_newton()
        >>> state = solver.init(x)
        >>> for _ in range(6):
        ...     step, state = solver.update(None, state, x, residual_fn=lambda x: x[0] * jnp.exp(-x[1] * t) - y)
        ...     x = optax.apply_updates(x, step)
        >>> jnp.round(x, 2)
        Array([3., 1.], dtype=float32)

    References: Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), section 10.3.
    """
    _checks.check_choice("solver", solver, GaussNewtonSolver)

    def step(state: GaussNewtonState, linear: Linearized, request: Request) -> tuple[Vector, GaussNewtonState]:
        scale = where_positive(linear.columns)
        local = _residual_method.scaled_local(linear, scale)
        size = norm(local.grad)
        first = first_norm(state.grad_norm, size)
        curvature = _residual_method.curvature_if(jnp.asarray(False), request, linear)
        if solver == "exact":
            direction = _solution(linear)
            if curvature is not None:
                direction = jnp.where(curvature.helps(), scale * curvature.newton.step, direction)
        else:
            infinity = jnp.full_like(size, jnp.inf)
            inner = inner_solve(local, size, first, None)
            direction = steihaug(local, inner)(infinity)[0].step
        share = jnp.where(request.shorter, _SHORTER * state.step_size, 1)
        direction = share * direction
        step, fields = search_values(local, direction, dot(local.grad, direction))
        fields["step_size"] *= share
        decrement = _residual_method.decrement_of(curvature, size)
        return step / scale, state._replace(grad_norm=first, decrement=decrement, **fields)

    def start(x: Vector) -> dict[str, Array]:
        return {"step_size": jnp.asarray(1, x.dtype), "decrement": jnp.asarray(jnp.inf, x.dtype)}

    return _residual_method.residual_method(GaussNewtonState, step, dense=solver == "exact", start=start)


def _solution(linear: Linearized) -> Vector:
    """The shortest least-squares solution of ``J s = -r`` in the variables scaled by the norms of columns."""
    assert linear.factors is not None
    values, vectors, coordinates = linear.factors.values, linear.factors.vectors, linear.factors.coordinates
    kept = values > 0
    return -matmul(vectors, jnp.where(kept, coordinates / jnp.where(kept, values, 1), 0))
