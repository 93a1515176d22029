"""Search for the first equation that combines examples of a batch: for error messages, not for proofs."""

from typing import NamedTuple

import jax.extend as jex
from jax.extend.core import ClosedJaxpr, Jaxpr, Var

from curvature.programs._batch_axis import axis_rule
from curvature.programs._jaxprs import Equation, Variable, open_jaxpr
from curvature.programs._legality import Blocker, blocker_at

_AFFINE = {"add", "sub", "add_any", "neg", "convert_element_type", "copy"}
_AFFINE |= {"reduce_sum", "reshape", "squeeze", "broadcast_in_dim", "transpose"}


def find_mixing(closed: ClosedJaxpr, axes: list[int | None], size: int, *, may_sum: bool) -> Blocker | None:
    """The first equation that mixes examples, or has no rule that proves that it does not.

    Args:
        closed: the program.
        axes: the axis of examples of each input; None for an input that all examples share.
        size: the number of examples.
        may_sum: whether sums over the examples are allowed, if the outputs are affine in them.
    """
    jaxpr = closed.jaxpr
    places = _Places({v: axis for v, axis in zip(jaxpr.invars, axes, strict=True) if axis is not None}, set())
    return _follow(jaxpr, places, size, may_sum)


class _Places(NamedTuple):
    """The axis of examples of each variable that has one, and the variables that are affine in sums over examples."""

    axes: dict[Variable, int]
    sums: set[Variable]


def _follow(jaxpr: Jaxpr, places: _Places, size: int, may_sum: bool) -> Blocker | None:
    """Propagate the axes of examples through the equations that the outputs depend on; extends ``places``."""
    for eqn in _needed(jaxpr):
        operands = [v for v in eqn.invars if isinstance(v, Var)]
        if not any(v in places.axes or v in places.sums for v in operands):
            continue
        body = _body_of(eqn)
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
    """Propagate into the jaxpr that an equation calls and back; a finding without a source line takes the call's."""
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


def _body_of(eqn: Equation) -> Jaxpr | None:
    """The jaxpr that an equation calls with its inputs, if any; of ``custom_jvp`` and ``custom_vjp`` the primal one."""
    if eqn.primitive.name in ("scan", "while", "cond"):
        return None
    for body in map(open_jaxpr, jex.core.jaxprs_in_params(eqn.params)):
        if (len(body.invars), len(body.outvars)) == (len(eqn.invars), len(eqn.outvars)):
            return body
    return None


def _is_affine(eqn: Equation, places: _Places) -> bool:
    """Whether an equation is affine in sums over the examples, with coefficients that do not depend on examples."""
    if any(isinstance(v, Var) and v in places.axes for v in eqn.invars):
        return False
    of_sums = [isinstance(v, Var) and v in places.sums for v in eqn.invars]
    if eqn.primitive.name == "mul":
        return not all(of_sums)
    return eqn.primitive.name in _AFFINE or (eqn.primitive.name == "div" and not of_sums[1])


def _needed(jaxpr: Jaxpr) -> list[Equation]:
    """The equations that the outputs depend on, in order."""
    wanted = {v for v in jaxpr.outvars if isinstance(v, Var)}
    needed: list[Equation] = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in wanted for v in eqn.outvars):
            needed.append(eqn)
            wanted.update(v for v in eqn.invars if isinstance(v, Var))
    return needed[::-1]
