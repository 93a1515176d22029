"""Self-check of Hessians, diagonals and Laplacians: products ``H v`` against forward over reverse mode.

The returned Hessian times a random direction ``v`` is compared with ``d/dt grad f(x + t v)`` at ``t = 0``, computed by
``jax.jvp(jax.grad(f), (x,), (v,))``. Leaves are compared one by one, so that a small leaf counts as much as a large
leaf. If they differ, the product is repeated along one leaf of ``v`` at a time, which identifies the wrong block. Of a
diagonal, a few entries ``e_i' H e_i`` are compared; of a Laplacian, the sum of ``v' H v`` along two random directions.
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
    perturb_point,
    rebuild,
    rebuild_loss,
    trace_example,
    widen,
    worst,
)

Pairs = list[tuple[int, int]]

_REMEDY = (
    "Report the program, and use mode='fwd_over_rev' until it is repaired; if f has a custom derivative rule, "
    "curvature.check_derivatives says whether that is right."
)


class Subject(NamedTuple):
    """A second derivative under test.

    Attributes:
        program: the function that is differentiated, traced.
        values: the operands of the derivative, and the derivative that the call returns.
        plain: from the operands to the function of ``x`` for JAX to differentiate, and ``x``.
        evaluate: from the operands to the derivative.
        routes: from the path of each leaf to the rule that was applied to it.
    """

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
    return Subject(program, values, plain, evaluate_at, lambda: routes(program))


def subject_of_mean(
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
    return Subject(program, values, plain, evaluate_at, lambda: report(params, *batch).routes)


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
    leaves = _describe_leaves(subject, dict.fromkeys((first, second)))
    raise failure(what, "forward over reverse mode applied to f", excess, leaves, _REMEDY)


def _describe_leaves(subject: Subject, leaves: Sequence[int] | dict[int, None]) -> list[str]:
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
    rows, columns = (select("blocks", x, path) for path in blocks or ("", ""))
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
        weights = _output_weights(subject.program)
        parts, sizes = _multiply_blocks(subject.found(values), pairs, weights, v)
        scalar = _weighted_sum(fun, weights)
        sides = []
        for group in groups:
            along = [leaf if k in group else jnp.zeros_like(leaf) for k, leaf in enumerate(v)]
            direction = jax.tree.structure(x).unflatten(along)
            expected, elsewhere = (
                _hessian_product(subject.program, scalar, at, direction) for at in (x, perturb_point(x, eps))
            )
            for row, _ in _rows_of_groups(pairs, [group]):
                own = [pair for pair in pairs if pair[0] == row and pair[1] in group]
                found, size = (sum(of_pairs[pair] for pair in own) for of_pairs in (parts, sizes))
                size = jnp.maximum(size, jnp.abs(expected[row]))
                sides.append(Sides(jnp.asarray(found), expected[row], elsewhere[row], size))
        return sides

    return measure


def _output_weights(program: _traced.Program) -> list[Array]:
    """The weights of the outputs in their sum: 1 for a scalar function, random for other functions."""
    if program.is_scalar:
        return [jnp.ones((), program.out.dtype)]
    return jax.tree.leaves(direction_like(program.out, 3))


def _weighted_sum(fun: Callable[[Tree], Any], weights: Sequence[Array]) -> Callable[[Tree], Array]:
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


def _hessian_product(program: _traced.Program, fun: Callable[[Tree], Array], x: Tree, v: Tree) -> list[Array]:
    """The leaves of ``H v``, flat, of a scalar function by JAX's transformations alone.

    The composition is forward over reverse mode where that is legal.
    """
    composition = next(m for m in get_args(HessianMode)[1:] if program.composition_blocker(m) is None)
    if composition == "fwd_over_rev":
        product = jax.jvp(jax.grad(fun), (x,), (v,))[1]
    elif composition == "rev_over_rev":
        product = jax.vjp(jax.grad(fun), x)[1](v)[0]
    elif composition == "rev_over_fwd":
        product = jax.grad(lambda x: jax.jvp(fun, (x,), (v,))[1])(x)
    else:
        product = jax.jvp(jax.jacfwd(fun), (x,), (v,))[1]
    return [widen(leaf).reshape(-1) for leaf in jax.tree.leaves(product)]


# ---- diagonals and Laplacians ----------------------------------------------------------------------------------------

_ENTRIES = 3  # how many entries of the diagonal are compared
_DIRECTIONS = 2  # of the trace; with one direction, an error in the axis of directions would not show


def check_diagonal(subject: Subject) -> None:
    """Raise if a few entries of the diagonal of a Hessian differ from ``e_i' H e_i``."""
    leaves = jax.tree.leaves(subject.program.x)
    chosen = [(k, leaf.size // 2) for k, leaf in enumerate(leaves) if leaf.size][:_ENTRIES]
    eps = eps_of(subject.program)

    def measure(values: Values) -> list[Sides]:
        fun, x = subject.plain(values[0])
        diagonal = jax.tree.leaves(subject.found(values))
        sides = []
        for k, entry in chosen:
            unit = [jnp.zeros_like(leaf) for leaf in jax.tree.leaves(x)]
            unit[k] = unit[k].reshape(-1).at[entry].set(1).reshape(unit[k].shape)
            direction = jax.tree.structure(x).unflatten(unit)
            expected, elsewhere = (
                _hessian_product(subject.program, fun, at, direction)[k][entry] for at in (x, perturb_point(x, eps))
            )
            sides.append(Sides(widen(diagonal[k]).reshape(-1)[entry], expected, elsewhere, expected))
        return sides

    if not chosen:
        return
    with jax.ensure_compile_time_eval():
        excesses, _ = compare(measure, subject.values, eps)
    number, excess = worst(excesses)
    if excess.ratio > 1:
        at_fault = _describe_leaves(subject, [chosen[number][0]])
        what, by = "an entry of the diagonal", "that of forward over reverse mode applied to f"
        raise failure(what, by, excess, at_fault, _REMEDY)


def check_laplacian(program: _traced.Program, along: Callable[[_traced.Program, Tree], Any]) -> None:
    """Raise if the sum of second derivatives along two random directions differs from ``sum_k v_k' H v_k``.

    The Laplacian is not compared: the plain composition would take a product for each entry of ``x``.

    Args:
        program: the function, traced.
        along: from a program and directions to the sum of the second derivatives along the directions.
    """
    eps = eps_of(program)
    every = list(range(len(jax.tree.leaves(program.x))))
    subject = subject_of(program, lambda program: program, None)

    def of_leaves(chosen: Sequence[Sequence[int]]) -> Callable[[Values], list[Sides]]:
        return lambda values: [_laplacian_sides(subject, along, eps, part, values) for part in chosen]

    with jax.ensure_compile_time_eval():
        excesses, values = compare(of_leaves([every]), subject.values, eps)
        _, excess = worst(excesses)
        if excess.ratio <= 1:
            return
        single, _ = compare(of_leaves([[k] for k in every]), values, eps)
    number, of_leaf = worst(single)
    at_fault = _describe_leaves(subject, [number] if of_leaf.ratio > 1 else every)
    what, by = "the Laplacian along two random directions", "v' H v by forward over reverse mode applied to f"
    raise failure(what, by, excess, at_fault, _REMEDY)


def _laplacian_sides(
    subject: Subject, along: Callable[[_traced.Program, Tree], Any], eps: float, chosen: Sequence[int], values: Values
) -> Sides:
    """Both sides for directions in the ``chosen`` leaves."""
    fun, x = subject.plain(values[0])
    weights = _output_weights(subject.program)
    scalar = _weighted_sum(fun, weights)
    of_leaves = [_directions(leaf, k, k in chosen) for k, leaf in enumerate(jax.tree.leaves(x))]
    directions = jax.tree.structure(x).unflatten(of_leaves)

    def forms(x: Tree) -> Array:
        terms = []
        for k in range(_DIRECTIONS):
            v = jax.tree.map(lambda leaf, k=k: leaf[k], directions)
            pairs = zip(jax.tree.leaves(v), _hessian_product(subject.program, scalar, x, v), strict=True)
            terms += [widen(a).reshape(-1) * b for a, b in pairs]
        return jnp.concatenate(terms)

    outs = jax.tree.leaves(along(subject.evaluate(values[0]), directions))
    found = sum(jnp.sum(widen(weight * out)) for weight, out in zip(weights, outs, strict=True))
    here = forms(x)
    return Sides(jnp.asarray(found), jnp.sum(here), jnp.sum(forms(perturb_point(x, eps))), jnp.sum(jnp.abs(here)))


def _directions(leaf: Array, seed: int, is_chosen: bool) -> Array:
    """Random directions in one leaf along a leading axis; zeros for a leaf that is not chosen."""
    like = jax.ShapeDtypeStruct((_DIRECTIONS, *leaf.shape), leaf.dtype)
    return direction_like(like, seed) if is_chosen else jnp.zeros(like.shape, like.dtype)
