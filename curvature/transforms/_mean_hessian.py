"""The Hessian of a mean over examples, assembled from taps."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvature import _checks, _trees
from curvature._sharding import entry
from curvature._trees import Subtree, leaf_paths, leaf_subtrees, ravel, select
from curvature._types import ChunkSize, HessianBlocks, Objective, Tree
from curvature.programs import _traced
from curvature.programs._finiteness import keeps_finite
from curvature.programs._mean_structure import Examples, find_examples
from curvature.programs._pushforward import asymmetric_rule
from curvature.programs._taps import Taps, trace_taps
from curvature.programs._views import transpose_block
from curvature.transforms._chunks import num_batch_chunks, sum_over_chunks
from curvature.transforms._compositions import hessian_of
from curvature.transforms._jacobian import jacobian_of
from curvature.transforms._per_example_function import PerExampleFunction, open_batch, reporter
from curvature.transforms._self_check_second import check_hessian, subject_of_mean
from curvature.transforms._tap_hessian import Blocks, Points, Wanted, bytes_per_example, find_points, tapped_blocks

_LEAST_CHUNK = 128  # fewer examples make thin products of matrices
_FEWER = 2  # taps pay when they take so many times fewer directions than there are parameters: ours


def mean_hessian(
    loss: Objective, *, chunk_size: ChunkSize = "auto", blocks: HessianBlocks = None, check: bool = False
) -> PerExampleFunction:
    """The Hessian of the mean of ``loss`` over a batch: ``H = (1/B) sum_b d^2 loss(params, *example_b) / d params^2``.

    Equal to ``hessian`` of that mean, but assembled from what the structure of a sum over examples allows. Where a
    weight enters as ``z[j] = sum_i a[i] W[i, j]``, moving ``z[j]`` moves the inputs ``a'`` and the cotangents ``d'`` of
    each later layer, and the block of the two layers is ``sum_b a[i] (d'[J] Da'[I; j] + a'[I] Dd'[J; j])``: one
    direction for each output of a layer instead of one for each parameter, and a product of matrices.

    Any loss will do. Parameters that meet the data as the weights, biases, scales or lookups of an example that is one
    vector are taken that way where it needs no more directions than they have entries, used several times too; the
    others (kernels of convolutions, weights shared by many tokens, what enters in any other way) by products with the
    whole Hessian, in the same matrix. ``mean_hessian(loss).report(params, *batch)`` says which. Parameters first put
    through functions of their own, and penalties that are part of the loss, are taken care of by the chain rule.

    Args:
        loss: ``loss(params, *example) -> scalar``, for one example.
        chunk_size: how many examples at once; ``"auto"`` keeps the intermediates within 32 MiB, None takes all.
        blocks: ``(rows, columns)`` for the block of two leaves or sub-trees named by path, "diagonal" for the diagonal
            block of every leaf; see ``hessian``.
        check: whether to compare the result times a random direction with the product that JAX computes from the mean
            of ``jax.vmap(loss)``, and to raise where they differ by more than rounding; see ``hessian``.

    Returns:
        A function ``(params, *batch)``, where every leaf of the batch has a leading axis of B examples, that returns a
        tree like ``params`` of trees like ``params`` with blocks of shape ``leaf_i.shape + leaf_j.shape``. Inside
        ``jax.shard_map`` it is the mean over the examples of each device.

    Raises:
        TypeError: when the loss is not scalar, or a leaf of ``params`` is not of a real floating dtype.
        ValueError: when no batch is given, or its leaves differ in their leading axis; for unknown ``blocks``.
        RuntimeError: where ``check`` finds a difference, as ``hessian``.

    Cost: one gradient of the mean, one product for each output of a tapped layer, and about ``2 B n^2`` operations in
        products of matrices, a quarter of that for the blocks of a layer with itself, where ``hessian`` takes n
        products of 1.5 gradients each; ``python -m benchmarks --suite modes`` measures both. Memory:
        the result and the intermediates of one chunk. ``check`` takes two products of the whole batch more; see
        ``hessian``.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> loss = lambda w, x: 0.5 * (w @ x) ** 2
        >>> curvature.mean_hessian(loss)(jnp.ones(2), jnp.array([[1.0, 2.0], [1.0, 0.0]]))
        Array([[1., 1.],
               [1., 2.]], dtype=float32)

    References: the recursions of Botev et al. (arXiv:1706.03662) and Dangel et al. (arXiv:1902.01813) give the
        diagonal blocks; the blocks between layers and the grouping of the products are ours.
    """
    _checks.check_callable("mean_hessian", "loss", loss)
    _checks.check_chunk_size("mean_hessian", chunk_size)
    _checks.check_blocks("mean_hessian", blocks)

    report = reporter("mean_hessian", loss, _routes)

    def of_batch(params: Tree, *batch: Any) -> Tree:
        params, batch, _ = open_batch("mean_hessian", params, batch)
        result = _of_batch(loss, params, batch, blocks, chunk_size)
        if check:
            evaluate = functools.partial(_of_batch, blocks=blocks, chunk_size=chunk_size)
            subject = subject_of_mean("mean_hessian", loss, params, batch, evaluate, result, report)
            check_hessian(subject, blocks)
        return result

    return PerExampleFunction(of_batch, report)


def _of_batch(
    loss: Objective, params: Tree, batch: tuple[Any, ...], blocks: HessianBlocks, chunk_size: ChunkSize
) -> Tree:
    """The Hessian of the mean of a loss over a batch that has been checked."""
    example = jax.tree.map(lambda leaf: leaf[0], batch)
    points = _points_of(trace_taps("mean_hessian", loss, params, example))
    if points is None:
        return _by_products(loss, params, batch, blocks)
    return _assemble("mean_hessian", points, params, jax.tree.leaves(batch), blocks, chunk_size)


def routes_of_examples(program: _traced.Program) -> dict[str, str]:
    """For each leaf the rule that ``hessian_of_examples`` takes, by its path; empty where it takes none."""
    found = find_structure(program)
    if found is None:
        return {}
    _, points = found
    return dict(zip(leaf_paths(program.x), _routes(points.taps, program.x), strict=True))


def hessian_of_examples(program: _traced.Program, blocks: HessianBlocks) -> Tree | None:
    """The Hessian of a function that is a mean over examples, or None where that does not show or does not pay."""
    found = find_structure(program)
    if found is None:
        return None
    examples, points = found
    return _assemble("hessian", points, program.x, examples.batch, blocks, "auto")


def find_structure(program: _traced.Program) -> tuple[Examples, Points] | None:
    """The examples of a function and the points of one's loss, where these are worth it."""
    examples = find_examples(program)
    if examples is None:
        return None
    points = _points_of(trace_taps("hessian", examples.loss, program.x, tuple(entry(leaf) for leaf in examples.batch)))
    if points is None or _FEWER * points.num_directions > _trees.num_entries(program.x):
        return None
    return examples, points


