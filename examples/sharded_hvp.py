"""Curvature on many devices: the same operators, one all-reduce for each product.

Run it with ``python -m examples.sharded_hvp``. It needs rich and takes less than a minute. On a machine with a single
device it starts itself anew with eight virtual ones, which share the processor: they show what happens, not how fast.

The examples of a batch are spread over the devices, the parameters stand on each. A product with a Hessian or a
Gauss-Newton matrix is then a mean of products that the devices take by themselves, and all that they have to tell each
other is one vector of the size of the parameters: an all-reduce. The program that XLA compiled is read to count them.
"""

import math
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.box
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from rich.console import Console
from rich.table import Table

import curvature
from benchmarks import timing

NUM_DEVICES = 8  # virtual ones, where there is only one
EXAMPLES = 2048
CHUNK_SIZE = 100  # which does not divide what a device holds: the last slice is smaller
DAMPING = 0.01

Params = dict[str, jax.Array]
Batch = tuple[Any, Any]
Operator = curvature.LinearOperator


# ---- the problem -----------------------------------------------------------------------------------------------------


def model(params: Params, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """A network with two hidden layers; it returns the logits of fourteen classes."""
    hidden = jnp.tanh(inputs @ params["first"] + params["bias"])
    return jnp.tanh(hidden @ params["second"]) @ params["third"]


def cross_entropy(logits: jax.Array, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over the batch."""
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def loss(params: Params, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """What the Hessian is of."""
    return cross_entropy(model(params, inputs, labels), inputs, labels)


def start() -> Params:
    """Random weights."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"first": (16, 32), "bias": (32,), "second": (32, 48), "third": (48, 14)}
    return {
        name: jax.random.normal(key, shape) / math.sqrt(shape[0])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def load() -> Batch:
    """Random data, the same in every process."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(EXAMPLES, 16)).astype(np.float32), rng.integers(0, 14, EXAMPLES)


def layout() -> NamedSharding:
    """Examples spread evenly over all devices of all processes."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


OPERATORS: dict[str, Callable[..., Operator]] = {
    "Hessian": lambda *given, **options: curvature.HessianOperator(loss, *given, **options),
    "Gauss-Newton": lambda *given, **options: curvature.GaussNewtonOperator(model, cross_entropy, *given, **options),
    "empirical Fisher": lambda *given, **options: curvature.FisherOperator(
        model, cross_entropy, *given, kind="empirical", **options
    ),
}


def product(op: Operator, v: Params) -> Params:
    """What is compiled; an operator is an argument like any other."""
    return op @ v


def solve(op: Operator, b: Params) -> tuple[Params, curvature.types.SolveInfo]:
    """``(A + c I) x = b`` by conjugate gradients, all in one program."""
    return curvature.cg(op + curvature.damping(DAMPING), b, rtol=1e-4)


def apart(got: Params, want: Params) -> float:
    """The largest difference of two trees, relative to the largest entry."""
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    return max(np.abs(np.asarray(a) - np.asarray(b)).max() for a, b in pairs) / max(
        np.abs(np.asarray(b)).max() for _, b in pairs
    )


# ---- what the devices tell each other --------------------------------------------------------------------------------


def collectives(program: Any) -> list[tuple[str, int, bool]]:
    """Each operation between devices in a compiled program, how many numbers it moves, and if it stands in a loop."""
    found, in_loop = [], False
    for line in program.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):  # a computation starts; the entry calls the others
            in_loop = not line.startswith("ENTRY")
        match = re.search(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute)(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            size = sum(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
            found.append((match[2], size, in_loop))
    return found


def in_words(program: Any) -> str:
    """The same, to be read."""
    return ", ".join(f"1 {kind} of {size:,} numbers" for kind, size, _ in collectives(program)) or "nothing"


# ---- one process, many devices ---------------------------------------------------------------------------------------


def show_products(screen: Console, params: Params, v: Params, batch: Batch, sharding: NamedSharding) -> None:
    """A table: each matrix, each way to hold the data."""
    table = Table(box=rich.box.SIMPLE_HEAD)
    for column in ("matrix", "data", "apart from one device", "devices tell each other"):
        table.add_column(column, justify="right" if column.startswith("apart") else "left")
    ways = {
        "whole": {},
        "whole, sharding=": {"sharding": sharding},
        f"in slices of {CHUNK_SIZE}": {"chunk_size": CHUNK_SIZE},
    }
    spread = jax.device_put(batch, sharding)
    for name, operator in OPERATORS.items():
        want = jax.jit(product)(operator(params, *batch), v)
        for way, options in ways.items():
            if name != "Hessian" and "sharding" in options:
                continue  # the same as without
            op = operator(params, *spread, **options)
            program = jax.jit(product).lower(op, v).compile()
            table.add_row(name, way, f"{apart(program(op, v), want):.0e}", in_words(program))
    screen.print(table)
    screen.print(
        "Whole data is left to the compiler. In a Hessian, a weight acts in two ways, and the compiler sums them over "
        "devices one by one; with sharding= each device adds them up first. Slices of sharded data do so anyway: left "
        "to the compiler, every device would fetch all examples.\n"
    )


def show_solve(screen: Console, params: Params, b: Params, batch: Batch, sharding: NamedSharding) -> None:
    """Conjugate gradients, to which nobody said where the data is."""
    operator = OPERATORS["Gauss-Newton"]
    want, _ = jax.jit(solve)(operator(params, *batch), b)
    op = operator(params, *jax.device_put(batch, sharding))
    program = jax.jit(solve).lower(op, b).compile()
    x, info = program(op, b)
    moved = {f"{kind} of {size:,} numbers" for kind, size, in_loop in collectives(program) if in_loop}
    screen.print(
        f"Conjugate gradients with the sharded Gauss-Newton matrix and damping {DAMPING}: "
        f"{curvature.Status(int(info.status)).name} in {info.num_steps} steps, "
        f"{apart(x, want):.0e} apart from one device. A step costs 1 {' and 1 '.join(sorted(moved))}.\n"
    )


def show_pmap(screen: Console, params: Params, v: Params, batch: Batch) -> None:
    """Each device takes the product over its own examples, as a program of its own."""
    count = jax.local_device_count()
    parts = jax.tree.map(lambda leaf: leaf.reshape(count, -1, *leaf.shape[1:]), batch)
    products = jax.pmap(lambda *part: curvature.hvp(loss, params, v, *part))(*parts)
    mean = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), products)
    want = jax.jit(curvature.hvp, static_argnums=0)(loss, params, v, *batch)
    screen.print(
        f"jax.pmap(curvature.hvp): {count} products, each over {EXAMPLES // count} examples; "
        f"their mean is {apart(mean, want):.0e} apart from the whole.\n"
    )


# ---- two processes, as on two machines -------------------------------------------------------------------------------


def work(process: int, port: int) -> None:
    """One of two processes, which holds half of the examples; prints what it found."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process, initialization_timeout=60)
    params, sharding, half = start(), layout(), EXAMPLES // 2
    v, batch = jax.tree.map(jnp.cos, params), load()
    mine = [leaf[process * half :][:half] for leaf in batch]
    spread = [jax.make_array_from_process_local_data(sharding, leaf) for leaf in mine]
    operator = OPERATORS["Hessian"]
    op = operator(params, *spread, chunk_size=CHUNK_SIZE)
    program = jax.jit(product).lower(op, v).compile()
    difference = apart(program(op, v), jax.jit(product)(operator(params, *batch), v))
    print(
        f"Process {process} of 2 holds {half} examples: its Hessian product is {difference:.0e} apart from one "
        f"process with all {EXAMPLES}, by {in_words(program)}."
    )
    jax.distributed.shutdown()


def show_processes(screen: Console) -> None:
    """Start both, and print what they say."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "examples.sharded_hvp"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": device_flag(2)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen([*command, str(process), str(port)], env=environment, **pipes) for process in range(2)
    ]
    try:
        for process in processes:
            printed, errors = process.communicate(timeout=120)
            if process.returncode:
                raise RuntimeError(errors[-4000:])
            screen.print(next(line for line in printed.splitlines() if line.startswith("Process")))
    finally:
        for process in processes:  # one that waits for another that failed
            process.kill()
            process.wait()


def device_flag(count: int) -> str:
    """What makes XLA show the processor as so many devices; read before JAX starts."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def main() -> None:
    """Show all of it, in a process with several devices."""
    if jax.device_count() == 1:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": device_flag(NUM_DEVICES)}
        subprocess.run([sys.executable, "-m", "examples.sharded_hvp"], env=environment, check=True)
        return
    began = time.perf_counter()
    screen = timing.console()
    params, batch, sharding = start(), load(), layout()
    v = jax.tree.map(jnp.cos, params)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    screen.print(
        f"{EXAMPLES} examples on {jax.device_count()} devices ({jax.devices()[0].device_kind}); "
        f"{size:,} parameters on each of them.\n"
    )
    show_products(screen, params, v, batch, sharding)
    show_solve(screen, params, v, batch, sharding)
    show_pmap(screen, params, v, batch)
    show_processes(screen)
    screen.print(f"\nDone in {time.perf_counter() - began:.0f} s.")


if __name__ == "__main__":
    if sys.argv[1:]:
        work(*map(int, sys.argv[1:]))
    else:
        main()
