"""Legality of derivatives: the first equation of a jaxpr that has no derivative in a mode.

Two kinds of primitive decide:

- ``custom_vjp`` has no forward derivative. Its reverse derivative is an ordinary program, which may have either.
- ``while`` (a loop whose length is not known while tracing) has no reverse derivative.

A ``custom_jvp`` is judged by its rule and not by its body, and a linear solve by its matrix, as JAX does.

A variable is active if it carries a derivative of the input, and live if the output depends on it through active
variables. Forward mode differentiates every active equation; reverse mode only those that are live too.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.extend as jex
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from curvature._errors import caller
from curvature.programs._jaxprs import (
    bodies_of,
    called_jaxpr,
    is_floating,
    isolate_active,
    open_jaxpr,
    restrict,
    trace_jvp,
)
from curvature.programs._primitives import BILINEAR, LINEAR, OPAQUE

Wanted = Callable[[Jaxpr, JaxprEqn, list[bool]], bool]
"""From a jaxpr, one active equation of it, and which operands are active, to whether the equation is wanted."""


class Blocker(NamedTuple):
    """An equation that forbids a mode: its primitive, and the user's line that it comes from."""

    primitive: str
    where: str

    def __str__(self) -> str:
        """The form that error messages quote."""
        return f"{self.primitive} at {self.where}"


class _Search(NamedTuple):
    """A search of a jaxpr and its nested bodies.

    Attributes:
        judge: from a jaxpr, one active equation of it and its active operands to the blocker to report, or None.
            Where it returns None, the bodies of calls, loops and branches are searched.
        only_live: whether an equation counts only if the output depends on it.
    """

    judge: Callable[[Jaxpr, JaxprEqn, list[bool]], Blocker | None]
    only_live: bool


def first_legal(
    blocker: Callable[[str], Blocker | None], order: Sequence[str] = ("fwd", "rev"), mode: str = "auto"
) -> str:
    """``mode`` itself if it is legal; for "auto" the first legal mode in the ``order``."""
    blockers = {}
    for candidate in order if mode == "auto" else [mode]:
        blockers[candidate] = blocker(candidate)
        if blockers[candidate] is None:
            return candidate
    if mode == "auto":
        reasons = "; ".join(f"{name} is blocked by {found}" for name, found in blockers.items())
        raise TypeError(
            f"{caller()}: no composition of forward and reverse mode can differentiate f: {reasons}. "
            "custom_vjp_call has no forward derivative (custom_jvp has both), while has no reverse derivative "
            "(scan, or fori_loop with constant bounds, has both)."
        )
    legal = [other for other in order if blocker(other) is None]
    remedy = f"use mode={legal[0]!r} or mode='auto'" if legal else "no other mode is legal either"
    raise TypeError(f"{caller()}: mode={mode!r} is not legal for f because of {blockers[mode]}; {remedy}.")


def find_blocker(jaxpr: Jaxpr, active_in: Sequence[bool], live_out: Sequence[bool], mode: str) -> Blocker | None:
    """The first equation of ``jaxpr`` that has no derivative in ``mode``, "fwd" or "rev"."""
    search = _Search(_forward_blocker, False) if mode == "fwd" else _Search(_reverse_blocker, True)
    return _search_jaxpr(jaxpr, active_in, live_out, search)[0]


