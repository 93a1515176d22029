"""Of ``modes``: what this library promises of the Hessians of tanh networks, and of their diagonals."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Choice, Claim, Contestant, Outcome, Race
from benchmarks.models import Model, tanh_network
from benchmarks.peers import jax_ways, operations
from benchmarks.reading import number, share

PRODUCT = "the product G.T @ G alone"  # which no way of assembling the matrix from examples avoids
CHUNKED = 1.1  # time of the chunk that ours chooses over that of the better fixed one
# Sizes, examples, and how the network is made; what is promised of each is in ``notes.toml``.
NETWORKS: tuple[tuple[tuple[int, ...], int, dict[str, bool]], ...] = (
    ((10, 20, 1), 512, {}),
    ((20, 48, 1), 256, {}),
    ((20, 48, 1), 512, {}),
    ((30, 64, 1), 512, {}),
    ((64, 10), 1797, {"classifies": True, "bias": True}),
    ((64, 64, 10), 512, {"classifies": True}),
)


def networks(choice: Choice) -> Iterator[Race]:
    for sizes, examples, how in () if choice.quick else NETWORKS:
        made = tanh_network(sizes, examples, **how)
        n, name = made.num_parameters, f"network-{'-'.join(map(str, sizes))}"
        yield Race(
            f"modes/hessian/{name}/n={n}/batch={examples}",
            f"Hessian, {made.title}, {n:,} parameters, batch of {examples}", made.name, partial(network_ways, made),
            partial(jax_ways.reference, made, "hessian"), choice.tolerance(1e-5), {"n": n, "batch": examples},
            claims=chunk_claims, **choice.effort(full=1.5),
        )  # fmt: skip


def network_ways(model: Model) -> Iterator[Contestant]:
    """JAX's and ours, the diagonal blocks of ours, and the product that cannot be avoided."""
    yield from jax_ways.contestants(model, "hessian")
    made = jax_ways.InJax(model)
    # Its answer is a part of the matrix only, so that it is shown beside the race, not in it.
    blocks = curvature.mean_hessian(jax_ways.of_one(made.loss), blocks="diagonal")
    args = (made.params, *made.batch)
    yield Contestant('curvature.mean_hessian, "diagonal"', "curvature", blocks, args, floor=True)
    rows = jax.random.normal(jax.random.key(1), (len(made.batch[0]), model.num_parameters))
    yield Contestant(PRODUCT, "jax", lambda g: g.T @ g, (rows,), floor=True)


def chunk_claims(outcome: Outcome) -> list[Claim]:
    names = ("by products", "all at once", "chunks of 64")
    own, *fixed = (number(outcome.row(f"curvature.hessian, {name}"), "seconds") for name in names)
    if own is None or None in fixed:
        return []
    factor = own / min(time for time in fixed if time is not None)
    text = f"by products takes {factor:.2f} times as long as the better of the fixed chunks"
    return [Claim(f"{text} (wanted: at most {CHUNKED})", factor <= CHUNKED)]


DIAGONALS = {"small": (16, 32, 32, 1), "large": (64, 132, 86, 1)}  # 1,568 parameters, and too many for the matrix
CHUNK = 64
WANTED_BYTES = 2**28  # of temporaries on the large network, where the matrix takes 1.6 GB
DIAGONAL = "curvature.hessian_diagonal"


def diagonals(choice: Choice) -> Iterator[Race]:
    for name, sizes in () if choice.quick else DIAGONALS.items():
        made = tanh_network(sizes, 64)
        n = made.num_parameters
        title = f"Diagonal of the Hessian, {made.title}, {n:,} parameters"
        yield Race(
            f"modes/diagonal/{name}/n={n}", title, made.name, partial(diagonal_ways, made, small=name == "small"),
            partial(diagonal_reference, made), 1e-4, {"n": n, "batch": 64}, budget=4.0, rounds=3,
            claims=diagonal_claims,
        )  # fmt: skip


def diagonal_ways(model: Model, *, small: bool) -> Iterator[Contestant]:
    made, flat_loss = jax_ways.InJax(model), model.flat_loss(operations.for_jax())

    def ours(x: Any, *batch: jax.Array) -> Any:
        return curvature.hessian_diagonal(made.loss, x, *batch)

    def products(flat: jax.Array, *batch: jax.Array) -> jax.Array:
        push = jax.linearize(lambda flat: jax.grad(flat_loss)(flat, *batch), flat)[1]
        return jnp.diag(jax.vmap(push)(jnp.eye(flat.size)))

    ways = {f"jax, products in chunks of {CHUNK}": partial(in_chunks, flat_loss)}
    if small:
        ways["jax, products with a dense identity"] = products
        ways["diagonal of jax.hessian"] = lambda x, *batch: jnp.diag(jax.hessian(flat_loss)(x, *batch))
    yield Contestant(DIAGONAL, "curvature", ours, (made.params, *made.batch), read=model.pack)
    yield from jax_ways.named(ways, (jax_ways.numbers(model.pack(model.params())), *made.batch))


def in_chunks(loss: Any, flat: jax.Array, *batch: jax.Array) -> jax.Array:
    push = jax.linearize(lambda flat: jax.grad(loss)(flat, *batch), flat)[1]
    entries = jnp.arange(flat.size)
    return jax.lax.map(lambda i: push(jnp.zeros_like(flat).at[i].set(1.0))[i], entries, batch_size=CHUNK)


def diagonal_reference(model: Model) -> np.ndarray:
    loss = partial(in_chunks, model.flat_loss(operations.for_jax()))
    return jax_ways.in_double(loss, model.pack(model.params()), *model.batch)


def diagonal_claims(outcome: Outcome) -> list[Claim]:
    names = [row.name for row in outcome.rows if row.name != DIAGONAL]
    factors = [factor for name in names if (factor := share(outcome, name, DIAGONAL)) is not None]
    least, memory = min(factors, default=math.nan), number(outcome.row(DIAGONAL), "temporary_bytes")
    text = f"{(memory or 0) / 2**20:.0f} MiB of temporaries (wanted: at most {WANTED_BYTES >> 20})"
    return [
        Claim(f"{least:.1f} times as fast as the fastest other way (wanted: at least 1)", least >= 1),
        Claim(text, memory is not None and memory <= WANTED_BYTES),
    ]
