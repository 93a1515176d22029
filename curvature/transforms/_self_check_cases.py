"""What ``check=True`` compares: products ``H v`` against forward over reverse mode, and gradients of a few examples.

The returned Hessian times a random direction ``v`` is compared with ``d/dt grad f(x + t v)`` at ``t = 0``, computed by
``jax.jvp(jax.grad(f), (x,), (v,))``. Leaves are compared one by one, so that a small leaf counts as much as a large
leaf. If they differ, the product is repeated along one leaf of ``v`` at a time, which identifies the wrong block. Of a
diagonal, a few entries ``e_i' H e_i`` are compared; of a Laplacian, the sum of ``v' H v`` along two random directions.
A function of per-example gradients is compared for three examples with that of ``jax.vmap(jax.grad(loss))``.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvature._types import HessianBlocks, HessianMode, Objective, Tree
from curvature.programs import _traced
from curvature.transforms._blocks import leaf_pairs
from curvature.transforms._per_example_norms import accumulator
from curvature.transforms._self_check import (
    MOVES,
    Groups,
    Sides,
    Subject,
    Values,
    direction_like,
    few_of,
    perturb_point,
    replay,
    replay_loss,
    require_agreement,
    trace_example,
    widen,
)

Pairs = list[tuple[int, int]]


def _remedy(use: str, function: str) -> str:
    return (
        f"Report the program, and use {use} until it is repaired; if {function} has a custom derivative rule, "
        "curvature.check_derivatives says whether that is right."
    )


_REMEDY = _remedy("mode='fwd_over_rev'", "f")


@dataclass(frozen=True)
class SecondDerivative(Subject):
    """A second derivative under test.

    Attributes:
        plain: from the operands to the function of ``x`` for JAX to differentiate, and ``x``.
        evaluate: from the operands to the derivative.
    """

    plain: Callable[[Any], tuple[Callable[[Tree], Any], Tree]]
    evaluate: Callable[[Any], Any]

    def found(self, values: Values) -> Any:
        """The derivative at the values."""
        operands, result = values
        return self.evaluate(operands) if result is None else result

    @property
    def weights(self) -> list[Array]:
        """The weights of the outputs in their sum: 1 for a scalar function, random for other functions."""
        if self.program.is_scalar:
            return [jnp.ones((), self.program.out.dtype)]
        return jax.tree.leaves(direction_like(self.program.out, 3))

    def products(self, operands: Any, along: Callable[[int, Array], Array]) -> tuple[list[Array], list[Array]]:
        """The leaves of ``H v``, flat, at the point and beside it, for the weighted sum of the outputs.

        By JAX's transformations alone, forward over reverse where that is legal. ``along`` gives ``v`` from the number
        of a leaf and the leaf.
        """
        fun, x = self.plain(operands)
        v = jax.tree.structure(x).unflatten([along(k, leaf) for k, leaf in enumerate(jax.tree.leaves(x))])
        weights = self.weights
        composition = next(m for m in get_args(HessianMode)[1:] if self.program.composition_blocker(m) is None)

        def scalar(x: Tree) -> Array:
            terms = [jnp.sum(w * out) for w, out in zip(weights, jax.tree.leaves(fun(x)), strict=True)]
            if len(terms) == 1:
                return terms[0]
            with jax.numpy_dtype_promotion("standard"):  # outputs may differ in dtype even where users are strict
                return jnp.sum(jnp.stack([widen(term) for term in terms]))

        def product(x: Tree) -> list[Array]:
            if composition == "fwd_over_rev":
                result = jax.jvp(jax.grad(scalar), (x,), (v,))[1]
            elif composition == "rev_over_rev":
                result = jax.vjp(jax.grad(scalar), x)[1](v)[0]
            elif composition == "rev_over_fwd":
                result = jax.grad(lambda x: jax.jvp(scalar, (x,), (v,))[1])(x)
            else:
                result = jax.jvp(jax.jacfwd(scalar), (x,), (v,))[1]
            return [widen(leaf).reshape(-1) for leaf in jax.tree.leaves(result)]

        return product(x), product(perturb_point(x, self.eps))


def second_derivative(
    program: _traced.Program,
    evaluate: Callable[[_traced.Program], Any],
    result: Any,
    routes: Callable[[_traced.Program], dict[str, str]] = lambda _: {},
) -> SecondDerivative:
    """The second derivative ``evaluate(program)`` of a traced function at its point."""
    assert program.jaxpr is not None

    def retrace(operands: Any) -> _traced.Program:
        x, consts = operands
        fun = replay(program, consts)
        return _traced.trace(lambda x: (fun(x), None), x)

    values = (program.x, program.jaxpr.consts), result
    return SecondDerivative(
        program,
        program.x,
        values,
        lambda: routes(program),
        _REMEDY,
        plain=lambda operands: (replay(program, operands[1]), operands[0]),
        evaluate=lambda operands: evaluate(retrace(operands)),
    )


def hessian_of_mean(
    loss: Objective,
    params: Tree,
    batch: tuple[Any, ...],
    evaluate: Callable[[Objective, Tree, tuple[Any, ...]], Any],
    result: Any,
    report: Callable[..., Any],
) -> SecondDerivative:
    """The Hessian ``evaluate(loss, params, batch)`` of the mean of a loss over a batch."""
    with jax.ensure_compile_time_eval():
        of_example = trace_example(loss, params, batch)
    assert of_example.jaxpr is not None

    def mean_of(loss: Objective, batch: tuple[Any, ...]) -> Callable[[Tree], Array]:
        return lambda params: jnp.mean(jax.vmap(loss, (None,) + (0,) * len(batch))(params, *batch))

    def evaluate_at(operands: Any) -> Any:
        params, batch, consts = operands
        return evaluate(replay_loss(of_example, consts), params, batch)

    return SecondDerivative(
        _traced.trace(lambda params: (mean_of(loss, batch)(params), None), params),
        params,
        ((params, batch, of_example.jaxpr.consts), result),
        lambda: report(params, *batch).routes,
        _REMEDY,
        plain=lambda operands: (mean_of(replay_loss(of_example, operands[2]), operands[1]), operands[0]),
        evaluate=evaluate_at,
    )


# ---- Hessians --------------------------------------------------------------------------------------------------------


def check_hessian(subject: SecondDerivative, blocks: HessianBlocks) -> None:
    """Raise if the Hessian, or the ``blocks`` of it, times a random direction differs from ``H v``."""
    pairs = leaf_pairs(subject.x, blocks)
    columns = sorted({column for _, column in pairs})

    def measure(values: Values, groups: Groups) -> list[Sides]:
        v = jax.tree.leaves(direction_like(subject.plain(values[0])[1], 2))
        parts, sizes = _multiply_blocks(subject.found(values), pairs, subject.weights, v)
        sides = []
        for group in groups:
            along = [leaf if k in group else jnp.zeros_like(leaf) for k, leaf in enumerate(v)]
            expected, elsewhere = subject.products(values[0], lambda k, _, along=along: along[k])
            for row in dict.fromkeys(row for row, column in pairs if column in group):
                own = [pair for pair in pairs if pair[0] == row and pair[1] in group]
                found, size = (jnp.asarray(sum(of_pairs[pair] for pair in own)) for of_pairs in (parts, sizes))
                size = jnp.maximum(size, jnp.abs(expected[row]))
                sides.append(Sides(found, expected[row], elsewhere[row], size, (row, group[0])))
        return sides

    groups = [[column] for column in columns] if blocks == "diagonal" else [columns]
    what, by = "H v (the block of {} and {} is farthest off)", "forward over reverse mode applied to f"
    require_agreement(subject, measure, groups, what, by)


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


# ---- diagonals and Laplacians ----------------------------------------------------------------------------------------

_ENTRIES = 3  # how many entries of the diagonal are compared
_DIRECTIONS = 2  # of the trace; with one direction, an error in the axis of directions would not show


def check_diagonal(subject: SecondDerivative) -> None:
    """Raise if a few entries of the diagonal of a Hessian differ from ``e_i' H e_i``."""

    def measure(values: Values, groups: Groups) -> list[Sides]:
        diagonal = jax.tree.leaves(subject.found(values))
        sides = []
        for (k,) in groups:
            entry = diagonal[k].size // 2

            def unit(n: int, leaf: Array, k: int = k, entry: int = entry) -> Array:
                return jnp.zeros(leaf.size, leaf.dtype).at[entry].set(int(n == k)).reshape(leaf.shape)

            expected, elsewhere = (product[k][entry] for product in subject.products(values[0], unit))
            sides.append(Sides(widen(diagonal[k]).reshape(-1)[entry], expected, elsewhere, expected, (k,)))
        return sides

    groups = [[k] for k, leaf in enumerate(jax.tree.leaves(subject.x)) if leaf.size][:_ENTRIES]
    if groups:
        what, by = "an entry of the diagonal", "that of forward over reverse mode applied to f"
        require_agreement(subject, measure, groups, what, by)


