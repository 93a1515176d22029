"""Self-check of Hessians: one product ``H v`` against forward over reverse mode.

The returned Hessian times a random direction ``v`` is compared with ``d/dt grad f(x + t v)`` at ``t = 0``, computed by
``jax.jvp(jax.grad(f), (x,), (v,))``. Leaves are compared one by one, so that a small leaf counts as much as a large
leaf. If they differ, the product is repeated along one leaf of ``v`` at a time, which identifies the wrong block.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvature._trees import leaf_paths, select
from curvature._types import HessianBlocks, HessianMode, Objective, Tree
from curvature.programs import _traced
from curvature.transforms._self_check import (
    Sides,
    Values,
    compare,
    consts_of,
    describe_leaf,
    direction_like,
    entries_of,
    eps_of,
    failure,
    moved,
    rebuild,
    rebuild_loss,
    trace_example,
    widen,
    worst,
)

Pairs = list[tuple[int, int]]

REMEDY = (
    "Report the program, and use mode='fwd_over_rev' until it is repaired; if f has a custom derivative rule, "
    "curvature.check_derivatives says whether that is right."
)


class Subject(NamedTuple):
    """A second derivative under test.

    Attributes:
        function: the public function.
        program: the function that is differentiated, traced.
        values: the operands of the derivative, and the derivative that the call returns.
        plain: from the operands to the function of ``x`` for JAX to differentiate, and ``x``.
        evaluate: from the operands to the derivative.
        routes: from the path of each leaf to the rule that was applied to it.
    """

    function: str
    program: _traced.Program
    values: Values
    plain: Callable[[Any], tuple[Callable[[Tree], Any], Tree]]
    evaluate: Callable[[Any], Any]
    routes: Callable[[], dict[str, str]]

    def found(self, values: Values) -> Any:
        """The derivative at the values."""
        operands, result = values
        return self.evaluate(operands) if result is None else result


def subject_of(
    function: str,
    program: _traced.Program,
    evaluate: Callable[[_traced.Program], Any],
    result: Any,
    routes: Callable[[_traced.Program], dict[str, str]] = lambda _: {},
) -> Subject:
    """The subject for a derivative of a traced function at its point."""
    assert program.jaxpr is not None

    def plain(operands: Any) -> tuple[Callable[[Tree], Any], Tree]:
        fun = rebuild(program, *operands).fun
        return lambda x: fun(x)[0], operands[0]

    def evaluate_at(operands: Any) -> Any:
        return evaluate(rebuild(program, *operands))

    values = (program.x, program.jaxpr.consts), result
    return Subject(function, program, values, plain, evaluate_at, lambda: routes(program))


def subject_of_mean(
    function: str,
    loss: Objective,
    params: Tree,
    batch: tuple[Any, ...],
    evaluate: Callable[[Objective, Tree, tuple[Any, ...]], Any],
    result: Any,
    report: Callable[..., Any],
) -> Subject:
    """The subject for the Hessian of the mean of a loss over a batch, from ``evaluate(loss, params, batch)``."""
    with jax.ensure_compile_time_eval():
        of_example = trace_example(loss, params, batch)

    def mean_of(loss: Objective, batch: tuple[Any, ...]) -> Callable[[Tree], Array]:
        return lambda params: jnp.mean(jax.vmap(loss, (None,) + (0,) * len(batch))(params, *batch))

    def plain(operands: Any) -> tuple[Callable[[Tree], Any], Tree]:
        params, batch, consts = operands
        return mean_of(rebuild_loss(of_example, consts), batch), params

    def evaluate_at(operands: Any) -> Any:
        params, batch, consts = operands
        return evaluate(rebuild_loss(of_example, consts), params, batch)

    program = _traced.trace(lambda params: (mean_of(loss, batch)(params), None), params)
    values = (params, batch, consts_of(of_example)), result
    return Subject(function, program, values, plain, evaluate_at, lambda: report(params, *batch).routes)


def check_hessian(subject: Subject, blocks: HessianBlocks) -> None:
    """Raise if the Hessian, or the ``blocks`` of it, times a random direction differs from ``H v``."""
    x, pairs = subject.program.x, _leaf_pairs(subject.program.x, blocks)
    columns = sorted({column for _, column in pairs})
    groups = [[column] for column in columns] if blocks == "diagonal" else [columns]
    eps = eps_of(subject.program)
    with jax.ensure_compile_time_eval():
        excesses, values = compare(_compare_products(subject, pairs, groups, eps), subject.values, eps)
        _, excess = worst(excesses)
        if excess.ratio <= 1:
            return
        single = [[column] for column in columns]
        by_block, _ = compare(_compare_products(subject, pairs, single, eps), values, eps)
    found, _ = worst(by_block)
    row, column = _rows_of_groups(pairs, single)[found]
    paths, (first, second) = leaf_paths(x), (min(row, column), max(row, column))
    what = f"H v (the block of {paths[row] or 'x'!r} and {paths[column] or 'x'!r} is farthest off)"
    leaves = describe_leaves(subject, dict.fromkeys((first, second)))
    raise failure(subject.function, what, "forward over reverse mode applied to f", excess, leaves, REMEDY)


def describe_leaves(subject: Subject, leaves: Sequence[int] | dict[int, None]) -> list[str]:
    """A sentence on each of the ``leaves``."""
    x, closed = subject.program.x, subject.program.jaxpr
    assert closed is not None
    paths, routes = leaf_paths(x), subject.routes()
    count = len(paths)
    return [describe_leaf(paths[k], routes.get(paths[k]), entries_of(closed, k, count)) for k in leaves]


def _leaf_pairs(x: Tree, blocks: HessianBlocks) -> Pairs:
    """The leaves of each block that is returned, in the order of the result."""
    numbers = range(len(jax.tree.leaves(x)))
    if blocks == "diagonal":
        return [(i, i) for i in numbers]
    rows, columns = (select("hessian", "blocks", x, path) for path in blocks or ("", ""))
    return list(itertools.product(numbers[rows.leaves], numbers[columns.leaves]))


def _rows_of_groups(pairs: Pairs, groups: Sequence[Sequence[int]]) -> Pairs:
    """The comparisons: for each group of columns, each row of a block in it, with the first column of the group."""
    return [
        (row, group[0]) for group in groups for row in dict.fromkeys(row for row, column in pairs if column in group)
    ]


def _compare_products(
    subject: Subject, pairs: Pairs, groups: Sequence[Sequence[int]], eps: float
) -> Callable[[Any], list[Sides]]:
    """The map from values to both sides of ``H v``, for each group of columns and each row."""

    def measure(values: Values) -> list[Sides]:
        fun, x = subject.plain(values[0])
        v = jax.tree.leaves(direction_like(x, 2))
        weights = weights_of(subject.program)
        parts, sizes = _multiply_blocks(subject.found(values), pairs, weights, v)
        scalar = combined(fun, weights)
        sides = []
        for group in groups:
            along = [leaf if k in group else jnp.zeros_like(leaf) for k, leaf in enumerate(v)]
            direction = jax.tree.structure(x).unflatten(along)
            expected, elsewhere = (
                [widen(leaf).reshape(-1) for leaf in jax.tree.leaves(product(subject.program, scalar, at, direction))]
                for at in (x, moved(x, eps))
            )
            for row, _ in _rows_of_groups(pairs, [group]):
                own = [pair for pair in pairs if pair[0] == row and pair[1] in group]
                found, size = (sum(of_pairs[pair] for pair in own) for of_pairs in (parts, sizes))
                size = jnp.maximum(size, jnp.abs(expected[row]))
                sides.append(Sides(jnp.asarray(found), expected[row], elsewhere[row], size))
        return sides

    return measure


def weights_of(program: _traced.Program) -> list[Array]:
    """The weights of the outputs in their sum: 1 for a scalar function, random for other functions."""
    if program.is_scalar:
        return [jnp.ones((), program.out.dtype)]
    return jax.tree.leaves(direction_like(program.out, 3))


def combined(fun: Callable[[Tree], Any], weights: Sequence[Array]) -> Callable[[Tree], Array]:
    """The weighted sum of the outputs."""

    def scalar(x: Tree) -> Array:
        terms = [jnp.sum(w * out) for w, out in zip(weights, jax.tree.leaves(fun(x)), strict=True)]
        if len(terms) == 1:
            return terms[0]
        with jax.numpy_dtype_promotion("standard"):  # outputs may differ in dtype even where users are strict
            return jnp.sum(jnp.stack([widen(term) for term in terms]))

    return scalar


def _multiply_blocks(
    result: Any, pairs: Pairs, weights: Sequence[Array], v: Sequence[Array]
) -> tuple[dict[tuple[int, int], Array], dict[tuple[int, int], Array]]:
    """For each block its product with ``v``, summed over the outputs; and the product of the absolute values."""
    leaves = jax.tree.leaves(result)
    # o: output, r: row, c: column
    contract = functools.partial(jnp.einsum, "o,orc,c->r", precision="highest")
    parts: dict[Any, Any] = dict.fromkeys(pairs, 0)
    sizes: dict[Any, Any] = dict.fromkeys(pairs, 0)
    for weight, start in zip(weights, range(0, len(leaves), len(pairs)), strict=True):
        for pair, block in zip(pairs, leaves[start : start + len(pairs)], strict=True):
            column = widen(v[pair[1]]).reshape(-1)
            block = widen(block).reshape(weight.size, v[pair[0]].size, column.size)
            factors = widen(weight).reshape(-1), block, column
            with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
                parts[pair] = parts[pair] + contract(*factors)
                sizes[pair] = sizes[pair] + contract(*map(jnp.abs, factors))
    return parts, sizes


def product(program: _traced.Program, fun: Callable[[Tree], Array], x: Tree, v: Tree) -> Tree:
    """``H v`` of a scalar function by JAX's transformations alone: forward over reverse mode where that is legal."""
    composition = next(m for m in get_args(HessianMode)[1:] if program.composition_blocker(m) is None)
    if composition == "fwd_over_rev":
        return jax.jvp(jax.grad(fun), (x,), (v,))[1]
    if composition == "rev_over_rev":
        return jax.vjp(jax.grad(fun), x)[1](v)[0]
    if composition == "rev_over_fwd":
        return jax.grad(lambda x: jax.jvp(fun, (x,), (v,))[1])(x)
    return jax.jvp(jax.jacfwd(fun), (x,), (v,))[1]
