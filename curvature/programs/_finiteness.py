"""Interval arithmetic that shows that a program keeps values and derivatives finite.

Reverse mode multiplies a cotangent that a select, or the choice of an output, has set to zero by each partial
derivative upstream, and ``0 * inf`` is NaN; forward mode drops the tangent instead. The two modes are equally finite
where no equation can make a partial derivative infinite or NaN. That is shown here equation by equation: a primitive is
smooth everywhere, or the range of its operand excludes its singular points. An unknown primitive counts as not finite.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from curvature.programs._jaxprs import called_jaxpr, is_floating, isolate_equation, open_jaxpr
from curvature.programs._primitives import CONTROL_FLOW, PASS_INFINITY, SELECTIONS, SMOOTH, SMOOTH_AWAY_FROM_ZERO
from curvature.programs._pushforward import judge_rule

Range = tuple[float, float]
_UNKNOWN: Range = (-math.inf, math.inf)


class _Peak(NamedTuple):
    """A variable that holds the maxima of another variable over some axes.

    Attributes:
        of: the variable whose maxima are taken.
        axes: the axes of ``of`` over which the maximum is taken.
        places: for each axis of the maxima, the axis of ``of`` that it runs along; None where it only repeats.
    """

    of: Any
    axes: tuple[int, ...]
    places: tuple[int | None, ...]


@dataclass
class _Facts:
    """The facts known about the variables of one jaxpr.

    Attributes:
        ranges: lower and upper bounds of all entries of a variable; a variable that is missing is unbounded.
        peaks: for a variable that holds maxima, whose maxima they are.
        attains: for a variable, axes along which some entry equals the upper bound of its range.
        tested: for a boolean variable that holds ``is_finite`` of another variable, that variable.
    """

    ranges: dict[Any, Range] = field(default_factory=dict)
    peaks: dict[Any, _Peak] = field(default_factory=dict)
    attains: dict[Any, tuple[int, ...]] = field(default_factory=dict)
    tested: dict[Any, Any] = field(default_factory=dict)

    def range_of(self, v: Any) -> Range:
        """The bounds of a variable or a literal."""
        dtype = getattr(v.aval, "dtype", jnp.int32)
        if isinstance(v, Literal) and not jnp.issubdtype(dtype, jnp.complexfloating):
            return float(np.min(v.val)), float(np.max(v.val))
        bounds = (0.0, 1.0) if dtype == np.bool_ else _UNKNOWN
        return bounds if isinstance(v, Literal) else self.ranges.get(v, bounds)


def keeps_finite(closed: ClosedJaxpr) -> bool:
    """Whether all values and partial derivatives are finite wherever the inputs are, short of overflowing products."""
    jaxpr = closed.jaxpr
    return _finite_outputs(jaxpr, [_UNKNOWN] * len(jaxpr.invars), frozenset()) is not None


def _finite_outputs(jaxpr: Jaxpr, ranges: Sequence[Range], assumed: frozenset[str]) -> list[Range] | None:
    """The ranges of the outputs; None if a value or a derivative may not be finite."""
    facts = _Facts(dict(zip(jaxpr.invars, ranges, strict=True)))
    for eqn in jaxpr.eqns:
        if not _is_finite_equation(jaxpr, eqn, facts, assumed):
            return None
    return [facts.range_of(v) for v in jaxpr.outvars]


def _is_finite_equation(jaxpr: Jaxpr, eqn: Any, facts: _Facts, assumed: frozenset[str]) -> bool:
    """Whether one equation keeps values and derivatives finite; adds the facts about its outputs."""
    name, ranges = eqn.primitive.name, [facts.range_of(v) for v in eqn.invars]
    if name == "is_finite":
        facts.tested[eqn.outvars[0]] = eqn.invars[0]
    if not any(map(is_floating, eqn.outvars)):
        return True
    if name == "custom_jvp_call":
        body = _finite_outputs(open_jaxpr(eqn.params["call_jaxpr"]), ranges, assumed)
        closed = isolate_equation(jaxpr, eqn)
        moving = [is_floating(v) for v in closed.jaxpr.invars]
        of_rule = [*map(facts.range_of, closed.jaxpr.invars), *[_UNKNOWN] * sum(moving)]
        facts.ranges.update(zip(eqn.outvars, body or [], strict=False))
        return body is not None and judge_rule(
            closed, moving, assumed, lambda rule, assumed: _finite_outputs(rule, of_rule, assumed) is not None
        )
    if name in CONTROL_FLOW:  # the ranges of carries would have to be iterated, so they are taken as unknown
        bodies = list(jex.core.jaxprs_in_params(eqn.params))
        return all(_finite_outputs(body, [_UNKNOWN] * len(body.invars), assumed) is not None for body in bodies)
    body = called_jaxpr(eqn)
    if body is not None:
        outs = _finite_outputs(body, ranges, assumed)
        facts.ranges.update(zip(eqn.outvars, outs or [], strict=False))
        return outs is not None
    if not _is_smooth(eqn, ranges):
        return False
    _add_facts(eqn, ranges, facts)
    return True


def _is_smooth(eqn: Any, ranges: Sequence[Range]) -> bool:
    """Whether a primitive has finite values and derivatives in these ranges of its operands."""
    name, dtypes = eqn.primitive.name, [v.aval.dtype for v in (*eqn.invars, *eqn.outvars)]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return False
    if name not in PASS_INFINITY and any(low == high and math.isinf(low) for low, high in ranges):
        return False
    low, high = ranges[SMOOTH_AWAY_FROM_ZERO.get(name, 0)] if ranges else _UNKNOWN
    if name in ("exp", "exp2", "expm1"):
        return high <= 0.9 * math.log(float(jnp.finfo(dtypes[-1]).max))  # safely below overflow
    if name == "log1p":
        return low > -1 + _far_from_zero(dtypes[-1])
    if name in SMOOTH_AWAY_FROM_ZERO or (name == "integer_pow" and eqn.params["y"] < 0):
        far = _far_from_zero(dtypes[-1])
        return low >= far or (high <= -far and name in ("div", "integer_pow"))
    return name in SMOOTH or name == "integer_pow"


def _far_from_zero(dtype: Any) -> float:
    """The least number by which one may divide three times without overflow, as second derivatives of a quotient do."""
    return float(jnp.finfo(dtype).tiny) ** (1 / 3)


# ---- facts about the outputs of an equation --------------------------------------------------------------------------


def _add_facts(eqn: Any, ranges: Sequence[Range], facts: _Facts) -> None:
    """Add the ranges of an equation's outputs, and whose maxima they hold."""
    name, out = eqn.primitive.name, eqn.outvars[0]
    if name in RANGES:
        low, high = RANGES[name](*ranges)
    elif name in SELECTIONS:
        low, high = ranges[0]
    else:
        low, high = _special_range(eqn, ranges, facts)
    if not math.isnan(low) and not math.isnan(high):
        facts.ranges.update(dict.fromkeys(eqn.outvars, (low, high)))
    _add_peak(eqn, facts)
    if name == "sub" and _is_shifted_by_its_peak(eqn, facts):
        facts.ranges[out] = (-math.inf, 0.0)
        facts.attains[out] = facts.peaks[eqn.invars[1]].axes
    elif name == "exp" and eqn.invars[0] in facts.attains:
        facts.attains[out] = facts.attains[eqn.invars[0]]


