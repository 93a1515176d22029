"""``explain``: legality and cost of each composition of modes, and the choice of ``mode="auto"``."""

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from curvature import _checks, _trees
from curvature._errors import public
from curvature._types import HessianMode, JacobianMode, Objective, Tree
from curvature.diagnostics._reports import ModeCost, ModeReport
from curvature.programs import _traced
from curvature.programs._legality import active_outputs
from curvature.programs._mean_structure import Examples
from curvature.transforms import _modes
from curvature.transforms._hessian import hessian, hvp
from curvature.transforms._jacobian import auto_chunk_of, gradient_of, jacobian, with_aux
from curvature.transforms._mean_hessian import find_structure
from curvature.transforms._sites import rules_of_sites
from curvature.transforms._tap_hessian import Points

_COMPOSITIONS = get_args(HessianMode)[1:]
_DIRECTIONS = get_args(JacobianMode)[1:]
_MOST_SECONDS = 2.0  # a mode whose estimated time per call is longer is not run
_MOST_BYTES = 4 * 2**30  # a mode with more temporary memory is not run

Call = Callable[[], Any]
Kind = Literal["gradient", "hvp", "hessian", "jacobian"]


@public
def explain(f: Objective, x: Tree, *args: Any, measure: bool = False) -> ModeReport:
    """Explain each composition of modes for the derivatives of ``f``: is it legal, its cost, is it chosen.

    The derivatives of a scalar function are the gradient, the Hessian-vector product ``H v`` and the Hessian
    ``H[i, j] = d^2 f / dx_i dx_j``; the derivative of a vector-valued function is the Jacobian ``J[o, i] = d f_o / d
    x_i``.

    Args:
        f: the function, ``f(x, *args)``, whose outputs are floating arrays.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated: arrays and numbers.
        measure: whether to run and time each mode too, except modes that would take over two seconds per call,
            estimated from their number of passes.

    Returns:
        A report that prints as a table, with the figures as attributes: ``report.way("hvp").mode`` is the choice of
        ``auto``, ``report.way("hessian", "rev_over_rev").temporary_bytes`` the memory of another mode. If no mode is
        legal, the rows state the reasons. If the Hessian is assembled from examples, ``report.sites`` has the rule for
        each equation that a leaf of ``x`` enters, with its line in the user's code.

    Raises:
        TypeError: if ``f`` is not callable, a leaf of ``x`` or of the output is not of a real floating dtype, data is
            not an array, or the call is traced.

    Cost: compiles each legal mode, up to ten; runs nothing unless ``measure`` is set. XLA counts the FLOPs of the body
        of a loop once: compare FLOPs only between modes without chunks or loops.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> report = curvature.explain(lambda x: jnp.sum(x**3), jnp.arange(3.0))
        >>> report.way("hvp").mode, report.way("hessian", "fwd_over_rev").legal
        ('fwd_over_rev', True)

    References: Griewank and Walther, Evaluating Derivatives, 2nd ed. (2008), chapter 4, doi:10.1137/1.9780898717761.
    """
    _checks.check_callable("f", f)
    x = _checks.check_point("x", x)
    _checks.check_entries("x", x)
    _checks.check_data(args)
    _checks.check_concrete({"x": x, "args": args})
    program = _traced.trace(lambda x: with_aux(f(x, *args), False), x)
    _checks.check_floating_output("f", program.out)
    structure = find_structure(program)
    kinds: tuple[Kind, ...] = ("gradient", "hvp", "hessian") if program.is_scalar else ("jacobian",)
    ways = tuple(itertools.chain(*(_ways(kind, program, f, x, args, measure) for kind in kinds)))
    if structure is not None:  # then auto assembles the Hessian from taps
        others = tuple(dataclasses.replace(way, chosen=way.chosen and way.derivative != "hessian") for way in ways)
        ways = (*others, _cost("hessian", "taps", True, hessian(f), (x, *args), measure, True))
    unused, flat = _leaves_without(program)
    return ModeReport(
        name=getattr(f, "__name__", type(f).__name__),
        ways=ways,
        num_inputs=_trees.num_entries(x),
        num_outputs=_trees.num_entries(program.out),
        chunk=_chunk(program, ways),
        unused=unused,
        without_curvature=flat,
        structure=None if structure is None else _describe_structure(*structure),
        sites=() if structure is None else rules_of_sites(structure[1], x),
        remarks=_remarks(program, ways, measure),
    )


def _ways(
    kind: Kind, program: _traced.Program, f: Objective, x: Tree, args: tuple[Any, ...], measure: bool
) -> list[ModeCost]:
    """The rows of one derivative."""
    modes = _COMPOSITIONS if kind in ("hvp", "hessian") else _DIRECTIONS
    chosen = _choice(kind, program)
    seconds = 0.0  # per pass, once the chosen mode has been timed
    ways = {}
    for mode in sorted(modes, key=lambda mode: mode != chosen):
        blocker = program.composition_blocker(mode) if kind in ("hvp", "hessian") else program.blocker(mode)
        if blocker is not None:
            ways[mode] = ModeCost(kind, mode, False, str(blocker))
            continue
        passes = _passes(kind, mode, program)
        function, operands = _way_function(kind, mode, f, x, args)
        run = measure and passes * seconds <= _MOST_SECONDS
        ways[mode] = _cost(kind, mode, mode == chosen, function, operands, run, program.jaxpr is not None)
        if mode == chosen:
            seconds = (ways[mode].seconds or 0.0) / passes
    return [ways[mode] for mode in modes]


