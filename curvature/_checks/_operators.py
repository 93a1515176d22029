"""Input checks of linear operators: their structures, functions, data and likelihoods."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._checks._functions import check_callable
from curvature._checks._trees import check_same_structure
from curvature._errors import caller, describe, is_array_like
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


def check_operator(op: Any) -> None:
    """Refuse anything but an operator, such as a function ``v -> A v``."""
    if not (hasattr(op, "linearize") and hasattr(op, "in_structure")):
        raise TypeError(
            f"{caller()}: op is {describe(op)}, expected a curvature.LinearOperator, which knows its structure."
        )


def check_square_operator(op: Any, *, symmetric: bool = False) -> None:
    """Refuse an operator that is not square or acts on no entries; with ``symmetric`` also one not known to be it."""
    check_operator(op)
    takes, gives = op.in_structure(), op.out_structure()
    if jax.tree.structure(takes) != jax.tree.structure(gives):
        raise ValueError(
            f"{caller()}: op takes {jax.tree.structure(takes)} and gives {jax.tree.structure(gives)}, "
            "expected a square operator, such as op.T @ op."
        )
    for (path, leaf), out in zip(tree_flatten_with_path(takes)[0], jax.tree.leaves(gives), strict=True):
        if leaf.shape != out.shape:
            raise ValueError(
                f"{caller()}: op gives v{keystr(path)} of shape {leaf.shape} the shape {out.shape}, "
                "expected a square operator, such as op.T @ op."
            )
    if not sum(leaf.size for leaf in jax.tree.leaves(takes)):
        raise ValueError(f"{caller()}: op acts on trees without entries, expected at least one number.")
    if symmetric and not op.is_symmetric:
        raise ValueError(
            f"{caller()}: {type(op).__name__} is not known to be symmetric, expected op.is_symmetric; "
            "say so where it is made, as in MatrixOperator(matrix, is_symmetric=True)."
        )


def check_sampling(kind: str, likelihood: str | None, key: Any) -> None:
    """Refuse to draw labels without a likelihood or a key."""
    if kind == "sampled" and likelihood is None:
        raise ValueError(
            f"{caller()}: kind='sampled' draws labels and needs likelihood='categorical', 'bernoulli' or 'normal'."
        )
    if kind == "sampled" and key is None:
        raise ValueError(f"{caller()}: kind='sampled' draws labels and needs key=jax.random.key(seed).")