def _assemble(
    function: str,
    points: Points,
    params: Tree,
    examples: Sequence[Array],
    blocks: HessianBlocks,
    chunk_size: ChunkSize,
) -> Tree:
    """The Hessian of the mean, or those blocks of it, as a tree of trees."""
    leaves, parts = jax.tree.leaves(params), _parts(function, params, blocks)
    pairs = {(i, j) for rows, columns in parts for i in _numbers(rows, leaves) for j in _numbers(columns, leaves)}
    chunks = num_batch_chunks(len(examples[0]), chunk_size, bytes_per_example(points), _LEAST_CHUNK)
    found = _blocks_of_leaves(points, leaves, examples, pairs, chunks)

    def tree_of(rows: Subtree, columns: Subtree) -> Tree:
        numbers = _numbers(columns, leaves)
        return rows.structure.unflatten(
            [columns.structure.unflatten([found[i, j] for j in numbers]) for i in _numbers(rows, leaves)]
        )

    trees = [tree_of(rows, columns) for rows, columns in parts]
    return jax.tree.structure(params).unflatten(trees) if blocks == "diagonal" else trees[0]


def _points_of(taps: Taps | None) -> Points | None:
    """The points of the taps, or None where the assembled Hessian might not be that of forward over reverse mode.

    Preconditions: forward over reverse is legal. Every custom rule proves its Hessian symmetric, because the blocks
    above the diagonal are copies of those below. Functions of parameters alone have finite derivatives, because the
    products with their Jacobians would spread a NaN to entries that are finite in ``jax.hessian``.
    """
    if taps is None or taps.program.jaxpr is None or taps.program.composition_blocker("fwd_over_rev") is not None:
        return None
    if asymmetric_rule(taps.program.jaxpr.jaxpr) is not None:
        return None
    if any(root not in taps.views for root in taps.roots):
        avals = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in taps.leaves]
        if not keeps_finite(jax.make_jaxpr(taps.root_values)(avals)):
            return None
    return find_points(taps)


