"""Utilities for reading jaxprs: inlined calls, single equations as functions, dependence, the operands of a loop."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from curvature.programs._primitives import CALLS, CUSTOM_RULES

Variable = Any
"""A ``jax.extend.core.Var``: JAX declares its aval without shape and dtype."""

Equation = Any
"""A ``jax.extend.core.JaxprEqn`` of such variables."""


def open_jaxpr(jaxpr: Any) -> Jaxpr:
    """The jaxpr of an equation's parameter, which is closed in some versions of JAX and open in others."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def called_jaxpr(eqn: Equation, *, open_custom_rules: bool = False) -> Jaxpr | None:
    """The body of an equation whose inputs are the inputs of its body one for one: jit, remat, and the like.

    A function with a custom rule is differentiated by the rule. Its body is returned only with ``open_custom_rules``,
    for readers of the value alone.
    """
    if eqn.primitive.name in CUSTOM_RULES and not open_custom_rules:
        return None
    for body in jex.core.jaxprs_in_params(eqn.params):
        if len(body.invars) == len(eqn.invars) and len(body.outvars) == len(eqn.outvars):
            return body
    return None


def is_floating(v: Any) -> bool:
    """Whether a variable can carry a derivative."""
    return jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.inexact)


def is_real(v: Any) -> bool:
    """Whether a variable can carry a derivative and holds real numbers.

    Complex numbers have another transpose and another product rule: code that assembles derivatives declines them.
    """
    return jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.floating)


def largest_array(jaxpr: Jaxpr | ClosedJaxpr | None) -> int:
    """The number of entries of the largest array that an equation reads or writes, also in the bodies of equations."""
    equations = [] if jaxpr is None else jaxpr.eqns
    sizes = [getattr(v.aval, "size", 1) for eqn in equations for v in (*eqn.invars, *eqn.outvars)]
    bodies = [largest_array(body) for eqn in equations for body in jex.core.jaxprs_in_params(eqn.params)]
    return max([1, *sizes, *bodies])


def num_equations(jaxpr: Jaxpr | ClosedJaxpr | None) -> int:
    """The number of equations, with those of their bodies."""
    equations = [] if jaxpr is None else jaxpr.eqns
    return sum(1 + sum(map(num_equations, jex.core.jaxprs_in_params(eqn.params))) for eqn in equations)


def dependents(jaxpr: Jaxpr, given: Iterable[Variable]) -> set[Variable]:
    """The variables that depend on the given ones, and the given ones themselves."""
    found = {v for v in given if isinstance(v, Var)}
    for eqn in jaxpr.eqns:
        if any(v in found for v in eqn.invars if isinstance(v, Var)):
            found.update(eqn.outvars)
    return found


def live_equations(jaxpr: Jaxpr, *, keep_effects: bool) -> list[Equation]:
    """The equations that the outputs depend on, in order; with ``keep_effects`` also those with side effects."""
    live, kept = {v for v in jaxpr.outvars if isinstance(v, Var)}, []
    for eqn in reversed(jaxpr.eqns):
        if (keep_effects and eqn.effects) or not live.isdisjoint(eqn.outvars):
            kept.append(eqn)
            live.update(v for v in eqn.invars if isinstance(v, Var))
    return kept[::-1]


# ---- one equation --------------------------------------------------------------------------------------------------


