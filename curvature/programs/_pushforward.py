"""The derivative of a jaxpr along a direction, as a jaxpr again, and whether it is taken entry by entry."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from curvature import _checks
from curvature._types import Tree
from curvature.programs._jaxprs import called_jaxpr, dependents, inline, is_floating, lone_equation, open_jaxpr
from curvature.programs._legality import Blocker, find_blocker, find_equation

LINEAR_BY_ENTRY = frozenset({"add", "sub", "neg", "add_any", "copy", "convert_element_type", "select_n"})
"""Equations whose derivative is another one of the kind, which costs less than a product with slopes of one."""

BY_ENTRY = LINEAR_BY_ENTRY | {
    "abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp", "cos", "cosh",
    "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "not", "or", "pow",
    "rem", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "sub", "tan", "tanh", "xor",
}  # fmt: skip
"""Equations that compute each entry of their output from the same entry of their operands."""


class Pushforward(NamedTuple):
    """The first derivative of a jaxpr's floating outputs along a direction.

    Attributes:
        jaxpr: the program ``(*arguments, *directions of those that move) -> derivatives``.
        mode: how it was made: "fwd", or "rev" where there is no forward derivative.
    """

    jaxpr: ClosedJaxpr
    mode: str

    def along(self, values: Sequence[Any], directions: Sequence[Any]) -> list[Any]:
        """The derivatives at ``values``."""
        return jex.core.jaxpr_as_fun(self.jaxpr)(*values, *directions)


def directional_derivative(fun: Callable[[Tree], tuple[Any, Any]], x: Tree, v: Tree) -> tuple[Any, Any]:
    """``d/dt fun(x + t v)`` at 0, with ``(out, aux)`` beside it."""
    out, derivative, aux = jax.jvp(fun, (x,), (v,), has_aux=True)
    return derivative, (out, aux)


def pushforward(function: str, closed: ClosedJaxpr, moving: Sequence[bool]) -> Pushforward:
    """Differentiate by the arguments that are ``moving``: forward, or else by reverse mode applied twice."""
    live = [True] * len(closed.jaxpr.outvars)
    mode = choose_forward(function, lambda mode: find_blocker(closed.jaxpr, moving, live, mode))
    fun = jex.core.jaxpr_as_fun(closed)
    floating = [is_floating(v) for v in closed.jaxpr.outvars]

    def derivatives(*args: Any) -> list[Any]:
        values, directions = list(args[: len(moving)]), args[len(moving) :]

        def smooth(moved: Sequence[Any]) -> tuple[list[Any], None]:
            rest = iter(moved)
            outs = fun(*[next(rest) if moves else value for moves, value in zip(moving, values, strict=True)])
            return [out for out, is_smooth in zip(outs, floating, strict=True) if is_smooth], None

        point = tuple(value for moves, value in zip(moving, values, strict=True) if moves)
        return derivative_along(mode, smooth, point, directions)[0]

    avals = [v.aval for v in closed.jaxpr.invars]
    made = jax.make_jaxpr(derivatives)(*avals, *[aval for aval, moves in zip(avals, moving, strict=True) if moves])
    return Pushforward(_without_dead_code(made), mode)


def _without_dead_code(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Drop what only the values need, which a JVP computes beside the derivatives."""
    live, kept = {v for v in closed.jaxpr.outvars if isinstance(v, Var)}, []
    for eqn in reversed(closed.jaxpr.eqns):
        if eqn.effects or not live.isdisjoint(eqn.outvars):
            kept.append(eqn)
            live.update(v for v in eqn.invars if isinstance(v, Var))
    return closed.replace(jaxpr=closed.jaxpr.replace(eqns=kept[::-1]))


def choose_forward(function: str, blocker: Callable[[str], Blocker | None]) -> str:
    """The mode of a derivative along a direction: forward wherever nothing forbids it."""
    blockers = {}
    for mode in ("fwd", "rev"):
        found = blocker(mode)
        if found is None:
            return mode
        blockers[mode] = str(found)
    raise _checks.no_legal_mode(function, blockers)


def derivative_along(mode: str, fun: Callable[[Tree], tuple[Any, Any]], x: Tree, v: Tree) -> tuple[Any, Any]:
    """``d/dt fun(x + t v)`` at 0 in either mode, with ``(out, aux)`` beside it."""
    if mode == "fwd":
        return directional_derivative(fun, x, v)
    out, pull, aux = jax.vjp(fun, x, has_aux=True)
    return transposed(pull, out)(v), (out, aux)


def transposed(pull: Callable[[Tree], tuple[Tree]], out: Tree) -> Callable[[Tree], Tree]:
    """``v -> J v`` from the pull-back ``w -> (J'w,)``, which is linear, so that its own pull-back is that map."""
    push = jax.vjp(pull, jax.tree.map(jnp.zeros_like, out))[1]
    return lambda v: push((v,))[0]


