"""Self-check behind ``check=True``: a fast derivative against the plain composition of JAX's transformations.

Both sides are evaluated at the operands of the call. A tracer has no values: if an operand is a tracer, both sides are
evaluated while the call is traced, at random values of the same shapes and dtypes, and the compiled program is the same
as without the check.

Heuristic: the tolerance is chosen so that rounding never fails a check. Two sides may differ by ``eps**(3/8)`` of their
size (2.5e-3 in float32, 1.4e-6 in float64), plus 64 times the change when the point moves by four roundings. ``eps`` is
that of the coarsest dtype in the program.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jaxtyping import Array

from curvature._errors import caller
from curvature._trees import leaf_paths
from curvature._types import Objective, Tree
from curvature.programs import _traced
from curvature.programs._jaxprs import Variable, dependents, inline, is_floating
from curvature.programs._legality import blocker_at

_MOST_LEAVES = 2  # how many leaves an error message names
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
        leaves: the numbers of the leaves that are at fault if the sides differ.
        moves: the allowed multiple of the difference between ``expected`` and ``elsewhere``.
    """

    found: Array
    expected: Array
    elsewhere: Array
    size: Array
    leaves: tuple[int, ...]
    moves: float = MOVES


class Excess(NamedTuple):
    """The difference of two sides.

    Attributes:
        ratio: as a multiple of the allowed difference.
        error: as a multiple of their size.
        tolerance: the allowed difference, as a multiple of their size.
        leaves: as in ``Sides``.
    """

    ratio: float
    error: float
    tolerance: float
    leaves: tuple[int, ...]


Values = tuple[Tree, Any]
"""The operands of a derivative, and the derivative where it is known at these operands, else None."""

Groups = Sequence[Sequence[int]]
"""Groups of leaves, by their numbers; the leaves of a group are compared together."""


@dataclass(frozen=True)
class Subject:
    """A derivative under test.

    Attributes:
        program: the function that is differentiated, traced; an error names its equations.
        x: what it is differentiated with respect to, the first of its inputs.
        values: the operands of the derivative, and the derivative that the call returns.
        routes: from the path of each leaf to the rule that was applied to it.
        remedy: the last sentence of an error.
    """

    program: _traced.Program
    x: Tree
    values: Values
    routes: Callable[[], dict[str, str]]
    remedy: str

    @property
    def eps(self) -> float:
        """The relative rounding of the coarsest arithmetic in the program."""
        assert self.program.jaxpr is not None
        coarsest = _largest_eps(self.program.jaxpr.jaxpr)
        if coarsest < float(jnp.finfo(jnp.float32).eps):
            return coarsest
        return max(coarsest, _PRODUCT_EPS.get(jax.default_backend(), 0.0))


def require_agreement(
    subject: Subject, measure: Callable[[Values, Groups], Sequence[Sides]], groups: Groups, what: str, by: str
) -> None:
    """Raise if the sides of a comparison differ by more than rounding.

    Args:
        subject: the derivative under test.
        measure: from values and groups to both sides, for each group.
        groups: the groups to compare. If they differ, their leaves are compared one by one, to find those at fault.
        what: the derivative in words; ``{}`` stands for the path of a leaf at fault.
        by: the plain composition in words.
    """
    single = [[leaf] for group in groups for leaf in group]
    with jax.ensure_compile_time_eval():
        excesses, values = _compare(lambda values: measure(values, groups), subject.values, subject.eps)
        excess = max(excesses, key=_ratio)
        if excess.ratio <= 1:
            return
        if single != groups:
            excesses, _ = _compare(lambda values: measure(values, single), values, subject.eps)
    worst_first = sorted(excesses, key=_ratio, reverse=True)
    at_fault = [leaf for one in worst_first if one.ratio > 1 for leaf in sorted(one.leaves)][:_MOST_LEAVES]
    paths, routes = leaf_paths(subject.x), subject.routes()
    leaves = dict.fromkeys(at_fault or range(len(paths))[:_MOST_LEAVES])
    sentences = [_describe_leaf(subject, leaf, paths[leaf], routes.get(paths[leaf])) for leaf in leaves]
    what = what.format(*(repr(paths[leaf] or "x") for leaf in worst_first[0].leaves))
    raise RuntimeError(
        f"{caller()}: check=True found that {what} differs from {by} by {excess.error:.1e} of its size, expected at "
        f"most {excess.tolerance:.1e}. {' '.join(sentences)} {subject.remedy}"
    )


