"""Least squares from near and far: who reaches a published minimum, from how far, and who says so truly.

``python -m benchmarks.least_squares`` needs sif2jax, against which each function is checked, SciPy and optimistix. The
functions are those of Moré, Garbow and Hillstrom (``benchmarks.mgh``) from x0, 10 x0 and 100 x0 (where x0 is zero, from
vectors of 10 and 100, as in MINPACK's tests), in double precision.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.mgh import PROBLEMS, Problem
from curvature import Status

FACTORS = (1, 10, 100)
DIGITS = 1e-8
ZERO = 1e-16  # a sum of squares that counts as zero
MAX_STEPS = 1000


class Outcome(NamedTuple):
    """A sum of squares, whether success was claimed, and the steps or evaluations that it took."""

    value: float
    success: bool
    steps: int


Solver = Callable[[Problem], Callable[[np.ndarray], Outcome]]


def ours(problem: Problem) -> Callable[[np.ndarray], Outcome]:
    """curvature.least_squares with all its defaults."""

    def solve(x0: np.ndarray) -> Outcome:
        fit = curvature.least_squares(problem.residuals, x0)
        return Outcome(2 * float(fit.value), Status(int(fit.status)) == Status.CONVERGED, int(fit.num_steps))

    return solve


def minpack(residuals: Callable[..., Any], jacobian: Callable[..., Any], x0: np.ndarray, *args: Any) -> Any:
    """MINPACK by way of SciPy, its variables scaled, run to the end of precision; None if it cannot start.

    Both functions take the variables and ``args``, and are compiled.
    """
    import scipy.optimize

    try:
        return scipy.optimize.least_squares(
            lambda x: np.asarray(residuals(x, *args)),
            x0,
            jac=lambda x: np.asarray(jacobian(x, *args)),
            method="lm",
            x_scale="jac",
            ftol=1e-15,
            xtol=1e-15,
            gtol=1e-15,
            max_nfev=2 * MAX_STEPS,
        )
    except ValueError:  # residuals that are not finite at the start
        return None


def scipy_lm(problem: Problem) -> Callable[[np.ndarray], Outcome]:
    """MINPACK on compiled residuals."""
    residuals, jacobian = jax.jit(problem.residuals), jax.jit(jax.jacfwd(problem.residuals))

    def solve(x0: np.ndarray) -> Outcome:
        fit = minpack(residuals, jacobian, x0)
        if fit is None:
            return Outcome(math.nan, False, 0)
        return Outcome(2 * float(fit.cost), bool(fit.success), int(fit.nfev))

    return solve


def optimistix_lm(problem: Problem) -> Callable[[np.ndarray], Outcome]:
    """Levenberg-Marquardt of optimistix, with tolerances of 1e-10."""
    import optimistix

    solver = optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-10)

    @jax.jit
    def run(x0: Any) -> Any:
        found = optimistix.least_squares(
            lambda x, _: problem.residuals(x), solver, x0, max_steps=MAX_STEPS, throw=False
        )
        success = found.result == optimistix.RESULTS.successful
        return jnp.sum(problem.residuals(found.value) ** 2), success, found.stats["num_steps"]

    def solve(x0: np.ndarray) -> Outcome:
        value, success, steps = run(jnp.asarray(x0))
        return Outcome(float(value), bool(success), int(steps))

    return solve


SOLVERS: dict[str, Solver] = {"curvature": ours, "scipy lm": scipy_lm, "optimistix": optimistix_lm}


def main() -> None:
    """Run the solvers over the problems and starts, and say what holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--problems", nargs="+", help="parts of names, instead of all")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    problems = [p for p in PROBLEMS if not options.problems or any(part in p.name for part in options.problems)]
    solved = {name: [0] * len(FACTORS) for name in options.solvers}
    false: dict[str, list[str]] = {name: [] for name in options.solvers}
    for problem in problems:
        outcomes = {name: run_starts(SOLVERS[name](problem), problem) for name in options.solvers}
        for name, row in outcomes.items():
            for k, outcome in enumerate(row):
                solved[name][k] += is_solved(problem, outcome)
                if outcome.success and not is_solved(problem, outcome):
                    false[name].append(f"{problem.name} {FACTORS[k]} x0: {outcome.value:.6g}")
        print(line(problem, outcomes), flush=True)
    report(solved, false, len(problems))
    check_against_sif2jax(problems)


