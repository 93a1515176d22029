"""A function traced once: its replay, its derivatives, and the equation that forbids a mode."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from curvature._sharding import vary_like
from curvature._types import Tree
from curvature.programs._legality import Blocker, find_blocker, find_equation, is_collective
from curvature.programs._pushforward import directional_derivative

_NEEDS_VALUES = (
    jax.errors.ConcretizationTypeError,
    jax.errors.TracerIntegerConversionError,
    jax.errors.NonConcreteBooleanIndexError,
)


@dataclass(frozen=True)
class Program:
    """A function of one tree at a point ``x``, traced once.

    Attributes:
        fun: replays the jaxpr; returns ``(out, aux)``, of which ``out`` is differentiated.
        x: the point, only for its shapes.
        out: the shapes of ``out``.
        jaxpr: the jaxpr, or None if the function branches on values and can only be evaluated eagerly.
        on_device: whether ``x`` has been made to vary over the devices of a mesh; see ``trace_on_device``.
    """

    fun: Callable[[Tree], tuple[Any, Any]]
    x: Tree
    out: Any
    jaxpr: ClosedJaxpr | None
    on_device: bool = False

    @property
    def is_scalar(self) -> bool:
        """Whether ``out`` is one array of shape ()."""
        return jax.tree_util.treedef_is_leaf(jax.tree.structure(self.out)) and self.out.shape == ()

    def blocker(self, mode: str) -> Blocker | None:
        """The equation that forbids one derivative in ``mode``, "fwd" or "rev"; None if it is legal."""
        if self.jaxpr is None:
            return None
        jaxpr = self.jaxpr.jaxpr
        active = [True] * len(jaxpr.invars)
        live = [i < len(jax.tree.leaves(self.out)) for i in range(len(jaxpr.outvars))]
        found = find_blocker(jaxpr, active, live, mode)
        if found is None and self.on_device and mode == "rev":
            return find_equation(jaxpr, active, live, lambda _, eqn, __: is_collective(eqn))
        return found

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
        program = trace(fun, self.x) if self.jaxpr is not None else Program(fun, self.x, None, None)
        return replace(program, on_device=self.on_device)

    def composition_blocker(self, mode: str) -> Blocker | None:
        """The equation that forbids two derivatives composed as ``mode``, such as "fwd_over_rev"."""
        outer, _, inner = mode.partition("_over_")
        return self.blocker(inner) or (self.reverse if inner == "rev" else self.forward).blocker(outer)


def trace(fun: Callable[[Tree], Any], x: Tree) -> Program:
    """Trace ``fun``, which returns ``(out, aux)``, at ``x``."""
    try:
        jaxpr, (out, aux) = jax.make_jaxpr(fun, return_shape=True)(x)
    except _NEEDS_VALUES:  # a branch on a value: legal, as for jax.hessian, unless a transformation outside traces it
        out, _ = fun(x)
        return Program(lambda x: _as_arrays(fun(x)), x, jax.tree.map(jax.typeof, out), None)
    structure = jax.tree.structure((out, aux))

    def replay(x: Tree) -> tuple[Any, Any]:
        return _as_arrays(structure.unflatten(jex.core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(x))))

    return Program(replay, x, out, jaxpr)


def _as_arrays(outputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """``(out, aux)`` with plain numbers as arrays: numbers that a function returns are literals of its jaxpr."""

    def array(leaf: Any) -> Any:
        is_number = (not isinstance(leaf, jax.Array) and hasattr(leaf, "__array__")) or isinstance(leaf, float)
        return jnp.asarray(leaf, jax.typeof(leaf).dtype) if is_number else leaf

    return jax.tree.map(array, outputs)


def trace_on_device(fun: Callable[[Tree], Any], x: Tree) -> Program:
    """Trace ``fun`` as the function of one device of a mesh: inside ``jax.shard_map`` nothing is summed over devices.

    Reverse mode sums a derivative with respect to a value that all devices share; forward mode does not. So ``x`` is
    made to vary over the devices over which the output does. Reverse mode then gives the derivative of one device,
    unless the function sums over devices: the other devices' part of the derivative is missing, and reverse is illegal.
    """
    program = trace(fun, x)
    outputs = program.out if program.jaxpr is None else program.jaxpr.out_avals[: len(jax.tree.leaves(program.out))]
    varying = vary_like(x, outputs)
    if all(a is b for a, b in zip(jax.tree.leaves(varying), jax.tree.leaves(x), strict=True)):
        return program
    return replace(trace(fun, varying), on_device=True)


def equation_has(primitive: str, eqn: JaxprEqn) -> bool:
    """Whether ``primitive`` is that of an equation or occurs in its bodies."""
    bodies = jex.core.jaxprs_in_params(eqn.params)
    return eqn.primitive.name == primitive or any(has_primitive(primitive, body) for body in bodies)


def has_primitive(primitive: str, jaxpr: Jaxpr | ClosedJaxpr | None) -> bool:
    """Whether ``primitive`` occurs, also in the bodies of loops, branches and calls."""
    return jaxpr is not None and any(equation_has(primitive, eqn) for eqn in jaxpr.eqns)
