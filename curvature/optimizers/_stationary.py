"""Tests of stationarity to rounding, and of descent toward infinity."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from curvature._numerics import dot, matmul
from curvature._sharding import vary_like
from curvature._trees import ravel
from curvature._types import Scalar, Tree, Vector
from curvature.optimizers._bounds import Box, around, downhill, project
from curvature.optimizers._method import choose, evaluate

_ROUNDINGS = 16  # by which each entry of x moves; fewer would be hard to tell from the rounding of the gradient
# Heuristic: where a method is stuck the gradient may be so many times its changes, because rounding along directions of
# large curvature can stop it before the gradient vanishes along the others.
_LENIENCE = 4.0
_PROBES = 4  # vectors of factors: in one of them the terms of a row of the Hessian may cancel
_HOPELESS = 64.0  # a gradient so many times the change in the first probes is not worth the others
_ANGLE = 1.88  # radians; the cosines of its multiples differ from entry to entry and from probe to probe
_CLEAR = 100  # Heuristic: slopes on the way count only if the value has fallen by so many times its noise
_POINTS = _PROBES + 3  # the probes, and three points ``x0 + t (x - x0)``, with t = 0, 0.75, 1.5


class Verdict(NamedTuple):
    """Whether the gradient is zero to rounding, and whether the value does not rise beyond the point or is ``-inf``."""

    is_stationary: Bool[Array, ""]
    drifts: Bool[Array, ""]
    is_unbounded: Bool[Array, ""]


class _Examination(NamedTuple):
    count: Scalar  # of the points evaluated
    passes: Bool[Array, ""]
    changes: Float[Array, "k n"]  # of the gradient, in each probe
    peak: Scalar  # the highest value over the probes
    value: Scalar  # at the last point
    slope: Scalar  # along the way, at the last point
    vanishes: Bool[Array, ""]  # whether the slope is below eps^(1/4) of that at the point before, clearly higher
    drifts: Bool[Array, ""]


def examine(
    value_fn: Callable[[Tree], Any], start: Tree, point: Any, box: Box | None, wanted: Array, is_last: Array
) -> Verdict:
    """Evaluate the gradient close to a point, and, if the point is stationary or the last, along the way to it.

    The point is stationary to rounding if no entry of its gradient exceeds the largest change of that entry as ``x``
    moves to ``x + 16 eps max(|x|, sqrt(eps) |x0|) c``, for four vectors ``c`` of factors between -1 and 1. The maximum
    gives a scale to an entry whose minimizer is zero. The changes include the rounding of the gradient itself, and they
    follow the units of the objective and of each variable. At the last point, from which no step led on, four times
    these changes are allowed.

    The second condition: when the gradient and its changes, in units of the moves, are projected onto the complement of
    the first change, the gradient is no longer than the longest change. In a narrow valley every probe changes the
    gradient mainly across the valley, and the projection leaves the slope along its floor.

    A pole such as that of ``log(abs(x))`` passes both conditions. It is recognized by its value, which a probe raises
    by more than rounding plus ``sqrt(eps)`` times its rise at ``x + (x - x0) / 2``.

    The objective drifts if half as far again from ``x0``, at ``x + (x - x0) / 2``, the value is no higher, beyond
    rounding, and if the slope along this way had fallen below ``eps^(1/4)`` of the first one at three quarters of it.
    Without the second condition a minimizer at the edge of a flat set would count. Where the value fell by little more
    than its rounding, the slopes are rounding too.
    """
    x, unravel = ravel(point.x)
    x0 = ravel(start)[0]
    grad = ravel(point.grad)[0]
    size, reach, way = jnp.abs(grad), _reach(point, start), x - x0
    if box is not None:  # entries that a bound holds stay there
        free = downhill(around(box, point.x), grad)
        size, reach = jnp.abs(free), jnp.where(free == grad, reach, 0)
    angles = _ANGLE * jnp.arange(1, x.size + 1, dtype=x.dtype)
    level, high = point.value + point.noise, point.value + _CLEAR * point.noise
    flat = float(jnp.finfo(x.dtype).eps) ** 0.5
    vanishing = flat**0.5
    real = x.dtype.type

    def running(last: _Examination) -> Bool[Array, ""]:
        return last.passes & (last.count < _POINTS)

    def evaluate_next(last: _Examination) -> _Examination:
        is_probe, count = last.count < _PROBES, last.count + 1
        share = 0.75 * (last.count - _PROBES)
        moved = unravel(choose(is_probe, x + reach * jnp.cos(angles * count), x0 + share * way))
        goes_on: Any = True
        if box is not None:
            moved = project(box, moved)
            goes_on = jnp.any(ravel(moved)[0] != x)  # else the bounds end the way
        value, new = evaluate(value_fn, moved)
        value, new = value.astype(level.dtype), ravel(new)[0]
        here = (jnp.arange(_PROBES, dtype=x.dtype) == last.count)[:, None]
        changes = jnp.where(here, new - grad, last.changes)
        slope = jnp.abs(dot(new, way))
        factor = jax.lax.select(count < _PROBES, real(_HOPELESS), real(1))
        return _Examination(
            count=count,
            passes=jnp.all(size <= factor * jnp.max(jnp.abs(changes), 0)) | is_last,
            changes=changes,
            peak=choose(is_probe, jnp.maximum(last.peak, value), last.peak),
            value=value,
            slope=slope,
            vanishes=(last.value > high) & (slope < vanishing * last.slope),
            drifts=last.vanishes & (value <= level) & goes_on,
        )

    zero: Any = np.zeros((), x.dtype)
    no: Any = np.zeros((), bool)
    none = jnp.zeros_like(x, shape=(_PROBES, x.size))
    first = _Examination(zero, wanted, none, point.value, point.value, zero, no, no)
    last = jax.lax.while_loop(running, evaluate_next, vary_like(jax.tree.map(jnp.asarray, first), (point, start)))
    lenience = jax.lax.select(is_last, real(_LENIENCE), real(1))
    is_pole = last.peak > level + flat * jnp.maximum(last.value - point.value, 0)
    is_stationary = last.passes & jnp.all(size <= lenience * jnp.max(jnp.abs(last.changes), 0)) & ~is_pole
    units = reach / jnp.maximum(jnp.max(reach), jnp.finfo(x.dtype).tiny)  # with them all changes are in one unit
    is_stationary &= _changes_as_much_across(units * grad, units[None] * last.changes, lenience)
    return Verdict(is_stationary, last.passes & last.drifts, is_last & (last.value == -jnp.inf))


def _changes_as_much_across(grad: Vector, changes: Float[Array, "k n"], lenience: Scalar) -> Bool[Array, ""]:
    """The second condition of ``examine``, on the complement of the first change."""
    rows = jnp.concatenate([changes, grad[None]])
    rows = rows / jnp.maximum(jnp.max(jnp.abs(rows)), jnp.finfo(rows.dtype).tiny)  # so that no square underflows
    rounding = (4 * grad.size * jnp.finfo(grad.dtype).eps) ** 2
    across = rows[0]
    shares = matmul(rows, across) / jnp.maximum(jnp.sum(across**2), rounding)
    squares = jnp.sum((rows - shares[:, None] * across[None]) ** 2, 1)
    return squares[-1] <= lenience**2 * jnp.max(squares[:-1]) + rounding


def _reach(point: Any, start: Tree) -> Vector:
    """How far each entry moves in a probe, in roundings of its dtype or of that of the objective."""
    least = float(jnp.finfo(point.value.dtype).eps)

    def leaf(x: Array, x0: Array) -> Array:
        eps = max(float(jnp.finfo(x.dtype).eps), least)
        return (_ROUNDINGS * eps) * jnp.maximum(jnp.abs(x), eps**0.5 * jnp.abs(x0))

    return ravel(jax.tree.map(leaf, point.x, start))[0]
