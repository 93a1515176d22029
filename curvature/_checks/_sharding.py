"""Input checks of ``sharding=``."""

import math
from typing import Any

import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._checks._describe import describe
from curvature._errors import caller


def check_sharding(sharding: Any, args: Any, batches: Any) -> None:
    """Refuse a sharding along other axes than that of examples, or with unequal numbers of examples per device."""
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"{caller()}: sharding is {describe(sharding)}, expected None or a jax.sharding.NamedSharding, such as "
            'NamedSharding(mesh, PartitionSpec("data")).'
        )
    if batches is not None:
        raise ValueError(
            f"{caller()}: batches= and sharding= were given; place each batch with jax.device_put instead, "
            "and the compiler shares its product out."
        )
    spec = sharding.spec
    if not spec or not isinstance(spec[0], str | tuple) or any(axis is not None for axis in spec[1:]):
        raise ValueError(
            f"{caller()}: sharding has spec {spec}, expected the axes of the mesh along examples alone, such as "
            'PartitionSpec("data").'
        )
    axes = (spec[0],) if isinstance(spec[0], str) else spec[0]
    parts = math.prod(sharding.mesh.shape[axis] for axis in axes)
    for path, leaf in tree_flatten_with_path(args)[0]:
        if jnp.ndim(leaf) and jnp.shape(leaf)[0] % parts:
            raise ValueError(
                f"{caller()}: args{keystr(path)} has {jnp.shape(leaf)[0]} examples, expected a multiple of {parts} to "
                f"share them out evenly over the devices of {spec}; leave some out or add examples of weight zero."
            )
