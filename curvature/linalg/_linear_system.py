"""What all solvers of ``A x = b`` share: the system as vectors, the derivative of its solution, the fresh residual."""

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
from curvature.operators._base import DampingOperator, LinearOperator
from curvature.operators._streamed import has_placeholder

Operator = LinearOperator | Callable[[Tree], Tree]
Method = Callable[[VectorMap, Vector], tuple[Vector, SolveInfo]]
"""From the product and a right-hand side with entries of order 1 to the solution."""


class System(NamedTuple):
    """``A x = b`` on vectors; ``b`` varies over a mesh where ``A`` does."""

    product: VectorMap
    b: Vector
    precondition: VectorMap
    unravel: Callable[[Array], Tree]
    limit: Int[Array, ""]
    streamed: bool  # whether products are passes over batches on the host, which have no derivative


def check_system(
    function: str, b: Tree, rtol: ArrayLike, max_steps: ArrayLike | None
) -> tuple[Tree, ArrayLike, Int[Array, ""]]:
    """The right-hand side, the tolerance and the most steps as operands, once their values are known to be legal.

    A float stays one: inside ``shard_map`` a linear solve refuses an array that does not vary beside what does.
    """
    b = _checks.check_point(function, "b", b)
    _checks.check_entries(function, "b", b)
    _checks.check_nonnegative(function, "rtol", rtol)
    if max_steps is not None:
        _checks.check_count(function, "max_steps", max_steps)
    size = sum(leaf.size for leaf in jax.tree.leaves(b))
    rtol = float(rtol) if isinstance(rtol, int) else rtol
    return b, rtol, jnp.asarray(10 * size if max_steps is None else max_steps, jnp.int32)


def linear_system(
    function: str, op: Operator, b: Tree, limit: Int[Array, ""], preconditioner: Operator | None
) -> System:
    """The system on vectors; the operator is linearized here, once."""
    product, b = checked_product(function, "op", op, b)
    on_vectors = lambda vector: vector  # noqa: E731
    if preconditioner is not None:
        inverse, b = checked_product(function, "preconditioner", preconditioner, b)
    flat, unravel = ravel(b)
    if preconditioner is not None:
        on_vectors = _on_vectors(inverse, unravel)
    return System(
        _on_vectors(product, unravel), flat, on_vectors, unravel, limit, has_placeholder((op, preconditioner))
    )


def product_of(op: Operator) -> Callable[[Tree], Tree]:
    """The product with an operator, whose parts that all products share are evaluated here, or the function itself."""
    return op.linearize() if isinstance(op, LinearOperator) else op


def checked_product(function: str, name: str, op: Operator, b: Tree) -> tuple[Callable[[Tree], Tree], Tree]:
    """The product, and ``b`` varying over a mesh wherever the product of it does."""
    if not isinstance(op, LinearOperator):
        _checks.check_callable(function, name, op)
    elif not isinstance(op, DampingOperator):
        _checks.check_direction(function, "b", b, f"the argument of {name}", op.in_structure())
    product = product_of(op)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(product, b))
    _checks.check_direction(function, f"{name}(b)", zeros, "b", b)
    return product, jax.tree.map(jnp.add, b, zeros)


def _on_vectors(fun: Callable[[Tree], Tree], unravel: Callable[[Array], Tree]) -> VectorMap:
    return lambda vector: ravel(fun(unravel(vector)))[0]


def implicit_solution(system: System, method: Method) -> tuple[Tree, SolveInfo]:
    """The method's solution, differentiable by ``b`` and by all that the product holds, whatever the method does.

    ``A dx = db - dA x`` and its transpose are solved by the same method.
    """

    def solve(product: VectorMap, b: Vector) -> tuple[Vector, SolveInfo]:
        exponent = exponent_of(b)
        unit = jnp.ldexp(b, -exponent)  # entries at most 1: no square leaves the range of single precision
        x, info = method(product, unit)
        solution = jnp.ldexp(x, exponent)
        status = _after_scaling(x, solution, info.status)
        return solution, info._replace(status=status, residual_norm=jnp.ldexp(info.residual_norm, exponent))

    if system.streamed:
        x, info = solve(system.product, system.b)
    else:
        x, info = jax.lax.custom_linear_solve(system.product, system.b, solve, symmetric=True, has_aux=True)
    return system.unravel(x), info._replace(direction=system.unravel(info.direction))


def _after_scaling(x: Vector, solution: Vector, status: Int[Array, ""]) -> Int[Array, ""]:
    """No success for a solution that leaves the range of its precision when it takes its true size."""
    limits = jnp.finfo(x.dtype)
    underflows = (jnp.max(jnp.abs(solution)) < limits.tiny / limits.eps) & jnp.any(x != 0)
    converged = status == Status.CONVERGED
    status = where_status(converged & underflows, Status.STALLED, status)
    return where_status(converged & ~jnp.all(jnp.isfinite(solution)), Status.NONFINITE, status)


def unit_preconditioner(precondition: VectorMap, unit: Vector) -> VectorMap:
    """The preconditioner times the power of two that makes its product with ``unit`` of order 1."""
    exponent = exponent_of(precondition(unit))
    return lambda r: jnp.ldexp(precondition(r), -exponent)


class Correction(NamedTuple):
    """What one run of a method adds to ``x``, and what it saw."""

    step: Vector
    num_steps: Int[Array, ""]
    status: Int[Array, ""]  # RUNNING: the residual decides
    min_curvature: Scalar
    direction: Vector


class _Refinement(NamedTuple):
    x: Vector
    r: Vector
    info: SolveInfo
    scale: Any


def refine(
    product: VectorMap,
    b: Vector,
    correct: Callable[[Vector, Scalar, Int[Array, ""], Any], tuple[Correction, Any]],
    rtol: Any,
    limit: Int[Array, ""],
    carry: Any = (),
) -> tuple[Vector, SolveInfo]:
    """Add corrections to ``x = 0`` while each at least halves the residual, computed afresh after each.

    ``correct(r, tolerance, steps_left, carry)`` solves ``A step = r`` as well as it can. No correction is asked for
    when ``limit`` is 0.
    """
    tolerance = jnp.asarray(rtol, b.dtype) * norm(b)

    def running(state: _Refinement) -> Bool[Array, ""]:
        return state.info.status == Status.RUNNING

    def step(state: _Refinement) -> _Refinement:
        info = state.info
        correction, carry = correct(state.r, tolerance, limit - info.num_steps, state.scale)
        x = state.x + correction.step
        r = b - product(x)
        residual_norm = norm(r)
        finite = jnp.isfinite(residual_norm)
        better = residual_norm < info.residual_norm
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
    """At ``x = 0``; all is made like ``b``, so that it varies over a mesh where ``b`` does."""
    residual_norm = norm(b)
    status = jnp.full_like(residual_norm, Status.RUNNING, jnp.int32)
    allowed = limit > limit - limit  # in a linear solve shard_map refuses a literal zero beside what varies
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
    """One status or the other, as 32-bit integers."""
    return jnp.where(condition, jnp.asarray(status, jnp.int32), jnp.asarray(otherwise, jnp.int32))
