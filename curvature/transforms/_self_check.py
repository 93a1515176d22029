"""Self-check behind ``check=True``: a fast derivative against the plain composition of JAX's transformations.

Both sides are evaluated at the operands of the call. A tracer has no values: if an operand is a tracer, both sides are
evaluated while the call is traced, at random values of the same shapes and dtypes, and the compiled program is the same
as without the check.

Heuristic: the tolerance is chosen so that rounding never fails a check. Two sides may differ by ``eps**(3/8)`` of their
size (2.5e-3 in float32, 1.4e-6 in float64), plus 64 times the change when the point moves by four roundings. ``eps`` is
that of the coarsest dtype in the program.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jaxtyping import Array

from curvature._errors import caller
from curvature._types import Objective, Tree
from curvature.programs import _traced
from curvature.programs._jaxprs import Equation, Variable, dependents, inline
from curvature.programs._legality import blocker_at

_MOST_LINES = 3  # how many lines of the user's program an error message names for each leaf
MOVES = 64.0  # the allowed multiple of the change when the point moves by four roundings
_PRODUCT_EPS = {"gpu": 2.0**-10, "tpu": 2.0**-8}  # default precision of float32 products of matrices: TF32, bfloat16


class Sides(NamedTuple):
    """Both sides of one comparison.

    Attributes:
        found: the result of the function under test.
        expected: the result of the plain composition.
        elsewhere: the result of the plain composition at a point moved by four roundings: the difference is rounding.
        size: numbers of the size of the terms whose sum is ``expected``, so that their norm bounds its rounding.
        moves: the allowed multiple of the difference between ``expected`` and ``elsewhere``.
    """

    found: Array
    expected: Array
    elsewhere: Array
    size: Array
    moves: float = MOVES


class Excess(NamedTuple):
    """The difference of two sides.

    Attributes:
        ratio: as a multiple of the allowed difference.
        error: as a multiple of their size.
        tolerance: the allowed difference, as a multiple of their size.
    """

    ratio: float
    error: float
    tolerance: float


Values = tuple[Tree, Any]
"""The operands of a derivative, and the derivative where it is known at these operands, else None."""

Measure = Callable[[Values], Sequence[Sides]]


def compare(measure: Measure, values: Values, eps: float) -> tuple[list[Excess], Values]:
    """The excesses of ``measure`` at the values, or at random values where they are traced; and the values taken."""
    if not is_traced(values):
        return _excesses(jax.jit(measure)(values), eps), values
    sides, drawn = [], values
    for positive in (False, True):  # at negative numbers a logarithm is NaN, which compares nothing
        drawn = _replace_tracers(values[0], positive), None
        sides = list(jax.jit(measure)(drawn))
        if all(np.isfinite(_flatten_float64(side.expected)).all() for side in sides):
            break
    return _excesses(sides, eps), drawn


def is_traced(tree: Tree) -> bool:
    """Whether a leaf is a tracer."""
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def worst(excesses: Sequence[Excess]) -> tuple[int, Excess]:
    """The number of the comparison with the largest ratio, and its excess."""
    return max(enumerate(excesses), key=lambda pair: pair[1].ratio)


def _excesses(sides: Sequence[Sides], eps: float) -> list[Excess]:
    """Entries where the plain composition is not finite are ignored; a NaN where it is finite is an infinite error."""
    tolerance = eps**0.375
    sizes = [float(np.linalg.norm(_zero_nonfinite(_flatten_float64(side.size)))) for side in sides]
    whole = float(np.linalg.norm(sizes))
    result = []
    for side, size in zip(sides, sizes, strict=True):
        found, expected, elsewhere = (
            _flatten_float64(side.found),
            _flatten_float64(side.expected),
            _flatten_float64(side.elsewhere),
        )
        error = float(np.linalg.norm(np.where(np.isfinite(expected), found - _zero_nonfinite(expected), 0)))
        error = error if np.isfinite(error) else np.inf
        noise = float(side.moves) * float(np.linalg.norm(_zero_nonfinite(elsewhere - expected)))
        allowed = tolerance * size + tolerance**2 * whole + noise
        ratio = error / allowed if allowed > 0 else (np.inf if error > 0 else 0.0)
        scale = size if size > 0 else 1.0
        result.append(Excess(ratio, error / scale, allowed / scale))
    return result


def _zero_nonfinite(array: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(array), array, 0)


def _flatten_float64(array: Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64).reshape(-1)


# ---- values --------------------------------------------------------------------------------------------------------


def rebuild(program: _traced.Program, x: Tree, consts: Sequence[Any]) -> _traced.Program:
    """The program at other values of its point and of its constants, without its aux."""
    assert program.jaxpr is not None
    closed = ClosedJaxpr(program.jaxpr.jaxpr, list(consts))
    structure = jax.tree.structure(program.out)

    def fun(x: Tree) -> tuple[Any, None]:
        outs = jex.core.jaxpr_as_fun(closed)(*jax.tree.leaves(x))
        return structure.unflatten(outs[: structure.num_leaves]), None

    return _traced.trace(fun, x)


def trace_example(loss: Objective, params: Tree, batch: tuple[Any, ...]) -> _traced.Program:
    """The loss of the first example, traced as a function of the parameters and the example."""
    example = jax.tree.map(lambda leaf: leaf[0], few_of(batch, 1))
    return _traced.trace(lambda point: (loss(point[0], *point[1]), None), (params, example))


def few_of(batch: Tree, count: int) -> Tree:
    """A few examples from the first to the last; random examples where the batch is traced.

    Precondition: tracing is off. Examples cut out of a tracer would add equations to the user's program.
    """
    rng = np.random.default_rng(4)

    def cut(leaf: Array) -> Array:
        size = min(len(leaf), count)
        if isinstance(leaf, Tracer):
            return _draw(leaf, (size, *leaf.shape[1:]), rng, positive=True)
        return leaf[np.linspace(0, len(leaf) - 1, size).astype(int)]

    return jax.tree.map(cut, batch)


def consts_of(program: _traced.Program) -> list[Any]:
    """The constants of a program; none for a program that branches on values."""
    return [] if program.jaxpr is None else list(program.jaxpr.consts)


def rebuild_loss(program: _traced.Program, consts: Sequence[Any]) -> Objective:
    """A loss that was traced by ``trace_example``, at other values of its constants."""
    assert program.jaxpr is not None, "a loss that branches on values cannot be traced"
    closed = ClosedJaxpr(program.jaxpr.jaxpr, list(consts))
    return lambda params, *example: jex.core.jaxpr_as_fun(closed)(*jax.tree.leaves((params, example)))[0]


def _replace_tracers(operands: Tree, positive: bool) -> Tree:
    """The operands with random values for tracers."""
    rng = np.random.default_rng(0)

    def replace(leaf: Any) -> Any:
        return _draw(leaf, leaf.shape, rng, positive) if isinstance(leaf, Tracer) else leaf

    return jax.tree.map(replace, operands)


def _draw(leaf: Any, shape: tuple[int, ...], rng: np.random.Generator, positive: bool) -> Array:
    """Random numbers of a shape and the dtype of a leaf. Integers are 0 or 1, or all 0, which index any axis."""
    dtype = leaf.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        impl = jax.random.key_impl(leaf)
        return jax.random.split(jax.random.key(0, impl=impl), max(int(np.prod(shape)), 1)).reshape(shape)
    if jnp.issubdtype(dtype, jnp.inexact):
        numbers = rng.uniform(0.5, 1.5, shape) if positive else rng.standard_normal(shape)
        is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
        return jnp.asarray(numbers + 1j * rng.standard_normal(shape) if is_complex else numbers).astype(dtype)
    return jnp.asarray(np.zeros(shape) if positive else rng.integers(0, 2, shape)).astype(dtype)


def direction_like(x: Tree, seed: int) -> Tree:
    """A random direction, the same at each call."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)).astype(leaf.dtype), x)


