"""Input checks of the functions that users pass: what they are and what they return."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._errors import caller, describe, is_array_like


def check_callable(name: str, value: Any) -> None:
    """Refuse anything that cannot be called."""
    if not callable(value):
        raise TypeError(f"{caller()}: {name} is {describe(value)}, expected a function.")


def check_arrays(name: str, out: Any) -> Any:
    """Refuse a function that returns anything but arrays and numbers, while it is traced; returns ``out``."""
    for path, leaf in tree_flatten_with_path(out)[0]:
        if not is_array_like(leaf) and not hasattr(leaf, "__jax_array__"):
            raise TypeError(
                f"{caller()}: {name} returns {describe(leaf)}{f' at {keystr(path)}' if path else ''}, expected arrays "
                "and numbers, also as auxiliary data; return what is no array in another way."
            )
    return out


def check_scalar_output(name: str, out: Any) -> None:
    """Refuse an objective that returns anything but one real floating scalar."""
    remedy = "reduce it, for instance with jnp.sum; for vector-valued functions there is curvature.jacobian"
    if isinstance(out, tuple) and len(out) == 2:
        remedy = "a function that also returns auxiliary data needs has_aux=True, where it is accepted"
    leaves = jax.tree.leaves(out)
    if not jax.tree_util.treedef_is_leaf(jax.tree.structure(out)) or len(leaves) != 1:
        raise TypeError(
            f"{caller()}: {name} returns a tree of {len(leaves)} arrays, expected one floating scalar; {remedy}."
        )
    if leaves[0].shape != ():
        raise TypeError(f"{caller()}: {name} returns shape {leaves[0].shape}, expected a scalar, shape (); {remedy}.")
    check_floating_output(name, out)


def check_floating_output(name: str, out: Any) -> None:
    """Refuse a function whose outputs have no derivative: integers, booleans, complex numbers, no output at all."""
    if not jax.tree.leaves(out):
        raise TypeError(f"{caller()}: {name} returns no array ({out!r}), expected floating arrays; does it return?")
    for path, leaf in tree_flatten_with_path(out)[0]:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"{caller()}: the output {name}(x){keystr(path)} has dtype {leaf.dtype}, "
                "expected a real floating dtype."
            )
