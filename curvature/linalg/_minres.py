"""MINRES: the minimum residual method for symmetric operators that may be indefinite or singular."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from curvature._errors import public
from curvature._numerics import dot, exponent_of
from curvature._types import Scalar, SolveInfo, Status, Tree, Vector, VectorMap
from curvature.linalg._host_loop import call_solver
from curvature.linalg._linear_system import Correction, check_system, refine, solve_by_iteration, where_status
from curvature.operators._base import LinearOperator

_LEAST_SQUARES = 10  # Heuristic: A r counts as zero below this number of rounding units
_LOST = 100  # Heuristic: the change of r by a step s counts as noise below this number of roundings of A s


@public
def minres(
    op: LinearOperator | Callable[[Tree], Tree],
    b: Tree,
    *,
    rtol: ArrayLike = 1e-5,
    max_steps: ArrayLike | None = None,
    preconditioner: LinearOperator | Callable[[Tree], Tree] | None = None,
) -> tuple[Tree, SolveInfo]:
    """Solve ``A x = b`` for a symmetric ``A``, indefinite or singular: ``x = argmin norm(b - A x)``.

    ``CONVERGED`` is reported only if ``norm(b - A x) <= rtol * norm(b)`` holds for the residual recomputed from ``x``;
    the method restarts from ``x`` while that halves the residual. If ``A`` is singular and ``b`` is not in its range,
    no ``x`` solves the system: the status is ``STALLED`` and ``x`` is a least-squares solution. No other ``x`` has a
    smaller residual, but others may be shorter (``solve`` with ``method="eigh"`` finds the shortest).

    Derivatives are implicit as for ``cg``: the same method solves ``A dx = db - dA x``.

    Args:
        op: a symmetric operator, linearized once, or the product ``v -> A v`` on trees like ``b``.
        b: the right-hand side, any tree of floating arrays.
        rtol: the tolerance of the residual, relative to ``norm(b)``.
        max_steps: the largest number of steps; ``None`` is 10 for each entry of ``b``.
        preconditioner: a symmetric positive definite approximation of the inverse of ``A`` (of ``abs(A)`` if ``A`` is
            indefinite), or the product with one. It changes the norm that is minimized, so do not pass one for a
            system without a solution.

    Returns:
        ``(x, info)``: ``x`` shaped like ``b``, the best point found; ``info`` a ``SolveInfo``, whose curvature is
        measured along the Lanczos vectors. The status is ``CONVERGED``, ``MAX_STEPS``, ``STALLED`` (no smaller residual
        exists or can be reached in this precision) or ``NONFINITE``, also for a preconditioner that is not positive
        definite.

    Raises:
        TypeError: if ``op`` is neither an operator nor callable, a leaf of ``b`` is not of a real floating dtype, or
            ``op`` changes the dtype.
        ValueError: if ``op(b)`` does not have the structure and shapes of ``b``, or a number is out of range.

    Cost: one product per step, one per restart and one to measure the scale of ``A``; memory for ten vectors like
        ``b``. As ``cg``, it is compiled once, and with ``batches=`` each product is one pass over the batches.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> x, info = curvature.minres(lambda v: jnp.array([2.0, -4.0, 0.0]) * v, jnp.array([2.0, 2.0, 0.0]))
        >>> jnp.round(x, 4), curvature.Status(int(info.status)).name
        (Array([ 1. , -0.5,  0. ], dtype=float32), 'CONVERGED')

    References: Paige and Saunders (1975), doi:10.1137/0712047; Choi, Paige and Saunders (2011), arXiv:1003.4042,
        section 2.2 and theorem 3.1.
    """
    b, rtol, limit = check_system(b, rtol, max_steps)
    return call_solver(_solve, op, b, rtol, limit, preconditioner)


def restarted_minres(
    product: VectorMap, b: Vector, rtol: Any, limit: Int[Array, ""], precondition: VectorMap
) -> tuple[Vector, SolveInfo]:
    """MINRES, restarted for the recomputed residual; ``b`` has entries of order 1, and ``A`` is scaled accordingly."""
    exponent = exponent_of(product(b))

    def scaled(v: Vector) -> Vector:
        return jnp.ldexp(product(v), -exponent)

    def correct(r: Vector, tolerance: Scalar, left: Int[Array, ""], size: Scalar) -> tuple[Correction, Scalar]:
        state = _run(scaled, r, tolerance, left, precondition, size)
        min_curvature = jnp.ldexp(state.min_curvature, exponent)
        step = jnp.ldexp(state.x, -exponent)
        # The recomputed residual decides whether the method has stalled.
        status = where_status(state.status == Status.STALLED, Status.RUNNING, state.status)
        return Correction(step, state.step, status, min_curvature, state.direction), state.size

    return refine(product, b, correct, rtol, limit, jnp.zeros_like(b[0]))


class _State(NamedTuple):
    """The state of the iteration, in the notation of Paige and Saunders.

    ``q_old`` is the last Lanczos vector, ``q`` the next Lanczos vector times its norm ``beta``, and ``z`` the
    preconditioner applied to ``q``.
    """

    x: Vector
    r: Vector  # the residual, by a recurrence
    q_old: Vector
    q: Vector
    z: Vector
    w_old: Vector
    w: Vector
    beta: Scalar
    delta_bar: Scalar  # an entry of the next column of R, before the last rotation
    epsilon: Scalar
    phi_bar: Scalar
    cos: Scalar
    sin: Scalar
    size: Scalar  # a lower bound of the norm of the preconditioned A
    norm: Scalar  # a lower bound of the norm of A
    step: Int[Array, ""]
    status: Int[Array, ""]
    min_curvature: Scalar
    direction: Vector


def _run(
    product: VectorMap, b: Vector, tolerance: Scalar, limit: Int[Array, ""], precondition: VectorMap, size: Scalar
) -> _State:
    """MINRES from ``x = 0`` to a residual of at most ``tolerance`` or to a least-squares solution."""

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
    zero, zeros = jnp.zeros_like(beta), jnp.zeros_like(b)  # derived from b, they vary over a mesh if b does
    return _State(
        x=zeros,
        r=b,
        q_old=zeros,
        q=b,
        z=z,
        w_old=zeros,
        w=zeros,
        beta=beta,
        delta_bar=zero,
        epsilon=zero,
        phi_bar=beta,
        cos=zero - 1,
        sin=zero,
        size=size,
        norm=zero,
        step=jnp.zeros_like(beta, jnp.int32),
        status=where_status(jnp.isnan(beta), Status.NONFINITE, jnp.full_like(beta, Status.RUNNING, jnp.int32)),
        min_curvature=zero + jnp.inf,
        direction=zeros,
    )


def _minres_step(state: _State, product: VectorMap, precondition: VectorMap) -> _State:
    # 1. A step of Lanczos: the next column alpha, beta of the tridiagonal T.
    v, q = state.z / state.beta, state.q / state.beta
    av = product(v)
    alpha = dot(v, av)
    q_next = av - alpha * q - state.beta * state.q_old
    z = precondition(q_next)
    beta = jnp.sqrt(dot(q_next, z))
    finite = jnp.isfinite(alpha) & jnp.isfinite(beta)
    first = state.step == 0
    entries = jnp.stack([alpha, beta, jnp.where(first, 0, state.beta)])
    size = jnp.maximum(state.size, jnp.linalg.norm(entries))
    eps = jnp.finfo(v.dtype).eps

    # 2. QR: the last rotation on the new column of T, then a new rotation.
    delta = state.cos * state.delta_bar + state.sin * alpha
    gamma_bar = state.sin * state.delta_bar - state.cos * alpha
    epsilon, delta_bar = state.sin * beta, -state.cos * beta
    slope = jnp.hypot(gamma_bar, delta_bar)  # norm(A r) / norm(r) before this step
    gamma = jnp.hypot(gamma_bar, beta)
    gamma = jnp.where(gamma > 0, gamma, 1)  # gamma = 0 implies slope = 0, which stops the iteration
    cos, sin = gamma_bar / gamma, beta / gamma
    # 3. The new direction, step and residual.
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


_solve = partial(solve_by_iteration, restarted_minres)
