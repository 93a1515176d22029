"""Canonical form of operations that are affine in a parameter: matrix product, convolution, lookup, bias, scale.

Every rule reads its equation ``z = op(a, u)``, of a parameter ``u`` and data ``a``, as

    z[g, s, o] = sum_i a[g, s, i] u[g, i, o]    # g: group, s: position, i: row, o: column

Each axis of ``u`` belongs to the groups, the rows or the columns. The positions s share the parameter: tokens, pixels,
steps of a loop. With ``d`` the cotangent of ``z``, the gradient is ``sum_s a[g, s, i] d[g, s, o]``.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvature.programs._jaxprs import Equation, is_floating, is_real

Axes = tuple[int, ...]
Labels = Sequence[int]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lookup:
    """The input ``a`` of a lookup in a table: one-hot in i, stored as the numbers of the rows.

    Attributes:
        rows: the row that each position selects; -1 for none.
        size: the number of rows.
    """

    rows: Int[Array, "*positions"]
    size: int = field(metadata={"static": True})

    def one_hot(self, dtype: Any) -> Float[Array, "*positions size"]:
        """The input ``a`` as a dense array."""
        return jax.nn.one_hot(self.rows, self.size, dtype=dtype)


class Form(NamedTuple):
    """The canonical form of one use of a parameter.

    Attributes:
        group: the axes of the parameter that are batched over, in the order of g.
        rows: the axes of the parameter that are contracted with the data, in the order of i.
        columns: the axes of the parameter that remain in the output, in the order of o.
        inputs: from the equation's other operands to ``a``, of shape (g, s, i), or a ``Lookup`` of shape (g, s).
        outputs: from a cotangent of the equation's output to ``d``, of shape (g, s, o).
        apply: from ``a`` and the parameter to the equation's output, where that is faster than the equation.
        constant: whether ``a`` is a constant, as for a bias.
    """

    group: Axes
    rows: Axes
    columns: Axes
    inputs: Callable[..., Any]
    outputs: Callable[[Array], Array]
    apply: Callable[[Array, Array], Array] | None = None
    constant: bool = False


def canonical_form(eqn: Equation, operand: int, axes: Sequence[Any]) -> Form | None:
    """The form of an equation in its parameter, or None if no rule applies.

    Args:
        eqn: the equation.
        operand: the number of the input that is the parameter; the other inputs are data.
        axes: for each axis of that input, the axis of the parameter that it is; None if it only repeats.

    Precondition of every rule: one output, and real numbers throughout, except for the integers that index a lookup.
    """
    _, rule = RULES.get(eqn.primitive.name, ("", None))
    if rule is None or len(eqn.outvars) != 1 or not all(map(is_real, (eqn.outvars[0], eqn.invars[operand]))):
        return None
    if any(is_floating(v) and not is_real(v) for v in eqn.invars):
        return None
    return rule(eqn, operand, axes)


def _form(u: Sequence[Any], a: Labels, z: Labels, inputs: Callable[..., Array] = lambda a: a) -> Form:
    """The form of ``z = sum a u`` from labels of the axes of the three arrays, as for ``einsum``.

    An axis of the parameter has its number as label; an axis of ``u`` that only repeats has None. A negative label is a
    position: ``~k`` for axis k of one of the arrays. A label in all three arrays is a group, in ``u`` and ``a`` alone a
    row, in ``u`` and ``z`` alone a column. ``inputs`` maps the equation's other operands to an array with the axes
    ``a``.
    """
    group = sorted({*u} & {*a} & {*z})
    rows, columns = sorted({*u} & {*a} - {*z}), sorted({*u} & {*z} - {*a})
    positions = [label for label in a if label not in u]

    def arrange(array: Array, labels: Labels, last: Labels) -> Array:
        array = jnp.transpose(array, [labels.index(label) for label in (*group, *positions, *last)])
        sizes, cut = array.shape, len(group) + len(positions)
        return array.reshape(math.prod(sizes[: len(group)]), math.prod(sizes[len(group) : cut]), math.prod(sizes[cut:]))

    return Form(
        tuple(group),
        tuple(rows),
        tuple(columns),
        lambda *data: arrange(inputs(*data), a, rows),
        lambda d: arrange(d, z, columns),
    )


def _dot_general(eqn: Equation, operand: int, axes: Sequence[Any]) -> Form | None:
    """A matrix product. Precondition: each axis of the operand is an axis of the parameter."""
    if None in axes:
        return None
    paired = [(*c, *b) for c, b in zip(*eqn.params["dimension_numbers"], strict=True)]
    partners = dict(zip(paired[1 - operand], (axes[k] for k in paired[operand]), strict=True))
    data = [partners.get(k, ~k) for k in range(eqn.invars[1 - operand].aval.ndim)]
    sides = (axes, data) if operand == 0 else (data, axes)
    # The output has the batched axes, then those of the left and of the right operand that are not paired.
    batched = [axes[k] for k in eqn.params["dimension_numbers"][1][operand]]
    free = [label for side, taken in zip(sides, paired, strict=True) for k, label in enumerate(side) if k not in taken]
    return _form(axes, data, [*batched, *free])


def _convolution(eqn: Equation, operand: int, axes: Sequence[Any]) -> Form | None:
    """A convolution as a matrix product with the patches of the image.

    Precondition: the parameter is the kernel, each axis of it is an axis of the parameter, and there are no groups.

    A tapped convolution is also evaluated as this product. Its gradient needs the patches anyway. In a loop over chunks
    XLA's convolutions for CPUs are slow, and products are not.
    """
    params = eqn.params
    if operand != 1 or None in axes or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        return None
    lhs, rhs, out = params["dimension_numbers"]
    (result,) = eqn.outvars
    window = [eqn.invars[1].aval.shape[k] for k in rhs[2:]]
    sizes = [result.aval.shape[k] for k in out[2:]]
    patch = (*rhs[2:], rhs[1])  # window, then input channel: the order of the axes of a patch
    channels_last = (out[0], *out[2:], out[1])

    def inputs(image: Array) -> Array:
        space = zip(params["padding"], params["lhs_dilation"], strict=True)
        padding = [(0, 0, 0), *((low, high, step - 1) for (low, high), step in space), (0, 0, 0)]
        image = jax.lax.pad(jnp.transpose(image, (lhs[0], *lhs[2:], lhs[1])), jnp.zeros((), image.dtype), padding)
        patches = _extract_patches(image, window, sizes, params["window_strides"], params["rhs_dilation"])
        return patches.reshape(*patches.shape[:-1], *window, image.shape[-1])

    def apply(a: Array, kernel: Array) -> Array:
        order = sorted(patch, key=lambda k: axes[k])
        matrix = jnp.transpose(kernel, (*order, rhs[0])).reshape(a.shape[2], -1)
        dtype, precision = params["preferred_element_type"], params["precision"]
        flat = jnp.matmul(a[0], matrix, precision=precision, preferred_element_type=dtype)
        product = flat.reshape(*(result.aval.shape[k] for k in channels_last))
        return jnp.moveaxis(product, range(product.ndim), channels_last).astype(result.aval.dtype)

    labels = [axes[rhs[0]] if k == out[1] else ~k for k in range(result.aval.ndim)]
    a = [*(~k for k in channels_last[:-1]), *(axes[k] for k in patch)]
    return _form(axes, a, labels, inputs)._replace(apply=apply)


def _extract_patches(
    image: Array, window: Sequence[int], sizes: Sequence[int], strides: Sequence[int], dilation: Sequence[int]
) -> Array:
    """``(batch, *space, channel)`` to ``(batch, *sizes, window and channel)``: the inputs of each output position."""

    def shifted(offsets: Sequence[int]) -> Array:
        starts = [0, *(offset * step for offset, step in zip(offsets, dilation, strict=True)), 0]
        steps = [1, *strides, 1]
        spans = [
            image.shape[0] - 1,
            *((size - 1) * s for size, s in zip(sizes, strides, strict=True)),
            image.shape[-1] - 1,
        ]
        limits = [start + span + 1 for start, span in zip(starts, spans, strict=True)]
        return jax.lax.slice(image, starts, limits, steps)

    return jnp.concatenate([shifted(offsets) for offsets in itertools.product(*map(range, window))], axis=-1)


def _gather(eqn: Equation, operand: int, axes: Sequence[Any]) -> Form | None:
    """A lookup of whole rows: ``table[tokens]``.

    Precondition: the parameter is the table, one axis of it is indexed, and slices are whole along all others.
    """
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    table = eqn.invars[0].aval.shape
    if operand != 0 or None in axes or len(numbers.start_index_map) != 1 or numbers.operand_batching_dims:
        return None
    (row,) = numbers.start_index_map
    if numbers.collapsed_slice_dims != (row,) or sizes != (*table[:row], 1, *table[row + 1 :]):
        return None
    columns = iter([axis for k, axis in enumerate(axes) if k != row])
    labels = [next(columns) if k in numbers.offset_dims else ~k for k in range(eqn.outvars[0].aval.ndim)]
    flat = jax.lax.GatherDimensionNumbers((), (0,), (0,))

    def inputs(indices: Array) -> Lookup:
        numbers_of_rows = jnp.arange(table[row], dtype=jnp.int32)
        rows = jax.lax.gather(numbers_of_rows, indices, flat, (1,), mode=eqn.params["mode"], fill_value=-1)
        return Lookup(rows.reshape(1, -1), table[row])

    return _lookup(axes, row, labels, inputs)


def _dynamic_slice(eqn: Equation, operand: int, axes: Sequence[Any]) -> Form | None:
    """A lookup of one row: ``table[token]``.

    Precondition: the parameter is the table, and slices are of one entry along one axis and whole along all others.
    """
    table, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    moved = [k for k, (whole, part) in enumerate(zip(table, sizes, strict=True)) if whole != part]
    if operand != 0 or None in axes or len(moved) != 1 or sizes[moved[0]] != 1:
        return None
    (row,) = moved

    def inputs(*starts: Array) -> Lookup:
        return Lookup(jnp.clip(starts[row].astype(jnp.int32), 0, table[row] - 1).reshape(1, 1), table[row])

    return _lookup(axes, row, [~k if k == row else axis for k, axis in enumerate(axes)], inputs)


def _lookup(axes: Labels, row: int, z: Labels, inputs: Callable[..., Lookup]) -> Form:
    """The form of a lookup of rows, whose input is no array but the numbers of the rows."""
    positions = [label for label in z if label not in axes]
    return _form(axes, [*positions, axes[row]], z)._replace(inputs=inputs)


def _addition(eqn: Equation, operand: int, axes: Sequence[Any], sign: int = 1) -> Form:
    """A bias: the input ``a`` is the constant ``sign``. Precondition: an entrywise sum, with any axes."""
    labels, result = _entrywise_labels(eqn, operand, axes), eqn.outvars[0].aval
    positions = [~k for k, label in enumerate(labels) if label < 0]
    size = math.prod(result.shape[k] for k, label in enumerate(labels) if label < 0)
    form = _form(axes, positions, labels)
    return form._replace(inputs=lambda *_: jnp.full((1, size, 1), sign, result.dtype), constant=True)


def _multiplication(eqn: Equation, operand: int, axes: Sequence[Any]) -> Form:
    """A scale: each entry of the parameter is one group. Precondition: an entrywise product, with any axes."""
    labels = _entrywise_labels(eqn, operand, axes)
    return _form(axes, labels, labels, lambda a: jnp.broadcast_to(a, eqn.outvars[0].aval.shape))


def _entrywise_labels(eqn: Equation, operand: int, axes: Sequence[Any]) -> Labels:
    """The labels of the output's axes: the parameter's axis where the operand has it in full, else a position."""
    sizes, shape = eqn.invars[operand].aval.shape, eqn.outvars[0].aval.shape
    axes = axes if len(sizes) == len(shape) else [None] * len(shape)  # a scalar repeats along every axis
    kept = [axis is not None and sizes[k] == shape[k] for k, axis in enumerate(axes)]
    return [axis if keeps else ~k for k, (axis, keeps) in enumerate(zip(axes, kept, strict=True))]


RULES: dict[str, tuple[str, Callable[[Equation, int, Sequence[int | None]], Form | None]]] = {
    "dot_general": ("matrix product", _dot_general),
    "conv_general_dilated": ("convolution", _convolution),
    "gather": ("lookup", _gather),
    "dynamic_slice": ("lookup", _dynamic_slice),
    "add": ("bias", _addition),
    "add_any": ("bias", _addition),
    "sub": ("bias", lambda eqn, operand, axes: _addition(eqn, operand, axes, sign=1 if operand == 0 else -1)),
    "mul": ("scale", _multiplication),
}
"""For each primitive the kind of operation, in words, and the rule of its canonical form."""
