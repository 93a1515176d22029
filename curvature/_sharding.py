"""Sums over a batch in bounded memory: one chunk of examples after the other, added up as they come."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jaxtyping import Array

from curvature._types import Tree

_CHUNK_BYTES = 32 * 2**20  # what is made for the examples of one chunk may take: ours


def zeros(shape: tuple[int, ...], like: Any) -> Array:
    """Zeros of the dtype of ``like``, which vary over the devices of a mesh over which ``like`` does."""
    varying = tuple(varying_axes(like))
    zero = jnp.zeros(shape or 1, like.dtype).reshape(shape)  # a bare scalar has no mesh inside jit: no reshard of it
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
    return value if isinstance(value, ShapedArray) else jax.typeof(value)


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
