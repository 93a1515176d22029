"""A few extreme eigenvalues of a symmetric operator, with multiplicities, and what they are worth."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from curvature import _checks
from curvature._checks import _linalg
from curvature._types import Tree, ravel
from curvature.linalg._dense import norm
from curvature.linalg._host_loop import call_solver
from curvature.linalg._lanczos import orthonormal_rows, random_rows
from curvature.linalg._system import Scalar, Vector, checked_product
from curvature.operators._base import LinearOperator, Product, zeros
from curvature.transforms._jacobian import vmap

Which = Literal["LA", "SA", "LM"]
"""The largest, the smallest, or those of largest magnitude."""

Rows = Float[Array, "count n"]

_DENSE = 500  # entries, up to which the matrix is formed and all its eigenvalues are found
_LEAST_BASIS = 24  # vectors that a restart adds at least
_PATIENCE = 10  # restarts without a gain of a tenth, after which rounding is taken to be the cause


class Eigenpairs(NamedTuple):
    """Eigenvalues and eigenvectors of a symmetric operator, the most wanted first.

    Attributes:
        eigenvalues: Ritz values ``v' A v``.
        eigenvectors: a tree like the operator's argument, with a leading axis of k; orthonormal.
        residuals: ``norm(A v - eigenvalue v)``, computed afresh; an eigenvalue of A lies that near.
        converged: whether the residual passes the test.
    """

    eigenvalues: Float[Array, " k"]
    eigenvectors: Tree
    residuals: Float[Array, " k"]
    converged: Bool[Array, " k"]


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

    Block Lanczos with thick restarts: k directions at a time, so that eigenvalues of multiplicity up to k are found as
    often as they occur; directions that are exhausted are replaced by random ones. Each restart keeps the best Ritz
    vectors and goes on from their residuals, computed afresh. A pair is called converged only if
    ``norm(A v - eigenvalue v) <= rtol * max(abs(eigenvalues of A seen))``. Operators with at most 500 columns, or twice
    the size of the basis, are formed, and all their eigenvalues found.

    Args:
        op: the symmetric operator, linearized once.
        k: how many.
        which: ``"LA"`` the largest, descending; ``"SA"`` the smallest, ascending; ``"LM"`` the largest in magnitude,
            descending in magnitude.
        key: the random key of the first block; ``None`` is ``jax.random.key(0)``: the same answer each time.
        rtol: the tolerance, relative to the eigenvalue of largest magnitude that was seen.
        max_steps: the most restarts. The iteration also ends when ten of them in a row gain nothing.

    Returns:
        ``Eigenpairs``. NaN in the operator gives NaN eigenvalues that are not converged. There is no reverse-mode
        derivative; the first one of a simple eigenvalue is that of ``v' A v`` with ``v`` held fixed.

    Raises:
        TypeError: when ``op`` is no operator.
        ValueError: when ``k`` is not between 1 and the size of the operator, ``op`` is not square, ``which`` is unknown
            or a number is out of range.

    Cost: each restart takes about 4 k products, at least 24 + k, of which k run at once, and O(n m^2) FLOPs for the
        m = 5 k (at least 26 + k) vectors that it holds. Formed: n products, 9 n^3 FLOPs, n^2 memory.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> from curvature.operators._base import MatrixOperator
        >>> op = MatrixOperator(jnp.diag(jnp.array([5.0, -7.0, 5.0, 1.0])), is_symmetric=True)
        >>> pairs = curvature.eigsh(op, 2, which="LA")
        >>> jnp.round(pairs.eigenvalues, 4), pairs.converged
        (Array([5., 5.], dtype=float32), Array([ True,  True], dtype=bool))

    References: Wu and Simon (2000), doi:10.1137/S0895479898334605; Golub and Underwood (1977), the block method.
    """
    _linalg.check_operator("eigsh", "op", op, isinstance(op, LinearOperator))
    _checks.check_choice("eigsh", "which", which, Which)
    _checks.check_nonnegative("eigsh", "rtol", rtol)
    _checks.check_count("eigsh", "max_steps", max_steps)
    structure = op.in_structure()
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(structure))
    _linalg.check_size("eigsh", "k", k, size, "the number of columns of op")
    key = jax.random.key(0) if key is None else key
    operands = key, jnp.asarray(rtol), jnp.asarray(max_steps, jnp.int32)
    return call_solver("eigsh", _eigsh, op, *operands, k=k, which=which)


