"""Preconditioners for the iterative solvers: Jacobi (diagonal) and randomized Nyström."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, PRNGKeyArray

from curvature import _checks
from curvature._errors import public
from curvature._numerics import exponent_of, matmul, rounding_level
from curvature._trees import ravel
from curvature._types import ChunkSize, Tree
from curvature.linalg._host_loop import call_solver
from curvature.operators._base import LinearOperator, Product
from curvature.operators._pytrees import register_operator, structure_of, zeros
from curvature.transforms._chunks import vmap


@register_operator
class DiagonalPreconditioner(LinearOperator):
    """The inverse of a diagonal matrix; constructed by ``diagonal_preconditioner``."""

    inverse: Tree
    is_symmetric = True

    def mv(self, v: Tree) -> Tree:
        return jax.tree.map(jnp.multiply, self.inverse, v)

    def in_structure(self) -> Tree:
        return structure_of(self.inverse)


@public
def diagonal_preconditioner(op: LinearOperator | Tree, *, chunk_size: ChunkSize = "auto") -> DiagonalPreconditioner:
    """Jacobi's preconditioner ``1 / max(abs(d), eps^0.5 * max(abs(d)))`` for the diagonal ``d`` of an operator.

    Args:
        op: the operator, or its diagonal, or an estimate of the diagonal, as a tree.
        chunk_size: the number of products that run at once; see ``vmap``.

    Returns:
        A positive definite operator for any signs of the diagonal; the identity for a diagonal of zeros.

    Raises:
        TypeError: if a leaf of the diagonal is not of a real floating dtype.
        ValueError: for an empty diagonal or an invalid ``chunk_size``.

    Cost: n products for an operator with n columns, none for a diagonal; memory for n numbers.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> inverse = curvature.diagonal_preconditioner({"w": jnp.array([2.0, -4.0, 0.0])})
        >>> (inverse @ {"w": jnp.array([2.0, 2.0, 0.0])})["w"]
        Array([1. , 0.5, 0. ], dtype=float32)
    """
    return call_solver(_inverse_of_diagonal, op, chunk_size=chunk_size)


def _inverse_of_diagonal(op: LinearOperator | Tree, chunk_size: ChunkSize) -> DiagonalPreconditioner:
    diagonal = op.diagonal(chunk_size) if isinstance(op, LinearOperator) else op
    flat, unravel = ravel(_checks.check_point("op", diagonal))
    sizes = jnp.abs(flat)
    largest = jnp.max(sizes)
    floor = jnp.sqrt(jnp.finfo(flat.dtype).eps) * largest
    return DiagonalPreconditioner(unravel(1 / jnp.where(largest > 0, jnp.maximum(sizes, floor), 1)))


@register_operator
class NystromPreconditioner(LinearOperator):
    """``I + U' diag(c) U`` with orthonormal rows ``U``; constructed by ``nystrom_preconditioner``."""

    vectors: Tree  # with a leading axis of the rank
    coefficients: Float[Array, " rank"]
    is_symmetric = True

    def mv(self, v: Tree) -> Tree:
        return self.linearize()(v)

    def linearize(self) -> Product:
        rows = jax.vmap(lambda tree: ravel(tree)[0])(self.vectors)

        def product(v: Tree) -> Tree:
            flat, unravel = ravel(v)
            return unravel(flat + matmul(self.coefficients * matmul(rows, flat), rows))

        return product

    def in_structure(self) -> Tree:
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self.vectors)


@public
def nystrom_preconditioner(
    op: LinearOperator, *, rank: int, key: PRNGKeyArray, damping: ArrayLike, chunk_size: ChunkSize = "auto"
) -> NystromPreconditioner:
    """The randomized Nyström preconditioner of ``A + damping * I`` for a positive semidefinite ``A``.

    From ``A ~ U' diag(l) U`` of the given rank: ``P^-1 = (l_r + damping) U' diag(1 / (l + damping)) U + (I - U' U)``,
    with ``l_r`` the smallest of ``l``. It is effective if ``A`` has few large eigenvalues: the preconditioned condition
    number is about ``(l_r + damping) / damping``.

    Args:
        op: ``A``, without the damping. Negative eigenvalues of the sketched matrix are dropped.
        rank: the number of random products.
        key: the random key.
        damping: the multiple of the identity that is added to ``A`` in the system to solve.
        chunk_size: the number of products that run at once; see ``vmap``.

    Returns:
        A positive definite operator.

    Raises:
        TypeError: if ``op`` is not an operator.
        ValueError: if ``rank`` is not between 1 and the size of the operator, or ``damping`` is negative.

    Cost: ``rank`` products that share one linearization, O(n rank^2) FLOPs; memory for about 3 ``rank`` vectors.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> from curvature.operators._base import MatrixOperator
        >>> op = MatrixOperator(jnp.diag(jnp.array([99.0, 0.0, 0.0])), is_symmetric=True)
        >>> inverse = curvature.nystrom_preconditioner(op, rank=2, key=jax.random.key(0), damping=1.0)
        >>> jnp.round(inverse @ jnp.array([100.0, 1.0, 2.0]), 3)
        Array([1., 1., 2.], dtype=float32)

    References: Frangella, Tropp and Udell (2021), arXiv:2110.02820, algorithm 2.1 (with eigenvalues of the core in
        place of Cholesky's factor) and equation (5.3).
    """
    _checks.check_operator(op)
    _checks.check_nonnegative("damping", damping)
    return call_solver(_nystrom, op, key, jnp.asarray(damping), rank=rank, chunk_size=chunk_size)


def _nystrom(
    op: LinearOperator, key: PRNGKeyArray, damping: Array, rank: int, chunk_size: ChunkSize
) -> NystromPreconditioner:
    example, unravel = ravel(zeros(op.in_structure()))
    _checks.check_size("rank", rank, example.size, "the number of columns of op")
    product = op.linearize()

    test, _ = jnp.linalg.qr(jax.random.normal(key, (example.size, rank), example.dtype))
    sketch = vmap(lambda row: ravel(product(unravel(row)))[0], chunk_size=chunk_size)(test.T)
    exponent = exponent_of(sketch.reshape(-1))
    unit = jnp.ldexp(sketch, -exponent)  # no square overflows or underflows in single precision
    core = matmul(unit, test)
    eigenvalues, basis = jnp.linalg.eigh(core)
    positive = eigenvalues > rounding_level(eigenvalues)
    weights = jnp.where(positive, jax.lax.rsqrt(jnp.where(positive, eigenvalues, 1)), 0)
    root = matmul(unit.T, basis * weights[None])  # A ~ root root'
    vectors, values, _ = jnp.linalg.svd(root, full_matrices=False)
    spectrum = jnp.ldexp(values**2, exponent) + jnp.asarray(damping, values.dtype)
    coefficients = jnp.where(spectrum > 0, spectrum[-1] / jnp.where(spectrum > 0, spectrum, 1), 1) - 1
    return NystromPreconditioner(jax.vmap(unravel)(vectors.T), coefficients)
