"""``eigsh``: block Lanczos with thick restarts for the extreme eigenpairs of a symmetric operator."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from curvature import _checks
from curvature._errors import public
from curvature._numerics import matmul, norm
from curvature._trees import num_entries
from curvature._types import Scalar, Tree, Vector
from curvature.linalg._host_loop import call_solver
from curvature.linalg._lanczos import orthonormal_rows, random_rows
from curvature.linalg._linear_system import product_on_vectors
from curvature.operators._base import LinearOperator, Product
from curvature.transforms._chunks import vmap

Which = Literal["LA", "SA", "LM"]
"""The largest (algebraic), the smallest (algebraic), or the largest in magnitude."""

Rows = Float[Array, "count n"]

_DENSE = 500  # Heuristic: up to this number of entries the matrix is formed and all its eigenvalues are computed
# Heuristic, chosen on a Wishart matrix of size 700, whose lowest eigenvalues are clustered: with 40 vectors kept and 40
# added, four eigenvalues take 3,900 products to 1e-9; with 9 kept and 24 added they take 53,000, and ARPACK 30,000.
_LEAST_BASIS = 40  # a restart keeps, and adds, at least this number of vectors
_LEAST_BLOCKS = 6  # a restart adds at least this number of blocks
_LOST = 100  # Heuristic: residuals at or below this number of roundings of A may be due to rounding
_PATIENCE = 10  # Heuristic: the iteration stops after this number of restarts at that level without a gain of a tenth


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors of a symmetric operator, in the order that ``which`` states.

    Attributes:
        eigenvalues: Ritz values ``v' A v``.
        eigenvectors: a tree like the operator's argument, with a leading axis of k; orthonormal.
        residuals: ``norm(A v - eigenvalue v)``, recomputed; ``A`` has an eigenvalue within this distance.
        converged: whether the residual passes the test.
    """

    eigenvalues: Float[Array, " k"]
    eigenvectors: Tree
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]


@public
def eigsh(
    op: LinearOperator,
    k: int,
    *,
    which: Which = "LM",
    key: PRNGKeyArray | None = None,
    rtol: ArrayLike = 1e-4,
    max_steps: ArrayLike = 100,
) -> Eigenpairs:
    """The ``k`` largest or smallest eigenvalues of a symmetric operator, with eigenvectors.

    Block Lanczos with thick restarts. Blocks of k vectors find eigenvalues of multiplicity up to k as often as they
    occur; random vectors replace exhausted directions. Each restart keeps the best Ritz vectors and continues from the
    recomputed residuals of the k wanted ones. A pair is reported as converged only if
    ``norm(A v - eigenvalue v) <= rtol * max(abs(Ritz values))``. Operators with at most 500 columns, or twice the size
    of the basis, are formed, and all their eigenvalues computed.

    Args:
        op: the symmetric operator, linearized once.
        k: the number of eigenpairs.
        which: ``"LA"`` the largest, descending; ``"SA"`` the smallest, ascending; ``"LM"`` the largest in magnitude,
            descending in magnitude.
        key: the random key of the first block; ``None`` is ``jax.random.key(0)``, so that calls are reproducible.
        rtol: the tolerance, relative to the Ritz value of largest magnitude.
        max_steps: the largest number of restarts. Clustered eigenvalues and small tolerances take hundreds. The
            iteration also ends if all residuals are within 100 roundings of ``A`` and ten restarts in a row gain
            nothing: this precision allows no smaller residuals.

    Returns:
        ``Eigenpairs``. NaN in the operator gives NaN eigenvalues that are not converged. There is no reverse-mode
        derivative; the first derivative of a simple eigenvalue is that of ``v' A v`` with ``v`` held fixed.

    Raises:
        TypeError: if ``op`` is not an operator.
        ValueError: if ``k`` is not between 1 and the size of the operator, ``op`` is not square, ``which`` is unknown
            or a number is out of range.

    Cost: 3 k products at the start and 7 k per restart (both at least 40 + k), of which k run at once, and O(n m^2)
        FLOPs for a basis of m = 8 k (at least 80) vectors. Formed: n products, 9 n^3 FLOPs, n^2 memory. With
        ``batches=``, each block of k products is one pass over the batches.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> from curvature.operators._base import MatrixOperator
        >>> op = MatrixOperator(jnp.diag(jnp.array([5.0, -7.0, 5.0, 1.0])), is_symmetric=True)
        >>> pairs = curvature.eigsh(op, 2, which="LA")
        >>> jnp.round(pairs.eigenvalues, 4), pairs.converged
        (Array([5., 5.], dtype=float32), Array([ True,  True], dtype=bool))

    References: Wu and Simon (2000), doi:10.1137/S0895479898334605; Golub and Underwood (1977), the block method.
    """
    _checks.check_operator(op)
    _checks.check_choice("which", which, Which)
    _checks.check_nonnegative("rtol", rtol)
    _checks.check_count("max_steps", max_steps)
    _checks.check_size("k", k, num_entries(op.in_structure()), "the number of columns of op")
    key = jax.random.key(0) if key is None else key
    return call_solver(_eigsh, op, key, jnp.asarray(rtol), jnp.asarray(max_steps, jnp.int32), k=k, which=which)


