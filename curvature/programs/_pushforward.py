"""Directional derivatives of jaxprs, as jaxprs: forward, or by reverse mode applied twice where there is no forward.

Also two properties of equations that decide how derivatives may be combined: whether an equation acts entry by entry,
and whether a custom rule is consistent with the function that it belongs to.
"""

from collections.abc import Callable, Sequence
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from curvature._types import Tree
from curvature.programs._jaxprs import (
    called_jaxpr,
    dependents,
    inline,
    is_floating,
    isolate_active,
    isolate_equation,
    live_equations,
    open_jaxpr,
    restrict,
    trace_jvp,
)
from curvature.programs._legality import Blocker, find_blocker, find_equation, first_legal
from curvature.programs._primitives import ENTRYWISE, JITS


class Pushforward(NamedTuple):
    """The first derivative of a jaxpr's floating outputs along a direction.

    Attributes:
        jaxpr: the program ``(*arguments, *directions of the moving arguments) -> derivatives``.
        mode: "fwd", or "rev" where there is no forward derivative.
    """

    jaxpr: ClosedJaxpr
    mode: str

    def along(self, values: Sequence[Any], directions: Sequence[Any]) -> list[Any]:
        """The derivatives at ``values``."""
        return jex.core.jaxpr_as_fun(self.jaxpr)(*values, *directions)


def directional_derivative(fun: Callable[[Tree], tuple[Any, Any]], x: Tree, v: Tree) -> tuple[Any, Any]:
    """``d/dt fun(x + t v)`` at 0, and ``(out, aux)``."""
    out, derivative, aux = jax.jvp(fun, (x,), (v,), has_aux=True)
    return derivative, (out, aux)


def pushforward(closed: ClosedJaxpr, moving: Sequence[bool]) -> Pushforward:
    """Differentiate with respect to the ``moving`` arguments: forward, or else by reverse mode applied twice."""
    live = [True] * len(closed.jaxpr.outvars)
    mode = first_legal(lambda mode: find_blocker(closed.jaxpr, moving, live, mode))
    fun = jex.core.jaxpr_as_fun(closed)
    floating = [is_floating(v) for v in closed.jaxpr.outvars]

    def derivatives(*args: Any) -> list[Any]:
        values, directions = list(args[: len(moving)]), args[len(moving) :]

        def smooth(moved: Sequence[Any]) -> tuple[list[Any], None]:
            return list(compress(restrict(fun, values, moving)(*moved), floating)), None

        return derivative_along(mode, smooth, tuple(compress(values, moving)), directions)[0]

    avals = closed.in_avals
    made = jax.make_jaxpr(derivatives)(*avals, *compress(avals, moving))
    # A JVP also computes the values, which the derivatives need not depend on.
    live_jaxpr = made.jaxpr.replace(eqns=live_equations(made.jaxpr, keep_effects=True))
    return Pushforward(made.replace(jaxpr=live_jaxpr), mode)


def derivative_along(mode: str, fun: Callable[[Tree], tuple[Any, Any]], x: Tree, v: Tree) -> tuple[Any, Any]:
    """``d/dt fun(x + t v)`` at 0 in either mode, and ``(out, aux)``."""
    if mode == "fwd":
        return directional_derivative(fun, x, v)
    out, pull, aux = jax.vjp(fun, x, has_aux=True)
    return transposed(pull, out)(v), (out, aux)


def transposed(pull: Callable[[Tree], tuple[Tree]], out: Tree) -> Callable[[Tree], Tree]:
    """``v -> J v`` from the pull-back ``w -> (J'w,)``: the pull-back is linear, and its own pull-back is ``J``."""
    push = jax.vjp(pull, jax.tree.map(jnp.zeros_like, out))[1]
    return lambda v: push((v,))[0]


# ---- custom rules ----------------------------------------------------------------------------------------------------


def asymmetric_rule(jaxpr: Jaxpr) -> Blocker | None:
    """The first custom rule from which a Hessian need not be symmetric, through nested bodies; None if there is none.

    A rule need not be the derivative of the function that it belongs to. Where it is not, the gradient ``g`` that JAX
    computes is no gradient, and its Jacobian ``H[i, j] = d g_i / d x_j`` differs from its transpose. A ``custom_vjp``
    may do anything to its cotangents. A ``custom_jvp`` of one active argument that acts entry by entry has a diagonal
    Jacobian, and the derivatives of that are diagonal too: the rule is the derivative of some function. With two
    arguments, or across entries, nothing makes the mixed derivatives equal. The second derivative must go through the
    rule as well: a rule that computes the value by other operations has these differentiated there.
    """

    def is_symmetric(alone: ClosedJaxpr, moving: Sequence[bool]) -> bool:
        active = list(compress(range(len(moving)), moving))
        return len(active) == 1 and is_elementwise(alone, active) and _rule_calls_itself(alone, moving)

    return _find_rule(jaxpr, is_symmetric)