def _choice(kind: Kind, program: _traced.Program) -> str | None:
    """The mode that ``auto`` chooses, by the function that chooses it; None if no mode is legal."""
    try:
        if kind in ("hvp", "hessian"):
            return _modes.choose_composition(program, "auto", whole=kind == "hessian")
        return _modes.choose_jacobian(program, "auto")
    except TypeError:  # the rows state the blockers
        return None


def _passes(kind: Kind, mode: str, program: _traced.Program) -> int:
    """The number of passes through ``f`` that a mode takes, up to a small factor."""
    inputs, outputs = _trees.num_entries(program.x), _trees.num_entries(program.out)
    if kind in ("gradient", "jacobian"):
        return inputs if mode == "fwd" else outputs
    of_product = inputs if mode == "fwd_over_fwd" else 1
    if kind == "hvp":
        return of_product
    return inputs * (inputs if mode.endswith("fwd") else 1)


def _way_function(
    kind: Kind, mode: Any, f: Objective, x: Tree, args: tuple[Any, ...]
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    if kind == "hvp":
        return functools.partial(hvp, f, mode=mode), (x, jax.tree.map(jnp.ones_like, x), *args)
    if kind == "hessian":
        return hessian(f, mode=mode), (x, *args)
    if kind == "jacobian":
        return jacobian(f, mode=mode), (x, *args)

    def gradient(x: Tree, *args: Any) -> Any:
        program = _traced.trace(lambda x: with_aux(f(x, *args), False), x)
        return gradient_of(program, x, mode)[0]

    return gradient, (x, *args)


def _cost(
    kind: Kind, mode: str, chosen: bool, function: Callable[..., Any], operands: Any, run: bool, traceable: bool
) -> ModeCost:
    """The row of a legal mode: XLA's figures after compilation, and its time."""
    if not traceable:
        seconds = _median_seconds(lambda: function(*operands)) if run else None
        return ModeCost(kind, mode, chosen, seconds=seconds, remark="runs without jit only")

    def fresh(*operands: Any) -> Any:  # a new function, so that jit compiles instead of using its cache
        return function(*operands)

    start = time.perf_counter()
    compiled = jax.jit(fresh).lower(*operands).compile()
    compile_seconds = time.perf_counter() - start
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis()
    temporary = getattr(memory, "temp_size_in_bytes", None)
    run = run and (temporary or 0) <= _MOST_BYTES
    return ModeCost(
        kind,
        mode,
        chosen,
        flops=costs.get("flops") if isinstance(costs, dict) else None,
        temporary_bytes=temporary,
        compile_seconds=compile_seconds,
        seconds=_median_seconds(lambda: compiled(*operands)) if run else None,
    )


def _describe_structure(examples: Examples, points: Points) -> str:
    return (
        f"f is a sum or mean over {len(examples.batch[0]):,} examples: 'taps' assembles its Hessian as mean_hessian "
        f"does, along {points.num_directions:,} directions."
    )


def _median_seconds(call: Call, budget: float = 0.2, most: int = 51) -> float:
    """The median time of the calls that fit into ``budget`` seconds, at least three, after a warm-up."""
    jax.block_until_ready(call())
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < budget and len(seconds) < most):
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _chunk(program: _traced.Program, ways: tuple[ModeCost, ...]) -> int | None:
    """The number of columns or rows of the last kind of derivative that the chosen mode evaluates at once."""
    way = next((way for way in reversed(ways) if way.chosen), None)
    if way is None or way.derivative not in ("hessian", "jacobian") or way.mode == "taps" or program.jaxpr is None:
        return None
    if way.derivative == "jacobian":
        return auto_chunk_of(program.fun, program.x, way.mode)
    outer, _, inner = way.mode.partition("_over_")
    return auto_chunk_of(lambda x: gradient_of(program, x, inner), program.x, outer)


def _leaves_without(program: _traced.Program) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The paths of the leaves that the function, and that its first derivative, does not depend on."""
    if program.jaxpr is None:
        return (), ()
    unused = _inert_leaves(program)
    legal = [mode for mode in ("rev", "fwd") if program.blocker(mode) is None]
    if not (program.is_scalar and legal):
        return unused, ()
    return unused, _inert_leaves(program.reverse if legal[0] == "rev" else program.forward)


def _inert_leaves(program: _traced.Program) -> tuple[str, ...]:
    """The paths of the leaves of ``x`` with respect to which no output of the program has a derivative."""
    assert program.jaxpr is not None
    jaxpr = program.jaxpr.jaxpr
    outputs = len(jax.tree.leaves(program.out))
    inert = []
    for i, (path, _) in enumerate(jax.tree_util.tree_flatten_with_path(program.x)[0]):
        if not any(active_outputs(jaxpr, [i == j for j in range(len(jaxpr.invars))])[:outputs]):
            inert.append("x" + jax.tree_util.keystr(path))
    return tuple(inert)


def _remarks(program: _traced.Program, ways: tuple[ModeCost, ...], measure: bool) -> tuple[str, ...]:
    remarks = []
    if program.jaxpr is None:
        remarks.append(
            "f branches on values, so it cannot be traced: nothing was compiled, and whether a mode is legal shows "
            "only when it runs. Use jnp.where or jax.lax.cond instead of if."
        )
    elif not any(way.chosen for way in ways):
        remarks.append(
            "No mode can differentiate f. custom_vjp_call has no forward derivative (custom_jvp has both), while has "
            "no reverse derivative (scan, or fori_loop with constant bounds, has both)."
        )
    if any(way.compile_seconds is not None for way in ways):
        remarks.append("FLOP is XLA's count, which takes the body of a loop, and so of a chunk, once.")
    if measure and any(way.legal and way.seconds is None for way in ways):
        remarks.append("Not run: what would take over 2 seconds a call, judged by its passes, or over 4 GiB.")
    return tuple(remarks)
