"""Lanczos tridiagonalization with full reorthogonalization, and orthonormal bases for block Lanczos.

Why not ``matfree``: its tridiagonalization of the identity has ``Q Q' - I`` of 0.9999, that of the zero matrix is NaN,
its tests of rank are absolute, and products cannot be chunked.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from curvature import _checks
from curvature._errors import public
from curvature._numerics import matmul, norm
from curvature._types import Scalar, Tree, Vector, VectorMap
from curvature.linalg._host_loop import call_solver
from curvature.linalg._linear_system import product_on_vectors
from curvature.operators._base import LinearOperator

_LOST = 100  # Heuristic: after orthogonalization, a vector below this number of roundings is noise


class Tridiagonal(NamedTuple):
    """The result of ``lanczos``: ``A Q = Q T + r e_k'`` with ``Q' Q = I`` and a tridiagonal ``T``.

    Attributes:
        basis: the columns of Q: a tree like the operator's argument, with a leading axis of k.
        diagonal: the diagonal of T.
        off_diagonal: the off-diagonal of T; zero where the Krylov space was exhausted and a random vector started
            another one.
        residual: r, a tree like the operator's argument.
    """

    basis: Tree
    diagonal: Float[Array, " k"]
    off_diagonal: Float[Array, " k-1"]
    residual: Tree


@public
def lanczos(op: LinearOperator, *, key: PRNGKeyArray, num_steps: int) -> Tridiagonal:
    """Tridiagonalize a symmetric operator on the Krylov space of a random vector, with full reorthogonalization.

    ``A Q = Q T + r e_k'`` and ``Q' Q = I``, both to rounding. If the space is exhausted, as for the identity at the
    first step, a random vector orthogonal to it starts another one.

    Args:
        op: the symmetric operator, linearized once.
        key: the random key of the first vector, which is uniform on the sphere, and of later ones.
        num_steps: k, the number of products.

    Returns:
        A ``Tridiagonal``. It has no reverse-mode derivative.

    Raises:
        TypeError: if ``op`` is not an operator.
        ValueError: if ``num_steps`` is not between 1 and the size of the operator, or ``op`` is not square.

    Cost: k products and O(n k^2) FLOPs; memory for k vectors. With ``batches=`` a product is one pass over the batches.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> from curvature.operators._base import MatrixOperator
        >>> op = MatrixOperator(3 * jnp.eye(4), is_symmetric=True)
        >>> found = curvature.lanczos(op, key=jax.random.key(0), num_steps=2)
        >>> jnp.round(found.diagonal, 4), found.off_diagonal, found.basis.shape
        (Array([3., 3.], dtype=float32), Array([0.], dtype=float32), (2, 4))

    References: Golub and Van Loan, Matrix Computations, 4th ed. (2013), algorithm 10.1.1 and section 10.3.4.
    """
    _checks.check_operator(op)
    return call_solver(_lanczos, op, key, num_steps=num_steps)


def _lanczos(op: LinearOperator, key: PRNGKeyArray, num_steps: int) -> Tridiagonal:
    product, unravel, example = product_on_vectors(op)
    _checks.check_size("num_steps", num_steps, example.size, "the number of columns of op")
    first, later = jax.random.split(key)
    state = tridiagonalize(product, random_rows(first, 1, example)[0], later, num_steps)
    return Tridiagonal(jax.vmap(unravel)(state.basis), state.diagonal, state.off_diagonal, unravel(state.residual))


class LanczosState(NamedTuple):
    """The state of ``tridiagonalize``, and its result."""

    basis: Float[Array, "k n"]  # rows; later rows are still zero
    diagonal: Float[Array, " k"]
    off_diagonal: Array  # (k - 1,); in the loop (k,), with a first entry that is not used
    residual: Vector
    size: Scalar  # a lower bound of the norm of A


def tridiagonalize(product: VectorMap, start: Vector, key: Array, num_steps: int) -> LanczosState:
    """``lanczos`` from a given vector; ``key`` draws the vectors that start another space after an exhausted one."""
    example = jnp.zeros_like(start)

    def step(i: Int[Array, ""], state: LanczosState) -> LanczosState:
        coupling = norm(state.residual)
        exhausted = coupling <= _LOST * jnp.finfo(example.dtype).eps * state.size
        vector = jnp.where(exhausted, random_rows(jax.random.fold_in(key, i), 1, example)[0], state.residual)
        vector = vector / norm(vector)
        vector = orthogonal_to(state.basis, vector[None])[0]  # again: the division amplified what rounding left
        q = vector / norm(vector)
        previous = jnp.where(exhausted, 0, coupling)
        image = product(q)
        basis = state.basis.at[i].set(q)
        coefficients = matmul(basis, image)
        return LanczosState(
            basis=basis,
            diagonal=state.diagonal.at[i].set(coefficients[i]),
            off_diagonal=state.off_diagonal.at[i].set(previous),
            residual=orthogonal_to(basis, image[None])[0],
            size=jnp.maximum(state.size, norm(image)),
        )

    rows = jnp.broadcast_to(example, (num_steps, example.size))
    size = jnp.sum(example)  # zero, but varies over a mesh if the operator does
    initial = LanczosState(rows, rows[:, 0], rows[:, 0], start, size)
    state = jax.lax.fori_loop(0, num_steps, step, initial)
    return state._replace(off_diagonal=state.off_diagonal[1:])


def random_rows(key: Array, count: int, example: Vector) -> Float[Array, "count n"]:
    """Gaussian vectors of length about 1, which vary over a mesh if ``example``, a vector of zeros, does."""
    rows = jax.random.normal(key, (count, example.size), example.dtype)
    return rows / jnp.sqrt(jnp.asarray(example.size, example.dtype)) + example[None]


def orthogonal_to(basis: Float[Array, "k n"], rows: Float[Array, "count n"]) -> Float[Array, "count n"]:
    """The rows, orthogonalized against the orthonormal rows of ``basis`` (classical Gram-Schmidt)."""
    for _ in range(2):  # twice is enough
        coordinates = matmul(rows, basis.T)
        rows = rows - matmul(coordinates, basis)
    return rows


def orthonormal_rows(
    basis: Float[Array, "k n"], rows: Float[Array, "count n"], key: Array, example: Vector
) -> Float[Array, "count n"]:
    """Orthonormal rows, orthogonal to ``basis``, that span ``rows`` with it; random rows replace dependent ones.

    The entries of ``rows`` must be of order 1 or less: then a row below the rounding level is noise.
    """
    lost = _LOST * jnp.finfo(rows.dtype).eps
    first, second = jax.random.split(key)
    rows = orthogonal_to(basis, rows)
    lengths = jax.vmap(norm)(rows)[:, None]
    rows = jnp.where(lengths <= lost, random_rows(first, len(rows), example), rows / jnp.where(lengths > 0, lengths, 1))
    q, r = jnp.linalg.qr(orthogonal_to(basis, rows).T)
    dependent = jnp.abs(jnp.diagonal(r))[:, None] <= lost
    rows = jnp.where(dependent, random_rows(second, len(rows), example), q.T)
    return jnp.linalg.qr(orthogonal_to(basis, rows).T)[0].T