def _eigsh(op: LinearOperator, key: PRNGKeyArray, rtol: Array, max_steps: Array, k: int, which: Which) -> Eigenpairs:
    product, unravel, example = product_on_vectors(op)
    problem = _Problem(vmap(product), example, k, which)
    if example.size <= max(_DENSE, 2 * problem.basis_size):
        state = _by_eigh(problem)
    else:
        state = _by_lanczos(problem, key, rtol, max_steps)
    converged = _converged(state, rtol)
    return Eigenpairs(state.values[:k], jax.vmap(unravel)(state.vectors[:k]), state.residual_norms, converged)


class _Problem(NamedTuple):
    product: Product  # on the rows of a matrix
    example: Vector  # of zeros
    k: int
    which: str

    @property
    def kept(self) -> int:
        """The number of Ritz vectors that a restart keeps, a multiple of k.

        It is larger than k: a wanted pair converges faster, the farther its eigenvalue is from all that are not kept.
        """
        return self.k * max(2, -(-_LEAST_BASIS // self.k))

    @property
    def basis_size(self) -> int:
        """The size after a restart has added blocks of k vectors."""
        return self.kept + self.k * max(_LEAST_BLOCKS, -(-_LEAST_BASIS // self.k))


class _State(NamedTuple):
    values: Float[Array, " kept"]
    vectors: Rows
    residuals: Rows  # of the first k pairs
    residual_norms: Float[Array, " k"]
    size: Scalar  # the largest magnitude of a Ritz value
    step: Int[Array, ""]
    best: Scalar  # the smallest value of max(residual_norms) over all restarts
    stale: Int[Array, ""]  # the number of restarts since then, if the residuals are at the rounding level


def _converged(state: _State, rtol: ArrayLike) -> Bool[Array, " k"]:
    return state.residual_norms <= jnp.asarray(rtol, state.size.dtype) * state.size  # false for NaN


def _by_eigh(problem: _Problem) -> _State:
    basis = jnp.eye(problem.example.size, dtype=problem.example.dtype) + problem.example[None]
    return _ritz(problem, basis, problem.product(basis), problem.k)


def _by_lanczos(problem: _Problem, key: PRNGKeyArray, rtol: ArrayLike, max_steps: ArrayLike) -> _State:
    def running(state: _State) -> Bool[Array, ""]:
        unfinished = ~jnp.all(_converged(state, rtol)) & jnp.all(jnp.isfinite(state.residual_norms))
        return unfinished & (state.step < max_steps) & (state.stale < _PATIENCE)

    def restart(state: _State) -> _State:
        new = _expand(problem, state, jax.random.fold_in(key, state.step + 1))
        largest = jnp.max(new.residual_norms)
        better = largest < 0.9 * state.best
        # Only at the rounding level is a lack of progress final: clustered eigenvalues converge slowly above it.
        rounding = largest <= _LOST * jnp.finfo(largest.dtype).eps * new.size
        return new._replace(
            best=jnp.minimum(largest, state.best), stale=jnp.where(rounding & ~better, state.stale + 1, 0)
        )

    return jax.lax.while_loop(running, restart, _start(problem, key))


def _start(problem: _Problem, key: PRNGKeyArray) -> _State:
    """The Ritz pairs of the block Krylov space of a random block."""
    basis = jnp.broadcast_to(problem.example, (problem.kept, problem.example.size))
    projected = jnp.zeros((problem.kept, problem.kept), basis.dtype) + problem.example[0]
    block = random_rows(key, problem.k, problem.example)
    basis, projected = _add_blocks(problem, basis, projected, block, 0, key)
    return _ritz(problem, basis, projected, problem.kept)


def _expand(problem: _Problem, state: _State, key: PRNGKeyArray) -> _State:
    """One restart: add blocks to the kept Ritz vectors, starting with the residuals, and compute new Ritz pairs."""
    kept, total = problem.kept, problem.basis_size
    new = jnp.broadcast_to(problem.example, (total - kept, problem.example.size))
    basis = jnp.concatenate([state.vectors, new])
    projected = jnp.zeros((total, total), basis.dtype) + problem.example[0]
    projected = projected.at[:kept, :kept].set(jnp.diag(state.values))
    block = state.residuals / jnp.where(state.size > 0, state.size, 1)
    basis, projected = _add_blocks(problem, basis, projected, block, kept, key)
    state = _ritz(problem, basis, projected, kept)._replace(size=state.size, step=state.step + 1)
    return state._replace(size=jnp.maximum(state.size, jnp.max(jnp.abs(state.values))))


def _add_blocks(
    problem: _Problem, basis: Rows, projected: Array, block: Array, first: int, key: PRNGKeyArray
) -> tuple[Rows, Array]:
    """Fill the rows of the basis from row ``first``, a block at a time, and the projection ``Q' A Q``."""
    k = problem.k

    def add_block(i: Int[Array, ""], carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        basis, projected, block = carry
        row = first + i * k
        block = orthonormal_rows(basis, block, jax.random.fold_in(key, i), problem.example)
        basis = jax.lax.dynamic_update_slice_in_dim(basis, block, row, 0)
        images = problem.product(block)
        columns = matmul(images, basis.T)  # zero for rows that are not filled yet
        projected = jax.lax.dynamic_update_slice_in_dim(projected, columns, row, 0)
        projected = jax.lax.dynamic_update_slice_in_dim(projected, columns.T, row, 1)
        size = jnp.max(jnp.abs(images))  # orthonormal_rows expects entries of order 1
        return basis, projected, images / jnp.where(size > 0, size, 1)

    count = (len(basis) - first) // k
    return jax.lax.fori_loop(0, count, add_block, (basis, projected, block))[:2]


def _ritz(problem: _Problem, basis: Rows, projected: Array, kept: int) -> _State:
    """The first ``kept`` Ritz pairs of a basis with ``projected = Q' A Q``, and the residuals of the first k."""
    finite = jnp.all(jnp.isfinite(projected))
    values, coordinates = jnp.linalg.eigh(jnp.where(finite, projected, 0))
    values = jnp.where(finite, values, jnp.nan)
    keys = {"LA": -values, "SA": values, "LM": -jnp.abs(values)}[problem.which]
    order = jnp.argsort(keys)[:kept]
    vectors = matmul(coordinates[:, order].T, basis)
    values, size = values[order], jnp.max(jnp.abs(values))
    wanted = vectors[: problem.k]
    residuals = problem.product(wanted) - values[: problem.k, None] * wanted
    norms = jax.vmap(norm)(residuals)
    none = jnp.zeros_like(size, jnp.int32)
    return _State(values, vectors, residuals, norms, size, none, jnp.max(norms), none)
