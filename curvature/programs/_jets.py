"""Collapsed Taylor mode: a jaxpr evaluated on values, first derivatives along K directions, and summed second ones.

For directions ``v_k`` every variable ``y`` carries ``J[k] = dy[v_k]`` and ``L = sum_k d^2 y[v_k, v_k]``. An equation
``y = p(u)`` maps them by

    J_y[k] = p'(u) J_u[k],        L_y = p'(u) L_u + sum_k p''(u)[J_u[k], J_u[k]],

so second derivatives are summed where they arise, and nothing but this one equation is ever differentiated twice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from curvature.programs._jaxprs import is_floating, lone_equation, open_jaxpr
from curvature.programs._legality import active_outputs, loop_outputs, open_loop, outputs_of
from curvature.programs._pushforward import LINEAR_BY_ENTRY, Pushforward, is_elementwise, pushforward

FUNCTION = "laplacian"  # as it is named in errors
BY_ENTRY = "entry by entry"
BY_REVERSE = "each direction, by reverse mode"


class Jet(NamedTuple):
    """What a variable carries; None stands for a derivative that is zero.

    Attributes:
        value: the variable itself.
        jac: its derivatives along the K directions, ``(K,) + value.shape``.
        lap: the sum of its second derivatives along them, shaped like ``value``.
    """

    value: Any
    jac: Any = None
    lap: Any = None


class Chain(NamedTuple):
    """A variable that is a function of another one, entry by entry; the directions wait until they are needed.

    Attributes:
        value: the variable itself.
        root: the jet of the other one.
        slope: the derivative by the other one, shaped like ``value``.
        bend: the second derivative, or None.
    """

    value: Any
    root: Jet
    slope: Any
    bend: Any


class Step(NamedTuple):
    """How one equation was differentiated: its primitive, the rule, and the user's line that brought it in."""

    primitive: str
    rule: str
    where: str


def push_jets(jaxpr: Jaxpr, consts: Sequence[Any], jets: Sequence[Jet], log: list[Step]) -> list[Jet]:
    """Evaluate ``jaxpr`` on jets; ``log`` takes down how each equation was differentiated."""
    env: dict[Var, Jet | Chain] = dict(zip(jaxpr.constvars, map(Jet, consts), strict=True))
    env.update(zip(jaxpr.invars, jets, strict=True))

    def read(variables: Sequence[Any]) -> list[Jet | Chain]:
        return [Jet(_literal(v)) if isinstance(v, Literal) else env[v] for v in variables]

    for eqn in jaxpr.eqns:
        closed = lone_equation(jaxpr, eqn)
        alone = _Equation(eqn, closed, [env[v] for v in closed.jaxpr.invars], read(eqn.invars))
        env.update(zip(eqn.outvars, _push_equation(alone, log), strict=True))
    return [_expand(jet) for jet in read(jaxpr.outvars)]


def _literal(v: Any) -> Any:
    return jnp.asarray(v.val, v.aval.dtype)


def _dense(jet: Jet, directions: int) -> Jet:
    """The jet with its zeros written out. Inside ``shard_map`` all parts vary over the axes that the value does."""
    zeros = jnp.zeros_like(jet.value)
    jac = jnp.broadcast_to(zeros, (directions, *zeros.shape)) if jet.jac is None else jet.jac + zeros[None]
    return Jet(jet.value, jac, zeros if jet.lap is None else jet.lap + zeros)


# ---- one equation ------------------------------------------------------------------------------------------------


class _Equation(NamedTuple):
    """An equation, the jaxpr of it alone, what that jaxpr's distinct variables carry, and what the inputs do."""

    eqn: JaxprEqn
    closed: ClosedJaxpr
    jets: list[Any]
    ins: list[Any]

    @property
    def values(self) -> list[Any]:
        return [jet.value for jet in self.jets]

    @property
    def outputs(self) -> list[Any]:
        return jex.core.jaxpr_as_fun(self.closed)(*self.values)

    @property
    def active(self) -> list[int]:
        """Which of the distinct variables carry derivatives."""
        return [i for i, jet in enumerate(self.jets) if isinstance(jet, Chain) or jet.jac is not None]

    def expanded(self) -> "_Equation":
        """The same, with jets alone."""
        return self._replace(jets=[_expand(jet) for jet in self.jets], ins=[_expand(jet) for jet in self.ins])

    def step(self, rule: str) -> Step:
        return Step(self.eqn.primitive.name, rule, jex.source_info_util.summarize(self.eqn.source_info))


