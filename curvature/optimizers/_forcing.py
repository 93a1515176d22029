"""Forcing terms: the residual at which the iterative solution of a Newton system is accepted."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from curvature._types import Scalar, Vector
from curvature.optimizers._method import Local

_FORCING = 0.5  # the loosest relative residual: N&W (7.3)


class Inner(NamedTuple):
    """The gradient to an exact scaling, within which no square leaves the range, and when the iteration ends."""

    exponent: Int[Array, ""]
    gradient: Vector
    tolerance: Scalar
    limit: Int[Array, ""]


def inner_solve(local: Local, size: Scalar, first: Scalar, max_inner_steps: int | None) -> Inner:
    """A solve to a residual that falls with the gradient, so that the steps converge superlinearly.

    ``size`` is the norm of the gradient, ``first`` that of the first one.
    """
    forcing = forcing_term(first, size)
    limit = jnp.asarray(2 * local.x.size + 10 if max_inner_steps is None else max_inner_steps, jnp.int32)
    exponent = jnp.frexp(size)[1]
    return Inner(exponent, jnp.ldexp(local.grad, -exponent), forcing * jnp.ldexp(size, -exponent), limit)


def forcing_term(first: Scalar, size: Scalar) -> Scalar:
    """The relative residual that is good enough where the gradient is ``size``, and was ``first`` at the start."""
    return jnp.minimum(_FORCING, jnp.sqrt(size / jnp.where(first > 0, first, 1)))


def first_norm(first: Scalar, size: Scalar) -> Scalar:
    """The norm of the first gradient that can serve as a measure; ``first`` is 0 until there was one."""
    usable = jnp.isfinite(size) & (size > 0)
    return jnp.where((first > 0) | ~usable, first, size)
