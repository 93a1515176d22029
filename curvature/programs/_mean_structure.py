"""Detects that a scalar function is a sum or mean over a batch axis of its data.

An axis of the data is followed from equation to equation as long as nothing mixes its entries, up to sums over it. The
function must be affine in these sums: ``f(x) = A(x, sum_b s(x, example_b))``. It is then the mean over the B examples
of ``A(x, B s(x, example_b))``, which the program computes on a batch of one when each sum is multiplied by B.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jaxtyping import Array

from curvature._sharding import spec_of, varying_axes
from curvature._types import Tree
from curvature.programs._batch_axis import Axes, Rule, axis_rule, on_batch_of_one
from curvature.programs._jaxprs import (
    Environment,
    Equation,
    Variable,
    dependents,
    equation_function,
    inline,
    is_floating,
)
from curvature.programs._primitives import ADDITIONS, LINEAR_UNARY
from curvature.programs._traced import Program


class Examples(NamedTuple):
    """A function as a mean over examples.

    Attributes:
        loss: ``loss(x, *example) -> scalar``, whose mean over the examples is the function.
        batch: the data that differs between examples, with a leading batch axis.
    """

    loss: Callable[..., Array]
    batch: list[Array]


def find_examples(program: Program) -> Examples | None:
    """A scalar function without aux as a mean over examples, or None where that cannot be shown."""
    if program.jaxpr is None or not program.is_scalar or len(program.jaxpr.jaxpr.outvars) != 1:
        return None
    closed = inline(program.jaxpr)
    avals: list[Any] = [v.aval for v in closed.jaxpr.constvars]
    if any(varying_axes(aval) or any(spec_of(aval)) for aval in avals):
        return None  # the data lies on the devices of a mesh, and a batch of one would lie there in another way
    for size in _leading_sizes(closed.jaxpr):
        reading = _read_program(closed.jaxpr, size)
        if closed.jaxpr.outvars[0] in reading.sums:
            return _build_examples(closed, reading)
    return None


def _leading_sizes(jaxpr: Jaxpr) -> list[int]:
    """The candidates for the number of examples: the leading sizes of the data, those with the most entries first."""
    entries: dict[int, int] = {}
    constants: list[Variable] = list(jaxpr.constvars)
    for v in constants:
        if v.aval.ndim and v.aval.shape[0] > 1:
            entries[v.aval.shape[0]] = entries.get(v.aval.shape[0], 0) + v.aval.size
    return sorted(entries, key=lambda size: -entries[size])


# ---- following the batch axis ----------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """One equation, to be evaluated for a batch of one.

    Attributes:
        eqn: the equation.
        needs: for each operand the axis along which it is cut into examples; None for an operand that is not cut.
        axes: for each output the axis of its examples; None where it has been summed over.
    """

    eqn: Equation
    needs: Axes
    axes: Axes


@dataclass
class _Reading:
    """The batch axis of each variable of a jaxpr.

    Attributes:
        jaxpr: the jaxpr, inlined.
        size: the number of examples.
        data: the variables that are known before the function is evaluated. They may be cut along any axis of ``size``.
        axes: the batch axis of the variables that are evaluated for one example only.
        optional: the batch axis of variables that can also be used whole: data, and what only repeats along that axis.
        sums: the variables that are affine in sums over the examples.
        steps: by output, the equations that are evaluated for a batch of one.
        mixed: whether an equation mixes the examples other than by sums in which the function is affine.
        of_derivative: whether the jaxpr is of a derivative.
    """

    jaxpr: Jaxpr
    size: int
    data: set[Variable]
    axes: dict[Variable, int] = field(default_factory=dict)
    optional: dict[Variable, int] = field(default_factory=dict)
    sums: set[Variable] = field(default_factory=set)
    steps: dict[Variable, _Step] = field(default_factory=dict)
    mixed: bool = False
    of_derivative: bool = False

    def read(self) -> "_Reading":
        """Follow the axes through all equations."""
        for eqn in self.jaxpr.eqns:
            if not self.mixed:
                self._read_equation(eqn)
        if self.mixed:
            self.sums, self.axes = set(), {}
        return self

    def _read_equation(self, eqn: Equation) -> None:
        operands = [v for v in eqn.invars if isinstance(v, Var)]
        if any(v in self.sums for v in operands):
            self.mixed |= not self._is_affine(eqn)
            self.sums.update(eqn.outvars)
            return
        is_strict = any(v in self.axes for v in operands)
        step = self._make_step(eqn, self.axes if is_strict else self.optional)
        if step is None:
            self.mixed |= is_strict
            return
        known = self.data.issuperset(eqn.outvars)
        # Without an axis the equation sums over the examples: one term for each, unless it can be used whole.
        if step.axes[0] is None:
            if not known and not self._repeats(step):
                self.mixed |= self._takes_more_memory(eqn)
                self.sums.update(eqn.outvars)
                self.steps.update(dict.fromkeys(eqn.outvars, step))
            return
        target = self.optional if not is_strict and (known or self._repeats(step)) else self.axes
        target.update({v: axis for v, axis in zip(eqn.outvars, step.axes, strict=True) if axis is not None})
        if not known:
            self.steps.update(dict.fromkeys(eqn.outvars, step))

    def _repeats(self, step: _Step) -> bool:
        """Whether an equation of optional operands cuts no data, so that its output is the same for each example."""
        cut = [v for v, axis in zip(step.eqn.invars, step.needs, strict=True) if axis is not None]
        return not any(v in self.data or v in self.axes for v in cut)

    def _takes_more_memory(self, eqn: Equation) -> bool:
        """Whether one term for each example takes more memory than the operands of the sum."""
        return self.size * eqn.outvars[0].aval.size > sum(v.aval.size for v in eqn.invars)

    def _make_step(self, eqn: Equation, axes: dict[Variable, int]) -> _Step | None:
        given = [axes.get(v) if isinstance(v, Var) else None for v in eqn.invars]
        if eqn.primitive.name == "custom_jvp_call":
            rule = self._axes_of_custom(eqn, given)
        else:
            rule = axis_rule(eqn, given, self.size)
        if rule is None or not all(map(self._can_be_cut, eqn.invars, rule[0])):
            return None
        uses = _cut_axes(eqn, rule[0])
        alike = all(not isinstance(v, Var) or uses[v] == axis for v, axis in zip(eqn.invars, rule[0], strict=True))
        return _Step(eqn, *rule) if alike else None  # not where it would cut one variable along two axes

    def _axes_of_custom(self, eqn: Equation, given: Axes) -> Rule | None:
        """The rule of a function with a custom derivative: the function and its derivative must not mix the examples.

        Within a derivative only the function is read: the rule of the derivative may call the function itself.
        """
        (axis, *others) = {axis for axis in given if axis is not None} or {None}
        if axis is None or others or not all(map(is_floating, (*eqn.invars, *eqn.outvars))):
            return None
        needs = [axis if v.aval.shape[axis : axis + 1] == (self.size,) else None for v in eqn.invars]
        body = _read_body(_body_of(eqn), needs, self.size, self.of_derivative)
        if body is None or (not self.of_derivative and _read_derivative(self.jaxpr, eqn, needs, self.size) is None):
            return None
        return needs, [body.axes[v] for v in body.jaxpr.outvars]

    def _can_be_cut(self, v: Any, axis: int | None) -> bool:
        if axis is None:
            return not isinstance(v, Var) or v not in self.axes
        if not isinstance(v, Var):
            return False
        known: Variable = v
        in_data = v in self.data and known.aval.shape[axis] == self.size
        return in_data or axis in (self.axes.get(v), self.optional.get(v))

    def _is_affine(self, eqn: Equation) -> bool:
        """Whether an equation of sums is affine in them, with coefficients that do not depend on ``x``."""
        name, fixed = eqn.primitive.name, [not isinstance(v, Var) or v in self.data for v in eqn.invars]
        if name in LINEAR_UNARY:
            return all(map(is_floating, (*eqn.invars, *eqn.outvars)))  # rounding to integers is not linear
        if name in ADDITIONS:
            return not any(v in self.axes for v in eqn.invars if isinstance(v, Var))
        return (name == "mul" and any(fixed)) or (name == "div" and fixed[1])


def _read_program(jaxpr: Jaxpr, size: int) -> _Reading:
    """Read a function of ``x``, the inputs of the jaxpr; the constants of the jaxpr are the data."""
    on_x = dependents(jaxpr, jaxpr.invars)
    constants: list[Variable] = list(jaxpr.constvars)

    def is_filled(eqn: Equation) -> bool:  # a constant array, which is broadcast for one example instead of sliced
        return eqn.primitive.name == "broadcast_in_dim" and not isinstance(eqn.invars[0], Var)

    data = {*constants, *(v for eqn in jaxpr.eqns for v in eqn.outvars if v not in on_x and not is_filled(eqn))}
    seeds = {v: 0 for v in constants if v.aval.shape[:1] == (size,)}
    return _Reading(jaxpr, size, data, optional=seeds).read()


def _read_body(closed: ClosedJaxpr, axes: Axes, size: int, of_derivative: bool) -> _Reading | None:
    """Read a function of a batch, all of whose outputs must have a batch axis; None where one has not."""
    jaxpr = closed.jaxpr
    given = {v: axis for v, axis in zip(jaxpr.invars, axes, strict=True) if axis is not None}
    reading = _Reading(jaxpr, size, set(), axes=given, of_derivative=of_derivative).read()
    return None if jaxpr.constvars or any(v not in reading.axes for v in jaxpr.outvars) else reading


def _body_of(eqn: Equation) -> ClosedJaxpr:
    return inline(eqn.params["call_jaxpr"])


def _read_derivative(jaxpr: Jaxpr, eqn: Equation, needs: Axes, size: int) -> _Reading | None:
    """Read the derivative of an equation with respect to its distinct variables, along directions."""
    fun, variables = equation_function(jaxpr, eqn)
    avals = [v.aval for v in variables]
    made = jax.make_jaxpr(lambda values, along: jax.jvp(fun, values, along)[1])(avals, avals)
    axes = _cut_axes(eqn, needs).values()
    return _read_body(inline(made), [*axes, *axes], size, of_derivative=True)


def _cut_axes(eqn: Equation, needs: Axes) -> dict[Variable, int | None]:
    """The axis along which each distinct variable of an equation is cut, in the order of ``equation_function``."""
    return {v: axis for v, axis in zip(eqn.invars, needs, strict=True) if isinstance(v, Var)}


# ---- evaluation ----------------------------------------------------------------------------------------------------

Task = tuple[Equation, _Step | None]
"""An equation to evaluate: as it stands in the jaxpr, or, with a step, for a batch of one."""


def _plan(reading: _Reading) -> tuple[list[Task], list[tuple[Variable, int]]]:
    """The equations to evaluate for a batch of one, in order, and which data to cut along which axis."""
    wanted = {(v, reading.axes.get(v)) for v in reading.jaxpr.outvars}
    tasks: list[Task] = []
    cut: dict[tuple[Variable, int], None] = {}
    for eqn in reversed(reading.jaxpr.eqns):
        step = reading.steps.get(eqn.outvars[0])
        if step is not None and not wanted.isdisjoint(zip(eqn.outvars, step.axes, strict=True)):
            tasks.append((eqn, step))
            uses = _cut_axes(eqn, step.needs).items()
            cut.update({(v, axis): None for v, axis in uses if axis is not None and v in reading.data})
            wanted.update((v, None if v in reading.data else axis) for v, axis in uses)
            if step.axes[0] is None:
                continue
        if any((v, None) in wanted for v in eqn.outvars):
            tasks.append((eqn, None))
            wanted.update((v, None) for v in eqn.invars if isinstance(v, Var))
    return tasks[::-1], list(cut)


def _build_examples(closed: ClosedJaxpr, reading: _Reading) -> Examples:
    """The loss of one example, and the data cut into examples; what depends on data alone is evaluated here, once."""
    jaxpr = closed.jaxpr
    tasks, cut = _plan(reading)
    data = Environment()
    data.write(jaxpr.constvars, closed.consts)
    for eqn, step in tasks:
        if step is None and all(v in data for v in eqn.invars if isinstance(v, Var)):
            data.evaluate(jaxpr, eqn)

    def loss(x: Tree, *example: Array) -> Array:
        whole = Environment(data)
        whole.write(jaxpr.invars, jax.tree.leaves(x))
        one = {use: jnp.expand_dims(part, use[1]) for use, part in zip(cut, example, strict=True)}
        _evaluate(reading, tasks, whole, one)
        return whole.read(jaxpr.outvars)[0]

    return Examples(loss, [jnp.moveaxis(data[v], axis, 0) for v, axis in cut])


def _evaluate(
    reading: _Reading, tasks: Sequence[Task], whole: Environment, one: dict[tuple[Variable, int], Array]
) -> None:
    """Evaluate the tasks for a batch of one.

    Args:
        reading: the batch axes of the jaxpr.
        tasks: from ``_plan``.
        whole: the values of variables that are not cut; grows.
        one: by variable and axis, the values for a batch of one along that axis; grows.
    """
    for eqn, step in tasks:
        if step is None:
            if whole.lacks(eqn):
                whole.evaluate(reading.jaxpr, eqn)
            continue
        uses = _cut_axes(eqn, step.needs).items()
        env = Environment({v: whole[v] if axis is None else one[v, axis] for v, axis in uses})
        if eqn.primitive.name == "custom_jvp_call":
            outs = _custom_on_one(reading, step)(*env.values())
        else:
            outs = on_batch_of_one(reading.jaxpr, eqn, step.axes, env)
        if step.axes[0] is None:
            whole.write(eqn.outvars, [reading.size * out for out in outs])
        else:
            one.update(zip(zip(eqn.outvars, step.axes, strict=True), outs, strict=True))  # pyright: ignore


def _run_body(reading: _Reading, axes: Axes, values: Sequence[Any]) -> list[Any]:
    """The outputs of a body for a batch of one."""
    whole, one = Environment(), {}
    for v, axis, value in zip(reading.jaxpr.invars, axes, values, strict=True):
        if axis is None:
            whole[v] = value
        else:
            one[v, axis] = value
    _evaluate(reading, _plan(reading)[0], whole, one)
    return [one[v, reading.axes[v]] for v in reading.jaxpr.outvars]


def _custom_on_one(reading: _Reading, step: _Step) -> Callable[..., list[Any]]:
    """A function with a custom derivative, on a batch of one, as a function of the equation's distinct variables."""
    eqn, size = step.eqn, reading.size
    fun, variables = equation_function(reading.jaxpr, eqn)
    axes = list(_cut_axes(eqn, step.needs).values())
    body = _read_body(_body_of(eqn), step.needs, size, reading.of_derivative)
    assert body is not None  # it has been read before

    @jax.custom_jvp
    def on_one(*values: Any) -> list[Any]:
        env = Environment(zip(variables, values, strict=True))
        return _run_body(body, step.needs, env.read(eqn.invars))

    @on_one.defjvp
    def _(values: Sequence[Any], directions: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        derivative = _read_derivative(reading.jaxpr, eqn, step.needs, size)
        if derivative is not None:
            return on_one(*values), _run_body(derivative, [*axes, *axes], [*values, *directions])
        # The derivative may mix examples, as far as can be shown: evaluate it on equal examples, and keep the first.
        along = jax.jvp(fun, _repeat_examples(values, axes, size), _repeat_examples(directions, axes, size))[1]
        first = [jnp.take(out, jnp.array([0]), axis) for out, axis in zip(along, step.axes, strict=True)]
        return on_one(*values), first

    return on_one


def _repeat_examples(values: Sequence[Any], axes: Axes, size: int) -> list[Any]:
    """A batch of equal examples."""
    return [v if axis is None else jnp.repeat(v, size, axis) for v, axis in zip(values, axes, strict=True)]
