"""A function traced once: which composition of modes to differentiate it by, and how many lanes to run at once."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from curvature import _checks
from curvature._types import ChunkSize, HessianMode, JacobianMode, Tree
from curvature.transforms._accumulate import vary_like
from curvature.transforms._finiteness import keeps_finite
from curvature.transforms._legality import Blocker, find_blocker, find_equation, is_collective
from curvature.transforms._pushforward import directional_derivative

_ORDER = get_args(HessianMode)[1:]  # cheapest first
_CONVOLUTION = "conv_general_dilated"
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
        jaxpr: the jaxpr, or None if the function branches on values, which allows no trace but an eager one.
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
        """What forbids one derivative in ``mode``, "fwd" or "rev"; None if nothing does."""
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
        """What forbids two derivatives composed as ``mode``, such as "fwd_over_rev"."""
        outer, _, inner = mode.partition("_over_")
        first = self.blocker(inner)
        if first is not None:
            return first
        return (self.reverse if inner == "rev" else self.forward).blocker(outer)


def trace(fun: Callable[[Tree], Any], x: Tree) -> Program:
    """Trace ``fun``, which returns ``(out, aux)``, at ``x``."""
    try:
        jaxpr, (out, aux) = jax.make_jaxpr(fun, return_shape=True)(x)
    except _NEEDS_VALUES:  # a branch on a value: legal as long as nothing outside traces it, as for jax.hessian
        out, _ = fun(x)
        return Program(lambda x: _as_arrays(fun(x)), x, jax.tree.map(jax.typeof, out), None)
    structure = jax.tree.structure((out, aux))

    def replay(x: Tree) -> tuple[Any, Any]:
        return _as_arrays(structure.unflatten(jex.core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(x))))

    return Program(replay, x, out, jaxpr)


def _as_arrays(outputs: tuple[Any, Any]) -> tuple[Any, Any]:
    """``(out, aux)`` with plain numbers as arrays: a jaxpr holds those that a function returns as literals."""

    def array(leaf: Any) -> Any:
        is_number = (not isinstance(leaf, jax.Array) and hasattr(leaf, "__array__")) or isinstance(leaf, float)
        return jnp.asarray(leaf, jax.typeof(leaf).dtype) if is_number else leaf

    return jax.tree.map(array, outputs)


def trace_on_device(fun: Callable[[Tree], Any], x: Tree) -> Program:
    """Trace ``fun`` as the function of one device of a mesh: inside ``jax.shard_map`` nothing is summed over devices.

    Reverse mode sums a derivative by what all devices share, forward mode does not. So ``x`` is made to vary over the
    devices over which the output does. Reverse mode then gives the derivative of one device unless the function adds
    up what other devices hold: it would have to send their part of the derivative back, and is illegal.
    """
    program = trace(fun, x)
    outputs = program.out if program.jaxpr is None else program.jaxpr.out_avals[: len(jax.tree.leaves(program.out))]
    varying = vary_like(x, outputs)
    if all(a is b for a, b in zip(jax.tree.leaves(varying), jax.tree.leaves(x), strict=True)):
        return program
    return replace(trace(fun, varying), on_device=True)


def choose_composition(function: str, program: Program, mode: HessianMode, *, whole: bool = False) -> str:
    """The composition to use: ``mode`` itself if it is legal, or the cheapest legal one for "auto".

    ``whole`` says that it is for a matrix and not for products: see ``_order_of_matrix``.
    """
    if mode != "auto":
        blocker = program.composition_blocker(mode)
        if blocker is None:
            return mode
        legal = [other for other in _ORDER if program.composition_blocker(other) is None]
        raise _checks.illegal_mode(function, mode, str(blocker), legal)
    blockers = {}
    for candidate in _order_of_matrix(program) if whole else _ORDER:
        blockers[candidate] = program.composition_blocker(candidate)
        if blockers[candidate] is None:
            return candidate
    raise _checks.no_legal_mode(function, {name: str(blocker) for name, blocker in blockers.items()})


def _order_of_matrix(program: Program) -> Sequence[str]:
    """The compositions for a symmetric matrix, cheapest first."""
    one_dtype = len({leaf.dtype for leaf in jax.tree.leaves(program.x)}) == 1  # of mixed ones rows and columns differ
    if not program.is_scalar or not one_dtype or not _moves_tangents(program) or _has(_CONVOLUTION, program.jaxpr):
        return _ORDER  # convolutions move their axes anyway
    # Reverse over reverse goes first only where no equation of the gradient can make a partial derivative infinite or
    # NaN: it is then as finite as ``jax.hessian``, which is forward over reverse.
    if program.blocker("rev") is not None or program.reverse.jaxpr is None or not keeps_finite(program.reverse.jaxpr):
        return _ORDER
    return ("rev_over_rev", *(mode for mode in _ORDER if mode != "rev_over_rev"))


def _moves_tangents(program: Program) -> bool:
    """Whether pushing many tangents forward costs more than pulling as many cotangents back.

    Where products of matrices meet other operations, the axis of the tangents is moved to the front of every operation
    that mixes them with a constant, and back for the next product; that of cotangents less often. XLA writes each move
    out on a CPU, and a network's Hessian takes up to twice as long pushed as pulled. Without products nothing is
    moved, and pushing fuses better: a chain's Hessian takes a fifth of the time (benchmarks/suites/sparse).
    """
    if jax.default_backend() != "cpu":
        return False
    return _has("dot_general", program.jaxpr) or _has(_CONVOLUTION, program.jaxpr)


_TALL_ON_CPU = 1.5
"""Outputs over inputs from which pushing tangents is the faster way on a CPU where they are moved. Ours, by
benchmarks/suites/modes: networks cross over between 1.3 and 2.1."""

_FEW_LANES = 8  # up to here it does not matter, and pushing is the smaller program


def choose_jacobian(function: str, program: Program, mode: JacobianMode) -> str:
    """The mode to use: ``mode`` itself if it is legal; for "auto" forward for tall Jacobians, reverse for wide."""
    inputs, outputs = num_entries(program.x), num_entries(program.out)
    is_tall = outputs >= inputs and (
        inputs <= _FEW_LANES or outputs >= _TALL_ON_CPU * inputs or not _moves_tangents(program)
    )
    order = ("fwd", "rev") if is_tall else ("rev", "fwd")
    blockers = {name: program.blocker(name) for name in order}
    legal = [name for name in order if blockers[name] is None]
    if not legal:
        raise _checks.no_legal_mode(function, {name: str(blocker) for name, blocker in blockers.items()})
    if mode == "auto":
        return legal[0]
    if mode not in legal:
        raise _checks.illegal_mode(function, mode, str(blockers[mode]), legal)
    return mode


def num_entries(tree: Tree) -> int:
    """The number of entries of all leaves together, plain numbers among them."""
    return sum(map(np.size, jax.tree.leaves(tree)))


# ---- how many lanes at once --------------------------------------------------------------------------------------

_CHUNK_BYTES = 36 * 2**20
"""What the operations of a chunk may write together on a CPU, most of which fuse: ours, by benchmarks/suites/modes."""

_FEW_CHUNKS = 5
"""So few are done all at once: what a loop costs in lost overlap is more than the cache gives. Ours, as above."""

_CONVOLUTION_BYTES = 2**30
"""What they may write if there are convolutions. XLA brings convolutions into the form its fast code takes, but not
within the body of a loop; there they take twice as long, in chunks of any size. Ours, by benchmarks/suites/modes."""

_LEAST_CHUNK = 8  # below this the matrix products of a chunk are too thin to be fast
_MEMORY_SHARE = 8  # on an accelerator a chunk may take one part in eight of the memory


def num_chunks(lanes: int, chunk_size: ChunkSize, call: Callable[[Any], Any], one_lane: Callable[[], Any]) -> int:
    """Into how many equal chunks to cut ``lanes`` lanes, where one lane is ``call(one_lane())``."""
    if chunk_size is None or lanes <= 1:
        return 1
    if chunk_size != "auto":
        return math.ceil(lanes / chunk_size)
    if lanes <= _LEAST_CHUNK:
        return 1
    chunks = _auto_chunks(lanes, jax.make_jaxpr(call)(one_lane()).jaxpr)
    even = range(chunks, chunks + chunks // 4 + 1)  # without a rest to cut off, nothing of the result is copied
    return next((count for count in even if lanes % count == 0), chunks)


def _auto_chunks(lanes: int, jaxpr: Jaxpr) -> int:
    bytes_of_lane = _bytes_written(jaxpr)
    if jax.default_backend() == "cpu":
        if _has(_CONVOLUTION, jaxpr) and lanes * bytes_of_lane <= _CONVOLUTION_BYTES:
            return 1
        chunks = math.ceil(lanes / max(_LEAST_CHUNK, _CHUNK_BYTES // bytes_of_lane))
        return 1 if lanes * bytes_of_lane <= _FEW_CHUNKS * _CHUNK_BYTES else chunks
    memory = jax.local_devices()[0].memory_stats() or {}
    free = memory.get("bytes_limit", 8 * 2**30) - memory.get("bytes_in_use", 0)
    return math.ceil(lanes / max(_LEAST_CHUNK, free // _MEMORY_SHARE // bytes_of_lane))


def _bytes_written(jaxpr: Jaxpr) -> int:
    """What the equations write for one lane; what no lane's input reaches is shared and costs nothing."""
    of_lane = set(jaxpr.invars)
    written = 1
    for eqn in jaxpr.eqns:
        if any(v in of_lane for v in eqn.invars if isinstance(v, Var)):
            of_lane.update(eqn.outvars)
            outs: list[Any] = [v.aval for v in eqn.outvars]
            written += sum(aval.size * aval.dtype.itemsize for aval in outs if hasattr(aval, "size"))
            written += sum(_bytes_written(body) for body in jex.core.jaxprs_in_params(eqn.params))
    return written


def contains(primitive: str, eqn: JaxprEqn) -> bool:
    """Whether an equation is one of ``primitive`` or has one in its bodies."""
    bodies = jex.core.jaxprs_in_params(eqn.params)
    return eqn.primitive.name == primitive or any(_has(primitive, body) for body in bodies)


def _has(primitive: str, jaxpr: Jaxpr | ClosedJaxpr | None) -> bool:
    """Whether ``primitive`` occurs, also in the bodies of loops, branches and calls."""
    return jaxpr is not None and any(contains(primitive, eqn) for eqn in jaxpr.eqns)
