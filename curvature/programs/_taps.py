"""Where the parameters of a loss meet its data: the taps from which per-example derivatives are assembled.

The loss of one example is traced once. What its jaxpr computes from the parameters alone is the same for all examples
and is computed once. Each other equation that a parameter enters is a site: shifting its output by ``eps`` and
differentiating by ``eps`` at zero gives the cotangent ``d`` there, and from ``d`` and the equation's other inputs
follows the gradient of the parameter (see ``_affine.py``), which need not be formed.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
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
    Scan,
    Variable,
    dependents,
    inline,
    is_floating,
    is_real,
    open_scan,
)
from curvature.programs._views import View


class Origin(NamedTuple):
    """Where a variable computed from the parameters alone comes from.

    Attributes:
        root: a leaf, or what the parameters were last computed to be other than by moving axes; None for what a scan
            computes from them inside.
        axes: for each axis of the variable, the axis of the root that it is; None where it only repeats.
        loops: for each scan around it, the axis of the root that the scan slices; None for a constant of that scan.
    """

    root: Variable
    axes: tuple[int | None, ...]
    loops: tuple[int | None, ...] = ()


class Site(NamedTuple):
    """An equation that parameters enter together with data.

    Attributes:
        eqn: the equation.
        operands: which of its inputs are parameters.
        origins: where each of them comes from.
        form: the ``Form``, if it is affine in its one parameter in a way known here, else None.
        lengths: the lengths of the scans around it.
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

    def inputs(self, env: Environment) -> Any:
        """What enters beside parameters: the canonical input ``a``, or a list of all other inputs if it has no form."""
        others = env.read([v for n, v in enumerate(self.eqn.invars) if n not in self.operands])
        return others if self.form is None else self.form.inputs(*others)

    @property
    def group(self) -> Axes:
        """The axes of the root that the canonical form is batched over: those that scans slice come first."""
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
    """One jaxpr taken apart: its sites by the number of their equation, and the scans that have some inside."""

    jaxpr: Jaxpr
    consts: list[Any]
    sites: dict[int, Site]
    scans: dict[int, tuple[Scan, "_Level"]]

    def all_sites(self) -> Iterator[Site]:
        """Those of this level and of the scans in it, in the order of evaluation."""
        for k in range(len(self.jaxpr.eqns)):
            if k in self.scans:
                yield from self.scans[k][1].all_sites()
            elif k in self.sites:
                yield self.sites[k]


