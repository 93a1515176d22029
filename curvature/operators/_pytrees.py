"""Registration of operators as pytrees: data fields are children, static fields are part of the treedef."""

import dataclasses
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from curvature._types import Tree

Class = TypeVar("Class", bound=type)


def static(**options: Any) -> Any:
    """A field that is part of the treedef of an operator: a new value retraces."""
    return dataclasses.field(metadata={"static": True}, **options)


@dataclass_transform(frozen_default=True, eq_default=False, field_specifiers=(static,))
def register_operator(cls: Class) -> Class:
    """Make a class a frozen dataclass and register it as a pytree; its children are the fields that are not ``static``.

    Unlike ``jax.tree_util.register_dataclass``, unflattening does not call ``__init__``, whose arguments may differ
    from the fields and whose checks would fail on tracers.
    """
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    data = [field.name for field in fields if not field.metadata.get("static", False)]
    meta = [field.name for field in fields if field.metadata.get("static", False)]

    def flatten_with_keys(op: Any) -> tuple[list[Any], tuple[Any, ...]]:
        children = [(jax.tree_util.GetAttrKey(name), getattr(op, name)) for name in data]
        return children, tuple(getattr(op, name) for name in meta)

    def unflatten(aux: tuple[Any, ...], children: Any) -> Any:
        return _with_fields(cls, **dict(zip([*data, *meta], [*children, *aux], strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten)
    return cls


def _with_fields(cls: Any, **fields: Any) -> Any:
    op = object.__new__(cls)
    set_fields(op, **fields)
    return op


def replace(op: Any, **changes: Any) -> Any:
    """A copy of an operator with some fields changed, as ``dataclasses.replace`` but without calling ``__init__``."""
    return _with_fields(type(op), **{field.name: getattr(op, field.name) for field in dataclasses.fields(op)} | changes)


def set_fields(op: Any, **fields: Any) -> None:
    """Set fields of a frozen operator; for use in ``__init__``."""
    for name, value in fields.items():
        object.__setattr__(op, name, value)


def zeros(structure: Tree) -> Tree:
    """A tree of zeros with the shapes and dtypes of a structure."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), structure)


def structure_of(tree: Tree) -> Tree:
    """The tree of ``jax.ShapeDtypeStruct`` of a tree of arrays."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)
