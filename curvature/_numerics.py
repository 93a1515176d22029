"""Numerically safe vector operations: norm, dot product, division, rounding level."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from curvature._types import Scalar, Vector


def norm(vector: Vector) -> Scalar:
    """The Euclidean norm, safe from overflow and underflow of the squares.

    The entries are divided by the largest of them, clamped to numbers whose squares neither overflow nor underflow. The
    limits leave a factor for another divisor: XLA computes ``(vector / scale) / unit`` as ``vector / (scale * unit)``,
    which must not be ``0 / 0``.
    """
    limits = jnp.finfo(vector.dtype)
    smallest = limits.tiny**0.5 * limits.eps**0.5
    unit = jax.lax.clamp(smallest, jnp.max(jnp.abs(vector)), 1 / smallest)  # NaN stays NaN
    return unit * jnp.sqrt(jnp.sum((vector / unit) ** 2))


def exponent_of(vector: Vector) -> Int[Array, ""]:
    """The exponent of a power of two that bounds the entries; scaling by a power of two is exact."""
    return jnp.frexp(jnp.max(jnp.abs(vector)))[1]


def divide_or_zero(a: Vector, b: Vector) -> Vector:
    """``a / b``, and 0 where ``b`` is not positive. Precondition: ``b >= 0``, and ``a`` is 0 where ``b`` is."""
    return jnp.where(b > 0, a / b, 0)


def rounding_level(eigenvalues: Vector) -> Scalar:
    """The rounding error of the eigenvalues of a symmetric matrix: a smaller eigenvalue may be zero."""
    return eigenvalues.size * jnp.finfo(eigenvalues.dtype).eps * jnp.max(jnp.abs(eigenvalues))


def matmul(a: Array, b: Array) -> Array:
    """The product of matrices, at the highest precision of the device."""
    return jnp.matmul(a, b, precision="highest")


def dot(a: Vector, b: Vector) -> Scalar:
    """The inner product, at the highest precision of the device."""
    return jnp.vdot(a, b, precision="highest")
