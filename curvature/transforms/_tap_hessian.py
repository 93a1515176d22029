"""Hessian blocks from second derivatives at pre-activations ("points") of a loss.

A point is a variable through which parameters act. Let parameters enter as ``z_l[j] = sum_i a_l[i] u_l[i, j]`` at point
l, let ``d_l`` be the cotangent of ``z_l``, and let ``D y[...; j]`` be the derivative of ``y`` along ``z_l[j]`` with all
parameters fixed. Columns belong to point l (input i, entry j), rows to point m (input I, entry J). The gradient at
point m is ``a_m[I] d_m[J]``. So where m is l or is evaluated after l, summed over examples b,

    H[m: I, J; l: i, j] = sum_b a_l[i] (d_m[J] D a_m[I; j] + a_m[I] D d_m[J; j]),

and the blocks of m before l follow by symmetry. That takes one direction for each entry of ``z_l``, not for each entry
of ``u_l``. What remains is a product of matrices, ``sum_b (a_l[i] a_m[I]) D d_m[J; j]``, whose left factor is formed
first, so that no array has size b I J j. For m = l both factors are symmetric, and a quarter of the product suffices.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Var
from jaxtyping import Array, Float

from curvature._sharding import vary_like, zeros
from curvature.programs._affine import Lookup
from curvature.programs._jaxprs import Environment, Equation, Variable, dependents
from curvature.programs._primitives import POINT_PRESERVING
from curvature.programs._tap_gradients import all_axes
from curvature.programs._taps import Site, Taps
from curvature.transforms._chunks import vmap


class Use(NamedTuple):
    """A root (a parameter, or a function of parameters: ``_taps.Origin``) that acts on a point through one site.

    Attributes:
        site: the site.
        root: the root.
        scaled: whether each entry of the root multiplies one entry of the point, as a scale does; else it is a matrix.
        order: for each column of the canonical form, or each group and column where scaled, the entry of the point.
    """

    site: Site
    root: Variable
    scaled: bool
    order: np.ndarray


class Point(NamedTuple):
    """A variable through which parameters act.

    Attributes:
        variable: the variable.
        uses: the sites through which parameters act on it.
        moved: the variables that depend on it, and itself.
    """

    variable: Variable
    uses: list[Use]
    moved: set[Variable]


@dataclass(frozen=True)
class Points:
    """The points of the tapped roots; the columns of the other roots are Hessian-vector products.

    Attributes:
        taps: the loss.
        points: the points, in the order of evaluation.
        tapped: the roots that act through points alone. A root in which the loss is linear, such as a penalty that is
            added to it, is tapped but has no point.
        rest: the other roots.
    """

    taps: Taps
    points: list[Point]
    tapped: list[Variable]
    rest: list[Variable]

    @property
    def num_directions(self) -> int:
        """The number of directions that the Hessian takes: the entries of the points and of the other roots."""
        variables = [*(point.variable for point in self.points), *self.rest]
        return sum(v.aval.size for v in variables)


def find_points(taps: Taps) -> Points:
    """Tap every root that takes no more directions at its points than it has entries."""
    jaxpr = taps.level.jaxpr
    # 1. The point of each site that can be tapped, and the points through which each root acts.
    uses: dict[Variable, list[Use]] = {}
    where: dict[Variable, set[Variable]] = {root: set() for root in taps.roots}
    refused = {origin.root for site in taps.sites if not _is_tappable(site) for origin in site.origins}
    for site in taps.sites:
        if _is_tappable(site):
            point, root = _point_of(jaxpr, site), site.origins[0].root
            uses.setdefault(point, []).append(_use(site, root))
            where[root].add(point)

    # 2. The directions of a point are counted once. First come the roots whose points have no more entries than the
    #    root. The points of these roots then cost other roots nothing.
    def cost(root: Variable, paid: set[Variable]) -> int:
        return sum(point.aval.size for point in where[root] - paid)

    open_roots = [root for root in taps.roots if root not in refused]
    cheap = [root for root in open_roots if cost(root, set()) <= root.aval.size]
    paid = {point for root in cheap for point in where[root]}
    tapped = [root for root in open_roots if cost(root, paid) <= root.aval.size]
    # 3. The points of the tapped roots, in the order of evaluation.
    points = []
    on_parameters = dependents(jaxpr, taps.leaves)
    for v in (v for eqn in jaxpr.eqns for v in eqn.outvars if v in uses):
        kept = [use for use in uses[v] if use.root in tapped]
        if v in jaxpr.outvars:  # the cotangent is constant: only a use whose input moves has a second derivative
            kept = [use for use in kept if _moves_input(use.site, on_parameters)]
        if kept:
            points.append(Point(v, kept, dependents(jaxpr, [v])))
    return Points(taps, points, tapped, [root for root in taps.roots if root not in tapped])


def _moves_input(site: Site, moved: set[Variable]) -> bool:
    """Whether the factor of the parameter at a site is among the ``moved`` variables."""
    return not site.form.constant and any(isinstance(v, Var) and v in moved for v in site.others)


def bytes_per_example(points: Points) -> int:
    """An estimate of the intermediates of ``tapped_blocks`` for each example, at the point with the most."""
    sizes = [point.variable.aval.size for point in points.points]
    inputs = [sum(use.site.sizes[2] for use in point.uses) for point in points.points]
    widths = [sum(sizes[k:]) * sizes[k] + sum(inputs[k + 1 :]) * sizes[k] for k in range(len(sizes))]
    outers = [inputs[k] * max(inputs[k + 1 :], default=0) for k in range(len(sizes))]
    itemsize = max((point.variable.aval.dtype.itemsize for point in points.points), default=1)
    return itemsize * max((w + o for w, o in zip(widths, outers, strict=True)), default=1)


def _is_tappable(site: Site) -> bool:
    """Whether a site has one position, and one group or one row, as every layer has for an example of one vector."""
    if site.form is None or site.lengths:
        return False
    groups, positions, rows, _ = site.sizes
    return positions == 1 and (groups == 1 or rows == 1)


def _use(site: Site, root: Variable) -> Use:
    groups, _, _, _ = site.sizes
    shape = site.outputs[0].aval.shape
    with jax.ensure_compile_time_eval():
        order = np.asarray(site.form.outputs(np.arange(site.outputs[0].aval.size).reshape(shape)))
    return Use(site, root, groups > 1, order.reshape(-1))


def _point_of(jaxpr: Jaxpr, site: Site) -> Variable:
    """The output of a site, followed through additions: a shift of the output is a shift of the sum."""
    v = site.outputs[0]
    while True:
        users: list[Equation] = [eqn for eqn in jaxpr.eqns for other in eqn.invars if other is v]
        if len(users) != 1 or v in jaxpr.outvars:
            return v
        (eqn,) = users
        (out, *_) = eqn.outvars
        subtracted = eqn.primitive.name == "sub" and eqn.invars[1] is v
        if eqn.primitive.name not in POINT_PRESERVING or subtracted or out.aval.size != v.aval.size:
            return v
        v = out


# ---- second derivatives ------------------------------------------------------------------------------------------

_FORMED_BYTES = 4 * 2**20
"""Heuristic: the bytes formed at once as a factor of a product of matrices, so that they stay in the cache."""

_LEAST_SYMMETRIC = 3
"""Heuristic: with fewer outputs, forming the products of inputs takes longer than symmetry saves."""

Blocks = dict[tuple[Variable, Variable], Array]
Wanted = Callable[[Variable, Variable], bool]


class _State(NamedTuple):
    """Cotangents and inputs at the points for every example; their derivatives have a last axis of directions.

    Attributes:
        cotangents: by the number of the point; shape (batch, entries of the point).
        inputs: by the numbers of the point and of its use; shape (batch, rows of a matrix) or (batch, entries of a
            scale).
    """

    cotangents: dict[int, Array]
    inputs: dict[tuple[int, int], Array]


def tapped_blocks(
    points: Points, values: Environment, examples: Sequence[Array], weights: Array, wanted: Wanted
) -> Blocks:
    """The blocks ``H[row root, column root]`` of the weighted sum of the losses, for the tapped roots.

    Args:
        points: from ``find_points``.
        values: the values that depend on the parameters alone.
        examples: the leaves of the batch, with a leading axis of examples.
        weights: the weight of each example's loss.
        wanted: from the roots of the rows and of the columns to whether that block is wanted.
    """
    shapes = [(len(weights), point.variable.aval.size) for point in points.points]
    at = [zeros(shape, point.variable.aval) for shape, point in zip(shapes, points.points, strict=True)]
    at = vary_like(at, examples)
    here = _evaluate_state(points, values, examples, weights, at)
    blocks: Blocks = {}
    for k, column in enumerate(points.points):
        # Blocks of points m >= k, and by symmetry their transposes.
        later = [
            m
            for m, row in enumerate(points.points[k:], k)
            if any(wanted(a.root, b.root) or wanted(b.root, a.root) for a in row.uses for b in column.uses)
        ]
        if not later:
            continue

        def shifted_state(shift: Array, k: int = k, later: list[int] = later) -> _State:
            state = _evaluate_state(points, values, examples, weights, [*at[:k], shift, *at[k + 1 :]])
            inputs = {
                (m, n): a
                for (m, n), a in state.inputs.items()
                if m in later and _moves_input(points.points[m].uses[n].site, points.points[k].moved)
            }
            return _State({m: state.cotangents[m] for m in later}, inputs)

        _, push = jax.linearize(shifted_state, at[k])
        for uses, scale in _directions(column, k, here):
            along = _push_basis(push, at[k], scale)
            inputs = [here.inputs[k, n] for n in uses] if scale is None else [jnp.ones_like(at[k][:, :1])]
            left = jnp.concatenate(inputs, 1)
            for m in later:
                found = _row_blocks(points.points[m], m, here, along, left, same=m == k and scale is None)
                _add_blocks(blocks, found, points.points[m].uses, [column.uses[n] for n in uses], m != k, wanted)
    return blocks


def _evaluate_state(
    points: Points, values: Environment, examples: Sequence[Array], weights: Array, shifts: Sequence[Array]
) -> _State:
    """The cotangents and inputs at the points, for points that are shifted."""
    variables = [point.variable for point in points.points]

    def of_example(example: Sequence[Array], weight: Array, shifts: list[Array]) -> _State:
        def loss(shifts: list[Array]) -> tuple[Array, dict[tuple[int, int], Array]]:
            value, env = points.taps.loss_of(values, example, dict(zip(variables, shifts, strict=True)))
            inputs = {(k, n): _input_of(use, env) for k, p in enumerate(points.points) for n, use in enumerate(p.uses)}
            return weight * value, inputs

        d, inputs = jax.grad(loss, has_aux=True)(shifts)
        return _State(dict(enumerate(d)), inputs)

    return jax.vmap(of_example)(examples, weights, list(shifts))


def _input_of(use: Use, env: Environment) -> Float[Array, " entries"]:
    """The input of one use: one entry for each row of a matrix; for a scale the factor of each entry of the point."""
    a = use.site.inputs(env)
    if use.scaled:  # of shape (groups, 1, 1): the columns of a group share one row
        groups, _, _, columns = use.site.sizes
        return jnp.broadcast_to(a.reshape(groups, 1), (groups, columns)).reshape(-1)
    return (a.one_hot(use.site.outputs[0].aval.dtype) if isinstance(a, Lookup) else a).reshape(-1)


def _directions(point: Point, k: int, here: _State) -> Iterator[tuple[list[int], Array | None]]:
    """Uses that share directions, and the scale of each example's directions (None for 1)."""
    plain = [n for n, use in enumerate(point.uses) if not use.scaled]
    if plain:
        yield plain, None
    for n, use in enumerate(point.uses):
        if use.scaled:
            yield [n], here.inputs[k, n][:, np.argsort(use.order)]


