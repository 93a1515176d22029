"""Caches of compiled solves and compiled calls, keyed weakly by the functions that they were compiled for."""

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

# The results of `cached`, those used last at the end, and the finalizers of their functions; their keys hold weak
# references to functions.
_RESULTS: dict[Any, tuple[Any, list[Any]]] = {}
_MAX_RESULTS = 1000  # Heuristic: more than one session needs; keys that hold numbers could grow without bound.

# Up to JAX 0.11.0, XLA's fusion emitters take more than half of a compilation for the CPU. They do not make small
# programs faster; programs on more than 100,000 entries of data may run faster by a quarter. Later versions compile as
# quickly without this option, and no longer have it.
_QUICK_TO_COMPILE = {"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11, 1) else None
_SMALL = 2000  # Heuristic: programs with at most so many entries in all operands are compiled quickly.

with jax.core.eval_context():
    _UNTRACED = get_opaque_trace_state()


def clear_caches() -> None:
    """Drop every program that ``curvature`` keeps: compiled solves and compiled eager calls.

    A program is kept under the functions that it was compiled for, as long as they live, and at most 1,000 programs are
    kept. So there is seldom a need to call this. What ``jax.jit`` keeps is dropped by ``jax.clear_caches``.

    Returns:
        Nothing.

    Raises:
        Nothing.

    Cost: the next call of each function traces and compiles.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> result = curvature.minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(2))
        >>> curvature.clear_caches()
    """
    for key in list(_RESULTS):
        _drop(key)


def is_traced() -> bool:
    """Whether the caller runs inside ``jit``, ``vmap``, ``grad`` or another transformation."""
    return get_opaque_trace_state() != _UNTRACED


def compiled(program: Callable[..., Any], fun: Objective, operands: Tree) -> Callable[..., Any]:
    """``program(fun, ...)`` compiled; the cache holds it as long as the objective lives.

    Keyword arguments are static. An objective that cannot be a key is compiled at every call: a bound method, which is
    a new object at each access, or a callable that holds arrays. Programs with small ``operands``, the start and the
    data, are compiled quickly; inside another transformation, the outermost one sets the compiler options.
    """
    small = num_entries(operands) <= _SMALL
    quickly = small and not is_traced()

    def jit_alive() -> Callable[..., Any]:
        reference = weakref.ref(fun)
        return _jit_objective(lambda *args, **how: program(reference(), *args, **how), program, quickly)

    return cached(
        (fun,),
        (program, quickly),
        jit_alive,
        otherwise=lambda: _jit_objective(functools.partial(program, fun), program, quickly),
    )


def cached(functions: tuple[Any, ...], key: Any, make: Callable[[], T], otherwise: Callable[[], T] | None = None) -> T:
    """``make()``, stored for these functions and the key until one of the functions is garbage-collected.

    Functions that cannot be keys, because they are not hashable or not weakly referable, get ``otherwise()`` at every
    call, or ``make()`` if that is None. If there are too many results, the one unused for longest is dropped.
    """
    try:
        key = tuple(map(weakref.ref, functions)), key
        entry = _RESULTS.pop(key, None)
    except TypeError:
        return make() if otherwise is None else otherwise()
    if entry is None:
        entry = make(), [weakref.finalize(function, _drop, key) for function in functions]
        for finalizer in entry[1]:
            finalizer.atexit = False
        while len(_RESULTS) >= _MAX_RESULTS:
            _drop(next(iter(_RESULTS)))
    _RESULTS[key] = entry
    return entry[0]


def _drop(key: Any) -> None:
    """Forget a result, and have the functions that it was stored for forget it too."""
    for finalizer in _RESULTS.pop(key, (None, []))[1]:
        finalizer.detach()


def _jit_objective(call: Callable[..., Any], program: Callable[..., Any], quickly: bool) -> Callable[..., Any]:
    static = [name for name, p in inspect.signature(program).parameters.items() if p.kind is p.KEYWORD_ONLY]
    return jax.jit(call, static_argnames=static, compiler_options=_compiler_options(quickly))


def _compiler_options(quickly: bool) -> dict[str, Any] | None:
    return _QUICK_TO_COMPILE if quickly and jax.default_backend() == "cpu" else None


class Given:
    """The static part of a call: structures, functions and options, from which a program rebuilds its operands.

    All instances are equal, because the key of a program has compared their contents. An instance is emptied after the
    call, so that the cache of ``jax.jit`` keeps no function of the user alive.
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
    Functions are compared by identity, and by the numbers and arrays in their closures and globals. They are held
    weakly: a program is dropped when one of its functions dies. If a function of the user needs the value of an operand
    while it is traced, ``program`` is called without ``jit``.
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

    It is compiled at every call if the operands have no key: a bound method, which is a new object at each access, or
    a value that cannot be hashed.
    """
    leaves, structure = jax.tree.flatten(operands)
    data = [leaf for leaf in leaves if _is_data(leaf)]
    static = tuple(None if _is_data(leaf) else leaf for leaf in leaves)
    given = Given(structure, static, how)
    quickly = num_entries(data) <= _SMALL
    functions: list[Any] = []
    try:
        key = program, quickly, _without_functions((structure, static, tuple(sorted(how.items()))), functions)
    except TypeError:
        return _jit_given(program, quickly), given, data
    return cached(tuple(functions), key, lambda: _jit_given(program, quickly)), given, data


def _is_data(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic) or type(leaf) is float


def _without_functions(value: Any, functions: list[Any]) -> Any:
    """A static value in which the numbers that a function has captured replace the function.

    The functions are appended to ``functions``, in order.
    """
    if isinstance(value, jax.tree_util.PyTreeDef):
        node = _without_functions(value.node_data(), functions)
        return node, tuple(_without_functions(child, functions) for child in value.children())
    if type(value) in (tuple, list):
        return type(value), tuple(_without_functions(item, functions) for item in value)
    if inspect.ismethod(value):
        raise TypeError("a bound method is a new object at each access")
    if callable(value) and not isinstance(value, type):
        functions.append(value)
        return Callable, tuple(_captured_values(value, set()))
    return type(value), value


class _ArrayIdentity:
    """A weak reference to an array; equal only to references to the same array."""

    def __init__(self, array: Any) -> None:
        self.reference, self.identity = weakref.ref(array), id(array)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _ArrayIdentity) and self.reference() is not None and self.reference() is other.reference()
        )

    def __hash__(self) -> int:
        return self.identity


