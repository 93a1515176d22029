"""Conjugate gradients: ``cg`` with restarts and a check of curvature, and Steihaug's method in a trust region."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from curvature._errors import public
from curvature._numerics import dot, norm
from curvature._types import Scalar, SolveInfo, Status, Tree, Vector, VectorMap
from curvature.linalg._host_loop import call_solver
from curvature.linalg._linear_system import Correction, check_system, refine, solve_by_iteration, where_status
from curvature.operators._base import LinearOperator


@public
def cg(
    op: LinearOperator | Callable[[Tree], Tree],
    b: Tree,
    *,
    rtol: ArrayLike = 1e-5,
    max_steps: ArrayLike | None = None,
    preconditioner: LinearOperator | Callable[[Tree], Tree] | None = None,
) -> tuple[Tree, SolveInfo]:
    """Solve ``A x = b`` for a symmetric positive definite ``A`` by conjugate gradients.

    Two things differ from the usual routine. First, ``CONVERGED`` is reported only if ``norm(b - A x) <= rtol *
    norm(b)`` holds for the residual recomputed from ``x``; if rounding makes the recurrence deviate from it, the method
    restarts from ``x``. Second, a direction ``p`` with ``p' A p <= eps * norm(p) * norm(A p)`` ends the solve and is
    returned: ``A`` is not positive definite.

    Derivatives are implicit: with respect to ``b`` and everything that the operator depends on, ``dx`` solves
    ``A dx = db - dA x`` with the same settings, in forward and in reverse mode. ``info`` has no derivative, and does
    not describe the solves for derivatives.

    Args:
        op: a symmetric operator, linearized once, or the product ``v -> A v`` on trees like ``b``.
        b: the right-hand side, any tree of floating arrays.
        rtol: the tolerance of the residual, relative to ``norm(b)``.
        max_steps: the largest number of steps; ``None`` is 10 for each entry of ``b``.
        preconditioner: a symmetric positive definite approximation of the inverse of ``A``, such as
            ``nystrom_preconditioner`` returns, or the product with one.

    Returns:
        ``(x, info)``: ``x`` shaped like ``b``, the last iterate unless an earlier start had a smaller residual;
        ``info`` a ``SolveInfo``. The status is ``CONVERGED``, ``MAX_STEPS``, ``NEGATIVE_CURVATURE``, ``STALLED`` (a
        restart did not halve the residual) or ``NONFINITE``.

    Raises:
        TypeError: if ``op`` is neither an operator nor callable, a leaf of ``b`` is not of a real floating dtype, or
            ``op`` changes the dtype.
        ValueError: if ``op(b)`` does not have the structure and shapes of ``b``, or a number is out of range.

    Cost: one product per step and one per restart; memory for six vectors like ``b``. Outside ``jit`` the solve is
        compiled once for each structure of ``op`` and ``b`` and the functions in them, which must be pure. With
        ``batches=`` each product is one pass over the batches, and the loop runs on the host: outside of ``jit``,
        ``vmap`` and ``grad`` only.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> x, info = curvature.cg(lambda v: jnp.array([2.0, 4.0]) * v, jnp.array([2.0, 2.0]))
        >>> jnp.round(x, 4), curvature.Status(int(info.status)).name, int(info.num_steps)
        (Array([1. , 0.5], dtype=float32), 'CONVERGED', 2)
        >>> _, info = curvature.cg(lambda v: -v, jnp.array([1.0, 0.0]))
        >>> curvature.Status(int(info.status)).name, float(info.min_curvature)
        ('NEGATIVE_CURVATURE', -1.0)

    References: Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), algorithm 5.3.
    """
    b, rtol, limit = check_system(b, rtol, max_steps)
    return call_solver(_solve, op, b, rtol, limit, preconditioner)


class CGState(NamedTuple):
    """The state of the iteration; ``r`` is the residual by the recurrence, ``p`` the direction, and ``rz = r' M r``."""

    x: Vector
    r: Vector
    p: Vector
    rz: Scalar
    step: Int[Array, ""]
    status: Int[Array, ""]
    on_boundary: Bool[Array, ""]
    min_curvature: Scalar
    direction: Vector


