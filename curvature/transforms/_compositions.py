"""Second derivatives of a traced function by a composition of forward and reverse mode."""

from collections.abc import Callable
from typing import Any

import jax

from curvature import _checks
from curvature._trees import Subtree, leaf_subtrees
from curvature._types import ChunkSize, HessianBlocks, HessianMode, Objective, Tree
from curvature.programs import _traced
from curvature.programs._pushforward import asymmetric_rule, derivative_along, directional_derivative, transposed
from curvature.transforms import _modes
from curvature.transforms._blocks import selected
from curvature.transforms._jacobian import gradient_of, jacobian_of, summed_jacobian_of, with_aux


def hessian_of(
    program: _traced.Program, mode: HessianMode, chunk_size: ChunkSize, blocks: HessianBlocks = None
) -> tuple[Tree, Any]:
    """The Hessian of a traced function at its point, or the ``blocks`` of it, and the function's aux."""
    x = program.x
    composition = _modes.choose_composition(program, mode, whole=not isinstance(blocks, tuple | list))
    if blocks != "diagonal":
        return _block(program, composition, *selected(x, blocks), chunk_size)
    results, auxes = zip(
        *(_block(program, composition, leaf, leaf, chunk_size) for leaf in leaf_subtrees(x)), strict=True
    )
    structure = jax.tree.structure(x)
    return jax.tree.transpose(structure, jax.tree.structure(program.out), structure.unflatten(results)), auxes[0]


def _block(
    program: _traced.Program, composition: str, rows: Subtree, columns: Subtree, chunk_size: ChunkSize
) -> tuple[Tree, Any]:
    """The block of two sub-trees, for each output a tree like the rows of trees like the columns, and the aux."""
    outer, _, inner = composition.partition("_over_")

    def gradient_by_rows(part: Tree) -> tuple[Any, Any]:
        x = columns.put(program.x, part)
        if inner == "rev" and program.is_scalar:  # JAX removes the equations of the other rows as dead code
            grad, rest = gradient_of(program, x, inner)
            return rows.take(grad), rest
        return summed_jacobian_of(lambda part: program.fun(rows.put(x, part)), rows.take(x), inner, None)

    result, (_, (_, aux)) = jacobian_of(gradient_by_rows, columns.take(program.x), outer, chunk_size)
    return result, aux


def linearize_program(program: _traced.Program, composition: str) -> tuple[Any, Tree, Callable[[Tree], Tree], Any]:
    """Value, gradient, Hessian product and aux of a traced objective at its point."""
    x = program.x
    if composition == "fwd_over_rev":
        grad, hvp_fn, (value, aux) = jax.linearize(program.reverse.fun, x, has_aux=True)
        return value, grad, hvp_fn, aux
    if composition == "rev_over_rev":
        grad, pull, (value, aux) = jax.vjp(program.reverse.fun, x, has_aux=True)
        return value, grad, (lambda v: pull(v)[0]) if is_symmetric(program) else transposed(pull, x), aux
    forward = composition == "fwd_over_fwd" and _modes.is_small(program)
    grad, (value, aux) = gradient_of(program, x, "fwd" if forward or program.blocker("rev") is not None else "rev")
    return value, grad, lambda v: product_of(program, composition, v), aux


def trace_objective(name: str, f: Objective, x: Tree, args: tuple[Any, ...], has_aux: bool = False) -> _traced.Program:
    """``f`` traced at ``x``; raises unless it returns one floating scalar."""
    program = _traced.trace(lambda x: with_aux(f(x, *args), has_aux, name), x)
    _checks.check_scalar_output(name, program.out)
    return program


def is_symmetric(program: _traced.Program) -> bool:
    """Whether the Hessian is known to equal its transpose, so that a pull-back of the gradient is a product with it.

    Otherwise ``H[i, j]`` is the derivative of entry i of the gradient with respect to ``x_j``, as for ``jax.hessian``.
    """
    return program.jaxpr is not None and asymmetric_rule(program.jaxpr.jaxpr) is None


def product_of(program: _traced.Program, composition: str, v: Tree) -> Tree:
    """``H v`` by a composition of modes."""
    x = program.x
    outer, _, inner = composition.partition("_over_")
    if composition == "rev_over_rev" and is_symmetric(program):
        return jax.vjp(program.reverse.fun, x, has_aux=True)[1](v)[0]
    if composition == "rev_over_fwd" and is_symmetric(program):
        return jax.grad(lambda x: directional_derivative(program.fun, x, v), has_aux=True)(x)[0]
    return derivative_along(outer, lambda x: gradient_of(program, x, inner), x, v)[0]
