"""Collapsed Taylor mode: values, first derivatives along K directions, and the sum of the second derivatives.

For directions ``v_k`` every variable ``y`` carries ``J[k] = dy[v_k]`` and ``L = sum_k d^2 y[v_k, v_k]``. An equation
``y = p(u)`` maps them by

    J_y[k] = p'(u) J_u[k],        L_y = p'(u) L_u + sum_k p''(u)[J_u[k], J_u[k]],

so second derivatives are summed where they arise, and only single equations are ever differentiated twice.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from curvature.programs._jaxprs import is_floating, isolate_equation, open_jaxpr, open_loop
from curvature.programs._legality import active_equation_outputs, active_outputs
from curvature.programs._primitives import BILINEAR, LINEAR_ENTRYWISE
from curvature.programs._pushforward import Pushforward, is_elementwise, pushforward

BY_ENTRY = "entry by entry"
BY_REVERSE = "each direction, by reverse mode"


class Jet(NamedTuple):
    """A variable with its derivatives; None stands for a derivative that is zero.

    Attributes:
        value: the variable itself.
        jac: its derivatives along the K directions, ``(K,) + value.shape``.
        lap: the sum of its second derivatives along the directions, shaped like ``value``.
    """

    value: Any
    jac: Any = None
    lap: Any = None


class Chain(NamedTuple):
    """A variable that is a function of another variable, its root, entry by entry.

    A chain of entrywise equations multiplies slopes, not K directions; ``_expand`` multiplies by the directions once.

    Attributes:
        value: the variable itself.
        root: the jet of the root.
        slope: the derivative with respect to the root, shaped like ``value``.
        bend: the second derivative with respect to the root, or None where it is zero.
    """

    value: Any
    root: Jet
    slope: Any
    bend: Any


class Step(NamedTuple):
    """How one equation was differentiated: its primitive, the rule, and the user's line that it comes from."""

    primitive: str
    rule: str
    where: str


def push_jets(jaxpr: Jaxpr, consts: Sequence[Any], jets: Sequence[Jet], log: list[Step]) -> list[Jet]:
    """Evaluate ``jaxpr`` on jets, and append to ``log`` how each equation was differentiated."""
    env: dict[Var, Jet | Chain] = dict(zip(jaxpr.constvars, map(Jet, consts), strict=True))
    env.update(zip(jaxpr.invars, jets, strict=True))

    def read(variables: Sequence[Any]) -> list[Jet | Chain]:
        return [Jet(_literal(v)) if isinstance(v, Literal) else env[v] for v in variables]

    for eqn in jaxpr.eqns:
        closed = isolate_equation(jaxpr, eqn)
        alone = _Equation(eqn, closed, [env[v] for v in closed.jaxpr.invars], read(eqn.invars))
        env.update(zip(eqn.outvars, _push_equation(alone, log), strict=True))
    return [_expand(jet) for jet in read(jaxpr.outvars)]


def _literal(v: Any) -> Any:
    return jnp.asarray(v.val, v.aval.dtype)


# ---- one equation ------------------------------------------------------------------------------------------------


class _Equation(NamedTuple):
    """One equation with the jets of its operands.

    Attributes:
        eqn: the equation.
        closed: the jaxpr of this equation alone, a function of its distinct variables.
        jets: the jets of these distinct variables.
        ins: the jets of the operands, one for each operand.
    """

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
        """The numbers of the distinct variables that carry derivatives."""
        return [i for i, jet in enumerate(self.jets) if isinstance(jet, Chain) or jet.jac is not None]

    @property
    def mask(self) -> list[bool]:
        """Which operands carry derivatives."""
        return [jet.jac is not None for jet in self.ins]

    def expanded(self) -> "_Equation":
        """The same equation with each chain expanded to a jet."""
        return self._replace(jets=[_expand(jet) for jet in self.jets], ins=[_expand(jet) for jet in self.ins])

    def step(self, rule: str) -> Step:
        return Step(self.eqn.primitive.name, rule, jex.source_info_util.summarize(self.eqn.source_info))


