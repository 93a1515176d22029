"""Norms of per-example gradients, the mean of clipped gradients, and moments, from taps where the loss has any."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature import _checks
from curvature._errors import later, public
from curvature._sharding import entry, vary_like
from curvature._types import ChunkSize, Objective, Tree
from curvature.programs import _traced
from curvature.programs._tap_gradients import factors, from_canonical, sum_over_batch
from curvature.programs._taps import Site, Taps, trace_taps
from curvature.transforms import _modes
from curvature.transforms._chunks import num_batch_chunks, num_chunks, sum_over_chunks, vmap
from curvature.transforms._jacobian import gradient_of
from curvature.transforms._per_example_function import PerExampleFunction, first_example, open_batch, reporter
from curvature.transforms._per_example_norms import accumulator, dense, formed_gradients, routes_of, squared_norm
from curvature.transforms._self_check_cases import (
    Comparison,
    Expected,
    Gradients,
    check_few_examples,
    each_norm,
    norms_of,
)


@public
def per_example_grad_norm(
    loss: Objective, *, chunk_size: ChunkSize = "auto", check: bool = False
) -> PerExampleFunction:
    """The norm of each example's gradient: ``norm(d loss(params, *example_b) / d params)`` over all leaves together.

    Where a weight enters as ``z = a W``, the gradient is ``sum_s a_s d_s'`` over positions s (tokens, pixels, steps of
    a scan) with ``d`` the cotangent of ``z``. For one position its norm is ``norm(a) norm(d)``; for few positions it is
    the root of ``sum_st (a_s' a_t) (d_s' d_t)``. Where that costs more, the gradient of the leaf is formed, one chunk
    of examples at a time. There are rules for matrix products in any order of axes, convolutions, biases, scales and
    lookups, also inside ``jit``, ``scan`` and ``remat``, in flax, equinox and plain JAX. Where a leaf enters in another
    way, that equation is differentiated by reverse mode. The result is exact in every case.
    ``per_example_grad_norm(loss).report(params, *batch)`` gives the rule for each leaf.

    Args:
        loss: ``loss(params, *example) -> scalar``, for one example.
        chunk_size: how many examples run at once; see ``vmap``.
        check: whether to compare the result for up to three of the examples with the result from their gradients by
            ``jax.vmap(jax.grad(loss))``, and to raise if they differ by more than rounding. Where the call is traced,
            as by ``jax.jit``, both are evaluated while it is traced, at random values of the same shapes; the compiled
            program is the same as without ``check``.

    Returns:
        A function ``(params, *batch)``, where every leaf of the batch has a leading axis of B examples. It returns the
        norms, of shape (B,), of the gradients of single examples: nothing is divided by B.

    Raises:
        TypeError: if the loss is not scalar, or a leaf of ``params`` is not of a real floating dtype.
        ValueError: if no batch is given, or its leaves differ in their leading axis.
        RuntimeError: if ``check`` finds a difference; the message names the leaves, the rule for each, and the
            equations and lines where they enter the loss.

    Cost: where each example is one vector, less than one gradient of the mean, because no gradient of a weight is
        formed. Memory: the inputs and cotangents of one chunk. ``check`` takes the gradients of three examples, twice.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> loss = lambda w, x, y: 0.5 * (w @ x - y) ** 2
        >>> curvature.per_example_grad_norm(loss)(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.zeros(2))
        Array([35.,  1.], dtype=float32)

    References: Goodfellow, Efficient per-example gradient computations (arXiv:1510.01799), for one position; Li et al.,
        Large language models can be strong differentially private learners (arXiv:2110.05679, section 4), for several.
    """

    def norms(loss: Objective, params: Tree, batch: tuple[Any, ...], chunk_size: ChunkSize) -> Float[Array, " batch"]:
        steps = _steps(loss, params, batch)
        norm = vmap(lambda *example: jnp.sqrt(steps.square(steps.differentiate(example))), chunk_size=chunk_size)
        return norm(*jax.tree.leaves(batch))

    def expected(gradients: Gradients, eps: float) -> list[Expected]:
        return each_norm(norms_of(gradients), eps)

    return _per_example_function(loss, norms, chunk_size, check, Comparison(list, expected), summed=False)


@public
def clipped_grad(
    loss: Objective, max_norm: Any, *, chunk_size: ChunkSize = "auto", check: bool = False
) -> PerExampleFunction:
    """The mean of clipped per-example gradients: ``(1/B) sum_b g_b min(1, max_norm / norm(g_b))``, and the norms.

    Differentially private training adds noise of scale ``max_norm / B`` to this mean: changing one example moves it by
    at most ``2 max_norm / B``. The norms come from inputs and cotangents, as in ``per_example_grad_norm``. The sum
    comes from the same inputs and the scaled cotangents: no gradient of an example is formed.

    Args:
        loss: ``loss(params, *example) -> scalar``, for one example.
        max_norm: the norm to which larger gradients are scaled down, a positive number.
        chunk_size: how many examples run at once; see ``vmap``.
        check: whether to compare the result for a few examples with JAX's; see ``per_example_grad_norm``.

    Returns:
        A function ``(params, *batch)``, where every leaf of the batch has a leading axis of B examples. It returns
        ``(grad, norms)``: a tree like ``params``, and the norms before clipping, of shape (B,).

    Raises:
        TypeError, ValueError: as ``per_example_grad_norm``; and if ``max_norm`` is not positive.
        RuntimeError: if ``check`` finds a difference, as ``per_example_grad_norm``.

    Cost: about one gradient of the mean. Memory: one gradient of a chunk. ``check`` takes the gradients of three
        examples, twice.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> loss = lambda w, x: w @ x
        >>> grad, norms = curvature.clipped_grad(loss, 1.0)(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 0.5]]))
        >>> grad, norms
        (Array([0.3 , 0.65], dtype=float32), Array([5. , 0.5], dtype=float32))

    References: Abadi et al., Deep learning with differential privacy (arXiv:1607.00133, algorithm 1); one pass for both
        as in Bu et al., Differentially private optimization on large model at small cost (arXiv:2210.00038).
    """
    _checks.check_positive("max_norm", max_norm)

    def parts(result: tuple[Tree, Array]) -> list[Array]:
        return [*jax.tree.leaves(result[0]), *result[1]]

    comparison = Comparison(parts, _expected_clipped, (max_norm,))
    return _per_example_function(loss, _clip, chunk_size, check, comparison)


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
    comparison = Comparison(jax.tree.leaves, _expected_moments)
    return _per_example_function(loss, _moments, chunk_size, check, comparison)


def _per_example_function(
    loss: Objective,
    evaluate: Callable[..., Any],
    chunk_size: ChunkSize,
    check: bool,
    comparison: Comparison,
    summed: bool = True,
) -> PerExampleFunction:
    """The function ``evaluate(loss, params, batch, chunk_size, *extra)`` of the parameters and the batch, checked."""
    _checks.check_callable("loss", loss)
    _checks.check_chunk_size(chunk_size)
    report = reporter(loss, _routes_in_words)

    @later
    def function(params: Tree, *batch: Any) -> Any:
        params, batch = open_batch(params, batch, summed)
        if check:
            check_few_examples(loss, params, batch, evaluate, comparison, report)
        return evaluate(loss, params, batch, chunk_size, *comparison.extra)

    return PerExampleFunction(function, report)


def _routes_in_words(taps: Taps | None, params: Tree) -> list[str]:
    """A sentence for each leaf on the rule for its gradient."""
    if taps is None:
        return ["gradient formed: the loss has no taps"] * len(jax.tree.leaves(params))
    return [route.description for route in routes_of(taps)]


def _cast_like(params: Tree, arrays: Sequence[Array]) -> Tree:
    """A tree like the parameters, also in dtype."""
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten([array.astype(leaf.dtype) for array, leaf in zip(arrays, leaves, strict=True)])


# ---- norms and clipping ----------------------------------------------------------------------------------------------


class _Steps(NamedTuple):
    """The three steps of clipping.

    Attributes:
        differentiate: from one example to its derivatives: at the sites of the taps, or a gradient.
        square: from the derivatives of one example to the squared norm of its gradient.
        weighted_sum: from the derivatives of many examples and their weights to the weighted sum of the gradients.
    """

    differentiate: Callable[[Any], Any]
    square: Callable[[Any], Array]
    weighted_sum: Callable[[Any, Array], list[Array]]


def _clip(
    loss: Objective, params: Tree, batch: tuple[Any, ...], chunk_size: ChunkSize, max_norm: Any
) -> tuple[Tree, Float[Array, " batch"]]:
    """The mean of the clipped gradients, and their norms."""
    examples = jax.tree.leaves(batch)
    dtype, size = accumulator(jax.tree.leaves(params)), len(examples[0])
    steps = _steps(loss, params, batch)

    def sums(part: tuple[Array, list[Array]], counted: Array) -> tuple[list[Array], Array]:
        places, examples = part
        derivatives = jax.vmap(steps.differentiate)(examples)
        norms = jnp.sqrt(jax.vmap(steps.square)(derivatives))
        factors = jnp.where(norms > max_norm, max_norm / norms, 1) / size  # a NaN norm makes the result NaN
        once = jnp.where(counted > 0, norms, 0)
        gradient = steps.weighted_sum(derivatives, counted * factors)
        return gradient, vary_like(jnp.zeros(size, dtype), norms).at[places].add(once)

    places = vary_like(jnp.arange(size), examples)
    chunks = num_chunks(size, chunk_size, steps.differentiate, lambda: [entry(leaf) for leaf in examples])
    gradient, norms = sum_over_chunks(sums, (places, examples), chunks, dtype)
    return _cast_like(params, gradient), norms


def _expected_clipped(gradients: Gradients, eps: float, max_norm: Any) -> list[Expected]:
    """The mean of the clipped gradients, and their norms, from gradients of JAX."""
    norms = norms_of(gradients)
    factors = jnp.where(norms > max_norm, max_norm / norms, 1)
    clipped = [jnp.tensordot(factors.astype(leaf.dtype), leaf, 1) / len(norms) for leaf in gradients]
    sizes = [jnp.tensordot(factors.astype(leaf.dtype), jnp.abs(leaf), 1) / len(norms) for leaf in gradients]
    return [*(Expected(*pair, eps**-0.5) for pair in zip(clipped, sizes, strict=True)), *each_norm(norms, eps)]


def _steps(loss: Objective, params: Tree, batch: tuple[Any, ...]) -> _Steps:
    """The steps by taps; by gradients for a loss without taps."""
    taps = trace_taps(loss, params, first_example(batch))
    if taps is None:
        return _steps_by_gradients(loss, params, jax.tree.structure(batch))
    return _steps_by_taps(taps, jax.tree.leaves(params))


def _steps_by_taps(taps: Taps, leaves: Sequence[Array]) -> _Steps:
    values = taps.parameter_values(leaves)
    square = squared_norm(taps, values, leaves)

    def weighted_sum(derivatives: Any, weights: Array) -> list[Array]:
        captured, d = derivatives
        scaled = jax.tree.map(lambda rows: rows * weights.astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1)), d)
        roots = sum_over_batch(taps, values, list(zip(taps.sites, captured, scaled, strict=True)))
        _, pull = jax.vjp(taps.root_values, list(leaves))
        return pull([roots[root] for root in taps.roots])[0]

    return _Steps(lambda example: taps.cotangents(values, example), lambda pair: square(*pair), weighted_sum)


def _steps_by_gradients(loss: Objective, params: Tree, structure: Any) -> _Steps:
    dtype = accumulator(jax.tree.leaves(params))

    def differentiate(example: Sequence[Any]) -> list[Array]:
        gradient = formed_gradient(loss, params, structure.unflatten(example))
        return [leaf.astype(dtype) for leaf in jax.tree.leaves(gradient)]

    def square(gradient: list[Array]) -> Array:
        return jnp.sum(jnp.stack([jnp.sum(leaf**2) for leaf in gradient]))

    def weighted_sum(gradients: list[Array], weights: Array) -> list[Array]:
        return [jnp.tensordot(weights, rows, 1) for rows in gradients]

    return _Steps(differentiate, square, weighted_sum)


def formed_gradient(loss: Objective, params: Tree, example: tuple[Any, ...]) -> Tree:
    """The gradient of one example by a legal mode."""
    program = _traced.trace(lambda params: (loss(params, *example), None), params)
    return gradient_of(program, params, _modes.choose_jacobian(program, "auto"))[0]


# ---- moments ---------------------------------------------------------------------------------------------------------

_Sums = tuple[list[Array], list[Array]]


def _moments(loss: Objective, params: Tree, batch: tuple[Any, ...], chunk_size: ChunkSize) -> GradMoments:
    """The moments, from sums of gradients and of their squares."""
    leaves, examples = jax.tree.leaves(params), jax.tree.leaves(batch)
    taps = trace_taps(loss, params, first_example(batch))

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
    mean, square = ([total / count for total in totals] for totals in (first, second))
    variance = [jnp.maximum(s - m**2, 0) for s, m in zip(square, mean, strict=True)]
    return GradMoments(*(_cast_like(params, arrays) for arrays in (mean, square, variance)))


def _expected_moments(gradients: Gradients, eps: float) -> list[Expected]:
    """The moments from gradients of JAX."""
    squares = [jnp.mean(leaf**2, 0) for leaf in gradients]
    means = [Expected(jnp.mean(leaf, 0), jnp.sqrt(square)) for leaf, square in zip(gradients, squares, strict=True)]
    variances = [Expected(jnp.var(leaf, 0), square) for leaf, square in zip(gradients, squares, strict=True)]
    return [*means, *(Expected(square, square) for square in squares), *variances]


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
