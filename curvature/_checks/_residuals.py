"""Input checks of least squares: residuals, observations, methods."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from curvature._checks._describe import describe, is_array_like
from curvature._checks._functions import check_floating_output
from curvature._checks._options import spelled
from curvature._errors import caller

T = TypeVar("T")


def check_residuals(out: Any) -> None:
    """Refuse residuals that are one scalar, have no derivative, or have no entries."""
    check_floating_output("residuals", out)
    leaves = jax.tree.leaves(out)
    if len(leaves) == 1 and leaves[0].shape == ():
        raise TypeError(
            f"{caller()}: residuals returns a scalar, expected the residuals themselves, of shape (m,) or a tree of "
            "arrays, whose squares are summed here; curvature.minimize takes scalar objectives."
        )
    if not sum(leaf.size for leaf in leaves):
        raise TypeError(f"{caller()}: residuals returns no entries, expected at least one number.")


def check_residual_method(method: Any, names: tuple[str, ...], is_ours: bool) -> Any:
    """The name that ``method`` spells, or (``is_ours``) ``method`` itself, a transformation that takes residuals."""
    name = spelled(method, names)
    if name not in names if isinstance(name, str) else not is_ours:
        raise ValueError(
            f"{caller()}: method={method!r} is unknown, expected one of {', '.join(map(repr, names))}, "
            "curvature.levenberg_marquardt(...) or curvature.gauss_newton(...)."
        )
    return name


def require_residuals(name: str, value: T | None) -> T:
    """``value``, a required extra argument of the ``update`` of a least-squares method; refuses None."""
    if value is None:
        raise ValueError(
            f"{caller()}: update() needs {name}=; call update(grad, state, params, residual_fn=residual_fn), where "
            "residual_fn(params) returns the residuals whose squares are summed."
        )
    return value


def check_observations(ydata: Any) -> jax.Array:
    """``ydata`` as a floating array."""
    if not is_array_like(ydata) or not jnp.issubdtype(jnp.result_type(ydata), jnp.floating):
        what = f"of dtype {jnp.result_type(ydata)}" if is_array_like(ydata) else describe(ydata)
        raise TypeError(f"{caller()}: ydata is {what}, expected an array of floats.")
    return jnp.asarray(ydata)


def check_predictions(predictions: Any, ydata: jax.Array) -> None:
    """Refuse predictions whose shape is not that of the observations: subtraction would broadcast them."""
    shape = getattr(predictions, "shape", None)
    if shape != ydata.shape:
        what = describe(predictions) if shape is None else f"shape {shape}"
        raise ValueError(f"{caller()}: model returns {what}, expected shape {ydata.shape} to match ydata.")


def require_inverse_root(root: T | None) -> T:
    """The square root of the covariance; refuses None, as of a fit that never formed the Jacobian."""
    if root is None:
        raise ValueError(
            "LeastSquaresResult: covariance() needs the Jacobian, which this fit never formed; pass "
            "method=curvature.levenberg_marquardt() to least_squares, or form it with curvature.jacobian."
        )
    return root
