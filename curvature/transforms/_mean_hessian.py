"""Hessian of a mean over examples, assembled from taps, with Hessian-vector products where there are none."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvature import _checks, _trees
from curvature._errors import later, public
from curvature._sharding import entry
from curvature._trees import leaf_paths, ravel
from curvature._types import ChunkSize, HessianBlocks, Objective, Tree
from curvature.programs import _traced
from curvature.programs._finiteness import keeps_finite
from curvature.programs._mean_structure import Examples, find_examples
from curvature.programs._pushforward import asymmetric_rule
from curvature.programs._taps import Taps, trace_taps
from curvature.programs._views import transpose_block
from curvature.transforms._blocks import leaf_pairs, tree_of_blocks
from curvature.transforms._chunks import num_batch_chunks, sum_over_chunks
from curvature.transforms._compositions import hessian_of
from curvature.transforms._jacobian import jacobian_of
from curvature.transforms._per_example_function import PerExampleFunction, first_example, open_batch, reporter
from curvature.transforms._self_check_cases import check_hessian, hessian_of_mean
from curvature.transforms._tap_hessian import Blocks, Points, Wanted, bytes_per_example, find_points, tapped_blocks

_LEAST_CHUNK = 128
"""Heuristic: with fewer examples in a chunk, products of matrices are too thin to be fast."""

_FEWER = 2
"""Heuristic: taps pay if they take so many times fewer directions than there are parameters."""


@public
def mean_hessian(
    loss: Objective, *, chunk_size: ChunkSize = "auto", blocks: HessianBlocks = None, check: bool = False
) -> PerExampleFunction:
    """The Hessian of the mean of ``loss`` over a batch: ``H = (1/B) sum_b d^2 loss(params, *example_b) / d params^2``.

    Equal to ``hessian`` of that mean, but assembled from the structure of a sum over examples. Where a weight enters as
    ``z[j] = sum_i a[i] W[i, j]``, moving ``z[j]`` moves the inputs ``a'`` and the cotangents ``d'`` of each later
    layer. The block of the two layers is ``sum_b a[i] (d'[J] Da'[I; j] + a'[I] Dd'[J; j])``: one direction for each
    output of a layer instead of one for each parameter, and a product of matrices.

    Any loss is allowed. The formula is used for weights, biases, scales and lookups of an example that is one vector,
    also if they are used several times, where it needs no more directions than they have entries. The columns of the
    other parameters (kernels of convolutions, weights shared by many tokens, parameters that enter in any other way)
    are products with the whole Hessian. ``mean_hessian(loss).report(params, *batch)`` says which. Functions of the
    parameters alone, and penalties that are part of the loss, are included by the chain rule.

    Args:
        loss: ``loss(params, *example) -> scalar``, for one example.
        chunk_size: how many examples at once; ``"auto"`` keeps the intermediates within 36 MiB, None takes all.
        blocks: ``(rows, columns)`` for the block of two leaves or sub-trees named by path, "diagonal" for the diagonal
            block of every leaf; see ``hessian``.
        check: whether to compare the result times a random direction with the product that JAX computes from the mean
            of ``jax.vmap(loss)``, and to raise where they differ by more than rounding; see ``hessian``.

    Returns:
        A function ``(params, *batch)``, where every leaf of the batch has a leading axis of B examples. It returns a
        tree like ``params`` of trees like ``params`` with blocks of shape ``leaf_i.shape + leaf_j.shape``. Inside
        ``jax.shard_map`` the mean is over the examples of each device.

    Raises:
        TypeError: if the loss is not scalar, or a leaf of ``params`` is not of a real floating dtype.
        ValueError: if no batch is given, its leaves differ in their leading axis, or ``blocks`` is unknown.
        RuntimeError: if ``check`` finds a difference, as ``hessian``.

    Cost: one gradient of the mean, one product for each output of a tapped layer, and about ``2 B n^2`` operations in
        products of matrices, a quarter of that for the blocks of a layer with itself. Without this structure
        ``hessian`` takes n products of 1.5 gradients each; ``python -m benchmarks --suite modes`` measures both.
        Memory: the result and the intermediates of one chunk. ``check`` takes two more products of the whole batch;
        see ``hessian``.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> loss = lambda w, x: 0.5 * (w @ x) ** 2
        >>> curvature.mean_hessian(loss)(jnp.ones(2), jnp.array([[1.0, 2.0], [1.0, 0.0]]))
        Array([[1., 1.],
               [1., 2.]], dtype=float32)

    References: Botev et al. (arXiv:1706.03662) and Dangel et al. (arXiv:1902.01813) give recursions for the diagonal
        blocks. The blocks between layers and the grouping of the products have no reference.
    """
    _checks.check_callable("loss", loss)
    _checks.check_chunk_size(chunk_size)
    _checks.check_blocks(blocks)

    report = reporter(loss, _routes)

    @later
    def hessian_fn(params: Tree, *batch: Any) -> Tree:
        params, batch = open_batch(params, batch)
        result = _hessian_of_batch(loss, params, batch, blocks, chunk_size)
        if check:
            evaluate = functools.partial(_hessian_of_batch, blocks=blocks, chunk_size=chunk_size)
            subject = hessian_of_mean(loss, params, batch, evaluate, result, report)
            check_hessian(subject, blocks)
        return result

    return PerExampleFunction(hessian_fn, report)


def _hessian_of_batch(
    loss: Objective, params: Tree, batch: tuple[Any, ...], blocks: HessianBlocks, chunk_size: ChunkSize
) -> Tree:
    """The Hessian of the mean of a loss over a batch that has been checked."""
    points = _points_of(trace_taps(loss, params, first_example(batch)))
    if points is None:  # products alone, by the cheapest legal composition
        of_batch = jax.vmap(loss, (None,) + (0,) * len(batch))
        mean = _traced.trace(lambda params: (jnp.mean(of_batch(params, *batch)), None), params)
        return hessian_of(mean, "auto", "auto", blocks)[0]
    return _assemble(points, params, jax.tree.leaves(batch), blocks, chunk_size)


def routes_of_examples(program: _traced.Program) -> dict[str, str]:
    """From the path of each leaf to the rule of ``hessian_of_examples``; empty where that returns None."""
    found = find_structure(program)
    if found is None:
        return {}
    _, points = found
    return dict(zip(leaf_paths(program.x), _routes(points.taps, program.x), strict=True))


def hessian_of_examples(program: _traced.Program, blocks: HessianBlocks) -> Tree | None:
    """The Hessian of a function that is a mean over examples; None where that cannot be shown or does not pay."""
    found = find_structure(program)
    if found is None:
        return None
    examples, points = found
    return _assemble(points, program.x, examples.batch, blocks, "auto")


def find_structure(program: _traced.Program) -> tuple[Examples, Points] | None:
    """The examples of a function that is a mean, and the points of their loss; None where these do not pay."""
    examples = find_examples(program)
    if examples is None:
        return None
    points = _points_of(trace_taps(examples.loss, program.x, tuple(entry(leaf) for leaf in examples.batch)))
    if points is None or _FEWER * points.num_directions > _trees.num_entries(program.x):
        return None
    return examples, points


def _assemble(
    points: Points, params: Tree, examples: Sequence[Array], blocks: HessianBlocks, chunk_size: ChunkSize
) -> Tree:
    """The Hessian of the mean, or the ``blocks`` of it, as a tree of trees."""
    leaves, pairs = jax.tree.leaves(params), leaf_pairs(params, blocks)
    chunks = num_batch_chunks(len(examples[0]), chunk_size, bytes_per_example(points), _LEAST_CHUNK)
    found = _Mean(points, leaves, examples).blocks_of_leaves(set(pairs), chunks)
    return tree_of_blocks(params, blocks, [found[pair] for pair in pairs])


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
        avals = [v.aval for v in taps.leaves]  # with the mesh axes over which they vary
        if not keeps_finite(jax.make_jaxpr(taps.root_values)(avals)):
            return None
    return find_points(taps)


def _routes(taps: Taps | None, params: Tree) -> list[str]:
    """A sentence for each leaf on how its rows and columns are computed."""
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


Pairs = set[tuple[int, int]]
LeafBlocks = dict[tuple[int, int], Array]


class _Mean(NamedTuple):
    """A mean of losses at one point, whose Hessian is assembled from blocks of roots.

    Attributes:
        points: the points of the loss of one example.
        leaves: the leaves of the parameters.
        batch: the leaves of the examples, with a leading batch axis.
    """

    points: Points
    leaves: Sequence[Array]
    batch: Sequence[Array]

    @property
    def taps(self) -> Taps:
        """The taps of the loss."""
        return self.points.taps

    def blocks_of_leaves(self, pairs: Pairs, chunks: int) -> LeafBlocks:
        """The blocks of the mean for the given pairs of leaves."""
        taps, leaves = self.taps, self.leaves
        derived = [root for root in taps.roots if root not in taps.views]

        def wanted(row: Any, column: Any) -> bool:
            return bool(derived) or (taps.views[row].leaf, taps.views[column].leaf) in pairs

        of_roots = [(row, column) for row in taps.roots for column in taps.roots if wanted(row, column)]

        def of_part(examples: Sequence[Array], weights: Array) -> list[Array | None]:
            found = self.blocks_of_roots(examples, weights / len(self.batch[0]), wanted)
            return [found.get(pair) for pair in of_roots]

        sums = zip(of_roots, sum_over_chunks(of_part, self.batch, chunks, taps.program.out.dtype), strict=True)
        blocks = {pair: block for pair, block in sums if block is not None}
        if derived:
            result = self.derived_curvature(derived)
            if any(root in pair for pair in blocks for root in derived):
                through = self.pull_to_leaves(blocks)
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

    def derived_curvature(self, derived: Sequence[Any]) -> LeafBlocks:
        """The Hessian of ``sum <gradient, root(leaves)>``: the curvature of functions of the parameters alone.

        It is the second term of the chain rule, ``J' H J + sum_k g_k d^2 root_k``; the first is ``pull_to_leaves``.
        """
        taps, size = self.taps, len(self.batch[0])
        weights = jnp.full(size, 1 / size, taps.program.out.dtype)
        gradient = jax.grad(self.weighted_loss)(taps.root_values(self.leaves), self.batch, weights)
        gradients = dict(zip(taps.roots, gradient, strict=True))

        def weighted_roots(leaves: list[Array]) -> tuple[Array, None]:
            values = dict(zip(taps.roots, taps.root_values(leaves), strict=True))
            terms = [jnp.sum(gradients[root] * values[root]).astype(weights.dtype) for root in derived]
            return jnp.sum(jnp.stack(terms)), None

        rows, _ = hessian_of(_traced.trace(weighted_roots, list(self.leaves)), "auto", "auto")
        return {(i, j): block for i, row in enumerate(rows) for j, block in enumerate(row)}

    def pull_to_leaves(self, blocks: Blocks) -> LeafBlocks:
        """``J' H J`` for the Hessian H with respect to the roots and the Jacobian J of the roots."""
        leaves, all_roots = self.leaves, self.taps.roots
        roots, pull = jax.vjp(self.taps.root_values, list(leaves))
        _, unravel = ravel(roots)  # restores the dtype of every root

        def matrix_of(row: Any, column: Any) -> Array:
            shape = row.aval.size, column.aval.size
            block = blocks.get((row, column))
            return jnp.zeros(shape, row.aval.dtype) if block is None else block.reshape(shape)

        rows = [jnp.concatenate([matrix_of(row, column) for column in all_roots], 1) for row in all_roots]
        pull_all = jax.vmap(lambda vector: pull(unravel(vector))[0])
        columns = pull_all(jnp.concatenate(rows))  # for each leaf, (entries of roots, *leaf)
        result = {}
        for j, column in enumerate(columns):
            for i, block in enumerate(pull_all(column.reshape(column.shape[0], -1).T)):
                turned = jnp.moveaxis(block, 0, -1)
                result[i, j] = turned.reshape(leaves[i].shape + leaves[j].shape)
        return result

    def blocks_of_roots(self, examples: Sequence[Array], weights: Array, wanted: Wanted) -> Blocks:
        """The blocks of all roots: from taps where roots have points, else from products with the whole Hessian."""
        taps, rest = self.taps, self.points.rest
        blocks = tapped_blocks(self.points, taps.parameter_values(self.leaves), examples, weights, wanted)
        if not rest:
            return blocks
        roots = dict(zip(taps.roots, taps.root_values(self.leaves), strict=True))

        def by_rest(moved: list[Array]) -> tuple[list[Array], None]:
            at = roots | dict(zip(rest, moved, strict=True))
            return jax.grad(self.weighted_loss)([at[root] for root in taps.roots], examples, weights), None

        columns, _ = jacobian_of(by_rest, [roots[root] for root in rest], "fwd", "auto")
        for row, parts in zip(taps.roots, columns, strict=True):
            for column, block in zip(rest, parts, strict=True):
                if wanted(row, column):
                    blocks[row, column] = block
                if row in self.points.tapped and wanted(column, row):
                    blocks[column, row] = jnp.moveaxis(block, range(row.aval.ndim), range(-row.aval.ndim, 0))
        return blocks

    def weighted_loss(self, roots: Sequence[Array], examples: Sequence[Array], weights: Array) -> Array:
        """The weighted sum of the losses as a function of the roots."""
        base = self.taps.given(self.leaves)
        base.write(self.taps.roots, roots)
        return jnp.vdot(weights, jax.vmap(lambda example: self.taps.loss_of(base, example, {})[0])(examples))
