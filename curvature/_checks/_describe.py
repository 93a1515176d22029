"""Formatting of values in error messages, and what counts as an array or an integer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def is_array_like(leaf: Any) -> bool:
    """Whether JAX accepts the leaf as an array or a number."""
    return isinstance(leaf, _ARRAY_LIKE)


def is_static_integer(value: Any) -> bool:
    """Whether the value is an integer that can set a shape: no boolean, no JAX array."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def describe(value: Any) -> str:
    """The value, truncated, and its type; for an array only the shape."""
    if is_array_like(value) and jnp.ndim(value):
        return f"an array of shape {jnp.shape(value)}"
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} of type {type(value).__name__}"