def check_laplacian(program: _traced.Program, along: Callable[[_traced.Program, Tree], Any]) -> None:
    """Raise if the sum of second derivatives along two random directions differs from ``sum_k v_k' H v_k``.

    The Laplacian is not compared: the plain composition would take a product for each entry of ``x``.

    Args:
        program: the function, traced.
        along: from a program and directions to the sum of the second derivatives along the directions.
    """
    subject = second_derivative(program, lambda program: program, None)
    every = range(len(jax.tree.leaves(program.x)))

    def measure(values: Values, groups: Groups) -> list[Sides]:
        at = subject.evaluate(values[0])
        return [_laplacian_sides(subject, values[0], along, at, group) for group in groups]

    what, by = "the Laplacian along two random directions", "v' H v by forward over reverse mode applied to f"
    require_agreement(subject, measure, [every], what, by)


def _laplacian_sides(
    subject: SecondDerivative,
    operands: Any,
    along: Callable[[_traced.Program, Tree], Any],
    program: _traced.Program,
    group: Sequence[int],
) -> Sides:
    """Both sides for directions in a group of leaves."""
    leaves, structure = jax.tree.flatten(program.x)
    directions = []
    for k, leaf in enumerate(leaves):
        like = jax.ShapeDtypeStruct((_DIRECTIONS, *leaf.shape), leaf.dtype)
        directions.append(direction_like(like, k) if k in group else jnp.zeros(like.shape, like.dtype))
    forms = [], []  # the terms of v' H v, at the point and beside it
    for n in range(_DIRECTIONS):
        for terms, product in zip(forms, subject.products(operands, lambda k, _, n=n: directions[k][n]), strict=True):
            terms += [widen(v[n]).reshape(-1) * row for v, row in zip(directions, product, strict=True)]
    here, beside = map(jnp.concatenate, forms)
    outs = jax.tree.leaves(along(program, structure.unflatten(directions)))
    found = sum(jnp.sum(widen(weight * out)) for weight, out in zip(subject.weights, outs, strict=True))
    return Sides(jnp.asarray(found), jnp.sum(here), jnp.sum(beside), jnp.sum(jnp.abs(here)), (group[0],))


