"""The exact diagonal of a Hessian, without the matrix."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature import _checks
from curvature._types import ChunkSize, HessianMode, Objective, Tree
from curvature.transforms import _modes
from curvature.transforms._blocks import Subtree, leaf_subtrees
from curvature.transforms._compositions import trace_objective
from curvature.transforms._jacobian import gradient_of, map_basis, sum_over_devices
from curvature.transforms._pushforward import directional_derivative
from curvature.transforms._self_check_second import subject_of
from curvature.transforms._self_check_traces import check_diagonal


def hessian_diagonal(
    f: Objective,
    x: Tree,
    *args: Any,
    chunk_size: ChunkSize = "auto",
    mode: HessianMode = "auto",
    check: bool = False,
) -> Tree:
    """The diagonal ``d[i] = d^2 f / dx_i^2`` of the Hessian at ``x``, exact, without forming the Hessian.

    Each entry is the second derivative of ``f`` along one basis vector, for which two forward derivatives are enough:
    no reverse pass, and one number for each direction instead of a column.

    Args:
        f: the objective, ``f(x, *args) -> scalar``.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated.
        chunk_size: how many entries are computed at once; see ``vmap``.
        mode: the composition of modes. ``"auto"`` takes forward over forward if that is legal for ``f``, and otherwise
            what ``hvp`` takes. The other compositions make a column of a leaf's own block for each entry.
        check: whether to compare up to three entries, of different leaves, with those of ``H v`` by forward over
            reverse mode, ``jax.jvp(jax.grad(f), (x,), (v,))``, and to raise where they differ by more than rounding.
            Traced calls are compared as by ``hessian``.

    Returns:
        The diagonal, shaped like ``x``. Inside ``jax.shard_map``, at an ``x`` that the devices share, it is of the sum
        over the devices, as ``jax.hessian`` is.

    Raises:
        TypeError: when ``f`` is not callable or not scalar, when a leaf is not of a real floating dtype, or when no
            composition (or not the one asked for) can differentiate ``f``; the message names the primitive and line.
        ValueError: for an unknown mode or a bad ``chunk_size``.
        RuntimeError: where ``check`` finds a difference; the message names the leaf, and the equations and lines where
            it enters ``f``.

    Cost: for each entry of ``x`` one JVP of a JVP: two evaluations of the part of ``f`` that lies behind its leaf, and
        one evaluation of ``f`` for each chunk. Memory: the intermediates of one chunk of directions. ``check`` takes
        six products ``H v`` more, and where the call is traced one more diagonal.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.hessian_diagonal(lambda x: x[0] ** 3 * x[1], jnp.array([1.0, 2.0]))
        Array([12.,  0.], dtype=float32)

    References: Griewank and Walther, Evaluating Derivatives, 2nd ed. (2008), section 13.3 (second derivatives from
        univariate Taylor series), doi:10.1137/1.9780898717761.
    """
    _checks.check_callable("hessian_diagonal", "f", f)
    _checks.check_choice("hessian_diagonal", "mode", mode, HessianMode)
    _checks.check_chunk_size("hessian_diagonal", chunk_size)
    program = trace_objective("hessian_diagonal", "f", f, _checks.check_point("hessian_diagonal", "x", x), args)
    result = _diagonal(program, mode, chunk_size)
    if check and program.jaxpr is not None:
        evaluate = functools.partial(_diagonal, mode=mode, chunk_size=chunk_size)
        check_diagonal(subject_of("hessian_diagonal", program, evaluate, result))
    return result


def _diagonal(program: _modes.Program, mode: HessianMode, chunk_size: ChunkSize) -> Tree:
    """The diagonal for a traced objective, leaf by leaf, so that nothing moves before the leaf comes into play."""
    if mode == "auto" and program.composition_blocker("fwd_over_fwd") is None:
        mode = "fwd_over_fwd"
    composition = _modes.choose_composition("hessian_diagonal", program, mode)
    diagonals = [_diagonal_of(program, composition, leaf, chunk_size) for leaf in leaf_subtrees(program.x)]
    return jax.tree.structure(program.x).unflatten(diagonals)


def _diagonal_of(
    program: _modes.Program, composition: str, leaf: Subtree, chunk_size: ChunkSize
) -> Float[Array, "*shape"]:
    """The diagonal of the block of one leaf with itself, shaped like the leaf."""
    x = leaf.take(program.x)
    curvature = _curvature_along(program, composition, leaf)
    return sum_over_devices(map_basis(curvature, x, chunk_size).astype(x.dtype).reshape(x.shape), x)


def _curvature_along(program: _modes.Program, composition: str, leaf: Subtree) -> Callable[[Array], Array]:
    """The map ``v -> v' H v`` for directions ``v`` in one leaf."""
    x = leaf.take(program.x)

    def fun(part: Array) -> tuple[Array, None]:
        return program.fun(leaf.put(program.x, part))[0], None

    def gradient(part: Array) -> Array:
        return leaf.take(gradient_of(program, leaf.put(program.x, part), "rev")[0])

    def slope(part: Array, v: Array) -> Array:
        return directional_derivative(fun, part, v)[0]

    if composition == "fwd_over_fwd":
        return lambda v: jax.jvp(lambda part: slope(part, v), (x,), (v,))[1]
    if composition == "rev_over_fwd":
        return lambda v: jnp.vdot(v, jax.grad(slope)(x, v))
    if composition == "fwd_over_rev":
        _, push = jax.linearize(gradient, x)
        return lambda v: jnp.vdot(v, push(v))
    _, pull = jax.vjp(gradient, x)
    return lambda v: jnp.vdot(v, pull(v)[0])
