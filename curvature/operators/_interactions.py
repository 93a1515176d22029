"""Tests that examples of a batch do not interact and that losses are means or sums, by trials on synthetic examples.

A trial evaluates a function on a batch of three synthetic examples (see ``_trials.py``) and on each example alone, and
compares the values. Where a trial cannot decide, because a value is not finite or the function has effects, the
function passes. A trial tests values, not the form of the program: a maximum over examples that cancels passes, and a
division by the number of examples, or random numbers drawn from one key for the batch, do not.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from curvature import _checks
from curvature._compile_cache import cached
from curvature._errors import caller
from curvature._types import Tree
from curvature.operators._likelihoods import loss_gradient
from curvature.operators._mixing import find_mixing
from curvature.operators._pytrees import structure_of
from curvature.operators._trials import Values, evaluate_trial, key_of, rounding_of, trace_trial, with_num_examples
from curvature.programs import _traced
from curvature.programs._legality import Blocker

_NUM_TRIED = 3  # examples: a shift by one or two positions moves all, and a mask of one example leaves two

_MIXING = {"reduce_sum", "reduce_max", "reduce_min", "dot_general", "sort", "cumsum", "rev"}
"""Primitives that certainly combine examples if their axis is lost; the batch rule of others may be unknown."""

OutputAxes = tuple[int | None, ...]
"""The axis of examples of each leaf of the outputs; None if the batch has one example, which is all of the leaf."""


class OutputRows:
    """Conversion between the outputs of a batch and rows: row b of a leaf is the leaf for a batch of example b alone.

    Attributes:
        one: the structure of the outputs of a batch of one.
        axes: the axis of examples of each leaf of the outputs of the whole batch.
    """

    def __init__(self, whole: Tree, one: Tree, size: int) -> None:
        _checks.check_same_structure("model(batch of one)", one, "model(x)", whole)
        self.one = one
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(one), strict=True)
        self.axes: OutputAxes = tuple(
            None if size == 1 else _axis_of_examples(leaf.shape, alone.shape, size) for leaf, alone in pairs
        )

    def split(self, outputs: Tree) -> Tree:
        """Outputs to rows."""

        def of_leaf(leaf: Array, axis: int | None) -> Array:
            return leaf[None] if axis is None else jnp.expand_dims(jnp.moveaxis(leaf, axis, 0), axis + 1)

        return self._map(of_leaf, outputs)

    def join(self, rows: Tree) -> Tree:
        """Rows to outputs."""

        def of_leaf(leaf: Array, axis: int | None) -> Array:
            return leaf[0] if axis is None else jnp.moveaxis(jnp.squeeze(leaf, axis + 1), 0, axis)

        return self._map(of_leaf, rows)

    def structure(self, size: int) -> Tree:
        """The structure of ``size`` rows."""
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape), leaf.dtype), self.one)

    def _map(self, fun: Callable[[Array, int | None], Array], tree: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(tree)
        return structure.unflatten([fun(leaf, axis) for leaf, axis in zip(leaves, self.axes, strict=True)])


def _axis_of_examples(whole: tuple[int, ...], alone: tuple[int, ...], size: int) -> int:
    """The axis of examples: the only axis in which outputs of a batch of ``size`` and of a batch of one differ."""
    for axis, length in enumerate(whole):
        if length == size and (*whole[:axis], 1, *whole[axis + 1 :]) == alone:
            return axis
    raise ValueError(
        f"{caller()}: the model returns shape {whole} for {size} examples and {alone} for one, expected shapes that "
        f"differ in one axis of {size} examples; broadcast what all examples share along such an axis."
    )


def map_examples(fun: Callable[[tuple[Any, ...]], Any], args: tuple[Any, ...]) -> Any:
    """``fun`` of each example as a batch of one, stacked along a new leading axis."""
    leaves, structure = jax.tree.flatten(args)

    def of_example(row: list[Array]) -> Any:
        rows = iter(row)
        return fun(structure.unflatten([next(rows)[None] if jnp.ndim(leaf) else leaf for leaf in leaves]))

    return jax.lax.map(of_example, [leaf for leaf in leaves if jnp.ndim(leaf)])


# ---- the model -----------------------------------------------------------------------------------------------------


def check_model_examples(
    model: Callable[..., Any], x: Tree, args: tuple[Any, ...], outputs: OutputRows, size: int
) -> None:
    """Refuse a model whose outputs or derivatives for one example depend on the other examples or on their number."""
    if size == 1:
        return
    point, batch, few = structure_of(x), with_num_examples(args, size), with_num_examples(args, _NUM_TRIED)

    def find_mixing_of_model() -> Blocker | bool:
        closed = trace_trial(lambda x, args: _in_batch_and_alone(model, outputs, x, args), point, few)
        values = evaluate_trial(closed, point, few)
        if values is not None and _agree(values, rounding_of(closed)):
            return False
        whole = trace_trial(lambda x, args: model(x, *args), point, batch)
        axes = [*[None] * len(jax.tree.leaves(x)), *(0 if leaf.ndim else None for leaf in jax.tree.leaves(batch))]
        named = find_mixing(whole, axes, size, may_sum=False)
        if values is None:  # no trial, for instance because of a sum over devices: refuse only what certainly mixes
            return named if named is not None and named.primitive in _MIXING else False
        return named or True

    _refuse_mixing("model", model, (point, batch), find_mixing_of_model)


def _in_batch_and_alone(
    model: Callable[..., Any], outputs: OutputRows, x: Tree, args: tuple[Any, ...]
) -> tuple[Any, Any]:
    """Outputs and a derivative for the batch, and for each example alone; equal if the examples do not interact."""

    def push(args: tuple[Any, ...]) -> tuple[Tree, Tree]:
        return jax.jvp(lambda x: model(x, *args), (x,), (jax.tree.map(_waves, x),))

    program = _traced.trace(lambda x: (model(x, *args), None), x)
    if program.blocker("fwd") is None:
        return tuple(map(outputs.split, push(args))), map_examples(push, args)
    whole, alone = outputs.split(model(x, *args)), map_examples(lambda one: model(x, *one), args)
    if program.blocker("rev") is not None:
        return whole, alone
    w = jax.tree.map(_waves, whole)

    def pull(one: tuple[Any, ...]) -> Tree:
        w, *args = one
        return jax.vjp(lambda x: model(x, *args), x)[1](jax.tree.map(lambda leaf: leaf[0], w))[0]

    in_batch = jax.vjp(lambda x: outputs.split(model(x, *args)), x)[1](w)[0]
    return (whole, in_batch), (alone, jax.tree.map(lambda leaf: jnp.sum(leaf, 0), map_examples(pull, (w, *args))))


def _waves(leaf: Array) -> Any:
    """A tangent or cotangent without a symmetry that could hide an interaction; of NumPy, which compiles nothing."""
    return np.cos(1 + np.arange(leaf.size)).reshape(leaf.shape).astype(leaf.dtype)


_MIXED = {
    "model": "the model mixes the examples of a batch{}: its outputs for an example alone differ from its outputs in "
    "the batch, expected outputs that depend on the data of one example only. Normalize in evaluation mode, "
    "with statistics that are parameters or constants; draw random numbers from a key for each example; or take "
    "GaussNewtonOperator, which never cuts the batch.",
    "loss": "the loss mixes the outputs of different examples{}, expected a weighted sum of one loss "
    "for each example; take GaussNewtonOperator, which never cuts the batch.",
}


def _refuse_mixing(
    what: Literal["model", "loss"], function: Any, structure: Tree, find_mixing_of: Callable[[], Blocker | bool]
) -> None:
    """Raise if the function mixes examples: if the answer is an equation, or True where the equation is not known."""
    found = cached((function,), key_of(what, structure), find_mixing_of)
    if found is not False:
        place = f", at the earliest by {found}" if isinstance(found, Blocker) else ""
        raise ValueError(f"{caller()}: {_MIXED[what].format(place)}")


# ---- the loss ------------------------------------------------------------------------------------------------------


def check_loss_examples(loss: Callable[..., Any], args: tuple[Any, ...], outputs: OutputRows, size: int) -> None:
    """Refuse a loss whose gradient with respect to the outputs of one example depends on the outputs of another."""
    if size == 1:
        return
    rows, batch = outputs.structure(size), with_num_examples(args, size)

    def trial(_: Any, rows: Tree, args: tuple[Any, ...]) -> tuple[Any, Any]:
        """Gradients of all examples but b, before and after the outputs of b change."""
        num_examples = jax.tree.leaves(rows)[0].shape[0]

        def gradient(rows: Tree) -> Tree:
            return loss_gradient(lambda rows, *args: loss(outputs.join(rows), *args), rows, args)

        def moved(b: int) -> Tree:
            return jax.tree.map(lambda leaf: leaf.at[b].set(leaf[b] / 2 + jnp.asarray(0.25, leaf.dtype)), rows)

        first = gradient(rows)
        others = [np.delete(np.arange(num_examples), b) for b in range(min(num_examples, _NUM_TRIED))]
        before = [jax.tree.map(lambda leaf, o=o: leaf[o], first) for o in others]
        after = [jax.tree.map(lambda leaf, o=o: leaf[o], gradient(moved(b))) for b, o in enumerate(others)]
        return before, after

    def find_mixing_of_loss() -> Blocker | bool:
        few = (), outputs.structure(_NUM_TRIED), with_num_examples(args, _NUM_TRIED)
        try:
            closed = trace_trial(trial, *few)
        except (TypeError, ValueError, IndexError):  # the loss has closed over data of the whole batch
            few = (), rows, batch
            closed = trace_trial(trial, *few)
        values = evaluate_trial(closed, *few)
        if values is None or _agree(values, rounding_of(closed)):
            return False
        whole = trace_trial(lambda rows, args: loss(outputs.join(rows), *args), rows, batch)
        axes = [*[0] * len(jax.tree.leaves(rows)), *[None] * len(jax.tree.leaves(batch))]
        return find_mixing(whole, axes, size, may_sum=True) or True

    _refuse_mixing("loss", loss, (rows, batch), find_mixing_of_loss)


def _agree(values: Values, rounding: float) -> bool:
    """Whether the first half of the arrays equals the second half up to rounding, where both are finite."""
    pairs = list(zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True))
    largest = max((float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in values), default=0.0)
    for a, b in pairs:
        known = np.isfinite(a)
        if (known != np.isfinite(b)).any():
            return False
        a, b = a[known], b[known]
        size = max(np.abs(a).max(initial=0), np.abs(b).max(initial=0))
        # Heuristic: half of the digits of an array may be lost to cancellation, and all of its digits below 100
        # roundings of the largest array.
        if np.abs(a - b).max(initial=0) > np.sqrt(rounding) * size + 100 * rounding * largest:
            return False
    return True


# ---- means and sums ------------------------------------------------------------------------------------------------


def check_reduction(
    words: tuple[str, str],
    functions: tuple[Any, ...],
    fun: Callable[..., Any],
    x: Tree,
    args: Any,
    *,
    may_be_neither: bool = False,
) -> None:
    """Refuse a function whose value for a batch is not the mean, or the sum, of its values for the examples.

    Args:
        words: the name of ``fun`` in the error, and the ``reduction`` that the user states.
        functions: the user's functions in ``fun``, the key of the cached result.
        fun: ``fun(x, *args) -> scalar``.
        x: the point.
        args: the data.
        may_be_neither: whether a sum with other weights, such as a mean over a mask, is allowed.
    """  # fmt: skip
    if _checks.check_examples("args", args) == 1:
        return
    point, few = structure_of(x), with_num_examples(args, _NUM_TRIED)

    def trial(x: Tree, args: tuple[Any, ...]) -> tuple[Any, Any]:
        return fun(x, *args), map_examples(lambda one: fun(x, *one), args)

    def find_reduction() -> str | None:
        try:
            closed = trace_trial(trial, point, few)
        except (TypeError, ValueError, IndexError):  # the function does not accept a batch this small
            return None
        values = evaluate_trial(closed, point, few)
        return None if values is None else _reduction_of(values, rounding_of(closed))

    found = cached(functions, key_of("reduction", (point, few)), find_reduction)
    if found not in (None, words[1]) and not (may_be_neither and found == "neither"):
        raise _wrong_reduction(*words, found)


def _reduction_of(values: Values, rounding: float) -> str | None:
    """How the value of a batch follows from the values of its examples: mean, sum or neither; None if undecided."""
    whole, parts = values
    if not np.isfinite(whole):
        return None
    size = np.sqrt(rounding) * max(np.abs(whole), np.abs(parts).max())
    is_mean, is_sum = np.abs(whole - parts.mean()) <= size, np.abs(whole - parts.sum()) <= size
    if is_mean and is_sum:
        return None
    return "mean" if is_mean else "sum" if is_sum else "neither"


def _wrong_reduction(name: str, reduction: str, found: str) -> ValueError:
    """The error for a function of a batch that is not the mean or sum over examples that ``reduction`` states."""
    if found != "neither":
        return ValueError(
            f"{caller()}: reduction={reduction!r}, but {name} of a batch is the {found} of its values for the "
            f"examples, not their {reduction}; pass reduction={found!r}."
        )
    return ValueError(
        f"{caller()}: reduction={reduction!r}, but {name} of a batch is neither the mean nor the sum of its values "
        "for the examples, so that parts of the data do not add up: a mean over a mask divides by the weights of its "
        "part, and batch statistics depend on the part. Take the data whole (chunk_size=None), or a sum divided by the "
        "total weight, passed as a scalar in args, with reduction='sum'."
    )