def _compare(measure: Callable[[Values], Sequence[Sides]], values: Values, eps: float) -> tuple[list[Excess], Values]:
    """The excesses of ``measure`` at the values, or at random values where they are traced; and the values taken."""
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(values)):
        return _excesses(jax.jit(measure)(values), eps), values
    sides, drawn = [], values
    for positive in (False, True):  # at negative numbers a logarithm is NaN, which compares nothing
        drawn = _replace_tracers(values[0], positive), None
        sides = jax.jit(measure)(drawn)
        if all(np.isfinite(_flatten_float64(side.expected)).all() for side in sides):
            break
    return _excesses(sides, eps), drawn


def _ratio(excess: Excess) -> float:
    return excess.ratio


def _excesses(sides: Sequence[Sides], eps: float) -> list[Excess]:
    """Entries where the plain composition is not finite are ignored; a NaN where it is finite is an infinite error."""
    tolerance = eps**0.375
    sizes = [float(np.linalg.norm(_zero_nonfinite(_flatten_float64(side.size)))) for side in sides]
    whole = float(np.linalg.norm(sizes))
    result = []
    for side, size in zip(sides, sizes, strict=True):
        found, expected, elsewhere = map(_flatten_float64, side[:3])
        error = float(np.linalg.norm(np.where(np.isfinite(expected), found - _zero_nonfinite(expected), 0)))
        error = error if np.isfinite(error) else np.inf
        noise = float(side.moves) * float(np.linalg.norm(_zero_nonfinite(elsewhere - expected)))
        allowed = tolerance * size + tolerance**2 * whole + noise
        ratio = error / allowed if allowed > 0 else (np.inf if error > 0 else 0.0)
        scale = size if size > 0 else 1.0
        result.append(Excess(ratio, error / scale, allowed / scale, tuple(map(int, side.leaves))))
    return result


def _zero_nonfinite(array: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(array), array, 0)


def _flatten_float64(array: Array) -> np.ndarray:
    return np.asarray(array).astype(np.float64).reshape(-1)


# ---- values --------------------------------------------------------------------------------------------------------


def replay(program: _traced.Program, consts: Sequence[Any]) -> Callable[[Tree], Any]:
    """The function that was traced, without its aux, at other values of its constants."""
    assert program.jaxpr is not None, "a function that branches on values cannot be traced"
    closed, structure = ClosedJaxpr(program.jaxpr.jaxpr, list(consts)), jax.tree.structure(program.out)

    def fun(x: Tree) -> Any:
        return structure.unflatten(jex.core.jaxpr_as_fun(closed)(*jax.tree.leaves(x))[: structure.num_leaves])

    return fun


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


def replay_loss(of_example: _traced.Program, consts: Sequence[Any]) -> Objective:
    """A loss that was traced by ``trace_example``, at other values of its constants."""
    loss = replay(of_example, consts)
    return lambda params, *example: loss((params, example))


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


def _largest_eps(jaxpr: Jaxpr) -> float:
    """The relative rounding of the coarsest dtype of a variable, also in the bodies of equations."""
    variables: list[Variable] = [*jaxpr.invars, *(v for eqn in jaxpr.eqns for v in eqn.outvars)]
    own = [float(jnp.finfo(v.aval.dtype).eps) for v in variables if is_floating(v)]
    bodies = [_largest_eps(body) for eqn in jaxpr.eqns for body in jex.core.jaxprs_in_params(eqn.params)]
    return max([0.0, *own, *bodies])


# ---- error messages ------------------------------------------------------------------------------------------------


def _describe_leaf(subject: Subject, leaf: int, path: str, route: str | None) -> str:
    """A sentence on one leaf: where it enters the program, and the rule that was applied."""
    lines = _lines_of(subject, leaf)
    where = ", ".join(lines[:_MOST_LINES]) + (", ..." if len(lines) > _MOST_LINES else "")
    rule = "" if route is None else f", taken by the rule: {route}"
    return f"Leaf {path or 'x'!r} enters through {where or 'no equation'}{rule}."


def _lines_of(subject: Subject, leaf: int) -> list[str]:
    """The equations where a leaf, or a function of leaves alone, meets the data: each primitive and line."""
    assert subject.program.jaxpr is not None
    jaxpr = inline(subject.program.jaxpr).jaxpr
    own = jaxpr.invars[leaf]
    of_leaf = dependents(jaxpr, [own])
    on_data = dependents(jaxpr, [*jaxpr.constvars, *jaxpr.invars[len(jax.tree.leaves(subject.x)) :]])
    operands = [{v for v in eqn.invars if isinstance(v, Var)} for eqn in jaxpr.eqns]
    meets = [bool(read & (of_leaf - on_data)) and bool(read & on_data) for read in operands]
    if not any(meets):
        meets = [own in read for read in operands]
    return list(dict.fromkeys(str(blocker_at(eqn)) for eqn in compress(jaxpr.eqns, meets)))
