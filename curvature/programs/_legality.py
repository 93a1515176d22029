"""Which derivatives a jaxpr allows: what stands between its inputs and its outputs that has none in a mode.

Two kinds of primitive decide:

- ``custom_vjp`` has no forward derivative. Its reverse derivative is an ordinary program, which may have either.
- ``while`` (a loop whose length is not known while tracing) has no reverse derivative.

A ``custom_jvp`` is judged by its rule and not by its body, and a linear solve by its matrix, as JAX does.

A variable is active if it carries a derivative of the input, and live if the output depends on it through active
variables. Forward mode differentiates every active equation; reverse mode only those that are live too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from curvature.programs._jaxprs import called_jaxpr, count_of_equal_rank, equation_function, is_floating, open_jaxpr

_LINEAR = {
    "add", "add_any", "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "neg", "reduce_sum",
    "reshape", "squeeze", "sub", "transpose",
}  # fmt: skip
_LINEAR_IN_ONE = {"mul", "dot_general"}  # in either factor, not in both

_OPAQUE = {"pure_callback", "io_callback", "ffi_call"}  # no derivative of any kind


class Blocker(NamedTuple):
    """What stands in the way of a mode: a primitive, and the user's line that brought it in."""

    primitive: str
    where: str

    def __str__(self) -> str:
        """As it reads in an error message."""
        return f"{self.primitive} at {self.where}"


class _Search(NamedTuple):
    """What is looked for in a jaxpr and its nested bodies.

    Attributes:
        judge: from a jaxpr, one active equation of it and its active operands to what the equation is reported as;
            None if it is not wanted. Calls, loops and branches are opened instead.
        only_live: whether an equation counts only if the output depends on it.
    """

    judge: Callable[[Jaxpr, JaxprEqn, list[bool]], Blocker | None]
    only_live: bool


def find_blocker(jaxpr: Jaxpr, active_in: Sequence[bool], live_out: Sequence[bool], mode: str) -> Blocker | None:
    """The first equation of ``jaxpr`` that has no derivative in ``mode``, "fwd" or "rev"."""
    search = _Search(_without_forward, False) if mode == "fwd" else _Search(_without_reverse, True)
    return _walk_back(jaxpr, active_in, live_out, search)[0]