def _product_range(a: Range, b: Range) -> Range:
    ends = [0.0 if 0.0 in pair else pair[0] * pair[1] for pair in itertools.product(a, b)]
    return min(ends), max(ends)


def _square_range(a: Range) -> Range:
    low, high = _product_range(a, a)
    return (0.0 if a[0] <= 0 <= a[1] else min(a[0] * a[0], a[1] * a[1])), max(low, high)


def _join_ranges(*ranges: Range) -> Range:
    return min(low for low, _ in ranges), max(high for _, high in ranges)


def _exp_or_inf(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # where math.exp overflows


RANGES: dict[str, Callable[..., Range]] = {
    **dict.fromkeys(("add", "add_any"), lambda a, b: (a[0] + b[0], a[1] + b[1])),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "neg": lambda a: (-a[1], -a[0]),
    "abs": lambda a: (max(a[0], -a[1], 0.0), max(-a[0], a[1])),
    "max": lambda a, b: (max(a[0], b[0]), max(a[1], b[1])),
    "min": lambda a, b: (min(a[0], b[0]), min(a[1], b[1])),
    "exp": lambda a: (_exp_or_inf(a[0]), _exp_or_inf(a[1])),
    "log1p": lambda a: (math.log1p(a[0]), math.log1p(a[1])),
    "logistic": lambda a: (0.0, 1.0),
    **dict.fromkeys(("tanh", "sin", "cos", "erf"), lambda a: (-1.0, 1.0)),
    "sqrt": lambda a: (math.sqrt(a[0]), math.sqrt(a[1])),
    "square": _square_range,
    "concatenate": _join_ranges,
}


def _special_range(eqn: Any, ranges: Sequence[Range], facts: _Facts) -> Range:
    """The range of an output that depends on parameters of the equation, or on whether two operands are the same."""
    name = eqn.primitive.name
    if name == "mul":
        return _square_range(ranges[0]) if eqn.invars[0] is eqn.invars[1] else _product_range(*ranges)
    if name == "div":
        low, high = ranges[1]
        return _product_range(ranges[0], (1 / high, 1 / low))
    if name == "integer_pow" and eqn.params["y"] % 2 == 0:
        return _square_range(ranges[0]) if eqn.params["y"] == 2 else (0.0, math.inf)
    if name == "select_n":
        return ranges[2] if facts.tested.get(eqn.invars[0]) is eqn.invars[2] else _join_ranges(*ranges[1:])
    if name == "reduce_sum":
        return _range_of_sum(eqn, ranges[0], facts)
    return _UNKNOWN


def _range_of_sum(eqn: Any, bounds: Range, facts: _Facts) -> Range:
    """The range of a sum; a sum of nonnegative terms is at least the largest of them, where that is known."""
    count = eqn.invars[0].aval.size / max(eqn.outvars[0].aval.size, 1)
    low, high = (0.0 if bound == 0 else bound * count for bound in bounds)
    attained = facts.attains.get(eqn.invars[0])
    if bounds[0] >= 0 and attained is not None and set(attained) <= set(eqn.params["axes"]):
        low = max(low, bounds[1])
    return low, high


def _add_peak(eqn: Any, facts: _Facts) -> None:
    """Follow maxima through equations that keep their values."""
    if not eqn.invars:
        return
    name, operand, out = eqn.primitive.name, eqn.invars[0], eqn.outvars[0]
    if name == "reduce_max":
        axes = tuple(eqn.params["axes"])
        facts.peaks[out] = _Peak(operand, axes, tuple(i for i in range(operand.aval.ndim) if i not in axes))
        return
    if name == "select_n" and facts.tested.get(operand) is eqn.invars[-1]:
        operand = eqn.invars[-1]  # this operand is finite, so the select returns it
    elif name == "max" and isinstance(operand, Literal) and operand.val == -math.inf:
        operand = eqn.invars[1]
    elif name not in ("stop_gradient", "broadcast_in_dim", "copy"):
        return
    peak = None if isinstance(operand, Literal) else facts.peaks.get(operand)
    if peak is None:
        return
    if name == "broadcast_in_dim":
        places: list[int | None] = [None] * out.aval.ndim
        for place, axis in zip(peak.places, eqn.params["broadcast_dimensions"], strict=True):
            places[axis] = place
        peak = peak._replace(places=tuple(places))
    facts.peaks[out] = peak


def _is_shifted_by_its_peak(eqn: Any, facts: _Facts) -> bool:
    """Whether an equation subtracts from a variable its own maxima over some axes."""
    x, shift = eqn.invars
    alike = x.aval.ndim == shift.aval.ndim
    peak = None if isinstance(shift, Literal) else facts.peaks.get(shift)
    if peak is None or peak.of is not x or not alike:
        return False
    wanted = tuple(None if axis in peak.axes or size == 1 else axis for axis, size in enumerate(x.aval.shape))
    places = tuple(None if size == 1 else place for place, size in zip(peak.places, x.aval.shape, strict=True))
    return places == wanted