def _captured_values(function: Any, seen: set[int]) -> Iterator[Any]:
    """The numbers and arrays that a function, and the functions that it names, read from closures and globals.

    They are part of the key: after an assignment to one of them, the program of the old value must not be reused.
    """
    if not isinstance(function, types.FunctionType) or id(function) in seen:
        return
    seen.add(id(function))
    names = [name for name in function.__code__.co_names if name in function.__globals__]
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_set(cell)]
    for value in [*cells, *(function.__globals__[name] for name in names)]:
        if isinstance(value, jax.Array | np.ndarray):
            yield _ArrayIdentity(value)
        elif isinstance(value, bool | int | float | complex | np.generic):
            yield type(value), value
        else:
            yield from _captured_values(value, seen)


def _is_set(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # the variable has no value yet
        return False


def _jit_given(program: Callable[..., Any], quickly: bool) -> Callable[..., Any]:
    def rebuilt(given: Given, *data: Any) -> Any:
        assert given.content is not None
        structure, static, how = given.content
        values = iter(data)
        # None is no leaf of a tree, so it marks the positions of the data.
        leaves = [next(values) if leaf is None else leaf for leaf in static]
        return program(*structure.unflatten(leaves), **how)

    return jax.jit(rebuilt, static_argnums=0, compiler_options=_compiler_options(quickly))