def find_equation(jaxpr: Jaxpr, active_in: Sequence[bool], live_out: Sequence[bool], wanted: Wanted) -> Blocker | None:
    """The first equation that carries a derivative from the inputs to the outputs and is ``wanted``."""

    def judge(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> Blocker | None:
        return blocker_at(eqn) if wanted(jaxpr, eqn, mask) else None

    return _search_jaxpr(jaxpr, active_in, live_out, _Search(judge, True))[0]


def blocker_at(eqn: JaxprEqn) -> Blocker:
    """The blocker that reports an equation."""
    return Blocker(eqn.primitive.name, jex.source_info_util.summarize(eqn.source_info))


def is_collective(eqn: JaxprEqn) -> bool:
    """Whether an equation reads values of other devices of a mesh, inside ``jax.shard_map``."""
    named = eqn.params.get("axes", ()), eqn.params.get("axis_name", ())
    names = [axis for axes in named for axis in (axes if isinstance(axes, tuple | list) else (axes,))]
    return eqn.primitive.name not in ("pvary", "pcast") and any(isinstance(axis, str) for axis in names)


# ---- active variables: forward through the equations -----------------------------------------------------------------


def active_outputs(jaxpr: Jaxpr, active_in: Sequence[bool]) -> list[bool]:
    """Which outputs of a jaxpr carry a derivative; True is always a safe answer."""
    return _mask(jaxpr.outvars, _active_variables(jaxpr, active_in))


def _active_variables(jaxpr: Jaxpr, active_in: Sequence[bool]) -> set[Var]:
    active = set(compress(jaxpr.invars, active_in))
    for eqn in jaxpr.eqns:
        mask = _mask(eqn.invars, active)
        if any(mask):
            active.update(v for v in compress(eqn.outvars, active_equation_outputs(eqn, mask)) if is_floating(v))
    return active


def active_equation_outputs(eqn: JaxprEqn, mask: Sequence[bool]) -> list[bool]:
    """Which outputs of an equation carry a derivative; True is always a safe answer."""
    if eqn.primitive.name == "stop_gradient":
        return [False] * len(eqn.outvars)
    bodies = bodies_of(eqn)
    if bodies is None:
        return [True] * len(eqn.outvars)
    active_in = list(mask[bodies.num_tested :])
    while True:  # until the set of active carries no longer grows
        outs = _any_of(active_outputs(body, active_in) for body in bodies.jaxprs)
        carry = active_in[bodies.carry]
        grown = [a or b for a, b in zip(carry, outs, strict=False)]
        if grown == carry:
            return carry + outs[len(carry) :]
        active_in[bodies.carry] = grown


def _any_of(masks: Iterable[Sequence[bool]]) -> list[bool]:
    return [any(flags) for flags in zip(*masks, strict=True)]


# ---- live variables: backward through the equations ------------------------------------------------------------------


def _search_jaxpr(
    jaxpr: Jaxpr, active_in: Sequence[bool], live_out: Sequence[bool], search: _Search
) -> tuple[Blocker | None, list[bool]]:
    """The first equation that the search reports, and which inputs are live."""
    active = _active_variables(jaxpr, active_in)
    live = {v for v in compress(jaxpr.outvars, live_out) if isinstance(v, Var)}
    found = None
    for eqn in reversed(jaxpr.eqns):
        mask = _mask(eqn.invars, active)
        live_outs = [not search.only_live or (v in live and v in active) for v in eqn.outvars]
        if any(mask) and any(live_outs):
            blocker, live_ins = _search_equation(jaxpr, eqn, mask, live_outs, search)
            live.update(v for v in compress(eqn.invars, live_ins) if isinstance(v, Var))
            found = blocker or found
    return found, _mask(jaxpr.invars, live & active)


def _search_equation(
    jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool], live_outs: list[bool], search: _Search
) -> tuple[Blocker | None, list[bool]]:
    """What the search reports in one equation or its bodies, and which of the equation's inputs are live."""
    found = search.judge(jaxpr, eqn, mask)
    if found is not None:
        return found, mask
    if eqn.primitive.name == "custom_linear_solve":
        matvec = open_jaxpr(eqn.params["jaxprs"].matvec)
        return _search_jaxpr(matvec, [True] * len(matvec.invars), [True] * len(matvec.outvars), search)[0], mask
    bodies = bodies_of(eqn)
    if bodies is None:
        return None, mask
    active_in = mask[bodies.num_tested :]
    size = len(active_in[bodies.carry])
    active_in[bodies.carry] = active_equation_outputs(eqn, mask)[:size]
    while True:  # until the set of live carries no longer grows
        results = [_search_jaxpr(body, active_in, live_outs, search) for body in bodies.jaxprs]
        live_ins = _any_of(live for _, live in results)
        grown = [a or b for a, b in zip(live_outs, live_ins[bodies.carry], strict=False)]
        if grown == live_outs[:size]:
            found = next((blocker for blocker, _ in results if blocker is not None), None)
            return found, [False] * bodies.num_tested + live_ins
        live_outs = grown + live_outs[size:]


# ---- what one equation allows ----------------------------------------------------------------------------------------


def _forward_blocker(_: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> Blocker | None:
    return blocker_at(eqn) if eqn.primitive.name in OPAQUE | {"custom_vjp_call"} else None


def _reverse_blocker(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> Blocker | None:
    name = eqn.primitive.name
    if name == "custom_jvp_call":
        return _custom_jvp_blocker(jaxpr, eqn, mask)
    has_no_transpose = name == "custom_linear_solve" and eqn.params["jaxprs"].transpose_solve is None
    if name == "pad" and not mask[0]:  # by its padding value alone, which some versions of JAX cannot transpose
        has_no_transpose = not _has_transpose(jaxpr, eqn, mask)
    return blocker_at(eqn) if name in OPAQUE or name == "while" or has_no_transpose else None


def _custom_jvp_blocker(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> Blocker | None:
    """Reverse mode transposes the rule's tangent: trace the rule and search between its tangents."""
    alone, moving = isolate_active(jaxpr, eqn, mask)
    rule = trace_jvp(alone, moving, 1).jaxpr
    is_tangent = [n >= len(moving) for n in range(len(rule.invars))]
    return find_blocker(rule, is_tangent, [True] * len(rule.outvars), "rev") or _find_nonlinear(rule, is_tangent)


def _find_nonlinear(jaxpr: Jaxpr, is_tangent: Sequence[bool]) -> Blocker | None:
    """The first equation that JAX cannot transpose with respect to the tangents; bodies of calls are searched.

    Every equation that depends on the tangents counts, comparisons too: JAX transposes all of them.
    """
    tangents = set(compress(jaxpr.invars, is_tangent))
    for eqn in jaxpr.eqns:
        mask = _mask(eqn.invars, tangents)
        if not any(mask):
            continue
        tangents.update(eqn.outvars)
        body = called_jaxpr(eqn)
        if body is not None:
            found = _find_nonlinear(body, mask)
        else:
            found = None if _has_transpose(jaxpr, eqn, mask) else blocker_at(eqn)
        if found is not None:
            return found
    return None


def _has_transpose(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> bool:
    """Whether JAX can transpose one equation with respect to the operands in the mask."""
    name = eqn.primitive.name
    if name in LINEAR or name == "concatenate" or (name in BILINEAR and sum(mask) == 1):
        return True
    if name == "select_n" and not mask[0]:
        return True
    if not all(map(is_floating, eqn.outvars)):
        return False
    alone, moving = isolate_active(jaxpr, eqn, mask)
    fun, avals = jex.core.jaxpr_as_fun(alone), alone.in_avals

    def transpose(values: list[Any], cotangents: list[Any]) -> Any:
        return jax.linear_transpose(restrict(fun, values, moving), *compress(avals, moving))(cotangents)

    try:
        jax.eval_shape(transpose, avals, alone.out_avals)
    except (NotImplementedError, AssertionError, TypeError, ValueError):  # what JAX raises where there is no rule
        return False
    return True


def _mask(variables: Sequence[Any], active: set[Var]) -> list[bool]:
    return [not isinstance(v, Literal) and v in active for v in variables]
