"""Input checks of trees of arrays: points, directions, data, batches."""

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._errors import caller, describe, is_array_like
from curvature._types import Tree

_HINT = "pass data that is not differentiated through args"


def check_point(name: str, tree: Tree) -> Tree:
    """``tree`` with every leaf a floating JAX array; refuses empty trees and leaves that are not real and floating."""
    leaves, structure = jax.tree.flatten(tree)
    if not leaves:
        raise ValueError(f"{caller()}: {name} is an empty tree ({tree!r}), expected at least one floating array.")
    # The usual case first: forming the paths takes longer than a step of a small solve.
    if all(isinstance(leaf, jax.Array) and _is_floating(leaf.dtype) for leaf in leaves):
        return structure.unflatten(leaves)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(tree)[0]]
    return structure.unflatten([_floating_leaf(name + path, leaf) for path, leaf in zip(paths, leaves, strict=True)])


@functools.cache
def _is_floating(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _floating_leaf(name: str, leaf: Any) -> jax.Array:
    if not is_array_like(leaf):
        raise TypeError(f"{caller()}: {name} is {describe(leaf)}, expected an array of floats; {_HINT}.")
    dtype = jnp.result_type(leaf)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        raise TypeError(
            f"{caller()}: {name} has dtype {dtype}; complex leaves are not supported. Differentiate with respect to "
            "the real and the imaginary part instead, as two real leaves."
        )
    if not _is_floating(dtype):
        raise TypeError(f"{caller()}: {name} has dtype {dtype}, expected a floating dtype; cast it, or {_HINT}.")
    return jnp.asarray(leaf)


def check_start(name: str, tree: Tree) -> Tree:
    """``check_point`` for the start of a solve: not empty, finite where values are known, and strongly typed.

    A weak type would change the carry of a loop. Every solve runs this check, so its usual path must be fast.
    """
    _refuse_numbers(name, tree)
    x = check_point(name, tree)
    check_entries(name, x)
    leaves, structure = jax.tree.flatten(x)
    if not all(map(_is_finite, leaves)):
        _refuse_not_finite(name, x)
    return structure.unflatten(
        jax.lax.convert_element_type(leaf, leaf.dtype) if jax.typeof(leaf).weak_type else leaf for leaf in leaves
    )


def _refuse_numbers(name: str, tree: Tree) -> None:
    """Refuse a list or tuple of numbers: it is a tree of scalars, so the objective would not receive an array."""
    if type(tree) not in (list, tuple):
        return
    leaves = tree_flatten_with_path(tree)[0]
    if leaves and all(isinstance(leaf, (int, float)) for _, leaf in leaves):
        path, first = leaves[0]
        raise TypeError(
            f"{caller()}: {name} is a {type(tree).__name__} of numbers ({name}{keystr(path)} is {describe(first)}), "
            f"expected an array or a tree of arrays; pass jnp.asarray({name}, float)."
        )


def check_entries(name: str, tree: Tree) -> None:
    """Refuse a point whose leaves have no entries."""
    if not sum(leaf.size for leaf in jax.tree.leaves(tree)):
        raise ValueError(f"{caller()}: {name} has no entries, expected at least one number.")


def _is_finite(leaf: jax.Array) -> bool:
    """Whether all known values are finite; a traced value that is not is reported as a status by the solver."""
    if isinstance(leaf, Tracer) or not leaf.is_fully_addressable:
        return True
    finite = np.isfinite(np.asarray(leaf))
    return bool(np.count_nonzero(finite) == finite.size)


def _refuse_not_finite(name: str, tree: Tree) -> NoReturn:
    path, leaf = next((path, leaf) for path, leaf in tree_flatten_with_path(tree)[0] if not _is_finite(leaf))
    values = np.asarray(leaf)
    index = tuple(map(int, np.argwhere(~np.isfinite(values))[0]))
    raise ValueError(
        f"{caller()}: {name}{keystr(path)} is {values[index]} at index {index}, expected finite numbers to start from."
    )


def check_direction(name: str, v: Tree, x_name: str, x: Tree) -> Tree:
    """``v`` as arrays with the structure, shapes and dtypes of ``x``."""
    check_same_structure(name, v, x_name, x)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(x)[0]]
    pairs = zip(paths, jax.tree.leaves(v), jax.tree.leaves(x), strict=True)
    return jax.tree.structure(x).unflatten(
        [_matching_leaf(name + path, v_leaf, x_name + path, x_leaf) for path, v_leaf, x_leaf in pairs]
    )


