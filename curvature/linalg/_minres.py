"""The minimum residual method, for symmetric operators that may be indefinite or singular."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from curvature._numerics import dot, exponent_of
from curvature._types import Scalar, SolveInfo, Status, Tree, Vector, VectorMap
from curvature.linalg._host_loop import call_solver
from curvature.linalg._linear_system import (
    Correction,
    Operator,
    check_system,
    implicit_solution,
    linear_system,
    refine,
    unit_preconditioner,
    where_status,
)
from curvature.operators._base import LinearOperator

_LEAST_SQUARES = 10  # roundings: our own level at which A r counts as zero
_LOST = 100  # roundings of A s: our own level at which the change of r by a step s counts as noise


def minres(
    op: LinearOperator | Callable[[Tree], Tree],
    b: Tree,
    *,
    rtol: ArrayLike = 1e-5,
    max_steps: ArrayLike | None = None,
    preconditioner: LinearOperator | Callable[[Tree], Tree] | None = None,
) -> tuple[Tree, SolveInfo]:
    """Solve ``A x = b`` for a symmetric ``A`` of any signs, singular ones included: ``x = argmin norm(b - A x)``.

    Success is claimed only when ``norm(b - A x) <= rtol * norm(b)`` holds for the residual computed afresh from ``x``;
    the method restarts from ``x`` while that halves the residual. Where no ``x`` solves the system because ``A`` is
    singular and ``b`` is not in its range, the status is ``STALLED`` and ``x`` a least-squares solution: no other has a
    smaller residual, though others may be shorter (``solve`` with ``method="eigh"`` finds the shortest).

    The solution is differentiated as by ``cg``: ``A dx = db - dA x`` is solved by the same method.

    Args:
        op: a symmetric operator, linearized once, or the product ``v -> A v`` on trees like ``b``.
        b: the right-hand side, any tree of floating arrays.
        rtol: the residual's tolerance, relative to ``norm(b)``.
        max_steps: the most steps; ``None`` is 10 for each entry of ``b``.
        preconditioner: a symmetric positive definite approximation of the inverse of ``A`` (of ``abs(A)`` where it is
            indefinite), or the product with one. It changes the norm in which the residual of a system without a
            solution is smallest; leave it out there.

    Returns:
        ``(x, info)``: ``x`` shaped like ``b``, the best point found; ``info`` a ``SolveInfo``, in which the curvature
        is seen along the Lanczos vectors. The status is ``CONVERGED``, ``MAX_STEPS``, ``STALLED`` (no smaller residual
        exists or can be reached in this precision) or ``NONFINITE``, also for a preconditioner that is not positive
        definite.

    Raises:
        TypeError: when ``op`` is no operator and not callable, a leaf of ``b`` is not of a real floating dtype, or
            ``op`` changes it.
        ValueError: when ``op(b)`` has not the structure or shapes of ``b``, or a number is out of range.

    Cost: one product each step, one more for each restart and one to measure the scale of ``A``; memory for ten vectors
        like ``b``. As for ``cg``, it is compiled once, and with ``batches=`` each product is one pass over them.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> x, info = curvature.minres(lambda v: jnp.array([2.0, -4.0, 0.0]) * v, jnp.array([2.0, 2.0, 0.0]))
        >>> jnp.round(x, 4), curvature.Status(int(info.status)).name
        (Array([ 1. , -0.5,  0. ], dtype=float32), 'CONVERGED')

    References: Paige and Saunders (1975), doi:10.1137/0712047; Choi, Paige and Saunders (2011), arXiv:1003.4042,
        section 2.2 and theorem 3.1.
    """
    b, rtol, limit = check_system("minres", b, rtol, max_steps)
    return call_solver("minres", _minres, op, b, rtol, limit, preconditioner)


def _minres(op: Operator, b: Tree, rtol: ArrayLike, limit: Int[Array, ""], preconditioner: Operator | None) -> Any:
    system = linear_system("minres", op, b, limit, preconditioner)

    def method(product: VectorMap, unit: Vector) -> tuple[Vector, SolveInfo]:
        precondition = unit_preconditioner(system.precondition, unit)
        return restarted_minres(product, unit, rtol, system.limit, precondition)

    return implicit_solution(system, method)


def restarted_minres(
    product: VectorMap, b: Vector, rtol: Any, limit: Int[Array, ""], precondition: VectorMap
) -> tuple[Vector, SolveInfo]:
    """MINRES, and MINRES again for its residual; ``b`` has entries of order 1, and ``A`` is scaled to have them too."""
    exponent = exponent_of(product(b))

    def scaled(v: Vector) -> Vector:
        return jnp.ldexp(product(v), -exponent)

    def correct(r: Vector, tolerance: Scalar, left: Int[Array, ""], size: Scalar) -> tuple[Correction, Scalar]:
        state = _run(scaled, r, tolerance, left, precondition, size)
        min_curvature = jnp.ldexp(state.min_curvature, exponent)
        step = jnp.ldexp(state.x, -exponent)
        status = where_status(state.status == Status.STALLED, Status.RUNNING, state.status)  # the residual decides
        return Correction(step, state.step, status, min_curvature, state.direction), state.size

    return refine(product, b, correct, rtol, limit, jnp.zeros_like(b[0]))


class _State(NamedTuple):
    """Where the iteration stands, in the letters of Paige and Saunders.

    ``q_old`` is a Lanczos vector, ``q`` the next one times its norm ``beta``, and ``z`` that one preconditioned.
    """

    x: Vector
    r: Vector  # the residual, by a recurrence
    q_old: Vector
    q: Vector
    z: Vector
    w_old: Vector
    w: Vector
    beta: Scalar
    delta_bar: Scalar  # of the next column of R, before the last rotation
    epsilon: Scalar
    phi_bar: Scalar
    cos: Scalar
    sin: Scalar
    size: Scalar  # a lower bound of the norm of the preconditioned A
    norm: Scalar  # and of A
    step: Int[Array, ""]
    status: Int[Array, ""]
    min_curvature: Scalar
    direction: Vector


def _run(
    product: VectorMap, b: Vector, tolerance: Scalar, limit: Int[Array, ""], precondition: VectorMap, size: Scalar
) -> _State:
    """From ``x = 0`` to a residual of ``tolerance`` or to a least-squares point."""

    def running(state: _State) -> Bool[Array, ""]:
        residual_norm = jnp.linalg.norm(state.r)
        noise = jnp.finfo(b.dtype).eps * state.norm * jnp.linalg.norm(state.x)  # the rounding of A x
        useful = (residual_norm > tolerance) & (residual_norm > noise) & (state.beta > 0)
        return (state.status == Status.RUNNING) & (state.step < limit) & useful

    def step(state: _State) -> _State:
        return _minres_step(state, product, precondition)

    return jax.lax.while_loop(running, step, _start(b, precondition, size))


def _start(b: Vector, precondition: VectorMap, size: Scalar) -> _State:
    z = precondition(b)
    beta = jnp.sqrt(dot(b, z))
    nil, none = jnp.zeros_like(beta), jnp.zeros_like(b)  # made like b, they vary over a mesh where it does
    return _State(
        x=none,
        r=b,
        q_old=none,
        q=b,
        z=z,
        w_old=none,
        w=none,
        beta=beta,
        delta_bar=nil,
        epsilon=nil,
        phi_bar=beta,
        cos=nil - 1,
        sin=nil,
        size=size,
        norm=nil,
        step=jnp.zeros_like(beta, jnp.int32),
        status=where_status(jnp.isnan(beta), Status.NONFINITE, jnp.full_like(beta, Status.RUNNING, jnp.int32)),
        min_curvature=nil + jnp.inf,
        direction=none,
    )


def _minres_step(state: _State, product: VectorMap, precondition: VectorMap) -> _State:
    v, q = state.z / state.beta, state.q / state.beta
    av = product(v)
    alpha = dot(v, av)
    q_next = av - alpha * q - state.beta * state.q_old  # Lanczos
    z = precondition(q_next)
    beta = jnp.sqrt(dot(q_next, z))
    finite = jnp.isfinite(alpha) & jnp.isfinite(beta)
    first = state.step == 0
    entries = jnp.stack([alpha, beta, jnp.where(first, 0, state.beta)])
    size = jnp.maximum(state.size, jnp.linalg.norm(entries))
    eps = jnp.finfo(v.dtype).eps

    delta = state.cos * state.delta_bar + state.sin * alpha  # the last rotation on the new column of T
    gamma_bar = state.sin * state.delta_bar - state.cos * alpha
    epsilon, delta_bar = state.sin * beta, -state.cos * beta
    slope = jnp.hypot(gamma_bar, delta_bar)  # norm(A r) / norm(r) before this step
    gamma = jnp.hypot(gamma_bar, beta)
    gamma = jnp.where(gamma > 0, gamma, 1)  # 0 has no slope
    cos, sin = gamma_bar / gamma, beta / gamma
    w = (v - state.epsilon * state.w_old - delta * state.w) / gamma
    move = cos * state.phi_bar * w
    phi_bar = sin * state.phi_bar
    r = sin**2 * state.r - phi_bar * cos * q_next / jnp.where(beta > 0, beta, 1)  # Choi, Paige, Saunders (2.11)

    norm_a = jnp.maximum(state.norm, jnp.linalg.norm(av) / jnp.linalg.norm(v))
    lost = jnp.linalg.norm(r - state.r) < _LOST * eps * norm_a * jnp.linalg.norm(move)
    stop = lost | (slope <= _LEAST_SQUARES * eps * size)
    status = where_status(stop, Status.STALLED, state.status)
    moves = finite & ~stop
    curvature = alpha / dot(v, v)
    lower = finite & (curvature < state.min_curvature)
    return _State(
        x=jnp.where(moves, state.x + move, state.x),
        r=jnp.where(moves, r, state.r),
        q_old=q,
        q=q_next,
        z=z,
        w_old=state.w,
        w=w,
        beta=beta,
        delta_bar=delta_bar,
        epsilon=epsilon,
        phi_bar=phi_bar,
        cos=cos,
        sin=sin,
        size=jnp.where(finite, size, state.size),
        norm=jnp.where(finite, norm_a, state.norm),
        step=state.step + 1,
        status=where_status(finite, status, Status.NONFINITE),
        min_curvature=jnp.where(lower, curvature, state.min_curvature),
        direction=jnp.where(lower, v, state.direction),
    )
