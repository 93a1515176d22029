"""Batch-axis propagation: one rule per primitive for the axis that indexes examples.

A rule takes an equation and, for each operand, the axis of its examples or None. It returns two lists: the axis along
which each operand must be cut into examples, and the axis of the examples in each output. None for an output says that
the examples have been summed over. The rule returns None where the equation mixes the examples, or where it cannot
show that it does not. The rules cover the equations of networks whose weights take one vector for each example: other
programs have nothing to gain.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jax.extend.core import Jaxpr

from curvature.programs._jaxprs import Environment, Equation, equation_function
from curvature.programs._primitives import ENTRYWISE

Axes = Sequence[int | None]
Rule = tuple[Axes, Axes]


def axis_rule(eqn: Equation, axes: Axes, size: int) -> Rule | None:
    """The axes that an equation needs and yields, for a batch of ``size`` examples."""
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
    if name in ENTRYWISE:  # an operand that is a scalar, or that repeats along the axis, is not cut
        return [axis if v.aval.shape[axis : axis + 1] == (size,) else None for v in eqn.invars], [axis]
    rule = _RULES.get(name)
    return None if rule is None else rule(eqn, axis, size)


def _broadcast(eqn: Equation, axes: Axes, size: int) -> Rule | None:
    """Without examples in the operand, a new axis of their size may index them: the output repeats for each example."""
    dims, shape = tuple(map(int, eqn.params["broadcast_dimensions"])), eqn.params["shape"]
    if axes[0] is not None:
        return axes, [dims[axes[0]]]
    operand = eqn.invars[0].aval.shape
    kept = {k for k, length in zip(dims, operand, strict=True) if length != 1}
    new = [k for k, length in enumerate(shape) if length == size and k not in kept]
    return ([None], [new[0]]) if new else None


def _dot_general(eqn: Equation, axes: Axes) -> Rule | None:
    """Precondition: if both operands have examples, the product batches or contracts one axis with the other."""
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
    if other is not None:  # an outer product: every example meets every other one
        return None
    free = [
        [k for k in range(v.aval.ndim) if k not in (*c, *b)]
        for v, c, b in zip(eqn.invars, contracted, batched, strict=True)
    ]
    before = len(batched[0]) + (len(free[0]) if first else 0)
    return axes, [before + free[first].index(axis)]


def _gather(eqn: Equation, axes: Axes) -> Rule | None:
    """A lookup of all examples in one table, of each example in its own row, or of the same columns for all."""
    numbers = eqn.params["dimension_numbers"]
    operand, indices = axes
    fixed = {*numbers.start_index_map, *numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    if operand is not None and operand not in fixed:
        gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
        place = _renumber_axis(gone, operand)
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


def _renumber_axis(gone: Iterable[Any], axis: int) -> int:
    """The number of an axis after the axes in ``gone`` are removed."""
    return axis - len([k for k in gone if k < axis])


# ---- equations whose operands have one batch axis in common ----------------------------------------------------------
# Each rule takes the equation, the axis, and the number of examples.


def _reduce(eqn: Equation, axis: int, size: int) -> Rule | None:
    """Precondition: the axis of the examples is not reduced, unless by a sum, which is a sum over examples."""
    axes = eqn.params["axes"]
    if axis in axes:
        return ([axis], [None]) if eqn.primitive.name == "reduce_sum" else None
    return [axis], [_renumber_axis(axes, axis)]


def _reshape(eqn: Equation, axis: int, size: int) -> Rule | None:
    """Precondition: an axis of the output has the size of the axis of the examples and as many entries before it.

    So both axes count the same blocks of entries. A reshape that also permutes axes is unknown; ``inline`` leaves none.
    """
    if eqn.params["dimensions"] is not None:
        return None
    before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    for k, length in enumerate(after):
        if length == size and math.prod(after[:k]) == math.prod(before[:axis]):
            return [axis], [k]
    return None


def _along(parameter: str) -> Callable[[Equation, int, int], Rule | None]:
    """The rule of an equation that mixes entries along the axes in a parameter, which is one axis or a tuple of them.

    Precondition: the axis of the examples is not among them.
    """

    def rule(eqn: Equation, axis: int, size: int) -> Rule | None:
        worked = eqn.params[parameter]
        mixes = axis in worked if isinstance(worked, tuple) else axis == worked
        return None if mixes else ([axis] * len(eqn.invars), [axis] * len(eqn.outvars))

    return rule


_RULES: dict[str, Callable[[Equation, int, int], Rule | None]] = {
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"),
        _reduce,
    ),
    # No precondition: the axis of the examples moves to one place.
    "transpose": lambda eqn, axis, size: ([axis], [eqn.params["permutation"].index(axis)]),
    # No precondition: only axes of size one go, and there is more than one example.
    "squeeze": lambda eqn, axis, size: ([axis], [_renumber_axis(eqn.params["dimensions"], axis)]),
    "reshape": _reshape,
    # Precondition: all examples are kept.
    "slice": lambda eqn, axis, size: ([axis], [axis]) if eqn.outvars[0].aval.shape[axis] == size else None,
    # Precondition: nothing is added between or around the examples.
    "pad": lambda eqn, axis, size: ([axis, None], [axis]) if eqn.params["padding_config"][axis] == (0, 0, 0) else None,
    "rev": _along("dimensions"),
    "concatenate": _along("dimension"),
    "sort": _along("dimension"),
    "split": _along("axis"),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _along("axis")),
}


# ---- a batch of one ------------------------------------------------------------------------------------------------

_SIZES = {"broadcast_in_dim": "shape", "reshape": "new_sizes", "slice": "limit_indices", "gather": "slice_sizes"}
"""The parameter of an equation that holds the number of examples."""


def on_batch_of_one(jaxpr: Jaxpr, eqn: Equation, axes: Axes, env: Environment) -> list[Any]:
    """The outputs of an equation of ``jaxpr``, with examples along ``axes`` of the outputs, for a batch of one."""
    axis = axes[0]
    if eqn.primitive.name == "gather" and axis is not None:
        axis = _window_axis(eqn, axis)
    if eqn.primitive.name in _SIZES and axis is not None:
        sizes = list(eqn.params[_SIZES[eqn.primitive.name]])
        sizes[axis] = 1
        params = eqn.params | {_SIZES[eqn.primitive.name]: tuple(sizes)}
        # A sharding of the examples over a mesh does not fit one of them.
        eqn = eqn.replace(params=params | {key: None for key in params if key == "sharding"})
    fun, variables = equation_function(jaxpr, eqn)
    return fun(*env.read(variables))


def _window_axis(eqn: Equation, axis: int) -> int | None:
    """The axis of the table of a gather that an axis of the output runs along; None if it runs along the indices."""
    numbers = eqn.params["dimension_numbers"]
    gone = {*numbers.collapsed_slice_dims, *numbers.operand_batching_dims}
    windows = [k for k in range(eqn.invars[0].aval.ndim) if k not in gone]
    return windows[numbers.offset_dims.index(axis)] if axis in numbers.offset_dims else None
