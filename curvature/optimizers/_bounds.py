"""The geometry of a box ``lower <= x <= upper``: projection, steps that stay inside, and the projected gradient."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from curvature import _checks
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
    box = Box(*(_checks.check_bound(name, *bound, x_name, x) for name, bound in bounds.items()))
    _checks.check_order_of_bounds(*box)
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
