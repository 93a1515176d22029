"""Implicit differentiation of a minimizer with respect to the data of its objective.

At a minimizer ``grad f(x, a) = 0``, and as the data move by ``da`` it stays so: ``H dx = -(d grad f / da) da``, with
``H`` the Hessian by ``x``. That is the implicit function theorem. The value moves by ``(df / da) da`` alone, since the
gradient by ``x`` is zero: the envelope theorem.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr
from jaxtyping import Array, Float

from curvature._errors import calling
from curvature._sharding import vary_like
from curvature._trees import ravel
from curvature._types import Tree, Vector
from curvature.linalg._solve import solve
from curvature.linalg._subproblems import pseudo_inverse, scaling
from curvature.programs._traced import Program, trace
from curvature.transforms._compositions import linearize_program, trace_objective
from curvature.transforms._jacobian import map_basis
from curvature.transforms._modes import choose_composition

Operands = list[Any]
Lifted = Callable[..., Any]
"""A function of ``(x, *operands)`` that closes over no array."""

_SMALL = 1000  # entries, as for ``solve``: above, no matrix is formed


def trace_from(traced: Callable[[Tree], Program], x0: Tree) -> tuple[Program, Tree]:
    """The function traced at the start, and the start.

    Inside ``shard_map`` that varies from device to device if the function does: each device solves its own problem.
    """
    program = traced(x0)
    varying = vary_like(x0, program.out)
    if jax.tree.map(jax.typeof, varying) == jax.tree.map(jax.typeof, x0):
        return program, x0
    return traced(varying), varying


def lift(program: Program) -> tuple[Lifted, Operands]:
    """The traced function as one of ``x`` and of every array it takes or closes over, and these arrays.

    So what the function has in its closure is differentiated by as its arguments are.
    """
    closed: Any = program.jaxpr
    structure = jax.tree.structure(program.out)

    def lifted(x: Tree, *operands: Any) -> Any:
        leaves = jex.core.jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, operands))(*jax.tree.leaves(x))
        return structure.unflatten(leaves[: structure.num_leaves])

    return lifted, list(closed.consts)


def implicit_minimizer(
    objective: Lifted, operands: Sequence[Any], x: Tree, value: Float[Array, ""], free: Tree | None = None
) -> tuple[Tree, Float[Array, ""]]:
    """A minimizer of ``objective(x, *operands)`` by ``x`` and its value, with their derivatives by the operands.

    Forward and reverse mode, and derivatives of any order: the rule of the first derivative applies to itself. How
    ``x`` was found does not matter; nothing is traced before a derivative is asked for. If ``H`` is singular its
    pseudo-inverse stands for the inverse, in variables scaled by their own curvature. Entries that are not ``free``, a
    tree of masks like ``x``, rest.

    Cost: up to 1,000 entries n Hessian products and one factorization of about 9 n^3 FLOPs for all directions (in
        reverse mode, cotangents) together; beyond, a solve by conjugate gradients, then MINRES, for each of them. The
        value takes one gradient by the operands.
    """
    if free is None:
        free = jax.tree.map(lambda leaf: jnp.ones_like(leaf, bool), x)
    return _solution(objective, *jax.lax.stop_gradient((x, value, free)), list(operands))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _solution(
    objective: Lifted, x: Tree, value: Float[Array, ""], free: Tree, operands: Operands
) -> tuple[Tree, Float[Array, ""]]:
    return x, value


@functools.partial(_solution.defjvp, symbolic_zeros=True)
@calling("minimize")
def _solution_jvp(objective: Lifted, primals: Any, tangents: Any) -> Any:
    x, value = _solution(objective, *primals)
    free, operands = primals[2:]
    moving = [i for i, tangent in enumerate(tangents[3]) if not isinstance(tangent, SymbolicZero)]
    if not moving:
        return (x, value), jax.tree.map(jnp.zeros_like, (x, value))
    directions = [tangents[3][i] for i in moving]

    def joint(point: tuple[Tree, Operands]) -> Any:
        now = dict(zip(moving, point[1], strict=True))
        return objective(point[0], *(now.get(i, operand) for i, operand in enumerate(operands)))

    program = trace_objective("fun", joint, (x, [operands[i] for i in moving]), ())
    composition = choose_composition(program, "auto")
    _, (_, slopes), product, _ = linearize_program(program, composition)
    at_rest = jax.tree.map(jnp.zeros_like, program.x)

    def of_free(v: Tree) -> Tree:  # the Hessian of the free entries, and the identity of the others
        return _where(free, product((_where(free, v), at_rest[1]))[0], v)

    dx = _solve(of_free, _where(free, jax.tree.map(jnp.negative, product((at_rest[0], directions))[0])))
    parts = [jnp.vdot(slope, da, precision="highest") for slope, da in zip(slopes, directions, strict=True)]
    return (x, value), (dx, sum(part.astype(value.dtype) for part in parts))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def known_at(fun: Lifted, known: Tree, x: Tree, operands: Operands) -> Tree:
    """``fun(x, *operands)`` where it is known already, with its derivatives by ``x`` and the operands."""
    return known


@functools.partial(known_at.defjvp, symbolic_zeros=True)
def _known_at_jvp(fun: Lifted, primals: Any, tangents: Any) -> Any:
    return known_at(fun, *primals), _push(fun, primals[1:], tangents[1:])[1]


def _push(fun: Lifted, point: tuple[Tree, Operands], direction: Any) -> tuple[Tree, Tree]:
    """``fun(x, *operands)`` and its derivative along a direction, in what moves alone.

    It is zero where forward mode cannot give it, so that other results of the same solve keep theirs.
    """
    leaves, structure = jax.tree.flatten(point)
    along = jax.tree.leaves(direction, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
    moving = [i for i, tangent in enumerate(along) if not isinstance(tangent, SymbolicZero)]

    def of_moving(values: list[Any]) -> tuple[Tree, None]:
        now = dict(zip(moving, values, strict=True))
        x, operands = structure.unflatten([now.get(i, leaf) for i, leaf in enumerate(leaves)])
        return fun(x, *operands), None

    program = trace(of_moving, [leaves[i] for i in moving])
    if program.blocker("fwd") is not None:
        value = program.fun(program.x)[0]
        return value, jax.tree.map(jnp.zeros_like, value)
    value, moved, _ = jax.jvp(program.fun, (program.x,), ([along[i] for i in moving],), has_aux=True)
    return value, moved


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def root_at(jacobian: Lifted, root: Float[Array, "n k"], x: Tree, operands: Operands) -> Float[Array, "n k"]:
    """A known ``B`` with ``B B' = (J'J)^-1`` for ``J = jacobian(x, *operands)``, with derivatives by both.

    ``dB = -B (M + M') / 2`` with ``M = (J B)' (dJ B)``, so that ``d(B B') = -(J'J)^-1 d(J'J) (J'J)^-1``, without
    ``J'J``. Of a pseudo-inverse the other terms are dropped: they vanish in the rows of variables that ``J``
    determines.
    """
    return root


@functools.partial(root_at.defjvp, symbolic_zeros=True)
def _root_at_jvp(jacobian: Lifted, primals: Any, tangents: Any) -> Any:
    root = root_at(jacobian, *primals)
    multiply = functools.partial(jnp.matmul, precision="highest")
    matrix, moved = _push(jacobian, primals[1:], tangents[1:])
    product = multiply(multiply(matrix, root).T, multiply(moved, root))
    return root, -multiply(root, product + product.T) / 2


def _where(free: Tree, tree: Tree, otherwise: Tree | None = None) -> Tree:
    otherwise = jax.tree.map(jnp.zeros_like, tree) if otherwise is None else otherwise
    return jax.tree.map(jnp.where, free, tree, otherwise)


def _solve(product: Callable[[Tree], Tree], b: Tree) -> Tree:
    """``H^-1 b``, differentiable by ``b`` and by what the product holds."""
    vector, unravel = ravel(b)
    if vector.size > _SMALL:
        return solve(product, b, rtol=float(jnp.finfo(vector.dtype).eps) ** 0.75)[0]

    def on_vectors(v: Vector) -> Vector:
        return ravel(product(unravel(v)))[0]

    inverse = _pseudo_inverse(jax.lax.stop_gradient(map_basis(on_vectors, vector, "auto")))

    def refined(product: Callable[[Vector], Vector], b: Vector) -> Vector:
        x = inverse(b)
        return x + inverse(b - product(x))

    return unravel(jax.lax.custom_linear_solve(on_vectors, vector, refined, symmetric=True))


def _pseudo_inverse(matrix: Float[Array, "n n"]) -> Callable[[Vector], Vector]:
    """Of a symmetric matrix with its diagonal scaled to ones, so that the units of the variables do not matter."""
    scale = scaling(matrix)
    eigenvalues, vectors = jnp.linalg.eigh((matrix + matrix.T) / (2 * jnp.outer(scale, scale)), symmetrize_input=False)
    inverse = pseudo_inverse(eigenvalues, vectors)
    return lambda b: inverse(b / scale) / scale
