"""Warm ``minimize`` against SciPy's method of the same name, on the same compiled functions.

``python -m benchmarks.against_scipy --pairs trust-exact/trust-exact --seconds 170`` needs sif2jax. The problems are
those of CUTEst without constraints, of at most 50 variables, in double precision, in random order until the time is up.
Both sides take turns on each problem, and each counts by its median; on a busy machine the fastest turns say more, and
their ratio stands beside.
"""

import argparse
import random
import statistics
import time
from functools import partial

import jax
import numpy as np

from benchmarks import runner, solvers
from benchmarks.cases import Row
from benchmarks.cutest import load_problems
from benchmarks.suites import scalar

PAIRS = (
    "trust-exact/trust-exact",
    "trust-region/trust-ncg",
    "trust-region/trust-krylov",
    "bfgs/BFGS",
    "l-bfgs/L-BFGS-B",
    "newton-cg/Newton-CG",
)
WANTED = 20  # times as fast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS))
    parser.add_argument("--seconds", type=float, default=170.0, help="for each pair, after which no problem is begun")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-n", type=int, default=50)
    parser.add_argument("--all", action="store_true", help="print every problem")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    problems = load_problems(options.max_n)
    random.Random(0).shuffle(problems)  # so that a run that is cut short has a fair sample
    print(f"{len(problems)} problems, jax {jax.__version__}, gradient to {solvers.GTOL}")
    for pair in options.pairs:
        ours, theirs = pair.split("/")
        both, end, found = (solvers.ours(ours), solvers.of_scipy(theirs)), time.perf_counter() + options.seconds, []
        for name, problem, best in problems:
            if time.perf_counter() > end:
                break
            made = scalar.Problem(name, "cutest", 0, best, partial(scalar.flattened, problem))
            race = scalar.race(made, both, True, budget=0.25, rounds=options.rounds)
            rows = runner.race(race, lambda line: None).rows
            found.append(rows)
            if options.all or rows[1].status == "failed":
                print(f"  {name:12} {line(*rows)}", flush=True)
        print(summary(pair, found, len(problems)), flush=True)


def line(ours: Row, theirs: Row) -> str:
    if theirs.status == "failed":
        return f"{theirs.name} raised {theirs.note}"
    if "seconds" not in ours.metrics or "seconds" not in theirs.metrics:
        return f"not solved by both: {ours.note or 'ours did'}; {theirs.note or 'SciPy did'}"
    return (
        f"{1e3 * ours.metrics['seconds']:9.3f} ms in {ours.metrics['steps']:4} steps  SciPy "
        f"{1e3 * theirs.metrics['seconds']:9.2f} ms in {theirs.metrics['steps']:4}  {theirs.metrics['ratio']:7.1f} "
        f"times, fastest {theirs.metrics['low'] / ours.metrics['low']:.1f}  cold {ours.metrics['cold_seconds']:.2f} s"
    )


def summary(pair: str, found: list[list[Row]], total: int) -> str:
    """The median ratio with its quartiles, over the problems that both solved, and the share that reaches the mark."""
    both = [rows for rows in found if all("seconds" in row.metrics for row in rows)]
    if len(both) < 2:
        return f"{pair:28} solved by both: {len(both)} of {len(found)}; no median"
    ratios = np.array([theirs.metrics["seconds"] / ours.metrics["seconds"] for ours, theirs in both])
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    fastest = statistics.median(theirs.metrics["low"] / ours.metrics["low"] for ours, theirs in both)
    cold = statistics.median(ours.metrics["cold_seconds"] for ours, _ in both)
    return (
        f"{pair:28} {middle:.0f} times as fast (quartiles {low:.0f} - {high:.0f}, least {min(ratios):.1f}; "
        f"fastest turns {fastest:.0f}) on the {len(both)} problems that both solved, "
        f"{np.mean(ratios >= WANTED):.0%} of them at least {WANTED} times; {len(found)} of {total} tried; "
        f"cold {cold:.2f} s"
    )


if __name__ == "__main__":
    main()
