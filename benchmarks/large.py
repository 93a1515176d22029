"""A thousand and a hundred thousand variables: ``python -m benchmarks.large``.

The chained Rosenbrock function, a convex quadratic of condition 1e6 and a matrix factorization, in double precision
with the default ``gtol``, by the Krylov trust region and by L-BFGS: whether each ends by its gradient, in which time,
and how the memory that XLA sets aside grows with the number of variables.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import OURS, Claim, Outcome, Row, Study
from benchmarks.solvers import largest, rosenbrock
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
    # From 1/2: farther out, every method needs a number of steps that grows with the length of the chain.
    "Rosenbrock": lambda n: Problem(rosenbrock, jnp.full(n, 0.5)),
    "quadratic": ill_conditioned,
    "factorization": factorization,
}


def compile_solve(problem: Problem, method: str) -> Any:
    def solve(x0: Any, args: tuple[Any, ...]) -> curvature.MinimizeResult:
        return curvature.minimize(problem.fun, x0, args, method=method, max_steps=MAX_STEPS)

    return jax.jit(solve).lower(problem.x0, problem.args).compile()


def temporary_bytes(problem: Problem, method: str) -> int:
    """What XLA sets aside for the solve, beyond its arguments and results."""
    return compile_solve(problem, method).memory_analysis().temp_size_in_bytes


def run(name: str, size: int, methods: list[str], report: Callable[[str], Any]) -> Outcome:
    """Compile and solve by each method; the claim is that the solve ends by its gradient."""
    outcome, gtol = Outcome(), float(np.sqrt(np.finfo(np.float64).eps))
    for method in methods:
        report(method)
        problem, start = PROBLEMS[name](size), time.perf_counter()
        program = compile_solve(problem, method)
        compiled = time.perf_counter()
        result = jax.block_until_ready(program(problem.x0, problem.args))
        end, status, grad_norm = time.perf_counter(), Status(int(result.status)), float(largest(result.grad))
        metrics = {
            "seconds": end - compiled, "compile_seconds": compiled - start,
            "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            "status": status.name, "steps": int(result.num_steps), "max|grad|": grad_norm,
        }  # fmt: skip
        outcome.rows.append(Row(method, OURS, metrics=metrics))
        text = f"{method} reaches the tolerance: {name}, n = {size:,} ({grad_norm:.1e})"
        outcome.claims.append(Claim(text, status is Status.CONVERGED and grad_norm <= gtol))
    return outcome


def memory(names: list[str], methods: list[str], report: Callable[[str], Any]) -> Outcome:
    """Temporary bytes for each variable, at either size; nothing runs."""
    outcome = Outcome(caption=f"Growth: the bytes at {MEMORY_SIZES[1]:,} by those at {MEMORY_SIZES[0]:,}.")
    for name, method in ((name, method) for name in names for method in methods):
        report(f"{name}, {method}")
        sizes = {n: temporary_bytes(PROBLEMS[name](n), method) for n in MEMORY_SIZES}
        growth = sizes[MEMORY_SIZES[1]] / sizes[MEMORY_SIZES[0]]
        metrics = {f"bytes / n at {n:,}": size / n for n, size in sizes.items()} | {"growth": growth}
        outcome.rows.append(Row(f"{name}, {method}", OURS, metrics=metrics))
        text = f"memory of {method} grows as the variables, tenfold: {name} ({growth:.1f})"
        outcome.claims.append(Claim(text, LINEAR[0] <= growth <= LINEAR[1]))
    return outcome


def main(arguments: list[str] | None = None) -> int:
    from benchmarks import session  # and with it the libraries of the report, which the tests of solvers do without

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--problems", nargs="+", help="parts of names, instead of all")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES)
    parser.add_argument("--no-memory", action="store_true", help="leave out the table of memory")
    options = parser.parse_args(arguments)
    names = [name for name in PROBLEMS if not options.problems or any(part in name for part in options.problems)]

    def studies() -> Iterator[Study]:
        for name, size in ((name, size) for name in names for size in options.sizes):
            study = partial(run, name, size, options.methods)
            yield Study(f"large/{name}/n={size}", f"{name}, n = {size:,}", name, study)
        if not options.no_memory:
            yield Study("large/memory", "Memory", "", partial(memory, names, options.methods))

    return session.alone(studies())


if __name__ == "__main__":
    sys.exit(main())
