"""Self-check of the diagonal and the trace of a Hessian: a few numbers ``v' H v`` against plain compositions."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvature._types import Tree
from curvature.programs import _traced
from curvature.transforms._self_check import (
    Sides,
    Values,
    compare,
    direction_like,
    eps_of,
    failure,
    moved,
    widen,
    worst,
)
from curvature.transforms._self_check_second import (
    REMEDY,
    Subject,
    combined,
    describe_leaves,
    product,
    subject_of,
    weights_of,
)

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
                widen(jax.tree.leaves(product(subject.program, fun, at, direction))[k]).reshape(-1)[entry]
                for at in (x, moved(x, eps))
            )
            sides.append(Sides(widen(diagonal[k]).reshape(-1)[entry], expected, elsewhere, expected))
        return sides

    if not chosen:
        return
    with jax.ensure_compile_time_eval():
        excesses, _ = compare(measure, subject.values, eps)
    number, excess = worst(excesses)
    if excess.ratio > 1:
        at_fault = describe_leaves(subject, [chosen[number][0]])
        what, by = "an entry of the diagonal", "that of forward over reverse mode applied to f"
        raise failure(subject.function, what, by, excess, at_fault, REMEDY)


def check_laplacian(program: _traced.Program, along: Callable[[_traced.Program, Tree], Any]) -> None:
    """Raise if the sum of second derivatives along two random directions differs from ``sum_k v_k' H v_k``.

    The Laplacian is not compared: the plain composition would take a product for each entry of ``x``.

    Args:
        program: the function, traced.
        along: from a program and directions to the sum of the second derivatives along the directions.
    """
    eps = eps_of(program)
    every = list(range(len(jax.tree.leaves(program.x))))
    subject = subject_of("laplacian", program, lambda program: program, None)

    def of_leaves(chosen: Sequence[Sequence[int]]) -> Callable[[Values], list[Sides]]:
        return lambda values: [_laplacian_sides(subject, along, eps, part, values) for part in chosen]

    with jax.ensure_compile_time_eval():
        excesses, values = compare(of_leaves([every]), subject.values, eps)
        _, excess = worst(excesses)
        if excess.ratio <= 1:
            return
        single, _ = compare(of_leaves([[k] for k in every]), values, eps)
    number, of_leaf = worst(single)
    at_fault = describe_leaves(subject, [number] if of_leaf.ratio > 1 else every)
    what, by = "the Laplacian along two random directions", "v' H v by forward over reverse mode applied to f"
    raise failure(subject.function, what, by, excess, at_fault, REMEDY)


def _laplacian_sides(
    subject: Subject, along: Callable[[_traced.Program, Tree], Any], eps: float, chosen: Sequence[int], values: Values
) -> Sides:
    """Both sides for directions in the ``chosen`` leaves."""
    fun, x = subject.plain(values[0])
    weights = weights_of(subject.program)
    scalar = combined(fun, weights)
    of_leaves = [_directions(leaf, k, k in chosen) for k, leaf in enumerate(jax.tree.leaves(x))]
    directions = jax.tree.structure(x).unflatten(of_leaves)

    def forms(x: Tree) -> Array:
        terms = []
        for k in range(_DIRECTIONS):
            v = jax.tree.map(lambda leaf, k=k: leaf[k], directions)
            of_v = zip(jax.tree.leaves(v), jax.tree.leaves(product(subject.program, scalar, x, v)), strict=True)
            terms += [widen(a * b).reshape(-1) for a, b in of_v]
        return jnp.concatenate(terms)

    outs = jax.tree.leaves(along(subject.evaluate(values[0]), directions))
    found = sum(jnp.sum(widen(weight * out)) for weight, out in zip(weights, outs, strict=True))
    here = forms(x)
    return Sides(jnp.asarray(found), jnp.sum(here), jnp.sum(forms(moved(x, eps))), jnp.sum(jnp.abs(here)))


def _directions(leaf: Array, seed: int, is_chosen: bool) -> Array:
    """Random directions in one leaf along a leading axis; zeros for a leaf that is not chosen."""
    like = jax.ShapeDtypeStruct((_DIRECTIONS, *leaf.shape), leaf.dtype)
    return direction_like(like, seed) if is_chosen else jnp.zeros(like.shape, like.dtype)
