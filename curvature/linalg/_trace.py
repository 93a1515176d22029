"""Stochastic trace and diagonal estimators (Hutchinson, Hutch++) with standard errors."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature import _checks, _trees
from curvature._errors import caller, public
from curvature._numerics import dot, exponent_of, matmul
from curvature._trees import ravel
from curvature._types import ChunkSize, Tree, Vector
from curvature.linalg._host_loop import call_solver
from curvature.linalg._lanczos import orthogonal_to
from curvature.linalg._linear_system import product_on_vectors
from curvature.operators._base import LinearOperator
from curvature.transforms import _chunks
from curvature.transforms._chunks import sum_over_chunks, vmap

Key = Array
"""A random key, typed or raw."""

TraceMethod = Literal["hutchinson", "hutch++"]
"""Estimation by random probes only, or exactly on a subspace and by random probes on its complement."""


class Estimate(NamedTuple):
    """A stochastic estimate.

    Attributes:
        value: the estimate, an array or a tree of arrays.
        standard_error: the standard error, estimated from the spread of the samples and shaped like ``value``; 0 if the
            value is exact. It does not include rounding.
    """

    value: Tree
    standard_error: Tree


@public
def trace(
    op: LinearOperator,
    *,
    key: Key,
    num_samples: int = 32,
    method: TraceMethod = "hutchinson",
    chunk_size: ChunkSize = "auto",
) -> Estimate:
    """Estimate ``tr A = sum_i A[i, i]`` of a square operator from products with random probes ``w``.

    ``"hutchinson"`` is the mean of ``w' A w`` over k probes of random signs; its variance for a symmetric ``A`` is
    ``(2/k) sum_(i != j) A[i, j]^2``. ``"hutch++"`` computes the trace exactly on the range of ``A W`` for k probes
    ``W``, and estimates the trace on the complement from k new probes. If the eigenvalues decay, its error decays with
    them instead of as ``1/sqrt(k)``, and it is exact for an operator of rank at most k. For a flat spectrum it has no
    advantage.

    Both estimates are unbiased, and so are their derivatives; ``A`` need not be symmetric.

    Args:
        op: a square operator.
        key: a random key; the same key gives the same answer.
        num_samples: the number k of probes, at least 2.
        method: ``"hutchinson"`` or ``"hutch++"``, as above.
        chunk_size: the number of products that run at once; see ``vmap``.

    Returns:
        An ``Estimate`` of scalars. With few probes the standard error is itself a rough estimate.

    Raises:
        TypeError: if ``op`` is not an operator or ``key`` not a random key.
        ValueError: for an operator that is not square, an unknown method or fewer than 2 samples.

    Cost: one linearization; k products for ``"hutchinson"`` and memory for the probes of a chunk; ``3 k`` products and
        memory for ``3 k`` vectors for ``"hutch++"``, which takes the n products of the exact diagonal instead if
        ``n <= 3 k``. With ``batches=`` the products of a chunk share one pass over the batches.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> op = curvature.HessianOperator(lambda x: x[0] ** 2 + 3 * x[1] ** 2, jnp.ones(2))
        >>> curvature.trace(op, key=jax.random.key(0), method="hutch++")
        Estimate(value=Array(8., dtype=float32), standard_error=Array(0., dtype=float32))

    References: Hutchinson, doi:10.1080/03610919008812866. Meyer, Musco, Musco and Woodruff, Hutch++, arXiv:2010.09649,
        algorithm 1.
    """
    _checks.check_key(key)
    _checks.check_static_count("num_samples", num_samples, 2)
    _checks.check_choice("method", method, TraceMethod)
    _checks.check_chunk_size(chunk_size)
    return call_solver(_trace, op, key, num_samples=num_samples, method=method, chunk_size=chunk_size)


def _trace(op: LinearOperator, key: Key, num_samples: int, method: TraceMethod, chunk_size: ChunkSize) -> Estimate:
    _checks.check_square_operator(op)
    n = _trees.num_entries(op.in_structure())
    if method == "hutch++" and 3 * num_samples >= n:
        return exactly(jnp.sum(ravel(op.diagonal(chunk_size))[0]))
    product, _, like = product_on_vectors(op)
    if method == "hutch++":
        return _deflated_trace(vmap(product, chunk_size=chunk_size), key, num_samples, like)

    def sample(key: Key) -> Array:
        probe = signs(key, like)
        return dot(probe, product(probe))

    return mean_of(vmap(sample, chunk_size=chunk_size)(jax.random.split(key, num_samples)))


@public
def diagonal(
    op: LinearOperator, *, key: Key | None = None, num_samples: int | None = None, chunk_size: ChunkSize = "auto"
) -> Estimate:
    """The diagonal ``A[i, i]`` of a square operator: exact, or with a key estimated from random signs ``w``.

    The estimate is the mean of ``w * (A w)`` over k probes. The variance of its i-th entry is
    ``(1/k) sum_(j != i) A[i, j]^2``, which is small if the diagonal dominates.

    Args:
        op: a square operator.
        key: a random key, or None for the exact diagonal.
        num_samples: the number k of probes, at least 2; None is 32. Only with a key.
        chunk_size: the number of products that run at once; see ``vmap``.

    Returns:
        An ``Estimate`` of trees shaped like the argument of ``op``, with a standard error for each entry.

    Raises:
        TypeError: if ``op`` is not an operator or ``key`` not a random key.
        ValueError: for an operator that is not square, fewer than 2 samples, or samples without a key.

    Cost: one linearization; n products without a key or for k >= n, which are exact; else k products. Memory: three
        vectors and the probes of one chunk. With ``batches=`` the products of a chunk share one pass over the batches.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> op = curvature.HessianOperator(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 2.0]))
        >>> curvature.diagonal(op).value
        Array([4., 0.], dtype=float32)

    References: Bekas, Kokiopoulou and Saad, An estimator for the diagonal of a matrix (2007),
        doi:10.1016/j.apnum.2007.01.003.
    """
    _checks.check_chunk_size(chunk_size)
    if key is None and num_samples is not None:
        raise ValueError(
            f"{caller()}: num_samples= without key=; give a key to estimate, or neither for the exact answer."
        )
    num_samples = 32 if num_samples is None else num_samples
    if key is not None:
        _checks.check_key(key)
        _checks.check_static_count("num_samples", num_samples, 2)
    return call_solver(_diagonal, op, key, num_samples=num_samples, chunk_size=chunk_size)


def _diagonal(op: LinearOperator, key: Key | None, num_samples: int, chunk_size: ChunkSize) -> Estimate:
    _checks.check_square_operator(op)
    if key is None:
        return exactly(op.diagonal(chunk_size))
    product, unravel, like = product_on_vectors(op)
    if num_samples >= like.size:
        return exactly(op.diagonal(chunk_size))
    value, error = _mean_diagonal(product, jax.random.split(key, num_samples), like, chunk_size)
    return Estimate(unravel(value), unravel(error))


def signs(key: Key, like: Vector) -> Vector:
    """A probe of random signs, which varies over a mesh if ``like``, a vector of zeros, does."""
    return jax.random.rademacher(key, like.shape, like.dtype) + like


def exactly(value: Tree) -> Estimate:
    """An exact value as an ``Estimate``."""
    return Estimate(value, jax.tree.map(jnp.zeros_like, value))


def mean_of(samples: Float[Array, "k *shape"]) -> Estimate:
    """The mean over the leading axis and its standard error, safe from underflow of the squares."""
    k = samples.shape[0]
    mean = jnp.mean(samples, 0)
    deviations = samples - mean[None]
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(deviations), 0))
    unit = jnp.where(largest == 0, 1, largest)
    variance = jnp.sum((deviations / unit[None]) ** 2, 0) / (k - 1)
    return Estimate(mean, jax.lax.stop_gradient(unit * jnp.sqrt(variance / k)))


def _mean_diagonal(
    product: Callable[[Vector], Vector], keys: Key, like: Vector, chunk_size: ChunkSize
) -> tuple[Vector, Vector]:
    """The mean of ``w * (A w)`` and its standard error, from sums of deviations from the first sample."""

    def sample(key: Key) -> Vector:
        probe = signs(key, like)
        return probe * product(probe)

    first = sample(keys[0])
    exponent = jax.lax.stop_gradient(exponent_of(first))

    def sums(keys: Key, weights: Vector) -> tuple[Vector, Vector]:
        deviations = jnp.ldexp(jax.vmap(sample)(keys) - first[None], -exponent)  # no square underflows
        squares = jax.lax.stop_gradient(deviations) ** 2
        totals = matmul(weights, jnp.stack([deviations, squares]))
        return totals[0], totals[1]

    k = keys.shape[0]
    chunks = _chunks.num_chunks(k - 1, chunk_size, sample, lambda: keys[0])
    total, squares = sum_over_chunks(sums, keys[1:], chunks, like.dtype)
    variance = jnp.maximum(squares - jax.lax.stop_gradient(total) ** 2 / k, 0) / (k - 1)
    return first + jnp.ldexp(total / k, exponent), jnp.ldexp(jnp.sqrt(variance / k), exponent)


def _deflated_trace(products: Callable[[Array], Array], key: Key, num_samples: int, like: Vector) -> Estimate:
    """Hutch++: the trace on the range of ``A W`` exactly, and on the complement by new, independent probes."""
    probes = jax.vmap(lambda key: signs(key, like))(jax.random.split(key, 2 * num_samples))
    # The range is constant under differentiation: the estimate is unbiased for every fixed range.
    sketch = jax.lax.stop_gradient(products(probes[:num_samples]))
    basis = jnp.linalg.qr(jnp.ldexp(sketch, -exponent_of(sketch.reshape(-1))).T)[0].T
    complement = orthogonal_to(basis, probes[num_samples:])
    trace_on_range = jnp.sum(basis * products(basis))
    return mean_of(trace_on_range + jnp.sum(complement * products(complement), axis=1))
