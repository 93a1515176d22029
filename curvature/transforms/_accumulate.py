"""Sums over a batch in bounded memory: one chunk of examples after the other, added up as they come."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature._types import ChunkSize, Tree

_CHUNK_BYTES = 32 * 2**20  # what is made for the examples of one chunk may take: ours


def num_chunks(examples: int, chunk_size: ChunkSize, bytes_each: int, least: int) -> int:
    """Into how many chunks to cut a batch of which each example makes so many bytes; "auto" takes no less at once."""
    if chunk_size is None:
        return 1
    if chunk_size == "auto":
        chunk_size = max(least, _CHUNK_BYTES // max(bytes_each, 1))
    return -(-examples // chunk_size)


def sum_over_chunks(fun: Callable[[Any, Float[Array, " size"]], Tree], batch: Any, chunks: int, dtype: Any) -> Tree:
    """The sum of ``fun(part, weights)`` over equal parts of the batch, in one compiled loop.

    Where the examples do not divide evenly, the last part starts early; its weights are zero for the examples that the
    part before it has counted, and one otherwise.
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


def zeros(shape: tuple[int, ...], like: Any) -> Array:
    """Zeros of the dtype of ``like``, which vary over the devices of a mesh over which ``like`` does."""
    varying = tuple(varying_axes(like))
    zero = jnp.zeros(shape, like.dtype)
    return jax.lax.pcast(zero, varying, to="varying") if varying else zero


def vary_like(tree: Tree, batch: Any) -> Tree:
    """``tree`` made to vary over the devices of a mesh over which the batch does, so that no derivative by it sums."""
    axes = frozenset().union(*(varying_axes(_type_of(leaf)) for leaf in jax.tree.leaves(batch)))

    def varying(leaf: Array) -> Array:
        missing = tuple(axes - varying_axes(jax.typeof(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(varying, tree)


def _type_of(value: Any) -> Any:
    """The type of an array; a type, as of a traced output, is its own."""
    return value if isinstance(value, type(jax.typeof(0.0))) else jax.typeof(value)


def varying_axes(aval: Any) -> frozenset[str]:
    """The axes of the mesh over which a value differs from device to device, inside ``jax.shard_map``."""
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def spec_of(value: Any) -> tuple[Any, ...]:
    """For each axis of an array the axes of an explicit mesh over which it is sharded, which are part of its type."""
    return tuple(getattr(getattr(_type_of(value), "sharding", None), "spec", ()))


def is_sharded(leaf: Any, axis: int) -> bool:
    """Whether an axis is sharded over an explicit mesh, so that JAX does not slice it.

    All entries along such an axis are taken at once: each device holds its share of them.
    """
    return any(axes is not None for axes in spec_of(leaf)[axis : axis + 1])


def place_like(array: Array, like: Any) -> Array:
    """``array`` with the sharding that the type of ``like`` states."""
    spec = spec_of(like)
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec(*spec)) if any(spec) else array


def gathered(leaf: Any, axis: int = 0) -> Any:
    """A leaf whose entries along an axis are on every device, if an explicit mesh had them spread."""
    if not is_sharded(leaf, axis):
        return leaf
    spec = list(spec_of(leaf))
    spec[axis] = None
    return jax.sharding.reshard(leaf, jax.sharding.PartitionSpec(*spec))


def entry(leaf: Any, axis: int = 0) -> Array:
    """The first entry along an axis, of which only the type matters; also along an axis that is sharded."""
    return jax.lax.index_in_dim(gathered(leaf, axis), 0, axis, keepdims=False)
