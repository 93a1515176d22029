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

from benchmarks import report, runner, solvers
from benchmarks.cases import Outcome
from benchmarks.cutest import load_problems
from benchmarks.suites import scalar
from benchmarks.timing import console

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
    problems, screen = load_problems(options.max_n), console()
    random.Random(0).shuffle(problems)  # so that a run that is cut short has a fair sample
    screen.print(f"{len(problems)} problems, jax {jax.__version__}, gradient to {solvers.GTOL}")
    for pair in options.pairs:
        ours, theirs = pair.split("/")
        both, end, found = (solvers.ours(ours), solvers.of_scipy(theirs)), time.perf_counter() + options.seconds, {}
        for name, problem, best in problems:
            if time.perf_counter() > end:
                break
            made = scalar.Problem(name, "cutest", 0, best, partial(scalar.flattened, problem))
            race = scalar.race(made, both, True, budget=0.25, rounds=options.rounds)
            found[name] = outcome = runner.run(race, lambda line: None)
            if options.all or outcome.rows[1].status == "failed":
                for line in report.short_lines(name, outcome, brief=False):
                    screen.print(line, soft_wrap=True)
        screen.print(summary(*both, found, len(problems)), soft_wrap=True)


def summary(ours: solvers.Solver, theirs: solvers.Solver, found: dict[str, Outcome], total: int) -> str:
    """The ratio of the times where both solve, also of the fastest turns, and the share that reaches the mark."""
    both = [o.rows for o in found.values() if len(o.rows) == 2 and all("seconds" in row.metrics for row in o.rows)]
    if not both:
        return f"{ours.name} and {theirs.name}: none of {len(found)} problems solved by both"
    reached = np.mean([theirs.metrics["ratio"] >= WANTED for _, theirs in both])
    fastest = statistics.median(theirs.metrics["low"] / ours.metrics["low"] for ours, theirs in both)
    return (
        f"{scalar.pair(found, ours.name, theirs.name)} Of the fastest turns, {fastest:.0f} times. At least {WANTED} "
        f"times on {reached:.0%} of them; {len(found)} of {total} tried."
    )


if __name__ == "__main__":
    main()
