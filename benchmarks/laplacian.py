"""The Laplacian of a network at many points: ``python -m benchmarks.laplacian``.

A network 64-256-256-256-1 in single precision, the Laplacian by its 64 inputs at 64 points at once. Each contestant is
held against the trace of ``jax.hessian`` in double precision before its time counts.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import curvature
from benchmarks.timing import Row, compare, console, table

try:
    import folx
except ImportError:
    folx = None

POINTS, INPUTS, WIDTH, LAYERS = 64, 64, 256, 3
TOLERANCE = 2e-5  # of the largest Laplacian
WANTED_OF_FOLX = 0.95  # not slower, with room for the clock
WANTED_OF_TRACE = 3.0  # on the tanh network; the trace takes about twice the products, which are most of the time
WANTED_OF_FLOOR = 1.3  # times the matrix products alone

OURS, FOLX, TRACE, FLOOR = "curvature.laplacian", "folx", "trace of jax.hessian", "matrix products alone"
FLOOR_NOTE = "The last row: the products of all directions with the two square weight matrices, and nothing else."

Params = dict[str, jax.Array]
Network = Callable[[jax.Array, Params], jax.Array]


def dense(activation: Callable[[jax.Array], jax.Array]) -> Network:
    """The network, written out layer by layer."""

    def network(x: jax.Array, params: Params) -> jax.Array:
        hidden = activation(x @ params["first"])
        for layer in range(LAYERS - 1):
            hidden = activation(hidden @ params["hidden"][layer] + params["bias"][layer])
        return hidden @ params["last"]

    return network


def scanned(x: jax.Array, params: Params) -> jax.Array:
    """The tanh network, with its hidden layers in a scan."""

    def layer(hidden: jax.Array, weights: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return jnp.tanh(hidden @ weights[0] + weights[1]), None

    return jax.lax.scan(layer, jnp.tanh(x @ params["first"]), (params["hidden"], params["bias"]))[0] @ params["last"]


def squared_relu(x: jax.Array, params: Params) -> jax.Array:
    """The square of a relu network, whose own Laplacian is zero."""
    return dense(jax.nn.relu)(x, params) ** 2


NETWORKS: dict[str, Network] = {
    "tanh": dense(jnp.tanh),
    "relu, squared": squared_relu,
    "softplus": dense(jax.nn.softplus),
    "gelu": dense(jax.nn.gelu),
    "tanh in a scan": scanned,
}


def problem() -> tuple[jax.Array, Params]:
    """Random points and parameters."""
    points, *keys = jax.random.split(jax.random.key(0), 5)
    shapes = {
        "first": (INPUTS, WIDTH),
        "hidden": (LAYERS - 1, WIDTH, WIDTH),
        "last": (WIDTH,),
        "bias": (LAYERS - 1, WIDTH),
    }
    scales = {"first": INPUTS, "hidden": WIDTH, "last": WIDTH, "bias": 100}
    params = {
        name: jax.random.normal(key, shape) / np.sqrt(scales[name])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return jax.random.normal(points, (POINTS, INPUTS)), params


def by_trace(network: Network) -> Network:
    """The Laplacian that nobody doubts."""
    return lambda x, params: jnp.trace(jax.hessian(network)(x, params))


def by_folx(network: Network) -> Network:
    """The Laplacian of the library folx."""
    assert folx is not None
    forward = folx.forward_laplacian
    return lambda x, params: forward(lambda x: network(x, params), 0)(x).laplacian


def matrix_products(points: jax.Array, params: Params) -> jax.Array:
    """What no way of pushing all first derivatives through the network can do without."""
    rows = jnp.ones((POINTS * INPUTS, 1)) * params["last"]
    for weights in params["hidden"]:
        rows = rows @ weights
    return rows


def check_agreement(network: Network, ways: Mapping[str, Callable[..., Any]], args: tuple[Any, ...]) -> float:
    """The largest error relative to the largest Laplacian; raises beyond the tolerance."""
    with jax.enable_x64(True):
        exact_args = jax.tree.map(lambda leaf: leaf.astype(np.float64), args)
        exact = np.asarray(jax.jit(jax.vmap(by_trace(network), (0, None)))(*exact_args))
    worst = 0.0
    for name, way in ways.items():
        error = float(np.max(np.abs(np.asarray(jax.jit(way)(*args)) - exact)) / np.max(np.abs(exact)))
        if not error <= TOLERANCE:
            raise AssertionError(f"{name} is off by {error:.1e}, more than {TOLERANCE:.0e}")
        worst = max(worst, error)
    return worst


def bench(screen: Console, name: str) -> dict[str, Row]:
    """Check and time all Laplacians of one network, and print the table."""
    network, args = NETWORKS[name], problem()
    makers: dict[str, Callable[[Network], Network]] = {OURS: curvature.laplacian, TRACE: by_trace}
    if folx is not None:
        makers[FOLX] = by_folx
    ways = {way: jax.vmap(make(network), (0, None)) for way, make in makers.items()}
    title = f"Laplacian, {name}"
    screen.print(f"{title}: measuring ...", style="dim")
    with screen.status(title) as status:
        error = check_agreement(network, ways, args)
        contestants = {way: (laplacian, args) for way, laplacian in {**ways, FLOOR: matrix_products}.items()}
        rows = compare(contestants, report=lambda line: status.update(f"{title}: {line}"))
    screen.print(table(title, rows.values(), rows[OURS], f"All are right to {error:.0e}. {FLOOR_NOTE}"))
    screen.print()
    return rows


def verdicts(results: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """The claims, each with what was measured of it."""
    claims = []
    for name, rows in results.items():
        if FOLX in rows:
            speedup = rows[FOLX].seconds / rows[OURS].seconds
            claim = f"{name}: {speedup:.2f} times as fast as folx (wanted: at least {WANTED_OF_FOLX})"
            claims.append((speedup >= WANTED_OF_FOLX, claim))
    tanh = results["tanh"]
    speedup = tanh[TRACE].seconds / tanh[OURS].seconds
    claim = f"tanh: {speedup:.2f} times as fast as the trace of the Hessian (wanted: at least {WANTED_OF_TRACE})"
    claims.append((speedup >= WANTED_OF_TRACE, claim))
    overhead = tanh[OURS].seconds / tanh[FLOOR].seconds
    claim = f"tanh: {overhead:.2f} times the matrix products alone (wanted: at most {WANTED_OF_FLOOR})"
    claims.append((overhead <= WANTED_OF_FLOOR, claim))
    return [f"{'holds' if holds else 'FAILS'}  {claim}" for holds, claim in claims]


def main() -> None:
    """Run it all."""
    screen = console()
    screen.print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; {POINTS} points, float32; medians.\n")
    if folx is None:
        screen.print("folx is not installed (pip install folx), so its rows are missing.\n")
    results = {name: bench(screen, name) for name in NETWORKS}
    screen.print("The claims, as measured in this run (other work on the machine moves them):")
    for line in verdicts(results):
        screen.print(line, soft_wrap=True)


if __name__ == "__main__":
    main()
