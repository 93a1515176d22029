"""Sharded data of operators: the sharding of its examples, and means or sums over devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from curvature._sharding import vary_like
from curvature._types import Tree


def sharding_of_examples(args: Any) -> NamedSharding | None:
    """The sharding of the leading axis of ``args``, or None; a tracer has one only on a mesh with explicit axes."""
    for leaf in jax.tree.leaves(args):
        sharding = getattr(leaf, "sharding", None) or jax.typeof(leaf).sharding
        if isinstance(sharding, NamedSharding) and sharding.spec and isinstance(sharding.spec[0], str | tuple):
            return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    return None


def combine_over_devices(
    fun: Callable[[Tree, Any, Any], Tree], combine: Callable[..., Any], sharding: NamedSharding, shared: Tree, args: Any
) -> Tree:
    """The mean or sum over devices of ``fun(shared, args of the device, device index)``, with one all-reduce.

    ``combine`` is ``jax.lax.pmean`` or ``psum``. ``shared`` varies over the devices inside ``fun``: JAX would sum a
    derivative with respect to an unvarying value over the devices at every use of that value.
    """
    axes = sharding.spec[0]
    axes = (axes,) if isinstance(axes, str) else tuple(axes)  # the axes of the mesh that shard the examples

    def on_device(shared: Tree, args: Any) -> Tree:
        return combine(fun(vary_like(shared, args), args, jax.lax.axis_index(axes)), axes)

    examples = jax.tree.map(lambda leaf: sharding.spec if jnp.ndim(leaf) else PartitionSpec(), args)
    return jax.shard_map(
        on_device,
        mesh=sharding.mesh,
        in_specs=(PartitionSpec(), examples),
        out_specs=PartitionSpec(),
        axis_names=set(axes),
    )(shared, args)