def perturb_point(x: Tree, eps: float) -> Tree:
    """The point with every entry moved by four roundings."""
    rng = np.random.default_rng(1)

    def move(leaf: Array) -> Array:
        signs = jnp.asarray(rng.choice([-1.0, 1.0], leaf.shape)).astype(leaf.dtype)
        return leaf + jnp.asarray(4 * eps, leaf.dtype) * signs * leaf

    return jax.tree.map(move, x)


def widen(array: Array) -> Array:
    """In single precision at least, so that the sums of the check round little."""
    return array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < 32 else array


def eps_of(program: _traced.Program) -> float:
    """The relative rounding of the coarsest arithmetic in a program."""
    assert program.jaxpr is not None
    coarsest = max(
        _largest_eps(program.jaxpr.jaxpr), *(float(jnp.finfo(v.dtype).eps) for v in jax.tree.leaves(program.x))
    )
    single = float(jnp.finfo(jnp.float32).eps)
    return max(coarsest, _PRODUCT_EPS.get(jax.default_backend(), 0.0)) if coarsest >= single else coarsest


def _largest_eps(jaxpr: Jaxpr) -> float:
    found = 0.0
    for eqn in jaxpr.eqns:
        outs: list[Variable] = list(eqn.outvars)
        dtypes = [v.aval.dtype for v in outs if jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact)]
        found = max([found, *(float(jnp.finfo(dtype).eps) for dtype in dtypes)])
        found = max([found, *(_largest_eps(body) for body in jex.core.jaxprs_in_params(eqn.params))])
    return found


# ---- error messages ------------------------------------------------------------------------------------------------


def entries_of(closed: ClosedJaxpr, leaf: int, num_leaves: int) -> list[str]:
    """The equations where a leaf, or a function of leaves alone, meets the data: each primitive and line."""
    jaxpr = inline(closed).jaxpr
    of_leaf = dependents(jaxpr, [jaxpr.invars[leaf]])
    on_data = dependents(jaxpr, [*jaxpr.constvars, *jaxpr.invars[num_leaves:]])

    def takes(eqn: Equation, chosen: Callable[[Variable], bool]) -> bool:
        return any(chosen(v) for v in eqn.invars if isinstance(v, Var))

    meets = [eqn for eqn in jaxpr.eqns if takes(eqn, lambda v: v in of_leaf and v not in on_data)]
    meets = [eqn for eqn in meets if takes(eqn, lambda v: v in on_data)]
    if not meets:
        meets = [eqn for eqn in jaxpr.eqns if takes(eqn, lambda v: v is jaxpr.invars[leaf])]
    return list(dict.fromkeys(str(blocker_at(eqn)) for eqn in meets))


def describe_leaf(path: str, route: str | None, lines: Sequence[str]) -> str:
    """A sentence on one leaf: where it enters the program, and the rule that was applied."""
    where = ", ".join(lines[:_MOST_LINES]) + (", ..." if len(lines) > _MOST_LINES else "")
    rule = "" if route is None else f", taken by the rule: {route}"
    return f"Leaf {path or 'x'!r} enters through {where or 'no equation'}{rule}."


def failure(what: str, by: str, excess: Excess, leaves: Sequence[str], remedy: str) -> RuntimeError:
    """The error of a failed check: ``what`` differs from the result ``by`` another composition."""
    return RuntimeError(
        f"{caller()}: check=True found that {what} differs from {by} by {excess.error:.1e} of its size, expected at "
        f"most {excess.tolerance:.1e}. {' '.join(leaves)} {remedy}"
    )
