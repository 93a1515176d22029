"""Input checks of trees: points, directions, data, paths, Hessians, sparsity patterns."""

import functools
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.sparse import BCOO
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


def check_factor(name: str, factor: Tree, x_name: str, x: Tree) -> Tree:
    """``factor`` as arrays with the structure and dtypes of ``x`` and an additional leading axis of directions."""
    check_same_structure(name, factor, x_name, x)
    (path, first), *_ = tree_flatten_with_path(factor)[0]
    first_name, num_directions = name + keystr(path), jnp.shape(first)[0] if jnp.ndim(first) else 1
    if num_directions == 0:
        raise ValueError(f"{caller()}: {first_name} has shape {jnp.shape(first)}, expected at least one direction.")
    for (path, leaf), x_leaf in zip(tree_flatten_with_path(factor)[0], jax.tree.leaves(x), strict=True):
        leaf_name = name + keystr(path)
        shape: Any = jnp.shape(leaf) if is_array_like(leaf) else ()
        if len(shape) != x_leaf.ndim + 1 or shape[1:] != x_leaf.shape:
            raise ValueError(
                f"{caller()}: {leaf_name} has shape {shape}, expected (K,) + {x_leaf.shape}: a leading axis of "
                f"K directions before the shape of {x_name}{keystr(path)}."
            )
        if shape[0] != num_directions:
            raise ValueError(
                f"{caller()}: {leaf_name} has {shape[0]} directions along its leading axis, "
                f"expected {num_directions} to match {first_name}."
            )
        if jnp.result_type(leaf) != x_leaf.dtype:
            raise TypeError(
                f"{caller()}: {leaf_name} has dtype {jnp.result_type(leaf)}, expected {x_leaf.dtype} to match "
                f"{x_name}{keystr(path)}; cast it with .astype({str(x_leaf.dtype)!r})."
            )
    return jax.tree.map(jnp.asarray, factor)


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


def check_path_pair(name: str, paths: Any) -> None:
    """Refuse anything but two paths."""
    if not (isinstance(paths, tuple | list) and len(paths) == 2 and all(isinstance(path, str) for path in paths)):
        raise ValueError(f"{caller()}: {name}={paths!r}, expected a pair of paths, such as ('layers/0', '').")


def check_hessian(name: str, blocks: Any, x: Tree) -> list[tuple[Tree, jax.Array]]:
    """The rows of a Hessian that is a tree like ``x`` of trees like ``x``, each paired with its leaf of ``x``."""
    structure = jax.tree.structure(x)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(x)[0]]
    leaves = jax.tree.leaves(x)
    try:
        rows = structure.flatten_up_to(blocks)
        columns = [structure.flatten_up_to(row) for row in rows]
    except ValueError as error:
        raise ValueError(
            f"{caller()}: {name} is not a tree like x of trees like x, as curvature.hessian returns: {error}"
        ) from None
    for row_path, row_leaf, row in zip(paths, leaves, columns, strict=True):
        for path, leaf, block in zip(paths, leaves, row, strict=True):
            expected = row_leaf.shape + leaf.shape
            if jnp.shape(block) != expected:
                raise ValueError(
                    f"{caller()}: {name}{row_path}{path} has shape {jnp.shape(block)}, expected {expected}."
                )
    return list(zip(rows, leaves, strict=True))


def check_pattern(pattern: Any, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The row and column indices of a sparsity pattern from JAX, SciPy or asdex, or of a dense array."""
    if isinstance(pattern, Tracer) or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(pattern)):
        raise TypeError(f"{caller()}: pattern is traced, expected a known pattern; prepare outside jit.")
    if not hasattr(pattern, "shape"):
        raise TypeError(f"{caller()}: pattern is {describe(pattern)}, expected a sparse matrix or a boolean array.")
    if tuple(pattern.shape) != shape:
        raise ValueError(
            f"{caller()}: pattern has shape {tuple(pattern.shape)}, expected {shape}: a row for each entry of the "
            "output (of x for a Hessian), a column for each entry of x."
        )
    if isinstance(pattern, BCOO):
        indices = np.asarray(pattern.indices)
        rows, columns = indices[(indices < np.asarray(shape)).all(axis=1)].T  # padding lies outside
        return rows, columns
    if hasattr(pattern, "tocoo"):
        pattern = pattern.tocoo()
        return pattern.row, pattern.col
    if hasattr(pattern, "rows") and hasattr(pattern, "cols"):
        return np.asarray(pattern.rows), np.asarray(pattern.cols)
    rows, columns = np.nonzero(np.asarray(pattern))
    return rows, columns


def no_pattern(error: Exception) -> NotImplementedError:
    """The error for a function whose pattern asdex cannot find."""
    return NotImplementedError(
        f"{caller()}: asdex cannot find the pattern of f ({error}); pass pattern=, a dense array of ones if nothing is "
        "known of it."
    )


def check_index_range(shape: tuple[int, int]) -> None:
    """Refuse compressed products with more entries than a 32-bit index can count."""
    if shape[0] * shape[1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{caller()}: {shape[0]:,} products of {shape[1]:,} entries are more than 2^31 - 1 together; "
            "split x and prepare each part."
        )
