"""Orthonormal bases of Krylov spaces, kept orthonormal to rounding whatever the operator does.

Not by ``matfree``: its tridiagonalization of the identity has ``Q Q' - I`` of 0.9999 and that of zero is NaN, its tests
of rank are absolute, and products cannot be taken in chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from curvature._numerics import norm
from curvature._trees import ravel
from curvature._types import Scalar, Tree, Vector, VectorMap
from curvature.linalg._host_loop import call_solver
from curvature.linalg._linear_system import checked_product
from curvature.operators._base import LinearOperator, zeros

_LOST = 100  # roundings: our own level below which what orthogonalization leaves of a vector is noise


class Tridiagonal(NamedTuple):
    """What ``lanczos`` found: ``A Q = Q T + r e_k'`` with ``Q' Q = I`` and a tridiagonal ``T``.

    Attributes:
        basis: the columns of Q: a tree like the operator's argument, with a leading axis of k.
        diagonal: of T.
        off_diagonal: of T; zero where the Krylov space was exhausted and a random vector began another one.
        residual: r, a tree like the operator's argument.
    """

    basis: Tree
    diagonal: Float[Array, " k"]
    off_diagonal: Float[Array, " k-1"]
    residual: Tree


def lanczos(op: LinearOperator, *, key: PRNGKeyArray, num_steps: int) -> Tridiagonal:
    """Tridiagonalize a symmetric operator on the Krylov space of a random vector, fully reorthogonalized.

    ``A Q = Q T + r e_k'``, ``Q' Q = I``, both to rounding. Where the space is exhausted, as for the identity at the
    first step, a random vector orthogonal to it begins another one.

    Args:
        op: the symmetric operator, linearized once.
        key: the random key of the first vector, which is uniform on the sphere, and of later ones.
        num_steps: k, the number of products.

    Returns:
        A ``Tridiagonal``. It has no reverse-mode derivative.

    Raises:
        TypeError: when ``op`` is no operator.
        ValueError: when ``num_steps`` is not between 1 and the size of the operator, or ``op`` is not square.

    Cost: k products and O(n k^2) FLOPs; memory for k vectors. With ``batches=`` a product is one pass over them.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> from curvature.operators._base import MatrixOperator
        >>> op = MatrixOperator(3 * jnp.eye(4), is_symmetric=True)
        >>> found = curvature.lanczos(op, key=jax.random.key(0), num_steps=2)
        >>> jnp.round(found.diagonal, 4), found.off_diagonal, found.basis.shape
        (Array([3., 3.], dtype=float32), Array([0.], dtype=float32), (2, 4))

    References: Golub and Van Loan, Matrix Computations, 4th ed. (2013), algorithm 10.1.1 and section 10.3.4.
    """
    _checks.check_operator("lanczos", op)
    return call_solver("lanczos", _lanczos, op, key, num_steps=num_steps)


def _lanczos(op: LinearOperator, key: PRNGKeyArray, num_steps: int) -> Tridiagonal:
    product, example = checked_product("lanczos", "op", op, zeros(op.in_structure()))
    flat, unravel = ravel(example)
    _checks.check_size("lanczos", "num_steps", num_steps, flat.size, "the number of columns of op")
    first, later = jax.random.split(key)
    start = random_rows(first, 1, flat)[0]
    state = tridiagonalize(lambda vector: ravel(product(unravel(vector)))[0], start, later, num_steps)
    return Tridiagonal(jax.vmap(unravel)(state.basis), state.diagonal, state.off_diagonal, unravel(state.residual))


class LanczosState(NamedTuple):
    """``lanczos`` on vectors, on its way or done."""

    basis: Float[Array, "k n"]  # rows; those to come are zero
    diagonal: Float[Array, " k"]
    off_diagonal: Array  # (k - 1,); on its way (k,), with a first one that couples with nothing
    residual: Vector
    size: Scalar  # a lower bound of the norm of A


def tridiagonalize(product: VectorMap, start: Vector, key: Array, num_steps: int) -> LanczosState:
    """``lanczos`` from a given vector; ``key`` is for those that replace an exhausted one."""
    example = jnp.zeros_like(start)

    def step(i: Int[Array, ""], state: LanczosState) -> LanczosState:
        coupling = norm(state.residual)
        exhausted = coupling <= _LOST * jnp.finfo(example.dtype).eps * state.size
        vector = jnp.where(exhausted, random_rows(jax.random.fold_in(key, i), 1, example)[0], state.residual)
        vector = vector / norm(vector)
        vector = orthogonal_to(state.basis, vector[None])[0]  # the division brings back what rounding left
        q = vector / norm(vector)
        previous = jnp.where(exhausted, 0, coupling)
        image = product(q)
        basis = state.basis.at[i].set(q)
        coefficients = jnp.matmul(basis, image, precision="highest")
        return LanczosState(
            basis=basis,
            diagonal=state.diagonal.at[i].set(coefficients[i]),
            off_diagonal=state.off_diagonal.at[i].set(previous),  # the first couples with nothing
            residual=orthogonal_to(basis, image[None])[0],
            size=jnp.maximum(state.size, norm(image)),
        )

    rows = jnp.broadcast_to(example, (num_steps, example.size))
    size = jnp.sum(example)  # zero, but varies over a mesh where the operator does
    initial = LanczosState(rows, rows[:, 0], rows[:, 0], start, size)
    state = jax.lax.fori_loop(0, num_steps, step, initial)
    return state._replace(off_diagonal=state.off_diagonal[1:])


def random_rows(key: Array, count: int, example: Vector) -> Float[Array, "count n"]:
    """Gaussian vectors of length about 1, which vary over a mesh where ``example``, of zeros, does."""
    rows = jax.random.normal(key, (count, example.size), example.dtype)
    return rows / jnp.sqrt(jnp.asarray(example.size, example.dtype)) + example[None]


def orthogonal_to(basis: Float[Array, "k n"], rows: Float[Array, "count n"]) -> Float[Array, "count n"]:
    """What is left of ``rows`` without their parts along orthonormal rows; twice is enough against rounding."""
    for _ in range(2):
        coordinates = jnp.matmul(rows, basis.T, precision="highest")
        rows = rows - jnp.matmul(coordinates, basis, precision="highest")
    return rows


def orthonormal_rows(
    basis: Float[Array, "k n"], rows: Float[Array, "count n"], key: Array, example: Vector
) -> Float[Array, "count n"]:
    """Orthonormal rows, orthogonal to ``basis``, that span ``rows`` with it; random ones where those are dependent.

    The entries of ``rows`` are of order 1 or less: what is left of a row below the rounding level is noise.
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