def check_same_structure(name: str, v: Tree, x_name: str, x: Tree) -> None:
    """Refuse a tree whose containers or keys differ from the ones of ``x``; the error names the first such leaf."""
    got, want = jax.tree.structure(v), jax.tree.structure(x)
    if got == want:
        return
    got_paths = {keystr(path) for path, _ in tree_flatten_with_path(v)[0]}
    want_paths = {keystr(path) for path, _ in tree_flatten_with_path(x)[0]}
    missing, extra = sorted(want_paths - got_paths), sorted(got_paths - want_paths)
    differs = f"{name}{missing[0]} is missing" if missing else f"{name}{extra[0]} is unexpected" if extra else ""
    raise ValueError(
        f"{caller()}: {name} does not have the tree structure of {x_name}{': ' + differs if differs else ''}. "
        f"Got {got}, expected {want}."
    )


def _matching_leaf(name: str, leaf: Any, x_name: str, x_leaf: Any) -> jax.Array:
    """``leaf`` as an array with the shape and dtype of ``x_leaf``."""
    if not is_array_like(leaf):
        raise TypeError(f"{caller()}: {name} is {describe(leaf)}, expected an array to match {x_name}.")
    if jnp.shape(leaf) != x_leaf.shape:
        raise ValueError(f"{caller()}: {name} has shape {jnp.shape(leaf)}, expected {x_leaf.shape} to match {x_name}.")
    if isinstance(leaf, float):
        return jnp.asarray(leaf, x_leaf.dtype)
    if jnp.result_type(leaf) != x_leaf.dtype:
        raise TypeError(
            f"{caller()}: {name} has dtype {jnp.result_type(leaf)}, expected {x_leaf.dtype} to match {x_name}; "
            f"cast it with .astype({str(x_leaf.dtype)!r})."
        )
    return jnp.asarray(leaf)


def check_concrete(operands: dict[str, Any]) -> None:
    """Refuse tracers in named trees of arrays, for functions that need concrete values."""
    for name, tree in operands.items():
        for path, leaf in tree_flatten_with_path(tree)[0]:
            if isinstance(leaf, Tracer):
                raise TypeError(
                    f"{caller()}: {name}{keystr(path)} is traced, expected a value; call it outside jit, grad and vmap."
                )


def check_data(args: Any) -> tuple[Any, ...]:
    """The data as a tuple; refuses leaves that cannot be operands of a compiled program."""
    args = args if type(args) is tuple else (args,)
    for path, leaf in tree_flatten_with_path(args)[0]:
        if not is_array_like(leaf):
            raise TypeError(
                f"{caller()}: args{keystr(path)} is {describe(leaf)}, expected an array or a number; "
                "close the function over what is not data."
            )
    return args


def check_batch(batch: Any) -> None:
    """Refuse a batch whose leaves do not share a leading axis of examples, or have none."""
    leaves = tree_flatten_with_path(batch)[0]
    if not leaves:
        raise ValueError(f"{caller()}: no batch was given, expected arrays with a leading example axis after params.")
    for path, leaf in leaves:
        name = "batch" + keystr(path)
        if not is_array_like(leaf):
            raise TypeError(f"{caller()}: {name} is {describe(leaf)}, expected an array with a leading example axis.")
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{caller()}: {name} is a scalar, expected a leading example axis; "
                "close the loss over what all examples share."
            )
    check_examples("batch", batch)


def check_examples(name: str, args: Any) -> int:
    """The number of examples along the leading axis of all leaves except scalars, which all examples share."""
    leaves = [(name + keystr(path), leaf) for path, leaf in tree_flatten_with_path(args)[0] if jnp.ndim(leaf)]
    if not leaves:
        raise ValueError(f"{caller()}: {name} has no array with a leading axis of examples, expected at least one.")
    first_name, first = leaves[0]
    size = jnp.shape(first)[0]
    for leaf_name, leaf in leaves:
        if jnp.shape(leaf)[0] != size:
            raise ValueError(
                f"{caller()}: {leaf_name} has {jnp.shape(leaf)[0]} examples along its leading axis, expected {size} to "
                f"match {first_name}; close the function over arrays that all examples share."
            )
    if not size:
        raise ValueError(f"{caller()}: {first_name} has shape {jnp.shape(first)}, expected at least one example.")
    return size