def isolate_equation(jaxpr: Jaxpr, eqn: Equation) -> ClosedJaxpr:
    """The jaxpr that holds one equation of ``jaxpr``, as a function of the equation's distinct variables."""
    variables = list(dict.fromkeys(v for v in eqn.invars if isinstance(v, Var)))
    alone = jaxpr.replace(
        constvars=[],
        invars=variables,
        outvars=list(eqn.outvars),
        eqns=[eqn],
        effects=eqn.effects,
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    return ClosedJaxpr(alone, [])


def isolate_active(jaxpr: Jaxpr, eqn: Equation, mask: Sequence[bool]) -> tuple[ClosedJaxpr, list[bool]]:
    """One equation as a jaxpr, and which of its distinct variables are active; ``mask`` says it of the operands."""
    alone = isolate_equation(jaxpr, eqn)
    active = {v for v, is_active in zip(eqn.invars, mask, strict=True) if is_active}
    return alone, [v in active for v in alone.jaxpr.invars]


def equation_function(jaxpr: Jaxpr, eqn: Equation) -> tuple[Callable[..., list[Any]], list[Variable]]:
    """One equation of ``jaxpr`` as a function of its distinct variables, with its custom rules, and these variables."""
    alone = isolate_equation(jaxpr, eqn)
    return jex.core.jaxpr_as_fun(alone), alone.jaxpr.invars


def restrict(fun: Callable[..., list[Any]], values: Sequence[Any], moving: Sequence[bool]) -> Callable[..., list[Any]]:
    """``fun`` as a function of the arguments that are ``moving``; the other arguments are fixed at their ``values``."""

    def of_moving(*moved: Any) -> list[Any]:
        given = iter(moved)
        return fun(*[next(given) if moves else value for moves, value in zip(moving, values, strict=True)])

    return of_moving


def trace_jvp(closed: ClosedJaxpr, moving: Sequence[bool], part: int) -> ClosedJaxpr:
    """The jaxpr ``(*values, *tangents of the moving values) -> outputs``, or their tangents for ``part`` 1."""
    fun, avals = jex.core.jaxpr_as_fun(closed), closed.in_avals

    def push(values: list[Any], tangents: list[Any]) -> list[Any]:
        return jax.jvp(restrict(fun, values, moving), tuple(compress(values, moving)), tuple(tangents))[part]

    return jax.make_jaxpr(push)(avals, list(compress(avals, moving)))


# ---- evaluation ----------------------------------------------------------------------------------------------------


class Environment(dict[Variable, Any]):
    """The values of variables, while a jaxpr is evaluated equation by equation."""

    def read(self, variables: Sequence[Any]) -> list[Any]:
        """The values of variables and literals."""
        return [v.val if isinstance(v, Literal) else self[v] for v in variables]

    def write(self, variables: Sequence[Variable], values: Sequence[Any]) -> None:
        """Set the values of variables."""
        self.update(zip(variables, values, strict=True))

    def evaluate(self, jaxpr: Jaxpr, eqn: Equation) -> None:
        """Set the outputs of one equation of ``jaxpr`` that have no value yet.

        Outputs that have a value keep it: it may be what a derivative is taken with respect to.
        """
        fun, variables = equation_function(jaxpr, eqn)
        for v, value in zip(eqn.outvars, fun(*self.read(variables)), strict=True):
            self.setdefault(v, value)

    def lacks(self, eqn: Equation) -> bool:
        """Whether some output of an equation has no value yet."""
        return not all(v in self for v in eqn.outvars)

    def complete(self, jaxpr: Jaxpr, shifts: Mapping[Variable, Any]) -> None:
        """Set all outputs that have no value yet, with ``shifts`` added to some of them."""
        for eqn in filter(self.lacks, jaxpr.eqns):
            self.evaluate(jaxpr, eqn)
            self.update({v: self[v] + shifts[v].reshape(self[v].shape) for v in eqn.outvars if v in shifts})


def inline(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without calls: the equations of jit and remat replace the call.

    Every other equation with a body stays one equation: loops, branches, custom derivatives, reductions by a function,
    bodies that run on the shards of a mesh. A reshape that permutes axes first becomes a transpose and a reshape, so
    that each reader of a jaxpr meets plain reshapes only.
    """
    avals = [v.aval for v in closed.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: _evaluate_inline(closed.jaxpr, closed.consts, args))(*avals)


def _evaluate_inline(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = Environment()
    env.write(jaxpr.constvars, consts)
    env.write(jaxpr.invars, args)
    for eqn in jaxpr.eqns:
        body = called_jaxpr(eqn) if eqn.primitive.name in CALLS else None
        if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None:
            (operand,) = env.read(eqn.invars)
            permuted = jax.lax.transpose(operand, eqn.params["dimensions"])
            env.write(eqn.outvars, [jax.lax.reshape(permuted, eqn.params["new_sizes"])])
        elif body is None or body.constvars:
            env.evaluate(jaxpr, eqn)
        else:
            env.write(eqn.outvars, _evaluate_inline(body, [], env.read(eqn.invars)))
    return env.read(jaxpr.outvars)


# ---- calls, branches, loops ----------------------------------------------------------------------------------------


class Bodies(NamedTuple):
    """The bodies of a call, a branch or a loop, to be read with the operands of the equation.

    Attributes:
        jaxprs: the bodies: one, or one for each branch.
        num_tested: how many of the first operands are not passed to the bodies.
        carry: which of the operands that are passed are carries. The first outputs of the body are their next values.
    """

    jaxprs: list[Jaxpr]
    num_tested: int = 0
    carry: slice = slice(0, 0)


def bodies_of(eqn: Equation) -> Bodies | None:
    """The bodies of an equation that is differentiated by differentiating them."""
    if eqn.primitive.name == "cond":
        return Bodies([open_jaxpr(branch) for branch in eqn.params["branches"]], num_tested=1)
    if eqn.primitive.name in ("scan", "while"):
        loop = open_loop(eqn)
        carry = slice(loop.num_consts, loop.num_consts + loop.num_carry)
        return Bodies([loop.body.jaxpr], loop.num_tested, carry)
    body = called_jaxpr(eqn)
    return None if body is None else Bodies([body])


class Loop(NamedTuple):
    """The body of a scan or a while, and how the operands of the equation are passed to it.

    The operands of the equation are, in order: constants of the condition of a while, constants of the body, carries,
    and slices of a scan.

    Attributes:
        body: the body, as a function of constants, carries and slices.
        num_tested: how many operands only the condition of a while reads.
        num_consts: how many operands after them are constants.
        num_carry: how many operands after the constants, and how many outputs, are carries.
    """

    body: ClosedJaxpr
    num_tested: int
    num_consts: int
    num_carry: int

    def split(self, operands: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """Split a list with one item for each operand of the equation into constants, carries and slices."""
        first_carry = self.num_tested + self.num_consts
        first_slice = first_carry + self.num_carry
        return (
            list(operands[self.num_tested : first_carry]),
            list(operands[first_carry:first_slice]),
            list(operands[first_slice:]),
        )


def open_loop(eqn: Equation) -> Loop:
    """The parts of a scan or a while.

    Those of a scan are read from ranks: what is scanned or stacked has one axis more outside the body than inside.
    """
    params = eqn.params
    if eqn.primitive.name == "while":
        return Loop(_closed(params["body_jaxpr"]), params["cond_nconsts"], params["body_nconsts"], len(eqn.outvars))
    body = _closed(params["jaxpr"])
    num_carry = _count_equal_ranks(eqn.outvars, body.jaxpr.outvars)
    return Loop(body, 0, _count_equal_ranks(eqn.invars, body.jaxpr.invars) - num_carry, num_carry)


def _closed(jaxpr: Any) -> ClosedJaxpr:
    return jaxpr if isinstance(jaxpr, ClosedJaxpr) else ClosedJaxpr(jaxpr, [])


def _count_equal_ranks(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many variables of an equation have the rank of their counterparts in its body."""
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))
