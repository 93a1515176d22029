"""``solve``: symmetric linear systems by CG, MINRES, Cholesky, eigendecomposition or Woodbury's formula."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._errors import caller, public
from curvature._numerics import dot, matmul
from curvature._trees import ravel
from curvature._types import Matrix, SolveInfo, Status, Tree, Vector, VectorMap
from curvature.linalg._cg import restarted_cg
from curvature.linalg._host_loop import call_solver
from curvature.linalg._linear_system import (
    Correction,
    Method,
    Operator,
    System,
    by_iteration,
    check_system,
    implicit_solution,
    linear_system,
    refine,
    where_status,
)
from curvature.linalg._minres import restarted_minres
from curvature.linalg._subproblems import pseudo_inverse, scaling
from curvature.operators._base import DampingOperator, LinearOperator, SumOperator
from curvature.operators._pytrees import zeros
from curvature.transforms._chunks import vmap

SolveMethod = Literal["auto", "cg", "minres", "cholesky", "eigh", "woodbury"]
"""``"auto"`` is ``"cholesky"``, then ``"eigh"``, for small systems and ``"cg"``, then ``"minres"``, for large ones."""

_SMALL = 1000  # Heuristic: up to this number of entries, an iteration may take more products than forming the matrix


@public
def solve(
    op: LinearOperator | Callable[[Tree], Tree],
    b: Tree,
    *,
    method: SolveMethod = "auto",
    rtol: ArrayLike = 1e-5,
    max_steps: ArrayLike | None = None,
    preconditioner: LinearOperator | Callable[[Tree], Tree] | None = None,
) -> tuple[Tree, SolveInfo]:
    """Solve ``A x = b`` for a symmetric ``A``, by a factorization or an iteration.

    - ``"cg"`` and ``"minres"`` are ``curvature.cg`` and ``curvature.minres``.
    - ``"cholesky"`` forms the matrix. If the matrix is not positive definite, the status is ``NEGATIVE_CURVATURE``,
      ``x`` is 0 and ``info.direction`` the lowest eigenvector.
    - ``"eigh"`` forms the matrix and applies the pseudo-inverse, in which eigenvalues below ``n * eps`` of the largest
      count as zero.
    - ``"woodbury"`` is for ``A = J' M J + c I`` with fewer outputs than inputs:
      ``x = (b - J' (c I + M J J')^-1 M J b) / c``. The operator is the sum of damping and a term with a method
      ``factors()`` that returns ``(J, M)``; ``M`` may be None for the identity.
    - ``"auto"`` is Cholesky up to 1,000 entries and CG above. If they find negative curvature, it continues with the
      pseudo-inverse or with MINRES, also inside ``jit``.

    Factorizations are refined: corrections are added while the residual is above the tolerance and each halves it.
    Derivatives are implicit as for ``cg``: the same method and factors solve ``A dx = db - dA x``. Under ``jax.vmap``
    over ``b`` all right-hand sides share one linearization and one factorization.

    Args:
        op: a symmetric operator, linearized once, or the product ``v -> A v`` on trees like ``b``.
        b: the right-hand side, any tree of floating arrays.
        method: the solver, as above.
        rtol: the tolerance of the residual, relative to ``norm(b)``.
        max_steps: the largest number of steps; ``None`` is 10 for each entry of ``b``.
        preconditioner: for ``"cg"`` and ``"minres"``; see ``cg``.

    Returns:
        ``(x, info)``: ``x`` shaped like ``b``; ``info`` a ``SolveInfo``. The status is ``CONVERGED`` only if the
        recomputed residual meets the tolerance. For ``"eigh"`` the smallest curvature is an eigenvalue.

    Raises:
        TypeError: if ``op`` is neither an operator nor callable, a leaf of ``b`` is not of a real floating dtype, or
            ``op`` has no factors or no damping for ``"woodbury"``.
        ValueError: if ``op(b)`` does not have the structure and shapes of ``b``, ``method`` is unknown, or a number is
            out of range.

    Cost: see ``cg`` and ``minres`` for these. For n entries of ``b``, ``"cholesky"`` takes n products, n^3 / 3 FLOPs
        and n^2 memory, and ``"eigh"`` 9 n^3 FLOPs; for m outputs ``"woodbury"`` takes m products of J and of J',
        2 m^3 / 3 FLOPs and m^2 memory. Each refinement takes one product. Compiled once, as ``cg`` is. With
        ``batches=`` each product is one pass over the batches; the n products that form a matrix share passes.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> x, info = curvature.solve(lambda v: jnp.array([2.0, -4.0]) * v, jnp.array([2.0, 2.0]))
        >>> x, curvature.Status(int(info.status)).name, float(info.min_curvature)
        (Array([ 1. , -0.5], dtype=float32), 'CONVERGED', -4.0)
        >>> many = jax.vmap(lambda b: curvature.solve(lambda v: 2 * v, b)[0])
        >>> jnp.round(many(jnp.array([[2.0, 4.0], [6.0, 8.0]])))
        Array([[1., 2.],
               [3., 4.]], dtype=float32)

    References: Golub and Van Loan, Matrix Computations, 4th ed. (2013), section 2.1.4 (Woodbury's formula).
    """
    _checks.check_choice("method", method, SolveMethod)
    b, rtol, limit = check_system(b, rtol, max_steps)
    if method == "woodbury":
        _damped_factors(op)  # here, where the error can name the class of op
    return call_solver(_solve, op, b, rtol, limit, preconditioner, method=method)


def _solve(
    op: Operator, b: Tree, rtol: ArrayLike, limit: Int[Array, ""], preconditioner: Operator | None, method: SolveMethod
) -> tuple[Tree, SolveInfo]:
    system = linear_system(op, b, limit, preconditioner)
    if method == "auto":
        return implicit_solution(system, _with_fallback(system, rtol))
    if method == "woodbury":
        return implicit_solution(system, _by_woodbury(system, op, rtol))
    return implicit_solution(system, _METHODS[method](system, rtol))


def _with_fallback(system: System, rtol: Any) -> Method:
    """A method for positive definite systems, and if it finds negative curvature a method for indefinite systems."""
    if system.b.size <= _SMALL:
        matrix = _matrix(system)
        first, second = _by_cholesky(system, rtol, matrix), _by_eigh(system, rtol, matrix)
    else:
        first, second = (by_iteration(restarted, system, rtol) for restarted in (restarted_cg, restarted_minres))

    def method(product: VectorMap, unit: Vector, limit: Int[Array, ""]) -> tuple[Vector, SolveInfo]:
        x, info = first(product, unit, limit)
        failed = info.status == Status.NEGATIVE_CURVATURE
        # No steps if it has not failed; not cond, which under vmap would always run both branches.
        other, other_info = second(product, unit, jnp.where(failed, limit, 0))
        lower = other_info.min_curvature < info.min_curvature
        other_info = other_info._replace(
            num_steps=info.num_steps + other_info.num_steps,
            min_curvature=jnp.where(lower, other_info.min_curvature, info.min_curvature),
            direction=jnp.where(lower, other_info.direction, info.direction),
        )
        return jax.tree.map(lambda a, b: jnp.where(failed, a, b), (other, other_info), (x, info))

    return method


def _matrix(system: System) -> Matrix:
    """The symmetric part of the matrix of the system; derivatives of the solution are implicit, not through it."""
    basis = jnp.eye(system.b.size, dtype=system.b.dtype)
    matrix = jax.lax.stop_gradient(vmap(system.product)(basis))
    return (matrix + matrix.T) / 2


def _by_cholesky(system: System, rtol: Any, matrix: Matrix | None = None) -> Method:
    matrix = _matrix(system) if matrix is None else matrix
    scale = scaling(matrix)
    factor = jnp.linalg.cholesky(matrix / jnp.outer(scale, scale))
    definite = jnp.all(jnp.isfinite(factor))  # cholesky reports failure as NaN
    factor = jnp.where(definite, factor, jnp.eye(len(scale), dtype=factor.dtype))

    def of_smallest_pivot() -> Vector:
        last = jnp.argmin(jnp.diagonal(factor))
        unit = jnp.zeros_like(scale).at[last].set(1)
        return jax.scipy.linalg.solve_triangular(factor, unit, lower=True, trans=1) / scale

    def of_lowest_eigenvalue() -> Vector:
        return jnp.linalg.eigh(matrix, symmetrize_input=False)[1][:, 0]

    direction = jax.lax.cond(definite, of_smallest_pivot, of_lowest_eigenvalue)
    unit_direction = direction / jnp.linalg.norm(direction)
    curvature = dot(unit_direction, matmul(matrix, unit_direction))
    failure = where_status(jnp.isfinite(curvature), Status.NEGATIVE_CURVATURE, Status.NONFINITE)

    def correct(r: Vector, *_: Any) -> tuple[Correction, Any]:
        step = jax.scipy.linalg.cho_solve((factor, True), r / scale) / scale
        step = jnp.where(definite, step, 0)
        status = where_status(definite, Status.RUNNING, failure)
        return Correction(step, jnp.ones_like(status), status, curvature, direction), ()

    return _refined(rtol, correct)


def _by_eigh(system: System, rtol: Any, matrix: Matrix | None = None) -> Method:
    matrix = _matrix(system) if matrix is None else matrix
    eigenvalues, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    inverse = pseudo_inverse(eigenvalues, vectors)

    def correct(r: Vector, *_: Any) -> tuple[Correction, Any]:
        status = where_status(jnp.all(jnp.isfinite(eigenvalues)), Status.RUNNING, Status.NONFINITE)
        return Correction(inverse(r), jnp.ones_like(status), status, eigenvalues[0], vectors[:, 0]), ()

    return _refined(rtol, correct)


def _refined(rtol: Any, correct: Callable[..., tuple[Correction, Any]]) -> Method:
    return lambda product, unit, limit: refine(product, unit, correct, rtol, limit)


def _by_woodbury(system: System, op: Any, rtol: Any) -> Method:
    jac, weight, damping = _damped_factors(op)
    forward = jac.linearize()
    backward = jax.linear_transpose(forward, jac.in_structure())
    outputs, unravel_outputs = ravel(zeros(jac.out_structure()))
    weigh = (lambda u: u) if weight is None else weight.linearize()

    def to_outputs(v: Vector) -> Vector:
        return ravel(forward(system.unravel(v)))[0]

    def to_inputs(u: Vector) -> Vector:
        return ravel(backward(unravel_outputs(u))[0])[0]

    def weighted(u: Vector) -> Vector:
        return ravel(weigh(unravel_outputs(u)))[0]

    basis = jnp.eye(outputs.size, dtype=outputs.dtype)
    columns = vmap(lambda u: weighted(to_outputs(to_inputs(u))))(basis)  # of M J J'
    c = jax.lax.stop_gradient(damping.astype(basis.dtype))
    factor = jax.scipy.linalg.lu_factor(jax.lax.stop_gradient(columns.T) + c * basis)

    def correct(r: Vector, *_: Any) -> tuple[Correction, Any]:
        y = jax.scipy.linalg.lu_solve(factor, weighted(to_outputs(r)))
        step = (r - to_inputs(y)) / c.astype(r.dtype)
        curvature = dot(step, system.product(step)) / dot(step, step)
        running = jnp.full_like(curvature, Status.RUNNING, jnp.int32)
        return Correction(step, jnp.ones_like(running), running, curvature, step), ()

    return _refined(rtol, correct)


def _damped_factors(op: Any) -> tuple[LinearOperator, LinearOperator | None, Float[Array, ""]]:
    """``J``, ``M`` and ``c`` of ``A = J' M J + c I``."""
    terms = _terms(op)
    shifts = [term.scale for term in terms if isinstance(term, DampingOperator)]
    others = [term for term in terms if not isinstance(term, DampingOperator)]
    if len(others) != 1 or not hasattr(others[0], "factors"):
        raise TypeError(
            f"{caller()}: method='woodbury' needs one term with factors() -> (J, M), as a Gauss-Newton operator, plus "
            f"damping; op is {type(op).__name__}. Use another method, such as 'cg'."
        )
    if not shifts:
        raise TypeError(
            f"{caller()}: method='woodbury' needs A = J' M J + c I, but op has no damping; add it, as in "
            "op + damping(1e-3)."
        )
    jac, weight = others[0].factors()
    return jac, weight, sum(shifts[1:], shifts[0])


def _terms(op: Any) -> list[Any]:
    return [leaf for term in op.terms for leaf in _terms(term)] if isinstance(op, SumOperator) else [op]


_METHODS = {
    "cg": partial(by_iteration, restarted_cg),
    "minres": partial(by_iteration, restarted_minres),
    "cholesky": _by_cholesky,
    "eigh": _by_eigh,
}
