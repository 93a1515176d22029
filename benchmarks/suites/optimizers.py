"""Minimizers of every library: who solves what, who says so truly, how fast, alone, in batches, in training."""

from collections.abc import Iterator

from benchmarks import batched, digits, least_squares
from benchmarks.cases import Case, Choice, Finding, Outcomes, Plot
from benchmarks.suites import curves, scalar

TITLE = "Optimizers"
QUESTION = "Which minimizer reaches the minimum, says so truly, and is fastest?"
DTYPE = "float64"
PARTS = (scalar, batched, digits, curves, least_squares)


def cases(choice: Choice) -> Iterator[Case]:
    for part in PARTS:
        yield from part.cases(choice)


def plots(outcomes: Outcomes) -> list[Plot]:
    return [*scalar.plots(outcomes), *curves.plots(outcomes)]


def findings(outcomes: Outcomes) -> list[Finding]:
    return [finding for part in PARTS for finding in part.findings(outcomes)]
