"""Rearrangements of a parameter: views (each entry exactly once, in another order and shape), and moved axes."""

import math
from typing import NamedTuple

import jax
from jaxtyping import Array

from curvature._sharding import zeros
from curvature.programs._jaxprs import Equation, is_real
from curvature.programs._primitives import COPIES

_OPERATIONS = {"reshape": jax.lax.reshape, "transpose": jax.lax.transpose, "rev": jax.lax.rev}


class View(NamedTuple):
    """A rearrangement of the entries of a leaf, stored as the operations in the jaxpr.

    The view is this linear map, and JAX transposes it: nothing is concluded from the order of axes. Each entry of the
    leaf occurs exactly once, so the map is orthogonal: norms are those of the leaf, and the transpose is the inverse.

    Attributes:
        leaf: the number of the leaf.
        shape: the shape of the leaf.
        operations: the name of each operation in ``jax.lax`` and its parameter, in the order of evaluation.
    """

    leaf: int
    shape: tuple[int, ...]
    operations: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def apply(self, leaf: Array) -> Array:
        """Rearrange an array shaped like the leaf into the shape of the view."""
        for name, parameter in self.operations:
            leaf = _OPERATIONS[name](leaf, parameter)
        return leaf

    def transpose(self, array: Array) -> Array:
        """Rearrange an array shaped like the view into the shape of the leaf."""
        nothing = zeros(self.shape, jax.typeof(array))  # varies over the devices of a mesh as the array does
        return jax.vjp(self.apply, nothing)[1](array)[0]

    def extended(self, eqn: Equation) -> "View | None":
        """The view after an equation with this view as operand; None if the output is no rearrangement of it.

        Precondition: one real operand and one real output with the same number of entries, by an operation that only
        moves entries. A reshape that also permutes axes is unknown here: ``inline`` leaves none.
        """
        (operand, *others), (out, *more) = eqn.invars, eqn.outvars
        if others or more or not is_real(operand) or not is_real(out) or operand.aval.size != out.aval.size:
            return None
        name, params = eqn.primitive.name, eqn.params
        if name in COPIES:
            return self
        if name == "transpose":
            parameter = params["permutation"]
        elif name == "rev":
            parameter = params["dimensions"]
        elif name in ("squeeze", "broadcast_in_dim") or (name == "reshape" and params["dimensions"] is None):
            name, parameter = "reshape", out.aval.shape  # only axes of size one come or go: the entries stay
        else:
            return None
        return self._replace(operations=(*self.operations, (name, tuple(parameter))))


def transpose_block(block: Array, row: View, column: View, rank: int) -> Array:
    """Rearrange a block from the axes of two views to the axes of their leaves.

    The first ``rank`` axes of the block are those of ``row``, the others those of ``column``.
    """
    shape = block.shape[:rank]
    by_row = jax.vmap(column.transpose)(block.reshape(math.prod(shape), *block.shape[rank:]))
    by_column = by_row.reshape(*shape, math.prod(column.shape))
    return jax.vmap(row.transpose, -1, -1)(by_column).reshape(*row.shape, *column.shape)


def moved_axes(eqn: Equation, axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    """The axes of an output whose entries are moved or repeated along whole axes; None for any other equation.

    Precondition: one real operand and one real output, and each axis of the output is one of the operand or repeats.

    Args:
        eqn: the equation.
        axes: a label for each axis of the operand; None for an axis that only repeats.
    """
    name, params, (out, *others) = eqn.primitive.name, eqn.params, eqn.outvars
    operand = eqn.invars[0]
    if others or len(eqn.invars) != 1 or not is_real(operand) or not is_real(out):
        return None
    if name in COPIES:
        return axes
    if name == "transpose":
        return tuple(axes[k] for k in params["permutation"])
    if name == "squeeze":
        return tuple(axis for k, axis in enumerate(axes) if k not in params["dimensions"])
    if name == "broadcast_in_dim":
        result: list[int | None] = [None] * out.aval.ndim
        for axis, k, size in zip(axes, params["broadcast_dimensions"], operand.aval.shape, strict=True):
            result[k] = axis if size == out.aval.shape[k] else None
        return tuple(result)
    if name == "reshape" and params["dimensions"] is None:  # only axes of size one come or go
        kept = iter([axis for axis, size in zip(axes, operand.aval.shape, strict=True) if size != 1])
        sizes = [size for size in operand.aval.shape if size != 1]
        if sizes == [size for size in out.aval.shape if size != 1]:
            return tuple(None if size == 1 else next(kept) for size in out.aval.shape)
    return None
