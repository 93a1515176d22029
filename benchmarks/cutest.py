"""Unconstrained CUTEst problems: who reaches the best known value, in how many steps, and who says so truly.

``python -m benchmarks.cutest --methods trust-exact bfgs --dtype float64 --max-n 50`` needs sif2jax.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from curvature import Status

BEST = Path(__file__).with_name("cutest_n50_best.json")
METHODS = ("trust-exact", "trust-region", "newton", "newton-cg", "cubic-newton", "bfgs", "l-bfgs", "sr1")


class Run(NamedTuple):
    """One solve; ``solved`` is None where no best value is known."""

    name: str
    n: int
    status: Status
    steps: int
    value: float
    grad_norm: float
    cold: float
    solved: bool | None


def main() -> None:
    """Run the methods over the problems, and print a line for each failure and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--max-n", type=int, default=50)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--problems", nargs="+", help="names, instead of all")
    parser.add_argument("--all", action="store_true", help="print every run")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", options.dtype == "float64")
    problems = [p for p in load_problems(options.max_n) if not options.problems or p[0] in options.problems]
    print(f"{len(problems)} problems, {options.dtype}, jax {jax.__version__}")
    for method in options.methods:
        runs = []
        for name, problem, best in problems:
            runs.append(run := solve(name, problem, best, method, options))
            if options.all or not run.solved:
                print(
                    f"  {method:14} {run.name:12} n {run.n:5} {run.status.name:15} {run.steps:5} steps "
                    f"value {run.value:.6e} gradient {run.grad_norm:.1e} solved {run.solved}",
                    flush=True,
                )
        print(summary(method, runs), flush=True)


def load_problems(max_n: int) -> list[tuple[str, Any, float | None]]:
    """The problems of sif2jax by name, each with the best value known to us."""
    import sif2jax

    known = {name: entry["best"] for name, entry in json.loads(BEST.read_text())["problems"].items()}
    found = []
    for problem in sif2jax.unconstrained_minimisation_problems:
        name = type(problem).__name__
        if sum(np.size(leaf) for leaf in jax.tree.leaves(problem.y0)) <= max_n:
            found.append((name, problem, known.get(name)))
    return sorted(found, key=lambda entry: entry[0])


def solve(name: str, problem: Any, best: float | None, method: str, options: argparse.Namespace) -> Run:
    """One problem from its own start, traced, compiled and run."""
    dtype = jnp.dtype(options.dtype)
    x0, args = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), problem.y0), problem.args

    def fun(x: Any, args: Any) -> Any:
        return problem.objective(x, args)

    start = time.perf_counter()
    result = jax.block_until_ready(curvature.minimize(fun, x0, (args,), method=method, max_steps=options.max_steps))
    cold = time.perf_counter() - start
    value = float(result.value)
    grad_norm = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(result.grad))
    tolerance = 1e-6 if dtype == jnp.float64 else 1e-3
    solved = None if best is None else bool(value - best <= tolerance * max(1, abs(best)))
    n = sum(leaf.size for leaf in jax.tree.leaves(x0))
    return Run(name, n, Status(int(result.status)), int(result.num_steps), value, grad_norm, cold, solved)


def summary(method: str, runs: list[Run]) -> str:
    """Solved, claimed without being so, median steps and cold seconds, of one method."""
    solved = [run for run in runs if run.solved]
    false = [run.name for run in runs if run.status == Status.CONVERGED and run.solved is False]
    steps = statistics.median(run.steps for run in solved) if solved else 0
    cold = statistics.median(run.cold for run in runs)
    return (
        f"{method:14} solved {len(solved)}/{len(runs)}  success elsewhere {false}  median steps {steps}  "
        f"longest {max(run.steps for run in runs)}  cold {cold:.2f} s, at most {max(run.cold for run in runs):.1f}"
    )


if __name__ == "__main__":
    main()
