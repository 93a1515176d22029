"""Jaxprs as programs to be read: inlined calls, one equation as a function, the parts of a scan."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

Variable = Any
"""A ``jax.extend.core.Var``: JAX declares its aval without shape and dtype."""

Equation = Any
"""A ``jax.extend.core.JaxprEqn`` of such variables."""


def open_jaxpr(jaxpr: Any) -> Jaxpr:
    """The jaxpr of an equation's parameter, which is closed in some versions of JAX and open in others."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def called_jaxpr(eqn: Equation) -> Jaxpr | None:
    """The body of a call-like equation, whose inputs are the body's inputs one for one: jit, remat, and the like."""
    if eqn.primitive.name in ("custom_jvp_call", "custom_vjp_call"):  # differentiated by their rules, not their bodies
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

    Complex numbers have another transpose and another product rule; what assembles derivatives declines them.
    """
    return jnp.issubdtype(getattr(v.aval, "dtype", jnp.int32), jnp.floating)


def dependents(jaxpr: Jaxpr, given: Iterable[Variable]) -> set[Variable]:
    """The variables that depend on some given ones, and those themselves."""
    found = {v for v in given if isinstance(v, Var)}
    for eqn in jaxpr.eqns:
        if any(v in found for v in eqn.invars if isinstance(v, Var)):
            found.update(eqn.outvars)
    return found


def equation_function(jaxpr: Jaxpr, eqn: Equation) -> tuple[Callable[..., list[Any]], list[Variable]]:
    """One equation of ``jaxpr`` as a function of its distinct variables, custom rules and all, and those variables."""
    closed = lone_equation(jaxpr, eqn)
    return jex.core.jaxpr_as_fun(closed), closed.jaxpr.invars


def lone_equation(jaxpr: Jaxpr, eqn: Equation) -> ClosedJaxpr:
    """The jaxpr that holds one equation of ``jaxpr`` and takes its distinct variables."""
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


class Environment(dict[Variable, Any]):
    """The values of variables, while a jaxpr is evaluated equation by equation."""

    def read(self, variables: Sequence[Any]) -> list[Any]:
        """The values of variables and literals."""
        return [v.val if isinstance(v, Literal) else self[v] for v in variables]

    def write(self, variables: Sequence[Variable], values: Sequence[Any]) -> None:
        """Set the values of variables."""
        self.update(zip(variables, values, strict=True))

    def evaluate(self, jaxpr: Jaxpr, eqn: Equation) -> None:
        """Set what one equation of ``jaxpr`` computes, where it is not known already.

        Some outputs may be known and others not: those known may be what a derivative is taken with respect to.
        """
        fun, variables = equation_function(jaxpr, eqn)
        for v, value in zip(eqn.outvars, fun(*self.read(variables)), strict=True):
            self.setdefault(v, value)

    def lacks(self, eqn: Equation) -> bool:
        """Whether something that an equation computes is not known yet."""
        return not all(v in self for v in eqn.outvars)


_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})
"""Equations that evaluate their body once on their operands and do nothing else."""


def inline(closed: ClosedJaxpr) -> ClosedJaxpr:
    """The same program without calls: the equations of jit and remat stand where they were called from.

    Every other equation with a body stays one equation: loops, branches, custom derivatives, reductions by a function,
    bodies that run on the shards of a mesh. A reshape that permutes axes first becomes two equations, so that each
    reader of a jaxpr meets plain reshapes only.
    """
    avals = [v.aval for v in closed.jaxpr.invars]
    return jax.make_jaxpr(lambda *args: _evaluate_inline(closed.jaxpr, closed.consts, args))(*avals)


def _evaluate_inline(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    env = Environment()
    env.write(jaxpr.constvars, consts)
    env.write(jaxpr.invars, args)
    for eqn in jaxpr.eqns:
        body = called_jaxpr(eqn) if eqn.primitive.name in _CALLS else None
        if eqn.primitive.name == "reshape" and eqn.params["dimensions"] is not None:
            (operand,) = env.read(eqn.invars)
            permuted = jax.lax.transpose(operand, eqn.params["dimensions"])
            env.write(eqn.outvars, [jax.lax.reshape(permuted, eqn.params["new_sizes"])])
        elif body is None or body.constvars:
            env.evaluate(jaxpr, eqn)
        else:
            env.write(eqn.outvars, _evaluate_inline(body, [], env.read(eqn.invars)))
    return env.read(jaxpr.outvars)


class Scan(NamedTuple):
    """A scan equation taken apart.

    Attributes:
        body: its body, inlined, as a function of constants, carries and slices.
        num_consts: how many of the inputs are constants.
        num_carry: how many of the inputs after them, and of the outputs, are carries.
        length: the number of steps.
        reverse: whether it runs from the last slice to the first.
    """

    body: ClosedJaxpr
    num_consts: int
    num_carry: int
    length: int
    reverse: bool


def open_scan(eqn: Equation) -> Scan:
    """The parts of a scan; read from ranks, for what is scanned or stacked has one axis more outside than inside."""
    body = eqn.params["jaxpr"]
    closed = body if isinstance(body, ClosedJaxpr) else ClosedJaxpr(body, [])
    num_carry = count_of_equal_rank(eqn.outvars, closed.jaxpr.outvars)
    num_consts = count_of_equal_rank(eqn.invars, closed.jaxpr.invars) - num_carry
    return Scan(inline(closed), num_consts, num_carry, eqn.params["length"], eqn.params["reverse"])


def count_of_equal_rank(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many variables of an equation have the rank of their counterparts in its body."""
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))
