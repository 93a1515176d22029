"""Unconstrained CUTEst problems: who reaches the best known value, in how many steps, and who says so truly.

``python -m benchmarks.cutest --methods trust-exact bfgs --dtype float64 --max-n 50`` needs sif2jax. All of its
problems: ``--methods trust-region l-bfgs --max-n 100000 --max-steps 200 --seconds-per-problem 60``.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.solvers import largest
from benchmarks.timing import clock
from curvature import Status

_PILOT = 3  # steps, by which the seconds of one are judged
LINE = "n {n:5} {status:15} {steps:5} steps value {value:.6e} gradient {slope:.1e} solved {solved}"
METHODS = ("trust-exact", "trust-region", "newton", "newton-cg", "cubic-newton", "bfgs", "l-bfgs", "sr1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float64")
    parser.add_argument("--max-n", type=int, default=50)
    parser.add_argument("--max-steps", type=int, default=1000)
    parser.add_argument("--seconds-per-problem", type=float, help="allow fewer steps where these take longer")
    parser.add_argument("--problems", nargs="+", help="names, instead of all")
    parser.add_argument("--all", action="store_true", help="print every run")
    options = parser.parse_args()
    problems = [p for p in load_problems(options.max_n) if not options.problems or p[0] in options.problems]
    print(f"{len(problems)} problems, {options.dtype}, jax {jax.__version__}")
    with jax.enable_x64(options.dtype == "float64"):  # importing sif2jax has enabled it
        for method in options.methods:
            runs = []
            for name, problem, best in problems:
                try:
                    runs.append(run := {"name": name} | solve(problem, best, method, options))
                except Exception as error:  # a problem that cannot be evaluated must not end the others
                    print(f"  {method:14} {name:12} raised {type(error).__name__}: {str(error)[:200]}", flush=True)
                    continue
                if options.all or not run["solved"]:
                    print(f"  {method:14} {name:12} {LINE.format(**run)}", flush=True)
            print(summary(method, runs), flush=True)


def known() -> dict[str, dict[str, Any]]:
    return json.loads(Path(__file__).with_name("cutest_n50_best.json").read_text())["problems"]


def load_problems(max_n: int) -> list[tuple[str, Any, float | None]]:
    """The problems of sif2jax by name, each with the best value known to us."""
    import sif2jax

    best = {name: entry["best"] for name, entry in known().items()}
    problems = {type(problem).__name__: problem for problem in sif2jax.unconstrained_minimisation_problems}
    sizes = {name: sum(np.size(leaf) for leaf in jax.tree.leaves(p.y0)) for name, p in problems.items()}
    return [(name, problems[name], best.get(name)) for name in sorted(problems) if sizes[name] <= max_n]


def solve(problem: Any, best: float | None, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One solve.

    Returns:
        ``cold``: the seconds with tracing and compilation; ``solved``: None where no best value is known; ``finite``:
        the returned point, its value and its gradient, unless the status says that they are not; ``cut``: by the limit
        of time, before that of steps; ``claim``: where it says converged, the gradient, recomputed in double precision,
        over the tolerance; and ``n``, ``status``, ``steps``, ``value``, ``slope``.
    """
    dtype = jnp.dtype(options.dtype)
    x0 = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), problem.y0)
    args = jax.tree.map(
        lambda a: jnp.asarray(a, dtype) if jnp.issubdtype(jnp.result_type(a), jnp.floating) else a, problem.args
    )

    def fun(x: Any, args: Any) -> Any:
        return problem.objective(x, args)

    def timed(max_steps: int) -> tuple[Any, float]:
        return clock(lambda: curvature.minimize(fun, x0, (args,), method=method, max_steps=max_steps))

    max_steps = options.max_steps
    if options.seconds_per_problem is not None:  # the limit of steps is an operand: one program serves all calls
        timed(_PILOT)
        seconds = timed(_PILOT)[1] / _PILOT
        max_steps = min(max_steps, max(_PILOT, int(options.seconds_per_problem / seconds)))
    result, cold = timed(max_steps)
    value, status = float(result.value), Status(int(result.status))
    tolerance = 1e-6 if dtype == jnp.float64 else 1e-3
    ended = jax.tree.leaves((result.x, result.value, result.grad))
    claim = 0.0
    if status == Status.CONVERGED:
        with jax.enable_x64(True):
            x = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), result.x)
            claim = float(largest(jax.jit(jax.grad(fun))(x, args))) / float(jnp.finfo(dtype).eps) ** 0.5
    return {
        "n": sum(leaf.size for leaf in jax.tree.leaves(x0)), "status": status.name, "steps": int(result.num_steps),
        "value": value, "slope": float(largest(result.grad)), "cold": cold, "claim": claim,
        "solved": None if best is None else value - best <= tolerance * max(1, abs(best)),
        "finite": status == Status.NONFINITE_START or all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in ended),
        "cut": status == Status.MAX_STEPS and max_steps < options.max_steps,
    }  # fmt: skip


def summary(method: str, runs: list[dict[str, Any]]) -> str:
    solved = [run["steps"] for run in runs if run["solved"]]
    false = [run["name"] for run in runs if run["status"] == "CONVERGED" and run["solved"] is False]
    colds = [run["cold"] for run in runs]
    claims = {run["name"]: round(run["claim"], 1) for run in runs if run["claim"] > 1.01}
    nan, cut = [run["name"] for run in runs if not run["finite"]], sum(run["cut"] for run in runs)
    return (
        f"{method:14} solved {len(solved)}/{len(runs)}  success elsewhere {false}  "
        f"median steps {statistics.median(solved or [0])}  longest {max(run['steps'] for run in runs)}  "
        f"gradient over tolerance, in double precision {claims}  NaN {nan}  cut by the clock {cut}  "
        f"cold {statistics.median(colds):.2f} s, at most {max(colds):.1f}"
    )


if __name__ == "__main__":
    main()