def _push_basis(push: Callable[[Array], _State], at: Array, scale: Array | None) -> _State:
    """The derivatives along every entry of a point, for all examples at once; the directions are the last axis."""

    def along(direction: Array) -> _State:
        direction = jnp.broadcast_to(direction, at.shape)
        return push(vary_like(direction, at) if scale is None else direction * scale)

    return jax.vmap(along, out_axes=-1)(jnp.eye(at.shape[1], dtype=at.dtype))


def _row_blocks(point: Point, m: int, here: _State, along: _State, left: Array, same: bool) -> list[Array]:
    """The block of each use at a point with the columns: shape (rows, columns) of the use + (i, j).

    Args:
        point: the point of the rows.
        m: its number.
        here: cotangents and inputs at all points.
        along: their derivatives along the directions j.
        left: the inputs i of the columns; shape (batch, i).
        same: whether rows and columns are the same, so that the block is symmetric.
    """
    d, dot_d = here.cotangents[m], along.cotangents[m]
    plain = [n for n, use in enumerate(point.uses) if not use.scaled]
    result: dict[int, Array] = {}
    if plain:
        inputs = [here.inputs[m, n] for n in plain]
        together = (
            _contract_symmetric(left, dot_d)
            if same and dot_d.shape[1] >= _LEAST_SYMMETRIC
            else _contract(jnp.concatenate(inputs, 1), left, dot_d)
        )
        cuts = np.cumsum([a.shape[1] for a in inputs])[:-1]
        result.update(zip(plain, jnp.split(together, cuts), strict=True))
    for n, use in enumerate(point.uses):
        dot_a = along.inputs.get((m, n))
        if not use.scaled and dot_a is not None:
            result[n] = result[n] + jnp.swapaxes(_contract(d, left, dot_a), 0, 1)
        elif use.scaled:
            product = here.inputs[m, n][:, :, None] * dot_d[:, use.order]
            if dot_a is not None:
                product = product + d[:, use.order, None] * dot_a
            result[n] = _contract(jnp.ones_like(left[:, :1]), left, product)
    return [result[n] for n in range(len(point.uses))]


