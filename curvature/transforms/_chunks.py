"""``vmap`` in bounded memory, the automatic chunk size, and sums over chunks of a batch."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Var
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Float

from curvature import _checks
from curvature._errors import caller, calling, describe, is_array_like, is_static_integer, later, public
from curvature._sharding import entry, is_sharded, zeros
from curvature._types import ChunkSize, Tree
from curvature.programs._primitives import CONVOLUTION
from curvature.programs._traced import has_primitive

_CHUNK_BYTES = 36 * 2**20
"""Heuristic: the bytes that the operations of a chunk may write on a CPU, where most of them fuse. Chosen with
benchmarks/suites/modes."""

_FEW_CHUNKS = 5
"""Heuristic: up to so many chunks run all at once, because a loop loses more overlap than the cache gives back. Chosen
with benchmarks/suites/modes."""

_CONVOLUTION_BYTES = 2**30
"""Heuristic: the bytes that lanes with convolutions may write all at once. XLA rewrites convolutions for its fast code,
but not in the body of a loop: there they take twice as long, in chunks of any size. Chosen with
benchmarks/suites/modes."""

_LEAST_CHUNK = 8
"""Heuristic: with fewer lanes the matrix products of a chunk are too thin to be fast."""

_MEMORY_SHARE = 8
"""Heuristic: on an accelerator a chunk may take one eighth of the free memory."""

UNMAPPED = object()  # represents the axis None, because None is not a leaf of a tree


def num_chunks(lanes: int, chunk_size: ChunkSize, call: Callable[[Any], Any], one_lane: Callable[[], Any]) -> int:
    """The number of equal chunks for ``lanes`` lanes, where one lane is ``call(one_lane())``."""
    if chunk_size is None or lanes <= 1:
        return 1
    if chunk_size != "auto":
        return math.ceil(lanes / chunk_size)
    if lanes <= _LEAST_CHUNK:
        return 1
    chunks = _auto_chunks(lanes, jax.make_jaxpr(call)(one_lane()).jaxpr)
    even = range(chunks, chunks + chunks // 4 + 1)  # a count that divides the lanes spares a copy of the result
    return next((count for count in even if lanes % count == 0), chunks)


def _auto_chunks(lanes: int, jaxpr: Jaxpr) -> int:
    bytes_of_lane = _bytes_written(jaxpr)
    if jax.default_backend() == "cpu":
        if has_primitive(CONVOLUTION, jaxpr) and lanes * bytes_of_lane <= _CONVOLUTION_BYTES:
            return 1
        chunks = math.ceil(lanes / max(_LEAST_CHUNK, _CHUNK_BYTES // bytes_of_lane))
        return 1 if lanes * bytes_of_lane <= _FEW_CHUNKS * _CHUNK_BYTES else chunks
    memory = jax.local_devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", 8 * 2**30) - memory.get("bytes_in_use", 0)
    return math.ceil(lanes / max(_LEAST_CHUNK, free // _MEMORY_SHARE // bytes_of_lane))


def _bytes_written(jaxpr: Jaxpr) -> int:
    """The bytes that the equations write for one lane; values that depend on no lane's input are shared."""
    of_lane = set(jaxpr.invars)
    written = 1
    for eqn in jaxpr.eqns:
        if any(v in of_lane for v in eqn.invars if isinstance(v, Var)):
            of_lane.update(eqn.outvars)
            outs: list[Any] = [v.aval for v in eqn.outvars]
            written += sum(aval.size * aval.dtype.itemsize for aval in outs if hasattr(aval, "size"))
            written += sum(_bytes_written(body) for body in jex.core.jaxprs_in_params(eqn.params))
    return written


