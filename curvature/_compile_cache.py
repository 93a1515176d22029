"""Caches of compiled programs, keyed weakly by the functions that they were compiled for."""

import functools
import inspect
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.core
import numpy as np
from jax.extend.core import get_opaque_trace_state

from curvature._trees import num_entries
from curvature._types import Objective, Tree

T = TypeVar("T")

# The results of `cached`; an entry is only read for the function that it was stored for.
_RESULTS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()

# Up to JAX 0.11.0, XLA's newer emitters of fusions take more than half of a compilation for the CPU, and small programs
# are no faster for it; over 100,000 entries of data they may be by a quarter. Later versions compile as quickly as this
# makes these, and have no such option.
_QUICK_TO_COMPILE = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11, 1) else None
_SMALL = 2000  # entries of the operands together: our own choice, between the two

with jax.core.eval_context():
    _UNTRACED = get_opaque_trace_state()

# The programs of `compiled_for`; weak references to functions stand in the keys in place of the functions.
_PROGRAMS_FOR: dict[Any, Callable[..., Any]] = {}
_MAX_PROGRAMS = 1000  # Heuristic: far more than one session needs; bounds what numbers in the keys can add up to.


def is_traced() -> bool:
    """Whether the caller runs inside ``jit``, ``vmap``, ``grad`` or another transformation."""
    return get_opaque_trace_state() != _UNTRACED


def compiled(program: Callable[..., Any], fun: Objective, operands: Tree) -> Callable[..., Any]:
    """``program(fun, ...)`` compiled, found again as long as the objective lives, and not kept any longer.

    Keyword arguments are static. What cannot be looked up, a bound method (made anew at each mention) or a callable
    that holds arrays, is compiled at every call. Few ``operands``, the start and the data, are compiled quickly; under
    another transformation the outermost one says how.
    """
    small = num_entries(operands) <= _SMALL
    quickly = small and not is_traced()
    return cached(
        (fun,),
        (program, quickly),
        lambda: _jit(functools.partial(_run_alive, program, weakref.ref(fun)), program, quickly),
        otherwise=lambda: _jit(functools.partial(program, fun), program, quickly),
    )


def cached(functions: tuple[Any, ...], key: Any, make: Callable[[], T], otherwise: Callable[[], T] | None = None) -> T:
    """``make()``, stored for these functions and the key until the first of the functions is garbage-collected.

    Functions that cannot be keys, because they are not hashable or not weakly referable, get ``otherwise()`` at every
    call, or ``make()`` if that is None.
    """
    try:
        key = tuple(map(weakref.ref, functions)), key
        known = _RESULTS.setdefault(functions[0], {})
        if key in known:
            return known[key]
    except TypeError:
        return make() if otherwise is None else otherwise()
    known[key] = make()
    return known[key]


def _jit(call: Callable[..., Any], program: Callable[..., Any], quickly: bool) -> Callable[..., Any]:
    static = [name for name, p in inspect.signature(program).parameters.items() if p.kind is p.KEYWORD_ONLY]
    options = _QUICK_TO_COMPILE if quickly and jax.default_backend() == "cpu" else None
    return jax.jit(call, static_argnames=static, compiler_options=options)


def _run_alive(program: Callable[..., Any], reference: Callable[[], Any], *operands: Any, **how: Any) -> Any:
    return program(reference(), *operands, **how)


class Given:
    """The static part of a call: structures, functions and options, from which a program rebuilds its operands.

    All are equal, because the key of a program has compared what they hold; they are emptied after the call, so that
    the cache of ``jax.jit`` keeps no function of the user alive.
    """

    def __init__(self, structure: Any, static: tuple[Any, ...], how: dict[str, Any]) -> None:
        self.content: tuple[Any, tuple[Any, ...], dict[str, Any]] | None = structure, static, how

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given)

    def __hash__(self) -> int:
        return 0