def _parts(function: str, params: Tree, blocks: HessianBlocks) -> list[tuple[Subtree, Subtree]]:
    """The pairs of sub-trees whose blocks are asked for."""
    if blocks == "diagonal":
        return [(leaf, leaf) for leaf in leaf_subtrees(params)]
    rows, columns = (select(function, "blocks", params, path) for path in blocks or ("", ""))
    return [(rows, columns)]


def _numbers(part: Subtree, leaves: Sequence[Array]) -> range:
    return range(len(leaves))[part.leaves]


def _routes(taps: Taps | None, params: Tree) -> list[str]:
    """For each leaf how its rows and columns are found, in words."""
    points = _points_of(taps)
    if taps is None or points is None:
        return ["products with the whole Hessian: the loss has no taps"] * len(jax.tree.leaves(params))

    def route(leaf: int) -> str:
        roots = [root for root in taps.roots if leaf in taps.leaves_of[root]]
        if not roots:
            return "unused: its blocks are zero"
        size = sum(root.aval.size for root in roots if root in points.rest)
        if size:
            return f"products with the whole Hessian along {size} directions"
        at = {k for k, point in enumerate(points.points) for use in point.uses if use.root in roots}
        directions = sum(points.points[k].variable.aval.size for k in at)
        return f"taps along {directions} directions" if directions else "linear in the loss"

    return [route(leaf) for leaf in range(len(taps.leaves))]


def _by_products(loss: Objective, params: Tree, batch: tuple[Any, ...], blocks: HessianBlocks) -> Tree:
    """The same Hessian from products alone, by whichever composition is legal."""
    mean = _traced.trace(
        lambda params: (jnp.mean(jax.vmap(loss, (None,) + (0,) * len(batch))(params, *batch)), None), params
    )
    return hessian_of("mean_hessian", mean, "auto", "auto", blocks)[0]


def _blocks_of_leaves(
    points: Points, leaves: Sequence[Array], batch: Sequence[Array], pairs: set[tuple[int, int]], chunks: int
) -> dict[tuple[int, int], Array]:
    """The blocks of the mean for the given pairs of leaves."""
    taps = points.taps
    derived = [root for root in taps.roots if root not in taps.views]

    def wanted(row: Any, column: Any) -> bool:
        return bool(derived) or (taps.views[row].leaf, taps.views[column].leaf) in pairs

    of_roots = [(row, column) for row in taps.roots for column in taps.roots if wanted(row, column)]

    def of_part(examples: Sequence[Array], weights: Array) -> list[Array | None]:
        found = _blocks_of_roots(points, leaves, examples, weights / len(batch[0]), wanted)
        return [found.get(pair) for pair in of_roots]

    sums = zip(of_roots, sum_over_chunks(of_part, batch, chunks, taps.program.out.dtype), strict=True)
    blocks = {pair: block for pair, block in sums if block is not None}
    if derived:
        result = _of_derived(points, leaves, batch, derived)
        if any(root in pair for pair in blocks for root in derived):
            through = _through_roots(points, leaves, blocks)
            return {pair: through[pair] + result[pair] for pair in pairs}
    else:
        result = {(i, j): jnp.zeros(leaves[i].shape + leaves[j].shape, leaves[i].dtype) for i, j in pairs}
    for (row, column), block in blocks.items():
        views = taps.views[row], taps.views[column]
        pair = views[0].leaf, views[1].leaf
        if pair in pairs:
            of_leaves = transpose_block(block, *views, row.aval.ndim)
            result[pair] = result[pair] + of_leaves.astype(result[pair].dtype)
    return result


