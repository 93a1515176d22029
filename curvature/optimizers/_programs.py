"""Compiled programs, found again as long as the function that they were made for lives."""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import jax

from curvature._types import Objective

# A cache and nothing else: it is never read but for the very function that put its programs there.
_PROGRAMS: weakref.WeakKeyDictionary[Objective, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()


def compiled(program: Callable[..., Any], fun: Objective) -> Callable[..., Any]:
    """``program(fun, ...)`` compiled, found again as long as the objective lives, and not kept any longer.

    Keyword arguments are static. What cannot be looked up, a bound method (made anew at each mention) or a callable
    that holds arrays, is compiled at every call.
    """
    static = _keyword_only(program)
    try:
        programs = _PROGRAMS.setdefault(fun, {})
        if program not in programs:
            alive = functools.partial(_run_alive, program, weakref.ref(fun))
            programs[program] = jax.jit(alive, static_argnames=static)
        return programs[program]
    except TypeError:  # not hashable, or not weakly referable
        return jax.jit(functools.partial(program, fun), static_argnames=static)


@functools.cache
def _keyword_only(program: Callable[..., Any]) -> tuple[str, ...]:
    """The names, looked up once: ``inspect`` takes as long as a small solve."""
    return tuple(name for name, p in inspect.signature(program).parameters.items() if p.kind is p.KEYWORD_ONLY)


def _run_alive(program: Callable[..., Any], reference: Callable[[], Any], *operands: Any, **how: Any) -> Any:
    return program(reference(), *operands, **how)