def inconsistent_rule(jaxpr: Jaxpr) -> Blocker | None:
    """The first custom rule that a second derivative need not go through twice; None if there is none.

    The second derivative along a direction is then no sum over equations: JAX differentiates the gradient, in which a
    ``custom_vjp`` has left what it made of its cotangents, and a ``custom_jvp`` the operations of its rule.
    """
    return _find_rule(jaxpr, _rule_calls_itself)


def _find_rule(jaxpr: Jaxpr, is_right: Callable[[ClosedJaxpr, Sequence[bool]], bool]) -> Blocker | None:
    """The first ``custom_vjp``, or ``custom_jvp`` that is not right for its moving arguments."""

    def wanted(jaxpr: Jaxpr, eqn: JaxprEqn, mask: list[bool]) -> bool:
        if eqn.primitive.name != "custom_jvp_call":
            return eqn.primitive.name == "custom_vjp_call"
        return not is_right(*isolate_active(jaxpr, eqn, mask))

    return find_equation(jaxpr, [True] * len(jaxpr.invars), [True] * len(jaxpr.outvars), wanted)


def _rule_calls_itself(alone: ClosedJaxpr, moving: Sequence[bool]) -> bool:
    """Whether the rule of a ``custom_jvp`` computes the value by the function itself, on the same operands."""
    jaxpr = inline(trace_jvp(alone, moving, 0)).jaxpr
    own = next((eqn for eqn in jaxpr.eqns if list(eqn.outvars) == list(jaxpr.outvars)), None)
    if own is None or own.primitive.name != "custom_jvp_call":
        return False
    operands = [v for v in own.invars if isinstance(v, Var)]
    return operands == list(jaxpr.invars[: len(operands)]) and str(isolate_equation(jaxpr, own)) == str(alone)


# ---- entry by entry --------------------------------------------------------------------------------------------------


def is_elementwise(closed: ClosedJaxpr, active: Sequence[int]) -> bool:
    """Whether the only output has, entry by entry, the derivative of a real function of the active arguments."""
    jaxpr = closed.jaxpr
    out: Any = jaxpr.outvars[0].aval
    if len(jaxpr.outvars) > 1 or not jnp.issubdtype(out.dtype, jnp.floating):
        return False
    arguments: list[Any] = [jaxpr.invars[i].aval for i in active]
    alike = all(aval.shape == out.shape and aval.dtype == out.dtype for aval in arguments)
    return alike and _is_entrywise(jaxpr, out.shape, frozenset())


def _is_entrywise(jaxpr: Jaxpr, shape: tuple[int, ...], assumed: frozenset[str]) -> bool:
    on_inputs = dependents(jaxpr, jaxpr.invars)  # what depends on no input is a constant of each entry
    of_inputs = (eqn for eqn in jaxpr.eqns if not on_inputs.isdisjoint(eqn.outvars))
    return all(_is_entrywise_equation(jaxpr, eqn, shape, assumed) for eqn in of_inputs)


def _is_entrywise_equation(jaxpr: Jaxpr, eqn: JaxprEqn, shape: tuple[int, ...], assumed: frozenset[str]) -> bool:
    """Precondition: every array has the shape of the output, or is a scalar, on which the derivative does not depend.

    So a broadcast is entrywise only of a scalar.
    """
    name = eqn.primitive.name
    shapes = {_shape_of(v) for v in eqn.invars}
    if name == "broadcast_in_dim":
        return shapes == {()}
    if not shapes | {_shape_of(v) for v in eqn.outvars} <= {shape, ()}:
        return False
    if name == "custom_jvp_call":
        alone = isolate_equation(jaxpr, eqn)
        moving = [is_floating(v) and _shape_of(v) == shape for v in alone.jaxpr.invars]
        return _is_entrywise(open_jaxpr(eqn.params["call_jaxpr"]), shape, assumed) and judge_rule(
            alone, moving, assumed, lambda rule, assumed: _is_entrywise(rule, shape, assumed)
        )
    body = called_jaxpr(eqn) if name in JITS else None
    return name in ENTRYWISE if body is None else _is_entrywise(body, shape, assumed)


def judge_rule(
    closed: ClosedJaxpr, moving: Sequence[bool], assumed: frozenset[str], judge: Callable[[Jaxpr, frozenset[str]], bool]
) -> bool:
    """Judge the forward rule of a ``custom_jvp``, which may call the function itself, or other functions with rules.

    Args:
        closed: the equation.
        moving: which arguments are differentiated.
        assumed: the equations whose rules are being judged; where they occur again, they are assumed to be right.
        judge: from the jaxpr of the rule and the equations to assume to whether it is right.
    """
    text = str(closed)
    if text in assumed or not any(moving):
        return True
    if find_blocker(closed.jaxpr, moving, [True] * len(closed.jaxpr.outvars), "fwd") is not None:
        return False
    return judge(pushforward(closed, moving).jaxpr.jaxpr, assumed | {text})


def _shape_of(v: Any) -> tuple[int, ...]:
    return v.aval.shape
