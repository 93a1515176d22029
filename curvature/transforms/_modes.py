"""Which compositions of forward and reverse mode are legal for a function, and how many lanes run at once.

A function is traced once; its jaxpr is read to choose a mode, and replayed to differentiate. Two kinds of primitive
decide what is legal where they stand between the input and the output:

- ``custom_vjp`` has no forward derivative. Its reverse derivative is an ordinary program, which may have either.
- ``while`` (a loop whose length is not known while tracing) has no reverse derivative.

A ``custom_jvp`` is judged by its rule and not by its body, and a linear solve by its matrix, as JAX does.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, get_args

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from curvature import _checks
from curvature._types import ChunkSize, HessianMode, JacobianMode, Tree

_ORDER = get_args(HessianMode)[1:]  # cheapest first
_OPAQUE = {"pure_callback", "io_callback", "ffi_call"}  # no derivative of any kind
_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


class Blocker(NamedTuple):
    """What stands in the way of a mode: a primitive, and the user's line that brought it in."""

    primitive: str
    where: str

    def __str__(self) -> str:
        """As it reads in an error message."""
        return f"{self.primitive} at {self.where}"


@dataclass(frozen=True)
class Program:
    """A function of one tree at a point ``x``, traced once.

    Attributes:
        fun: replays the jaxpr; returns ``(out, aux)``, of which ``out`` is differentiated.
        x: the point, only for its shapes.
        out: the shapes of ``out``.
        jaxpr: the jaxpr, or None if the function branches on values, which allows no trace but an eager one.
    """

    fun: Callable[[Tree], tuple[Any, Any]]
    x: Tree
    out: Any
    jaxpr: ClosedJaxpr | None

    @property
    def is_scalar(self) -> bool:
        """Whether ``out`` is one array of shape ()."""
        return jax.tree_util.treedef_is_leaf(jax.tree.structure(self.out)) and self.out.shape == ()

    def blocker(self, mode: str) -> Blocker | None:
        """What forbids one derivative in ``mode``, "fwd" or "rev"; None if nothing does."""
        if self.jaxpr is None:
            return None
        outputs = len(self.jaxpr.jaxpr.outvars)
        live = [i < len(jax.tree.leaves(self.out)) for i in range(outputs)]
        return _find_blocker(self.jaxpr.jaxpr, [True] * len(self.jaxpr.jaxpr.invars), live, mode)

    @cached_property
    def reverse(self) -> "Program":
        """The reverse derivative ``x -> (vjp of ones, (out, aux))``: for a scalar function its gradient."""

        def pullback(x: Tree) -> tuple[Tree, Any]:
            out, pull, aux = jax.vjp(self.fun, x, has_aux=True)
            return pull(jax.tree.map(jnp.ones_like, out))[0], (out, aux)

        return self._derived(pullback)

    @cached_property
    def forward(self) -> "Program":
        """The forward derivative ``x -> (jvp along ones, (out, aux))``."""

        def push(x: Tree) -> tuple[Tree, Any]:
            return directional_derivative(self.fun, x, jax.tree.map(jnp.ones_like, x))

        return self._derived(push)

    def _derived(self, fun: Callable[[Tree], Any]) -> "Program":
        return trace(fun, self.x) if self.jaxpr is not None else Program(fun, self.x, None, None)

    def composition_blocker(self, mode: str) -> Blocker | None:
        """What forbids two derivatives composed as ``mode``, such as "fwd_over_rev"."""
        outer, _, inner = mode.partition("_over_")
        first = self.blocker(inner)
        if first is not None:
            return first
        return (self.reverse if inner == "rev" else self.forward).blocker(outer)


def trace(fun: Callable[[Tree], Any], x: Tree) -> Program:
    """Trace ``fun``, which returns ``(out, aux)``, at ``x``."""
    try:
        jaxpr, (out, aux) = jax.make_jaxpr(fun, return_shape=True)(x)
    except _NEEDS_VALUES:  # a branch on a value: legal as long as nothing outside traces it, as for jax.hessian
        out, _ = fun(x)
        return Program(fun, x, jax.tree.map(jax.typeof, out), None)
    structure = jax.tree.structure((out, aux))

    def replay(x: Tree) -> tuple[Any, Any]:
        return structure.unflatten(jex.core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(x)))

    return Program(replay, x, out, jaxpr)


def directional_derivative(fun: Callable[[Tree], tuple[Any, Any]], x: Tree, v: Tree) -> tuple[Any, Any]:
    """``d/dt fun(x + t v)`` at 0, with ``(out, aux)`` beside it."""
    out, derivative, aux = jax.jvp(fun, (x,), (v,), has_aux=True)
    return derivative, (out, aux)


