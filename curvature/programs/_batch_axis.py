"""Which axis of an equation's output holds the examples, when one axis of each operand does.

A rule takes an equation and, for each operand, the axis of its examples or None, and says which axis each operand must
be cut along and which axis of each output comes of it; None in the place of an output says that the examples have been
summed over. It returns None itself where the examples do not stay apart, or where it does not know. The equations
known are those of networks whose weights take one vector for each example: others have nothing to gain.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.extend.core import Jaxpr
from jaxtyping import Array

from curvature.programs._jaxprs import Environment, Equation, equation_function
from curvature.programs._pushforward import BY_ENTRY

Axes = Sequence[int | None]
Rule = tuple[Axes, Axes]


def axis_rule(eqn: Equation, axes: Axes, size: int) -> Rule | None:
    """The axes that an equation needs and yields, for examples of which there are ``size``."""
    name = eqn.primitive.name
    if name == "broadcast_in_dim":
        return _broadcast(eqn, axes, size)
    known = {axis for axis in axes if axis is not None}
    if not known:
        return None
    if name == "dot_general":
        return _dot_general(eqn, axes)
    if name == "gather":
        return _gather(eqn, axes)
    if len(known) > 1:
        return None
    (axis,) = known
    if name in BY_ENTRY:
        # An operand that is a scalar, or that repeats along the axis, is taken whole.
        return [axis if v.aval.shape[axis : axis + 1] == (size,) else None for v in eqn.invars], [axis]
    rule = _ALONG_ONE_AXIS.get(name)
    return None if rule is None else rule(eqn, axis, size)


def _broadcast(eqn: Equation, axes: Axes, size: int) -> Rule | None:
    """Of an operand without examples: a new axis of their size may be theirs, for each of which it is the same."""
    dims, shape = tuple(map(int, eqn.params["broadcast_dimensions"])), eqn.params["shape"]
    if axes[0] is not None:
        return axes, [dims[axes[0]]]
    operand = eqn.invars[0].aval.shape
    kept = {k for k, length in zip(dims, operand, strict=True) if length != 1}
    new = [k for k, length in enumerate(shape) if length == size and k not in kept]
    return ([None], [new[0]]) if new else None


def _dot_general(eqn: Equation, axes: Axes) -> Rule | None:
    """Precondition: the examples of one operand meet those of the other as a batch or a contraction, or not at all."""
    contracted, batched = eqn.params["dimension_numbers"]
    first = 0 if axes[0] is not None else 1
    axis, other = axes[first], axes[1 - first]
    assert axis is not None
    for pairs, summed in ((batched, False), (contracted, True)):
        if axis in pairs[first]:
            place = list(pairs[first]).index(axis)
            partner = pairs[1 - first][place]
            if other not in (None, partner):
                return None
            needs = [axis, partner] if first == 0 else [partner, axis]
            return needs, [None if summed else place]
    if other is not None:  # each example with each other one
        return None
    free = [
        [k for k in range(v.aval.ndim) if k not in (*c, *b)]
        for v, c, b in zip(eqn.invars, contracted, batched, strict=True)
    ]
    before = len(batched[0]) + (len(free[0]) if first else 0)
    return axes, [before + free[first].index(axis)]


def _gather(eqn: Equation, axes: Axes) -> Rule | None:
    """A lookup: of all examples in one table, of each in its own row, or of columns that are the same for all."""
    numbers = eqn.params["dimension_numbers"]
    operand, indices = axes
    fixed = {*numbers.start_index_map, *numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    if operand is not None and operand not in fixed:
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        place = _without(gone, operand)
        whole = indices is None and eqn.params["slice_sizes"][operand] == eqn.invars[0].aval.shape[operand]
        return (axes, [numbers.offset_dims[place]]) if whole else None
    positions = [k for k in range(eqn.outvars[0].aval.ndim) if k not in numbers.offset_dims]
    pairs = list(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
    if indices is None:
        indices = dict(pairs).get(operand)
    if indices is None or indices == eqn.invars[1].aval.ndim - 1:
        return None
    of_operand = {k: n for n, k in pairs}.get(indices)
    if operand not in (None, of_operand):
        return None
    return [of_operand, indices], [positions[indices]]


def _without(gone: Iterable[Any], axis: int) -> int:
    """What an axis becomes when others are gone."""
    return axis - len([k for k in gone if k < axis])


# ---- equations of operands that have one axis in common ------------------------------------------------------------


def _reduce_sum(eqn: Equation, axis: int, size: int) -> Rule:
    """No precondition: a sum over the axis of the examples is a sum over examples."""
    axes = eqn.params["axes"]
    return [axis], [None if axis in axes else _without(axes, axis)]


def _reduce(eqn: Equation, axis: int, size: int) -> Rule | None:
    """Precondition: the axis of the examples is not reduced."""
    axes = eqn.params["axes"]
    return None if axis in axes else ([axis], [_without(axes, axis)])


def _transpose(eqn: Equation, axis: int, size: int) -> Rule:
    """No precondition: the axis of the examples moves to one place."""
    return [axis], [eqn.params["permutation"].index(axis)]


def _squeeze(eqn: Equation, axis: int, size: int) -> Rule:
    """No precondition: only axes of size one go, and there is more than one example."""
    return [axis], [_without(eqn.params["dimensions"], axis)]


def _reshape(eqn: Equation, axis: int, size: int) -> Rule | None:
    """Precondition: an axis of that size has as many entries before it as the axis of the examples had.

    So both count the same blocks of entries. A reshape that also permutes axes is not known; ``inline`` leaves none.
    """
    if eqn.params["dimensions"] is not None:
        return None
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    for k, length in enumerate(after):
        if length == size and math.prod(after[:k]) == math.prod(before[:axis]):
            return [axis], [k]
    return None


def _slice(eqn: Equation, axis: int, size: int) -> Rule | None:
    """Precondition: all examples are kept."""
    whole = eqn.outvars[0].aval.shape[axis] == size
    return ([axis], [axis]) if whole else None


def _pad(eqn: Equation, axis: int, size: int) -> Rule | None:
    """Precondition: nothing is added between or around the examples."""
    whole = eqn.params["padding_config"][axis] == (0, 0, 0)
    return ([axis, None], [axis]) if whole else None


def _along(parameter: str) -> Callable[[Equation, int, int], Rule | None]:
    """The rule of an equation that works along other axes, of which the parameter is one or a tuple."""

    def rule(eqn: Equation, axis: int, size: int) -> Rule | None:
        worked = eqn.params[parameter]
        mixes = axis in worked if isinstance(worked, tuple) else axis == worked
        return None if mixes else ([axis] * len(eqn.invars), [axis] * len(eqn.outvars))

    return rule


_ALONG_ONE_AXIS: dict[str, Callable[[Equation, int, int], Rule | None]] = {
    "reduce_sum": _reduce_sum,
    **dict.fromkeys(
        ("reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"), _reduce
    ),
    "transpose": _transpose,
    "squeeze": _squeeze,
    "reshape": _reshape,
    "slice": _slice,
    "pad": _pad,
    "rev": _along("dimensions"),
    "concatenate": _along("dimension"),
    "sort": _along("dimension"),
    "split": _along("axis"),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
}


# ---- a batch of one ------------------------------------------------------------------------------------------------


def on_batch_of_one(jaxpr: Jaxpr, eqn: Equation, axes: Axes, env: Environment) -> list[Any]:
    """What an equation of ``jaxpr`` computes of a batch of one; its own parameters may hold the number of examples."""
    name, (axis, *_), operands = eqn.primitive.name, axes, env.read(eqn.invars)
    if name == "gather" and axis is not None and axis in eqn.params["dimension_numbers"].offset_dims:
        return [_gather_one(eqn, axis, *operands)]
    if axis is None or name not in ("broadcast_in_dim", "reshape", "slice"):
        fun, variables = equation_function(jaxpr, eqn)
        return fun(*env.read(variables))
    shape = list(eqn.outvars[0].aval.shape)
    shape[axis] = 1
    if name == "broadcast_in_dim":
        return [jax.lax.broadcast_in_dim(operands[0], shape, eqn.params["broadcast_dimensions"])]
    if name == "reshape":
        return [jax.lax.reshape(operands[0], shape)]
    limits = list(eqn.params["limit_indices"])
    limits[axis] = 1
    return [jax.lax.slice(operands[0], eqn.params["start_indices"], limits, eqn.params["strides"])]


def _gather_one(eqn: Equation, axis: int, operand: Array, indices: Array) -> Array:
    """Columns of one row instead of all: the slice is of one along the axis of the examples."""
    params, numbers = eqn.params, eqn.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [k for k in range(operand.ndim) if k not in gone]
    sizes = list(params["slice_sizes"])
    sizes[windows[numbers.offset_dims.index(axis)]] = 1
    hints = {key: params[key] for key in ("unique_indices", "indices_are_sorted", "mode", "fill_value")}
    return jax.lax.gather(operand, indices, numbers, tuple(sizes), **hints)