@dataclass(frozen=True)
class Taps:
    """The loss of one example with all its sites.

    Attributes:
        level: the jaxpr, whose inputs are the leaves of the parameters and then those of the example.
        on_data: the variables that depend on the data.
        leaves: the variables of the parameters.
        roots: the roots that sites use.
        views: for a root that holds the entries of one leaf, each exactly once, how they are rearranged.
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
        """Everything that is computed from parameters and constants alone."""
        env = self.given(leaves)
        for eqn in self.level.jaxpr.eqns:
            if not any(v in self.on_data for v in eqn.outvars):
                env.evaluate(self.level.jaxpr, eqn)
        return env

    def given(self, leaves: Sequence[Array]) -> Environment:
        """Parameters and constants, and nothing computed yet."""
        env = Environment()
        env.write(self.level.jaxpr.constvars, self.level.consts)
        env.write(self.leaves, leaves)
        return env

    def with_example(self, values: Environment, example: Sequence[Any]) -> Environment:
        """The same values, and an example."""
        env = Environment(values)
        env.write(self.level.jaxpr.invars[len(self.leaves) :], example)
        return env

    def loss_in(self, env: Environment) -> Array:
        """The loss, once it is evaluated."""
        return env.read(self.level.jaxpr.outvars)[0]

    def root_values(self, leaves: Sequence[Array]) -> list[Array]:
        """The roots as functions of the leaves."""
        return self.parameter_values(leaves).read(self.roots)

    def shifts(self) -> list[list[Array]]:
        """For each output of each site a zero of its shape, by which it is shifted."""
        return [[zeros((*site.lengths, *v.aval.shape), v.aval) for v in site.outputs] for site in self.sites]

    def shifted(self, values: Environment, example: Sequence[Any], shifts: Any) -> tuple[Array, list[Any]]:
        """The loss of one example whose sites are shifted, and the inputs of each site."""
        env = self.with_example(values, example)
        captured = _run(self.level, env, iter(shifts))
        return self.loss_in(env), captured

    def cotangents(self, values: Environment, example: Sequence[Any]) -> tuple[list[Any], list[list[Array]]]:
        """For each site its inputs, and the cotangents of its outputs."""
        d, captured = jax.grad(lambda eps: self.shifted(values, example, eps), has_aux=True)(self.shifts())
        return captured, d


def trace_taps(function: str, loss: Objective, params: Tree, example: tuple[Any, ...]) -> Taps | None:
    """The taps of a loss; None where it has none to offer: no reverse mode, no jaxpr, parameters that do not meet data.

    A loss in which parameters become complex numbers has none either: shifts and cotangents are real here. Nor has one
    in which parameters enter a ``custom_vjp``: cotangents are scaled and added up before they are sent back through
    what parameters enter, which need not be linear there.
    """
    whole = _traced.trace(lambda point: (loss(point[0], *point[1]), None), (params, example))
    _checks.check_scalar_output(function, "loss", whole.out)
    if whole.jaxpr is None:
        return None
    program = _traced.trace(lambda params: whole.fun((params, example)), params)
    if program.blocker("rev") is not None:
        return None
    closed = inline(whole.jaxpr)
    leaves = jax.tree.leaves(params)
    inputs = closed.jaxpr.invars[: len(leaves)]
    on_data = dependents(closed.jaxpr, closed.jaxpr.invars[len(leaves) :])
    if not all(isinstance(v, Var) and v in on_data for v in closed.jaxpr.outvars):
        return None
    if any(is_floating(v) and not is_real(v) for v in dependents(closed.jaxpr, inputs)):
        return None
    origins = {v: Origin(v, tuple(range(v.aval.ndim))) for v in inputs}
    views = {v: View(k, v.aval.shape) for k, v in enumerate(inputs)}
    level = _analyze(closed, on_data, origins, views)
    assert level is not None, "only a scan can fail to be taken apart"
    roots = tuple(dict.fromkeys(origin.root for site in level.all_sites() for origin in site.origins))
    if not roots or _enter_custom_vjp(level, on_data, dependents(closed.jaxpr, inputs)):
        return None
    views = {root: views[root] for root in roots if root in views}
    leaves_of = _leaves_of(closed.jaxpr, inputs, roots)
    return Taps(level, frozenset(on_data), tuple(inputs), roots, views, leaves_of, program)


def _enter_custom_vjp(level: _Level, on_data: set[Variable], on_parameters: set[Variable]) -> bool:
    """Whether parameters alone, or at a site without a form, go through a ``custom_vjp``."""
    alone = [e for e in level.jaxpr.eqns if not on_parameters.isdisjoint(e.outvars) and on_data.isdisjoint(e.outvars)]
    alone += [site.eqn for site in level.all_sites() if site.form is None]
    return any(_traced.equation_has("custom_vjp_call", eqn) for eqn in alone)


# ---- analysis ----------------------------------------------------------------------------------------------------


def _leaves_of(jaxpr: Jaxpr, leaves: Sequence[Variable], roots: Iterable[Variable]) -> dict[Variable, frozenset[int]]:
    """Which leaves each root depends on."""
    known = {v: frozenset([k]) for k, v in enumerate(leaves)}
    for eqn in jaxpr.eqns:
        together = frozenset().union(*(known.get(v, ()) for v in eqn.invars if isinstance(v, Var)))
        known.update(dict.fromkeys(eqn.outvars, together))
    return {root: known[root] for root in roots}


def _analyze(
    closed: ClosedJaxpr,
    on_data: set[Variable],
    origins: dict[Variable, Origin],
    views: dict[Variable, View],
    lengths: tuple[int, ...] = (),
) -> _Level | None:
    """Find the sites. Within scans, of these ``lengths``, each must have a form and a root outside; else None."""
    sites, scans = {}, {}
    for k, eqn in enumerate(closed.jaxpr.eqns):
        operands = [n for n, v in enumerate(eqn.invars) if isinstance(v, Var) and v in origins]
        if not any(v in on_data for v in eqn.outvars):
            if operands:
                _propagate(eqn, origins, views, inside=bool(lengths))
            continue
        operands = [n for n in operands if is_floating(eqn.invars[n]) and eqn.invars[n].aval.size]
        if not operands or not any(v.aval.size for v in eqn.outvars if is_floating(v)):
            continue  # no entries, no derivative
        if eqn.primitive.name == "scan":
            opened = _analyze_scan(eqn, on_data, origins, lengths)
            if opened is not None:
                scans[k] = opened
                continue
        found = tuple(origins[eqn.invars[n]] for n in operands)
        form = canonical_form(eqn, operands[0], found[0].axes) if len(operands) == 1 else None
        if lengths and (form is None or found[0].root is None):
            return None
        sites[k] = Site(eqn, tuple(operands), found, form, lengths)
    return _Level(closed.jaxpr, closed.consts, sites, scans)


def _analyze_scan(
    eqn: Equation,
    on_data: set[Variable],
    origins: dict[Variable, Origin],
    lengths: tuple[int, ...],
) -> tuple[Scan, _Level] | None:
    """A scan whose body's sites are all known; None if it must be taken for one equation.

    Precondition: parameters reach the outputs of the body through its sites only. One that is carried or stacked as
    what it is, or as a function of parameters alone, would act behind the scan without one.
    """
    scan = open_scan(eqn)
    first_slice = scan.num_consts + scan.num_carry
    inner_data, inner_origins = set(), {}
    for n, (outer, inner) in enumerate(zip(eqn.invars, scan.body.jaxpr.invars, strict=True)):
        known = origins.get(outer) if isinstance(outer, Var) else None
        if scan.num_consts <= n < first_slice:
            if known is not None:  # a carry that starts from a parameter
                return None
            inner_data.add(inner)
        elif known is not None and n < scan.num_consts:
            inner_origins[inner] = known._replace(loops=(*known.loops, None))
        elif known is not None:
            inner_origins[inner] = Origin(known.root, known.axes[1:], (*known.loops, known.axes[0]))
        elif isinstance(outer, Var) and outer in on_data:
            inner_data.add(inner)
    inner_data = dependents(scan.body.jaxpr, inner_data)
    level = _analyze(scan.body, inner_data, inner_origins, {}, (*lengths, scan.length))
    passed_on = [v for v in scan.body.jaxpr.outvars if isinstance(v, Var) and v in inner_origins and is_floating(v)]
    return None if level is None or any(v not in inner_data for v in passed_on) else (scan, level)


def _propagate(eqn: Equation, origins: dict[Variable, Origin], views: dict[Variable, View], inside: bool) -> None:
    """Where the outputs of an equation of parameters alone come from."""
    operand = eqn.invars[0] if isinstance(eqn.invars[0], Var) else None
    view = views[operand].extended(eqn) if operand in views else None
    if view is not None:
        views[eqn.outvars[0]] = view
    source = origins.get(operand)
    moved = None if source is None else _moved_axes(eqn, source.axes)
    if source is not None and moved is not None:
        origins[eqn.outvars[0]] = source._replace(axes=moved)
        return
    for v in eqn.outvars:
        origins[v] = Origin(None if inside else v, tuple(range(getattr(v.aval, "ndim", 0))))


def _moved_axes(eqn: Equation, axes: tuple[int | None, ...]) -> tuple[int | None, ...] | None:
    """The axes of what an equation makes from one variable by moving or repeating axes alone, else None.

    Precondition: one real operand and one real output, and each axis of the output is one of the operand or repeats.
    """
    name, params, (out, *others) = eqn.primitive.name, eqn.params, eqn.outvars
    operand = eqn.invars[0]
    if others or len(eqn.invars) != 1 or not is_real(operand) or not is_real(out):
        return None
    if name in ("convert_element_type", "copy", "copy_p"):
        return axes
    if name == "transpose":
        return tuple(axes[k] for k in params["permutation"])
    if name == "squeeze":
        return tuple(axis for k, axis in enumerate(axes) if k not in params["dimensions"])
    if name == "broadcast_in_dim":
        result: list[int | None] = [None] * out.aval.ndim
        for axis, k, size in zip(axes, params["broadcast_dimensions"], operand.aval.shape, strict=True):
            result[k] = axis if size == out.aval.shape[k] else None
        return tuple(result)
    if name == "reshape" and params["dimensions"] is None:  # only axes of size one come or go
        kept = iter([axis for axis, size in zip(axes, operand.aval.shape, strict=True) if size != 1])
        sizes = [size for size in operand.aval.shape if size != 1]
        if sizes == [size for size in out.aval.shape if size != 1]:
            return tuple(None if size == 1 else next(kept) for size in out.aval.shape)
    return None


# ---- evaluation --------------------------------------------------------------------------------------------------


def _run(level: _Level, env: Environment, shifts: Iterator[list[Array]]) -> list[Any]:
    """Evaluate a level with its sites shifted; returns the inputs of each site."""
    captured = []
    for k, eqn in enumerate(level.jaxpr.eqns):
        if not env.lacks(eqn):
            continue
        if k in level.scans:
            captured += _run_scan(eqn, *level.scans[k], env, shifts)
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


def _run_scan(eqn: Equation, scan: Scan, level: _Level, env: Environment, shifts: Iterator[list[Array]]) -> list[Any]:
    values = env.read(eqn.invars)
    consts, rest = values[: scan.num_consts], values[scan.num_consts :]
    sliced = rest[scan.num_carry :], [next(shifts) for _ in level.all_sites()]

    def step(carry: list[Any], slices: Any) -> Any:
        inner = Environment()
        inner.write(level.jaxpr.constvars, level.consts)
        inner.write(level.jaxpr.invars, [*consts, *carry, *slices[0]])
        captured = _run(level, inner, iter(slices[1]))
        outs = inner.read(level.jaxpr.outvars)
        return outs[: scan.num_carry], (outs[scan.num_carry :], captured)

    carry, (stacked, captured) = jax.lax.scan(step, rest[: scan.num_carry], sliced, scan.length, scan.reverse)
    env.write(eqn.outvars, [*carry, *stacked])
    return captured