@public
def vmap(f: Callable[..., Any], in_axes: Any = 0, out_axes: Any = 0, *, chunk_size: ChunkSize = "auto") -> Callable:
    """``jax.vmap`` in bounded memory: lanes run in equal chunks, one chunk after the other.

    ``vmap(f)(xs)[i] = f(xs[i])``. The compiled program holds ``f`` once for any number of lanes: where the lanes do not
    divide into equal chunks, the last chunk starts early and overlaps the chunk before.

    Args:
        f: the function of one lane.
        in_axes: as in ``jax.vmap``: an integer, None, or a tree of them that is a prefix of the arguments.
        out_axes: as in ``jax.vmap``.
        chunk_size: how many lanes run at once. ``None`` is ``jax.vmap``. ``"auto"`` on a CPU takes as many lanes as
            write at most 36 MiB, and all lanes if they write at most five times that (with convolutions 1 GiB); on a
            GPU or TPU as many as write an eighth of the free memory; up to a fifth fewer where that divides the lanes
            evenly. Lanes that are sharded over an explicit mesh axis run all at once, each device its share.

    Returns:
        The function of all lanes. Keyword arguments are mapped over their leading axis.

    Raises:
        ValueError: if ``chunk_size`` is not a positive integer, None or "auto", if mapped axes of the arguments differ
            in size or are missing, or if ``in_axes`` is no prefix of the arguments.

    Cost: one evaluation of ``f`` for each lane; memory for the results and for the intermediates of one chunk.
        ``"auto"`` traces ``f`` one more time and compiles nothing more.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.vmap(jnp.dot, in_axes=(0, None), chunk_size=2)(jnp.eye(3), jnp.array([1.0, 2.0, 3.0]))
        Array([1., 2., 3.], dtype=float32)
    """
    _checks.check_callable("f", f)
    _checks.check_chunk_size(chunk_size)
    in_axes = tuple(in_axes) if isinstance(in_axes, list) else in_axes

    def mapped(*args: Any, **kwargs: Any) -> Any:
        @later
        def call(operands: Any) -> Any:
            return f(*operands[0], **operands[1])

        with calling("vmap"):
            lanes = _check_lanes(in_axes, args, kwargs)
            return map_chunks(call, (args, kwargs), (in_axes, 0), out_axes, lanes, chunk_size)

    return mapped


