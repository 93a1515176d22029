"""Every error that a user's input can raise, worded in one place.

Form: the public function, the path of the leaf, what came, what was expected, the remedy. All are raised while
tracing, before any computation.
"""

from typing import Any, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._types import ChunkSize, Tree

T = TypeVar("T")
UNMAPPED = object()  # stands for the axis None, which cannot be a leaf
_HINT = "pass data that is not differentiated through args"


def check_callable(function: str, name: str, value: Any) -> None:
    """Refuse anything that cannot be called."""
    if not callable(value):
        raise TypeError(f"{function}: {name} is {_kind(value)}, expected a function.")


def check_point(function: str, name: str, tree: Tree) -> Tree:
    """``tree`` with every leaf a floating JAX array; refuses empty trees and leaves that cannot be differentiated."""
    leaves, structure = tree_flatten_with_path(tree)
    if not leaves:
        raise ValueError(f"{function}: {name} is an empty tree ({tree!r}), expected at least one floating array.")
    return structure.unflatten([_floating_leaf(function, name + keystr(path), leaf) for path, leaf in leaves])


def _floating_leaf(function: str, name: str, leaf: Any) -> jax.Array:
    if not _is_array_like(leaf):
        raise TypeError(f"{function}: {name} is {_kind(leaf)}, expected an array of floats; {_HINT}.")
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


def check_hessian_used(function: str, method: Any, used: bool) -> None:
    """Refuse a Hessian given to a method that forms none, which would silently ignore it."""
    if not used:
        raise ValueError(
            f"{function}: hessian= is for the methods that form a Hessian, 'newton' and 'trust-exact'; "
            f"method={method!r} forms none."
        )


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
    if not _is_array_like(leaf):
        raise TypeError(f"{function}: {name} is {_kind(leaf)}, expected an array to match {x_name}.")
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


def check_scalar_output(function: str, name: str, out: Any) -> None:
    """Refuse an objective that returns anything but one real floating scalar."""
    remedy = "reduce it, for instance with jnp.sum; for vector-valued functions there is curvature.jacobian"
    if isinstance(out, tuple) and len(out) == 2:
        remedy = "a function that also returns auxiliary data needs has_aux=True, where it is accepted"
    leaves = jax.tree.leaves(out)
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(out)) or len(leaves) != 1:
        raise TypeError(
            f"{function}: {name} returns a tree of {len(leaves)} arrays, expected one floating scalar; {remedy}."
        )
    if leaves[0].shape != ():
        raise TypeError(f"{function}: {name} returns shape {leaves[0].shape}, expected a scalar, shape (); {remedy}.")
    check_floating_output(function, name, out)


def check_floating_output(function: str, name: str, out: Any) -> None:
    """Refuse a function whose outputs have no derivative: integers, booleans, complex numbers, nothing at all."""
    if not jax.tree.leaves(out):
        raise TypeError(f"{function}: {name} returns no array ({out!r}), expected floating arrays; does it return?")
    for path, leaf in tree_flatten_with_path(out)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{function}: the output {name}(x){keystr(path)} has dtype {leaf.dtype}, "
                "expected a real floating dtype."
            )


def check_aux_output(function: str, name: str, out: Any) -> None:
    """Refuse an output that is not the pair (value, aux) although ``has_aux=True`` was said."""
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"{function}: has_aux=True, but {name} returns {_kind(out)}, expected a pair (value, aux).")


def check_choice(function: str, name: str, value: Any, choices: Any) -> None:
    """Refuse a word that is not among those of a ``Literal`` or a sequence."""
    words = get_args(choices) or tuple(choices)
    if not (isinstance(value, str) and value in words):
        raise ValueError(f"{function}: {name}={value!r} is unknown, expected one of {', '.join(map(repr, words))}.")


def check_method(function: str, method: Any, names: tuple[str, ...]) -> None:
    """Refuse a method that is neither one of the names nor, already handled, an optax transformation."""
    if method not in names if isinstance(method, str) else True:
        raise ValueError(
            f"{function}: method={method!r} is unknown, expected one of {', '.join(map(repr, names))} "
            "or an optax transformation such as curvature.newton() or optax.lbfgs()."
        )


def check_chunk_size(function: str, chunk_size: ChunkSize) -> None:
    """Refuse a chunk size that is neither a positive integer, nor None, nor "auto"."""
    if chunk_size is None or (isinstance(chunk_size, str) and chunk_size == "auto"):
        return
    whole = isinstance(chunk_size, int | np.integer) and not isinstance(chunk_size, bool)
    if not whole or chunk_size < 1:
        raise ValueError(f"{function}: chunk_size={chunk_size!r}, expected a positive integer, None or 'auto'.")


def check_argnums(function: str, argnums: Any, num_args: int) -> None:
    """Refuse positions that do not name a positional argument of the call."""
    positions = argnums if isinstance(argnums, tuple | list) else (argnums,)
    if not positions:
        raise ValueError(f"{function}: argnums={argnums!r} is empty, expected an integer or a tuple of integers.")
    for position in positions:
        if isinstance(position, bool) or not isinstance(position, int | np.integer):
            raise TypeError(f"{function}: argnums={argnums!r}, expected an integer or a tuple of integers.")
        if not -num_args <= position < num_args:
            raise ValueError(
                f"{function}: argnums={argnums!r} names argument {position}, "
                f"but f was called with {num_args} positional arguments."
            )


def check_nonnegative(function: str, name: str, value: Any) -> None:
    """Refuse a negative, NaN or non-numeric tolerance; tracers pass."""
    if isinstance(value, Tracer):
        return
    if isinstance(value, bool) or not _is_array_like(value) or jnp.shape(value) != () or not value >= 0:
        raise ValueError(f"{function}: {name}={value!r}, expected a number >= 0.")


