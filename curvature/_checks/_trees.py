"""Errors about points, directions, data and Hessians given as trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._checks._words import describe, is_array_like
from curvature._types import Tree

_HINT = "pass data that is not differentiated through args"


def check_point(function: str, name: str, tree: Tree) -> Tree:
    """``tree`` with every leaf a floating JAX array; refuses empty trees and leaves that cannot be differentiated."""
    leaves, structure = tree_flatten_with_path(tree)
    if not leaves:
        raise ValueError(f"{function}: {name} is an empty tree ({tree!r}), expected at least one floating array.")
    return structure.unflatten([_floating_leaf(function, name + keystr(path), leaf) for path, leaf in leaves])


def _floating_leaf(function: str, name: str, leaf: Any) -> jax.Array:
    if not is_array_like(leaf):
        raise TypeError(f"{function}: {name} is {describe(leaf)}, expected an array of floats; {_HINT}.")
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{function}: {name} has dtype {dtype}; complex leaves are not supported. Differentiate by the real and "
            "the imaginary part instead, as two real leaves."
        )
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{function}: {name} has dtype {dtype}, expected a floating dtype; cast it, or {_HINT}.")
    return jnp.asarray(leaf)


def check_entries(function: str, name: str, tree: Tree) -> None:
    """Refuse a point whose leaves have no entry at all."""
    if not sum(leaf.size for leaf in jax.tree.leaves(tree)):
        raise ValueError(f"{function}: {name} has no entries, expected at least one number.")


def check_finite(function: str, name: str, tree: Tree) -> None:
    """Refuse NaN and infinities wherever the values are known; those of tracers are reported by a status instead."""
    for path, leaf in tree_flatten_with_path(tree)[0]:
        if isinstance(leaf, Tracer) or not leaf.is_fully_addressable:
            continue
        bad = ~np.isfinite(np.asarray(leaf, np.float64))
        if bad.any():
            index = tuple(map(int, np.argwhere(bad)[0]))
            raise ValueError(
                f"{function}: {name}{keystr(path)} is {np.asarray(leaf)[index]} at index {index}, "
                "expected finite numbers to start from."
            )


def check_direction(function: str, name: str, v: Tree, x_name: str, x: Tree) -> Tree:
    """``v`` as arrays with the structure, shapes and dtypes of ``x``."""
    check_same_structure(function, name, v, x_name, x)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(x)[0]]
    pairs = zip(paths, jax.tree.leaves(v), jax.tree.leaves(x), strict=True)
    return jax.tree.structure(x).unflatten(
        [_matching_leaf(function, name + path, v_leaf, x_name + path, x_leaf) for path, v_leaf, x_leaf in pairs]
    )


def check_same_structure(function: str, name: str, v: Tree, x_name: str, x: Tree) -> None:
    """Refuse a tree whose containers or keys differ from those of ``x``, naming the first leaf that does."""
    got, want = jax.tree.structure(v), jax.tree.structure(x)
    if got == want:
        return
    got_paths = {keystr(path) for path, _ in tree_flatten_with_path(v)[0]}
    want_paths = {keystr(path) for path, _ in tree_flatten_with_path(x)[0]}
    missing, extra = sorted(want_paths - got_paths), sorted(got_paths - want_paths)
    differs = f"{name}{missing[0]} is missing" if missing else f"{name}{extra[0]} is unexpected" if extra else ""
    raise ValueError(
        f"{function}: {name} does not have the tree structure of {x_name}{': ' + differs if differs else ''}. "
        f"Got {got}, expected {want}."
    )


def _matching_leaf(function: str, name: str, leaf: Any, x_name: str, x_leaf: jax.Array) -> jax.Array:
    if not is_array_like(leaf):
        raise TypeError(f"{function}: {name} is {describe(leaf)}, expected an array to match {x_name}.")
    if jnp.shape(leaf) != x_leaf.shape:
        raise ValueError(f"{function}: {name} has shape {jnp.shape(leaf)}, expected {x_leaf.shape} to match {x_name}.")
    if isinstance(leaf, float):
        return jnp.asarray(leaf, x_leaf.dtype)
    if jnp.result_type(leaf) != x_leaf.dtype:
        raise TypeError(
            f"{function}: {name} has dtype {jnp.result_type(leaf)}, expected {x_leaf.dtype} to match {x_name}; "
            f"cast it with .astype({str(x_leaf.dtype)!r})."
        )
    return jnp.asarray(leaf)


def check_data(function: str, args: Any) -> None:
    """Refuse data that cannot be an operand of a compiled program."""
    for path, leaf in tree_flatten_with_path(args)[0]:
        if not is_array_like(leaf):
            raise TypeError(
                f"{function}: args{keystr(path)} is {describe(leaf)}, expected an array or a number; "
                "close the function over what is not data."
            )


def check_hessian(function: str, blocks: Any, x: Tree) -> list[tuple[Tree, jax.Array]]:
    """The rows of a Hessian given as a tree like ``x`` of trees like ``x``, each beside the leaf of ``x`` it is for."""
    structure = jax.tree.structure(x)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(x)[0]]
    leaves = jax.tree.leaves(x)
    try:
        rows = structure.flatten_up_to(blocks)
        columns = [structure.flatten_up_to(row) for row in rows]
    except ValueError as error:
        raise ValueError(
            f"{function}: hessian(x) is not a tree like x of trees like x, as curvature.hessian returns: {error}"
        ) from None
    for row_path, row_leaf, row in zip(paths, leaves, columns, strict=True):
        for path, leaf, block in zip(paths, leaves, row, strict=True):
            expected = row_leaf.shape + leaf.shape
            if jnp.shape(block) != expected:
                raise ValueError(
                    f"{function}: hessian(x){row_path}{path} has shape {jnp.shape(block)}, expected {expected}."
                )
    return list(zip(rows, leaves, strict=True))
