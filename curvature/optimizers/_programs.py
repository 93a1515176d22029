"""The compiled loops of the drivers, found again as long as the function that they are for lives."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import jax

Result = TypeVar("Result")


class Programs(Generic[Result]):
    """``run(fun, *operands, **how)`` compiled once for each ``fun``, and not kept any longer than ``fun`` is.

    A cache and nothing else: it is never read but for the very function that put its program there. What cannot be
    looked up, a bound method (made anew at each mention) or a callable that holds arrays, is compiled at every call.
    """

    def __init__(self, run: Callable[..., Result], static: tuple[str, ...]) -> None:
        """``static`` names the keyword arguments of ``run`` that a program is compiled for."""
        self._run, self._static = run, static
        self._programs: weakref.WeakKeyDictionary[Any, Callable[..., Result]] = weakref.WeakKeyDictionary()

    def of(self, fun: Callable[..., Any]) -> Callable[..., Result]:
        """The compiled loop of a function."""
        try:
            if fun not in self._programs:
                alive = functools.partial(_run_alive, self._run, weakref.ref(fun))
                self._programs[fun] = jax.jit(alive, static_argnames=self._static)
            return self._programs[fun]
        except TypeError:  # not hashable, or not weakly referable
            return jax.jit(functools.partial(self._run, fun), static_argnames=self._static)


def _run_alive(run: Callable[..., Result], reference: Callable[[], Any], *operands: Any, **how: Any) -> Result:
    return run(reference(), *operands, **how)
