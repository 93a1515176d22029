"""Sharding of arrays: the mesh axes over which a value varies or is sharded, and conversions between them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import AbstractValue
from jaxtyping import Array

from curvature._types import Tree


def zeros(shape: tuple[int, ...], like: Any) -> Array:
    """Zeros of the dtype of ``like``, which vary over the devices of a mesh as ``like`` does."""
    varying = tuple(varying_axes(like))
    zero = jnp.zeros(shape or 1, like.dtype).reshape(shape)  # inside jit a scalar has no mesh to be resharded
    return jax.lax.pcast(zero, varying, to="varying") if varying else zero


def vary_like(tree: Tree, batch: Any) -> Tree:
    """Make ``tree`` vary over the devices of a mesh as the batch does, so that its derivatives are not summed."""
    axes = frozenset().union(*(varying_axes(_type_of(leaf)) for leaf in jax.tree.leaves(batch)))

    def varying(leaf: Array) -> Array:
        missing = tuple(axes - varying_axes(jax.typeof(leaf)))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(varying, tree)


def _type_of(value: Any) -> Any:
    """The type of an array; a value that is a type already, as of a traced output, is returned."""
    return value if isinstance(value, AbstractValue) else jax.typeof(value)


def varying_axes(aval: Any) -> frozenset[str]:
    """The axes of the mesh over which a value varies from device to device, inside ``jax.shard_map``."""
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset() if kind is None else kind.varying


def spec_of(value: Any) -> tuple[Any, ...]:
    """For each axis of an array, the axes of an explicit mesh over which its type says that it is sharded."""
    return tuple(getattr(getattr(_type_of(value), "sharding", None), "spec", ()))


def is_sharded(leaf: Any, axis: int) -> bool:
    """Whether an axis is sharded over an explicit mesh, so that JAX refuses to slice it.

    All entries along a sharded axis are processed at once: each device holds its share of them.
    """
    return any(axes is not None for axes in spec_of(leaf)[axis : axis + 1])


def place_like(array: Array, like: Any) -> Array:
    """``array`` with the sharding that the type of ``like`` states."""
    spec = spec_of(like)
    return jax.sharding.reshard(array, jax.sharding.PartitionSpec(*spec)) if any(spec) else array


def gathered(leaf: Any, axis: int = 0) -> Any:
    """The leaf with all entries along an axis on every device; an explicit mesh may have sharded them."""
    if not is_sharded(leaf, axis):
        return leaf
    spec = list(spec_of(leaf))
    spec[axis] = None
    return jax.sharding.reshard(leaf, jax.sharding.PartitionSpec(*spec))


def entry(leaf: Any, axis: int = 0) -> Array:
    """The first entry along an axis, whose type is that of all entries; also along a sharded axis."""
    return jax.lax.index_in_dim(gathered(leaf, axis), 0, axis, keepdims=False)