def call_compiled(program: Callable[..., Any], operands: tuple[Any, ...], how: dict[str, Any]) -> Any:
    """``program(*operands, **how)``, compiled once for operators of one structure with the same functions.

    Arrays and floats of the operands are passed as operands; functions, other numbers and options are static.
    Functions are compared by identity, and by the numbers and arrays in their closures and globals, and referred to
    weakly: a program is dropped when one of its functions dies. Where a function of the user needs the value of an
    operand to be traced, ``program`` is called without ``jit``.
    """
    jitted, given, data = compiled_for(program, operands, how)
    try:
        return jitted(given, *data)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError):
        return program(*operands, **how)
    finally:
        given.content = None


def compiled_for(
    program: Callable[..., Any], operands: tuple[Any, ...], how: dict[str, Any]
) -> tuple[Any, Given, list[Any]]:
    """The function under ``jax.jit`` that ``call_compiled`` calls, and its arguments.

    It is compiled at every call where the operands have no key: a bound method, which is another object at each
    mention, or what cannot be hashed.
    """
    leaves, structure = jax.tree.flatten(operands)
    data = [leaf for leaf in leaves if _is_data(leaf)]
    static = tuple(None if _is_data(leaf) else leaf for leaf in leaves)
    given = Given(structure, static, how)
    quickly = num_entries(data) <= _SMALL
    functions: list[Any] = []
    try:
        options = tuple(sorted(how.items()))
        key = program, quickly, _without_functions((structure, static, options), functions)
        if key not in _PROGRAMS_FOR:
            _keep(key, _jit_given(program, quickly), functions)
        return _PROGRAMS_FOR[key], given, data
    except TypeError:  # not hashable, or not weakly referable
        return _jit_given(program, quickly), given, data


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or type(leaf) is float


def _without_functions(value: Any, functions: list[Any]) -> Any:
    """A static value with weak references in place of the functions in it, which are added to ``functions``."""
    if isinstance(value, jax.tree_util.PyTreeDef):
        node = _without_functions(value.node_data(), functions)
        return node, tuple(_without_functions(child, functions) for child in value.children())
    if type(value) in (tuple, list):
        return type(value), tuple(_without_functions(item, functions) for item in value)
    if inspect.ismethod(value):
        raise TypeError("a bound method is another object at each mention")
    if callable(value) and not isinstance(value, type):
        functions.append(value)
        return weakref.ref(value), tuple(_captured(value, set()))
    return type(value), value


class _Same:
    """A weak reference to an array that is equal to references to the same array only."""

    def __init__(self, array: Any) -> None:
        self.reference, self.identity = weakref.ref(array), id(array)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.reference() is not None and self.reference() is other.reference()

    def __hash__(self) -> int:
        return self.identity


def _captured(function: Any, seen: set[int]) -> Iterator[Any]:
    """The numbers and arrays that a function, and those that it calls by name, take from closures and globals.

    Without them a function that is called again after one of its variables was assigned another value would meet the
    program of the old value.
    """
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return
    seen.add(id(function))
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
    for value in [*cells, *(function.__globals__[name] for name in names)]:
        if isinstance(value, jax.Array | np.ndarray):
            yield _Same(value)
        elif isinstance(value, bool | int | float | complex | np.generic):
            yield type(value), value
        else:
            yield from _captured(value, seen)


def _is_set(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # of a variable that has no value yet
        return False


def _keep(key: Any, jitted: Callable[..., Any], functions: list[Any]) -> None:
    """Keep a program until one of its functions dies, or the oldest where there are too many."""
    if len(_PROGRAMS_FOR) >= _MAX_PROGRAMS:
        _PROGRAMS_FOR.pop(next(iter(_PROGRAMS_FOR)), None)
    _PROGRAMS_FOR[key] = jitted
    for function in functions:
        weakref.finalize(function, _PROGRAMS_FOR.pop, key, None).atexit = False


def _jit_given(program: Callable[..., Any], quickly: bool) -> Callable[..., Any]:
    def rebuilt(given: Given, *data: Any) -> Any:
        assert given.content is not None
        structure, static, how = given.content
        values = iter(data)
        # None is no leaf of a tree: here it marks where the data was.
        leaves = [next(values) if leaf is None else leaf for leaf in static]
        return program(*structure.unflatten(leaves), **how)

    options = _QUICK_TO_COMPILE if quickly and jax.default_backend() == "cpu" else None
    return jax.jit(rebuilt, static_argnums=0, compiler_options=options)
