"""The Hessian and its diagonal of tanh networks without biases: what this library promises of them.

``curvature.hessian`` beats ``jax.hessian`` in time and memory, as it comes, when it finds the mean over examples by
itself, and also when it goes product by product; and its own choice of a chunk of these is never much worse than the
better of two fixed ones. ``curvature.mean_hessian`` is held against what no way of assembling the matrix from examples
avoids: one product of a matrix with a row for each example and a column for each parameter.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks import reading
from benchmarks.cases import Case, Choice, Claim, Contestant, Finding, Outcome, Race
from benchmarks.models import Model, Params, cross_entropy
from benchmarks.peers import jax_ways
from benchmarks.peers.operations import Array, Operations

PRODUCT = "the product G.T @ G alone"
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
WANTED_REGRET = 1.1  # time of the chunk of its own choice over that of the better fixed one
WANTED_MEAN_SPEEDUP = 8  # of mean_hessian over jax.hessian
WANTED_MEAN_MEMORY = 0.1  # of the temporaries of jax.hessian
WANTED_PRODUCTS = 3  # time of mean_hessian over that of the product alone


@dataclass(frozen=True)
class Network:
    """A network and what is wanted of its Hessian.

    Attributes:
        sizes: of its layers.
        examples: in the batch.
        speedup: wanted of ``curvature.hessian`` over ``jax.hessian``, either way; None where nothing is.
        memory: of the temporaries of ``jax.hessian``, wanted at most.
        mean: whether the promises of ``curvature.mean_hessian`` are for it.
        classifies: softmax cross-entropy rather than squares.
        bias: of each layer.
    """

    sizes: tuple[int, ...]
    examples: int
    speedup: float | None = None
    memory: float | None = None
    mean: bool = False
    classifies: bool = False
    bias: bool = False


NETWORKS = (
    Network((10, 20, 1), 512, speedup=1.3),
    Network((20, 48, 1), 256, mean=True),
    Network((20, 48, 1), 512, speedup=1.3),
    Network((30, 64, 1), 512, speedup=1.5, memory=0.25, mean=True),
    Network((64, 10), 1797, mean=True, classifies=True, bias=True),
    Network((64, 64, 10), 512, mean=True, classifies=True),
)


def model(network: Network) -> Model:
    """The mean squared error or cross-entropy of a tanh network with a linear output."""
    pairs = list(zip(network.sizes[:-1], network.sizes[1:], strict=True))

    def loss(ops: Operations, p: Params, x: Array, y: Array) -> Array:
        for i in range(len(pairs)):
            x = ops.einsum("bi,ij->bj", ops.tanh(x) if i else x, p[f"w{i}"])
            x = x + p[f"b{i}"] if network.bias else x
        return cross_entropy(ops, x, y) if network.classifies else ops.mean(ops.sum((x - y) ** 2, axis=-1))

    shapes: dict[str, tuple[int, ...]] = {}
    for i, pair in enumerate(pairs):
        shapes |= {f"w{i}": pair} | ({f"b{i}": pair[1:]} if network.bias else {})
    rng = np.random.default_rng(1)
    inputs, last = rng.normal(size=(network.examples, network.sizes[0])), network.sizes[-1]
    classes, values = np.eye(last)[np.arange(network.examples) % last], rng.normal(size=(network.examples, last))
    targets = classes if network.classifies else values
    return Model("mlp", f"tanh network {'-'.join(map(str, network.sizes))}", shapes, loss, (inputs, targets))


def cases(choice: Choice) -> Iterator[Case]:
    """The Hessians, in a full run, then the diagonals."""
    for network in () if choice.quick else NETWORKS:
        made = model(network)
        n = made.num_parameters
        yield Race(
            f"modes/hessian/network-{'-'.join(map(str, network.sizes))}/n={n}/batch={network.examples}",
            f"Hessian, {made.title}, {n:,} parameters, batch of {network.examples}",
            made.name,
            partial(contestants, made),
            partial(jax_ways.reference, made, "hessian"),
            TOLERANCE[choice.dtype],
            {"n": n, "batch": network.examples},
            budget=1.5,
            rounds=choice.rounds,
            claims=partial(claims, network),
        )
    yield from diagonals(choice)


def contestants(made: Model) -> Iterator[Contestant]:
    """JAX's and ours, the diagonal blocks of ours, and the product that cannot be spared."""
    yield from jax_ways.contestants(made, "hessian")
    loss, x, batch = jax_ways.problem(made)

    def blocks(x: Any, *batch: Any) -> Any:
        way = curvature.mean_hessian(lambda x, *example: loss(x, *(a[None] for a in example)), blocks="diagonal")
        return way(x, *batch)

    # Its answer is a part of the matrix only, so that it is shown beside the race, not in it.
    yield Contestant('curvature.mean_hessian, "diagonal"', "curvature", blocks, (x, *batch), floor=True)
    rows = jax.random.normal(jax.random.key(1), (len(batch[0]), made.num_parameters))
    yield Contestant(PRODUCT, "jax", lambda g: g.T @ g, (rows,), floor=True)