def choose_composition(function: str, program: Program, mode: HessianMode) -> str:
    """The composition to use: ``mode`` itself if it is legal, or the cheapest legal one for "auto"."""
    _checks.check_choice(function, "mode", mode, HessianMode)
    if mode != "auto":
        blocker = program.composition_blocker(mode)
        if blocker is None:
            return mode
        legal = [other for other in _ORDER if program.composition_blocker(other) is None]
        raise _checks.illegal_mode(function, mode, str(blocker), legal)
    blockers = {}
    for candidate in _ORDER:
        blockers[candidate] = program.composition_blocker(candidate)
        if blockers[candidate] is None:
            return candidate
    raise _checks.no_legal_mode(function, {name: str(blocker) for name, blocker in blockers.items()})


def choose_jacobian(function: str, program: Program, mode: JacobianMode) -> str:
    """The mode to use: ``mode`` itself if it is legal; for "auto" forward for tall Jacobians, reverse for wide."""
    _checks.check_choice(function, "mode", mode, JacobianMode)
    inputs, outputs = num_entries(program.x), num_entries(program.out)
    order = ("fwd", "rev") if inputs <= outputs else ("rev", "fwd")
    blockers = {name: program.blocker(name) for name in order}
    legal = [name for name in order if blockers[name] is None]
    if not legal:
        raise _checks.no_legal_mode(function, {name: str(blocker) for name, blocker in blockers.items()})
    if mode == "auto":
        return legal[0]
    if mode not in legal:
        raise _checks.illegal_mode(function, mode, str(blockers[mode]), legal)
    return mode


def num_entries(tree: Tree) -> int:
    """The number of entries of all leaves together."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# ---- what a jaxpr allows -----------------------------------------------------------------------------------------
# A variable is active if it carries a derivative of the input, and live if the output depends on it through active
# variables. Forward mode differentiates every active equation; reverse mode only those that are live too.


def _find_blocker(jaxpr: Jaxpr, active_in: Sequence[bool], live_out: Sequence[bool], mode: str) -> Blocker | None:
    """The first equation of ``jaxpr`` that has no derivative in ``mode``."""
    active = _active_variables(jaxpr, active_in)
    live = {v for v, is_live in zip(jaxpr.outvars, live_out, strict=True) if is_live and isinstance(v, Var)}
    found = None
    for eqn in reversed(jaxpr.eqns):
        mask = _mask(eqn.invars, active)
        passes_on = mode == "fwd" or any(v in live and v in active for v in eqn.outvars)
        if any(mask) and passes_on:
            live.update(v for v in eqn.invars if isinstance(v, Var) and v in active)
            found = _equation_blocker(eqn, mask, mode) or found
    return found


def _active_variables(jaxpr: Jaxpr, active_in: Sequence[bool]) -> set[Var]:
    active = {v for v, is_active in zip(jaxpr.invars, active_in, strict=True) if is_active}
    for eqn in jaxpr.eqns:
        mask = _mask(eqn.invars, active)
        if any(mask):
            flags = _active_outputs(eqn, mask)
            active.update(v for v, flag in zip(eqn.outvars, flags, strict=True) if flag and _is_floating(v))
    return active


def _active_outputs(eqn: JaxprEqn, mask: list[bool]) -> list[bool]:
    """Which outputs carry a derivative; True is always a safe answer."""
    name, params = eqn.primitive.name, eqn.params
    if name == "stop_gradient":
        return [False] * len(eqn.outvars)
    if name == "cond":
        branches = [_outputs_of(branch.jaxpr, mask[1:]) for branch in params["branches"]]
        return [any(flags) for flags in zip(*branches, strict=True)]
    if name == "scan":
        consts, carry = params["num_consts"], params["num_carry"]
        return _loop_outputs(params["jaxpr"].jaxpr, mask, consts, carry)
    if name == "while":
        start, consts = params["cond_nconsts"], params["body_nconsts"]
        return _loop_outputs(params["body_jaxpr"].jaxpr, mask[start:], consts, len(eqn.outvars))
    body = _called_jaxpr(eqn)
    return [True] * len(eqn.outvars) if body is None else _outputs_of(body, mask)


def _loop_outputs(body: Jaxpr, mask: list[bool], num_consts: int, num_carry: int) -> list[bool]:
    """Iterate the body until the set of active carries no longer grows."""
    consts, carry, rest = mask[:num_consts], mask[num_consts : num_consts + num_carry], mask[num_consts + num_carry :]
    while True:
        outs = _outputs_of(body, [*consts, *carry, *rest])
        grown = [a or b for a, b in zip(carry, outs, strict=False)]
        if grown == carry:
            return carry + outs[num_carry:]
        carry = grown


def _outputs_of(jaxpr: Jaxpr, active_in: Sequence[bool]) -> list[bool]:
    return _mask(jaxpr.outvars, _active_variables(jaxpr, active_in))


def _equation_blocker(eqn: JaxprEqn, mask: list[bool], mode: str) -> Blocker | None:
    """What forbids differentiating this one equation in ``mode``."""
    name, params = eqn.primitive.name, eqn.params
    blocked = name in _OPAQUE or name == ("custom_vjp_call" if mode == "fwd" else "while")
    if name == "custom_linear_solve":
        blocked = mode == "rev" and params["jaxprs"].transpose_solve is None
        if not blocked:
            return _find_blocker_anywhere(params["jaxprs"].matvec.jaxpr, mode)
    if blocked:
        return Blocker(name, jex.source_info_util.summarize(eqn.source_info))
    if name == "custom_vjp_call":
        return None
    if name == "custom_jvp_call":
        return None if mode == "fwd" else _custom_jvp_blocker(eqn, mask)
    if name == "while":
        flags = mask[params["cond_nconsts"] :]
        carry = _active_outputs(eqn, mask)
        body = params["body_jaxpr"].jaxpr
        return _find_blocker(body, flags[: params["body_nconsts"]] + carry, [True] * len(body.outvars), mode)
    if name == "scan":
        body, consts, carry = params["jaxpr"].jaxpr, params["num_consts"], params["num_carry"]
        flags = mask[:consts] + _active_outputs(eqn, mask)[:carry] + mask[consts + carry :]
        return _find_blocker(body, flags, [True] * len(body.outvars), mode)
    if name == "cond":
        bodies = [(branch.jaxpr, mask[1:]) for branch in params["branches"]]
    else:
        body = _called_jaxpr(eqn)
        bodies = [] if body is None else [(body, mask)]
    found = [_find_blocker(body, flags, [True] * len(body.outvars), mode) for body, flags in bodies]
    return next((blocker for blocker in found if blocker is not None), None)


def _find_blocker_anywhere(jaxpr: Jaxpr, mode: str) -> Blocker | None:
    return _find_blocker(jaxpr, [True] * len(jaxpr.invars), [True] * len(jaxpr.outvars), mode)


def _custom_jvp_blocker(eqn: JaxprEqn, mask: list[bool]) -> Blocker | None:
    """Reverse mode transposes the rule's tangent, so trace the rule and ask what lies between its tangents."""
    alone = eqn.params["call_jaxpr"].jaxpr  # any jaxpr will do as the one to put the equation in
    invars = [v for v in eqn.invars if isinstance(v, Var)]
    distinct = list(dict.fromkeys(invars))
    jaxpr = alone.replace(
        constvars=[],
        invars=distinct,
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=alone.debug_info.with_unknown_names(),
    )
    fun = jex.core.jaxpr_as_fun(ClosedJaxpr(jaxpr, []))
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
    return _find_blocker(rule, [False] * len(values) + [True] * len(tangents), [True] * len(rule.outvars), "rev")


