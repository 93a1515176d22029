"""A curve through data, and how certain its parameters are."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from curvature import _checks
from curvature._compile_cache import compiled
from curvature._errors import caller, describe, is_array_like, public
from curvature._types import Scalar, Tree
from curvature.optimizers._robust import Loss
from curvature.solvers._least_squares import check_limits, run, run_in_two
from curvature.solvers._limits import Limits


@public
def curve_fit(
    model: Callable[..., Array],
    xdata: Tree,
    ydata: ArrayLike,
    p0: Tree,
    *,
    loss: Loss = "linear",
    f_scale: ArrayLike = 1.0,
    max_steps: ArrayLike = 10_000,
) -> tuple[Tree, Float[Array, "n n"]]:
    """Fit ``model(params, xdata)`` to ``ydata`` by least squares: the parameters and their covariance.

    ``least_squares`` on the residuals ``model(params, xdata) - ydata``, for errors of equal size: divide both by the
    standard deviations where they differ. A fit that has not converged has a covariance of NaN; ``least_squares`` says
    why.

    Args:
        model: the predictions, shaped like ``ydata``.
        xdata: what ``model`` takes beside the parameters, any tree of arrays.
        ydata: the observations.
        p0: the first guess of the parameters, any tree of floating arrays.
        loss: as in ``least_squares``.
        f_scale: as in ``least_squares``.
        max_steps: the most steps.

    Returns:
        ``(params, covariance)``: the parameters, shaped like ``p0``, and the n x n matrix ``s^2 (J'J)^-1`` in the order
        of ``ravel_pytree(p0)``, see ``LeastSquaresResult.covariance``. As in SciPy all of it is infinite where the data
        leave a direction undetermined; ``least_squares`` shows which variables that concerns.

    Raises:
        TypeError: when ``model`` is not callable, or a leaf of ``p0`` or ``ydata`` not of a real floating dtype.
        ValueError: when ``model`` returns another shape than that of ``ydata``, or as ``least_squares``.

    Cost: as ``least_squares``; compiled once for each model and shape.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> t, y = jnp.arange(5.0), jnp.array([1.1, 2.9, 5.2, 6.8, 9.1])
        >>> params, covariance = curvature.curve_fit(lambda p, t: p[0] + p[1] * t, t, y, jnp.zeros(2))
        >>> jnp.round(params, 2), jnp.round(covariance, 4)
        (Array([1.04, 1.99], dtype=float32), Array([[ 0.0214, -0.0071],
               [-0.0071,  0.0036]], dtype=float32))
    """
    _checks.check_callable("model", model)
    ydata = _check_observations(ydata)
    p0 = _checks.check_start("p0", p0)
    _checks.check_data((xdata,))
    operands = p0, xdata, ydata, *check_limits(p0, loss, f_scale, None, 0.0, max_steps)
    return run_in_two(compiled(_fit, model, (p0, xdata, ydata)), operands, loss=loss)


def _fit(
    model: Callable[..., Array],
    p0: Tree,
    xdata: Tree,
    ydata: Array,
    limits: Limits,
    f_scale: Scalar,
    resumed: Any,
    *,
    loss: Loss,
    deferred: bool,
) -> tuple[tuple[Tree, Float[Array, "n n"]], Any]:
    def residuals(params: Tree, xdata: Tree, ydata: Array) -> Array:
        predictions = model(params, xdata)
        _check_predictions(predictions, ydata)
        return predictions - ydata

    how: dict[str, Any] = {"method": "levenberg-marquardt", "loss": loss, "deferred": deferred}
    fit, loop = run(residuals, p0, (xdata, ydata), limits, f_scale, resumed, **how)
    covariance = fit.covariance()
    covariance = jnp.where(jnp.any(jnp.isinf(covariance)), jnp.inf, covariance)
    return (fit.x, jnp.where(fit.success, covariance, jnp.nan)), loop


def _check_observations(ydata: Any) -> jax.Array:
    """``ydata`` as a floating array."""
    if not is_array_like(ydata) or not jnp.issubdtype(jnp.result_type(ydata), jnp.floating):
        what = f"of dtype {jnp.result_type(ydata)}" if is_array_like(ydata) else describe(ydata)
        raise TypeError(f"{caller()}: ydata is {what}, expected an array of floats.")
    return jnp.asarray(ydata)


def _check_predictions(predictions: Any, ydata: jax.Array) -> None:
    """Refuse predictions whose shape is not that of the observations: subtraction would broadcast them."""
    shape = getattr(predictions, "shape", None)
    if shape != ydata.shape:
        what = describe(predictions) if shape is None else f"shape {shape}"
        raise ValueError(f"{caller()}: model returns {what}, expected shape {ydata.shape} to match ydata.")