def truncated_cg(
    matvec: Callable[[Vector], Vector],
    b: Vector,
    *,
    tolerance: Scalar,
    max_steps: Int[Array, ""],
    radius: Scalar | float = jnp.inf,
    precondition: Callable[[Vector], Vector] = lambda r: r,
    start: CGState | None = None,
) -> CGState:
    """Conjugate gradients for ``A x = b`` inside ``norm(x) <= radius``: Steihaug, N&W algorithm 7.2.

    The entries of ``b`` must be of order 1, so that no square overflows. The iteration stops at ``norm(r) <=
    tolerance``, at the boundary, or on negative curvature, whose direction it follows to the boundary if the radius is
    finite. The region is measured in the Euclidean norm, so a preconditioner requires an infinite radius.
    """
    state = start_cg(b, precondition) if start is None else start

    def running(state: CGState) -> Bool[Array, ""]:
        return (state.status == Status.RUNNING) & (state.step < max_steps)

    def step(state: CGState) -> CGState:
        return _cg_step(state, matvec, precondition, radius, tolerance)

    state = state._replace(status=where_status(jnp.linalg.norm(state.r) <= tolerance, Status.CONVERGED, state.status))
    state = jax.lax.while_loop(running, step, state)
    return state._replace(status=where_status(state.status == Status.RUNNING, Status.MAX_STEPS, state.status))


def start_cg(b: Vector, precondition: Callable[[Vector], Vector]) -> CGState:
    """The state at ``x = 0``."""
    z = precondition(b)
    rz = dot(b, z)  # the other scalars derive from it, so that they vary over a mesh if it does
    return CGState(
        x=jnp.zeros_like(b),
        r=b,
        p=z,
        rz=rz,
        step=jnp.zeros_like(rz, jnp.int32),
        status=jnp.full_like(rz, Status.RUNNING, jnp.int32),
        on_boundary=jnp.zeros_like(rz, bool),
        min_curvature=jnp.full_like(rz, jnp.inf),
        direction=jnp.zeros_like(b),
    )


def _cg_step(
    state: CGState,
    matvec: Callable[[Vector], Vector],
    precondition: Callable[[Vector], Vector],
    radius: Scalar | float,
    tolerance: Scalar,
) -> CGState:
    """One iteration of N&W algorithm 7.2, with equation numbers of algorithm 5.3."""
    x, r, p = state.x, state.r, state.p
    ap = matvec(p)
    pap, pp = dot(p, ap), dot(p, p)
    finite = jnp.isfinite(pap)
    negative = finite & (pap <= jnp.finfo(p.dtype).eps * jnp.sqrt(pp) * norm(ap))
    alpha = state.rz / jnp.where(negative | ~finite, 1, pap)  # N&W (5.39a)
    outside = jnp.isfinite(radius) & (norm(x + alpha * p) >= radius)
    crosses = finite & (negative | outside)
    alpha = jnp.where(crosses, _to_boundary(x, p, radius), alpha)
    alpha = jnp.where(finite, alpha, 0)

    x, r = x + alpha * p, r - alpha * jnp.where(finite, ap, 0)  # N&W (5.39b, c)
    z = precondition(r)
    rz = dot(r, z)
    converged = ~crosses & (jnp.linalg.norm(r) <= tolerance)
    status = where_status(converged | crosses, Status.CONVERGED, state.status)
    status = where_status(negative, Status.NEGATIVE_CURVATURE, status)
    curvature = pap / pp
    lower = finite & (curvature < state.min_curvature)
    return CGState(
        x=x,
        r=r,
        p=z + rz / state.rz * p,
        rz=rz,
        step=state.step + 1,
        status=where_status(finite & jnp.isfinite(rz), status, Status.NONFINITE),
        on_boundary=crosses,
        min_curvature=jnp.where(lower, curvature, state.min_curvature),
        direction=jnp.where(lower, p, state.direction),
    )


def _to_boundary(x: Vector, p: Vector, radius: Scalar | float) -> Scalar:
    """The ``t >= 0`` with ``norm(x + t p) = radius``, without cancellation or overflow; 0 if the radius is infinite."""
    unit = x / radius
    xp, pp, gap = dot(unit, p), dot(p, p), 1 - dot(unit, unit)
    denominator = xp + jnp.sqrt(xp**2 + pp * gap)
    bounded = jnp.isfinite(radius) & (denominator > 0) & (gap > 0)
    return jnp.where(bounded, radius * (gap / jnp.where(bounded, denominator, 1)), 0)


def restarted_cg(
    product: VectorMap, b: Vector, rtol: Any, limit: Int[Array, ""], precondition: VectorMap
) -> tuple[Vector, SolveInfo]:
    """CG, restarted for the recomputed residual while that halves; ``b`` has entries of order 1."""

    def correct(r: Vector, tolerance: Scalar, left: Int[Array, ""], _: Any) -> tuple[Correction, Any]:
        state = truncated_cg(product, r, tolerance=tolerance, max_steps=left, precondition=precondition)
        claimed = (state.status == Status.CONVERGED) | (state.status == Status.MAX_STEPS)
        status = where_status(claimed, Status.RUNNING, state.status)  # the recomputed residual decides
        return Correction(state.x, state.step, status, state.min_curvature, state.direction), ()

    return refine(product, b, correct, rtol, limit)


_solve = partial(solve_by_iteration, restarted_cg)
