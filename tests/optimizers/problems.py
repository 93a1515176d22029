"""Classical test functions with their starts and minimizers: Moré, Garbow and Hillstrom, doi:10.1145/355934.355936."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A function, its standard start, its minimizer, and how close a solver must come in double precision."""

    name: str
    fun: Callable
    start: tuple[float, ...]
    minimizer: tuple[float, ...]
    accuracy: float = 1e-6


def rosenbrock(x):
    return 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2


def powell_singular(x):
    return (x[0] + 10 * x[1]) ** 2 + 5 * (x[2] - x[3]) ** 2 + (x[1] - 2 * x[2]) ** 4 + 10 * (x[0] - x[3]) ** 4


def beale(x):
    return sum((c - x[0] * (1 - x[1] ** (i + 1))) ** 2 for i, c in enumerate((1.5, 2.25, 2.625)))


def wood(x):
    return (
        100 * (x[1] - x[0] ** 2) ** 2
        + (1 - x[0]) ** 2
        + 90 * (x[3] - x[2] ** 2) ** 2
        + (1 - x[2]) ** 2
        + 10 * (x[1] + x[3] - 2) ** 2
        + (x[1] - x[3]) ** 2 / 10
    )


def brown_badly_scaled(x):
    return (x[0] - 1e6) ** 2 + (x[1] - 2e-6) ** 2 + (x[0] * x[1] - 2) ** 2


PROBLEMS = [
    Problem("rosenbrock", rosenbrock, (-1.2, 1.0), (1.0, 1.0)),
    Problem("powell_singular", powell_singular, (3.0, -1.0, 0.0, 1.0), (0.0, 0.0, 0.0, 0.0), accuracy=5e-3),
    Problem("beale", beale, (1.0, 1.0), (3.0, 0.5)),
    Problem("wood", wood, (-3.0, -1.0, -3.0, -1.0), (1.0, 1.0, 1.0, 1.0)),
    Problem("brown_badly_scaled", brown_badly_scaled, (1.0, 1.0), (1e6, 2e-6)),
]
