"""Self-check of per-example derivatives: a few examples against ``jax.vmap(jax.grad(loss))``."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvature._trees import leaf_paths
from curvature._types import Objective, Tree
from curvature.programs import _traced
from curvature.transforms._per_example_norms import accumulator
from curvature.transforms._self_check import (
    MOVES,
    Sides,
    Values,
    compare,
    consts_of,
    describe_leaf,
    entries_of,
    eps_of,
    failure,
    few_of,
    perturb_point,
    rebuild_loss,
    trace_example,
    widen,
    worst,
)

_EXAMPLES = 3  # the first, the middle and the last

Gradients = list[Array]


class Expected(NamedTuple):
    """The expected value of a number or an array; see ``Sides``."""

    value: Array
    size: Array
    moves: float = MOVES


Run = Callable[[Objective, Tree, tuple[Any, ...], Any], list[Array]]
Formula = Callable[[Gradients, Any, float], list[Expected]]

_REMEDY = (
    "Report the program, and use jax.vmap(jax.grad(loss)) until it is repaired; if the loss has a custom derivative "
    "rule, curvature.check_derivatives says whether that is right."
)


def check_few_examples(
    loss: Objective,
    params: Tree,
    batch: tuple[Any, ...],
    run: Run,
    formula: Formula,
    report: Callable[..., Any],
    extra: Any = (),
) -> None:
    """Raise if a function of the gradients of a few examples differs from the ``formula`` of these gradients.

    Args:
        loss: the loss of one example.
        params: the parameters.
        batch: the examples, of which three are taken, in chunks of two.
        run: ``run(loss, params, batch, extra)``, the function under test in chunks of two, as a list of numbers or
            arrays.
        formula: from the gradients of the leaves, with a leading axis of examples, ``extra`` and the rounding ``eps``
            to the expected results.
        report: from the parameters and the batch to the rule for each leaf.
        extra: a further operand of ``run`` and ``formula``.
    """
    with jax.ensure_compile_time_eval():
        few = few_of(batch, _EXAMPLES)
        of_example = trace_example(loss, params, few)
    if of_example.jaxpr is None:
        return  # the loss branches on values: its gradients are formed by JAX alone
    eps = eps_of(of_example)

    def measure_of(leaf: int | None) -> Callable[[Values], list[Sides]]:
        def measure(values: Values) -> list[Sides]:
            params, batch, extra, consts = values[0]
            alone, part = _restrict_to_leaf(rebuild_loss(of_example, consts), params, leaf)
            found = [*map(widen, run(alone, part, batch, extra))]
            here, there = (
                formula(_gradients(of_example, alone, at, batch), extra, eps) for at in (part, perturb_point(part, eps))
            )
            return [
                Sides(output, one.value, other.value, one.size, one.moves)
                for output, one, other in zip(found, here, there, strict=True)
            ]

        return measure

    with jax.ensure_compile_time_eval():
        excesses, values = compare(measure_of(None), ((params, few, extra, consts_of(of_example)), None), eps)
        _, excess = worst(excesses)
        if excess.ratio <= 1:
            return
        paths = leaf_paths(params)
        single = [worst(compare(measure_of(k), values, eps)[0])[1].ratio for k in range(len(paths))]
    faulty = [k for k, ratio in enumerate(single) if ratio > 1] or list(range(len(paths)))
    routes = report(params, *batch).routes
    sentences = [
        describe_leaf(paths[k], routes[paths[k]], entries_of(of_example.jaxpr, k, len(paths))) for k in faulty[:2]
    ]
    raise failure("the result for three examples", "jax.vmap(jax.grad(loss))", excess, sentences, _REMEDY)


def _restrict_to_leaf(loss: Objective, params: Tree, leaf: int | None) -> tuple[Objective, Tree]:
    """The loss as a function of one leaf, and that leaf; of all parameters where ``leaf`` is None."""
    if leaf is None:
        return loss, params
    leaves, structure = jax.tree.flatten(params)

    def of_leaf(part: Array, *example: Any) -> Array:
        return loss(structure.unflatten([*leaves[:leaf], part, *leaves[leaf + 1 :]]), *example)

    return of_leaf, leaves[leaf]


def _gradients(of_example: _traced.Program, loss: Objective, params: Tree, batch: tuple[Any, ...]) -> Gradients:
    """The gradients of each example by JAX's transformations alone, in reverse mode where that is legal."""
    gradient = jax.grad(loss) if of_example.blocker("rev") is None else jax.jacfwd(loss)
    return [*map(widen, jax.tree.leaves(jax.vmap(gradient, (None,) + (0,) * len(batch))(params, *batch)))]


def norms_of(gradients: Gradients) -> Array:
    """The norm of the gradient of each example."""
    dtype = accumulator(gradients)
    squares = [jnp.sum(leaf.astype(dtype).reshape(len(leaf), -1) ** 2, axis=1) for leaf in gradients]
    return jnp.sqrt(sum(squares[1:], squares[0]))


def each_norm(norms: Array, eps: float) -> list[Expected]:
    """The norms as single numbers to compare. Where parts of a gradient cancel, the error is the root of a rounding."""
    return [Expected(norm, norm, eps**-0.5) for norm in norms]