def _push_equation(alone: _Equation, log: list[Step]) -> Sequence[Jet | Chain]:
    name, active = alone.eqn.primitive.name, alone.active
    if not active:
        return [Jet(value) for value in alone.outputs]
    if is_elementwise(alone.closed, active):
        roots = [jet.root if isinstance(jet, Chain) else jet for jet in (alone.jets[i] for i in active)]
        one_root = len(set(map(id, roots))) == 1
        if one_root or name not in LINEAR_ENTRYWISE:
            log.append(alone.step(BY_ENTRY))
            return [_push_chain(alone) if one_root else _push_elementwise(alone.expanded())]
    return RULES.get(name, _push_generic)(alone.expanded(), log)


# ---- entry by entry ----------------------------------------------------------------------------------------------


def _expand(jet: Jet | Chain) -> Jet:
    """``J = f' J_r`` and ``L = f' L_r + f'' sum_k J_r[k]^2``, for the root r."""
    if isinstance(jet, Jet):
        return jet
    value, root, slope, bend = jet
    terms = [] if root.lap is None else [slope * root.lap]
    terms += [] if bend is None else [bend * jnp.sum(root.jac**2, axis=0)]
    return Jet(value, slope[None] * root.jac, _sum_terms(terms))


def _push_chain(alone: _Equation) -> Jet | Chain:
    """A function of functions of one root: ``f' = sum_i f_i s_i`` and ``f'' = sum_i f_i b_i + sum_ij f_ij s_i s_j``."""
    jets = [alone.jets[i] for i in alone.active]
    chains = [jet if isinstance(jet, Chain) else Chain(jet.value, jet, jnp.ones_like(jet.value), None) for jet in jets]
    first, second = _partials(alone)
    slope = _sum_terms([f_i * chains[i].slope for i, f_i in first.items()])
    bend = [f_i * chains[i].bend for i, f_i in first.items() if chains[i].bend is not None]
    bend += [f_ij * chains[i].slope * chains[j].slope for (i, j), f_ij in second.items()]
    value = alone.outputs[0]
    return Jet(value) if slope is None else Chain(value, chains[0].root, slope, _sum_terms(bend))


def _push_elementwise(alone: _Equation) -> Jet:
    """``J = sum_i f_i J_i`` and ``L = sum_i f_i L_i + sum_ij f_ij sum_k J_i[k] J_j[k]``."""
    jets = [alone.jets[i] for i in alone.active]
    first, second = _partials(alone)
    lap = [f_i * jets[i].lap for i, f_i in first.items() if jets[i].lap is not None]
    lap += [f_ij * jnp.sum(jets[i].jac * jets[j].jac, axis=0) for (i, j), f_ij in second.items()]
    jac = _sum_terms([f_i[None] * jets[i].jac for i, f_i in first.items()])
    return Jet(alone.outputs[0], jac, _sum_terms(lap))


