"""Taps: the equations of a loss where parameters meet data, from which per-example derivatives are assembled.

The loss of one example is traced once. Values that depend on the parameters alone are the same for all examples and are
computed once. Each other equation that a parameter enters is a site. Shifting its output by ``eps`` and differentiating
with respect to ``eps`` at zero gives the cotangent ``d`` of the output. The gradient of the parameter follows from
``d`` and the equation's other inputs (see ``_affine.py``), and need not be formed.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Var
from jaxtyping import Array

from curvature import _checks
from curvature._sharding import zeros
from curvature._types import Objective, Tree
from curvature.programs import _traced
from curvature.programs._affine import Axes, canonical_form
from curvature.programs._jaxprs import (
    Environment,
    Equation,
    Loop,
    Variable,
    dependents,
    inline,
    is_floating,
    is_real,
    open_loop,
)
from curvature.programs._views import View, moved_axes


class Origin(NamedTuple):
    """The origin of a variable that is computed from the parameters alone.

    Attributes:
        root: the leaf, or other function of the parameters, of which the variable moves or repeats axes; None for a
            function of the parameters that is computed inside a scan.
        axes: for each axis of the variable, the axis of the root that it is; None where it only repeats.
        loops: for each scan around the variable, the axis of the root that the scan slices; None where the root is a
            constant of that scan.
    """

    root: Variable
    axes: tuple[int | None, ...]
    loops: tuple[int | None, ...] = ()


class Site(NamedTuple):
    """An equation that parameters enter together with data.

    Attributes:
        eqn: the equation.
        operands: the numbers of its inputs that are parameters.
        origins: the origin of each of these inputs.
        form: the canonical ``Form``, if there is one parameter and ``_affine`` has a rule for it, else None.
        lengths: the lengths of the scans around the equation.
    """

    eqn: Equation
    operands: tuple[int, ...]
    origins: tuple[Origin, ...]
    form: Any
    lengths: tuple[int, ...]

    @property
    def outputs(self) -> list[Variable]:
        """The outputs that can carry a derivative."""
        return [v for v in self.eqn.outvars if is_floating(v)]

    @property
    def others(self) -> list[Any]:
        """The inputs that are not parameters, with literals."""
        return [v for n, v in enumerate(self.eqn.invars) if n not in self.operands]

    def inputs(self, env: Environment) -> Any:
        """The canonical input ``a``; for a site without a form, the values of all inputs that are not parameters."""
        others = env.read(self.others)
        return others if self.form is None else self.form.inputs(*others)

    @property
    def group(self) -> Axes:
        """The axes of the root that the canonical form is batched over, those that scans slice first."""
        return (*(axis for axis in self.origins[0].loops if axis is not None), *self.form.group)

    @property
    def axes(self) -> Axes:
        """The axes of the root in the order of g, i and o."""
        return (*self.group, *self.form.rows, *self.form.columns)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """The sizes of g, s, i and o."""
        shape = self.origins[0].root.aval.shape
        groups, rows, columns = (
            math.prod(shape[axis] for axis in axes) for axes in (self.group, self.form.rows, self.form.columns)
        )
        outputs = math.prod(self.lengths) * self.outputs[0].aval.size
        return groups, outputs // max(groups * columns, 1), rows, columns


class _Level(NamedTuple):
    """The sites of one jaxpr, and of the scans in it.

    Attributes:
        jaxpr: the jaxpr, inlined.
        consts: its constants.
        sites: the sites by the number of their equation.
        scans: the scans with sites inside, by the number of their equation, each with the level of its body.
    """

    jaxpr: Jaxpr
    consts: list[Any]
    sites: dict[int, Site]
    scans: dict[int, tuple[Loop, "_Level"]]

    def all_sites(self) -> Iterator[Site]:
        """The sites of this level and of the scans in it, in the order of evaluation."""
        for k in range(len(self.jaxpr.eqns)):
            if k in self.scans:
                yield from self.scans[k][1].all_sites()
            elif k in self.sites:
                yield self.sites[k]


@dataclass(frozen=True)
class Taps:
    """The loss of one example with all its sites.

    Attributes:
        level: the jaxpr, whose inputs are the leaves of the parameters and then the leaves of the example.
        on_data: the variables that depend on the data.
        leaves: the variables of the parameters.
        roots: the roots that sites use.
        views: for each root that holds the entries of one leaf, each exactly once, the rearrangement.
        leaves_of: for each root, the numbers of the leaves that it depends on.
        program: the loss of this example as a function of the parameters.
    """

    level: _Level
    on_data: frozenset[Variable]
    leaves: tuple[Variable, ...]
    roots: tuple[Variable, ...]
    views: dict[Variable, View]
    leaves_of: dict[Variable, frozenset[int]]
    program: _traced.Program

    @cached_property
    def sites(self) -> list[Site]:
        """All sites, in the order of evaluation."""
        return list(self.level.all_sites())

    def parameter_values(self, leaves: Sequence[Array]) -> Environment:
        """The values of all variables that depend on parameters and constants alone."""
        env = self.given(leaves)
        for eqn in self.level.jaxpr.eqns:
            if not any(v in self.on_data for v in eqn.outvars):
                env.evaluate(self.level.jaxpr, eqn)
        return env

    def given(self, leaves: Sequence[Array]) -> Environment:
        """The values of parameters and constants alone."""
        env = Environment()
        env.write(self.level.jaxpr.constvars, self.level.consts)
        env.write(self.leaves, leaves)
        return env

    def with_example(self, values: Environment, example: Sequence[Any]) -> Environment:
        """A copy of the values, with an example added."""
        env = Environment(values)
        env.write(self.level.jaxpr.invars[len(self.leaves) :], example)
        return env

    def loss_of(
        self, values: Environment, example: Sequence[Any], shifts: Mapping[Variable, Array]
    ) -> tuple[Array, Environment]:
        """The loss of one example with some variables shifted, and the values of all variables."""
        env = self.with_example(values, example)
        env.complete(self.level.jaxpr, shifts)
        return env.read(self.level.jaxpr.outvars)[0], env

    def root_values(self, leaves: Sequence[Array]) -> list[Array]:
        """The values of the roots."""
        return self.parameter_values(leaves).read(self.roots)

    def shifts(self) -> list[list[Array]]:
        """A zero shift for each output of each site."""
        return [[zeros((*site.lengths, *v.aval.shape), v.aval) for v in site.outputs] for site in self.sites]

    def shifted(self, values: Environment, example: Sequence[Any], shifts: Any) -> tuple[Array, list[Any]]:
        """The loss of one example with the outputs of its sites shifted, and the inputs of each site."""
        env = self.with_example(values, example)
        captured = _evaluate_shifted(self.level, env, iter(shifts))
        return env.read(self.level.jaxpr.outvars)[0], captured

    def cotangents(self, values: Environment, example: Sequence[Any]) -> tuple[list[Any], list[list[Array]]]:
        """For each site, its inputs and the cotangents of its outputs."""
        d, captured = jax.grad(lambda eps: self.shifted(values, example, eps), has_aux=True)(self.shifts())
        return captured, d


def trace_taps(loss: Objective, params: Tree, example: tuple[Any, ...]) -> Taps | None:
    """The taps of a loss; None if the loss has no reverse mode or no jaxpr, or if no parameter meets data.

    None also if parameters become complex numbers, because shifts and cotangents are real here, or if parameters enter
    a ``custom_vjp``: cotangents are scaled and summed before they are pulled back through equations that parameters
    enter, and the rule of a ``custom_vjp`` need not be linear in them.
    """

    # 1. Trace the loss, as a function of parameters and example, and of the parameters alone.
    def value(point: tuple[Tree, tuple[Any, ...]]) -> tuple[Any, None]:
        return _checks.check_arrays("loss", loss(point[0], *point[1])), None

    whole = _traced.trace(value, (params, example))
    _checks.check_scalar_output("loss", whole.out)
    if whole.jaxpr is None:
        return None
    program = _traced.trace(lambda params: whole.fun((params, example)), params)
    if program.blocker("rev") is not None:
        return None
    # 2. Which variables depend on the data, and which on the parameters.
    closed = inline(whole.jaxpr)
    leaves = jax.tree.leaves(params)
    inputs = closed.jaxpr.invars[: len(leaves)]
    on_data = dependents(closed.jaxpr, closed.jaxpr.invars[len(leaves) :])
    if not all(isinstance(v, Var) and v in on_data for v in closed.jaxpr.outvars):
        return None
    on_parameters = dependents(closed.jaxpr, inputs)
    if any(is_floating(v) and not is_real(v) for v in on_parameters):
        return None
    # 3. The sites, and the roots that enter them.
    origins = {v: Origin(v, tuple(range(v.aval.ndim))) for v in inputs}
    views = {v: View(k, v.aval.shape) for k, v in enumerate(inputs)}
    level = _find_sites(closed, on_data, origins, views)
    assert level is not None, "only the body of a scan can have no level"
    roots = tuple(dict.fromkeys(origin.root for site in level.all_sites() for origin in site.origins))
    # 4. The equations through which cotangents are pulled back: of parameters alone, and sites without a form.
    alone = [e for e in closed.jaxpr.eqns if not on_parameters.isdisjoint(e.outvars) and on_data.isdisjoint(e.outvars)]
    alone += [site.eqn for site in level.all_sites() if site.form is None]
    if not roots or any(_traced.equation_has("custom_vjp_call", eqn) for eqn in alone):
        return None
    views = {root: views[root] for root in roots if root in views}
    leaves_of = _leaves_of(closed.jaxpr, inputs, roots)
    return Taps(level, frozenset(on_data), tuple(inputs), roots, views, leaves_of, program)


# ---- finding the sites -----------------------------------------------------------------------------------------------


def _leaves_of(jaxpr: Jaxpr, leaves: Sequence[Variable], roots: Iterable[Variable]) -> dict[Variable, frozenset[int]]:
    """The numbers of the leaves that each root depends on."""
    known = {v: frozenset([k]) for k, v in enumerate(leaves)}
    for eqn in jaxpr.eqns:
        together = frozenset().union(*(known.get(v, ()) for v in eqn.invars if isinstance(v, Var)))
        known.update(dict.fromkeys(eqn.outvars, together))
    return {root: known[root] for root in roots}


def _find_sites(
    closed: ClosedJaxpr,
    on_data: set[Variable],
    origins: dict[Variable, Origin],
    views: dict[Variable, View],
    lengths: tuple[int, ...] = (),
) -> _Level | None:
    """Find the sites of a jaxpr.

    Args:
        closed: the jaxpr, inlined.
        on_data: its variables that depend on the data.
        origins: the origins of its inputs; grows to all variables that depend on the parameters alone.
        views: the views of its inputs; grows to the views of these variables.
        lengths: the lengths of the scans around the jaxpr. Inside a scan each site must have a form, and a root outside
            of the scan; otherwise None is returned.
    """
    sites, scans = {}, {}
    for k, eqn in enumerate(closed.jaxpr.eqns):
        operands = [n for n, v in enumerate(eqn.invars) if isinstance(v, Var) and v in origins]
        if not any(v in on_data for v in eqn.outvars):
            if operands:
                _propagate_origin(eqn, origins, views, inside=bool(lengths))
            continue
        operands = [n for n in operands if is_floating(eqn.invars[n]) and eqn.invars[n].aval.size]
        if not operands or not any(v.aval.size for v in eqn.outvars if is_floating(v)):
            continue  # without entries there is no derivative
        if eqn.primitive.name == "scan":
            opened = _find_sites_in_scan(eqn, on_data, origins, lengths)
            if opened is not None:
                scans[k] = opened
                continue
        found = tuple(origins[eqn.invars[n]] for n in operands)
        form = canonical_form(eqn, operands[0], found[0].axes) if len(operands) == 1 else None
        if lengths and (form is None or found[0].root is None):
            return None
        sites[k] = Site(eqn, tuple(operands), found, form, lengths)
    return _Level(closed.jaxpr, closed.consts, sites, scans)


def _find_sites_in_scan(
    eqn: Equation,
    on_data: set[Variable],
    origins: dict[Variable, Origin],
    lengths: tuple[int, ...],
) -> tuple[Loop, _Level] | None:
    """The level of the body of a scan; None if the scan must be treated as one equation.

    Precondition: parameters reach the outputs of the body through its sites only. A parameter, or a function of
    parameters alone, that is carried or stacked would act behind the scan without a site.
    """
    loop = open_loop(eqn)
    body = inline(loop.body)
    first_slice = loop.num_consts + loop.num_carry
    inner_data, inner_origins = set(), {}
    for n, (outer, inner) in enumerate(zip(eqn.invars, body.jaxpr.invars, strict=True)):
        known = origins.get(outer) if isinstance(outer, Var) else None
        if loop.num_consts <= n < first_slice:
            if known is not None:  # a carry that starts from a parameter
                return None
            inner_data.add(inner)
        elif known is not None and n < loop.num_consts:
            inner_origins[inner] = known._replace(loops=(*known.loops, None))
        elif known is not None:
            inner_origins[inner] = Origin(known.root, known.axes[1:], (*known.loops, known.axes[0]))
        elif isinstance(outer, Var) and outer in on_data:
            inner_data.add(inner)
    inner_data = dependents(body.jaxpr, inner_data)
    level = _find_sites(body, inner_data, inner_origins, {}, (*lengths, eqn.params["length"]))
    passed_on = [v for v in body.jaxpr.outvars if isinstance(v, Var) and v in inner_origins and is_floating(v)]
    return None if level is None or any(v not in inner_data for v in passed_on) else (loop, level)


def _propagate_origin(
    eqn: Equation, origins: dict[Variable, Origin], views: dict[Variable, View], inside: bool
) -> None:
    """Set the origins and views of the outputs of an equation of parameters alone."""
    operand = eqn.invars[0] if isinstance(eqn.invars[0], Var) else None
    view = views[operand].extended(eqn) if operand in views else None
    if view is not None:
        views[eqn.outvars[0]] = view
    source = origins.get(operand)
    moved = None if source is None else moved_axes(eqn, source.axes)
    if source is not None and moved is not None:
        origins[eqn.outvars[0]] = source._replace(axes=moved)
        return
    for v in eqn.outvars:
        origins[v] = Origin(None if inside else v, tuple(range(getattr(v.aval, "ndim", 0))))


# ---- evaluation --------------------------------------------------------------------------------------------------


def _evaluate_shifted(level: _Level, env: Environment, shifts: Iterator[list[Array]]) -> list[Any]:
    """Evaluate a level with the outputs of its sites shifted; returns the inputs of each site."""
    captured = []
    for k, eqn in enumerate(level.jaxpr.eqns):
        if not env.lacks(eqn):
            continue
        if k in level.scans:
            captured += _evaluate_scan(eqn, *level.scans[k], env, shifts)
            continue
        if k not in level.sites:
            env.evaluate(level.jaxpr, eqn)
            continue
        site = level.sites[k]
        captured.append(site.inputs(env))
        if site.form is not None and site.form.apply is not None:
            (parameter,) = env.read([eqn.invars[n] for n in site.operands])
            env.write(eqn.outvars, [site.form.apply(captured[-1], parameter)])
        else:
            env.evaluate(level.jaxpr, eqn)
        shifted = zip(site.outputs, next(shifts), strict=True)
        env.update({v: env[v] + shift for v, shift in shifted})
    return captured


def _evaluate_scan(
    eqn: Equation, loop: Loop, level: _Level, env: Environment, shifts: Iterator[list[Array]]
) -> list[Any]:
    """Evaluate a scan with the sites of its body shifted; their inputs are stacked over the steps."""
    consts, carry, slices = loop.split(env.read(eqn.invars))
    shifts_inside = [next(shifts) for _ in level.all_sites()]

    def step(carry: list[Any], scanned: Any) -> Any:
        slices, shifts = scanned
        inner = Environment()
        inner.write(level.jaxpr.constvars, level.consts)
        inner.write(level.jaxpr.invars, [*consts, *carry, *slices])
        captured = _evaluate_shifted(level, inner, iter(shifts))
        outs = inner.read(level.jaxpr.outvars)
        return outs[: loop.num_carry], (outs[loop.num_carry :], captured)

    options = {name: eqn.params[name] for name in ("length", "reverse")}
    carry, (stacked, captured) = jax.lax.scan(step, carry, (slices, shifts_inside), **options)
    env.write(eqn.outvars, [*carry, *stacked])
    return captured