def find_equation(
    jaxpr: Jaxpr,
    active_in: Sequence[bool],
    live_out: Sequence[bool],
    wanted: Callable[[Jaxpr, JaxprEqn, list[bool]], bool],
) -> Blocker | None:
    """The first equation that carries a derivative from the inputs to the outputs and is ``wanted``.

    ``wanted`` sees the jaxpr that holds the equation, the equation, and which of its operands are active.
    """

    def judge(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> Blocker | None:
        return blocker_at(eqn) if wanted(jaxpr, eqn, mask) else None

    return _walk_back(jaxpr, active_in, live_out, _Search(judge, True))[0]


def blocker_at(eqn: JaxprEqn) -> Blocker:
    """An equation as it is reported."""
    return Blocker(eqn.primitive.name, jex.source_info_util.summarize(eqn.source_info))


def _walk_back(
    jaxpr: Jaxpr, active_in: Sequence[bool], live_out: Sequence[bool], search: _Search
) -> tuple[Blocker | None, list[bool]]:
    """The first equation that is looked for, and which inputs are live."""
    active = _active_variables(jaxpr, active_in)
    live = {v for v, is_live in zip(jaxpr.outvars, live_out, strict=True) if is_live and isinstance(v, Var)}
    found = None
    for eqn in reversed(jaxpr.eqns):
        mask = _mask(eqn.invars, active)
        live_outs = [not search.only_live or (v in live and v in active) for v in eqn.outvars]
        if any(mask) and any(live_outs):
            blocker, live_ins = _judge(jaxpr, eqn, mask, live_outs, search)
            live.update(v for v, is_live in zip(eqn.invars, live_ins, strict=True) if is_live and isinstance(v, Var))
            found = blocker or found
    return found, _mask(jaxpr.invars, live & active)


def _active_variables(jaxpr: Jaxpr, active_in: Sequence[bool]) -> set[Var]:
    active = {v for v, is_active in zip(jaxpr.invars, active_in, strict=True) if is_active}
    for eqn in jaxpr.eqns:
        mask = _mask(eqn.invars, active)
        if any(mask):
            flags = active_outputs(eqn, mask)
            active.update(v for v, flag in zip(eqn.outvars, flags, strict=True) if flag and is_floating(v))
    return active


def active_outputs(eqn: JaxprEqn, mask: list[bool]) -> list[bool]:
    """Which outputs carry a derivative; True is always a safe answer."""
    name, params = eqn.primitive.name, eqn.params
    if name == "stop_gradient":
        return [False] * len(eqn.outvars)
    if name == "cond":
        branches = [outputs_of(open_jaxpr(branch), mask[1:]) for branch in params["branches"]]
        return [any(flags) for flags in zip(*branches, strict=True)]
    if name in ("scan", "while"):
        return loop_outputs(*open_loop(eqn, mask))
    body = called_jaxpr(eqn)
    return [True] * len(eqn.outvars) if body is None else outputs_of(body, mask)


class _Loop(NamedTuple):
    """The body of a loop, and which of its inputs are active when it starts: constants, carries, slices."""

    body: Jaxpr
    consts: list[bool]
    carry: list[bool]
    slices: list[bool]


def open_loop(eqn: JaxprEqn, mask: list[bool]) -> _Loop:
    params = eqn.params
    if eqn.primitive.name == "while":
        mask, consts = mask[params["cond_nconsts"] :], params["body_nconsts"]
        return _Loop(open_jaxpr(params["body_jaxpr"]), mask[:consts], mask[consts:], [])
    body = open_jaxpr(params["jaxpr"])  # what is scanned over or stacked has one axis more outside than inside
    carry = count_of_equal_rank(eqn.outvars, body.outvars)
    consts = count_of_equal_rank(eqn.invars, body.invars) - carry
    return _Loop(body, mask[:consts], mask[consts : consts + carry], mask[consts + carry :])


def loop_outputs(body: Jaxpr, consts: list[bool], carry: list[bool], slices: list[bool]) -> list[bool]:
    """Iterate the body until the set of active carries no longer grows."""
    while True:
        outs = outputs_of(body, consts + carry + slices)
        grown = [a or b for a, b in zip(carry, outs, strict=False)]
        if grown == carry:
            return carry + outs[len(carry) :]
        carry = grown


def outputs_of(jaxpr: Jaxpr, active_in: Sequence[bool]) -> list[bool]:
    return _mask(jaxpr.outvars, _active_variables(jaxpr, active_in))


def _without_forward(_: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> Blocker | None:
    """What has no derivative in forward mode."""
    return blocker_at(eqn) if eqn.primitive.name in _OPAQUE | {"custom_vjp_call"} else None


def _without_reverse(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> Blocker | None:
    """What has no derivative in reverse mode."""
    name, params = eqn.primitive.name, eqn.params
    if name in _OPAQUE or name == "while":
        return blocker_at(eqn)
    if name == "custom_linear_solve":
        return blocker_at(eqn) if params["jaxprs"].transpose_solve is None else None
    return _custom_jvp_blocker(jaxpr, eqn, mask) if name == "custom_jvp_call" else None


def _judge(
    jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool], live_outs: list[bool], search: _Search
) -> tuple[Blocker | None, list[bool]]:
    """What is found in this one equation or its bodies, and which of its inputs are live."""
    name, params = eqn.primitive.name, eqn.params
    found = search.judge(jaxpr, eqn, mask)
    if found is not None:
        return found, mask
    if name == "custom_linear_solve":
        matvec = open_jaxpr(params["jaxprs"].matvec)
        return _walk_back(matvec, [True] * len(matvec.invars), [True] * len(matvec.outvars), search)[0], mask
    if name in ("scan", "while"):
        return _judge_loop(open_loop(eqn, mask), live_outs, search)
    if name == "cond":
        judged = [_walk_back(open_jaxpr(branch), mask[1:], live_outs, search) for branch in params["branches"]]
        blockers, lives = zip(*judged, strict=True)
        live_ins = [any(flags) for flags in zip(*lives, strict=True)]
        return next((blocker for blocker in blockers if blocker is not None), None), [False, *live_ins]
    body = called_jaxpr(eqn)
    return (None, mask) if body is None else _walk_back(body, mask, live_outs, search)


def _judge_loop(loop: _Loop, live_outs: list[bool], search: _Search) -> tuple[Blocker | None, list[bool]]:
    """Iterate backward until the set of live carries no longer grows."""
    size = len(loop.carry)
    active_in = loop.consts + loop_outputs(*loop)[:size] + loop.slices
    carry, stacked = live_outs[:size], live_outs[size:]
    while True:
        blocker, live_ins = _walk_back(loop.body, active_in, carry + stacked, search)
        grown = [a or b for a, b in zip(carry, live_ins[len(loop.consts) :], strict=False)]
        if grown == carry:
            return blocker, live_ins
        carry = grown


def is_collective(eqn: JaxprEqn) -> bool:
    """Whether an equation takes what other devices of a mesh hold, inside ``jax.shard_map``."""
    named = eqn.params.get("axes", ()), eqn.params.get("axis_name", ())
    names = [axis for axes in named for axis in (axes if isinstance(axes, tuple | list) else (axes,))]
    return eqn.primitive.name not in ("pvary", "pcast") and any(isinstance(axis, str) for axis in names)


def _custom_jvp_blocker(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> Blocker | None:
    """Reverse mode transposes the rule's tangent, so trace the rule and ask what lies between its tangents."""
    fun, distinct = equation_function(jaxpr, eqn)
    active = {v for v, is_active in zip(eqn.invars, mask, strict=True) if is_active}
    moving = [v in active for v in distinct]

    def tangents_out(values: list[Any], tangents: list[Any]) -> list[Any]:
        def along(*moved: Any) -> list[Any]:
            rest = iter(moved)
            return fun(*[next(rest) if m else value for m, value in zip(moving, values, strict=True)])

        primals = tuple(value for m, value in zip(moving, values, strict=True) if m)
        return jax.jvp(along, primals, tuple(tangents))[1]

    values = [v.aval for v in distinct]
    tangents = [v.aval for v, m in zip(distinct, moving, strict=True) if m]
    rule = jax.make_jaxpr(tangents_out)(values, tangents).jaxpr
    of_tangents = [False] * len(values) + [True] * len(tangents)
    return find_blocker(rule, of_tangents, [True] * len(rule.outvars), "rev") or _not_linear(rule, of_tangents)


def _not_linear(jaxpr: Jaxpr, of_tangents: Sequence[bool]) -> Blocker | None:
    """The first equation that JAX cannot transpose, with those inputs as tangents; bodies of calls are opened.

    Whatever depends on the tangents counts, comparisons too: JAX transposes every equation that does.
    """
    tangents = {v for v, is_tangent in zip(jaxpr.invars, of_tangents, strict=True) if is_tangent}
    for eqn in jaxpr.eqns:
        mask = _mask(eqn.invars, tangents)
        if not any(mask):
            continue
        tangents.update(eqn.outvars)
        body = called_jaxpr(eqn)
        found = None if body is None else _not_linear(body, mask)
        if found is None and body is None and not _has_transpose(jaxpr, eqn, mask):
            found = blocker_at(eqn)
        if found is not None:
            return found
    return None


def _has_transpose(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> bool:
    """Whether JAX can transpose one equation with respect to the operands in the mask."""
    name, outs = eqn.primitive.name, eqn.outvars
    if name in _LINEAR or (name in _LINEAR_IN_ONE and sum(mask) == 1) or (name == "select_n" and not mask[0]):
        return True
    if not all(is_floating(v) for v in outs):
        return False
    fun, distinct = equation_function(jaxpr, eqn)
    active = {v for v, is_active in zip(eqn.invars, mask, strict=True) if is_active}

    def transpose(rest: list[Any], cotangents: list[Any]) -> Any:
        def linear(*tangents: Any) -> list[Any]:
            moving, fixed = iter(tangents), iter(rest)
            return fun(*[next(moving) if v in active else next(fixed) for v in distinct])

        return jax.linear_transpose(linear, *[v.aval for v in distinct if v in active])(cotangents)

    try:
        jax.eval_shape(transpose, [v.aval for v in distinct if v not in active], [v.aval for v in outs])
    except (NotImplementedError, AssertionError, TypeError, ValueError):  # what JAX raises where there is no rule
        return False
    return True


def _mask(variables: Sequence[Any], active: set[Var]) -> list[bool]:
    return [not isinstance(v, Literal) and v in active for v in variables]
