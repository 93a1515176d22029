"""Mean, second moment and variance of the entries of per-example gradients."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvature import _checks
from curvature._errors import later, public
from curvature._types import ChunkSize, Objective, Tree
from curvature.programs._tap_gradients import factors, from_canonical
from curvature.programs._taps import Site, Taps, trace_taps
from curvature.transforms._chunks import num_batch_chunks, sum_over_chunks
from curvature.transforms._clipped_grad import formed_gradient, routes_in_words
from curvature.transforms._per_example_function import PerExampleFunction, open_batch, reporter
from curvature.transforms._per_example_norms import accumulator, dense, formed_gradients, routes_of
from curvature.transforms._self_check_examples import Expected, Gradients, check_few_examples

_Sums = tuple[list[Array], list[Array]]


class GradMoments(NamedTuple):
    """The moments over a batch of each entry of the gradient; see ``per_example_grad_moments``.

    Attributes:
        mean: the gradient of the mean loss.
        second_moment: the mean of the squares.
        variance: ``second_moment - mean**2``.
    """

    mean: Tree
    second_moment: Tree
    variance: Tree


@public
def per_example_grad_moments(
    loss: Objective, *, chunk_size: ChunkSize = "auto", check: bool = False
) -> PerExampleFunction:
    """Mean, second moment and variance over the batch of each entry of the per-example gradients ``g_b``.

    ``mean = (1/B) sum_b g_b``, ``second_moment = (1/B) sum_b g_b**2``, ``variance = second_moment - mean**2``: the
    diagonal of the empirical Fisher matrix, and the noise of a stochastic gradient.

    Args:
        loss: ``loss(params, *example) -> scalar``, for one example.
        chunk_size: how many examples at once; "auto" keeps the gradients formed at once within 36 MiB.
        check: whether to compare the result for a few examples with JAX's; see ``per_example_grad_norm``.

    Returns:
        A function ``(params, *batch)``, where every leaf of the batch has a leading axis of B examples. It returns
        ``GradMoments``, three trees like ``params``. The variance is that of the batch, divided by B and not by B - 1;
        it is never negative, and is exact to rounding of the second moment.

    Raises:
        TypeError, ValueError, RuntimeError: as ``per_example_grad_norm``.

    Cost: for weights that meet one vector of each example, one gradient of the mean and one more product of matrices,
        ``sum_b a_b**2 (d_b**2)'``. The gradients of other leaves are formed, one chunk of examples at a time.
        ``check`` takes the gradients of three examples, twice.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.per_example_grad_moments(lambda w, x: w @ x)(jnp.ones(2), jnp.array([[3.0, 4.0], [1.0, 4.0]]))
        GradMoments(mean=Array([2., 4.], dtype=float32), second_moment=Array([ 5., 16.], dtype=float32),
            variance=Array([1., 0.], dtype=float32))

    References: Dangel et al., BackPACK (arXiv:1912.10985, appendix A.1).
    """
    _checks.check_callable("loss", loss)
    _checks.check_chunk_size(chunk_size)

    report = reporter(loss, routes_in_words)

    @later
    def moments(params: Tree, *batch: Any) -> GradMoments:
        params, batch, example = open_batch(params, batch)
        if check:
            check_few_examples(loss, params, batch, run, _expected_moments, report)
        leaves, structure = jax.tree.flatten(params)
        examples = jax.tree.leaves(batch)
        taps = trace_taps(loss, params, example)

        def by_gradients(examples: Sequence[Array], weights: Array) -> _Sums:
            part = jax.tree.structure(batch).unflatten(examples)
            gradients = jax.vmap(lambda *example: formed_gradient(loss, params, example))(*part)
            return _sum_gradients(jax.tree.leaves(gradients), weights)

        of_part = by_gradients if taps is None else _sums_by_taps(taps, leaves)
        single = {} if taps is None else _single_uses(taps)
        dtype, count = accumulator(leaves), len(examples[0])
        formed_bytes = dtype.itemsize * sum(leaf.size for k, leaf in enumerate(leaves) if k not in single)
        chunks = num_batch_chunks(count, chunk_size, formed_bytes, least=8)
        first, second = sum_over_chunks(of_part, examples, chunks, dtype)
        mean = [total / count for total in first]
        square = [total / count for total in second]
        variance = [jnp.maximum(s - m**2, 0) for s, m in zip(square, mean, strict=True)]
        cast = [
            structure.unflatten([a.astype(leaf.dtype) for a, leaf in zip(arrays, leaves, strict=True)])
            for arrays in (mean, square, variance)
        ]
        return GradMoments(*cast)

    def run(loss: Objective, params: Tree, batch: tuple[Any, ...], _: Any) -> list[Array]:
        return jax.tree.leaves(per_example_grad_moments(loss, chunk_size=2)(params, *batch))

    return PerExampleFunction(moments, report)


def _expected_moments(gradients: Gradients, _: Any, __: float) -> list[Expected]:
    """The moments from gradients of JAX."""
    means = [jnp.mean(leaf, 0) for leaf in gradients]
    squares = [jnp.mean(leaf**2, 0) for leaf in gradients]
    variances = [jnp.var(leaf, 0) for leaf in gradients]
    return [
        *(Expected(mean, jnp.sqrt(square)) for mean, square in zip(means, squares, strict=True)),
        *(Expected(square, square) for square in squares),
        *(Expected(variance, square) for variance, square in zip(variances, squares, strict=True)),
    ]


def _sum_gradients(gradients: Sequence[Array], weights: Array) -> _Sums:
    """The weighted sums of per-example gradients and of their squares."""
    gradients = [gradient.astype(weights.dtype) for gradient in gradients]
    first = [jnp.tensordot(weights, gradient, 1) for gradient in gradients]
    return first, [jnp.tensordot(weights, gradient**2, 1) for gradient in gradients]


def _single_uses(taps: Taps) -> dict[int, int]:
    """From each leaf that meets the data once, at one position, to the number of that site."""
    routes = enumerate(routes_of(taps))
    return {
        leaf: route.uses[0]
        for leaf, route in routes
        if len(route.uses) == 1 and not route.scalars and taps.sites[route.uses[0]].sizes[1] == 1
    }


def _sums_by_taps(taps: Taps, leaves: Sequence[Array]) -> Callable[[Sequence[Array], Array], _Sums]:
    """The map from examples to the weighted sums of their gradients and of the squares, which forms few gradients."""
    single = _single_uses(taps)
    others = [leaf for leaf in range(len(leaves)) if leaf not in single]

    def of_part(examples: Sequence[Array], weights: Array) -> _Sums:
        values = taps.parameter_values(leaves)
        gradients = formed_gradients(taps, values, leaves, others)

        def of_example(*example: Any) -> Any:
            captured, d = taps.cotangents(values, example)
            uses = {leaf: factors(taps.sites[n], captured[n], d[n][0]) for leaf, n in single.items()}
            pairs = {leaf: (dense(use)[:, 0], use.d[:, 0]) for leaf, use in uses.items()}
            return gradients(list(zip(taps.sites, captured, d, strict=True))), pairs

        formed, pairs = jax.vmap(of_example)(*examples)
        sums = dict(zip(others, zip(*_sum_gradients(formed, weights), strict=True), strict=True))
        for leaf, n in single.items():
            found = _sum_outer_products(pairs[leaf], weights, taps.sites[n])
            view = taps.views[taps.sites[n].origins[0].root]
            sums[leaf] = view.transpose(found[0]), view.transpose(found[1])
        first, second = zip(*(sums[leaf] for leaf in range(len(leaves))), strict=True)
        return list(first), list(second)

    return of_part


def _sum_outer_products(pair: tuple[Array, Array], weights: Array, site: Site) -> tuple[Array, Array]:
    """The weighted sums of ``a_b d_b'`` and of its squares, with the axes of the root."""
    a, d = (array.astype(weights.dtype) for array in pair)
    weighted = d * weights[:, None, None]
    # b: example, g: group, i: row, o: column
    sums = jnp.einsum("bgi,bgo->gio", a, weighted), jnp.einsum("bgi,bgo->gio", a**2, weighted * d)
    first, second = (from_canonical(array, site.axes, site.origins[0].root) for array in sums)
    return first, second