def map_chunks(
    call: Callable[[Any], Any], operands: Any, axes: Any, out_axes: Any, lanes: int, chunk_size: ChunkSize
) -> Any:
    """Map ``call`` over the axes of ``operands``, one chunk at a time; ``axes`` is a prefix of ``operands``."""
    in_axes = check_prefix("in_axes", axes, operands)

    def take(start: Any, size: int) -> Any:
        return _on_mapped(lambda leaf, axis: jax.lax.dynamic_slice_in_dim(leaf, start, size, axis), operands, in_axes)

    def one() -> Any:
        return _on_mapped(entry, operands, in_axes)

    mapped = zip(jax.tree.leaves(operands), jax.tree.leaves(in_axes), strict=True)
    at_once = any(axis is not UNMAPPED and is_sharded(leaf, axis) for leaf, axis in mapped)
    chunks = 1 if at_once else num_chunks(lanes, chunk_size, call, one)
    if chunks == 1:
        return jax.vmap(call, (axes,), out_axes)(operands)
    size = -(-lanes // chunks)
    firsts = jax.tree.map(lambda axis: None if axis is None else 0, out_axes, is_leaf=_is_none)
    stacked = jax.lax.map(lambda start: jax.vmap(call, (axes,), firsts)(take(start, size)), jnp.arange(chunks) * size)
    return _on_mapped(
        lambda leaf, axis: jnp.moveaxis(_join(leaf, lanes), 0, axis),
        stacked,
        check_prefix("out_axes", out_axes, stacked),
        otherwise=lambda leaf: leaf[0],
    )


def _join(stacked: Array, lanes: int) -> Array:
    """``(chunks, size, ...)`` to ``(lanes, ...)``; the last chunk repeats the end of the chunk before it."""
    chunks, size, *shape = stacked.shape
    repeated = chunks * size - lanes
    if not repeated:
        return stacked.reshape(lanes, *shape)
    return jnp.concatenate([stacked[:-1].reshape((chunks - 1) * size, *shape), stacked[-1, repeated:]])


def _on_mapped(
    fun: Callable[[Any, int], Any], tree: Any, axes: Any, otherwise: Callable[[Any], Any] = lambda leaf: leaf
) -> Any:
    """``fun(leaf, axis)`` on the leaves that are mapped, ``otherwise(leaf)`` on the leaves that are not."""
    return jax.tree.map(lambda leaf, axis: otherwise(leaf) if axis is UNMAPPED else fun(leaf, axis), tree, axes)


def num_batch_chunks(examples: int, chunk_size: ChunkSize, bytes_each: int, least: int) -> int:
    """The number of chunks of a batch; an example writes ``bytes_each``, and "auto" takes ``least`` or more at once."""
    if chunk_size is None:
        return 1
    if chunk_size == "auto":
        chunk_size = max(least, _CHUNK_BYTES // max(bytes_each, 1))
    return -(-examples // chunk_size)


def sum_over_chunks(fun: Callable[[Any, Float[Array, " size"]], Tree], batch: Any, chunks: int, dtype: Any) -> Tree:
    """The sum of ``fun(part, weights)`` over equal parts of the batch, in one compiled loop.

    Where the examples do not divide evenly, the last part starts early. Its weights are zero for the examples that the
    part before has counted, and one for the others.
    """
    lanes = jax.tree.leaves(batch)[0].shape[0]
    size = -(-lanes // chunks)
    if size == lanes:
        return fun(batch, jnp.ones(lanes, dtype))

    def part(start: Any) -> Tree:
        first = jnp.minimum(start, lanes - size)
        examples = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, size), batch)
        return fun(examples, (first + jnp.arange(size) >= start).astype(dtype))

    def add(total: Tree, start: Any) -> tuple[Tree, None]:
        return jax.tree.map(jnp.add, total, part(start)), None

    starts = jnp.arange(-(-lanes // size)) * size
    nothing = jax.tree.map(lambda like: zeros(like.shape, like), jax.eval_shape(part, starts[0]))
    return jax.lax.scan(add, nothing, starts)[0]


def _check_lanes(in_axes: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """The number of lanes: the size that the mapped axes share. Keyword arguments map over axis 0."""
    operands = (args, kwargs)
    axes = jax.tree.leaves(check_prefix("in_axes", (in_axes, 0), operands))
    sizes = {}
    for (path, leaf), axis in zip(tree_flatten_with_path(operands)[0], axes, strict=True):
        if axis is UNMAPPED:
            continue
        name = ("args" if path[0].idx == 0 else "kwargs") + keystr(path[1:])
        rank = jnp.ndim(leaf) if is_array_like(leaf) else 0
        if not -rank <= axis < rank:
            raise ValueError(f"{caller()}: {name} has rank {rank}, which has no axis {axis} to map; use in_axes=None.")
        sizes[name] = jnp.shape(leaf)[axis]
    if not sizes:
        raise ValueError(f"{caller()}: no argument has an axis to map, expected at least one that in_axes names.")
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"{caller()}: the mapped axes differ in size: {listed}.")
    return next(iter(sizes.values()))


def check_prefix(name: str, axes: Any, tree: Any) -> Any:
    """The axis of every leaf of ``tree``, ``UNMAPPED`` for None; ``axes`` must be a prefix of ``tree``."""
    for axis in jax.tree.leaves(axes):
        if not is_static_integer(axis):
            raise TypeError(f"{caller()}: {name} holds {describe(axis)}, expected integers and None.")

    def spread(axis: Any, part: Any) -> Any:
        return jax.tree.map(lambda _: UNMAPPED if axis is None else axis, part)

    try:
        return jax.tree.map(spread, axes, tree, is_leaf=_is_none)
    except ValueError as error:
        raise ValueError(f"{caller()}: {name} is not a prefix of the tree it is for: {error}") from None


def _is_none(leaf: Any) -> bool:
    """Whether a node is None; pass it as ``is_leaf``, because JAX takes None for an empty tree."""
    return leaf is None
