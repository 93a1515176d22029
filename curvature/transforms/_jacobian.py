"""Jacobians by forward or reverse mode in bounded memory, and maps over the vectors of a standard basis."""

from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from curvature import _checks, _trees
from curvature._errors import caller, describe, is_static_integer, later, public
from curvature._sharding import place_like, vary_like, varying_axes
from curvature._types import ChunkSize, JacobianMode, Tree
from curvature.programs import _traced
from curvature.transforms import _chunks, _modes
from curvature.transforms._chunks import map_chunks


@public
def jacobian(
    f: Callable[..., Any],
    argnums: SupportsIndex | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    mode: JacobianMode = "auto",
    chunk_size: ChunkSize = "auto",
) -> Callable[..., Any]:
    """The Jacobian ``J[o, i] = d f_o / d x_i``, by the cheaper legal mode.

    A drop-in for ``jax.jacobian``, ``jax.jacfwd`` and ``jax.jacrev``: the same arguments and the same tree of results.

    Args:
        f: a function of arrays, whose outputs are floating arrays.
        argnums: the positional argument or arguments to differentiate with respect to.
        has_aux: whether ``f`` returns ``(out, aux)``; then the result is ``(jacobian, aux)``.
        mode: ``"fwd"`` costs a JVP for each input, ``"rev"`` a VJP for each output. ``"auto"`` takes forward if there
            are no more inputs than outputs (for a function with products of matrices on a CPU, and more than 8 inputs:
            no more than two thirds as many). If only one mode is legal, it takes that mode.
        chunk_size: how many JVPs or VJPs run at once; see ``vmap``.

    Returns:
        A function of the arguments of ``f`` that returns a tree shaped like the output of ``f``, whose leaves are trees
        shaped like ``x`` (a tuple of them for several ``argnums``), with blocks of shape
        ``out_leaf.shape + x_leaf.shape``. Inside ``jax.shard_map`` both modes return the Jacobian of the function of
        one device, as ``jax.jacfwd`` does; ``jax.jacrev`` sums over the devices that share ``x``.

    Raises:
        TypeError: if a leaf of ``x`` or of the output is not of a real floating dtype, or if no mode (or not the
            requested mode) can differentiate ``f``; the message names the primitive and the user's line.
        ValueError: for an unknown mode, a bad ``chunk_size`` or ``argnums``.

    Cost: ``f`` is linearized once, then one product for each input (forward) or output (reverse), in chunks. Memory:
        the Jacobian, the intermediates of one evaluation, and the tangents of one chunk.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.jacobian(lambda x: x**2)(jnp.array([1.0, 3.0]))
        Array([[2., 0.],
               [0., 6.]], dtype=float32)

    References: Griewank and Walther, Evaluating Derivatives, 2nd ed. (2008), sections 3.1 (forward), 3.2 (reverse),
        doi:10.1137/1.9780898717761.
    """
    _checks.check_callable("f", f)
    _checks.check_choice("mode", mode, JacobianMode)
    _checks.check_chunk_size(chunk_size)

    @later
    def jacobian_fn(*args: Any, **kwargs: Any) -> Any:
        fun, x = bind_argnums(f, argnums, has_aux, args, kwargs)
        program = _traced.trace_on_device(fun, x)
        _checks.check_floating_output("f", program.out)
        chosen = _modes.choose_jacobian(program, mode)
        result, (_, aux) = jacobian_of(program.fun, program.x, chosen, chunk_size)
        return (result, aux) if has_aux else result

    return jacobian_fn


def bind_argnums(
    f: Callable[..., Any], argnums: SupportsIndex | Sequence[int], has_aux: bool, args: Any, kwargs: Any
) -> tuple[Callable[[Tree], tuple[Any, Any]], Tree]:
    """``f`` as a function of the tree of the chosen arguments that returns ``(out, aux)``, and that tree."""
    _check_argnums(argnums, len(args))
    many = isinstance(argnums, Sequence)
    positions = [int(i) % len(args) for i in (argnums if isinstance(argnums, Sequence) else (argnums,))]
    points = tuple(_checks.check_point(f"argument {i}", args[i]) for i in positions)

    def fun(x: Tree) -> tuple[Any, Any]:
        full = list(args)
        for position, value in zip(positions, x if many else (x,), strict=True):
            full[position] = value
        return with_aux(f(*full, **kwargs), has_aux)

    return fun, points if many else points[0]


def with_aux(out: Any, has_aux: bool, name: str = "f") -> tuple[Any, Any]:
    """``(out, aux)``; aux is None for a function without aux. Errors say ``name``."""
    _checks.check_arrays(name, out)
    if has_aux:
        _check_aux_output(name, out)
        return out
    return out, None


def jacobian_of(
    fun: Callable[[Tree], tuple[Any, Any]], x: Tree, mode: str, chunk_size: ChunkSize
) -> tuple[Any, tuple[Any, Any]]:
    """The Jacobian of ``fun``, which returns ``(out, aux)``, and ``(out, aux)``."""
    product, basis_of, out, aux = _linear_map(fun, x, mode)
    products = map_basis(product, basis_of, chunk_size)
    if mode == "fwd":
        columns = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, -1), products)
        return jax.tree.map(lambda leaf: _split(leaf, x, -1), columns), (out, aux)
    rows = jax.tree.map(lambda leaf: _split(leaf, out, 0), products)
    return jax.tree.transpose(jax.tree.structure(x), jax.tree.structure(out), rows), (out, aux)


