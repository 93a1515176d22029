"""Robust losses and their reweighted least-squares form."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature._numerics import dot
from curvature._types import Scalar

Loss = Literal["linear", "soft_l1", "huber", "cauchy", "arctan"]
Residual = Float[Array, " m"]

_LEAST_CURVATURE = 0.1  # of a row, relative to its slope: beyond the inflection of a loss its curvature is negative


def _huber(z: Residual) -> Residual:
    outside = z > 1
    return jnp.where(outside, 2 * jnp.sqrt(jnp.where(outside, z, 1)) - 1, z)


LOSSES: dict[str, Callable[[Residual], Residual]] = {
    "linear": lambda z: z,
    "soft_l1": lambda z: 2 * z / (jnp.sqrt(1 + z) + 1),  # 2 (sqrt(1 + z) - 1) without its cancellation
    "huber": _huber,
    "cauchy": jnp.log1p,
    "arctan": jnp.arctan,
}


class Weighted(NamedTuple):
    """What a robust loss makes of residuals: ``J' diag(weights) residual`` is the gradient of its sum."""

    value: Scalar  # scale^2 sum rho(r^2 / scale^2) / 2
    weights: Residual  # the square roots of the curvatures, by which the rows of the Jacobian are multiplied
    residual: Residual
    slope: Residual  # rho'
    excess: Residual | None  # the curvature less the square of the weight, where that is not zero throughout


def half_sum(residual: Residual, loss: str, scale: Scalar) -> Scalar:
    """``scale^2 sum rho(r^2 / scale^2) / 2``."""
    if loss == "linear":
        return dot(residual, residual) / 2
    return scale**2 * jnp.sum(LOSSES[loss]((residual / scale) ** 2)) / 2


def weigh(residual: Residual, loss: str, scale: Scalar) -> Weighted:
    """The sum, and the residuals and row weights whose squares have its gradient and nearly its curvature.

    With ``z = (r / scale)^2`` the gradient of a row is ``rho' r`` times its derivative, and the curvature
    ``rho' + 2 z rho''``, kept above a tenth of ``rho'``.

    References: Triggs, McLauchlan, Hartley and Fitzgibbon, Bundle adjustment (2000), section 4.3,
        doi:10.1007/3-540-44480-7_21.
    """
    value = half_sum(residual, loss, scale)
    if loss == "linear":
        return Weighted(value, jnp.ones_like(residual), residual, jnp.ones_like(residual), None)
    z = (residual / scale) ** 2
    ones = jnp.ones_like(z)

    def slope_of(z: Residual) -> Residual:
        return jax.jvp(LOSSES[loss], (z,), (ones,))[1]

    slope, bend = jax.jvp(slope_of, (z,), (ones,))
    curvature, least = slope + 2 * z * bend, _LEAST_CURVATURE * slope
    raised = jnp.where(curvature > least, curvature, least)  # of a NaN, where z is too large, the least
    flat = raised == 0
    weights = jnp.where(flat, 0, jnp.sqrt(jnp.where(flat, 1, raised)))
    excess = jnp.where(curvature <= least, curvature - least, 0)
    return Weighted(value, weights, residual * slope / jnp.where(flat, 1, weights), slope, excess)
