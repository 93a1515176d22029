"""Stochastic Lanczos quadrature: ``logdet`` and ``spectral_density`` of a symmetric operator."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from curvature import _checks, _trees
from curvature._errors import caller, describe, public
from curvature._numerics import dot, matmul
from curvature._types import ChunkSize, Vector
from curvature.linalg._host_loop import call_solver
from curvature.linalg._lanczos import tridiagonalize
from curvature.linalg._linear_system import product_on_vectors
from curvature.linalg._trace import Estimate, Key, exactly, mean_of, signs
from curvature.operators._base import LinearOperator
from curvature.transforms._chunks import vmap

_DENSE = 1024  # Heuristic: up to this size the eigenvalues of the matrix take seconds at most
_GRID = 1024
_MARGIN = 8  # widths from the outermost Ritz values to the ends of the grid: 1e-15 of a Gaussian lies beyond


class SpectralDensity(NamedTuple):
    """A smoothed spectral density and its quadrature rules, for p points, k probes and m steps.

    Attributes:
        grid: the points, in increasing order unless passed by the caller.
        density: the share of the eigenvalues per unit length at each point; it integrates to 1 over the whole line.
        standard_error: the standard error of the density, from the spread over the probes.
        ritz_values: the nodes of the quadrature rule of each probe.
        weights: the weights of the nodes, which sum to 1 for each probe. If the Krylov space of a probe is exhausted,
            the weights of further nodes are 0.
    """

    grid: Float[Array, " p"]
    density: Float[Array, " p"]
    standard_error: Float[Array, " p"]
    ritz_values: Float[Array, "k m"]
    weights: Float[Array, "k m"]


@public
def logdet(
    op: LinearOperator,
    *,
    key: Key,
    num_samples: int = 32,
    num_steps: int = 64,
    chunk_size: ChunkSize = "auto",
) -> Estimate:
    """Estimate ``log det A = tr log A`` of a symmetric positive definite operator.

    Each of k probes of random signs ``w`` gives ``w' log(A) w`` by the Gauss quadrature of m Lanczos steps with full
    reorthogonalization. The standard error combines, as the root of the sum of squares, the spread over the probes and
    an estimate of the quadrature error. Heuristic: that estimate is the change of the quadrature over the last half of
    the steps, which is cautious. A matrix with at most 1024 columns, and at most ``k m``, is formed instead and its
    eigenvalues are computed.

    Value and error are NaN if ``A`` is found not to be positive definite: if an eigenvalue or Ritz value is below
    ``sqrt(n or m) * eps`` times the largest. Add ``damping`` to an operator that is only semidefinite. In a large
    spectrum, a few small negative eigenvalues may remain undetected after m steps.

    The derivative estimates ``tr(A^-1 dA)`` with the same probes.

    Args:
        op: an operator with ``is_symmetric``.
        key: a random key; the same key gives the same answer.
        num_samples: the number k of probes, at least 2.
        num_steps: the number m of Lanczos steps per probe, at least 2; ill-conditioned operators need more.
        chunk_size: the number of probes that run at once; see ``vmap``.

    Returns:
        An ``Estimate`` of scalars.

    Raises:
        TypeError: if ``op`` is not an operator or ``key`` not a random key.
        ValueError: for an operator that is not square or not known to be symmetric, or a number below 2.

    Cost: one linearization and ``k (m + 1)`` products, or n products and an eigendecomposition. Memory: the m Lanczos
        vectors of each probe of a chunk. With ``batches=`` the probes of a chunk share m + 1 passes over the batches.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> op = curvature.HessianOperator(lambda x: x[0] ** 2 + 3 * x[1] ** 2, jnp.ones(2))
        >>> float(curvature.logdet(op, key=jax.random.key(0)).value)  # log(2 * 6)
        2.4849

    References: Ubaru, Chen and Saad, Fast estimation of tr(f(A)) via stochastic Lanczos quadrature (2017),
        doi:10.1137/16M1104974, algorithm 1.
    """
    _checks.check_key(key)
    _checks.check_static_count("num_samples", num_samples, 2)
    _checks.check_static_count("num_steps", num_steps, 2)
    _checks.check_chunk_size(chunk_size)
    return call_solver(_logdet, op, key, num_samples=num_samples, num_steps=num_steps, chunk_size=chunk_size)


def _logdet(op: LinearOperator, key: Key, num_samples: int, num_steps: int, chunk_size: ChunkSize) -> Estimate:
    _checks.check_square_operator(op, symmetric=True)
    n = _trees.num_entries(op.in_structure())
    if n <= min(num_samples * num_steps, _DENSE):
        matrix = op.as_matrix(chunk_size)
        return exactly(jnp.sum(_logarithms(jnp.linalg.eigvalsh((matrix + matrix.T) / 2))))
    product, _, like = product_on_vectors(op)
    steps = min(num_steps, n)

    def sample(keys: Key) -> tuple[Array, Array]:
        return _quadratic_log(product, signs(keys[0], like), keys[1], steps)

    values, changes = vmap(sample, chunk_size=chunk_size)(jax.random.split(key, (num_samples, 2)))
    estimate = mean_of(values)
    return Estimate(estimate.value, jnp.hypot(estimate.standard_error, jnp.mean(changes)))


@public
def spectral_density(
    op: LinearOperator,
    *,
    key: Key,
    num_samples: int = 16,
    num_steps: int = 64,
    grid: Float[Array, " p"] | None = None,
    width: ArrayLike | None = None,
    chunk_size: ChunkSize = "auto",
) -> SpectralDensity:
    """Estimate the density of the eigenvalues ``l_i`` of a symmetric operator, smoothed by a Gaussian.

    ``density(t) = (1/n) sum_i g(t - l_i)`` with ``g`` the normal density of standard deviation ``width``. Each of k
    probes of random signs estimates it by the Gauss quadrature of m Lanczos steps with full reorthogonalization: the
    nodes are the eigenvalues of the tridiagonal matrix, the weights the squared first components of its eigenvectors.

    Args:
        op: an operator with ``is_symmetric``.
        key: a random key; the same key gives the same answer.
        num_samples: the number k of probes, at least 2.
        num_steps: the number m of Lanczos steps per probe.
        grid: the points at which to evaluate the density; None is 1024 points (4 per step, if more) from 8 widths below
            the smallest Ritz value to 8 above the largest.
        width: the standard deviation of ``g``; None is the range of the Ritz values over m, about the finest detail
            that m steps resolve. A smaller width shows single Ritz values, which the standard error does not account
            for, and may require a finer grid.
        chunk_size: the number of probes that run at once; see ``vmap``.

    Returns:
        A ``SpectralDensity``. NaN in the products of the operator gives NaN.

    Raises:
        TypeError: if ``op`` is not an operator or ``key`` not a random key.
        ValueError: for an operator that is not square or not known to be symmetric, or a number or grid out of range.

    Cost: one linearization and ``k m`` products. Memory: the m Lanczos vectors of each probe of a chunk. With
        ``batches=`` the probes of a chunk share m passes over the batches.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> op = curvature.HessianOperator(lambda x: jnp.sum(x**2), jnp.ones(3))
        >>> spectrum = curvature.spectral_density(op, key=jax.random.key(0))
        >>> float(spectrum.grid[jnp.argmax(spectrum.density)])
        2.00
        >>> float(jnp.trapezoid(spectrum.density, spectrum.grid))
        1.000

    References: Ubaru, Chen and Saad (2017), doi:10.1137/16M1104974. Ghorbani, Krishnan and Xiao, An investigation into
        neural net optimization via Hessian eigenvalue density, arXiv:1901.10159, section 2.
    """
    _checks.check_key(key)
    _checks.check_static_count("num_samples", num_samples, 2)
    _checks.check_static_count("num_steps", num_steps, 1)
    _checks.check_chunk_size(chunk_size)
    if grid is not None:
        dtype = getattr(grid, "dtype", None)
        if dtype is None or jnp.ndim(grid) != 1 or not jnp.issubdtype(dtype, jnp.floating):
            came = describe(grid)
            raise ValueError(f"{caller()}: grid is {came}, expected a vector of floats such as jnp.linspace.")
    if width is not None:
        _checks.check_positive("width", width)
        width = jnp.asarray(width)
    how = {"num_samples": num_samples, "num_steps": num_steps, "chunk_size": chunk_size}
    return call_solver(_spectral_density, op, key, grid, width, **how)


def _spectral_density(
    op: LinearOperator,
    key: Key,
    grid: Array | None,
    width: Array | None,
    num_samples: int,
    num_steps: int,
    chunk_size: ChunkSize,
) -> SpectralDensity:
    _checks.check_square_operator(op, symmetric=True)
    product, _, like = product_on_vectors(op)
    steps = min(num_steps, like.size)

    def quadrature(keys: Key) -> tuple[Array, Array]:
        found = tridiagonalize(product, _unit(signs(keys[0], like)), keys[1], steps)
        nodes, vectors = jnp.linalg.eigh(_tridiagonal(found.diagonal, found.off_diagonal))
        return nodes, vectors[0] ** 2

    nodes, weights = vmap(quadrature, chunk_size=chunk_size)(jax.random.split(key, (num_samples, 2)))
    least, largest = jnp.min(nodes), jnp.max(nodes)
    if width is None:
        # The range over the number of steps; for a range within rounding, the finest width that the grid resolves.
        size = jnp.maximum(jnp.abs(least), jnp.abs(largest))
        sigma = jnp.maximum((largest - least) / steps, 1000 * jnp.finfo(size.dtype).eps * size)
        sigma = jnp.where(sigma == 0, 1, sigma)
    else:
        sigma = jnp.asarray(width, nodes.dtype)
    if grid is None:
        grid = jnp.linspace(least - _MARGIN * sigma, largest + _MARGIN * sigma, max(_GRID, 4 * steps))
    points = grid.astype(nodes.dtype)

    def density(nodes: Array, weights: Array) -> Array:
        bumps = jax.scipy.stats.norm.pdf((points[:, None] - nodes[None]) / sigma)
        return matmul(bumps, weights) / sigma

    densities = mean_of(vmap(density, chunk_size=chunk_size)(nodes, weights))
    return SpectralDensity(points, densities.value, densities.standard_error, nodes, weights)


def _quadratic_log(product: Callable[[Vector], Vector], probe: Vector, key: Key, steps: int) -> tuple[Array, Array]:
    """``w' log(A) w`` by Gauss quadrature, and its change over the last half of the steps."""
    start, fixed, half = _unit(probe), jax.lax.stop_gradient, steps // 2
    found = tridiagonalize(lambda v: fixed(product(v)), start, key, steps)
    # The rule of half the steps is that of T with its second half decoupled, whose nodes have weight 0. One eigh takes
    # both matrices: two batched eigh at once can deadlock in a small thread pool of XLA.
    half_diagonal = jnp.where(jnp.arange(steps) < half, found.diagonal, found.diagonal[0])
    half_off_diagonal = jnp.where(jnp.arange(steps - 1) < half - 1, found.off_diagonal, 0)
    both = jnp.stack([_tridiagonal(found.diagonal, found.off_diagonal), _tridiagonal(half_diagonal, half_off_diagonal)])
    (nodes, half_nodes), (vectors, half_vectors) = jnp.linalg.eigh(both)
    value = jnp.sum(vectors[0] ** 2 * _logarithms(nodes))
    change = jnp.sum(half_vectors[0] ** 2 * _logarithms(half_nodes)) - value

    # The derivative is w' A^-1 dA w; on the Krylov space the inverse is Q T^-1 Q'.
    inverse = matmul(matmul(vectors, vectors[0] / nodes), found.basis)
    image = product(start)
    value = value + dot(inverse, image - fixed(image))
    return probe.size * value, probe.size * change


def _logarithms(eigenvalues: Vector) -> Vector:
    """The logarithms of the eigenvalues; all are NaN if the smallest eigenvalue is not positive beyond rounding."""
    noise = eigenvalues.size**0.5 * jnp.finfo(eigenvalues.dtype).eps * jnp.max(jnp.abs(eigenvalues))
    positive = jnp.min(eigenvalues) > noise
    return jnp.where(positive, jnp.log(jnp.where(positive, eigenvalues, 1)), jnp.nan)


def _tridiagonal(diagonal: Float[Array, " m"], off_diagonal: Float[Array, " m-1"]) -> Float[Array, "m m"]:
    upper = jnp.diag(off_diagonal, 1)
    return jnp.diag(diagonal) + upper + upper.T


def _unit(probe: Vector) -> Vector:
    """A probe of signs, normalized."""
    return probe / jnp.sqrt(jnp.asarray(probe.size, probe.dtype))