def _eigsh(op: LinearOperator, key: PRNGKeyArray, rtol: Array, max_steps: Array, k: int, which: Which) -> Eigenpairs:
    product, example = checked_product("eigsh", "op", op, zeros(op.in_structure()))
    flat, unravel = ravel(example)
    problem = _Problem(_on_rows(product, unravel), flat, k, which)
    if flat.size <= max(_DENSE, 2 * problem.basis_size):
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
        """How many Ritz vectors a restart keeps: some more than are wanted, which speeds up the last of those."""
        return self.k + min(self.k, 10) + 1

    @property
    def num_blocks(self) -> int:
        """How many blocks of k vectors a restart adds."""
        return max(3, -(-_LEAST_BASIS // self.k))

    @property
    def basis_size(self) -> int:
        return self.kept + self.num_blocks * self.k


class _State(NamedTuple):
    values: Float[Array, " kept"]
    vectors: Rows
    residuals: Rows  # of the first k
    residual_norms: Float[Array, " k"]
    size: Scalar  # the largest magnitude of a Ritz value
    step: Int[Array, ""]
    best: Scalar  # the smallest that the largest of the norms has been
    stale: Int[Array, ""]  # restarts since then


def _on_rows(product: Product, unravel: Product) -> Product:
    return vmap(lambda row: ravel(product(unravel(row)))[0])


def _converged(state: _State, rtol: ArrayLike) -> Bool[Array, " k"]:
    return state.residual_norms <= jnp.asarray(rtol, state.size.dtype) * state.size  # false for NaN


def _by_eigh(problem: _Problem) -> _State:
    basis = jnp.eye(problem.example.size, dtype=problem.example.dtype) + problem.example[None]
    return _ritz(problem, basis, problem.product(basis), problem.k, 0)


def _by_lanczos(problem: _Problem, key: PRNGKeyArray, rtol: ArrayLike, max_steps: ArrayLike) -> _State:
    none = jnp.zeros((problem.kept, problem.example.size), problem.example.dtype)
    random = random_rows(key, problem.kept, problem.example)
    basis = orthonormal_rows(none, random, key, problem.example)
    projected = jnp.matmul(problem.product(basis), basis.T, precision="highest")
    start = _ritz(problem, basis, projected, problem.kept, 0)

    def running(state: _State) -> Bool[Array, ""]:
        unfinished = ~jnp.all(_converged(state, rtol)) & jnp.all(jnp.isfinite(state.residual_norms))
        return unfinished & (state.step < max_steps) & (state.stale < _PATIENCE)

    def restart(state: _State) -> _State:
        new = _expand(problem, state, jax.random.fold_in(key, state.step + 1))
        better = new.best < 0.9 * state.best
        return new._replace(
            best=jnp.where(better, new.best, state.best), stale=jnp.where(better, new.stale, state.stale + 1)
        )

    return jax.lax.while_loop(running, restart, start)


def _expand(problem: _Problem, state: _State, key: PRNGKeyArray) -> _State:
    """Add blocks to the kept Ritz vectors, beginning with their residuals, and take the Ritz vectors of all."""
    k, kept, total = problem.k, problem.kept, problem.basis_size
    scale = jnp.where(state.size > 0, state.size, 1)
    new = jnp.broadcast_to(problem.example, (total - kept, problem.example.size))
    basis = jnp.concatenate([state.vectors, new])
    projected = jnp.zeros((total, total), basis.dtype) + basis[0, 0] * 0
    projected = projected.at[:kept, :kept].set(jnp.diag(state.values))

    def add_block(i: Int[Array, ""], carry: tuple[Rows, Array, Rows]) -> tuple[Rows, Array, Rows]:
        basis, projected, block = carry
        first = kept + i * k
        block = orthonormal_rows(basis, block / scale, jax.random.fold_in(key, i), problem.example)
        basis = jax.lax.dynamic_update_slice_in_dim(basis, block, first, 0)
        images = problem.product(block)
        columns = jnp.matmul(images, basis.T, precision="highest")  # zero for the rows to come
        projected = jax.lax.dynamic_update_slice_in_dim(projected, columns, first, 0)
        projected = jax.lax.dynamic_update_slice_in_dim(projected, columns.T, first, 1)
        return basis, projected, images

    basis, projected, _ = jax.lax.fori_loop(0, problem.num_blocks, add_block, (basis, projected, state.residuals))
    return _ritz(problem, basis, projected, kept, state.step + 1)


def _ritz(problem: _Problem, basis: Rows, projected: Array, kept: int, step: ArrayLike) -> _State:
    """The wanted Ritz pairs of a basis with ``projected = Q' A Q``, and their residuals."""
    finite = jnp.all(jnp.isfinite(projected))
    values, coordinates = jnp.linalg.eigh(jnp.where(finite, projected, 0))
    values = jnp.where(finite, values, jnp.nan)
    keys = {"LA": -values, "SA": values, "LM": -jnp.abs(values)}[problem.which]
    order = jnp.argsort(keys)[:kept]
    vectors = jnp.matmul(coordinates[:, order].T, basis, precision="highest")
    values, size = values[order], jnp.max(jnp.abs(values))
    wanted = vectors[: problem.k]
    residuals = problem.product(wanted) - values[: problem.k, None] * wanted
    norms = jax.vmap(norm)(residuals)
    none = jnp.zeros_like(size, jnp.int32)
    return _State(values, vectors, residuals, norms, size, none + jnp.asarray(step, jnp.int32), jnp.max(norms), none)
