"""Input checks of ``bounds=``."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._checks._describe import describe, is_array_like
from curvature._checks._options import spelled
from curvature._errors import caller
from curvature._types import Tree

_PAIR = (
    "a pair (lower, upper) of trees like x0, of numbers, or None; SciPy's Bounds are (bounds.lb, bounds.ub), its pairs "
    "an array of their lower ends and one of their upper ends"
)


def check_pair_of_bounds(bounds: Any) -> tuple[Tree, Tree]:
    """Refuse anything but a pair of bounds."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(f"{caller()}: bounds is {describe(bounds)}, expected {_PAIR}.")
    return bounds[0], bounds[1]


def check_bounded_method(method: Any, names: tuple[str, ...]) -> str:
    """The name that ``method`` spells; refuses bounds for a method that cannot keep them."""
    name = spelled(method, names)
    if not (isinstance(name, str) and name in names):
        raise ValueError(
            f"{caller()}: method={method!r} takes no bounds; those that do are {', '.join(map(repr, names))}."
        )
    return name


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
