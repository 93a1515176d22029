"""What error messages say: the name of the public function that the user has called, and values.

The rule: a public function carries ``@public``; a function that it returns for a later call carries ``@later``, which
keeps the name that holds where it is defined; a method carries ``@of_class``; ``calling(name)`` sets any other name.
Code that raises begins its message with ``{caller()}: ``. No function takes the name as an argument. The innermost
name counts: if ``minimize`` calls ``trust_region``, an error of its options begins with ``trust_region``.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Concatenate, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

# A context variable, because each thread traces for its own caller.
_NAME: ContextVar[str] = ContextVar("name of the public function", default="curvature")


def caller() -> str:
    """The name of the public function that is running."""
    return _NAME.get()


@contextmanager
def calling(name: str) -> Iterator[None]:
    """Errors of the block, or of the decorated function, begin with ``name``."""
    token = _NAME.set(name)
    try:
        yield
    finally:
        _NAME.reset(token)


def public(function: Callable[P, R]) -> Callable[P, R]:
    """Errors of the function begin with its own name."""
    return _naming(lambda _: function.__name__, function)


def later(function: Callable[P, R]) -> Callable[P, R]:
    """Errors of the function begin with the name that holds now, whoever calls it."""
    name = caller()
    return _naming(lambda _: name, function)


def of_class(method: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Errors of the method begin with the name of the class of ``self``."""
    return _naming(lambda args: type(args[0]).__name__, method)


def _naming(name_of: Callable[[tuple[Any, ...]], str], function: Callable[P, R]) -> Callable[P, R]:
    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with calling(name_of(args)):
            return function(*args, **kwargs)

    return call


# ---- values --------------------------------------------------------------------------------------------------------

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