def _push_equation(alone: _Equation, log: list[Step]) -> Sequence[Jet | Chain]:
    name, active = alone.eqn.primitive.name, alone.active
    if not active:
        return [Jet(value) for value in alone.outputs]
    if is_elementwise(alone.closed, active):
        one_root = len({id(_root(alone.jets[i])) for i in active}) == 1
        if one_root or name not in LINEAR_BY_ENTRY:
            log.append(alone.step(BY_ENTRY))
            return [_push_chain(alone) if one_root else _push_elementwise(alone.expanded())]
    return _STRUCTURAL.get(name, _push_generic)(alone.expanded(), log)


# ---- entry by entry ----------------------------------------------------------------------------------------------


def _root(jet: Jet | Chain) -> Jet:
    return jet.root if isinstance(jet, Chain) else jet


def _expand(jet: Jet | Chain) -> Jet:
    """``J = f' J_r`` and ``L = f' L_r + f'' sum_k J_r[k]^2``, for the root r."""
    if isinstance(jet, Jet):
        return jet
    value, root, slope, bend = jet
    terms = [] if root.lap is None else [slope * root.lap]
    terms += [] if bend is None else [bend * jnp.sum(root.jac**2, axis=0)]
    return Jet(value, slope[None] * root.jac, _total(terms))


def _push_chain(alone: _Equation) -> Jet | Chain:
    """A function of functions of one root: ``f' = sum_i f_i s_i`` and ``f'' = sum_i f_i b_i + sum_ij f_ij s_i s_j``."""
    jets = [alone.jets[i] for i in alone.active]
    chains = [jet if isinstance(jet, Chain) else Chain(jet.value, jet, jnp.ones_like(jet.value), None) for jet in jets]
    first, second = _partials(alone)
    slope = _total([f_i * chains[i].slope for i, f_i in first.items()])
    bend = [f_i * chains[i].bend for i, f_i in first.items() if chains[i].bend is not None]
    bend += [f_ij * chains[i].slope * chains[j].slope for (i, j), f_ij in second.items()]
    value = alone.outputs[0]
    return Jet(value) if slope is None else Chain(value, chains[0].root, slope, _total(bend))


def _push_elementwise(alone: _Equation) -> Jet:
    """``J = sum_i f_i J_i`` and ``L = sum_i f_i L_i + sum_ij f_ij sum_k J_i[k] J_j[k]``."""
    jets = [alone.jets[i] for i in alone.active]
    first, second = _partials(alone)
    lap = [f_i * jets[i].lap for i, f_i in first.items() if jets[i].lap is not None]
    lap += [f_ij * jnp.sum(jets[i].jac * jets[j].jac, axis=0) for (i, j), f_ij in second.items()]
    jac = _total([f_i[None] * jets[i].jac for i, f_i in first.items()])
    return Jet(alone.outputs[0], jac, _total(lap))


def _partials(alone: _Equation) -> tuple[dict[int, Any], dict[tuple[int, int], Any]]:
    """The partial derivatives f_i and f_ij by the active arguments that are not zero; f_ij twice over for j < i."""
    values, active = alone.values, alone.active
    first, second = {}, {}
    for n, i in enumerate(active):
        slope = pushforward(FUNCTION, alone.closed, _one_hot(i, values)).jaxpr
        ones = jnp.ones_like(values[i])
        if not outputs_of(slope.jaxpr, [False] * len(values) + [True])[0]:
            continue
        first[n] = jex.core.jaxpr_as_fun(slope)(*values, ones)[0]
        for m, j in enumerate(active[: n + 1]):
            moving = [*_one_hot(j, values), False]
            if outputs_of(slope.jaxpr, moving)[0]:
                bend = pushforward(FUNCTION, slope, moving).along([*values, ones], [jnp.ones_like(values[j])])[0]
                second[n, m] = bend if n == m else 2 * bend
    return first, second


