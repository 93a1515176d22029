"""What a fit by least squares found, and how certain it is."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, Int

from curvature._types import Status, Tree, messages_of


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LeastSquaresResult:
    """The result of ``least_squares``. Under ``vmap`` every field has a leading axis of lanes.

    Attributes:
        x: the best point: the one that passed the convergence test or, on failure, the lowest one seen.
        value: half the sum of squares at ``x``, or of what ``loss`` makes of them.
        residuals: the residuals at ``x``, as ``residuals(x, *args)`` returns them.
        grad: the gradient of ``value``, shaped like ``x``.
        num_steps: how many steps the method took.
        status: a ``Status`` as an integer array.
        inverse_root: a matrix ``B`` with ``B B' = (J'J)^-1``, its rows in the order of ``ravel_pytree(x)``; None where
            the Jacobian was not formed.
        degrees_of_freedom: the number of residuals less the number of variables.
    """

    x: Tree
    value: Float[Array, "*lanes"]
    residuals: Tree
    grad: Tree
    num_steps: Int[Array, "*lanes"]
    status: Int[Array, "*lanes"]
    inverse_root: Float[Array, "*lanes n k"] | None
    degrees_of_freedom: int = field(metadata={"static": True})

    @property
    def success(self) -> Bool[Array, "*lanes"]:
        """Whether the test that ``least_squares`` states holds at ``x``."""
        return self.status == Status.CONVERGED

    @property
    def message(self) -> str | list[Any]:
        """The sentence of the status; nested lists of sentences for many lanes. Not available while tracing."""
        return messages_of(self.status)

    def covariance(self) -> Float[Array, "*lanes n n"]:
        """The covariance of the estimate, ``s^2 (J'J)^-1`` with ``s^2 = 2 value / (m - n)``.

        For m residuals of equal and independent errors and n variables, to first order; rows and columns in the order
        of ``ravel_pytree(x)``. With a robust loss ``J`` has its rows weighted, as in SciPy's ``curve_fit``. What
        involves a variable that the residuals do not determine is infinite, and all is where ``m <= n``.
        """
        root = _require_inverse_root(self.inverse_root)
        scaled = self._deviation()[..., None, None] * jnp.where(jnp.isfinite(root), root, 0)
        product = jnp.matmul(scaled, jnp.swapaxes(scaled, -1, -2), precision="highest")
        undetermined = jnp.any(jnp.isinf(root), axis=-1)
        infinite = undetermined[..., :, None] | undetermined[..., None, :] | (self.degrees_of_freedom <= 0)
        return jnp.where(infinite, jnp.inf, product)

    def standard_errors(self) -> Tree:
        """The roots of the diagonal of ``covariance()``, shaped like ``x``."""
        root = _require_inverse_root(self.inverse_root)
        undetermined = jnp.any(jnp.isinf(root), axis=-1)
        root = jnp.where(undetermined[..., None], 1, root)  # an infinite norm would have a derivative of NaN
        largest = jnp.max(jnp.abs(root), axis=-1, keepdims=True)
        divisor = jnp.where(largest > 0, largest, 1)
        errors = self._deviation()[..., None] * jnp.linalg.norm(root / divisor, axis=-1) * divisor[..., 0]
        errors = jnp.where(undetermined | (self.degrees_of_freedom <= 0), jnp.inf, errors)
        lane = jax.tree.map(lambda leaf: leaf[(0,) * (self.status.ndim)], self.x)
        unravel = ravel_pytree(lane)[1]
        for _ in range(self.status.ndim):
            unravel = jax.vmap(unravel)
        return unravel(errors)

    def _deviation(self) -> Float[Array, "*lanes"]:
        """The standard deviation ``s`` of a residual."""
        return jnp.sqrt(2 * self.value / max(self.degrees_of_freedom, 1))


def _require_inverse_root(root: Any) -> Any:
    """The square root of the covariance; refuses None, as of a fit that never formed the Jacobian."""
    if root is None:
        raise ValueError(
            "LeastSquaresResult: covariance() needs the Jacobian, which this fit never formed; pass "
            "method=curvature.levenberg_marquardt() to least_squares, or form it with curvature.jacobian."
        )
    return root
