"""Whether the examples of a batch stay apart, as all that is added up over parts of a batch assumes.

Each question is answered by a trial on three made-up examples (see ``_trials.py``): the function on all of them
against the function on one after the other. What a trial cannot decide - a value that is not finite, a function with
effects - passes. A trial sees what a program does and not what it looks like: examples may meet in a maximum that
cancels, and may not in a division by their number, or in random numbers that are drawn for the batch from one key.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from curvature import _checks
from curvature._types import Tree
from curvature.operators._mixing import find_mixing
from curvature.operators._trials import Values, evaluated, once, point_of, rounding_of, rows_of, traced
from curvature.programs import _traced
from curvature.programs._legality import Blocker
from curvature.transforms._jacobian import gradient_of

_TRIED = 3  # examples: a shift by one or two places moves all, and a mask of one of them leaves more than one

_MIXING = {"reduce_sum", "reduce_max", "reduce_min", "dot_general", "sort", "cumsum", "rev"}
"""Equations that combine examples if the axis of these does not come through; others may only be unknown."""

OutputAxes = tuple[int | None, ...]
"""For each leaf of the outputs its axis of examples; None if the batch has a single example, all of the leaf."""


class OutputRows:
    """The outputs of a batch as one array of rows for each leaf: row b is the leaf for a batch of example b alone.

    Attributes:
        one: the structure of the outputs of a batch of one.
        axes: the axes of examples in the outputs of the whole batch.
    """

    def __init__(self, function: str, whole: Tree, one: Tree, size: int) -> None:
        _checks.check_same_structure(function, "model(batch of one)", one, "model(x)", whole)
        self.one = one
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(one), strict=True)
        self.axes: OutputAxes = tuple(
            None if size == 1 else _checks.check_axis_of_examples(function, leaf.shape, alone.shape, size)
            for leaf, alone in pairs
        )

    def split(self, outputs: Tree) -> Tree:
        """The rows of the outputs."""

        def of_leaf(leaf: Array, axis: int | None) -> Array:
            return leaf[None] if axis is None else jnp.expand_dims(jnp.moveaxis(leaf, axis, 0), axis + 1)

        return self._map(of_leaf, outputs)

    def join(self, rows: Tree) -> Tree:
        """The outputs of these rows."""

        def of_leaf(leaf: Array, axis: int | None) -> Array:
            return leaf[0] if axis is None else jnp.moveaxis(jnp.squeeze(leaf, axis + 1), 0, axis)

        return self._map(of_leaf, rows)

    def structure(self, size: int) -> Tree:
        """The structure of so many rows."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), self.one)

    def _map(self, fun: Callable[[Array, int | None], Array], tree: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten([fun(leaf, axis) for leaf, axis in zip(leaves, self.axes, strict=True)])


def one_by_one(fun: Callable[[tuple[Any, ...]], Any], args: tuple[Any, ...]) -> Any:
    """``fun`` of each example as a batch of one, along a new leading axis."""
    leaves, structure = jax.tree.flatten(args)

    def of_example(row: list[Array]) -> Any:
        rows = iter(row)
        return fun(structure.unflatten([next(rows)[None] if jnp.ndim(leaf) else leaf for leaf in leaves]))

    return jax.lax.map(of_example, [leaf for leaf in leaves if jnp.ndim(leaf)])


# ---- the model -----------------------------------------------------------------------------------------------------


def check_model_apart(
    function: str, model: Callable[..., Any], x: Tree, args: tuple[Any, ...], outputs: OutputRows, size: int
) -> None:
    """Refuse a model whose outputs for an example, or their derivative, depend on others or on how many there are."""
    if size == 1:
        return
    point, batch, few = point_of(x), rows_of(args, size), rows_of(args, _TRIED)

    def verdict() -> Blocker | bool:
        closed = traced(lambda x, args: _in_batch_and_alone(model, outputs, x, args), point, few)
        values = evaluated(closed, point, few)
        if values is not None and _agree(values, rounding_of(closed)):
            return False
        whole = traced(lambda x, args: model(x, *args), point, batch)
        axes = [*[None] * len(jax.tree.leaves(x)), *(0 if leaf.ndim else None for leaf in jax.tree.leaves(batch))]
        named = find_mixing(whole, axes, size, may_sum=False)
        if values is None:  # a sum over devices, for instance: what is known to mix is taken to do so
            return named if named is not None and named.primitive in _MIXING else False
        return named or True

    found = once((model,), (point, batch), verdict)
    if found is not False:
        raise _checks.model_mixes(function, found if isinstance(found, Blocker) else None)


def _in_batch_and_alone(
    model: Callable[..., Any], outputs: OutputRows, x: Tree, args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Outputs and a derivative of them, of the batch and of its examples one by one, which are equal if it is apart."""

    def pushed(args: tuple[Any, ...]) -> tuple[Tree, Tree]:
        return jax.jvp(lambda x: model(x, *args), (x,), (jax.tree.map(_waves, x),))

    program = _traced.trace(lambda x: (model(x, *args), None), x)
    if program.blocker("fwd") is None:
        return tuple(map(outputs.split, pushed(args))), one_by_one(pushed, args)
    whole, alone = outputs.split(model(x, *args)), one_by_one(lambda one: model(x, *one), args)
    if program.blocker("rev") is not None:
        return whole, alone
    w = jax.tree.map(_waves, whole)

    def pulled(one: tuple[Any, ...]) -> Tree:
        w, *args = one
        return jax.vjp(lambda x: model(x, *args), x)[1](jax.tree.map(lambda leaf: leaf[0], w))[0]

    in_batch = jax.vjp(lambda x: outputs.split(model(x, *args)), x)[1](w)[0]
    return (whole, in_batch), (alone, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), one_by_one(pulled, (w, *args))))


def _waves(leaf: Array) -> Array:
    """Numbers of no pattern that a program could share."""
    return jnp.cos(1 + jnp.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)


# ---- the loss ------------------------------------------------------------------------------------------------------


def check_loss_apart(
    function: str, loss: Callable[..., Any], args: tuple[Any, ...], outputs: OutputRows, size: int
) -> None:
    """Refuse a loss whose gradient by the outputs of an example depends on the outputs of another."""
    if size == 1:
        return
    batch = rows_of(args, size)

    def trial(_: Any, rows: Tree, args: tuple[Any, ...]) -> tuple[Any, Any]:
        count = jax.tree.leaves(rows)[0].shape[0]

        def gradient(rows: Tree) -> Tree:
            program = _traced.trace(lambda rows: (loss(outputs.join(rows), *args), None), rows)
            return gradient_of(program, rows, "rev" if program.blocker("rev") is None else "fwd")[0]

        def moved(b: int) -> Tree:
            return jax.tree.map(lambda leaf: leaf.at[b].set(leaf[b] / 2 + jnp.asarray(0.25, leaf.dtype)), rows)

        first = gradient(rows)
        others = [np.delete(np.arange(count), b) for b in range(min(count, _TRIED))]
        before = [jax.tree.map(lambda leaf, o=o: leaf[o], first) for o in others]
        after = [jax.tree.map(lambda leaf, o=o: leaf[o], gradient(moved(b))) for b, o in enumerate(others)]
        return before, after

    def verdict() -> Blocker | bool:
        few = (), outputs.structure(_TRIED), rows_of(args, _TRIED)
        try:
            closed = traced(trial, *few)
        except (TypeError, ValueError, IndexError):  # it has closed over data of the whole batch
            few = (), outputs.structure(size), batch
            closed = traced(trial, *few)
        values = evaluated(closed, *few)
        if values is None or _agree(values, rounding_of(closed)):
            return False
        rows = outputs.structure(size)
        whole = traced(lambda rows, args: loss(outputs.join(rows), *args), rows, batch)
        axes = [*[0] * len(jax.tree.leaves(rows)), *[None] * len(jax.tree.leaves(batch))]
        return find_mixing(whole, axes, size, may_sum=True) or True

    found = once((loss,), (outputs.structure(size), batch), verdict)
    if found is not False:
        raise _checks.loss_mixes(function, found if isinstance(found, Blocker) else None)


def _agree(values: Values, rounding: float) -> bool:
    """Whether the first half of some arrays is the second half, but for roundings; what neither knows counts not."""
    pairs = list(zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True))
    largest = max((float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in values), default=0.0)
    for a, b in pairs:
        known = np.isfinite(a)
        if (known != np.isfinite(b)).any():
            return False
        a, b = a[known], b[known]
        size = max(np.abs(a).max(initial=0), np.abs(b).max(initial=0))
        # Half of the digits of a number may be lost to cancellation, and of a small one all below the largest.
        if np.abs(a - b).max(initial=0) > np.sqrt(rounding) * size + 100 * rounding * largest:
            return False
    return True


# ---- means and sums ------------------------------------------------------------------------------------------------


def check_reduction(
    function: str,
    words: tuple[str, str],
    functions: tuple[Any, ...],
    fun: Callable[..., Any],
    x: Tree,
    args: Any,
    *,
    may_be_neither: bool = False,
) -> None:
    """Refuse data in parts where the value for a batch is not the mean, or the sum, of those of its examples.

    Args:
        function: the public name, for the error.
        words: the name of ``fun`` in the error, and "mean" or "sum", as the user says.
        functions: what ``fun`` is made of, by which its verdict is found again.
        fun: ``fun(x, *args) -> scalar``.
        x: the point.
        args: the data.
        may_be_neither: whether a loss of other weights, such as those of a mask, is right as it is.
    """  # fmt: skip
    if _checks.check_examples(function, "args", args) == 1:
        return
    point, few = point_of(x), rows_of(args, _TRIED)

    def trial(x: Tree, args: tuple[Any, ...]) -> tuple[Any, Any]:
        return fun(x, *args), one_by_one(lambda one: fun(x, *one), args)

    def verdict() -> str | None:
        try:
            closed = traced(trial, point, few)
        except (TypeError, ValueError, IndexError):  # it takes no batch as small as that, and cannot be tried
            return None
        values = evaluated(closed, point, few)
        return None if values is None else _reduction_of(values, rounding_of(closed))

    found = once(functions, (point, few), verdict)
    if found not in (None, words[1]) and not (may_be_neither and found == "neither"):
        raise _checks.wrong_reduction(function, *words, found)


def _reduction_of(values: Values, rounding: float) -> str | None:
    """What the value of a batch is of its values one by one: "mean", "sum", "neither", or None if it may be both."""
    whole, parts = values
    if not np.isfinite(whole):
        return None
    size = np.sqrt(rounding) * max(np.abs(whole), np.abs(parts).max())
    is_mean, is_sum = np.abs(whole - parts.mean()) <= size, np.abs(whole - parts.sum()) <= size
    if is_mean and is_sum:
        return None
    return "mean" if is_mean else "sum" if is_sum else "neither"
