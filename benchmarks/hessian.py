"""The Hessian of a small network, and its products: ``python -m benchmarks.hessian``.

The loss is the mean square of a tanh network's error, single precision, 512 examples. Two claims stand or fall here:
``curvature.hessian`` beats ``jax.hessian`` in time and memory, as it comes, when it finds the mean over examples by
itself, and also when a mode is named and it goes product by product; and its own choice of a chunk of these is never
much worse than the better of two fixed ones.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import curvature
from benchmarks.timing import Contestant, Row, compare, console, share, table

BATCH = 512
NETWORKS = ((10, 20, 1), (20, 48, 1), (30, 64, 1))  # 220, 1,008 and 1,984 parameters: there are no biases
MODE: Any = "rev_over_rev"  # what "auto" takes where it finds no examples
PRODUCTWISE = "by products"  # in chunks of its own choice
WAYS: dict[str, dict[str, Any]] = {
    "auto": {},
    PRODUCTWISE: {"mode": MODE},
    "all at once": {"mode": MODE, "chunk_size": None},
    "chunks of 64": {"mode": MODE, "chunk_size": 64},
}

WANTED_SPEEDUPS = (1.3, 1.3, 1.5)  # over jax.hessian
WANTED_MEMORY = 0.25  # of the temporaries of jax.hessian, on the largest network
WANTED_REGRET = 1.1  # time of the chunk of its own choice over that of the better fixed one

PRODUCTS = 32  # in a row from one linearization
LINEARIZED = f"hvp linearized, 1 of {PRODUCTS}"
LINEARIZED_NOTE = f"The last row: one linearize_grad and {PRODUCTS} products with it, divided by {PRODUCTS}."

Params = list[dict[str, jax.Array]]


def loss(params: Params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Mean squared error of a tanh network with a linear output."""
    for layer in params[:-1]:
        inputs = jnp.tanh(inputs @ layer["weights"])
    return jnp.mean((inputs @ params[-1]["weights"] - targets) ** 2)