def _contract(c: Array, left: Array, moved: Array) -> Float[Array, "p q i j"]:
    """``sum_b c[b, p] left[b, i] moved[b, q, j]`` as one product of matrices; its smaller factor is formed first."""
    # b: example, p: row of the use, q: column of the use, i: input of the columns, j: direction
    (batch, p), i, (q, j) = c.shape, left.shape[1], moved.shape[1:]
    if p <= q * j:
        outer = (c[:, :, None] * left[:, None, :]).reshape(batch, -1)
        return jnp.swapaxes((outer.T @ moved.reshape(batch, -1)).reshape(p, i, q, j), 1, 2)
    rows, lefts = c.T, left.T
    size = max(1, _FORMED_BYTES // (lefts.size * lefts.dtype.itemsize))
    products = vmap(lambda lane: (lefts * lane[None]) @ rows.T, chunk_size=size)(moved.reshape(batch, -1).T)
    return jnp.transpose(products.reshape(q, j, i, p), (3, 0, 2, 1))


def _contract_symmetric(c: Array, moved: Array) -> Float[Array, "p q i j"]:
    """``sum_b c[b, p] c[b, i] moved[b, q, j]`` for a ``moved`` symmetric in q and j: a quarter of the product.

    Only pairs ``p <= i`` and ``q <= j`` are multiplied. The products of inputs are formed a few rows at a time, so that
    they stay in the cache: writing all of them to memory would take as long as the product of matrices.
    """
    batch, p = c.shape
    pairs, number = _unordered_pairs(p)
    outputs, number_of_outputs = _unordered_pairs(moved.shape[1])
    rows, lanes = c.T, moved[:, *outputs]
    size = max(p, _FORMED_BYTES // (batch * c.dtype.itemsize))
    products = vmap(lambda k, i: (rows[k] * rows[i]) @ lanes, chunk_size=size)(*pairs)
    return jnp.swapaxes(products[number][:, :, number_of_outputs], 1, 2)


def _unordered_pairs(size: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
    """The pairs ``i <= j``, and the symmetric matrix of their numbers."""
    pairs = np.triu_indices(size)
    number = np.zeros((size, size), np.int32)
    number[pairs] = number.T[pairs] = np.arange(len(pairs[0]))
    return pairs, number


def _add_blocks(
    blocks: Blocks, found: list[Array], rows: Sequence[Use], columns: Sequence[Use], off_diagonal: bool, wanted: Wanted
) -> None:
    """Cut the blocks of uses into blocks of roots, and add them; ``off_diagonal`` adds their transposes too."""
    for row, part in zip(rows, found, strict=True):
        start = 0
        for column in columns:
            stop = start + (1 if column.scaled else column.site.sizes[2])
            block, ndim = _to_root_axes(part[:, :, start:stop], row, column), row.root.aval.ndim
            start = stop
            parts = [(row.root, column.root, block)]
            if off_diagonal:
                parts.append((column.root, row.root, jnp.moveaxis(block, range(ndim), range(-ndim, 0))))
            for of_rows, of_columns, one in parts:
                if wanted(of_rows, of_columns):
                    known = blocks.get((of_rows, of_columns))
                    blocks[of_rows, of_columns] = one if known is None else known + one


def _to_root_axes(part: Float[Array, "p q i j"], row: Use, column: Use) -> Array:
    """Rearrange a block from canonical form to the axes of the two roots."""
    if not row.scaled:  # the columns of a scale are in order already
        part = _reorder(part, row.order, 1)
    part = _reorder(part, column.order, 3)
    shapes, orders = [], []
    for use in (row, column):
        order = all_axes(use.site.axes, use.root.aval.ndim)
        shapes += [use.root.aval.shape[axis] for axis in order]
        orders += [len(orders) + k for k in np.argsort(order)]
    return jnp.transpose(part.reshape(shapes), orders)


def _reorder(array: Array, order: np.ndarray, axis: int) -> Array:
    return array if np.array_equal(order, np.arange(len(order))) else jnp.take(array, order, axis)
