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
from benchmarks.models import mlp
from benchmarks.peers import jax_ways
from benchmarks.runner import arrays, distance
from benchmarks.timing import measure

EXAMPLES = 2048  # of the fixed batch, and on each device of the one that grows
LANES, SIZE = 512, 6  # likewise, of the many problems
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


def network(examples: int) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """The loss of an MLP, its parameters and a batch."""
    return jax_ways.problem(mlp((64, 128, 10), examples))


def hvp(examples: int) -> Iterator[Work]:
    """Ours and JAX's."""
    loss, params, batch = network(examples)
    v = jax.tree.map(jnp.ones_like, params)

    def ours(whole: Any, *batch: Any) -> Any:
        return curvature.hvp(loss, *whole, *batch)

    def theirs(whole: Any, *batch: Any) -> Any:
        return jax.jvp(lambda p: jax.grad(loss)(p, *batch), whole[:1], whole[1:])[1]

    yield Work("curvature.hvp", "curvature", ours, (params, v), batch)
    yield Work("jax, forward over reverse", "jax", theirs, (params, v), batch)


def gauss_newton(examples: int) -> Iterator[Work]:
    """The product of the operator."""
    _, params, batch = network(examples)

    def model(p: Any, x: Any, y: Any) -> Any:
        return jnp.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]

    def loss(logits: Any, x: Any, y: Any) -> Any:
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - jnp.sum(logits * y, axis=-1))

    def product(whole: Any, *batch: Any) -> Any:
        return curvature.GaussNewtonOperator(model, loss, whole, *batch).mv(jax.tree.map(jnp.ones_like, whole))

    yield Work("curvature.GaussNewtonOperator", "curvature", product, params, batch)


def clipped_grad(examples: int) -> Iterator[Work]:
    """Ours, and the mean of what ``vmap`` of ``grad`` gives."""
    loss, params, batch = network(examples)

    def of_one(p: Any, x: Any, y: Any) -> Any:
        return loss(p, x[None], y[None])

    def theirs(p: Any, *batch: Any) -> Any:
        grads = jax.vmap(jax.grad(of_one), (None, 0, 0))(p, *batch)
        squares = sum(jnp.sum(g**2, axis=tuple(range(1, g.ndim))) for g in jax.tree.leaves(grads))
        scale = jnp.minimum(1.0, 1.0 / jnp.sqrt(squares))
        return jax.tree.map(lambda g: jnp.tensordot(scale, g, 1) / len(scale), grads)

    ours = curvature.clipped_grad(of_one, 1.0)
    yield Work("curvature.clipped_grad", "curvature", lambda p, *batch: ours(p, *batch)[0], params, batch)
    yield Work("jax.vmap of jax.grad", "jax", theirs, params, batch)


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


WORK = {"hvp": hvp, "gauss-newton": gauss_newton, "clipped-grad": clipped_grad, "minimize-batched": batched}


def spread_over(devices: list[Any], work: Work) -> tuple[Callable[..., Any], Any, tuple[Any, ...]]:
    """The function, and its arguments put where they belong."""
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
    """Strong and weak, every contestant, in turns."""
    devices, size = jax.devices()[:count], LANES if name == "minimize-batched" else EXAMPLES
    calls, entries = {}, {}
    for kind, examples in {"strong": size, "weak": size * count}.items():
        for work in WORK[name](examples):
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
