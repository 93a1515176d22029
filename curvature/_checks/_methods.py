"""Input checks of optimizers and solvers: methods, bounds, residuals, arguments of an update."""

from collections.abc import Iterable
from typing import Any, Literal, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._checks._functions import check_floating_output
from curvature._errors import caller, describe, is_array_like
from curvature._types import Tree

T = TypeVar("T")

_REFUSALS = {
    "unknown": "is unknown, expected one of {} or an optax transformation such as curvature.newton() or optax.lbfgs()",
    "bounds": "takes no bounds; those that do are {}",
    "residuals": "is unknown, expected one of {}, curvature.levenberg_marquardt(...) or curvature.gauss_newton(...)",
}

_PAIR = (
    "a pair (lower, upper) of trees like x0, of numbers, or None; SciPy's Bounds are (bounds.lb, bounds.ub), its pairs "
    "an array of their lower ends and one of their upper ends"
)

_MOST_MASKED = 5  # in one message


def spelled(value: Any, names: Iterable[str]) -> Any:
    """The name that ``value`` spells, in any case, with ``_`` or nothing for ``-``; or else ``value`` itself."""

    def letters(word: str) -> str:
        return word.lower().replace("-", "").replace("_", "")

    return {letters(name): name for name in names}.get(letters(value), value) if isinstance(value, str) else value


def check_method(method: Any, names: tuple[str, ...], refusal: Literal["unknown", "bounds", "residuals"]) -> str:
    """The name that ``method`` spells; the caller has handled transformations."""
    name = spelled(method, names)
    if not (isinstance(name, str) and name in names):
        expected = _REFUSALS[refusal].format(", ".join(map(repr, names)))
        raise ValueError(f"{caller()}: method={method!r} {expected}.")
    return name


def check_hessian_used(method: Any, used: bool) -> None:
    """Refuse ``hessian=`` for a method that forms no Hessian and would ignore it."""
    if not used:
        raise ValueError(
            f"{caller()}: hessian= is for the methods that form a Hessian, 'newton', 'trust-exact' and 'cubic-newton'; "
            f"method={method!r} forms none."
        )


def check_pair_of_bounds(bounds: Any) -> tuple[Tree, Tree]:
    """Refuse anything but a pair of bounds."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"{caller()}: bounds is {describe(bounds)}, expected {_PAIR}.")
    return bounds[0], bounds[1]


def check_bound(name: str, bound: Any, unbounded: float, x_name: str, x: Tree) -> Tree:
    """``bound`` broadcast to the tree ``x``, in its dtypes; ``None`` anywhere is no bound."""
    try:
        full = jax.tree.broadcast(bound, x, is_leaf=lambda node: node is None)
    except ValueError:
        raise ValueError(
            f"{caller()}: {name} does not have the tree structure of {x_name}, nor that of a prefix of it. "
            f"Got {jax.tree.structure(bound)}, expected a number, None or {jax.tree.structure(x)}."
        ) from None
    leaves, structure = tree_flatten_with_path(full, is_leaf=lambda node: node is None)
    pairs = zip(leaves, jax.tree.leaves(x), strict=True)
    return structure.unflatten(
        [_bound_leaf(name, keystr(path), leaf, unbounded, x_name, x_leaf) for (path, leaf), x_leaf in pairs]
    )


def _bound_leaf(
    name: str, path: str, leaf: Any, unbounded: float, x_name: str, x_leaf: jax.Array
) -> jax.Array | np.ndarray:
    leaf = unbounded if leaf is None else leaf
    dtype = jnp.result_type(leaf) if is_array_like(leaf) else jnp.dtype(bool)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{caller()}: {name}{path} is {describe(leaf)}, expected an array of real numbers.")
    if jnp.shape(leaf) not in ((), x_leaf.shape):
        raise ValueError(
            f"{caller()}: {name}{path} has shape {jnp.shape(leaf)}, expected a number or {x_leaf.shape} to match "
            f"{x_name}{path}."
        )
    if isinstance(leaf, jax.Array):
        return jnp.broadcast_to(jnp.asarray(leaf, x_leaf.dtype), x_leaf.shape)
    return np.broadcast_to(np.asarray(leaf, x_leaf.dtype), x_leaf.shape)  # a number needs no kernel on the device


def check_order_of_bounds(lower: Tree, upper: Tree) -> None:
    """Refuse bounds with no finite number between them, where the values are known."""
    for (path, low), high in zip(tree_flatten_with_path(lower)[0], jax.tree.leaves(upper), strict=True):
        if any(isinstance(leaf, Tracer) or not getattr(leaf, "is_fully_addressable", True) for leaf in (low, high)):
            continue
        low, high = (np.asarray(leaf, np.float64) for leaf in (low, high))
        bad = ~((low <= high) & (low < np.inf) & (high > -np.inf))
        if bad.any():
            index = tuple(map(int, np.argwhere(bad)[0]))
            raise ValueError(
                f"{caller()}: lower{keystr(path)} is {low[index]} and upper{keystr(path)} is {high[index]} at index "
                f"{index}, expected lower <= upper with a finite number between them."
            )


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


def require_extra(name: str, value: T | None) -> T:
    """``value``, a required extra argument of an optimizer's ``update``; refuses None."""
    if value is None:
        raise ValueError(
            f"{caller()}: update() needs {name}=; call "
            "update(grad, state, params, value=value, grad=grad, value_fn=value_fn), as for optax.lbfgs()."
        )
    return value


def require_data(args: Any) -> tuple[Any, ...]:
    """``args=`` of an optimizer's ``update``, the data of the curvature, as a tuple; refuses None."""
    if args is None:
        raise ValueError(
            f"{caller()}: update() needs args=, the data on which the curvature is taken; call "
            "update(grad, state, params, args=batch), where model(params, *batch) gives the outputs."
        )
    return args if type(args) is tuple else (args,)


def refuse_changed_gradient() -> NoReturn:
    """Raise the error for ``updates`` that differ from ``grad=``."""
    raise ValueError(
        f"{caller()}: updates are other arrays than grad=, expected the gradient of the objective in both. What comes "
        f"before {caller()} in optax.chain (weight decay, clipping), or a wrapper around it (optax.MultiSteps, "
        f"optax.flatten), changes the updates and not the objective. Put {caller()} first in the chain and a penalty "
        "into the objective; or, where the updates are the gradient of the objective, leave out grad=."
    )


def masked_params(method: str, paths: list[str], failure: Exception) -> TypeError:
    """The error for a call that failed on parameters with masked leaves."""
    shown = ", ".join(f"params{path}" for path in paths[:_MOST_MASKED]) + (", ..." if len(paths) > _MOST_MASKED else "")
    return TypeError(
        f"{caller()}: {method}() has params with optax.MaskedNode instead of {shown}, as optax.masked and "
        f"optax.partition pass them, and fails on them: {type(failure).__name__}: {failure}. Leave out grad=, and pass "
        "functions that fill in the masked leaves; or call it on the tree of the other leaves alone."
    )


def check_shape(shape: Any) -> None:
    """Refuse what is no shape: ``optax.inject_hyperparams`` calls each function among hyperparameters with the step."""
    if not isinstance(shape, tuple):
        raise TypeError(
            f"{caller()}: spatial_axes was called with {shape!r}, expected the shape of a leaf; name it in the "
            "static_args of optax.inject_hyperparams, which takes other functions for schedules."
        )
