"""How a parameter enters an affine operation: the canonical form of a matrix product, a convolution, a lookup, a bias.

Every rule reads its equation ``z = op(a, u)``, of a parameter ``u`` and data ``a``, as

    z[g, s, o] = sum_i a[g, s, i] u[g, i, o]

with the axes of ``u`` dealt out to groups g, rows i and columns o, and positions s that share the parameter: tokens,
pixels, steps of a loop. So with ``d`` the cotangent of ``z`` the gradient is ``sum_s a[g, s, i] d[g, s, o]``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn
from jaxtyping import Array, Float, Int

Axes = tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lookup:
    """Rows picked from a table: the input ``a`` of an embedding, one-hot in i, kept as the numbers of the rows.

    Attributes:
        rows: which row each position picks; -1 for none.
        size: the number of rows.
    """

    rows: Int[Array, "*positions"]
    size: int = field(metadata={"static": True})

    def one_hot(self, dtype: Any) -> Float[Array, "*positions size"]:
        """The same as a dense input."""
        return jax.nn.one_hot(self.rows, self.size, dtype=dtype)


class Form(NamedTuple):
    """The canonical form of one use of a parameter.

    Attributes:
        group: the axes of the parameter that are batched over, in the order of g.
        rows: those contracted with the data, in the order of i.
        columns: those that remain in the output, in the order of o.
        inputs: from the equation's data operand and its output's shape to ``a``, of shape (g, s, i), or a ``Lookup``.
        outputs: from a cotangent of the equation's output to ``d``, of shape (g, s, o).
    """

    group: Axes
    rows: Axes
    columns: Axes
    inputs: Callable[[Any], Any]
    outputs: Callable[[Array], Array]


def canonical_form(eqn: JaxprEqn, operand: int, axes: Sequence[int | None]) -> Form | None:
    """The form of an equation in its parameter, or None if it is not one of those known here.

    Args:
        eqn: the equation.
        operand: which of its inputs is the parameter; another one is data.
        axes: for each axis of that input, the axis of the parameter that it is; None if it only repeats.
    """
    rule = _RULES.get(eqn.primitive.name)
    if rule is None or len(eqn.outvars) != 1:
        return None
    return rule(eqn, operand, axes)


def _dot_general(eqn: JaxprEqn, operand: int, axes: Sequence[int | None]) -> Form | None:
    if None in axes:
        return None
    contracted, batched = eqn.params["dimension_numbers"]
    # Pairs (axis of the parameter, axis of the data), in the order of the parameter's axes.
    rows = sorted((axes[c[operand]], c[1 - operand]) for c in zip(*contracted, strict=True))
    group = [(axes[b[operand]], b[1 - operand], k) for k, b in enumerate(zip(*batched, strict=True))]
    group.sort()
    taken = {*contracted[operand], *batched[operand]}
    columns = [axis for k, axis in enumerate(axes) if k not in taken]
    data_ndim = eqn.invars[1 - operand].aval.ndim
    data_taken = {*contracted[1 - operand], *batched[1 - operand]}
    positions = [k for k in range(data_ndim) if k not in data_taken]
    input_order = [b for _, b, _ in group] + positions + [c for _, c in rows]

    first_column = len(group) + (len(positions) if operand == 1 else 0)  # the output is batch, left free, right free
    first_position = len(group) + (len(columns) if operand == 0 else 0)
    column_order = sorted(range(len(columns)), key=lambda k: columns[k])
    output_order = [
        *(k for _, _, k in group),
        *range(first_position, first_position + len(positions)),
        *(first_column + k for k in column_order),
    ]
    sizes = len(group), len(positions)
    return Form(
        tuple(g for g, _, _ in group),
        tuple(r for r, _ in rows),
        tuple(sorted(columns)),
        lambda a: _three(jnp.transpose(a, input_order), *sizes),
        lambda d: _three(jnp.transpose(d, output_order), *sizes),
    )


def _convolution(eqn: JaxprEqn, operand: int, axes: Sequence[int | None]) -> Form | None:
    params = eqn.params
    if operand != 1 or None in axes or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    lhs, rhs, out = params["dimension_numbers"]
    window = [eqn.invars[1].aval.shape[k] for k in rhs[2:]]
    sizes = [eqn.outvars[0].aval.shape[k] for k in out[2:]]
    rows = [axes[k] for k in rhs[1:]]  # input channel, then window
    row_order = sorted(range(len(rows)), key=lambda k: rows[k])

    def inputs(a: Array) -> Array:
        padding = [(0, 0, 0), (0, 0, 0)]
        space = zip(params["padding"], params["lhs_dilation"], strict=True)
        padding += [(low, high, step - 1) for (low, high), step in space]
        padded = jax.lax.pad(jnp.transpose(a, lhs), jnp.zeros((), a.dtype), padding)
        patches = _patches(padded, window, sizes, params["window_strides"], params["rhs_dilation"])
        first = patches.ndim - len(rows)  # (batch, *sizes, channel, *window)
        return _three(jnp.transpose(patches, [*range(first), *(first + k for k in row_order)]), 0, first)

    return Form(
        (),
        tuple(sorted(rows)),
        (axes[rhs[0]],),
        inputs,
        lambda d: _three(jnp.moveaxis(d, (out[0], *out[2:], out[1]), range(d.ndim)), 0, d.ndim - 1),
    )


def _patches(
    images: Array, window: Sequence[int], sizes: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Array:
    """``(batch, channel, *space)`` to ``(batch, *sizes, channel, *window)``: what each output position sees.

    One strided slice for each axis and offset: on a CPU several times as fast as a convolution with the identity.
    """
    batch, channels = images.shape[:2]
    patches = images
    for k, (width, size, stride, step) in enumerate(zip(window, sizes, strides, dilation, strict=True)):
        axis = 2 + k
        starts = [offset * step for offset in range(width)]
        slices = [
            jax.lax.slice_in_dim(patches, start, start + (size - 1) * stride + 1, stride, axis) for start in starts
        ]
        patches = jnp.stack(slices, axis=-1)
    order = [0, *range(2, 2 + len(sizes)), 1, *range(2 + len(sizes), patches.ndim)]
    return jnp.transpose(patches, order).reshape(batch, *sizes, channels, *window)


def _gather(eqn: JaxprEqn, operand: int, axes: Sequence[int | None]) -> Form | None:
    """A lookup of whole rows: ``table[tokens]``."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table = eqn.invars[0].aval.shape
    if operand != 0 or None in axes or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (row,) = numbers.start_index_map
    if numbers.collapsed_slice_dims != (row,) or sizes != (*table[:row], 1, *table[row + 1 :]):
        return None
    positions = [k for k in range(eqn.outvars[0].aval.ndim) if k not in numbers.offset_dims]
    flat = jax.lax.GatherDimensionNumbers((), (0,), (0,))

    def inputs(indices: Array) -> Lookup:
        dtype = jnp.int32
        rows = jax.lax.gather(
            jnp.arange(table[row], dtype=dtype), indices, flat, (1,), mode=eqn.params["mode"], fill_value=-1
        )
        return Lookup(rows.reshape(1, -1), table[row])

    return _lookup(axes, row, inputs, [*positions, *numbers.offset_dims], len(positions))


