"""Hessians and their products with vectors."""

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import jax

from curvature import _checks
from curvature._types import ChunkSize, HessianBlocks, HessianMode, Objective, Tree
from curvature.transforms import _modes
from curvature.transforms._blocks import Subtree, leaf_subtrees, select
from curvature.transforms._jacobian import bind_argnums, gradient_of, jacobian_of, with_aux


def hvp(f: Objective, x: Tree, v: Tree, *args: Any, mode: HessianMode = "auto") -> Tree:
    """The Hessian-vector product ``H v``, with ``H[i, j] = d^2 f / dx_i dx_j`` at ``x``, never forming ``H``.

    For several products at one point call ``linearize_grad`` instead: it evaluates ``f`` once for all of them.

    Args:
        f: the objective, ``f(x, *args) -> scalar``.
        x: the point, any tree of floating arrays.
        v: the direction, with the structure, shapes and dtypes of ``x``.
        *args: data for ``f``, not differentiated.
        mode: the composition of modes. ``"auto"`` takes the cheapest that is legal for ``f``, in the order forward
            over reverse, reverse over reverse, reverse over forward, forward over forward.

    Returns:
        ``H v``, shaped like ``x``. Whether it is of a mean or a sum over data follows ``f``.

    Raises:
        TypeError: when ``f`` is not callable or not scalar, when a leaf is not of a real floating dtype, or when no
            composition (or not the one asked for) can differentiate ``f``; the message names the primitive and line.
        ValueError: when ``v`` does not match ``x``, or the mode is unknown.

    Cost: about 2 gradients and twice the memory of one; forward over forward costs one JVP of a JVP for each entry of
        ``x``. Choosing traces the gradient once more, and compiles nothing more.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.hvp(lambda x: x[0] ** 2 * x[1], jnp.array([3.0, 5.0]), jnp.array([1.0, 0.0]))
        Array([10.,  6.], dtype=float32)

    References: Pearlmutter, Fast exact multiplication by the Hessian (1994), doi:10.1162/neco.1994.6.1.147.
    """
    program, composition = _prepare("hvp", f, x, args, mode, has_aux=False)
    return _product(program, composition, _checks.check_direction("hvp", "v", v, "x", program.x))


def linearize_grad(f: Objective, x: Tree, *args: Any, has_aux: bool = False, mode: HessianMode = "auto") -> tuple:
    """Value, gradient and the map ``v -> H v`` from one evaluation of ``f``.

    Args:
        f: the objective, ``f(x, *args) -> scalar``, or ``-> (scalar, aux)`` with ``has_aux=True``.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated.
        has_aux: whether ``f`` returns auxiliary data too.
        mode: the composition of modes; see ``hvp``.

    Returns:
        ``(value, grad, hvp_fn)``, or ``(value, grad, hvp_fn, aux)``; ``grad`` and ``hvp_fn(v)`` are shaped like ``x``.
        Call ``hvp_fn`` inside the same ``jit`` as ``linearize_grad``: it holds the intermediates of this one point.

    Raises:
        TypeError, ValueError: as ``hvp``.

    Cost: one gradient that keeps its intermediates, then for each ``hvp_fn(v)`` about 1.5 gradients and no evaluation
        of ``f``. The modes over forward have nothing to keep: there each product costs what ``hvp`` costs.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> value, grad, hvp_fn = curvature.linearize_grad(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))
        >>> value, grad, hvp_fn(jnp.array([1.0, 1.0]))
        (Array(9., dtype=float32), Array([ 3., 12.], dtype=float32), Array([ 6., 12.], dtype=float32))
    """
    program, composition = _prepare("linearize_grad", f, x, args, mode, has_aux)
    value, grad, hvp_fn, aux = linearize_program(program, composition)

    def checked_hvp(v: Tree) -> Tree:
        return hvp_fn(_checks.check_direction("hvp_fn", "v", v, "x", program.x))

    return (value, grad, checked_hvp, aux) if has_aux else (value, grad, checked_hvp)


def hessian(
    f: Callable[..., Any],
    argnums: SupportsIndex | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    mode: HessianMode = "auto",
    chunk_size: ChunkSize = "auto",
    blocks: HessianBlocks = None,
) -> Callable[..., Any]:
    """The Hessian ``H[i, j] = d^2 f / dx_i dx_j``: a drop-in for ``jax.hessian`` that is faster and bounded in memory.

    Args:
        f: a function of arrays; for a vector-valued one there is a Hessian for each output.
        argnums: the positional argument to differentiate by, or several.
        has_aux: whether ``f`` returns ``(out, aux)``; then the result is ``(hessian, aux)``.
        mode: the composition of modes; see ``hvp``. On a CPU ``"auto"`` takes reverse over reverse first for all of a
            scalar function's Hessian, unless there are convolutions: one product alone costs more so, many cost less.
        chunk_size: how many columns are computed at once; see ``vmap``.
        blocks: ``(rows, columns)`` for the block of two leaves or sub-trees of ``x`` alone, named by their paths as
            ``jax.tree_util.keystr(path, simple=True, separator="/")`` spells them, such as ``("layers/0/w", "head")``;
            the empty path is all of ``x``. ``"diagonal"`` for the block of each leaf with itself. None for all.

    Returns:
        A function of the arguments of ``f`` that returns what ``jax.hessian(f)`` returns: for each output leaf, a tree
        like ``x`` of trees like ``x``, with blocks of shape ``out.shape + x_i.shape + x_j.shape``. It is symmetric to
        rounding, not to the last bit. For a block of two sub-trees: a tree like the rows of trees like the columns.
        For the diagonal: a tree like ``x`` with blocks of shape ``out.shape + x_i.shape + x_i.shape``.

    Raises:
        TypeError, ValueError: as ``jacobian``; ValueError for an unknown path, which lists those there are.

    Cost: ``f`` is linearized once, then one product of about 1.5 gradients for each of the n entries of ``x``. Memory:
        the n x n result, the intermediates of one gradient, and the tangents of one chunk. A block takes products for
        its columns alone (its rows in the modes under reverse mode), differentiated back to its rows alone; the
        diagonal takes n products, each back to one leaf, and never holds the n x n matrix.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.hessian(lambda x: x[0] ** 2 * x[1])(jnp.array([3.0, 5.0]))
        Array([[10.,  6.],
               [ 6.,  0.]], dtype=float32)
        >>> x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
        >>> curvature.hessian(lambda x: x["b"] * jnp.sum(x["a"] ** 2), blocks=("a", "b"))(x)
        Array([2., 4.], dtype=float32)
    """
    _checks.check_callable("hessian", "f", f)
    _checks.check_choice("hessian", "mode", mode, HessianMode)
    _checks.check_chunk_size("hessian", chunk_size)
    _checks.check_blocks("hessian", blocks)

    def hessian_fn(*args: Any, **kwargs: Any) -> Any:
        fun, x = bind_argnums("hessian", f, argnums, has_aux, args, kwargs)
        program = _modes.trace(fun, x)
        _checks.check_floating_output("hessian", "f", program.out)
        result, aux = hessian_of("hessian", program, mode, chunk_size, blocks)
        return (result, aux) if has_aux else result

    return hessian_fn