def problem(sizes: tuple[int, ...]) -> tuple[Params, jax.Array, jax.Array]:
    """Random parameters, inputs and targets: the arguments of ``loss``."""
    *keys, data = jax.random.split(jax.random.key(0), len(sizes))
    params = [
        {"weights": jax.random.normal(key, (rows, columns)) / np.sqrt(rows)}
        for key, rows, columns in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    inputs, targets = jax.random.split(data)
    return params, jax.random.normal(inputs, (BATCH, sizes[0])), jax.random.normal(targets, (BATCH, sizes[-1]))


def num_parameters(params: Any) -> int:
    """The number of entries of all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def product_contestants(loss: Callable[..., Any], params: Any, *data: jax.Array) -> dict[str, Contestant]:
    """The gradient, ``hvp`` in each composition of modes, and ``PRODUCTS`` products from one linearization."""
    v = jax.tree.map(jnp.ones_like, params)
    many_v = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (PRODUCTS, *leaf.shape)), v)

    def many_products(params: Any, many_v: Any, *data: jax.Array) -> Any:
        _, _, hvp_fn = curvature.linearize_grad(loss, params, *data)
        return jax.lax.map(hvp_fn, many_v)

    contestants: dict[str, Contestant] = {"gradient": (jax.grad(loss), (params, *data))}
    for mode in ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd"):
        contestants[f"hvp {mode}"] = (functools.partial(curvature.hvp, loss, mode=mode), (params, v, *data))
    return {**contestants, LINEARIZED: (many_products, (params, many_v, *data))}


def check_agreement(
    hessians: Mapping[str, Callable[..., Any]], args: tuple[Any, ...], tolerance: float = 1e-5
) -> float:
    """The largest error relative to the largest entry of ``jax.hessian``; raises beyond ``tolerance``."""

    def entries(hessian: Callable[..., Any]) -> np.ndarray:
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.jit(hessian)(*args))])

    expected = entries(jax.hessian(loss))
    worst = 0.0
    for name, hessian in hessians.items():
        error = float(np.max(np.abs(entries(hessian) - expected)) / np.max(np.abs(expected)))
        if not error <= tolerance:
            raise AssertionError(f"{name} differs from jax.hessian by {error:.1e}, more than {tolerance:.0e}")
        worst = max(worst, error)
    return worst


def bench_hessians(screen: Console, sizes: tuple[int, ...]) -> dict[str, Row]:
    """Check and time all Hessians of one network, and print the table."""
    args = problem(sizes)
    ours = {name: curvature.hessian(loss, **options) for name, options in WAYS.items()}
    title = f"Hessian, {num_parameters(args[0]):,} parameters ({'-'.join(map(str, sizes))})"
    screen.print(f"{title}: measuring ...", style="dim")
    with screen.status(f"{title}: checking") as status:
        error = check_agreement(ours, args)
        ways = {"jax.hessian": jax.hessian(loss), **ours}
        contestants = {name: (way, args) for name, way in ways.items()}
        rows = compare(contestants, report=lambda line: status.update(f"{title}: {line}"))
    twins = [name for name in list(WAYS)[2:] if rows[name].program == rows[PRODUCTWISE].program]
    caption = f"All agree with jax.hessian to {error:.0e}." + "".join(f" {PRODUCTWISE} is {name}." for name in twins)
    screen.print(table(title, rows.values(), rows["jax.hessian"], caption))
    screen.print()
    return rows


def bench_products(screen: Console, sizes: tuple[int, ...]) -> None:
    """Time Hessian-vector products against one gradient, and print the table."""
    params, *data = problem(sizes)
    title = f"Hessian-vector products, {num_parameters(params):,} parameters"
    screen.print(f"{title}: measuring ...", style="dim")
    with screen.status(title) as status:
        contestants = product_contestants(loss, params, *data)
        rows = compare(contestants, report=lambda line: status.update(f"{title}: {line}"))
    rows[LINEARIZED] = share(rows[LINEARIZED], PRODUCTS)
    screen.print(table(title, rows.values(), rows["gradient"], LINEARIZED_NOTE))
    screen.print()


def verdicts(results: Mapping[int, Mapping[str, Row]]) -> list[str]:
    """The claims, each with what was measured of it."""
    claims = []
    for size, wanted in zip(sorted(results), WANTED_SPEEDUPS, strict=True):
        for way in ("auto", PRODUCTWISE):
            speedup = results[size]["jax.hessian"].seconds / results[size][way].seconds
            claim = f"{size:,} parameters: {way} is {speedup:.2f} times as fast as jax.hessian"
            claims.append((speedup >= wanted, f"{claim} (wanted: at least {wanted})"))

    largest = results[max(results)]
    for way in ("auto", PRODUCTWISE):
        ours, theirs = ((largest[name].temporary_bytes or 0) / 2**20 for name in (way, "jax.hessian"))
        claim = f"{max(results):,} parameters: {way} takes {ours:.0f} MiB of temporaries, jax.hessian {theirs:.0f}"
        claims.append((ours <= WANTED_MEMORY * theirs, f"{claim} (wanted: at most a quarter)"))

    for size, rows in results.items():
        regret = rows[PRODUCTWISE].seconds / min(rows[name].seconds for name in list(WAYS)[2:])
        claim = f"{size:,} parameters: {PRODUCTWISE} takes {regret:.2f} times as long as the better of the fixed chunks"
        claims.append((regret <= WANTED_REGRET, f"{claim} (wanted: at most {WANTED_REGRET})"))
    return [f"{'holds' if holds else 'FAILS'}  {claim}" for holds, claim in claims]


def main() -> None:
    """Run it all."""
    screen = console()
    screen.print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; batch {BATCH}, float32; medians.\n")
    results = {num_parameters(problem(sizes)[0]): bench_hessians(screen, sizes) for sizes in NETWORKS}
    bench_products(screen, NETWORKS[-1])
    screen.print("The claims, as measured in this run (other work on the machine moves them):")
    for line in verdicts(results):
        screen.print(line, soft_wrap=True)


if __name__ == "__main__":
    main()