def claims(network: Network, outcome: Outcome) -> list[Claim]:
    """Each promise about one network, with what was measured of it."""
    ways = ("curvature.hessian", "curvature.hessian, by products")
    found = [_faster(outcome, way, network.speedup) for way in ways]
    found += [_smaller(outcome, way, network.memory) for way in ways]
    found.append(_chunk(outcome))
    if network.mean:
        found.append(_faster(outcome, "curvature.mean_hessian", WANTED_MEAN_SPEEDUP))
        found.append(_smaller(outcome, "curvature.mean_hessian", WANTED_MEAN_MEMORY))
        found.append(_near_product(outcome))
    return [claim for claim in found if claim is not None]


def _faster(outcome: Outcome, way: str, wanted: float | None) -> Claim | None:
    speedup = reading.share(outcome, "jax.hessian", way)
    if speedup is None or wanted is None:
        return None
    text = f"{way} is {speedup:.2f} times as fast as jax.hessian (wanted: at least {wanted})"
    return Claim(text, speedup >= wanted)


def _smaller(outcome: Outcome, way: str, wanted: float | None) -> Claim | None:
    rows = [outcome.row(name) for name in (way, "jax.hessian")]
    ours, theirs = (None if row is None else reading.number(row, "temporary_bytes") for row in rows)
    if ours is None or theirs is None or wanted is None:
        return None
    text = (
        f"{way} takes {ours / 2**20:.1f} MiB of temporaries, jax.hessian {theirs / 2**20:.0f} "
        f"(wanted: at most {wanted:g} of it)"
    )
    return Claim(text, ours <= wanted * theirs)


def _chunk(outcome: Outcome) -> Claim | None:
    fixed = [reading.seconds(outcome, f"curvature.hessian, {name}") for name in ("all at once", "chunks of 64")]
    own = reading.seconds(outcome, "curvature.hessian, by products")
    if own is None or None in fixed:
        return None
    regret = own / min(seconds for seconds in fixed if seconds is not None)
    text = f"by products takes {regret:.2f} times as long as the better of the fixed chunks"
    return Claim(f"{text} (wanted: at most {WANTED_REGRET})", regret <= WANTED_REGRET)


def _near_product(outcome: Outcome) -> Claim | None:
    ours = reading.seconds(outcome, "curvature.mean_hessian")
    floor = next((row for row in outcome.rows if row.name == PRODUCT), None)
    product = None if floor is None else reading.number(floor, "seconds")
    if ours is None or product is None:
        return None
    text = (
        f"curvature.mean_hessian takes {ours / product:.2f} times the product alone (wanted: at most {WANTED_PRODUCTS})"
    )
    return Claim(text, ours <= WANTED_PRODUCTS * product)


def findings(outcomes: reading.Outcomes) -> list[Finding]:
    """What the networks show."""
    races = reading.part(outcomes, "modes/hessian/network-")
    if not races:
        return []
    sentences = [
        f"{way} takes {reading.spread(reading.share(race, way, 'jax.hessian') for race in races.values())} as long as "
        "jax.hessian."
        for way in ("curvature.hessian", "curvature.hessian, by products", "curvature.mean_hessian")
    ]
    return [Finding("How much does knowing the examples save of a Hessian?", " ".join(sentences), list(races))]


