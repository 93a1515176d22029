"""Errors about options: words, numbers, positions."""

from typing import Any, TypeVar, get_args

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from curvature._checks._words import is_array_like
from curvature._types import ChunkSize

T = TypeVar("T")


def check_choice(function: str, name: str, value: Any, choices: Any) -> None:
    """Refuse a word that is not among those of a ``Literal`` or a sequence."""
    words = get_args(choices) or tuple(choices)
    if not (isinstance(value, str) and value in words):
        raise ValueError(f"{function}: {name}={value!r} is unknown, expected one of {', '.join(map(repr, words))}.")


def check_order(function: str, order: Any) -> None:
    """Refuse an order of derivatives other than the first and the second."""
    if isinstance(order, bool) or order not in (1, 2):
        raise ValueError(f"{function}: order={order!r}, expected 1 or 2.")


def check_method(function: str, method: Any, names: tuple[str, ...]) -> None:
    """Refuse a method that is neither one of the names nor, already handled, an optax transformation."""
    if method not in names if isinstance(method, str) else True:
        raise ValueError(
            f"{function}: method={method!r} is unknown, expected one of {', '.join(map(repr, names))} "
            "or an optax transformation such as curvature.newton() or optax.lbfgs()."
        )


def check_hessian_used(function: str, method: Any, used: bool) -> None:
    """Refuse a Hessian given to a method that forms none, which would silently ignore it."""
    if not used:
        raise ValueError(
            f"{function}: hessian= is for the methods that form a Hessian, 'newton', 'trust-exact' and 'cubic-newton'; "
            f"method={method!r} forms none."
        )


def check_chunk_size(function: str, chunk_size: ChunkSize) -> None:
    """Refuse a chunk size that is neither a positive integer, nor None, nor "auto"."""
    if chunk_size is None or (isinstance(chunk_size, str) and chunk_size == "auto"):
        return
    whole = isinstance(chunk_size, int | np.integer) and not isinstance(chunk_size, bool)
    if not whole or chunk_size < 1:
        raise ValueError(f"{function}: chunk_size={chunk_size!r}, expected a positive integer, None or 'auto'.")


def check_blocks(function: str, blocks: Any) -> None:
    """Refuse anything but the parts of a Hessian that can be asked for; whether the paths exist shows later."""
    is_pair = isinstance(blocks, tuple | list) and len(blocks) == 2 and all(isinstance(path, str) for path in blocks)
    if not (is_pair or blocks is None or (isinstance(blocks, str) and blocks == "diagonal")):
        raise ValueError(
            f"{function}: blocks={blocks!r}, expected a pair of paths (rows, columns), 'diagonal', or None for all."
        )


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
    places = [int(position) % num_args for position in positions]
    if len(set(places)) < len(places):
        raise ValueError(
            f"{function}: argnums={argnums!r} names an argument twice: of the {num_args} positional arguments those "
            f"at {places}. Expected each position once."
        )


def check_nonnegative(function: str, name: str, value: Any) -> None:
    """Refuse a negative, NaN or non-numeric tolerance; tracers pass."""
    if isinstance(value, Tracer):
        return
    if isinstance(value, bool) or not is_array_like(value) or np.ndim(value) or not value >= 0:
        raise ValueError(f"{function}: {name}={value!r}, expected a number >= 0.")


def check_positive(function: str, name: str, value: Any) -> None:
    """Refuse anything but a positive number; tracers pass."""
    if isinstance(value, Tracer):
        return
    if isinstance(value, bool) or not is_array_like(value) or jnp.shape(value) != () or not value > 0:
        raise ValueError(f"{function}: {name}={value!r}, expected a number > 0.")


def check_schedule(function: str, name: str, value: Any) -> None:
    """Refuse what is neither a number of at least 0 nor a function of the step, as an optax schedule is."""
    if callable(value) or isinstance(value, Tracer):
        return
    if isinstance(value, bool) or not is_array_like(value) or jnp.shape(value) != () or not value >= 0:
        raise ValueError(f"{function}: {name}={value!r}, expected a number >= 0 or a schedule such as optax has.")


def check_decay(function: str, name: str, value: Any) -> None:
    """Refuse a rate of decay outside [0, 1); tracers pass."""
    if isinstance(value, Tracer):
        return
    if isinstance(value, bool) or not is_array_like(value) or jnp.shape(value) != () or not 0 <= value < 1:
        raise ValueError(f"{function}: {name}={value!r}, expected a number of at least 0 and below 1.")


def check_count(function: str, name: str, value: Any, least: int = 0) -> None:
    """Refuse anything but an integer of at least ``least``; tracers pass."""
    if isinstance(value, Tracer):
        return
    if not _is_integer(value) or value < least:
        raise ValueError(f"{function}: {name}={value!r}, expected an integer >= {least}.")


def _is_integer(value: Any) -> bool:
    if type(value) is int:
        return True
    return is_array_like(value) and not np.ndim(value) and jnp.issubdtype(jnp.result_type(value), jnp.integer)


def require_extra(function: str, name: str, value: T | None) -> T:
    """``value``, one of the arguments of an optimizer's update; refuses None."""
    if value is None:
        raise ValueError(
            f"{function}: update() needs {name}=; call "
            "update(grad, state, params, value=value, grad=grad, value_fn=value_fn), as for optax.lbfgs()."
        )
    return value


def require_data(function: str, args: Any) -> tuple[Any, ...]:
    """The data of the curvature as a tuple, one of the arguments of an optimizer's update; refuses None."""
    if args is None:
        raise ValueError(
            f"{function}: update() needs args=, the data on which the curvature is taken; call "
            "update(grad, state, params, args=batch), where model(params, *batch) gives the outputs."
        )
    return args if type(args) is tuple else (args,)


def check_extra(function: str, module: str, extra: str, failure: ImportError | None) -> None:
    """Refuse to go on without an optional library; ``failure`` is how its import failed, if it did."""
    if isinstance(failure, ModuleNotFoundError) and failure.name == module:
        message = f"{function}: needs {module}, which is not installed; pip install 'curvature-jax[{extra}]'."
        raise ModuleNotFoundError(message, name=module)
    if failure is not None:
        raise ImportError(
            f"{function}: needs {module}, whose import fails: {failure}; install releases of it and of JAX that work "
            f"together, as pip install -U 'curvature-jax[{extra}]' tries to.",
            name=module,
        ) from failure
