"""Tolerances and limits of a solve, checked once and passed as operands."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._types import Tree


class Limits(NamedTuple):
    """The tolerances as arrays, which are operands: other numbers use the same compiled program."""

    gtol: Float[Array, ""]
    rtol: Float[Array, ""]
    max_steps: Int[Array, ""]
    to_rounding: Bool[Array, ""]  # whether a point that is stationary to rounding has converged


def limits_of(x0: Tree, gtol: ArrayLike | None, rtol: ArrayLike, max_steps: ArrayLike) -> Limits:
    """The limits, checked; without ``gtol`` a point converges that is stationary to rounding."""
    dtype = _of_vector(*(leaf.dtype for leaf in jax.tree.leaves(x0)))
    to_rounding = gtol is None
    if gtol is None:
        gtol = 0.0
    plain = all(type(number) in (int, float) for number in (gtol, rtol, max_steps))
    build: Any = _limits_once if plain else _limits  # arrays are no keys of a cache
    return build(dtype, gtol, rtol, max_steps, to_rounding)


def _limits(dtype: Any, gtol: ArrayLike, rtol: ArrayLike, max_steps: ArrayLike, to_rounding: bool) -> Limits:
    for name, tolerance in {"gtol": gtol, "rtol": rtol}.items():
        _checks.check_nonnegative(name, tolerance)
    _checks.check_count("max_steps", max_steps)
    return Limits(
        _operand(gtol, dtype), _operand(rtol, dtype), _operand(max_steps, jnp.int32), _operand(to_rounding, bool)
    )


_limits_once = functools.lru_cache(typed=True)(_limits)  # numbers are mostly those of the call before


def _operand(number: ArrayLike, dtype: Any) -> Any:
    """The number in that dtype; by NumPy if it is not in JAX's hands, for a kernel takes longer than a small solve."""
    return jnp.asarray(number, dtype) if isinstance(number, jax.Array) else np.asarray(number, dtype)


@functools.cache
def _of_vector(*dtypes: Any) -> Any:
    """The dtype of ``ravel(x)`` by those of the leaves."""
    with jax.numpy_dtype_promotion("standard"):
        dtype = functools.reduce(jnp.promote_types, dtypes, jnp.float32)
    return jnp.dtype(dtype)