# ---- the diagonal ----------------------------------------------------------------------------------------------------

SMALL, LARGE = Network((16, 32, 32, 1), 64), Network((64, 132, 86, 1), 64)  # 1,568 and 19,886 parameters
CHUNK = 64
WANTED_BYTES = 2**28  # of temporaries on the large network, where the matrix takes 1.6 GB
OURS = "curvature.hessian_diagonal"


def diagonals(choice: Choice) -> Iterator[Case]:
    """A small network, and one whose Hessian does not fit."""
    for name, network in () if choice.quick else {"small": SMALL, "large": LARGE}.items():
        made = model(network)
        n = made.num_parameters
        yield Race(
            f"modes/diagonal/{name}/n={n}",
            f"Diagonal of the Hessian, {made.title}, {n:,} parameters",
            made.name,
            partial(diagonal_contestants, made, small=network is SMALL),
            partial(diagonal_reference, made),
            1e-4,
            {"n": n, "batch": network.examples},
            budget=0.2 if choice.quick else 4.0,
            rounds=3,
            claims=diagonal_claims,
        )


def diagonal_contestants(made: Model, *, small: bool) -> Iterator[Contestant]:
    """Dense ways where they fit, products in chunks where they do not."""
    loss, x, batch = jax_ways.problem(made)
    flat_loss = made.flat_loss(jax_ways.operations.for_jax())
    flat = jnp.asarray(made.pack(made.params()), float)

    def products(flat: jax.Array, *batch: jax.Array) -> jax.Array:
        _, push = jax.linearize(lambda flat: jax.grad(flat_loss)(flat, *batch), flat)
        return jnp.diag(jax.vmap(push)(jnp.eye(flat.size)))

    def in_chunks(flat: jax.Array, *batch: jax.Array) -> jax.Array:
        _, push = jax.linearize(lambda flat: jax.grad(flat_loss)(flat, *batch), flat)
        entries = jnp.arange(flat.size)
        return jax.lax.map(lambda i: push(jnp.zeros_like(flat).at[i].set(1.0))[i], entries, batch_size=CHUNK)

    def ours(x: Any, *batch: jax.Array) -> Any:
        return curvature.hessian_diagonal(loss, x, *batch)

    yield Contestant(OURS, "curvature", ours, (x, *batch), read=jax_ways.flat_vector(made))
    yield Contestant(f"jax, products in chunks of {CHUNK}", "jax", in_chunks, (flat, *batch))
    if small:
        yield Contestant("jax, products with a dense identity", "jax", products, (flat, *batch))
        dense = jax.hessian(flat_loss)
        yield Contestant("diagonal of jax.hessian", "jax", lambda x, *b: jnp.diag(dense(x, *b)), (flat, *batch))


def diagonal_reference(made: Model) -> np.ndarray:
    """Products in chunks, in double precision."""
    with jax.enable_x64(True):
        loss = made.flat_loss(jax_ways.operations.for_jax())
        flat, batch = jnp.asarray(made.pack(made.params())), tuple(map(jnp.asarray, made.batch))
        _, push = jax.linearize(lambda flat: jax.grad(loss)(flat, *batch), flat)
        entry = jax.jit(lambda i: push(jnp.zeros_like(flat).at[i].set(1.0))[i])
        return np.asarray(jax.jit(lambda i: jax.lax.map(entry, i, batch_size=CHUNK))(jnp.arange(flat.size)))


def diagonal_claims(outcome: Outcome) -> list[Claim]:
    """As fast as any other way, in bounded memory."""
    ours = outcome.row(OURS)
    factors = [reading.share(outcome, row.name, OURS) for row in outcome.rows if row.name != OURS]
    least = min((factor for factor in factors if factor is not None), default=math.nan)
    memory = None if ours is None else reading.number(ours, "temporary_bytes")
    return [
        Claim(f"{least:.1f} times as fast as the fastest other way (wanted: at least 1)", least >= 1),
        Claim(
            f"{(memory or 0) / 2**20:.0f} MiB of temporaries (wanted: at most {WANTED_BYTES >> 20})",
            memory is not None and memory <= WANTED_BYTES,
        ),
    ]
