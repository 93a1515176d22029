"""A thousand and a hundred thousand variables: ``python -m benchmarks.large``.

The chained Rosenbrock function, a convex quadratic of condition 1e6 and a matrix factorization, in double precision
with the default ``gtol``, by the Krylov trust region and by L-BFGS: whether each ends by its gradient, in which time,
and how the memory that XLA sets aside grows with the number of variables.
"""

import argparse
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import curvature
from benchmarks.timing import console, digits, plain_table
from curvature import Status

SIZES = (1_000, 100_000)
MEMORY_SIZES = (10_000, 100_000)
METHODS = ("trust-region", "l-bfgs")
MAX_STEPS = 50_000
CONDITION = 1e6
RANK, RIDGE, NOISE, SAMPLES = 5, 1e-2, 0.1, 5  # of the factorization; so many sampled entries for each variable
LINEAR = (8.0, 12.0)  # between these, memory for ten times the variables is ten times as much


class Problem(NamedTuple):
    """An objective, where it starts, and its data."""

    fun: Callable[..., Any]
    x0: Any
    args: tuple[Any, ...] = ()


class Run(NamedTuple):
    """What one solve came to."""

    problem: str
    size: int
    method: str
    status: Status
    steps: int
    grad_norm: float
    gtol: float
    compile_seconds: float
    run_seconds: float
    temporary_bytes: int


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def chain(n: int) -> Problem:
    """From 1/2: farther out, every method needs a number of steps that grows with the length of the chain."""
    return Problem(rosenbrock, jnp.full(n, 0.5))


def quadratic(x: jax.Array, eigenvalues: jax.Array, mirrors: jax.Array, minimizer: jax.Array) -> jax.Array:
    """``sum(eigenvalues * (Q (x - minimizer))^2) / 2`` with Q the product of two Householder reflections."""
    y = x - minimizer
    for mirror in mirrors:
        y = y - 2 * mirror * jnp.vdot(mirror, y)
    return jnp.sum(eigenvalues * y**2) / 2


def ill_conditioned(n: int) -> Problem:
    """Eigenvalues from 1 to 1e6, equally many in each decade; from zero, the minimizer a vector of ones."""
    mirrors = np.random.default_rng(0).normal(size=(2, n))
    mirrors /= np.linalg.norm(mirrors, axis=1, keepdims=True)
    return Problem(quadratic, jnp.zeros(n), (jnp.geomspace(1, CONDITION, n), jnp.asarray(mirrors), jnp.ones(n)))


def factorization_loss(x: dict[str, jax.Array], rows: jax.Array, columns: jax.Array, entries: jax.Array) -> jax.Array:
    """Sampled entries of ``L R'`` against those of a matrix, and a ridge."""
    error = jnp.sum(x["L"][rows] * x["R"][columns], axis=1) - entries
    return (jnp.sum(error**2) + RIDGE * (jnp.sum(x["L"] ** 2) + jnp.sum(x["R"] ** 2))) / 2


def factorization(n: int) -> Problem:
    """A matrix of rank 5 with noise, three rows to two columns; from random factors."""
    rng = np.random.default_rng(0)
    shapes = {"L": (3 * n // (5 * RANK), RANK), "R": (2 * n // (5 * RANK), RANK)}
    truth = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    rows, columns = (rng.integers(0, shapes[name][0], SAMPLES * n) for name in ("L", "R"))
    entries = np.sum(truth["L"][rows] * truth["R"][columns], axis=1) + NOISE * rng.normal(size=SAMPLES * n)
    x0 = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    return Problem(factorization_loss, x0, (jnp.asarray(rows), jnp.asarray(columns), jnp.asarray(entries)))


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "Rosenbrock": chain,
    "quadratic": ill_conditioned,
    "factorization": factorization,
}


def compile_solve(problem: Problem, method: str) -> Any:
    """The whole solve as a compiled program of the start and the data."""

    def solve(x0: Any, args: tuple[Any, ...]) -> curvature.MinimizeResult:
        return curvature.minimize(problem.fun, x0, args, method=method, max_steps=MAX_STEPS)

    return jax.jit(solve).lower(problem.x0, problem.args).compile()


def temporary_bytes(problem: Problem, method: str) -> int:
    """What XLA sets aside for the solve, beyond its arguments and results."""
    return compile_solve(problem, method).memory_analysis().temp_size_in_bytes


def run(name: str, size: int, method: str) -> Run:
    """Compile and solve, with the clock on either."""
    problem = PROBLEMS[name](size)
    start = time.perf_counter()
    program = compile_solve(problem, method)
    compiled = time.perf_counter()
    result = jax.block_until_ready(program(problem.x0, problem.args))
    end = time.perf_counter()
    return Run(
        problem=name,
        size=size,
        method=method,
        status=Status(int(result.status)),
        steps=int(result.num_steps),
        grad_norm=max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(result.grad)),
        gtol=float(np.sqrt(np.finfo(np.float64).eps)),
        compile_seconds=compiled - start,
        run_seconds=end - compiled,
        temporary_bytes=program.memory_analysis().temp_size_in_bytes,
    )


