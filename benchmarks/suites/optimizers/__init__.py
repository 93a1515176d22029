"""Minimizers of every library: who solves what, who says so truly, how fast, alone, in batches, in training."""

from collections.abc import Iterator, Mapping

from benchmarks.cases import Case, Choice, Finding, Outcome, Plot
from benchmarks.suites.optimizers import curves, fits, many, regression, scalar, training

TITLE = "Optimizers"
QUESTION = "Which minimizer reaches the minimum, says so truly, and is fastest?"
REASONS = {
    ("optimizers/cutest", ""): (
        "an objective of less than a microsecond: what is timed is the work around it, and each step of ours also "
        "judges the point, keeps the best one and looks for a stall"
    ),
    ("optimizers/batched/rosenbrock", ""): (
        "in ten dimensions a step of a quasi-Newton method takes less than one of newton-cg; where all problems end "
        "at about the same step, nothing is gained by dropping those that have"
    ),
    ("optimizers/digits/regression", ""): (
        "the objective is convex and the data few: a quasi-Newton step takes less than a fiftieth of one that forms "
        "the Hessian; ours that ratios are to is exact Newton, and trust-region, by products, is the fastest of all"
    ),
}
DTYPE = "float64"
PARTS = (scalar, many, regression, curves, training, fits)


def cases(choice: Choice) -> Iterator[Case]:
    """Those of all parts."""
    for part in PARTS:
        yield from part.cases(choice)


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """Those of all parts."""
    return [plot for part in PARTS for plot in part.plots(outcomes)]


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """Those of all parts."""
    return [finding for part in PARTS for finding in part.findings(outcomes)]