# ---- functions of per-example gradients ------------------------------------------------------------------------------

_EXAMPLES = 3  # the first, the middle and the last

Gradients = list[Array]


class Expected(NamedTuple):
    """The expected value of a number or an array; see ``Sides``."""

    value: Array
    size: Array
    moves: float = MOVES


class Comparison(NamedTuple):
    """How a function of per-example gradients is compared.

    Attributes:
        parts: from the result to numbers or arrays, which are compared one by one.
        formula: from the gradients of the leaves by JAX, with a leading axis of examples, the rounding ``eps`` and
            ``extra`` to the expected parts.
        extra: further operands of the function.
    """

    parts: Callable[[Any], list[Array]]
    formula: Callable[..., list[Expected]]
    extra: tuple[Any, ...] = ()


def check_few_examples(
    loss: Objective,
    params: Tree,
    batch: tuple[Any, ...],
    evaluate: Callable[..., Any],
    comparison: Comparison,
    report: Callable[..., Any],
) -> None:
    """Raise if ``evaluate(loss, params, batch, chunk_size, *extra)`` differs for a few examples from the formula.

    Three examples are taken, in chunks of two. ``report`` gives the rule for each leaf.
    """
    with jax.ensure_compile_time_eval():
        few = few_of(batch, _EXAMPLES)
        of_example = trace_example(loss, params, few)
    if of_example.jaxpr is None:
        return  # the loss branches on values: its gradients are formed by JAX alone
    every = range(len(jax.tree.leaves(params)))
    subject = Subject(
        of_example,
        params,
        ((params, few, comparison.extra, of_example.jaxpr.consts), None),
        lambda: report(params, *batch).routes,
        _remedy("jax.vmap(jax.grad(loss))", "the loss"),
    )

    grad = jax.grad if of_example.blocker("rev") is None else jax.jacfwd  # by JAX's transformations alone

    def measure(values: Values, groups: Groups) -> list[Sides]:
        params, batch, extra, consts = values[0]
        sides = []
        for group in groups:
            alone, part = replay_loss(of_example, consts), params
            if group != every:
                alone, part = _restrict_to_leaf(alone, params, group[0])
            gradients = jax.vmap(grad(alone), (None,) + (0,) * len(batch))
            here, beside = (
                comparison.formula([*map(widen, jax.tree.leaves(gradients(at, *batch)))], subject.eps, *extra)
                for at in (part, perturb_point(part, subject.eps))
            )
            found = comparison.parts(evaluate(alone, part, batch, 2, *extra))
            for output, one, other in zip(found, here, beside, strict=True):
                sides.append(Sides(widen(output), one.value, other.value, one.size, (group[0],), one.moves))
        return sides

    require_agreement(subject, measure, [every], "the result for three examples", "jax.vmap(jax.grad(loss))")


def _restrict_to_leaf(loss: Objective, params: Tree, leaf: int) -> tuple[Objective, Tree]:
    """The loss as a function of one leaf, and that leaf."""
    leaves, structure = jax.tree.flatten(params)

    def of_leaf(part: Array, *example: Any) -> Array:
        return loss(structure.unflatten([*leaves[:leaf], part, *leaves[leaf + 1 :]]), *example)

    return of_leaf, leaves[leaf]


def norms_of(gradients: Gradients) -> Array:
    """The norm of the gradient of each example."""
    dtype = accumulator(gradients)
    squares = [jnp.sum(leaf.astype(dtype).reshape(len(leaf), -1) ** 2, axis=1) for leaf in gradients]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def each_norm(norms: Array, eps: float) -> list[Expected]:
    """The norms as single numbers to compare. Where parts of a gradient cancel, the error is the root of a rounding."""
    return [Expected(norm, norm, eps**-0.5) for norm in norms]