def print_runs(screen: Console, runs: Iterable[Run]) -> None:
    """A line for each solve."""
    columns = ["", "n", "method", "status", "steps", "max|grad|", "warm s", "cold s", "MiB"]
    table = plain_table("Solves", columns, "Cold is tracing, compiling and running. MiB are temporary.")
    for one in runs:
        cold = one.compile_seconds + one.run_seconds
        table.add_row(
            one.problem, f"{one.size:,}", one.method, one.status.name, f"{one.steps:,}", f"{one.grad_norm:.1e}",
            digits(one.run_seconds), digits(cold), digits(one.temporary_bytes / 2**20),
        )  # fmt: skip
    screen.print(table)


def print_memory(screen: Console, memory: Mapping[tuple[str, str], list[int]]) -> None:
    """Temporary bytes for each variable, at each size."""
    columns = ["", "method", *(f"bytes / n\nat {n:,}" for n in MEMORY_SIZES), "growth"]
    table = plain_table("Memory", columns, f"Growth: the bytes at {MEMORY_SIZES[1]:,} by those at {MEMORY_SIZES[0]:,}.")
    for (name, method), (small, large) in memory.items():
        cells = (digits(size / n) for size, n in zip((small, large), MEMORY_SIZES, strict=True))
        table.add_row(name, method, *cells, digits(large / small))
    screen.print(table)


def verdicts(runs: Iterable[Run], memory: Mapping[tuple[str, str], list[int]]) -> list[str]:
    """Each claim, with what was measured of it."""
    claims = [
        (
            one.status is Status.CONVERGED and one.grad_norm <= one.gtol,
            f"{one.method} reaches the tolerance: {one.problem}, n = {one.size:,} ({one.grad_norm:.1e})",
        )
        for one in runs
    ]
    for (name, method), (small, large) in memory.items():
        growth = large / small
        text = f"memory of {method} grows as the variables, tenfold: {name} ({growth:.1f})"
        claims.append((LINEAR[0] <= growth <= LINEAR[1], text))
    return [f"{'holds' if holds else 'FAILS'}  {claim}" for holds, claim in claims]


def main(arguments: list[str] | None = None) -> None:
    """Run it all, or what the command line picks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", help="parts of names, instead of all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--no-memory", action="store_true", help="leave out the table of memory")
    options = parser.parse_args(arguments)
    jax.config.update("jax_enable_x64", True)
    screen = console()
    screen.print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; float64.\n")
    names = [name for name in PROBLEMS if not options.problems or any(part in name for part in options.problems)]
    runs = []
    for name in names:
        for size in options.sizes:
            for method in options.methods:
                with screen.status(f"{name}, n = {size:,}, {method}"):
                    runs.append(run(name, size, method))
    print_runs(screen, runs)
    memory = {} if options.no_memory else measure_memory(names, options.methods)
    if memory:
        print_memory(screen, memory)
    screen.print("The claims, as measured in this run (other work on the machine moves the times):")
    for line in verdicts(runs, memory):
        screen.print(line, soft_wrap=True)


def measure_memory(names: Iterable[str], methods: Iterable[str]) -> dict[tuple[str, str], list[int]]:
    """Temporary bytes at either size, by problem and method; nothing runs."""
    return {
        (name, method): [temporary_bytes(PROBLEMS[name](n), method) for n in MEMORY_SIZES]
        for name in names
        for method in methods
    }


if __name__ == "__main__":
    main()