def _called_jaxpr(eqn: JaxprEqn) -> Jaxpr | None:
    """The body of a call-like equation, whose inputs are the body's inputs one for one: jit, remat, and the like."""
    if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):  # judged by their rules: every output counts
        return None
    for body in jex.core.jaxprs_in_params(eqn.params):
        if len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars):
            return body
    return None


def _mask(variables: Sequence[Any], active: set[Var]) -> list[bool]:
    return [not isinstance(v, Literal) and v in active for v in variables]


def _is_floating(v: Any) -> bool:
    return jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact)


# ---- how many lanes at once --------------------------------------------------------------------------------------

_CACHE_BYTES = 2 * 2**20
"""What one operation may write for all lanes of a chunk together on a CPU: ours, measured by benchmarks/hessian.py."""

_LEAST_CHUNK = 8  # below this the matrix products of a chunk are too thin to be fast
_MEMORY_SHARE = 8  # on an accelerator a chunk may take one part in eight of the memory


def num_chunks(lanes: int, chunk_size: ChunkSize, lane: Callable[..., Any], *one_lane: Any) -> int:
    """Into how many equal chunks to cut ``lanes`` lanes, where one lane is ``lane(*one_lane)``."""
    if chunk_size is None or lanes <= 1:
        return 1
    if chunk_size == "auto":
        if lanes <= _LEAST_CHUNK:
            return 1
        chunk_size = _auto_chunk(_equation_bytes(jax.make_jaxpr(lane)(*one_lane).jaxpr))
    return math.ceil(lanes / chunk_size)


def _auto_chunk(sizes: list[int]) -> int:
    if jax.default_backend() == "cpu":
        return max(_LEAST_CHUNK, _CACHE_BYTES // max(sizes))
    memory = jax.local_devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", 8 * 2**30) - memory.get("bytes_in_use", 0)
    return max(_LEAST_CHUNK, free // _MEMORY_SHARE // sum(sizes))


def _equation_bytes(jaxpr: Jaxpr) -> list[int]:
    """The bytes that each equation writes for one lane; what no lane's input reaches is shared and costs nothing."""
    of_lane = set(jaxpr.invars)
    sizes = [1]
    for eqn in jaxpr.eqns:
        if any(_mask(eqn.invars, of_lane)):
            of_lane.update(eqn.outvars)
            outs: list[Any] = [v.aval for v in eqn.outvars]
            sizes.append(sum(aval.size * aval.dtype.itemsize for aval in outs if hasattr(aval, "size")))
            for body in jex.core.jaxprs_in_params(eqn.params):
                sizes += _equation_bytes(body)
    return sizes
