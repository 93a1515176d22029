"""Profiles of solvers over a set of problems, from a table of costs; a problem that was not solved costs infinity.

References: Dolan and Moré, Benchmarking optimization software with performance profiles, Mathematical Programming 91
    (2002), doi:10.1007/s101070100263. Moré and Wild, Benchmarking derivative-free optimization algorithms, SIAM Journal
    on Optimization 20 (2009), doi:10.1137/080724083.
"""

import math
from collections.abc import Mapping, Sequence

Costs = Mapping[str, Sequence[float]]  # of each solver, the costs of the problems in one and the same order
Curve = tuple[list[float], list[float]]


def performance_profile(costs: Costs) -> dict[str, Curve]:
    """The share of the problems that each solver solves at no more than ``tau`` times the least cost of all solvers.

    ``rho_s(tau) = |{p : t_ps <= tau min_s t_ps}| / |P|``, Dolan and Moré (2002), (2.1) and (2.2). A problem that no
    solver solves stays in the count. All costs are positive.
    """
    least = [min(of_problem) for of_problem in zip(*costs.values(), strict=True)]
    ratios = {
        solver: [cost / best if math.isfinite(cost) else math.inf for cost, best in zip(row, least, strict=True)]
        for solver, row in costs.items()
    }
    return _cumulate(ratios, start=1.0)


def data_profile(costs: Costs) -> dict[str, Curve]:
    """The share of the problems that each solver solves at a cost of at most ``alpha``.

    ``d_s(alpha) = |{p : t_ps <= alpha}| / |P|``, Moré and Wild (2009), (2.3), without their division of the cost by
    ``n_p + 1``: that counts gradients by differences, and here a gradient comes with an evaluation.
    """
    return _cumulate(costs, start=1.0)


def _cumulate(costs: Costs, start: float) -> dict[str, Curve]:
    """The distribution of each row as a staircase, which goes from ``start`` to the largest finite cost of all."""
    end = max((cost for row in costs.values() for cost in row if math.isfinite(cost)), default=start)
    return {solver: _staircase(row, start, max(start, end)) for solver, row in costs.items()}


def _staircase(row: Sequence[float], start: float, end: float) -> Curve:
    """From each ``x`` to the next the share of the entries that are at most ``x``."""
    stairs = sorted({start, end, *(cost for cost in row if start < cost < math.inf)})
    return stairs, [sum(cost <= x for cost in row) / max(len(row), 1) for x in stairs]
