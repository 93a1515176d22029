"""Errors about operators, keys and sample counts of the stochastic estimators."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._checks._words import describe


def check_square_operator(function: str, op: Any, *, symmetric: bool = False) -> None:
    """Refuse what is not an operator from trees to trees of the same shapes, or not known to be symmetric."""
    if not (hasattr(op, "linearize") and hasattr(op, "in_structure")):
        raise TypeError(f"{function}: op is {describe(op)}, expected a LinearOperator, which knows its structure.")
    takes, gives = op.in_structure(), op.out_structure()
    if jax.tree.structure(takes) != jax.tree.structure(gives):
        raise ValueError(
            f"{function}: op takes {jax.tree.structure(takes)} and gives {jax.tree.structure(gives)}, "
            "expected a square operator, such as op.T @ op."
        )
    for (path, leaf), out in zip(tree_flatten_with_path(takes)[0], jax.tree.leaves(gives), strict=True):
        if leaf.shape != out.shape:
            raise ValueError(
                f"{function}: op gives v{keystr(path)} of shape {leaf.shape} the shape {out.shape}, "
                "expected a square operator, such as op.T @ op."
            )
    if not sum(leaf.size for leaf in jax.tree.leaves(takes)):
        raise ValueError(f"{function}: op acts on trees without entries, expected at least one number.")
    if symmetric and not op.is_symmetric:
        raise ValueError(
            f"{function}: {type(op).__name__} is not known to be symmetric, expected op.is_symmetric; "
            "say so where it is made, as in MatrixOperator(matrix, is_symmetric=True)."
        )


def check_key(function: str, key: Any) -> None:
    """Refuse what is not one random key, old style or new."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32
    if not (typed or raw):
        raise TypeError(f"{function}: key is {describe(key)}, expected a random key such as jax.random.key(0).")
    if jnp.ndim(key) != (0 if typed else 1):
        raise ValueError(f"{function}: key has shape {jnp.shape(key)}, expected one key; map over many with jax.vmap.")


def check_static_count(function: str, name: str, value: Any, least: int) -> None:
    """Refuse a count that is not a Python integer of at least ``least``: it sets the shapes."""
    if isinstance(value, jax.Array):
        came = "is traced" if isinstance(value, Tracer) else f"is the array {value}"
        raise TypeError(
            f"{function}: {name} {came}, expected a Python integer; mark it static under jax.jit, and name it in the "
            "static_args of optax.inject_hyperparams."
        )
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(f"{function}: {name}={value!r}, expected an integer >= {least}.")


def check_grid(function: str, grid: Any) -> None:
    """Refuse a grid that is not a vector of real numbers."""
    dtype = getattr(grid, "dtype", None)
    if dtype is None or jnp.ndim(grid) != 1 or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{function}: grid is {describe(grid)}, expected a vector of floats such as jnp.linspace.")


def samples_without_key(function: str) -> ValueError:
    """A number of samples was given, but no key to draw them with."""
    return ValueError(
        f"{function}: num_samples= without key=; give a key to estimate, or neither for the exact answer."
    )
