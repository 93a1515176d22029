"""Norms of per-example gradients, and sums of clipped ones, without one gradient for each example."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature import _checks
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

_Parts = tuple[Callable[[Any], Any], Callable[[Any], Array], Callable[[Any, Array], list[Array]]]


def per_example_grad_norm(
    loss: Objective, *, chunk_size: ChunkSize = "auto", check: bool = False
) -> PerExampleFunction:
    """The norm of each example's gradient: ``norm(d loss(params, *example_b) / d params)`` over all leaves together.

    Where a weight enters as ``z = a W``, the gradient is ``sum_s a_s d_s'`` over positions s (tokens, pixels, steps of
    a scan) with ``d`` the cotangent of ``z``. Its norm is that of ``a`` times that of ``d`` for one position, and the
    root of ``sum_st (a_s' a_t) (d_s' d_t)`` for few; only where that costs more is the gradient of the leaf formed, one
    chunk of examples at a time. Matrix products in any order of axes, convolutions, biases, scales and lookups are
    known, through ``jit``, ``scan`` and ``remat``, in flax, equinox and your own code alike; a leaf that enters in
    another way is differentiated there. The result is exact in every case.
    ``per_example_grad_norm(loss).report(params, *batch)`` says what becomes of each leaf.

    Args:
        loss: ``loss(params, *example) -> scalar``, for one example.
        chunk_size: how many examples run at once; see ``vmap``.
        check: whether to compare the function of up to three of the examples with the same formula of their gradients
            by ``jax.vmap(jax.grad(loss))``, and to raise where they differ by more than rounding. Where the call is
            traced, as by ``jax.jit``, both are evaluated while it is traced, at random values of the same shapes; the
            compiled program is the same as without.

    Returns:
        A function ``(params, *batch)``, where every leaf of the batch has a leading axis of B examples, that returns
        the norms, of shape (B,). They are per example: divided by B nowhere.

    Raises:
        TypeError: when the loss is not scalar, or a leaf of ``params`` is not of a real floating dtype.
        ValueError: when no batch is given, or its leaves differ in their leading axis.
        RuntimeError: where ``check`` finds a difference; the message names the leaves, the rule that was taken for
            each, and the equations and lines where these enter the loss.

    Cost: for one vector an example less than one gradient of the mean, as no gradient of a weight is formed; memory for
        the inputs and cotangents of one chunk. ``check`` takes the gradients of three examples, twice.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> loss = lambda w, x, y: 0.5 * (w @ x - y) ** 2
        >>> curvature.per_example_grad_norm(loss)(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.zeros(2))
        Array([35.,  1.], dtype=float32)

    References: Goodfellow, Efficient per-example gradient computations (arXiv:1510.01799), for one position; Li et al.,
        Large language models can be strong differentially private learners (arXiv:2110.05679, section 4), for several.
    """
    name = "per_example_grad_norm"
    _checks.check_callable(name, "loss", loss)
    _checks.check_chunk_size(name, chunk_size)

    report = reporter(name, loss, routes_in_words)

    def norms(params: Tree, *batch: Any) -> Float[Array, " batch"]:
        params, batch, example = open_batch(name, params, batch, summed=False)
        if check:
            check_few_examples(name, loss, params, batch, _run_norms, _norms_of_formed, report)
        known, square, _ = _parts(name, loss, params, example)
        return vmap(lambda *example: jnp.sqrt(square(known(example))), chunk_size=chunk_size)(*jax.tree.leaves(batch))

    return PerExampleFunction(norms, report)


def _run_norms(loss: Objective, params: Tree, batch: tuple[Any, ...], _: Any) -> list[Array]:
    """The norms for a few examples, in chunks of two."""
    return [*per_example_grad_norm(loss, chunk_size=2)(params, *batch)]


def _norms_of_formed(gradients: Gradients, _: Any, eps: float) -> list[Expected]:
    """The norms of gradients that are formed."""
    return each_norm(norms_of(gradients), eps)


def clipped_grad(
    loss: Objective, max_norm: Any, *, chunk_size: ChunkSize = "auto", check: bool = False
) -> PerExampleFunction:
    """The mean of clipped per-example gradients: ``(1/B) sum_b g_b min(1, max_norm / norm(g_b))``, and the norms.

    What differentially private training needs before it adds noise of scale ``max_norm / B``: changing one example
    moves the result by at most ``2 max_norm / B``. From the inputs and cotangents that give the norms, as in
    ``per_example_grad_norm``, comes the sum too, once the cotangents are scaled: no gradient of an example is formed.

    Args:
        loss: ``loss(params, *example) -> scalar``, for one example.
        max_norm: the largest norm that an example's gradient keeps, a positive number.
        chunk_size: how many examples run at once; see ``vmap``.
        check: whether to compare the result for a few examples with JAX's; see ``per_example_grad_norm``.

    Returns:
        A function ``(params, *batch)``, where every leaf of the batch has a leading axis of B examples, that returns
        ``(grad, norms)``: a tree like ``params``, and the norms before clipping, of shape (B,).

    Raises:
        TypeError, ValueError: as ``per_example_grad_norm``; and for a ``max_norm`` that is not positive.
        RuntimeError: where ``check`` finds a difference, as ``per_example_grad_norm``.

    Cost: about one gradient of the mean; memory as one gradient of a chunk. ``check`` takes the gradients of three
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
    name = "clipped_grad"
    _checks.check_callable(name, "loss", loss)
    _checks.check_positive(name, "max_norm", max_norm)
    _checks.check_chunk_size(name, chunk_size)

    report = reporter(name, loss, routes_in_words)

    def clipped(params: Tree, *batch: Any) -> tuple[Tree, Float[Array, " batch"]]:
        params, batch, example = open_batch(name, params, batch)
        if check:
            check_few_examples(name, loss, params, batch, _run_clipped, _clipped_of_formed, report, max_norm)
        leaves, structure = jax.tree.flatten(params)
        examples = jax.tree.leaves(batch)
        dtype, size = accumulator(leaves), len(examples[0])
        known, square, weighted = _parts(name, loss, params, example)

        def sums(part: tuple[Array, list[Array]], counted: Array) -> tuple[list[Array], Array]:
            places, examples = part
            parts = jax.vmap(known)(examples)
            norms = jnp.sqrt(jax.vmap(square)(parts))
            factors = jnp.where(norms > max_norm, max_norm / norms, 1) / size  # a NaN norm passes its NaN on
            once = jnp.where(counted > 0, norms, 0)
            return weighted(parts, counted * factors), vary_like(jnp.zeros(size, dtype), norms).at[places].add(once)

        places = vary_like(jnp.arange(size), examples)
        chunks = _chunks.num_chunks(size, chunk_size, known, lambda: [entry(leaf) for leaf in examples])
        gradient, norms = sum_over_chunks(sums, (places, examples), chunks, dtype)
        cast = [total.astype(leaf.dtype) for total, leaf in zip(gradient, leaves, strict=True)]
        return structure.unflatten(cast), norms

    return PerExampleFunction(clipped, report)


