"""Input checks of batch axes: ``in_axes``, lanes, problems, examples."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._errors import caller, describe, is_array_like, is_static_integer

UNMAPPED = object()  # represents the axis None, because None is not a leaf of a tree


def check_lanes(in_axes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of lanes: the size that the mapped axes share. Keyword arguments map over axis 0."""
    operands = (args, kwargs)
    axes = jax.tree.leaves(check_prefix("in_axes", (in_axes, 0), operands))
    sizes = {}
    for (path, leaf), axis in zip(tree_flatten_with_path(operands)[0], axes, strict=True):
        if axis is UNMAPPED:
            continue
        name = ("args" if path[0].idx == 0 else "kwargs") + keystr(path[1:])
        rank = jnp.ndim(leaf) if is_array_like(leaf) else 0
        if not -rank <= axis < rank:
            raise ValueError(f"{caller()}: {name} has rank {rank}, which has no axis {axis} to map; use in_axes=None.")
        sizes[name] = jnp.shape(leaf)[axis]
    if not sizes:
        raise ValueError(f"{caller()}: no argument has an axis to map, expected at least one that in_axes names.")
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"{caller()}: the mapped axes differ in size: {listed}.")
    return next(iter(sizes.values()))


def check_problems(x0: Any, args: tuple[Any, ...], in_axes: Any) -> tuple[int, list[Any]]:
    """The number of problems, the common size of all mapped axes, and the axis of each leaf of ``args``."""
    axes = jax.tree.leaves(check_prefix("in_axes", in_axes, args))
    lanes = [("x0_batch" + keystr(path), leaf, 0) for path, leaf in tree_flatten_with_path(x0)[0]]
    lanes += [
        ("args_batch" + keystr(path), leaf, axis)
        for (path, leaf), axis in zip(tree_flatten_with_path(args)[0], axes, strict=True)
        if axis is not UNMAPPED
    ]
    for name, leaf, axis in lanes:
        if not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            remedy = "a leading axis of problems" if name.startswith("x0") else "one; use in_axes=None for shared data"
            raise ValueError(f"{caller()}: {name} has rank {jnp.ndim(leaf)} and so no axis {axis}, expected {remedy}.")
        size, (first, leading, _) = jnp.shape(leaf)[axis], lanes[0]
        if size != jnp.shape(leading)[0]:
            raise ValueError(
                f"{caller()}: {name} has {size} problems along axis {axis}, "
                f"expected {jnp.shape(leading)[0]} to match {first}."
            )
        if size == 0:
            raise ValueError(f"{caller()}: {name} has shape {jnp.shape(leaf)}, expected at least one problem.")
    return jnp.shape(lanes[0][1])[0], axes


def check_prefix(name: str, axes: Any, tree: Any) -> Any:
    """The axis of every leaf of ``tree``, ``UNMAPPED`` for None; ``axes`` must be a prefix of ``tree``."""
    for axis in jax.tree.leaves(axes):
        if not is_static_integer(axis):
            raise TypeError(f"{caller()}: {name} holds {describe(axis)}, expected integers and None.")

    def spread(axis: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: UNMAPPED if axis is None else axis, part)

    try:
        return jax.tree.map(spread, axes, tree, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(f"{caller()}: {name} is not a prefix of the tree it is for: {error}") from None


def is_none(leaf: Any) -> bool:
    """Whether a node is None; pass it as ``is_leaf``, because JAX takes None for an empty tree."""
    return leaf is None


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
