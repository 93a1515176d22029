"""How a value is told in an error message."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_ARRAY_LIKE = (jax.Array, np.ndarray, np.generic, bool, int, float, complex)


def is_array_like(leaf: Any) -> bool:
    """Whether JAX takes it for an array or a number."""
    return isinstance(leaf, _ARRAY_LIKE)


def describe(value: Any) -> str:
    """The value, cut short, and its type; of an array only the shape."""
    if is_array_like(value) and jnp.ndim(value):
        return f"an array of shape {jnp.shape(value)}"
    text = repr(value)
    return f"{text if len(text) < 60 else text[:57] + '...'} of type {type(value).__name__}"