def _run_clipped(loss: Objective, params: Tree, batch: tuple[Any, ...], max_norm: Any) -> list[Array]:
    """The mean of the clipped gradients of a few examples, in chunks of two, and their norms."""
    gradient, norms = clipped_grad(loss, max_norm, chunk_size=2)(params, *batch)
    return [*jax.tree.leaves(gradient), *norms]


def _clipped_of_formed(gradients: Gradients, max_norm: Any, eps: float) -> list[Expected]:
    """The mean of gradients that are formed and then clipped, and their norms."""
    norms = norms_of(gradients)
    factors = jnp.where(norms > max_norm, max_norm / norms, 1)
    clipped = [jnp.tensordot(factors.astype(leaf.dtype), leaf, 1) / len(norms) for leaf in gradients]
    sizes = [jnp.tensordot(factors.astype(leaf.dtype), jnp.abs(leaf), 1) / len(norms) for leaf in gradients]
    return [*(Expected(*pair, eps**-0.5) for pair in zip(clipped, sizes, strict=True)), *each_norm(norms, eps)]


def _parts(name: str, loss: Objective, params: Tree, example: tuple[Any, ...]) -> _Parts:
    """What is to be known of one example; from that its squared norm; from that of many a weighted sum of gradients."""
    taps = trace_taps(name, loss, params, example)
    if taps is None:
        return _formed_parts(name, loss, params, jax.tree.structure(example))
    return _tapped_parts(taps, jax.tree.leaves(params))


def _tapped_parts(taps: Taps, leaves: Sequence[Array]) -> _Parts:
    """From inputs and cotangents at the sites."""
    values = taps.parameter_values(leaves)
    square = squared_norm(taps, values, leaves)

    def weighted(parts: Any, weights: Array) -> list[Array]:
        captured, d = parts
        scaled = jax.tree.map(lambda rows: rows * weights.astype(rows.dtype).reshape(-1, *[1] * (rows.ndim - 1)), d)
        roots = sum_over_batch(taps, values, captured, scaled)
        _, pull = jax.vjp(taps.root_values, list(leaves))
        return pull([roots[root] for root in taps.roots])[0]

    return lambda example: taps.cotangents(values, example), lambda parts: square(*parts), weighted


def _formed_parts(name: str, loss: Objective, params: Tree, structure: Any) -> _Parts:
    """From one gradient for each example, for a loss without taps."""
    dtype = accumulator(jax.tree.leaves(params))

    def known(example: Sequence[Any]) -> list[Array]:
        gradient = formed_gradient(name, loss, params, structure.unflatten(example))
        return [leaf.astype(dtype) for leaf in jax.tree.leaves(gradient)]

    def square(gradient: list[Array]) -> Array:
        return jnp.sum(jnp.stack([jnp.sum(leaf**2) for leaf in gradient]))

    def weighted(gradients: list[Array], weights: Array) -> list[Array]:
        return [jnp.tensordot(weights, rows, 1) for rows in gradients]

    return known, square, weighted


def routes_in_words(taps: Taps | None, params: Tree) -> list[str]:
    """What becomes of each leaf."""
    if taps is None:
        return ["gradient formed: the loss has no taps"] * len(jax.tree.leaves(params))
    return [route.told for route in routes_of(taps)]


def formed_gradient(name: str, loss: Objective, params: Tree, example: tuple[Any, ...]) -> Tree:
    """The gradient of one example by whichever mode is legal."""
    program = _traced.trace(lambda params: (loss(params, *example), None), params)
    return gradient_of(program, params, _modes.choose_jacobian(name, program, "auto"))[0]