def _partials(alone: _Equation) -> tuple[dict[int, Any], dict[tuple[int, int], Any]]:
    """The nonzero partial derivatives f_i and f_ij with respect to the active arguments; f_ij is doubled for j < i."""
    values, active = alone.values, alone.active
    first, second = {}, {}
    for n, i in enumerate(active):
        slope = pushforward(alone.closed, _one_hot(i, values)).jaxpr
        ones = jnp.ones_like(values[i])
        if not active_outputs(slope.jaxpr, [False] * len(values) + [True])[0]:
            continue
        first[n] = jex.core.jaxpr_as_fun(slope)(*values, ones)[0]
        for m, j in enumerate(active[: n + 1]):
            moving = [*_one_hot(j, values), False]
            if active_outputs(slope.jaxpr, moving)[0]:
                bend = pushforward(slope, moving).along([*values, ones], [jnp.ones_like(values[j])])[0]
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
    first = pushforward(alone.closed, moving)
    reached = active_outputs(first.jaxpr.jaxpr, [False] * len(moving) + [True] * len(active))
    bent = active_outputs(first.jaxpr.jaxpr, moving + still)
    jacs = jax.vmap(lambda v: first.along(values, v))([jet.jac for jet in jets])
    laps: list[list[Any]] = [[] for _ in jacs]
    if any(jet.lap is not None for jet in jets):
        summed = [jnp.zeros_like(jet.value) if jet.lap is None else jet.lap for jet in jets]
        laps = [[term] for term in first.along(values, summed)]
    rule = "linear"
    if any(bent):
        rule, seconds = _second_derivatives(alone, first, moving + still)
        for terms, second, is_bent in zip(laps, seconds, bent, strict=True):
            terms += [second] if is_bent else []
    log.append(alone.step(rule if first.mode == "fwd" else BY_REVERSE))
    pairs = iter(zip(reached, jacs, laps, strict=True))
    outs = []
    for v, value in zip(alone.eqn.outvars, alone.outputs, strict=True):
        is_reached, jac, terms = next(pairs) if is_floating(v) else (False, None, [])
        outs.append(Jet(value, jac, _sum_terms(terms)) if is_reached else Jet(value))
    return outs


def _second_derivatives(alone: _Equation, first: Pushforward, moving: list[bool]) -> tuple[str, list[Any]]:
    """The rule that was taken, and ``sum_k p''(u)[J[k], J[k]]``.

    Of a bilinear equation the sum is ``2 sum_k p(dA[k], dB[k])``.
    """
    if alone.eqn.primitive.name == "dot_general":
        return "bilinear", [_dot_second_derivative(alone)]
    if alone.eqn.primitive.name in BILINEAR:
        products = jax.vmap(jex.core.jaxpr_as_fun(alone.closed))(*[jet.jac for jet in alone.jets])[0]
        return "bilinear", [2 * jnp.sum(products, axis=0)]
    jacs = [alone.jets[i].jac for i in alone.active]
    second = pushforward(first.jaxpr, moving)
    each = jax.vmap(lambda v: second.along([*alone.values, *v], v))(jacs)
    return "each direction" if second.mode == "fwd" else BY_REVERSE, [jnp.sum(array, axis=0) for array in each]


