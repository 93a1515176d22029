"""Conjugate gradients that report negative curvature, in free space and inside a trust region."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from curvature._numerics import dot, norm
from curvature._types import Scalar, SolveInfo, Status, Tree, Vector, VectorMap
from curvature.linalg._host_loop import call_solver
from curvature.linalg._linear_system import (
    Operator,
    check_system,
    implicit_solution,
    linear_system,
    unit_preconditioner,
    where_status,
)
from curvature.operators._base import LinearOperator


def cg(
    op: LinearOperator | Callable[[Tree], Tree],
    b: Tree,
    *,
    rtol: ArrayLike = 1e-5,
    max_steps: ArrayLike | None = None,
    preconditioner: LinearOperator | Callable[[Tree], Tree] | None = None,
) -> tuple[Tree, SolveInfo]:
    """Solve ``A x = b`` for a symmetric positive definite ``A`` by conjugate gradients, or say why it cannot be.

    Two things differ from the usual routine. Success is claimed only when ``norm(b - A x) <= rtol * norm(b)`` holds for
    the residual computed afresh from ``x``; when rounding has parted it from the recurrence, the method restarts from
    ``x``. And a direction ``p`` with ``p' A p <= eps * norm(p) * norm(A p)`` ends the solve and is returned: ``A`` is
    not positive definite.

    The solution, not the iteration, is differentiated: by ``b`` and by all that the operator holds, ``dx`` solves
    ``A dx = db - dA x`` with the same settings, in forward and in reverse mode. ``info`` has no derivative, and says
    nothing of the solves that derivatives take.

    Args:
        op: a symmetric operator, linearized once, or the product ``v -> A v`` on trees like ``b``.
        b: the right-hand side, any tree of floating arrays.
        rtol: the residual's tolerance, relative to ``norm(b)``.
        max_steps: the most products; ``None`` is 10 for each entry of ``b``.
        preconditioner: a symmetric positive definite approximation of the inverse of ``A``, such as
            ``nystrom_preconditioner`` makes, or the product with one.

    Returns:
        ``(x, info)``: ``x`` shaped like ``b``, the last iterate; ``info`` a ``SolveInfo``. The status is ``CONVERGED``,
        ``MAX_STEPS``, ``NEGATIVE_CURVATURE``, ``STALLED`` (restarts gain nothing more in this precision) or
        ``NONFINITE``.

    Raises:
        TypeError: when ``op`` is no operator and not callable, or a leaf of ``b`` is not of a real floating dtype, or
            ``op`` changes it.
        ValueError: when ``op(b)`` has not the structure or shapes of ``b``, or a number is out of range.

    Cost: one product each step, one more for each restart; memory for six vectors like ``b``. Outside ``jit`` the solve
        is compiled once for each structure of ``op`` and ``b`` and the functions in them, which must be pure. With
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
    b, rtol, limit = check_system("cg", b, rtol, max_steps)
    return call_solver("cg", _cg, op, b, rtol, limit, preconditioner)


def _cg(op: Operator, b: Tree, rtol: ArrayLike, limit: Int[Array, ""], preconditioner: Operator | None) -> Any:
    system = linear_system("cg", op, b, limit, preconditioner)

    def method(product: VectorMap, unit: Vector) -> tuple[Vector, SolveInfo]:
        return restarted_cg(product, unit, rtol, system.limit, unit_preconditioner(system.precondition, unit))

    return implicit_solution(system, method)


class CGState(NamedTuple):
    """Where the iteration stands; ``r`` is the residual by the recurrence and ``rz`` is ``r' M r``."""

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

    The entries of ``b`` are of order 1, so that no square overflows.

    Stops at ``norm(r) <= tolerance``, at the boundary, or on negative curvature, which it follows to the boundary
    when there is one. The region is measured in the Euclidean norm, so a preconditioner needs an infinite radius.
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
    """The iteration at ``x = 0``."""
    z = precondition(b)
    rz = dot(b, z)  # the other scalars are made like it, so that they vary over a mesh where it does
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
    x, r, p = state.x, state.r, state.p
    ap = matvec(p)
    pap, pp = dot(p, ap), dot(p, p)
    finite = jnp.isfinite(pap)
    negative = finite & (pap <= jnp.finfo(p.dtype).eps * jnp.sqrt(pp) * norm(ap))
    alpha = state.rz / jnp.where(negative | ~finite, 1, pap)
    outside = jnp.isfinite(radius) & (norm(x + alpha * p) >= radius)
    crosses = finite & (negative | outside)
    alpha = jnp.where(crosses, _to_boundary(x, p, radius), alpha)
    alpha = jnp.where(finite, alpha, 0)

    x, r = x + alpha * p, r - alpha * jnp.where(finite, ap, 0)
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
    """The ``t >= 0`` with ``norm(x + t p) = radius``, free of cancellation and overflow; 0 with no boundary."""
    unit = x / radius
    xp, pp, gap = dot(unit, p), dot(p, p), 1 - dot(unit, unit)
    denominator = xp + jnp.sqrt(xp**2 + pp * gap)
    bounded = jnp.isfinite(radius) & (denominator > 0) & (gap > 0)
    return jnp.where(bounded, radius * (gap / jnp.where(bounded, denominator, 1)), 0)


class _Restart(NamedTuple):
    state: CGState
    residual_norm: Scalar


def restarted_cg(
    matvec: Callable[[Vector], Vector],
    b: Vector,
    rtol: Any,
    max_steps: Int[Array, ""],
    precondition: Callable[[Vector], Vector],
) -> tuple[Vector, SolveInfo]:
    """Run CG, compute the residual afresh, and go on from there while that gains at least half of it."""
    norm_b = jnp.linalg.norm(b)
    tolerance = jnp.asarray(rtol, b.dtype) * norm_b

    def running(carry: _Restart) -> Bool[Array, ""]:
        return carry.state.status == Status.RUNNING

    def restart(carry: _Restart) -> _Restart:
        state = truncated_cg(
            matvec, b, tolerance=tolerance, max_steps=max_steps, precondition=precondition, start=carry.state
        )
        r = b - matvec(state.x)
        residual_norm = jnp.linalg.norm(r)
        z = precondition(r)
        claimed = (state.status == Status.CONVERGED) | (state.status == Status.MAX_STEPS)
        status = where_status(claimed & (residual_norm <= tolerance), Status.CONVERGED, state.status)
        status = where_status((status == Status.CONVERGED) & ~(residual_norm <= tolerance), Status.RUNNING, status)
        stuck = (status == Status.RUNNING) & ~(residual_norm <= carry.residual_norm / 2)
        status = where_status(stuck, Status.STALLED, status)
        return _Restart(state._replace(r=r, p=z, rz=dot(r, z), status=status), residual_norm)

    finite = jnp.isfinite(norm_b)
    state = start_cg(b, precondition)
    state = state._replace(status=where_status(finite, state.status, Status.NONFINITE))
    state, residual_norm = jax.lax.while_loop(running, restart, _Restart(state, norm_b))
    return state.x, SolveInfo(state.status, state.step, residual_norm, state.min_curvature, state.direction)