def asymmetric_rule(jaxpr: Jaxpr) -> Blocker | None:
    """The first custom rule from which a Hessian need not be symmetric, through nested bodies; None if there is none.

    A rule need not be the derivative of the function that it belongs to. Where it is not, the gradient ``g`` that JAX
    computes is no gradient, and its Jacobian ``H[i, j] = d g_i / d x_j`` differs from its transpose. A ``custom_vjp``
    may do anything to its cotangents. A ``custom_jvp`` of one active argument that acts entry by entry has a diagonal
    Jacobian, and the derivatives of that are diagonal too: the rule is the derivative of some function. With two
    arguments, or across entries, nothing makes the mixed derivatives equal. The second derivative must go through the
    rule as well: a rule that computes the value by other operations has these differentiated there.
    """

    def need_not_be_symmetric(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> bool:
        if eqn.primitive.name == "custom_vjp_call":
            return True
        if eqn.primitive.name != "custom_jvp_call":
            return False
        alone, places = _alone(jaxpr, eqn, mask)
        return len(places) != 1 or not is_elementwise(alone, places) or not _rule_calls_itself(alone, places)

    return _first_equation(jaxpr, need_not_be_symmetric)


def inconsistent_rule(jaxpr: Jaxpr) -> Blocker | None:
    """The first custom rule that a second derivative need not go through twice; None if there is none.

    The second derivative along a direction is then no sum over equations: JAX differentiates the gradient, in which a
    ``custom_vjp`` has left what it made of its cotangents, and a ``custom_jvp`` the operations of its rule.
    """

    def is_inconsistent(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> bool:
        if eqn.primitive.name == "custom_vjp_call":
            return True
        return eqn.primitive.name == "custom_jvp_call" and not _rule_calls_itself(*_alone(jaxpr, eqn, mask))

    return _first_equation(jaxpr, is_inconsistent)


def _first_equation(jaxpr: Jaxpr, wanted: Callable[[Jaxpr, JaxprEqn, list[bool]], bool]) -> Blocker | None:
    return find_equation(jaxpr, [True] * len(jaxpr.invars), [True] * len(jaxpr.outvars), wanted)


def _alone(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> tuple[ClosedJaxpr, list[int]]:
    """One equation as a jaxpr, and the numbers of its active inputs."""
    alone = lone_equation(jaxpr, eqn)
    active = {v for v, is_active in zip(eqn.invars, mask, strict=True) if is_active}
    return alone, [i for i, v in enumerate(alone.jaxpr.invars) if v in active]


def _rule_calls_itself(alone: ClosedJaxpr, places: Sequence[int]) -> bool:
    """Whether the rule of a ``custom_jvp`` has the value from the function itself, on the same operands."""
    fun, avals = jex.core.jaxpr_as_fun(alone), [v.aval for v in alone.jaxpr.invars]

    def value(values: list[Any], tangents: list[Any]) -> list[Any]:
        def along(*moved: Any) -> list[Any]:
            given = dict(zip(places, moved, strict=True))
            return fun(*[given.get(i, v) for i, v in enumerate(values)])

        return jax.jvp(along, tuple(values[i] for i in places), tuple(tangents))[0]

    jaxpr = inline(jax.make_jaxpr(value)(avals, [avals[i] for i in places])).jaxpr
    own = next((eqn for eqn in jaxpr.eqns if list(eqn.outvars) == list(jaxpr.outvars)), None)
    if own is None or own.primitive.name != "custom_jvp_call":
        return False
    operands = [v for v in own.invars if isinstance(v, Var)]
    return operands == list(jaxpr.invars[: len(operands)]) and str(lone_equation(jaxpr, own)) == str(alone)


def is_elementwise(closed: ClosedJaxpr, active: Sequence[int]) -> bool:
    """Whether the only output has, entry by entry, the derivative of a real function of the active arguments."""
    jaxpr = closed.jaxpr
    out: Any = jaxpr.outvars[0].aval
    if len(jaxpr.outvars) > 1 or not jnp.issubdtype(out.dtype, jnp.floating):
        return False
    arguments: list[Any] = [jaxpr.invars[i].aval for i in active]
    alike = all(aval.shape == out.shape and aval.dtype == out.dtype for aval in arguments)
    return alike and _only_by_entry(jaxpr, out.shape, frozenset())


def _only_by_entry(jaxpr: Jaxpr, shape: tuple[int, ...], assumed: frozenset[str]) -> bool:
    on_inputs = dependents(jaxpr, jaxpr.invars)  # what depends on no input is a constant of each entry
    return all(_by_entry(jaxpr, eqn, shape, assumed) for eqn in jaxpr.eqns if not on_inputs.isdisjoint(eqn.outvars))


def _by_entry(jaxpr: Jaxpr, eqn: JaxprEqn, shape: tuple[int, ...], assumed: frozenset[str]) -> bool:
    """Whether every array has the shape of the output, or is a scalar, on which the derivative does not depend."""
    name = eqn.primitive.name
    shapes = {_shape(v) for v in eqn.invars}
    if name == "broadcast_in_dim":
        return shapes == {()}
    if not shapes | {_shape(v) for v in eqn.outvars} <= {shape, ()}:
        return False
    if name == "custom_jvp_call":
        body = open_jaxpr(eqn.params["call_jaxpr"])
        return _only_by_entry(body, shape, assumed) and _rule_is_by_entry(lone_equation(jaxpr, eqn), shape, assumed)
    body = called_jaxpr(eqn) if name in ("jit", "pjit") else None
    return name in BY_ENTRY if body is None else _only_by_entry(body, shape, assumed)


def _rule_is_by_entry(closed: ClosedJaxpr, shape: tuple[int, ...], assumed: frozenset[str]) -> bool:
    """Judge the rule of a ``custom_jvp``; where it calls the function itself, that is assumed to be as it should."""
    text = str(closed)
    moving = [is_floating(v) and _shape(v) == shape for v in closed.jaxpr.invars]
    if text in assumed or not any(moving):
        return True
    if find_blocker(closed.jaxpr, moving, [True] * len(closed.jaxpr.outvars), "fwd") is not None:
        return False
    return _only_by_entry(pushforward("laplacian", closed, moving).jaxpr.jaxpr, shape, assumed | {text})


def _shape(v: Any) -> tuple[int, ...]:
    return v.aval.shape