def check_positive(function: str, name: str, value: Any) -> None:
    """Refuse anything but a positive number; tracers pass."""
    if isinstance(value, Tracer):
        return
    if isinstance(value, bool) or not _is_array_like(value) or jnp.shape(value) != () or not value > 0:
        raise ValueError(f"{function}: {name}={value!r}, expected a number > 0.")


def check_count(function: str, name: str, value: Any, least: int = 0) -> None:
    """Refuse anything but an integer of at least ``least``; tracers pass."""
    if isinstance(value, Tracer):
        return
    whole = _is_array_like(value) and jnp.shape(value) == () and jnp.issubdtype(jnp.result_type(value), jnp.integer)
    if not whole or value < least:
        raise ValueError(f"{function}: {name}={value!r}, expected an integer >= {least}.")


def check_data(function: str, args: Any) -> None:
    """Refuse data that cannot be an operand of a compiled program."""
    for path, leaf in tree_flatten_with_path(args)[0]:
        if not _is_array_like(leaf):
            raise TypeError(
                f"{function}: args{keystr(path)} is {_kind(leaf)}, expected an array or a number; "
                "close the function over what is not data."
            )


def check_lanes(function: str, in_axes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of lanes: the size that the mapped axes share. Keyword arguments map over axis 0."""
    operands = (args, kwargs)
    axes = jax.tree.leaves(check_prefix(function, "in_axes", (in_axes, 0), operands))
    sizes = {}
    for (path, leaf), axis in zip(tree_flatten_with_path(operands)[0], axes, strict=True):
        if axis is UNMAPPED:
            continue
        name = ("args" if path[0].idx == 0 else "kwargs") + keystr(path[1:])
        rank = jnp.ndim(leaf) if _is_array_like(leaf) else 0
        if not -rank <= axis < rank:
            raise ValueError(f"{function}: {name} has rank {rank}, which has no axis {axis} to map; use in_axes=None.")
        sizes[name] = jnp.shape(leaf)[axis]
    if not sizes:
        raise ValueError(f"{function}: no argument has an axis to map, expected at least one that in_axes names.")
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"{function}: the mapped axes differ in size: {listed}.")
    return next(iter(sizes.values()))


def check_prefix(function: str, name: str, axes: Any, tree: Any) -> Any:
    """The axis of every leaf of ``tree``, of which ``axes`` must be a prefix; ``UNMAPPED`` where it says None."""
    for axis in jax.tree.leaves(axes):
        if not isinstance(axis, int | np.integer) or isinstance(axis, bool):
            raise TypeError(f"{function}: {name} holds {_kind(axis)}, expected integers and None.")

    def spread(axis: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: UNMAPPED if axis is None else axis, part)

    try:
        return jax.tree.map(spread, axes, tree, is_leaf=is_none)
    except ValueError as error:
        raise ValueError(f"{function}: {name} is not a prefix of the tree it is for: {error}") from None


def is_none(leaf: Any) -> bool:
    """Whether a leaf is None, which JAX otherwise takes for an empty tree."""
    return leaf is None


def check_batch(function: str, batch: Any) -> None:
    """Refuse a batch whose leaves do not share a leading axis of examples, or have none."""
    leaves = [("batch" + keystr(path), leaf) for path, leaf in tree_flatten_with_path(batch)[0]]
    if not leaves:
        raise ValueError(f"{function}: no batch was given, expected arrays with a leading example axis after params.")
    for name, leaf in leaves:
        if not _is_array_like(leaf):
            raise TypeError(f"{function}: {name} is {_kind(leaf)}, expected an array with a leading example axis.")
        if jnp.ndim(leaf) == 0:
            raise ValueError(
                f"{function}: {name} is a scalar, expected a leading example axis; "
                "close the loss over what all examples share."
            )
    first_name, first = leaves[0]
    size = jnp.shape(first)[0]
    for name, leaf in leaves[1:]:
        if jnp.shape(leaf)[0] != size:
            raise ValueError(
                f"{function}: {name} has {jnp.shape(leaf)[0]} examples along its leading axis, "
                f"expected {size} to match {first_name}."
            )
    if size == 0:
        raise ValueError(f"{function}: {first_name} has shape {jnp.shape(first)}, expected at least one example.")


def illegal_mode(function: str, mode: str, blocker: str, legal: list[str]) -> TypeError:
    """The error for a mode that the function does not allow."""
    remedy = f"use mode={legal[0]!r} or mode='auto'" if legal else "no other mode is legal either"
    return TypeError(f"{function}: mode={mode!r} is not legal for f because of {blocker}; {remedy}.")


def no_legal_mode(function: str, blockers: dict[str, str]) -> TypeError:
    """The error for a function that no mode can differentiate."""
    reasons = "; ".join(f"{mode} is blocked by {blocker}" for mode, blocker in blockers.items())
    return TypeError(
        f"{function}: no composition of forward and reverse mode can differentiate f: {reasons}. "
        "custom_vjp_call has no forward derivative (custom_jvp has both), while has no reverse derivative "
        "(scan, or fori_loop with constant bounds, has both)."
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


def require_extra(function: str, name: str, value: T | None) -> T:
    """``value``, one of the arguments of an optimizer's update; refuses None."""
    if value is None:
        raise ValueError(
            f"{function}: update() needs {name}=; call "
            "update(grad, state, params, value=value, grad=grad, value_fn=value_fn), as for optax.lbfgs()."
        )
    return value


def _is_array_like(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex)


def _kind(value: Any) -> str:
    if _is_array_like(value) and jnp.ndim(value):
        return f"an array of shape {jnp.shape(value)}"
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} of type {type(value).__name__}"
