"""The Hessian of a mean over examples: ``python -m benchmarks.mean_hessian``.

Three tanh networks without biases and softmax regression, single precision. ``curvature.mean_hessian`` is held against
``jax.hessian``, and against what no way of assembling the matrix from examples avoids: one product ``G.T @ G`` of a
matrix with a row for each example and a column for each parameter.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import curvature
from benchmarks.hessian import num_parameters
from benchmarks.timing import Row, compare, console, table

JAX, HESSIAN, OURS, DIAGONAL = "jax.hessian", "curvature.hessian", "mean_hessian", 'mean_hessian, "diagonal"'
PRODUCT = "the product G.T @ G alone"

TOLERANCE = 1e-5  # relative to the largest entry of jax.hessian
WANTED_SPEEDUP = 8  # over jax.hessian
WANTED_MEMORY = 0.1  # of the temporaries of jax.hessian
WANTED_PRODUCTS = 3  # time over that of the product alone

Params = list[dict[str, jax.Array]]
Loss = Callable[[Params, jax.Array, jax.Array], jax.Array]


def outputs(params: Params, inputs: jax.Array) -> jax.Array:
    """A tanh network with a linear output; layers may have a bias."""
    for number, layer in enumerate(params):
        inputs = (jnp.tanh(inputs) if number else inputs) @ layer["weights"]
        inputs = inputs + layer["bias"] if "bias" in layer else inputs
    return inputs


def squared_error(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """The loss of one example in regression."""
    return jnp.sum((outputs(params, inputs) - targets) ** 2)


def cross_entropy(params: Params, inputs: jax.Array, label: jax.Array) -> jax.Array:
    """The loss of one example in classification."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(outputs(params, inputs), label)


class Case(NamedTuple):
    """A network, its data and its loss."""

    sizes: tuple[int, ...]
    examples: int
    loss: Loss
    bias: bool = False

    @property
    def name(self) -> str:
        """What it is called."""
        return "-".join(map(str, self.sizes))


CASES = (
    Case((20, 48, 1), 256, squared_error),
    Case((30, 64, 1), 512, squared_error),
    Case((64, 10), 1797, cross_entropy, bias=True),
    Case((64, 64, 10), 512, cross_entropy),
)


def problem(case: Case) -> tuple[Params, jax.Array, jax.Array]:
    """Random parameters, inputs and targets."""
    *keys, a, b = jax.random.split(jax.random.key(0), len(case.sizes) + 1)
    params = [
        {"weights": jax.random.normal(key, (rows, columns)) / np.sqrt(rows)}
        | ({"bias": jnp.zeros(columns)} if case.bias else {})
        for key, rows, columns in zip(keys, case.sizes[:-1], case.sizes[1:], strict=True)
    ]
    inputs, last = jax.random.normal(a, (case.examples, case.sizes[0])), case.sizes[-1]
    if case.loss is cross_entropy:
        return params, inputs, jax.random.randint(b, (case.examples,), 0, last)
    return params, inputs, jax.random.normal(b, (case.examples, last))


def ways(loss: Loss) -> dict[str, Callable[..., Any]]:
    """The contestants that return a Hessian."""

    def mean(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, inputs, targets))

    return {
        JAX: jax.hessian(mean),
        HESSIAN: curvature.hessian(mean),
        OURS: curvature.mean_hessian(loss),
        DIAGONAL: curvature.mean_hessian(loss, blocks="diagonal"),
    }


def check_agreement(hessians: Mapping[str, Callable[..., Any]], args: tuple[Any, ...]) -> float:
    """The largest error relative to the largest entry of ``jax.hessian``; raises beyond ``TOLERANCE``."""
    found = {name: jax.tree.leaves(jax.jit(hessian)(*args)) for name, hessian in hessians.items()}
    expected = found.pop(JAX)
    largest, worst = max(float(jnp.max(jnp.abs(block))) for block in expected), 0.0
    step = len(jax.tree.leaves(args[0])) + 1  # from one diagonal block to the next, counted along rows of blocks
    for name, blocks in found.items():
        wanted = expected[::step] if name == DIAGONAL else expected
        pairs = zip(blocks, wanted, strict=True)
        error = max(float(jnp.max(jnp.abs(block - want))) for block, want in pairs) / largest
        if not error <= TOLERANCE:
            raise AssertionError(f"{name} differs from jax.hessian by {error:.1e}, more than {TOLERANCE:.0e}")
        worst = max(worst, error)
    return worst


def bench(screen: Console, case: Case) -> dict[str, Row]:
    """Check and time all Hessians of one network, and print the table."""
    args, hessians = problem(case), ways(case.loss)
    size = num_parameters(args[0])
    title = f"Hessian of a mean, {case.name}, {size:,} parameters, {case.examples:,} examples"
    with screen.status(f"{title}: checking") as status:
        error = check_agreement(hessians, args)
        matrix = jax.random.normal(jax.random.key(1), (case.examples, size))
        contestants = {name: (way, args) for name, way in hessians.items()} | {PRODUCT: (lambda g: g.T @ g, (matrix,))}
        rows = compare(contestants, budget=0.4, rounds=2, report=lambda line: status.update(f"{title}: {line}"))
    screen.print(table(title, rows.values(), rows[PRODUCT], f"All agree with jax.hessian to {error:.0e}."))
    screen.print()
    return rows


def verdicts(name: str, rows: Mapping[str, Row]) -> list[str]:
    """Each claim about one network, with what was measured of it."""
    ours, theirs = rows[OURS], rows[JAX]
    speedup, products = theirs.seconds / ours.seconds, ours.seconds / rows[PRODUCT].seconds
    mebibytes, limit = ((row.temporary_bytes or 0) / 2**20 for row in (ours, theirs))
    claims = [
        (speedup >= WANTED_SPEEDUP, f"{speedup:.1f} times as fast as jax.hessian (wanted: at least {WANTED_SPEEDUP})"),
        (
            mebibytes <= WANTED_MEMORY * limit,
            f"{mebibytes:.1f} MiB of temporaries, jax.hessian {limit:.0f} (wanted: at most {WANTED_MEMORY:g} of it)",
        ),
        (products <= WANTED_PRODUCTS, f"{products:.2f} times the product alone (wanted: at most {WANTED_PRODUCTS})"),
    ]
    return [f"{'holds' if holds else 'FAILS'}  {name}: {claim}" for holds, claim in claims]


def main() -> None:
    """Run it all."""
    screen = console()
    screen.print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; float32; medians.\n")
    results = {case.name: bench(screen, case) for case in CASES}
    screen.print("The claims, as measured in this run (other work on the machine moves them):")
    for name, rows in results.items():
        for line in verdicts(name, rows):
            screen.print(line, soft_wrap=True)


if __name__ == "__main__":
    main()
