"""Hessians, their products with vectors, and their diagonal."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvature import _checks
from curvature._errors import calling, later, public
from curvature._trees import Subtree, leaf_subtrees
from curvature._types import ChunkSize, HessianBlocks, HessianMode, Objective, Tree
from curvature.programs import _traced
from curvature.programs._pushforward import directional_derivative
from curvature.transforms import _modes
from curvature.transforms._compositions import hessian_of, linearize_program, product_of, trace_objective
from curvature.transforms._jacobian import bind_argnums, gradient_of, map_basis, sum_over_devices
from curvature.transforms._mean_hessian import hessian_of_examples, routes_of_examples
from curvature.transforms._self_check_cases import check_diagonal, check_hessian, second_derivative


@public
def hvp(f: Objective, x: Tree, v: Tree, *args: Any, mode: HessianMode = "auto") -> Tree:
    """The Hessian-vector product ``H v``, with ``H[i, j] = d^2 f / dx_i dx_j`` at ``x``, without forming ``H``.

    For several products at one point call ``linearize_grad``: it evaluates ``f`` once for all of them.

    Args:
        f: the objective, ``f(x, *args) -> scalar``.
        x: the point, any tree of floating arrays.
        v: the direction, with the structure, shapes and dtypes of ``x``.
        *args: data for ``f``, not differentiated.
        mode: the composition of modes. ``"auto"`` takes the cheapest that is legal for ``f``, in the order forward
            over reverse, reverse over reverse, reverse over forward, forward over forward.

    Returns:
        ``H v``, shaped like ``x``. ``H`` is the Hessian of a mean or of a sum over data, as ``f`` is. In every mode
        ``H[i, j]`` is the derivative of entry i of the gradient with respect to ``x_j``, also where a custom rule that
        is no derivative makes ``H`` asymmetric. Inside ``jax.shard_map``, at an ``x`` that the devices share, ``H`` is
        of the sum over the devices, as for ``jax.grad`` and ``jax.hessian``.

    Raises:
        TypeError: if ``f`` is not callable or not scalar, if a leaf is not of a real floating dtype, or if no
            composition (or not the requested one) can differentiate ``f``; the message names the primitive and line.
        ValueError: if ``v`` does not match ``x``, or the mode is unknown.

    Cost: about 2 gradients and twice the memory of one; forward over forward costs one JVP of a JVP for each entry of
        ``x``. The choice of a mode traces the gradient one more time and compiles nothing more.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.hvp(lambda x: x[0] ** 2 * x[1], jnp.array([3.0, 5.0]), jnp.array([1.0, 0.0]))
        Array([10.,  6.], dtype=float32)

    References: Pearlmutter, Fast exact multiplication by the Hessian (1994), doi:10.1162/neco.1994.6.1.147.
    """
    program, composition = _prepare(f, x, args, mode, has_aux=False)
    return product_of(program, composition, _checks.check_direction("v", v, "x", program.x))


@public
def linearize_grad(f: Objective, x: Tree, *args: Any, has_aux: bool = False, mode: HessianMode = "auto") -> tuple:
    """Value, gradient and the map ``v -> H v`` from one evaluation of ``f``.

    Args:
        f: the objective, ``f(x, *args) -> scalar``, or ``-> (scalar, aux)`` with ``has_aux=True``.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated.
        has_aux: whether ``f`` also returns auxiliary data.
        mode: the composition of modes; see ``hvp``.

    Returns:
        ``(value, grad, hvp_fn)``, or ``(value, grad, hvp_fn, aux)``; ``grad`` and ``hvp_fn(v)`` are shaped like ``x``.
        Call ``hvp_fn`` inside the same ``jit`` as ``linearize_grad``: it holds the intermediates of this point.

    Raises:
        TypeError, ValueError: as ``hvp``.

    Cost: one gradient that keeps its intermediates, then for each ``hvp_fn(v)`` about 1.5 gradients and no evaluation
        of ``f``. The modes over forward keep no intermediates: there each product costs as much as ``hvp``.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> value, grad, hvp_fn = curvature.linearize_grad(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0]))
        >>> value, grad, hvp_fn(jnp.array([1.0, 1.0]))
        (Array(9., dtype=float32), Array([ 3., 12.], dtype=float32), Array([ 6., 12.], dtype=float32))
    """
    program, composition = _prepare(f, x, args, mode, has_aux)
    value, grad, hvp_fn, aux = linearize_program(program, composition)

    @calling("hvp_fn")
    def checked_hvp(v: Tree) -> Tree:
        return hvp_fn(_checks.check_direction("v", v, "x", program.x))

    return (value, grad, checked_hvp, aux) if has_aux else (value, grad, checked_hvp)


@public
def hessian(
    f: Callable[..., Any],
    argnums: SupportsIndex | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    mode: HessianMode = "auto",
    chunk_size: ChunkSize = "auto",
    blocks: HessianBlocks = None,
    check: bool = False,
) -> Callable[..., Any]:
    """The Hessian ``H[i, j] = d^2 f / dx_i dx_j``: a drop-in for ``jax.hessian`` that is faster and bounded in memory.

    Args:
        f: a function of arrays; a vector-valued function has a Hessian for each output.
        argnums: the positional argument or arguments to differentiate with respect to.
        has_aux: whether ``f`` returns ``(out, aux)``; then the result is ``(hessian, aux)``.
        mode: the composition of modes; see ``hvp``. With ``"auto"`` here and in ``chunk_size``, the Hessian of a
            function whose jaxpr is a sum or mean over the examples of its data is assembled as by ``mean_hessian``, if
            that is faster. Otherwise, on a CPU, the whole Hessian of a scalar function takes reverse over reverse
            first, which is faster for many products and slower for one. It does not if there are convolutions, or if
            the gradient holds an operation that may have an infinite derivative: reverse over reverse could then be
            NaN where forward over reverse, as in ``jax.hessian``, is finite. A ``lax.while_loop`` on the way from ``x``
            has no reverse derivative; there ``"auto"`` is forward over forward. ``explain`` reports the choice.
        chunk_size: how many columns are computed at once; see ``vmap``.
        blocks: ``(rows, columns)`` for only the block of two leaves or sub-trees of ``x``, named by their paths as by
            ``jax.tree_util.keystr(path, simple=True, separator="/")``, such as ``("layers/0/w", "head")``; the empty
            path is all of ``x``. ``"diagonal"`` for the block of each leaf with itself. None for all.
        check: whether to compare the result times a random direction ``v`` with ``jax.jvp(jax.grad(f), (x,), (v,))``,
            which is ``H v`` by JAX alone, and to raise if they differ by more than rounding. Where the call is traced,
            as by ``jax.jit``, both are evaluated while it is traced, at random values of the same shapes; the compiled
            program is the same as without ``check``. A function that branches on values takes no fast path and is not
            compared.

    Returns:
        A function of the arguments of ``f`` that returns what ``jax.hessian(f)`` returns: for each output leaf, a tree
        like ``x`` of trees like ``x``, with blocks of shape ``out.shape + x_i.shape + x_j.shape``. The result is
        symmetric to rounding, not to the last bit. For a block of two sub-trees: a tree like the rows of trees like the
        columns. For the diagonal: a tree like ``x`` with blocks of shape ``out.shape + x_i.shape + x_i.shape``.
        Conventions for custom rules and inside ``jax.shard_map`` are those of ``hvp``, in every mode.

    Raises:
        TypeError, ValueError: as ``jacobian``; ValueError for an unknown path, with a list of the known paths.
        RuntimeError: if ``check`` finds a difference; the message names the block, the rule for each of its leaves, and
            the equations and lines where the leaves enter ``f``.

    Cost: ``f`` is linearized once, then one product of about 1.5 gradients for each of the n entries of ``x``; forward
        over forward takes n^2 second derivatives along two directions instead. Memory:
        the n x n result, the intermediates of one gradient, and the tangents of one chunk. A block takes products for
        its columns alone (its rows in the modes under reverse mode), differentiated back to its rows alone. The
        diagonal takes n products, each back to one leaf, and never holds the n x n matrix. From examples: as
        ``mean_hessian``, for a network 5 to 20 times less. ``check`` takes two more products (for the diagonal, two
        for each leaf) and the absolute values of the result; where the call is traced, also one compilation and
        evaluation of the Hessian.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.hessian(lambda x: x[0] ** 2 * x[1])(jnp.array([3.0, 5.0]))
        Array([[10.,  6.],
               [ 6.,  0.]], dtype=float32)
        >>> x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
        >>> curvature.hessian(lambda x: x["b"] * jnp.sum(x["a"] ** 2), blocks=("a", "b"))(x)
        Array([2., 4.], dtype=float32)
    """
    _checks.check_callable("f", f)
    _checks.check_choice("mode", mode, HessianMode)
    _checks.check_chunk_size(chunk_size)
    _checks.check_blocks(blocks)
    by_examples = mode == "auto" and chunk_size == "auto" and not has_aux

    @later
    def hessian_fn(*args: Any, **kwargs: Any) -> Any:
        fun, x = bind_argnums(f, argnums, has_aux, args, kwargs)
        program = _traced.trace(fun, x)
        _checks.check_floating_output("f", program.out)
        result, aux = evaluate(program)
        if check and program.jaxpr is not None:
            subject = second_derivative(program, lambda program: evaluate(program)[0], result, routes)
            check_hessian(subject, blocks)
        return (result, aux) if has_aux else result

    def evaluate(program: _traced.Program) -> tuple[Any, Any]:
        assembled = hessian_of_examples(program, blocks) if by_examples else None
        return hessian_of(program, mode, chunk_size, blocks) if assembled is None else (assembled, None)

    def routes(program: _traced.Program) -> dict[str, str]:
        return routes_of_examples(program) if by_examples else {}

    return hessian_fn


def _prepare(
    f: Objective, x: Tree, args: tuple[Any, ...], mode: HessianMode, has_aux: bool
) -> tuple[_traced.Program, str]:
    """The objective traced at ``x``, and the composition to differentiate it by."""
    _checks.check_callable("f", f)
    _checks.check_choice("mode", mode, HessianMode)
    program = trace_objective("f", f, _checks.check_point("x", x), args, has_aux)
    return program, _modes.choose_composition(program, mode)


@public
def hessian_diagonal(
    f: Objective,
    x: Tree,
    *args: Any,
    chunk_size: ChunkSize = "auto",
    mode: HessianMode = "auto",
    check: bool = False,
) -> Tree:
    """The diagonal ``d[i] = d^2 f / dx_i^2`` of the Hessian at ``x``, exact, without forming the Hessian.

    Each entry is the second derivative of ``f`` along one basis vector. Two forward derivatives suffice for it: no
    reverse pass, and one number for each direction instead of a column.

    Args:
        f: the objective, ``f(x, *args) -> scalar``.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated.
        chunk_size: how many entries are computed at once; see ``vmap``.
        mode: the composition of modes. ``"auto"`` takes forward over forward if that is legal for ``f``, and otherwise
            the mode that ``hvp`` takes. The other compositions compute a column of a leaf's block for each entry.
        check: whether to compare up to three entries, of different leaves, with those of ``H v`` by forward over
            reverse mode, ``jax.jvp(jax.grad(f), (x,), (v,))``, and to raise if they differ by more than rounding.
            Traced calls are compared as by ``hessian``.

    Returns:
        The diagonal, shaped like ``x``. Inside ``jax.shard_map``, at an ``x`` that the devices share, the Hessian is of
        the sum over the devices, as for ``jax.hessian``.

    Raises:
        TypeError: if ``f`` is not callable or not scalar, if a leaf is not of a real floating dtype, or if no
            composition (or not the requested one) can differentiate ``f``; the message names the primitive and line.
        ValueError: for an unknown mode or a bad ``chunk_size``.
        RuntimeError: if ``check`` finds a difference; the message names the leaf, and the equations and lines where it
            enters ``f``.

    Cost: for each entry of ``x`` one JVP of a JVP: two evaluations of the part of ``f`` that depends on its leaf. One
        evaluation of ``f`` for each chunk. Memory: the intermediates of one chunk of directions. ``check`` takes six
        more products ``H v``, and where the call is traced one more diagonal.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.hessian_diagonal(lambda x: x[0] ** 3 * x[1], jnp.array([1.0, 2.0]))
        Array([12.,  0.], dtype=float32)

    References: Griewank and Walther, Evaluating Derivatives, 2nd ed. (2008), section 13.3 (second derivatives from
        univariate Taylor series), doi:10.1137/1.9780898717761.
    """
    _checks.check_callable("f", f)
    _checks.check_choice("mode", mode, HessianMode)
    _checks.check_chunk_size(chunk_size)
    program = trace_objective("f", f, _checks.check_point("x", x), args)
    result = _diagonal(program, mode, chunk_size)
    if check and program.jaxpr is not None:
        evaluate = functools.partial(_diagonal, mode=mode, chunk_size=chunk_size)
        check_diagonal(second_derivative(program, evaluate, result))
    return result


def _diagonal(program: _traced.Program, mode: HessianMode, chunk_size: ChunkSize) -> Tree:
    """The diagonal of a traced objective, leaf by leaf: equations before the use of a leaf carry no tangents."""
    if mode == "auto" and program.composition_blocker("fwd_over_fwd") is None:
        mode = "fwd_over_fwd"
    composition = _modes.choose_composition(program, mode)
    diagonals = []
    for leaf in leaf_subtrees(program.x):
        x = leaf.take(program.x)
        entries = map_basis(_curvature_along(program, composition, leaf), x, chunk_size)
        diagonals.append(sum_over_devices(entries.astype(x.dtype).reshape(x.shape), x))
    return jax.tree.structure(program.x).unflatten(diagonals)


def _curvature_along(program: _traced.Program, composition: str, leaf: Subtree) -> Callable[[Array], Array]:
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