def _one_hot(i: int, values: Sequence[Any]) -> list[bool]:
    return [n == i for n in range(len(values))]


# ---- any equation ------------------------------------------------------------------------------------------------


def _push_generic(alone: _Equation, log: list[Step]) -> list[Jet]:
    """Any equation: its first derivative of ``J`` and ``L``, and, where it is not linear, its second of ``J``."""
    values, active = alone.values, alone.active
    jets = [alone.jets[i] for i in active]
    moving, still = [i in active for i in range(len(values))], [False] * len(active)
    first = pushforward(FUNCTION, alone.closed, moving)
    reached = outputs_of(first.jaxpr.jaxpr, [False] * len(moving) + [True] * len(active))
    bent = outputs_of(first.jaxpr.jaxpr, moving + still)
    jacs = jax.vmap(lambda v: first.along(values, v))([jet.jac for jet in jets])
    laps: list[list[Any]] = [[] for _ in jacs]
    if any(jet.lap is not None for jet in jets):
        summed = [jnp.zeros_like(jet.value) if jet.lap is None else jet.lap for jet in jets]
        laps = [[term] for term in first.along(values, summed)]
    rule = "linear"
    if any(bent):
        rule, seconds = _second(alone, first, moving + still)
        for terms, second, is_bent in zip(laps, seconds, bent, strict=True):
            terms += [second] if is_bent else []
    log.append(alone.step(rule if first.mode == "fwd" else BY_REVERSE))
    pairs = iter(zip(reached, jacs, laps, strict=True))
    outs = []
    for v, value in zip(alone.eqn.outvars, alone.outputs, strict=True):
        is_reached, jac, terms = next(pairs) if is_floating(v) else (False, None, [])
        outs.append(Jet(value, jac, _total(terms)) if is_reached else Jet(value))
    return outs


def _second(alone: _Equation, first: Pushforward, moving: list[bool]) -> tuple[str, list[Any]]:
    """The rule taken, and ``sum_k p''(u)[J[k], J[k]]``."""
    name = alone.eqn.primitive.name
    if name in ("dot_general", "mul", "conv_general_dilated"):
        return "bilinear", [_dot_second(alone) if name == "dot_general" else _product_second(alone)]
    jacs = [alone.jets[i].jac for i in alone.active]
    second = pushforward(FUNCTION, first.jaxpr, moving)
    each = jax.vmap(lambda v: second.along([*alone.values, *v], v))(jacs)
    return "each direction" if second.mode == "fwd" else BY_REVERSE, [jnp.sum(array, axis=0) for array in each]