def _of_derived(
    points: Points, leaves: Sequence[Array], batch: Sequence[Array], derived: Sequence[Any]
) -> dict[tuple[int, int], Array]:
    """What the curvature of functions of the parameters alone adds: the Hessian of ``sum <gradient, root(leaves)>``."""
    taps, size = points.taps, len(batch[0])
    weights = jnp.full(size, 1 / size, taps.program.out.dtype)
    roots = taps.root_values(leaves)
    gradients = dict(zip(taps.roots, jax.grad(_weighted_loss, 2)(points, leaves, roots, batch, weights), strict=True))

    def weighted_roots(leaves: list[Array]) -> tuple[Array, None]:
        values = dict(zip(taps.roots, taps.root_values(leaves), strict=True))
        terms = [jnp.sum(gradients[root] * values[root]).astype(weights.dtype) for root in derived]
        return jnp.sum(jnp.stack(terms)), None

    rows, _ = hessian_of("mean_hessian", _traced.trace(weighted_roots, list(leaves)), "auto", "auto")
    return {(i, j): block for i, row in enumerate(rows) for j, block in enumerate(row)}


def _through_roots(points: Points, leaves: Sequence[Array], blocks: Blocks) -> dict[tuple[int, int], Array]:
    """``J' H J`` for the Hessian by the roots and the Jacobian of the roots by the leaves."""
    taps = points.taps
    roots, pull = jax.vjp(taps.root_values, list(leaves))
    _, unravel = ravel(roots)  # which gives every root its dtype back, also of a vector of another one
    rows = [
        jnp.concatenate(
            [
                blocks[row, column].reshape(row.aval.size, -1)
                if (row, column) in blocks
                else jnp.zeros((row.aval.size, column.aval.size), row.aval.dtype)
                for column in taps.roots
            ],
            1,
        )
        for row in taps.roots
    ]
    pull_all = jax.vmap(lambda vector: pull(unravel(vector))[0])
    columns = pull_all(jnp.concatenate(rows))  # for each leaf, (entries of roots, *leaf)
    result = {}
    for j, column in enumerate(columns):
        for i, block in enumerate(pull_all(column.reshape(column.shape[0], -1).T)):
            turned = jnp.moveaxis(block, 0, -1)
            result[i, j] = turned.reshape(leaves[i].shape + leaves[j].shape)
    return result


def _blocks_of_roots(
    points: Points, leaves: Sequence[Array], examples: Sequence[Array], weights: Array, wanted: Wanted
) -> Blocks:
    """The blocks of all roots: from taps where they have points, else from products with the whole Hessian."""
    taps = points.taps
    blocks = tapped_blocks(points, taps.parameter_values(leaves), examples, weights, wanted)
    if not points.rest:
        return blocks
    gradient = jax.grad(lambda roots: _weighted_loss(points, leaves, roots, examples, weights))
    roots = dict(zip(taps.roots, taps.root_values(leaves), strict=True))

    def by_rest(rest: list[Array]) -> tuple[list[Array], None]:
        moved = roots | dict(zip(points.rest, rest, strict=True))
        return gradient([moved[root] for root in taps.roots]), None

    columns, _ = jacobian_of(by_rest, [roots[root] for root in points.rest], "fwd", "auto")
    for row, parts in zip(taps.roots, columns, strict=True):
        for column, block in zip(points.rest, parts, strict=True):
            if wanted(row, column):
                blocks[row, column] = block
            if row in points.tapped and wanted(column, row):
                blocks[column, row] = jnp.moveaxis(block, range(row.aval.ndim), range(-row.aval.ndim, 0))
    return blocks


def _weighted_loss(
    points: Points, leaves: Sequence[Array], roots: Sequence[Array], examples: Sequence[Array], weights: Array
) -> Array:
    """The weighted sum of the losses as a function of the roots."""
    taps = points.taps
    jaxpr = taps.level.jaxpr
    base = taps.given(leaves)
    base.write(taps.roots, roots)

    def of_example(example: Sequence[Array]) -> Array:
        env = taps.with_example(base, example)
        for eqn in filter(env.lacks, jaxpr.eqns):
            env.evaluate(jaxpr, eqn)
        return taps.loss_in(env)

    return jnp.vdot(weights, jax.vmap(of_example)(examples))
