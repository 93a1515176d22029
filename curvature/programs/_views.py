"""Views of a parameter: the entries of one leaf, each exactly once, in another order and shape."""

import math
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from curvature._sharding import zeros
from curvature.programs._jaxprs import Equation, is_real

_OPERATIONS = {"reshape": jax.lax.reshape, "transpose": jax.lax.transpose, "rev": jax.lax.rev}


class View(NamedTuple):
    """A rearrangement of the entries of a leaf, as the operations that the jaxpr states.

    The view is kept as this linear map, and its transpose is made by JAX. Nothing is concluded from the order of axes.
    Each entry of the leaf occurs exactly once, so the map is orthogonal: norms are those of the leaf, and the transpose
    is the inverse.

    Attributes:
        leaf: the number of the leaf.
        shape: the shape of the leaf.
        operations: the name of each operation in ``jax.lax`` and its parameter, in the order of evaluation.
    """

    leaf: int
    shape: tuple[int, ...]
    operations: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def apply(self, leaf: Array) -> Array:
        """An array shaped like the leaf, rearranged as the view is."""
        for name, parameter in self.operations:
            leaf = _OPERATIONS[name](leaf, parameter)
        return leaf

    def transpose(self, array: Array) -> Array:
        """An array shaped like the view, rearranged as the leaf is."""
        nothing = zeros(self.shape, jax.typeof(array))  # which varies over the devices of a mesh as the array does
        return jax.vjp(self.apply, nothing)[1](array)[0]

    def extended(self, eqn: Equation) -> "View | None":
        """The view that an equation makes of this one, or None if its output is no rearrangement of its operand.

        Precondition: one real operand and one real output with the same number of entries, by an operation that only
        moves entries. A reshape that also permutes axes is unknown here: ``inline`` has made it two equations.
        """
        (operand, *others), (out, *more) = eqn.invars, eqn.outvars
        if others or more or not is_real(operand) or not is_real(out) or operand.aval.size != out.aval.size:
            return None
        name, params = eqn.primitive.name, eqn.params
        if name in ("copy", "copy_p", "convert_element_type"):
            return self
        if name == "transpose":
            return self._then("transpose", params["permutation"])
        if name == "rev":
            return self._then("rev", params["dimensions"])
        adds_axes = name in ("squeeze", "broadcast_in_dim")  # of size one, as the number of entries stays
        if adds_axes or (name == "reshape" and params["dimensions"] is None):
            return self._then("reshape", out.aval.shape)
        return None

    def _then(self, name: str, parameter: Any) -> "View":
        return self._replace(operations=(*self.operations, (name, tuple(parameter))))


def transpose_block(block: Array, row: View, column: View, rank: int) -> Array:
    """A block with the axes of two views, the first ``rank`` those of ``row``, as one with the axes of their leaves."""
    shape = block.shape[:rank]
    by_row = jax.vmap(column.transpose)(block.reshape(math.prod(shape), *block.shape[rank:]))
    by_column = by_row.reshape(*shape, math.prod(column.shape))
    return jax.vmap(row.transpose, -1, -1)(by_column).reshape(*row.shape, *column.shape)