def _dot_second(alone: _Equation) -> Any:
    """``2 sum_k dA[k] dB[k]``: the directions are one more axis to contract."""
    params = dict(alone.eqn.params)
    (left_axes, right_axes), (left_batch, right_batch) = params.pop("dimension_numbers")

    def shifted(axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(axis + 1 for axis in axes)

    contracted = (0, *shifted(left_axes)), (0, *shifted(right_axes))
    left, right = (jet.jac for jet in alone.ins)
    return 2 * jax.lax.dot_general(left, right, (contracted, (shifted(left_batch), shifted(right_batch))), **params)


def _product_second(alone: _Equation) -> Any:
    """``2 sum_k dA[k] dB[k]`` of any product: the equation itself, of the derivatives of both factors."""
    each = jax.vmap(jex.core.jaxpr_as_fun(alone.closed))(*[jet.jac for jet in alone.jets])[0]
    return 2 * jnp.sum(each, axis=0)


def _total(terms: Sequence[Any]) -> Any:
    """The sum of arrays; None, which is zero, of none."""
    return functools.reduce(jnp.add, terms) if terms else None


# ---- calls, branches, loops --------------------------------------------------------------------------------------


def _push_call(alone: _Equation, log: list[Step]) -> list[Jet]:
    return _push_closed(alone.eqn.params["jaxpr"], alone.ins, log)


def _push_closed(closed: Any, jets: Sequence[Jet], log: list[Step]) -> list[Jet]:
    """``push_jets`` of a parameter, which is a closed jaxpr or, without constants, an open one."""
    return push_jets(open_jaxpr(closed), getattr(closed, "consts", ()), jets, log)


def _push_remat(alone: _Equation, log: list[Step]) -> list[Jet]:
    """What the user wants computed again in reverse mode still is."""
    params = alone.eqn.params
    options = {"prevent_cse": params["prevent_cse"], "policy": params["policy"]}
    return jax.checkpoint(lambda ins: _push_closed(params["jaxpr"], ins, log), **options)(alone.ins)


def _push_cond(alone: _Equation, log: list[Step]) -> list[Jet]:
    """A variable is active after the branches if it is in any of them."""
    directions = _num_directions(alone)
    active = active_outputs(alone.eqn, [jet.jac is not None for jet in alone.ins])

    def along(branch: Any) -> Callable[..., list[Jet]]:
        return lambda *ins: _align(_push_closed(branch, ins, log), active, directions)

    index, *operands = alone.ins
    return jax.lax.switch(index.value, [along(branch) for branch in alone.eqn.params["branches"]], *operands)


def _push_scan(alone: _Equation, log: list[Step]) -> list[Jet]:
    """The carry takes its derivatives along; which carries have any is known before the first step."""
    params, directions = alone.eqn.params, _num_directions(alone)
    loop = open_loop(alone.eqn, [jet.jac is not None for jet in alone.ins])
    num_consts, num_carry = len(loop.consts), len(loop.carry)
    active = loop_outputs(*loop)[:num_carry]
    consts, carry = alone.ins[:num_consts], alone.ins[num_consts : num_consts + num_carry]

    def step(carry: list[Jet], slices: list[Jet]) -> tuple[list[Jet], list[Jet]]:
        outs = _push_closed(params["jaxpr"], [*consts, *carry, *slices], log)
        return _align(outs[:num_carry], active, directions), outs[num_carry:]

    slices = [_move_directions(jet, 0, 1) for jet in alone.ins[num_consts + num_carry :]]
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = jax.lax.scan(step, _align(carry, active, directions), slices, **options)
    return carry + [_move_directions(jet, 1, 0) for jet in stacked]


def _push_while(alone: _Equation, log: list[Step]) -> list[Jet]:
    """As a scan; the condition sees values alone."""
    params, directions = alone.eqn.params, _num_directions(alone)
    loop = open_loop(alone.eqn, [jet.jac is not None for jet in alone.ins])
    active = loop_outputs(*loop)
    split = params["cond_nconsts"], params["cond_nconsts"] + len(loop.consts)
    tested, consts, carry = alone.ins[: split[0]], alone.ins[split[0] : split[1]], alone.ins[split[1] :]

    def proceeds(carry: list[Jet]) -> Any:
        return _push_closed(params["cond_jaxpr"], [Jet(jet.value) for jet in [*tested, *carry]], [])[0].value

    def step(carry: list[Jet]) -> list[Jet]:
        return _align(_push_closed(params["body_jaxpr"], [*consts, *carry], log), active, directions)

    return jax.lax.while_loop(proceeds, step, _align(carry, active, directions))


def _num_directions(alone: _Equation) -> int:
    return alone.jets[alone.active[0]].jac.shape[0]


def _align(jets: Sequence[Jet], active: Sequence[bool], directions: int) -> list[Jet]:
    """Jets of one structure: with all derivatives where they are active, with none elsewhere."""
    return [_dense(jet, directions) if flag else Jet(jet.value) for jet, flag in zip(jets, active, strict=True)]


def _move_directions(jet: Jet, source: int, target: int) -> Jet:
    return jet if jet.jac is None else jet._replace(jac=jnp.moveaxis(jet.jac, source, target))


_STRUCTURAL: dict[str, Callable[[_Equation, list[Step]], list[Jet]]] = {
    "jit": _push_call,
    "pjit": _push_call,
    "remat2": _push_remat,
    "checkpoint": _push_remat,
    "cond": _push_cond,
    "scan": _push_scan,
    "while": _push_while,
}