def run_starts(solve: Callable[[np.ndarray], Outcome], problem: Problem) -> list[Outcome]:
    """The problem from each of its starts."""
    x0 = np.array(problem.start)
    return [solve(factor * x0 if x0.any() else np.full_like(x0, factor if factor > 1 else 0)) for factor in FACTORS]


def is_solved(problem: Problem, outcome: Outcome) -> bool:
    """Whether the sum is one of the published ones to eight digits, or less than the least of them."""
    value = outcome.value
    close = any(abs(value - best) <= max(DIGITS * best, ZERO) for best in problem.minima)
    return close or value < min(problem.minima)


def line(problem: Problem, outcomes: dict[str, list[Outcome]]) -> str:
    """What each solver found from each start: steps, and a mark and the sum where it is no published one."""
    cells = []
    for name, row in outcomes.items():
        told = [f"{o.steps}" if is_solved(problem, o) else f"{o.steps}! {o.value:.3g}" for o in row]
        cells.append(f"{name}: {', '.join(told)}")
    return f"{problem.name:27} {'   '.join(cells)}"


def check_against_sif2jax(problems: list[Problem]) -> None:
    """Hold each function against its counterpart at two points, and name those that differ or have none."""
    rng = np.random.default_rng(0)
    found: dict[str, list[str]] = {"agree with": [], "differ from": [], "have no counterpart in": []}
    for problem in problems:
        start = np.array(problem.start)
        peer = sum_of_sif2jax(problem.peer, start.size)
        if peer is None:
            found["have no counterpart in"].append(problem.name)
            continue
        points = [jnp.asarray(point) for point in (start, start + 0.1 * rng.normal(size=start.size))]
        pairs = [(float(jnp.sum(problem.residuals(point) ** 2)), float(peer(point))) for point in points]
        agree = all(abs(mine - theirs) <= 1e-9 * max(abs(mine), 1e-9) for mine, theirs in pairs)
        found["agree with" if agree else "differ from"].append(problem.name)
    for verb, names in found.items():
        print(f"{len(names)} functions {verb} sif2jax: {', '.join(names) or 'none'}")


def sum_of_sif2jax(name: str | None, n: int) -> Callable[[Any], Any] | None:
    """The sum of squares of a class of sif2jax in n variables, if it has one of that size."""
    import sif2jax

    everything = [*sif2jax.unconstrained_minimisation_problems, *sif2jax.nonlinear_equations_problems]
    peers = {type(p).__name__: p for p in everything}
    peer: Any = peers.get(name or "")
    if peer is not None and np.size(peer.y0) != n and "n" in getattr(type(peer), "__dataclass_fields__", {}):
        peer = type(peer)(n=n)
    if peer is None or np.size(peer.y0) != n:
        return None
    if hasattr(peer, "constraint"):
        return lambda x: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(peer.constraint(x)[0]))
    return lambda x: peer.objective(x, peer.args)


def report(solved: dict[str, list[int]], false: dict[str, list[str]], number: int) -> None:
    """The counts, the successes claimed elsewhere, and each promise as holds or FAILS."""
    for name, counts in solved.items():
        print(f"{name:12} solved {counts} of {number} from x0, 10 x0, 100 x0: {sum(counts)} in all")
        print(f"{'':12} stationary elsewhere, claimed as success: {'; '.join(false[name]) or 'none'}")
    mine = solved.get("curvature")
    if mine is None:
        return
    promises = {"all from x0": mine[0] == number, "80% from 10 x0": mine[1] >= 0.8 * number}
    for name, counts in solved.items():
        if name != "curvature":
            promises[f"as many as {name}"] = sum(mine) >= sum(counts)
    for promise, holds in promises.items():
        print(f"{'holds' if holds else 'FAILS'}: {promise}")


if __name__ == "__main__":
    main()
