"""The geometry of a box ``lower <= x <= upper``: projection, steps that stay inside, and the projected gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Bool

from curvature._errors import caller, describe, is_array_like
from curvature._trees import ravel
from curvature._types import Scalar, Tree, Vector

Mask = Bool[Array, " n"]


class Box(NamedTuple):
    """A box as two trees like ``x``, every entry present: minus infinity and infinity where there is no bound."""

    lower: Tree
    upper: Tree


class StepBox(NamedTuple):
    """The same box as the point sees it: the bounds of a step, flat, ``lower <= 0 <= upper``."""

    lower: Vector
    upper: Vector


def box_of(lower: Tree, upper: Tree, x_name: str, x: Tree) -> Box:
    """The box of two bounds, each a tree like ``x`` or a prefix of one, checked."""
    bounds = {"lower": (lower, -jnp.inf), "upper": (upper, jnp.inf)}
    box = Box(*(_check_bound(name, *bound, x_name, x) for name, bound in bounds.items()))
    _check_order_of_bounds(*box)
    return box


def flat(box: Box) -> Box:
    """The box of the point as one vector."""
    return Box(*(ravel(bound)[0] for bound in box))


def project(box: Box, x: Tree) -> Tree:
    """The nearest point of the box."""
    return jax.tree.map(jnp.clip, x, *box)


def projected_gradient_norm(box: Box, x: Tree, grad: Tree) -> Scalar:
    """``max|P(x - grad) - x|``, which is zero where the first-order conditions hold, and ``max|grad|`` without bounds.

    Clipped as a step, so that nothing cancels in ``x - grad - x``.

    References: Conn, Gould and Toint, Trust-Region Methods (2000), section 12.1.4, doi:10.1137/1.9780898719857; Byrd,
        Lu, Nocedal and Zhu (1995), equation (6.1), doi:10.1137/0916069.
    """
    steps = around(box, x)
    return jnp.max(jnp.abs(jnp.clip(-ravel(grad)[0], *steps)))


def around(box: Box, x: Tree) -> StepBox:
    """The bounds of a step from ``x``, a point of the box."""
    flat = ravel(x)[0]
    lower, upper = (ravel(bound)[0] for bound in box)
    return StepBox(jnp.minimum(lower - flat, 0), jnp.maximum(upper - flat, 0))


def downhill(steps: StepBox, grad: Vector) -> Vector:
    """The gradient where its descent leads into the box, 0 where it leads out of it."""
    leads_out = jnp.where(grad > 0, steps.lower == 0, steps.upper == 0)
    return jnp.where(leads_out, 0, grad)


def is_free(steps: StepBox, step: Vector) -> Mask:
    """Which entries end strictly between their bounds."""
    return (steps.lower < step) & (step < steps.upper)


def stay_inside(box: Box, x: Tree, step: Tree) -> Tree:
    """The step, such that the rounded ``x + step`` is in the box.

    A step to a bound is ``upper - x`` rounded, and may so end one rounding beyond it. One rounding of the step less is
    then on this side of it, because rounding is monotone.
    """

    def leaf(lower: Array, upper: Array, x: Array, step: Array) -> Array:
        step = jnp.clip(step, jnp.minimum(lower - x, 0), jnp.maximum(upper - x, 0))
        outside = (x + step < lower) | (x + step > upper)
        return jnp.where(outside, jnp.nextafter(step, jnp.zeros_like(step)), step)

    return jax.tree.map(leaf, *box, x, step)


def rest_on_bounds(box: Box, x: Tree, grad: Tree) -> tuple[Tree, Tree]:
    """Which entries of a minimizer are free, and for the others how they move with their bound: a shift of zero.

    An entry rests on a bound where a step against the gradient ends at it or beyond, as the convergence test has it:
    the entry itself may be within the tolerance of its bound. The shift is zero in value and has the derivative of the
    bound.
    """

    def leaf(lower: Array, upper: Array, x: Array, grad: Array) -> tuple[Array, Array]:
        low = (x - grad <= lower) & (grad > 0) & jnp.isfinite(lower) | (lower == upper)
        high = (x - grad >= upper) & (grad < 0) & jnp.isfinite(upper) & ~low
        bound = jnp.where(low, lower, jnp.where(high, upper, 0))
        return ~(low | high), bound - jax.lax.stop_gradient(bound)

    leaves = jax.tree.map(leaf, *box, x, grad)
    return jax.tree.transpose(jax.tree.structure(x), None, leaves)


def _check_bound(name: str, bound: Any, unbounded: float, x_name: str, x: Tree) -> Tree:
    """``bound`` broadcast to the tree ``x``, in its dtypes; ``None`` anywhere is no bound."""
    try:
        full = jax.tree.broadcast(bound, x, is_leaf=lambda node: node is None)
    except ValueError:
        raise ValueError(
            f"{caller()}: {name} does not have the tree structure of {x_name}, nor that of a prefix of it. "
            f"Got {jax.tree.structure(bound)}, expected a number, None or {jax.tree.structure(x)}."
        ) from None
    leaves, structure = tree_flatten_with_path(full, is_leaf=lambda node: node is None)
    pairs = zip(leaves, jax.tree.leaves(x), strict=True)
    return structure.unflatten(
        [_bound_leaf(name, keystr(path), leaf, unbounded, x_name, x_leaf) for (path, leaf), x_leaf in pairs]
    )


def _bound_leaf(
    name: str, path: str, leaf: Any, unbounded: float, x_name: str, x_leaf: jax.Array
) -> jax.Array | np.ndarray:
    leaf = unbounded if leaf is None else leaf
    dtype = jnp.result_type(leaf) if is_array_like(leaf) else jnp.dtype(bool)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{caller()}: {name}{path} is {describe(leaf)}, expected an array of real numbers.")
    if jnp.shape(leaf) not in ((), x_leaf.shape):
        raise ValueError(
            f"{caller()}: {name}{path} has shape {jnp.shape(leaf)}, expected a number or {x_leaf.shape} to match "
            f"{x_name}{path}."
        )
    if isinstance(leaf, jax.Array):
        return jnp.broadcast_to(jnp.asarray(leaf, x_leaf.dtype), x_leaf.shape)
    return np.broadcast_to(np.asarray(leaf, x_leaf.dtype), x_leaf.shape)  # a number needs no kernel on the device


def _check_order_of_bounds(lower: Tree, upper: Tree) -> None:
    """Refuse bounds with no finite number between them, where the values are known."""
    for (path, low), high in zip(tree_flatten_with_path(lower)[0], jax.tree.leaves(upper), strict=True):
        if any(isinstance(leaf, Tracer) or not getattr(leaf, "is_fully_addressable", True) for leaf in (low, high)):
            continue
        low, high = (np.asarray(leaf, np.float64) for leaf in (low, high))
        bad = ~((low <= high) & (low < np.inf) & (high > -np.inf))
        if bad.any():
            index = tuple(map(int, np.argwhere(bad)[0]))
            raise ValueError(
                f"{caller()}: lower{keystr(path)} is {low[index]} and upper{keystr(path)} is {high[index]} at index "
                f"{index}, expected lower <= upper with a finite number between them."
            )
