"""Input checks of linear operators: their structures, functions and data."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._checks._describe import describe, is_array_like
from curvature._checks._functions import check_callable
from curvature._checks._trees import check_same_structure
from curvature._errors import caller
from curvature._types import Tree


def check_structures(name: str, structure: Tree, other_name: str, other: Tree) -> None:
    """Refuse two structures that must match, as in a sum or product of operators, but do not."""
    check_same_structure(name, structure, other_name, other)
    pairs = zip(tree_flatten_with_path(structure)[0], jax.tree.leaves(other), strict=True)
    for (path, leaf), other_leaf in pairs:
        if (leaf.shape, leaf.dtype) != (other_leaf.shape, other_leaf.dtype):
            raise ValueError(
                f"{caller()}: {name}{keystr(path)} is {leaf.dtype}{list(leaf.shape)}, expected "
                f"{other_leaf.dtype}{list(other_leaf.shape)} to match {other_name}{keystr(path)}."
            )


def check_scale(scale: Any) -> None:
    """Refuse to multiply an operator by anything but one real number."""
    if (
        not is_array_like(scale)
        or jnp.shape(scale) != ()
        or jnp.issubdtype(jnp.result_type(scale), jnp.complexfloating)
    ):
        raise TypeError(f"{caller()}: an operator times {describe(scale)}, expected one real number; A @ B composes.")


def no_structure() -> TypeError:
    """The error for the structure of ``damping(c)``, which has none."""
    return TypeError("damping: c I has no structure; add it to an operator, as in op + damping(1e-3).")


def no_reverse(name: str, blocker: str) -> TypeError:
    """The error for a model whose Jacobian cannot be transposed."""
    return TypeError(
        f"{caller()}: {name} has no reverse derivative because of {blocker}, and J' w needs it; "
        "scan, or fori_loop with constant bounds, has both."
    )


def check_static_function(name: str, value: Any) -> None:
    """Refuse anything but a hashable function, which can be a static field of an operator."""
    check_callable(name, value)
    try:
        hash(value)
    except TypeError:
        raise TypeError(
            f"{caller()}: {name} is {describe(value)}, which cannot be hashed; give a plain function, "
            "and its arrays through x or args."
        ) from None


def check_reiterable(batches: Any) -> None:
    """Refuse batches that cannot be iterated over, or only once."""
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{caller()}: batches is {describe(batches)}, which can be iterated over only once, but every product "
            "goes over all batches; give a list or an object whose __iter__ returns a new iterator."
        )
    if not hasattr(batches, "__iter__"):
        raise TypeError(f"{caller()}: batches is {describe(batches)}, expected an iterable of batches, such as a list.")


def check_one_source(num_args: int, chunk_size: Any) -> None:
    """Refuse ``args`` or ``chunk_size`` together with ``batches``."""
    if num_args or chunk_size is not None:
        what = "chunk_size" if chunk_size is not None else f"{num_args} args"
        raise ValueError(f"{caller()}: batches= and {what} were given; each batch holds all args of the function.")


def check_examples(name: str, args: Any) -> int:
    """The number of examples along the leading axis of all leaves except scalars, which all examples share."""
    sizes = {
        name + keystr(path): jnp.shape(leaf)[0] for path, leaf in tree_flatten_with_path(args)[0] if jnp.ndim(leaf)
    }
    if not sizes:
        raise ValueError(f"{caller()}: {name} has no array with a leading axis of examples, expected at least one.")
    (first_name, size), *others = sizes.items()
    for leaf_name, other in others:
        if other != size:
            raise ValueError(
                f"{caller()}: {leaf_name} has {other} examples along its leading axis, expected {size} to match "
                f"{first_name}; close the function over arrays that all examples share."
            )
    if not size:
        raise ValueError(f"{caller()}: {first_name} has no examples, expected at least one.")
    return size


def check_outputs_of_examples(outputs: Any) -> int:
    """The number of examples along the leading axis of every output."""
    for path, leaf in tree_flatten_with_path(outputs)[0]:
        if not leaf.ndim:
            raise ValueError(
                f"{caller()}: the output model(x){keystr(path)} is a scalar, expected a leading axis of examples."
            )
    return check_examples("model(x)", outputs)


def check_untraced(tree: Any) -> None:
    """Refuse tracers in an operator with ``batches``, which sums on the host."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree)):
        raise TypeError(
            f"{caller()}: x or v is traced, but batches= are summed on the host, outside jit, vmap and grad; give the "
            "data as arrays with chunk_size=, pass op itself to a solver such as curvature.cg, or solve with SciPy on "
            "as_scipy(op)."
        )


def check_some_batch(num_batches: int) -> None:
    """Refuse an iterable without batches."""
    if not num_batches:
        raise ValueError(f"{caller()}: batches is empty, expected at least one batch.")


def check_logits(likelihood: str, outputs: Any) -> None:
    """Refuse scalar outputs as logits of a categorical likelihood."""
    for path, leaf in tree_flatten_with_path(outputs)[0]:
        if likelihood == "categorical" and not leaf.ndim:
            raise ValueError(
                f"{caller()}: likelihood='categorical', but the output model(x){keystr(path)} is a scalar, expected "
                "logits along its last axis."
            )
