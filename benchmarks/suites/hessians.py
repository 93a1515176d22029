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
from benchmarks.reading import at_most, number, seconds, share

PRODUCT = "the product G.T @ G alone"  # which no way of assembling the matrix from examples avoids
WAYS = ("curvature.hessian", "curvature.hessian, by products")
CHUNKED = 1.1  # time of the chunk that ours chooses over that of the better fixed one
MEAN_SPEEDUP, MEAN_MEMORY, MEAN_PRODUCTS = 8, 0.1, 3  # over jax.hessian; of its temporaries; times the product alone
# Sizes, examples, the speedup over jax.hessian and the part of its temporaries wanted of ``WAYS``; whether the promises
# of ``mean_hessian`` are for it; and how the network is made.
NETWORKS: tuple[tuple[tuple[int, ...], int, float | None, float | None, bool, dict[str, bool]], ...] = (
    ((10, 20, 1), 512, 1.3, None, False, {}),
    ((20, 48, 1), 256, None, None, True, {}),
    ((20, 48, 1), 512, 1.3, None, False, {}),
    ((30, 64, 1), 512, 1.5, 0.25, True, {}),
    ((64, 10), 1797, None, None, True, {"classifies": True, "bias": True}),
    ((64, 64, 10), 512, None, None, True, {"classifies": True}),
)


def networks(choice: Choice) -> Iterator[Race]:
    for sizes, examples, speedup, memory, mean, how in () if choice.quick else NETWORKS:
        made = tanh_network(sizes, examples, **how)
        n, name = made.num_parameters, f"network-{'-'.join(map(str, sizes))}"
        yield Race(
            f"modes/hessian/{name}/n={n}/batch={examples}",
            f"Hessian, {made.title}, {n:,} parameters, batch of {examples}", made.name, partial(network_ways, made),
            partial(jax_ways.reference, made, "hessian"), choice.tolerance(1e-5), {"n": n, "batch": examples},
            claims=partial(network_claims, speedup, memory, mean), **choice.effort(full=1.5),
        )  # fmt: skip


def network_ways(made: Model) -> Iterator[Contestant]:
    """JAX's and ours, the diagonal blocks of ours, and the product that cannot be avoided."""
    yield from jax_ways.contestants(made, "hessian")
    loss, x, batch = jax_ways.problem(made)
    # Its answer is a part of the matrix only, so that it is shown beside the race, not in it.
    blocks = curvature.mean_hessian(jax_ways.of_one(loss), blocks="diagonal")
    yield Contestant('curvature.mean_hessian, "diagonal"', "curvature", blocks, (x, *batch), floor=True)
    rows = jax.random.normal(jax.random.key(1), (len(batch[0]), made.num_parameters))
    yield Contestant(PRODUCT, "jax", lambda g: g.T @ g, (rows,), floor=True)


def network_claims(speedup: float | None, memory: float | None, mean: bool, outcome: Outcome) -> list[Claim]:
    wanted = [(way, speedup, memory) for way in WAYS]
    wanted += [("curvature.mean_hessian", MEAN_SPEEDUP, MEAN_MEMORY)] if mean else []
    found = []
    for way, faster, smaller in wanted:
        found += at_most(outcome, way, "jax.hessian", 1 / faster) if faster else []
        found += at_most(outcome, way, "jax.hessian", smaller, "temporary_bytes") if smaller else []
    fixed = [seconds(outcome, f"curvature.hessian, {name}") for name in ("all at once", "chunks of 64")]
    own = seconds(outcome, WAYS[1])
    if own is not None and None not in fixed:
        factor = own / min(time for time in fixed if time is not None)
        text = f"by products takes {factor:.2f} times as long as the better of the fixed chunks"
        found.append(Claim(f"{text} (wanted: at most {CHUNKED})", factor <= CHUNKED))
    return found + (at_most(outcome, "curvature.mean_hessian", PRODUCT, MEAN_PRODUCTS) if mean else [])


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


def diagonal_ways(made: Model, *, small: bool) -> Iterator[Contestant]:
    loss, x, batch = jax_ways.problem(made)
    flat_loss = made.flat_loss(operations.for_jax())
    flat = jnp.asarray(made.pack(made.params()), float)

    def ours(x: Any, *batch: jax.Array) -> Any:
        return curvature.hessian_diagonal(loss, x, *batch)

    def products(flat: jax.Array, *batch: jax.Array) -> jax.Array:
        push = jax.linearize(lambda flat: jax.grad(flat_loss)(flat, *batch), flat)[1]
        return jnp.diag(jax.vmap(push)(jnp.eye(flat.size)))

    dense = jax.hessian(flat_loss)
    ways = {f"jax, products in chunks of {CHUNK}": partial(in_chunks, flat_loss)}
    if small:
        ways["jax, products with a dense identity"] = products
        ways["diagonal of jax.hessian"] = lambda x, *b: jnp.diag(dense(x, *b))
    yield Contestant(DIAGONAL, "curvature", ours, (x, *batch), read=made.pack)
    yield from jax_ways.named(ways, (flat, *batch))


def in_chunks(loss: Any, flat: jax.Array, *batch: jax.Array) -> jax.Array:
    push = jax.linearize(lambda flat: jax.grad(loss)(flat, *batch), flat)[1]
    entries = jnp.arange(flat.size)
    return jax.lax.map(lambda i: push(jnp.zeros_like(flat).at[i].set(1.0))[i], entries, batch_size=CHUNK)


def diagonal_reference(made: Model) -> np.ndarray:
    with jax.enable_x64(True):
        flat, batch = jnp.asarray(made.pack(made.params())), tuple(map(jnp.asarray, made.batch))
        return np.asarray(jax.jit(partial(in_chunks, made.flat_loss(operations.for_jax())))(flat, *batch))


def diagonal_claims(outcome: Outcome) -> list[Claim]:
    names = [row.name for row in outcome.rows if row.name != DIAGONAL]
    factors = [factor for name in names if (factor := share(outcome, name, DIAGONAL)) is not None]
    least, memory = min(factors, default=math.nan), number(outcome.row(DIAGONAL), "temporary_bytes")
    text = f"{(memory or 0) / 2**20:.0f} MiB of temporaries (wanted: at most {WANTED_BYTES >> 20})"
    return [
        Claim(f"{least:.1f} times as fast as the fastest other way (wanted: at least 1)", least >= 1),
        Claim(text, memory is not None and memory <= WANTED_BYTES),
    ]
