"""Finds the equation of a program that mixes the examples of a batch: for error messages, not for proofs."""

from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from curvature.programs._batch_axis import axis_rule
from curvature.programs._jaxprs import Equation, Variable, called_jaxpr, live_equations
from curvature.programs._legality import Blocker, blocker_at
from curvature.programs._primitives import CONTROL_FLOW, LINEAR


def find_mixing(closed: ClosedJaxpr, axes: list[int | None], size: int, *, may_sum: bool) -> Blocker | None:
    """The first equation that mixes examples, or for which ``_batch_axis`` has no rule.

    Args:
        closed: the program.
        axes: for each input the axis that indexes examples; None for an input that all examples share.
        size: the number of examples.
        may_sum: whether a sum over the examples is allowed, if the outputs are affine in it.
    """
    jaxpr = closed.jaxpr
    places = _Places({v: axis for v, axis in zip(jaxpr.invars, axes, strict=True) if axis is not None}, set())
    return _follow(jaxpr, places, size, may_sum)


class _Places(NamedTuple):
    """The variables of a jaxpr that depend on the examples: by batch axis, and those affine in sums over examples."""

    axes: dict[Variable, int]
    sums: set[Variable]


def _follow(jaxpr: Jaxpr, places: _Places, size: int, may_sum: bool) -> Blocker | None:
    """Follow the examples through the equations that the outputs depend on; adds to ``places``."""
    for eqn in live_equations(jaxpr, keep_effects=False):
        operands = [v for v in eqn.invars if isinstance(v, Var)]
        if not any(v in places.axes or v in places.sums for v in operands):
            continue
        # Of a function with a custom rule, the body of its value is followed.
        body = None if eqn.primitive.name in CONTROL_FLOW else called_jaxpr(eqn, open_custom_rules=True)
        if body is not None:
            found = _follow_call(eqn, body, places, size, may_sum)
            if found is not None:
                return found
        elif any(v in places.sums for v in operands):
            if not _is_affine(eqn, places):
                return blocker_at(eqn)
            places.sums.update(eqn.outvars)
        else:
            rule = axis_rule(eqn, [places.axes.get(v) if isinstance(v, Var) else None for v in eqn.invars], size)
            if rule is None or (None in rule[1] and not may_sum):
                return blocker_at(eqn)
            for v, axis in zip(eqn.outvars, rule[1], strict=True):
                _place(places, v, axis, axis is None)
    return None


def _follow_call(eqn: Equation, body: Jaxpr, places: _Places, size: int, may_sum: bool) -> Blocker | None:
    """Follow the examples through the body of a call; a blocker without a line is reported at the line of the call."""
    inner = _Places({}, set())
    for v, outer in zip(body.invars, eqn.invars, strict=True):
        if isinstance(outer, Var):
            _place(inner, v, places.axes.get(outer), outer in places.sums)
    found = _follow(body, inner, size, may_sum)
    for v, out in zip(eqn.outvars, body.outvars, strict=True):
        if isinstance(out, Var):
            _place(places, v, inner.axes.get(out), out in inner.sums)
    return found if found is None or found.where else found._replace(where=blocker_at(eqn).where)


def _place(places: _Places, v: Variable, axis: int | None, is_sum: bool) -> None:
    if axis is not None:
        places.axes[v] = axis
    if is_sum:
        places.sums.add(v)


def _is_affine(eqn: Equation, places: _Places) -> bool:
    """Whether an equation is affine in sums over the examples, with coefficients that do not depend on the examples."""
    if any(isinstance(v, Var) and v in places.axes for v in eqn.invars):
        return False
    of_sums = [isinstance(v, Var) and v in places.sums for v in eqn.invars]
    if eqn.primitive.name == "mul":
        return not all(of_sums)
    return eqn.primitive.name in LINEAR or (eqn.primitive.name == "div" and not of_sums[1])
