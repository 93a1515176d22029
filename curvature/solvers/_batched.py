"""Many problems at once, the finished ones dropped on the way."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path
from jax.typing import ArrayLike
from jaxtyping import Array

from curvature import _checks
from curvature._compile_cache import compiled
from curvature._errors import caller, public
from curvature._types import MinimizeResult, Objective, Status, Tree
from curvature.solvers._limits import Limits, limits_of
from curvature.solvers._loop import Loop, Solve, may_step
from curvature.solvers._methods import Method, resolve
from curvature.solvers._progress import Watch
from curvature.transforms._chunks import UNMAPPED, check_prefix

_BLOCK = 5  # steps between two looks at who has finished; heuristic, chosen with benchmarks/batched.py
_LEAST = 16  # so few lanes cost about what one does
_WORTH = 0.6  # a batch this much smaller is worth its compilation; half, for sizes that are powers of two


class _Data(NamedTuple):
    """The arguments of all problems: leaves with a leading axis of lanes, leaves that all share, and which is which."""

    mapped: list[Array]
    shared: list[Array]


class _How(NamedTuple):
    """How the leaves of ``_Data`` make the arguments, and how each problem is solved; static."""

    structure: Any
    is_mapped: tuple[bool, ...]
    transformation: optax.GradientTransformation
    hessian: Callable[..., Tree] | None

    def solve(self, fun: Objective, limits: Limits, mapped: list[Any], shared: list[Any]) -> Solve:
        """The solve of one lane."""
        sources = {True: iter(mapped), False: iter(shared)}
        args = self.structure.unflatten([next(sources[is_mapped]) for is_mapped in self.is_mapped])
        return Solve(lambda x: fun(x, *args), limits, self.transformation, args, self.hessian)


@public
def minimize_batched(
    fun: Objective,
    x0_batch: Tree,
    args_batch: Any = (),
    *,
    in_axes: Any = 0,
    method: Method = "auto",
    gtol: ArrayLike | None = None,
    rtol: ArrayLike = 0.0,
    max_steps: ArrayLike = 1000,
    hessian: Callable[..., Tree] | None = None,
) -> MinimizeResult:
    """Minimize ``fun(x, *args)`` from many starts, or for many data, without waiting for the slowest.

    The result is that of ``jax.vmap(minimize)``, in which every lane takes steps until the last one has finished. Here
    the lanes run in blocks of 5 steps. Between two blocks the host checks which lanes have finished. Once half of them
    have, the others continue in a batch of the next power of two. So few programs are compiled, and later calls reuse
    them.

    Lanes that are sharded over devices along their leading axis stay so as long as the devices divide them evenly.

    Args:
        fun: the objective of one problem, as for ``minimize``.
        x0_batch: the starts: a tree like ``x0`` whose leaves have a leading axis of lanes.
        args_batch: data for ``fun``: a tuple, or one argument that is not a tuple.
        in_axes: the axis of lanes of each leaf of the data, as in ``jax.vmap``: one integer for all, or a tree that is
            a prefix of ``args_batch``; None for what the problems share.
        method: as for ``minimize``. In a batch of small problems the eigendecompositions of ``"trust-exact"`` take most
            of its time, and ``"trust-region"`` is two to three times as fast.
        gtol: as for ``minimize``, the same for all.
        rtol: the tolerance relative to the first gradient of each lane.
        max_steps: the most steps of each lane.
        hessian: as for ``minimize``.

    Returns:
        A ``MinimizeResult`` whose fields have a leading axis of lanes: each lane has its own status. Starts that are
        NaN or infinite are reported there.

    Raises:
        TypeError: as ``minimize``; when an operand is traced, since the host decides which lanes continue: within
            ``jit``, ``grad`` and ``vmap`` map ``minimize`` itself.
        ValueError: as ``minimize``, and for axes of lanes that are missing or differ in size.

    Cost: that of ``jax.vmap(minimize)`` up to the end of the block in which half of the lanes have finished, half of
        it from there to a quarter, and so on. For each block one transfer of the statuses to the host; for each size of
        batch one compilation.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> result = curvature.minimize_batched(
        ...     lambda x, shift, power: jnp.sum((x - shift) ** power),
        ...     jnp.zeros((3, 2)), (jnp.array([1.0, 2.0, 4.0]), 2), in_axes=(0, None),
        ... )
        >>> jnp.allclose(result.x[:, 0], jnp.array([1.0, 2.0, 4.0])), result.success
        (Array(True, dtype=bool), Array([ True,  True,  True], dtype=bool))
    """
    _checks.check_callable("fun", fun)
    if hessian is not None:
        _checks.check_callable("hessian", hessian)
    x0 = _checks.check_point("x0_batch", x0_batch)
    args, axes = args_batch, in_axes
    if type(args) is not tuple:
        args, axes = (args,), axes if axes is None or isinstance(axes, int) else (axes,)
    _checks.check_data(args)
    _checks.check_concrete({"x0_batch": x0, "args_batch": args})
    lanes, leaf_axes = _check_problems(x0, args, axes)
    leaves, structure = jax.tree.flatten(args)
    is_mapped = tuple(axis is not UNMAPPED for axis in leaf_axes)
    placed = list(zip(map(jnp.asarray, leaves), leaf_axes, is_mapped, strict=True))
    data = _Data(
        mapped=[jnp.moveaxis(leaf, axis, 0) for leaf, axis, mapped in placed if mapped],
        shared=[leaf for leaf, _, mapped in placed if not mapped],
    )
    first = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), x0)
    _checks.check_entries("x0_batch", first)
    limits = limits_of(first, gtol, rtol, max_steps)
    how = _How(structure, is_mapped, resolve(method, first, hessian), hessian)
    loop = _align(compiled(_start, fun, (x0, data))(x0, data, limits, how=how), jax.tree.leaves(x0)[0])
    data = data._replace(mapped=_align(data.mapped, jax.tree.leaves(x0)[0]))
    advance = functools.partial(compiled(_advance, fun, (x0, data)), how=how)
    return _run_blocks(advance, loop, data, limits, lanes)


def _start(fun: Objective, x0: Tree, data: _Data, limits: Limits, *, how: _How) -> Loop:
    """The loops of all lanes before their first step."""

    def start(x0: Tree, mapped: list[Array]) -> Loop:
        return how.solve(fun, limits, mapped, data.shared).start(x0, Watch())

    return jax.vmap(start)(x0, data.mapped)


def _advance(fun: Objective, loop: Loop, data: _Data, limits: Limits, *, how: _How) -> Loop:
    """A block of steps for these lanes."""

    def advance(loop: Loop, mapped: list[Array]) -> Loop:
        solve = how.solve(fun, limits, mapped, data.shared)
        _, loop = jax.lax.while_loop(
            lambda carry: may_step(carry[1]) & (carry[0] < _BLOCK),
            lambda carry: (carry[0] + 1, solve.advance(carry[1])),
            (jnp.zeros_like(loop.status), loop),
        )
        return solve.settle(loop)

    return jax.vmap(advance)(loop, data.mapped)


def _run_blocks(advance: Callable[..., Loop], loop: Loop, data: _Data, limits: Limits, lanes: int) -> MinimizeResult:
    """Blocks of steps until no lane runs; ``where`` holds the lanes of ``loop`` in the whole batch."""
    found, where = _outcome(loop), np.arange(lanes)
    while True:
        loop = advance(loop, data, limits)
        running = np.flatnonzero(np.asarray(loop.status) == Status.RUNNING)
        size = max(_LEAST, 1 << (len(running) - 1).bit_length()) if len(running) else 0
        if size > _WORTH * len(where):
            continue
        found = _put(found, _outcome(loop), where) if len(where) < lanes else _outcome(loop)
        if not size:
            return found
        finished = np.setdiff1d(np.arange(len(where)), running)
        chosen = np.concatenate([running, finished[: size - len(running)]])  # they fill up, and do nothing
        where = where[chosen]
        loop, mapped = _take((loop, data.mapped), chosen)
        data = data._replace(mapped=mapped)


def _outcome(loop: Loop) -> MinimizeResult:
    return MinimizeResult(loop.best.x, loop.best.value, loop.best.grad, loop.num_steps, loop.status)


def _align(tree: Tree, like: Array) -> Tree:
    """All leaves with their lanes on the devices that have those of ``like``."""
    if len(like.sharding.device_set) == 1 or not isinstance(like.sharding, NamedSharding):
        return tree
    lanes = NamedSharding(like.sharding.mesh, PartitionSpec(*like.sharding.spec[:1]))
    return jax.tree.map(lambda leaf: jax.device_put(leaf, lanes), tree)


def _take(tree: Tree, lanes: np.ndarray) -> Tree:
    """These lanes alone, spread over the devices that hold all of them where these divide the lanes evenly."""

    def take(leaf: Array) -> Array:
        sharding = leaf.sharding
        if len(sharding.device_set) == 1:
            return leaf[lanes]
        if len(lanes) % len(sharding.device_set) and isinstance(sharding, NamedSharding):
            sharding = NamedSharding(sharding.mesh, PartitionSpec())  # else every device has them all
        return jax.device_put(np.asarray(leaf)[lanes], sharding)

    return jax.tree.map(take, tree)


def _put(tree: Tree, part: Tree, lanes: np.ndarray) -> Tree:
    """The tree with these lanes replaced."""

    def put(leaf: Array, new: Array) -> Array:
        if len(leaf.sharding.device_set) == 1:
            return leaf.at[lanes].set(new)
        rows = np.array(leaf)
        rows[lanes] = np.asarray(new)
        return jax.device_put(rows, leaf.sharding)

    return jax.tree.map(put, tree, part)


def _check_problems(x0: Any, args: tuple[Any, ...], in_axes: Any) -> tuple[int, list[Any]]:
    """The number of problems, the common size of all mapped axes, and the axis of each leaf of ``args``."""
    axes = jax.tree.leaves(check_prefix("in_axes", in_axes, args))
    lanes = [("x0_batch" + keystr(path), leaf, 0) for path, leaf in tree_flatten_with_path(x0)[0]]
    lanes += [
        ("args_batch" + keystr(path), leaf, axis)
        for (path, leaf), axis in zip(tree_flatten_with_path(args)[0], axes, strict=True)
        if axis is not UNMAPPED
    ]
    for name, leaf, axis in lanes:
        if not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            remedy = "a leading axis of problems" if name.startswith("x0") else "one; use in_axes=None for shared data"
            raise ValueError(f"{caller()}: {name} has rank {jnp.ndim(leaf)} and so no axis {axis}, expected {remedy}.")
        size, (first, leading, _) = jnp.shape(leaf)[axis], lanes[0]
        if size != jnp.shape(leading)[0]:
            raise ValueError(
                f"{caller()}: {name} has {size} problems along axis {axis}, "
                f"expected {jnp.shape(leading)[0]} to match {first}."
            )
        if size == 0:
            raise ValueError(f"{caller()}: {name} has shape {jnp.shape(leaf)}, expected at least one problem.")
    return jnp.shape(lanes[0][1])[0], axes