def _linear_map(
    fun: Callable[[Tree], tuple[Any, Any]], x: Tree, mode: str
) -> tuple[Callable[[Tree], Tree], Tree, Any, Any]:
    """The derivative of ``fun`` as a linear map, a tree like the map's argument, and the out and aux of ``fun``."""
    if mode == "fwd":
        out, push, aux = jax.linearize(fun, x, has_aux=True)
        return push, x, out, aux
    out, pull, aux = jax.vjp(fun, x, has_aux=True)
    return lambda v: pull(v)[0], out, out, aux


def auto_chunk_of(fun: Callable[[Tree], tuple[Any, Any]], x: Tree, mode: str) -> int:
    """How many vectors of the basis ``jacobian_of`` takes at once with ``chunk_size="auto"``; evaluates nothing."""
    sizes = []

    def count(x: Tree) -> None:
        product, like, _, _ = _linear_map(fun, x, mode)
        lanes = _trees.num_entries(like)
        chunks = _chunks.num_chunks(lanes, "auto", lambda i: product(_basis_vector(like, i)), lambda: jnp.asarray(0))
        sizes.append(-(-lanes // chunks))

    jax.eval_shape(count, x)
    return sizes[0]


def gradient_of(program: _traced.Program, x: Tree, mode: str) -> tuple[Any, tuple[Any, Any]]:
    """``summed_jacobian_of`` a traced function in one chunk; in reverse mode a scalar function needs one VJP."""
    if mode == "rev" and program.is_scalar:
        return program.reverse.fun(x)
    return summed_jacobian_of(program.fun, x, mode, None)


def summed_jacobian_of(
    fun: Callable[[Tree], tuple[Any, Any]], x: Tree, mode: str, chunk_size: ChunkSize
) -> tuple[Any, tuple[Any, Any]]:
    """``jacobian_of``, summed over the devices of a mesh that share ``x``, as ``jax.grad`` inside ``shard_map``."""
    result, rest = jacobian_of(fun, x, mode, chunk_size)
    return sum_over_devices(result, x), rest


def sum_over_devices(derivatives: Tree, x: Tree) -> Tree:
    """Sum derivatives with respect to a leaf of ``x`` over the devices that share this leaf.

    Reverse mode sums when it transposes the broadcast of ``x`` to the devices; this function sums in forward mode.
    ``derivatives`` is a tree of trees like ``x``.
    """
    leaves, structure = jax.tree.flatten(derivatives)
    points = jax.tree.leaves(x)

    def summed(derivative: Array, point: Array) -> Array:
        axes = tuple(varying_axes(jax.typeof(derivative)) - varying_axes(jax.typeof(point)))
        return jax.lax.psum(derivative, axes) if axes else derivative

    return structure.unflatten([summed(leaf, points[i % len(points)]) for i, leaf in enumerate(leaves)])


def map_basis(product: Callable[[Tree], Tree], like: Tree, chunk_size: ChunkSize) -> Tree:
    """``product`` of every vector of the standard basis of trees shaped like ``like``, along a new leading axis."""
    lanes = _trees.num_entries(like)
    if lanes == 1:  # without vmap, the product has no batch of one
        return jax.tree.map(lambda leaf: leaf[None], product(jax.tree.map(jnp.ones_like, like)))
    return map_chunks(lambda i: product(_basis_vector(like, i)), jnp.arange(lanes), 0, 0, lanes, chunk_size)


def _basis_vector(like: Tree, i: Int[Array, ""]) -> Tree:
    """The tree whose entry ``i`` is one and whose other entries are zero; made inside the map, so never n at once."""
    leaves, structure = jax.tree.flatten(like)
    vectors, start = [], 0
    for leaf in leaves:
        entries = jnp.arange(start, start + leaf.size).reshape(leaf.shape)
        one = vary_like(jnp.ones(leaf.shape, leaf.dtype), [leaf])
        vectors.append(place_like(jnp.where(entries == i, one, jnp.zeros_like(one)), leaf))
        start += leaf.size
    return structure.unflatten(vectors)


def _split(array: Array, like: Tree, axis: int) -> Tree:
    """Cut the axis that holds all entries of ``like`` into its leaves, with their shapes."""
    leaves, structure = jax.tree.flatten(like)
    blocks, start = [], 0
    for leaf in leaves:
        block = jax.lax.slice_in_dim(array, start, start + leaf.size, axis=axis)
        rest = array.shape[1:] if axis == 0 else array.shape[:-1]
        blocks.append(block.reshape(leaf.shape + rest if axis == 0 else rest + leaf.shape))
        start += leaf.size
    return structure.unflatten(blocks)


def _check_aux_output(name: str, out: Any) -> None:
    """Refuse an output that is not a pair (value, aux) although ``has_aux=True``."""
    if not (isinstance(out, tuple) and len(out) == 2):
        raise TypeError(f"{caller()}: has_aux=True, but {name} returns {describe(out)}, expected a pair (value, aux).")


def _check_argnums(argnums: Any, num_args: int) -> None:
    """Refuse ``argnums`` that do not name positional arguments of the call, each once."""
    positions = argnums if isinstance(argnums, tuple | list) else (argnums,)
    if not positions:
        raise ValueError(f"{caller()}: argnums={argnums!r} is empty, expected an integer or a tuple of integers.")
    for position in positions:
        if not is_static_integer(position):
            raise TypeError(f"{caller()}: argnums={argnums!r}, expected an integer or a tuple of integers.")
        if not -num_args <= position < num_args:
            raise ValueError(
                f"{caller()}: argnums={argnums!r} names argument {position}, "
                f"but f was called with {num_args} positional arguments."
            )
    places = [int(position) % num_args for position in positions]
    if len(set(places)) < len(places):
        raise ValueError(
            f"{caller()}: argnums={argnums!r} names an argument twice: among {num_args} positional arguments "
            f"the ones at {places}, expected each position once."
        )
