"""How the examples of an operator's data lie on the devices of a mesh, and sums over those devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from curvature._sharding import vary_like
from curvature._types import Tree


def sharding_of_examples(args: Any) -> NamedSharding | None:
    """The layout of the leading axis of ``args`` over a mesh, if the arrays show it; under ``jit`` few do."""
    for leaf in jax.tree.leaves(args):
        sharding = getattr(leaf, "sharding", None) or jax.typeof(leaf).sharding  # a tracer has only that of its type
        if isinstance(sharding, NamedSharding) and sharding.spec and isinstance(sharding.spec[0], str | tuple):
            return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    return None


def mesh_axes(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes of the mesh over which the examples are shared out."""
    axes = sharding.spec[0]
    return (axes,) if isinstance(axes, str) else tuple(axes)


def combine_over_devices(
    fun: Callable[[Tree, Any, Any], Tree], combine: Callable[..., Any], sharding: NamedSharding, shared: Tree, args: Any
) -> Tree:
    """``combine``, a mean or a sum over devices, of ``fun(shared, args of the device, its number)``: one all-reduce.

    ``shared`` is made to vary over the devices before ``fun`` sees it: a derivative by what all devices share would
    be summed over them at every use of it.
    """
    axes = mesh_axes(sharding)

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
