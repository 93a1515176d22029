"""Input checks of options: names, numbers, counts, keys, argument positions, optional libraries."""

import importlib
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from curvature._errors import caller, describe, is_array_like, is_static_integer
from curvature._types import ChunkSize


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Refuse anything but one of the strings of ``choices``, a ``Literal`` or a sequence."""
    words = get_args(choices) or tuple(choices)
    if not (isinstance(value, str) and value in words):
        raise ValueError(f"{caller()}: {name}={value!r} is unknown, expected one of {', '.join(map(repr, words))}.")


def check_chunk_size(chunk_size: ChunkSize) -> None:
    """Refuse a chunk size that is neither a positive integer, nor None, nor "auto"."""
    if chunk_size is None or (isinstance(chunk_size, str) and chunk_size == "auto"):
        return
    if not is_static_integer(chunk_size) or chunk_size < 1:
        raise ValueError(f"{caller()}: chunk_size={chunk_size!r}, expected a positive integer, None or 'auto'.")


def check_blocks(blocks: Any) -> None:
    """Refuse anything but the documented values of ``blocks=``; ``select`` checks later whether the paths exist."""
    is_pair = isinstance(blocks, tuple | list) and len(blocks) == 2 and all(isinstance(path, str) for path in blocks)
    if not (is_pair or blocks is None or (isinstance(blocks, str) and blocks == "diagonal")):
        raise ValueError(
            f"{caller()}: blocks={blocks!r}, expected a pair of paths (rows, columns), 'diagonal', or None for all."
        )


def check_nonnegative(name: str, value: Any) -> None:
    """Refuse anything but a number of at least 0; tracers pass."""
    _check_number(name, value, lambda number: number >= 0, "a number >= 0")


def check_positive(name: str, value: Any) -> None:
    """Refuse anything but a positive number; tracers pass."""
    _check_number(name, value, lambda number: number > 0, "a number > 0")


def check_decay(name: str, value: Any) -> None:
    """Refuse a decay rate outside [0, 1); tracers pass."""
    _check_number(name, value, lambda number: 0 <= number < 1, "a number of at least 0 and below 1")


def check_schedule(name: str, value: Any) -> None:
    """Refuse anything but a number of at least 0 or a function of the step, as an optax schedule is."""
    if not callable(value):
        expected = "a number >= 0 or a schedule such as optax has"
        _check_number(name, value, lambda number: number >= 0, expected)


def check_count(name: str, value: Any, least: int = 0) -> None:
    """Refuse anything but an integer of at least ``least``, which may be an array; tracers pass."""

    def in_range(number: Any) -> bool:  # JAX finds no dtype for integers of more than 64 bits
        is_integer = isinstance(number, int) or jnp.issubdtype(jnp.result_type(number), jnp.integer)
        return is_integer and number >= least

    _check_number(name, value, in_range, f"an integer >= {least}")


def _check_number(name: str, value: Any, in_range: Callable[[Any], Any], expected: str) -> None:
    """Refuse anything but one number, no boolean, in the range that ``expected`` describes; tracers pass."""
    if isinstance(value, Tracer):
        return
    is_number = is_array_like(value) and not isinstance(value, bool) and np.ndim(value) == 0
    number = np.asarray(value) if isinstance(value, jax.Array) else value  # JAX would trace the comparison in a branch
    if not (is_number and in_range(number)):
        raise ValueError(f"{caller()}: {name}={value!r}, expected {expected}.")


def check_static_count(name: str, value: Any, least: int) -> None:
    """Refuse anything but a Python integer of at least ``least``: the count sets shapes."""
    if isinstance(value, jax.Array):
        came = "is traced" if isinstance(value, Tracer) else f"is the array {value}"
        raise TypeError(
            f"{caller()}: {name} {came}, expected a Python integer; mark it static under jax.jit, and name it in the "
            "static_args of optax.inject_hyperparams."
        )
    if not is_static_integer(value) or value < least:
        raise ValueError(f"{caller()}: {name}={value!r}, expected an integer >= {least}.")


def check_size(name: str, value: Any, limit: int, what: str) -> None:
    """Refuse anything but a Python integer from 1 to ``limit``, which ``what`` explains."""
    if not is_static_integer(value) or not 1 <= value <= limit:
        raise ValueError(f"{caller()}: {name}={value!r}, expected an integer from 1 to {limit}, {what}.")


def check_key(key: Any) -> None:
    """Refuse anything but one random key, typed or raw."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = isinstance(key, jax.Array | np.ndarray) and key.dtype == jnp.uint32
    if not (typed or raw):
        raise TypeError(f"{caller()}: key is {describe(key)}, expected a random key such as jax.random.key(0).")
    if jnp.ndim(key) != (0 if typed else 1):
        raise ValueError(f"{caller()}: key has shape {jnp.shape(key)}, expected one key; map over many with jax.vmap.")


def import_extra(module: str, extra: str) -> Any:
    """An optional library, imported here: not at the top of a module, because it may be slow or not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as failure:
        check_extra(module.partition(".")[0], extra, failure)
        raise


def check_extra(module: str, extra: str, failure: ImportError | None) -> None:
    """Refuse to continue without an optional library; ``failure`` is the error of its import, None if it succeeded."""
    if isinstance(failure, ModuleNotFoundError) and failure.name == module:
        message = f"{caller()}: needs {module}, which is not installed; pip install 'curvature-jax[{extra}]'."
        raise ModuleNotFoundError(message, name=module)
    if failure is not None:
        raise ImportError(
            f"{caller()}: needs {module}, whose import fails: {failure}; install releases of it and of JAX that work "
            f"together, as pip install -U 'curvature-jax[{extra}]' tries to.",
            name=module,
        ) from failure