def _dynamic_slice(eqn: JaxprEqn, operand: int, axes: Sequence[int | None]) -> Form | None:
    """A lookup of one row: ``table[token]``."""
    table, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    moved = [k for k, (whole, part) in enumerate(zip(table, sizes, strict=True)) if whole != part]
    if operand != 0 or None in axes or len(moved) != 1 or sizes[moved[0]] != 1:
        return None
    (row,) = moved

    def inputs(*starts: Array) -> Lookup:
        return Lookup(jnp.clip(starts[row].astype(jnp.int32), 0, table[row] - 1).reshape(1, 1), table[row])

    order = [row, *(k for k in range(len(table)) if k != row)]
    return _lookup(axes, row, inputs, order, 1)


def _lookup(axes: Sequence[Any], row: int, inputs: Callable[..., Lookup], order: list[int], positions: int) -> Form:
    """The form of a lookup whose output, transposed by ``order``, is positions and then the table's other axes."""
    columns = [axis for k, axis in enumerate(axes) if k != row]
    column_order = sorted(range(len(columns)), key=lambda k: columns[k])
    order = order[:positions] + [order[positions + k] for k in column_order]
    return Form(
        (),
        (axes[row],),
        tuple(sorted(columns)),
        inputs,
        lambda d: _three(jnp.transpose(d, order), 0, positions),
    )


def _addition(eqn: JaxprEqn, operand: int, axes: Sequence[int | None], sign: int = 1) -> Form:
    """A bias: the constant input one."""
    columns, order, positions = _broadcast(eqn, axes)
    dtype, size = eqn.outvars[0].aval.dtype, math.prod(eqn.outvars[0].aval.shape[k] for k in order[:positions])
    return Form(
        (),
        (),
        columns,
        lambda *_: jnp.full((1, size, 1), sign, dtype),
        lambda d: _three(jnp.transpose(d, order), 0, positions),
    )


def _subtraction(eqn: JaxprEqn, operand: int, axes: Sequence[int | None]) -> Form:
    return _addition(eqn, operand, axes, sign=1 if operand == 0 else -1)


def _multiplication(eqn: JaxprEqn, operand: int, axes: Sequence[int | None]) -> Form:
    """A scale: every entry of the parameter is a group of its own."""
    group, order, positions = _broadcast(eqn, axes)
    shape = eqn.outvars[0].aval.shape
    order = order[positions:] + order[:positions]

    def grouped(array: Array) -> Array:
        return _three(jnp.transpose(jnp.broadcast_to(array, shape), order), len(order) - positions, positions)

    return Form(group, (), (), grouped, grouped)


def _broadcast(eqn: JaxprEqn, axes: Sequence[int | None]) -> tuple[Axes, list[int], int]:
    """For an elementwise equation: the parameter's axes in order, the order of its output's axes, how many repeat."""
    ndim = eqn.outvars[0].aval.ndim
    axes = axes if len(axes) == ndim else [None] * ndim  # a scalar goes with everything
    positions = [k for k, axis in enumerate(axes) if axis is None]
    rest = sorted((axis, k) for k, axis in enumerate(axes) if axis is not None)
    return tuple(axis for axis, _ in rest), [*positions, *(k for _, k in rest)], len(positions)


def _three(array: Array, groups: int, positions: int) -> Array:
    """The axes of groups, of positions and the others, each as one."""
    shape = array.shape
    cut = groups + positions
    return array.reshape(math.prod(shape[:groups]), math.prod(shape[groups:cut]), math.prod(shape[cut:]))


_RULES: dict[str, Callable[[JaxprEqn, int, Sequence[int | None]], Form | None]] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
    "dynamic_slice": _dynamic_slice,
    "add": _addition,
    "add_any": _addition,
    "sub": _subtraction,
    "mul": _multiplication,
}