def hessian_of(
    function: str, program: _modes.Program, mode: HessianMode, chunk_size: ChunkSize, blocks: HessianBlocks = None
) -> tuple[Tree, Any]:
    """The Hessian of a traced function at its point, or those blocks of it, and the function's aux."""
    x = program.x
    composition = _modes.choose_composition(function, program, mode, whole=not isinstance(blocks, tuple | list))
    if blocks != "diagonal":
        rows, columns = (select(function, "blocks", x, path) for path in blocks or ("", ""))
        return _block(program, composition, rows, columns, chunk_size)
    results, auxes = zip(
        *(_block(program, composition, leaf, leaf, chunk_size) for leaf in leaf_subtrees(x)), strict=True
    )
    structure = jax.tree.structure(x)
    return jax.tree.transpose(structure, jax.tree.structure(program.out), structure.unflatten(results)), auxes[0]


def _block(
    program: _modes.Program, composition: str, rows: Subtree, columns: Subtree, chunk_size: ChunkSize
) -> tuple[Tree, Any]:
    """The block of two sub-trees: for each output a tree like the rows of trees like the columns; and the aux."""
    outer, _, inner = composition.partition("_over_")

    def gradient_by_rows(part: Tree) -> tuple[Any, Any]:
        x = columns.put(program.x, part)
        if inner == "rev" and program.is_scalar:  # what the other rows cost falls to dead code
            grad, rest = gradient_of(program, x, inner)
            return rows.take(grad), rest
        return jacobian_of(lambda part: program.fun(rows.put(x, part)), rows.take(x), inner, None)

    result, (_, (_, aux)) = jacobian_of(gradient_by_rows, columns.take(program.x), outer, chunk_size)
    return result, aux


def linearize_program(program: _modes.Program, composition: str) -> tuple[Any, Tree, Callable[[Tree], Tree], Any]:
    """Value, gradient, Hessian product and aux of a traced objective at its point."""
    x = program.x
    if composition == "fwd_over_rev":
        grad, hvp_fn, (value, aux) = jax.linearize(program.reverse.fun, x, has_aux=True)
        return value, grad, hvp_fn, aux
    if composition == "rev_over_rev":
        grad, pull, (value, aux) = jax.vjp(program.reverse.fun, x, has_aux=True)
        return value, grad, lambda v: pull(v)[0], aux  # H is symmetric: v H is H v
    grad, (value, aux) = gradient_of(program, x, "rev" if program.blocker("rev") is None else "fwd")
    return value, grad, lambda v: _product(program, composition, v), aux


def _prepare(
    function: str, f: Objective, x: Tree, args: tuple[Any, ...], mode: HessianMode, has_aux: bool
) -> tuple[_modes.Program, str]:
    """The objective traced at ``x``, and the composition to differentiate it by."""
    _checks.check_callable(function, "f", f)
    _checks.check_choice(function, "mode", mode, HessianMode)
    program = trace_objective(function, "f", f, _checks.check_point(function, "x", x), args, has_aux)
    return program, _modes.choose_composition(function, program, mode)


def trace_objective(
    function: str, name: str, f: Objective, x: Tree, args: tuple[Any, ...], has_aux: bool = False
) -> _modes.Program:
    """``f`` traced at ``x``, once it is known to return one floating scalar."""
    program = _modes.trace(lambda x: with_aux(function, f(x, *args), has_aux), x)
    _checks.check_scalar_output(function, name, program.out)
    return program


def _product(program: _modes.Program, composition: str, v: Tree) -> Tree:
    """``H v`` by the composition asked for."""
    x = program.x
    if composition == "fwd_over_rev":
        return jax.jvp(program.reverse.fun, (x,), (v,), has_aux=True)[1]
    if composition == "rev_over_rev":
        return jax.vjp(program.reverse.fun, x, has_aux=True)[1](v)[0]

    def along_v(x: Tree) -> tuple[Any, Any]:
        return _modes.directional_derivative(program.fun, x, v)

    if composition == "rev_over_fwd":
        return jax.grad(along_v, has_aux=True)(x)[0]
    return jacobian_of(along_v, x, "fwd", None)[0]
