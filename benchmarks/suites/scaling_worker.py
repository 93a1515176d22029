"""One count of devices, in a process of its own: ``python -m benchmarks.suites.scaling_worker hvp 4`` prints JSON.

On a CPU it wants ``XLA_FLAGS=--xla_force_host_platform_device_count=4``.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvature
from benchmarks.models import cross_entropy, mlp
from benchmarks.peers import jax_ways, operations
from benchmarks.runner import arrays, distance
from benchmarks.suites.per_example import by_vmap
from benchmarks.timing import measure

EXAMPLES = 2048  # of the fixed batch, and on each device of the one that grows
LANES, SIZE = 512, 6  # the same for the many problems
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}
ROUNDS, BUDGET = 5, 0.5


class Work(NamedTuple):
    """A function of something on every device and of something spread; ``mapped`` works on each part alone."""

    name: str
    peer: str
    function: Callable[..., Any]
    whole: Any
    spread: tuple[Any, ...]
    mapped: bool = False


def of_network(name: str, examples: int) -> Iterator[Work]:
    """Work on an MLP: ours, and JAX's where it has the like."""
    made = mlp((64, 128, 10), examples)
    loss, params, batch = jax_ways.problem(made)
    v, of_one = jax.tree.map(jnp.ones_like, params), jax_ways.of_one(loss)
    ops, outputs = operations.for_jax(), made.outputs
    assert outputs is not None

    def gauss_newton(whole: Any, *batch: Any) -> Any:
        op = curvature.GaussNewtonOperator(
            lambda p, x, y: outputs(ops, p, x), lambda z, x, y: cross_entropy(ops, z, y), whole[0], *batch
        )
        return op.mv(whole[1])

    ours, theirs = curvature.clipped_grad(of_one, 1.0), by_vmap(of_one, 1.0)["clipped mean"]
    ways: dict[str, dict[str, Callable[..., Any]]] = {
        "hvp": {
            "curvature.hvp": lambda whole, *batch: curvature.hvp(loss, *whole, *batch),
            "jax, forward over reverse": lambda whole, *batch: jax_ways.forward_over_reverse(loss, *whole, *batch),
        },
        "gauss-newton": {"curvature.GaussNewtonOperator": gauss_newton},
        "clipped-grad": {
            "curvature.clipped_grad": lambda whole, *batch: ours(whole[0], *batch)[0],
            "jax.vmap of jax.grad": lambda whole, *batch: theirs(whole[0], *batch)[0],
        },
    }
    for title, way in ways[name].items():
        yield Work(title, "curvature" if title.startswith("curvature") else "jax", way, (params, v), batch)


def batched(lanes: int) -> Iterator[Work]:
    """A solve in each lane; each device loops until its own lanes are done.

    By a method without eigendecompositions: batches of those on several virtual devices can wait for each other's
    threads forever, as of JAX 0.10.
    """

    def rosenbrock(x: Any) -> Any:
        return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)

    def solve(whole: Any, x0: Any) -> Any:
        return jax.vmap(lambda x: curvature.minimize(rosenbrock, x, method="bfgs").x)(x0)

    x0 = 1 + np.random.default_rng(0).uniform(-1, 1, (lanes, SIZE))
    yield Work("curvature.minimize, vmap", "curvature", solve, (), (jnp.asarray(x0, float),), mapped=True)


def spread_over(devices: list[Any], work: Work) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    whole, parts = PartitionSpec(), PartitionSpec("data")
    everywhere, split = NamedSharding(mesh, whole), NamedSharding(mesh, parts)
    function = work.function
    if work.mapped:
        function = jax.shard_map(function, mesh=mesh, in_specs=(whole, parts), out_specs=parts)
    return function, jax.device_put(work.whole, everywhere), tuple(jax.device_put(a, split) for a in work.spread)


def tolerance(work: Work) -> float:
    """Of the answer; a solve ends by its gradient, far from the last digit of its solution."""
    return TOLERANCE[str(jnp.zeros(()).dtype)] * (100 if work.mapped else 1)


def measure_work(name: str, count: int) -> list[dict[str, Any]]:
    lanes = name == "minimize-batched"
    devices, size = jax.devices()[:count], LANES if lanes else EXAMPLES
    calls, entries = {}, {}
    for kind, examples in {"strong": size, "weak": size * count}.items():
        for work in batched(examples) if lanes else of_network(name, examples):
            function, whole, spread = spread_over(devices, work)
            compiled = jax.jit(function).lower(whole, *spread).compile()
            expected = jax.jit(work.function)(work.whole, *work.spread)
            errors = map(distance, arrays(compiled(whole, *spread)), arrays(expected))
            key = f"{work.name}, {kind}"
            calls[key] = lambda compiled=compiled, whole=whole, spread=spread: compiled(whole, *spread)
            entries[key] = {
                "name": work.name, "peer": work.peer, "kind": kind, "devices": count, "examples": examples,
                "temporary_bytes": getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
                "all_reduces": len(re.findall(r" all-reduce(?:-start)?\(", compiled.as_text())),
                "error": max(errors), "tolerance": tolerance(work),
            }  # fmt: skip
    rows = measure(calls, budget=BUDGET, rounds=ROUNDS)
    return [entry | {"seconds": rows[key].seconds} for key, entry in entries.items()]


if __name__ == "__main__":
    work, count = sys.argv[1], int(sys.argv[2])
    print(json.dumps(measure_work(work, count) if len(jax.devices()) >= count else None))
