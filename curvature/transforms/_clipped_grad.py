"""Norms of per-example gradients, and the mean of clipped gradients, without forming one gradient for each example."""

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
from curvature.programs._tap_gradients import sum_over_batch
from curvature.programs._taps import Taps, trace_taps
from curvature.transforms import _chunks, _modes
from curvature.transforms._chunks import sum_over_chunks, vmap
from curvature.transforms._jacobian import gradient_of
from curvature.transforms._per_example_function import PerExampleFunction, open_batch, reporter
from curvature.transforms._per_example_norms import accumulator, routes_of, squared_norm
from curvature.transforms._self_check_examples import Expected, Gradients, check_few_examples, each_norm, norms_of


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
    _checks.check_callable("loss", loss)
    _checks.check_chunk_size(chunk_size)

    report = reporter(loss, routes_in_words)

    @later
    def norms(params: Tree, *batch: Any) -> Float[Array, " batch"]:
        params, batch, example = open_batch(params, batch, summed=False)
        if check:
            check_few_examples(loss, params, batch, run, expected, report)
        steps = _steps(loss, params, example)
        norm = vmap(lambda *example: jnp.sqrt(steps.square(steps.differentiate(example))), chunk_size=chunk_size)
        return norm(*jax.tree.leaves(batch))

    def run(loss: Objective, params: Tree, batch: tuple[Any, ...], _: Any) -> list[Array]:
        return [*per_example_grad_norm(loss, chunk_size=2)(params, *batch)]

    def expected(gradients: Gradients, _: Any, eps: float) -> list[Expected]:
        return each_norm(norms_of(gradients), eps)

    return PerExampleFunction(norms, report)


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
    _checks.check_callable("loss", loss)
    _checks.check_positive("max_norm", max_norm)
    _checks.check_chunk_size(chunk_size)

    report = reporter(loss, routes_in_words)

    @later
    def clipped(params: Tree, *batch: Any) -> tuple[Tree, Float[Array, " batch"]]:
        params, batch, example = open_batch(params, batch)
        if check:
            check_few_examples(loss, params, batch, run, _expected_clipped, report, max_norm)
        leaves, structure = jax.tree.flatten(params)
        examples = jax.tree.leaves(batch)
        dtype, size = accumulator(leaves), len(examples[0])
        steps = _steps(loss, params, example)

        def sums(part: tuple[Array, list[Array]], counted: Array) -> tuple[list[Array], Array]:
            places, examples = part
            derivatives = jax.vmap(steps.differentiate)(examples)
            norms = jnp.sqrt(jax.vmap(steps.square)(derivatives))
            factors = jnp.where(norms > max_norm, max_norm / norms, 1) / size  # a NaN norm makes the result NaN
            once = jnp.where(counted > 0, norms, 0)
            gradient = steps.weighted_sum(derivatives, counted * factors)
            return gradient, vary_like(jnp.zeros(size, dtype), norms).at[places].add(once)

        places = vary_like(jnp.arange(size), examples)
        chunks = _chunks.num_chunks(size, chunk_size, steps.differentiate, lambda: [entry(leaf) for leaf in examples])
        gradient, norms = sum_over_chunks(sums, (places, examples), chunks, dtype)
        cast = [total.astype(leaf.dtype) for total, leaf in zip(gradient, leaves, strict=True)]
        return structure.unflatten(cast), norms

    def run(loss: Objective, params: Tree, batch: tuple[Any, ...], max_norm: Any) -> list[Array]:
        gradient, norms = clipped_grad(loss, max_norm, chunk_size=2)(params, *batch)
        return [*jax.tree.leaves(gradient), *norms]

    return PerExampleFunction(clipped, report)


def _expected_clipped(gradients: Gradients, max_norm: Any, eps: float) -> list[Expected]:
    """The mean of the clipped gradients, and their norms, from gradients of JAX."""
    norms = norms_of(gradients)
    factors = jnp.where(norms > max_norm, max_norm / norms, 1)
    clipped = [jnp.tensordot(factors.astype(leaf.dtype), leaf, 1) / len(norms) for leaf in gradients]
    sizes = [jnp.tensordot(factors.astype(leaf.dtype), jnp.abs(leaf), 1) / len(norms) for leaf in gradients]
    return [*(Expected(*pair, eps**-0.5) for pair in zip(clipped, sizes, strict=True)), *each_norm(norms, eps)]


def _steps(loss: Objective, params: Tree, example: tuple[Any, ...]) -> _Steps:
    """The steps by taps; by gradients for a loss without taps."""
    taps = trace_taps(loss, params, example)
    if taps is None:
        return _steps_by_gradients(loss, params, jax.tree.structure(example))
    return _steps_by_taps(taps, jax.tree.leaves(params))


def _steps_by_taps(taps: Taps, leaves: Sequence[Array]) -> _Steps:
    values = taps.parameter_values(leaves)
    square = squared_norm(taps, values, leaves)

    def weighted_sum(derivatives: Any, weights: Array) -> list[Array]:
        captured, d = derivatives
        scaled = jax.tree.map(lambda rows: rows * weights.astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1)), d)
        roots = sum_over_batch(taps, values, captured, scaled)
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


def routes_in_words(taps: Taps | None, params: Tree) -> list[str]:
    """A sentence for each leaf on the rule for its gradient."""
    if taps is None:
        return ["gradient formed: the loss has no taps"] * len(jax.tree.leaves(params))
    return [route.description for route in routes_of(taps)]


def formed_gradient(loss: Objective, params: Tree, example: tuple[Any, ...]) -> Tree:
    """The gradient of one example by a legal mode."""
    program = _traced.trace(lambda params: (loss(params, *example), None), params)
    return gradient_of(program, params, _modes.choose_jacobian(program, "auto"))[0]