def _dot_second_derivative(alone: _Equation) -> Any:
    """``2 sum_k dA[k] dB[k]`` as one product: the directions are one more axis to contract."""
    params = dict(alone.eqn.params)
    (left_axes, right_axes), (left_batch, right_batch) = params.pop("dimension_numbers")

    def shifted(axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(axis + 1 for axis in axes)

    contracted = (0, *shifted(left_axes)), (0, *shifted(right_axes))
    left, right = (jet.jac for jet in alone.ins)
    return 2 * jax.lax.dot_general(left, right, (contracted, (shifted(left_batch), shifted(right_batch))), **params)


def _sum_terms(terms: Sequence[Any]) -> Any:
    """The sum of arrays; None, which stands for zero, if there are none."""
    return functools.reduce(jnp.add, terms) if terms else None


# ---- calls, branches, loops --------------------------------------------------------------------------------------


def _push_call(alone: _Equation, log: list[Step]) -> list[Jet]:
    return _push_closed(alone.eqn.params["jaxpr"], alone.ins, log)


def _push_closed(closed: Any, jets: Sequence[Jet], log: list[Step]) -> list[Jet]:
    """``push_jets`` of an equation's body, which is a closed jaxpr or, without constants, an open one."""
    return push_jets(open_jaxpr(closed), getattr(closed, "consts", ()), jets, log)


def _push_remat(alone: _Equation, log: list[Step]) -> list[Jet]:
    """The body stays under ``jax.checkpoint``, so that reverse mode recomputes what the user asked for."""
    params = alone.eqn.params
    options = {"prevent_cse": params["prevent_cse"], "policy": params["policy"]}
    return jax.checkpoint(lambda ins: _push_closed(params["jaxpr"], ins, log), **options)(alone.ins)


def _push_cond(alone: _Equation, log: list[Step]) -> list[Jet]:
    """A variable is active after the branches if it is in any of them."""
    directions = _num_directions(alone)
    active = active_equation_outputs(alone.eqn, alone.mask)

    def along(branch: Any) -> Callable[..., list[Jet]]:
        return lambda *ins: _align(_push_closed(branch, ins, log), active, directions)

    index, *operands = alone.ins
    return jax.lax.switch(index.value, [along(branch) for branch in alone.eqn.params["branches"]], *operands)


def _push_scan(alone: _Equation, log: list[Step]) -> list[Jet]:
    """The derivatives become part of the carry; which carries have any is known before the first step."""
    params, directions = alone.eqn.params, _num_directions(alone)
    loop = open_loop(alone.eqn)
    active = active_equation_outputs(alone.eqn, alone.mask)[: loop.num_carry]
    consts, carry, slices = loop.split(alone.ins)

    def step(carry: list[Jet], slices: list[Jet]) -> tuple[list[Jet], list[Jet]]:
        outs = _push_closed(params["jaxpr"], [*consts, *carry, *slices], log)
        return _align(outs[: loop.num_carry], active, directions), outs[loop.num_carry :]

    slices = [_move_directions(jet, 0, 1) for jet in slices]
    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = jax.lax.scan(step, _align(carry, active, directions), slices, **options)
    return carry + [_move_directions(jet, 1, 0) for jet in stacked]


def _push_while(alone: _Equation, log: list[Step]) -> list[Jet]:
    """The derivatives become part of the carry; the condition reads values alone."""
    params, directions = alone.eqn.params, _num_directions(alone)
    loop = open_loop(alone.eqn)
    active = active_equation_outputs(alone.eqn, alone.mask)
    tested, (consts, carry, _) = alone.ins[: loop.num_tested], loop.split(alone.ins)

    def proceeds(carry: list[Jet]) -> Any:
        return _push_closed(params["cond_jaxpr"], [Jet(jet.value) for jet in [*tested, *carry]], [])[0].value

    def step(carry: list[Jet]) -> list[Jet]:
        return _align(_push_closed(params["body_jaxpr"], [*consts, *carry], log), active, directions)

    return jax.lax.while_loop(proceeds, step, _align(carry, active, directions))


def _num_directions(alone: _Equation) -> int:
    return alone.jets[alone.active[0]].jac.shape[0]


def _align(jets: Sequence[Jet], active: Sequence[bool], directions: int) -> list[Jet]:
    """Jets of one structure: the active ones with zeros written out, the others with the value alone.

    Inside ``shard_map`` all parts vary over the axes that the value does.
    """

    def fill(jet: Jet) -> Jet:
        zeros = jnp.zeros_like(jet.value)
        jac = jnp.broadcast_to(zeros, (directions, *zeros.shape)) if jet.jac is None else jet.jac + zeros[None]
        return Jet(jet.value, jac, zeros if jet.lap is None else jet.lap + zeros)

    return [fill(jet) if flag else Jet(jet.value) for jet, flag in zip(jets, active, strict=True)]


def _move_directions(jet: Jet, source: int, target: int) -> Jet:
    return jet if jet.jac is None else jet._replace(jac=jnp.moveaxis(jet.jac, source, target))


RULES: dict[str, Callable[[_Equation, list[Step]], list[Jet]]] = {
    "jit": _push_call,
    "pjit": _push_call,
    "remat2": _push_remat,
    "checkpoint": _push_remat,
    "cond": _push_cond,
    "scan": _push_scan,
    "while": _push_while,
}
"""The equations that are opened; every other equation is differentiated as a whole."""
