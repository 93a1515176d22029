"""Compiled programs, found again as long as the function that they were made for lives."""

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.core
from jax.extend.core import get_opaque_trace_state

from curvature._types import Objective, Tree
from curvature.transforms._modes import num_entries

# A cache and nothing else: it is never read but for the very function that put its programs there.
_PROGRAMS: weakref.WeakKeyDictionary[Objective, dict[Any, Callable[..., Any]]] = weakref.WeakKeyDictionary()

# Up to JAX 0.11.0, XLA's newer emitters of fusions take more than half of a compilation for the CPU, and small programs
# are no faster for it; over 100,000 entries of data they may be by a quarter. Later versions compile as quickly as this
# makes these, and have no such option.
_QUICK_TO_COMPILE = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11, 1) else None
_SMALL = 2000  # entries of the operands together: our own choice, between the two

with jax.core.eval_context():
    _UNTRACED = get_opaque_trace_state()


def compiled(program: Callable[..., Any], fun: Objective, operands: Tree) -> Callable[..., Any]:
    """``program(fun, ...)`` compiled, found again as long as the objective lives, and not kept any longer.

    Keyword arguments are static. What cannot be looked up, a bound method (made anew at each mention) or a callable
    that holds arrays, is compiled at every call. Few ``operands``, the start and the data, are compiled quickly; under
    another transformation the outermost one says how.
    """
    small = num_entries(operands) <= _SMALL
    quickly = small and get_opaque_trace_state() == _UNTRACED
    try:
        programs = _PROGRAMS.setdefault(fun, {})
        key = program, quickly
        if key not in programs:
            alive = functools.partial(_run_alive, program, weakref.ref(fun))
            programs[key] = _jit(alive, program, quickly)
        return programs[key]
    except TypeError:  # not hashable, or not weakly referable
        return _jit(functools.partial(program, fun), program, quickly)


def _jit(call: Callable[..., Any], program: Callable[..., Any], quickly: bool) -> Callable[..., Any]:
    static = [name for name, p in inspect.signature(program).parameters.items() if p.kind is p.KEYWORD_ONLY]
    options = _QUICK_TO_COMPILE if quickly and jax.default_backend() == "cpu" else None
    return jax.jit(call, static_argnames=static, compiler_options=options)


def _run_alive(program: Callable[..., Any], reference: Callable[[], Any], *operands: Any, **how: Any) -> Any:
    return program(reference(), *operands, **how)
