"""Shared by the linear solvers: flattening to vectors, implicit derivatives, and iterative refinement."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Int

from curvature import _checks
from curvature._numerics import exponent_of, norm
from curvature._trees import ravel
from curvature._types import Scalar, SolveInfo, Status, Tree, Vector, VectorMap
from curvature.linalg._host_loop import has_placeholder
from curvature.operators._base import DampingOperator, LinearOperator
from curvature.operators._pytrees import zeros

Operator = LinearOperator | Callable[[Tree], Tree]
Method = Callable[[VectorMap, Vector, Int[Array, ""]], tuple[Vector, SolveInfo]]
"""``method(product, b, limit of steps) -> (x, info)`` for a right-hand side with entries of order 1."""


class System(NamedTuple):
    """``A x = b`` on vectors; inside ``shard_map``, ``b`` varies over the devices if ``A b`` does."""

    product: VectorMap
    b: Vector
    precondition: VectorMap
    unravel: Callable[[Array], Tree]
    limit: Int[Array, ""]
    streamed: bool  # whether a product is a pass over batches on the host, which has no derivative


def check_system(b: Tree, rtol: ArrayLike, max_steps: ArrayLike | None) -> tuple[Tree, ArrayLike, Int[Array, ""]]:
    """Check the right-hand side, the tolerance and the limit of steps, and return them as operands.

    A float tolerance stays a float: inside ``shard_map``, ``custom_linear_solve`` refuses to combine an array that does
    not vary over the devices with arrays that do.
    """
    b = _checks.check_point("b", b)
    _checks.check_entries("b", b)
    _checks.check_nonnegative("rtol", rtol)
    if max_steps is not None:
        _checks.check_count("max_steps", max_steps)
    size = sum(leaf.size for leaf in jax.tree.leaves(b))
    rtol = float(rtol) if isinstance(rtol, int) else rtol
    return b, rtol, jnp.asarray(10 * size if max_steps is None else max_steps, jnp.int32)


def linear_system(op: Operator, b: Tree, limit: Int[Array, ""], preconditioner: Operator | None) -> System:
    """The system on vectors, with the operator linearized once."""
    product, b = checked_product("op", op, b)
    inverse = None
    if preconditioner is not None:
        inverse, b = checked_product("preconditioner", preconditioner, b)
    flat, unravel = ravel(b)
    precondition = (lambda r: r) if inverse is None else _on_vectors(inverse, unravel)
    streamed = has_placeholder((op, preconditioner))
    return System(_on_vectors(product, unravel), flat, precondition, unravel, limit, streamed)


def checked_product(name: str, op: Operator, b: Tree) -> tuple[Callable[[Tree], Tree], Tree]:
    """The product, linearized, and ``b``, which varies over the devices of a mesh if its product does."""
    if not isinstance(op, LinearOperator):
        _checks.check_callable(name, op)
    elif not isinstance(op, DampingOperator):
        _checks.check_direction("b", b, f"the argument of {name}", op.in_structure())
    product = op.linearize() if isinstance(op, LinearOperator) else op
    like_product = jax.tree.map(jnp.zeros_like, jax.eval_shape(product, b))
    _checks.check_direction(f"{name}(b)", like_product, "b", b)
    return product, jax.tree.map(jnp.add, b, like_product)


def product_on_vectors(op: LinearOperator) -> tuple[VectorMap, Callable[[Vector], Tree], Vector]:
    """The linearized product of a square operator on vectors, the map back to trees, and zeros that vary as ``A 0``."""
    product, example = checked_product("op", op, zeros(op.in_structure()))
    flat, unravel = ravel(example)
    return _on_vectors(product, unravel), unravel, flat


def _on_vectors(fun: Callable[[Tree], Tree], unravel: Callable[[Array], Tree]) -> VectorMap:
    return lambda vector: ravel(fun(unravel(vector)))[0]


def by_iteration(restarted: Callable[..., tuple[Vector, SolveInfo]], system: System, rtol: Any) -> Method:
    """The method that runs ``restarted(product, b, rtol, limit, precondition)``: restarted CG or MINRES."""

    def method(product: VectorMap, unit: Vector, limit: Int[Array, ""]) -> tuple[Vector, SolveInfo]:
        # Scaled by a power of two, so that its product with the right-hand side has entries of order 1.
        exponent = exponent_of(system.precondition(unit))
        return restarted(product, unit, rtol, limit, lambda r: jnp.ldexp(system.precondition(r), -exponent))

    return method


def solve_by_iteration(
    restarted: Callable[..., tuple[Vector, SolveInfo]],
    op: Operator,
    b: Tree,
    rtol: ArrayLike,
    limit: Int[Array, ""],
    preconditioner: Operator | None,
) -> tuple[Tree, SolveInfo]:
    """The solution by ``restarted``, with its implicit derivative."""
    system = linear_system(op, b, limit, preconditioner)
    return implicit_solution(system, by_iteration(restarted, system, rtol))


def implicit_solution(system: System, method: Method) -> tuple[Tree, SolveInfo]:
    """The solution by a method, differentiable with respect to ``b`` and everything that the product depends on.

    The derivatives solve ``A dx = db - dA x`` and its transpose by the same method; the method is not differentiated.
    """

    def solve(product: VectorMap, b: Vector) -> tuple[Vector, SolveInfo]:
        exponent = exponent_of(b)
        unit = jnp.ldexp(b, -exponent)  # entries at most 1: no square overflows or underflows in single precision
        x, info = method(product, unit, system.limit)
        solution = jnp.ldexp(x, exponent)
        status = _after_scaling(x, solution, info.status)
        return solution, info._replace(status=status, residual_norm=jnp.ldexp(info.residual_norm, exponent))

    if system.streamed:
        x, info = solve(system.product, system.b)
    else:
        x, info = jax.lax.custom_linear_solve(system.product, system.b, solve, symmetric=True, has_aux=True)
    return system.unravel(x), info._replace(direction=system.unravel(info.direction))


def _after_scaling(x: Vector, solution: Vector, status: Int[Array, ""]) -> Int[Array, ""]:
    """The status after scaling back: a solution that underflows or overflows has not converged."""
    limits = jnp.finfo(x.dtype)
    underflows = (jnp.max(jnp.abs(solution)) < limits.tiny / limits.eps) & jnp.any(x != 0)
    converged = status == Status.CONVERGED
    status = where_status(converged & underflows, Status.STALLED, status)
    return where_status(converged & ~jnp.all(jnp.isfinite(solution)), Status.NONFINITE, status)


class Correction(NamedTuple):
    """The result of one run of a method in ``refine``: a step to add to ``x``, and the curvature seen."""

    step: Vector
    num_steps: Int[Array, ""]
    status: Int[Array, ""]  # RUNNING leaves the decision to the recomputed residual
    min_curvature: Scalar
    direction: Vector


class _Refinement(NamedTuple):
    x: Vector
    r: Vector
    info: SolveInfo
    carry: Any  # passed from one correction to the next


def refine(
    product: VectorMap,
    b: Vector,
    correct: Callable[[Vector, Scalar, Int[Array, ""], Any], tuple[Correction, Any]],
    rtol: Any,
    limit: Int[Array, ""],
    carry: Any = (),
) -> tuple[Vector, SolveInfo]:
    """Iterative refinement from ``x = 0``: add corrections while each at least halves the recomputed residual.

    ``correct(r, tolerance, steps_left, carry)`` solves ``A step = r`` approximately. The best ``x`` is returned; with
    ``limit == 0`` that is 0.
    """
    tolerance = jnp.asarray(rtol, b.dtype) * norm(b)

    def running(state: _Refinement) -> Bool[Array, ""]:
        return state.info.status == Status.RUNNING

    def step(state: _Refinement) -> _Refinement:
        info = state.info
        # 1. Solve for a correction.
        correction, carry = correct(state.r, tolerance, limit - info.num_steps, state.carry)
        # 2. Recompute the residual.
        x = state.x + correction.step
        r = b - product(x)
        residual_norm = norm(r)
        finite = jnp.isfinite(residual_norm)
        better = residual_norm < info.residual_norm
        # 3. Continue only if the residual halved; the status of the correction overrides, success overrides all.
        num_steps = info.num_steps + correction.num_steps
        halved = residual_norm <= info.residual_norm / 2
        status = where_status(halved, Status.RUNNING, Status.STALLED)
        status = where_status(num_steps >= limit, Status.MAX_STEPS, status)
        status = where_status(correction.status == Status.RUNNING, status, correction.status)
        status = where_status(finite, status, Status.NONFINITE)
        lower = correction.min_curvature < info.min_curvature
        kept = jnp.where(better, residual_norm, info.residual_norm)
        info = SolveInfo(
            status=where_status(kept <= tolerance, Status.CONVERGED, status),
            num_steps=num_steps,
            residual_norm=kept,
            min_curvature=jnp.where(lower, correction.min_curvature, info.min_curvature),
            direction=jnp.where(lower, correction.direction, info.direction),
        )
        return _Refinement(jnp.where(better, x, state.x), jnp.where(better, r, state.r), info, carry)

    start = _Refinement(jnp.zeros_like(b), b, _start(b, tolerance, limit), carry)
    state = jax.lax.while_loop(running, step, start)
    return state.x, state.info


def _start(b: Vector, tolerance: Scalar, limit: Int[Array, ""]) -> SolveInfo:
    """The info at ``x = 0``; all fields derive from ``b``, so that they vary over a mesh if ``b`` does."""
    residual_norm = norm(b)
    status = jnp.full_like(residual_norm, Status.RUNNING, jnp.int32)
    allowed = limit > limit - limit  # not 0: in a linear solve, shard_map refuses a literal beside varying arrays
    status = where_status(allowed, status, Status.MAX_STEPS)
    status = where_status(residual_norm <= tolerance, Status.CONVERGED, status)
    return SolveInfo(
        status=where_status(jnp.isfinite(residual_norm), status, Status.NONFINITE),
        num_steps=jnp.zeros_like(residual_norm, jnp.int32),
        residual_norm=residual_norm,
        min_curvature=jnp.full_like(residual_norm, jnp.inf),
        direction=jnp.zeros_like(b),
    )


def where_status(condition: Bool[Array, ""], status: Any, otherwise: Any) -> Int[Array, ""]:
    """``jnp.where`` of two statuses, as 32-bit integers."""
    return jnp.where(condition, jnp.asarray(status, jnp.int32), jnp.asarray(otherwise, jnp.int32))
