"""The name that an error message begins with: that of the public function which the user has called.

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
