"""Least squares from near and far: who reaches a published minimum, from how far, and who says so truly.

``python -m benchmarks.least_squares`` needs sif2jax, with which each function is compared, SciPy and optimistix. The
functions are those of Moré, Garbow and Hillstrom (``benchmarks.mgh``) from x0, 10 x0 and 100 x0 (where x0 is zero, from
vectors of 10 and 100, as in MINPACK's tests), in double precision.
"""

import argparse
import functools
import importlib.util
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks import peers
from benchmarks.cases import OURS, Case, Choice, Claim, Finding, Outcome, Outcomes, Row, Study
from benchmarks.mgh import PROBLEMS, Problem, Residuals
from benchmarks.reading import part
from benchmarks.timing import first_line
from curvature import Status

FACTORS = (1, 10, 100)
DIGITS = 1e-8
ZERO = 1e-16  # a sum of squares that counts as zero
MAX_STEPS = 1000
QUICK = ("rosenbrock", "bard", "kowalik-osborne")
CAPTION = (
    "Solved: the sum of squares is one of the published ones to eight digits. Elsewhere: a success that is claimed at "
    "another sum, be it stationary or not. Steps are those of each solver's own count, the median over what it solves."
)


class Fit(NamedTuple):
    """Where a solver ended, its sum of squares, whether it claims success, its steps or evaluations, and more of it."""

    x: Any
    value: float
    success: bool
    steps: int
    result: Any


Solve = Callable[..., Fit]  # of the start and the arguments of the residuals


def ours(residuals: Residuals, method: str = "levenberg-marquardt") -> Solve:
    def solve(x0: np.ndarray, *args: Any) -> Fit:
        fit = curvature.least_squares(residuals, x0, args, method=method)
        success = Status(int(fit.status)) == Status.CONVERGED
        return Fit(fit.x, 2 * float(fit.value), success, int(fit.num_steps), fit)

    return solve


def scipy_lm(residuals: Residuals) -> Solve:
    """MINPACK by way of SciPy on compiled functions, its variables scaled, run to the end of precision."""
    import scipy.optimize

    functions = jax.jit(residuals), jax.jit(jax.jacfwd(residuals))
    ends = dict.fromkeys(("ftol", "xtol", "gtol"), 1e-15) | {"max_nfev": 2 * MAX_STEPS}

    def solve(x0: np.ndarray, *args: Any) -> Fit:
        fun, jac = (lambda x, f=f: np.asarray(f(x, *args)) for f in functions)
        try:
            fit = scipy.optimize.least_squares(fun, x0, jac=jac, method="lm", x_scale="jac", **ends)
        except ValueError:  # residuals that are not finite at the start
            return Fit(x0, math.nan, False, 0, None)
        return Fit(fit.x, 2 * float(fit.cost), bool(fit.success), int(fit.nfev), fit)

    return solve


def optimistix_lm(residuals: Residuals) -> Solve:
    import optimistix

    solver = optimistix.LevenbergMarquardt(rtol=1e-10, atol=1e-10)

    @jax.jit
    def run(x0: Any) -> Any:
        found = optimistix.least_squares(lambda x, _: residuals(x), solver, x0, max_steps=MAX_STEPS, throw=False)
        success = found.result == optimistix.RESULTS.successful
        return found.value, jnp.sum(residuals(found.value) ** 2), success, found.stats["num_steps"]

    def solve(x0: np.ndarray) -> Fit:
        x, value, success, steps = run(jnp.asarray(x0))
        return Fit(x, float(value), bool(success), int(steps), None)

    return solve


# By name: the library, and its solver.
SOLVERS: dict[str, tuple[str, Callable[[Residuals], Solve]]] = {
    "curvature": (OURS, ours),
    "scipy lm": ("scipy", scipy_lm),
    "optimistix": ("optimistix", optimistix_lm),
}


def cases(choice: Choice) -> Iterator[Case]:
    problems = [problem for problem in PROBLEMS if not choice.quick or problem.name in QUICK]
    yield from studies(SOLVERS, problems)


def studies(solvers: Iterable[str], problems: list[Problem]) -> Iterator[Study]:
    for solver in solvers:
        id = f"optimizers/least-squares/{solver.replace(' ', '-')}"
        title = f"Least squares, {len(problems)} problems: {solver}"
        yield Study(id, title, "mgh", functools.partial(run, solver, problems), {"problems": len(problems)})


def is_solved(problem: Problem, fit: Fit) -> bool:
    """Whether the sum is one of the published ones to eight digits, or less than the least of them."""
    close = any(abs(fit.value - best) <= max(DIGITS * best, ZERO) for best in problem.minima)
    return close or fit.value < min(problem.minima)


def run(solver: str, problems: list[Problem], report: Callable[[str], Any]) -> Outcome:
    """Every problem from every start; a row for each factor of the start."""
    peer, make = SOLVERS[solver]
    names = [f"{solver}, from {'' if factor == 1 else f'{factor} '}x0" for factor in FACTORS]
    if not peers.is_installed(peer):
        return Outcome(rows=[Row(name, peer, "absent", note=f"{peer} is not installed") for name in names])
    found: list[tuple[Problem, list[Fit]]] = []
    raised: list[str] = []
    for problem in problems:
        report(problem.name)
        try:
            solve, x0 = make(problem.residuals), np.array(problem.start)
            starts = [factor * x0 if x0.any() else np.full_like(x0, factor if factor > 1 else 0) for factor in FACTORS]
            found.append((problem, [solve(start) for start in starts]))
        except Exception as error:  # an exception of a solver is a result
            raised.append(f"{problem.name}: {first_line(error)}")
    rows = []
    for k, name in enumerate(names):
        solved = [fits[k] for problem, fits in found if is_solved(problem, fits[k])]
        rest = [(problem.name, fits[k]) for problem, fits in found if not is_solved(problem, fits[k])]
        said = [f"{name}{f' (success claimed at {fit.value:.6g})' if fit.success else ''}" for name, fit in rest]
        metrics = {
            "solved": len(solved), "of": len(problems), "elsewhere": sum(bool(fit.success) for _, fit in rest),
            "steps": float(statistics.median(fit.steps for fit in solved)) if solved else None,
        }  # fmt: skip
        note = f"not solved: {', '.join(said + raised)}" if said + raised else ""
        rows.append(Row(name, peer, metrics=metrics, note=note))
    return Outcome(rows=rows, claims=claims(rows, len(problems)) if peer == OURS else [], caption=CAPTION)


def claims(rows: list[Row], number: int) -> list[Claim]:
    near, far = rows[0].metrics["solved"], rows[1].metrics["solved"]
    found = [Claim(f"curvature solves {near} of {number} from x0", near == number, correctness=True)]
    if number == len(PROBLEMS):  # a share of a handful says nothing
        found.append(Claim(f"curvature solves {far} of {number} from 10 x0 (wanted: 80%)", far >= 0.8 * number))
    return found


def findings(outcomes: Outcomes) -> list[Finding]:
    found, said = part(outcomes, "optimizers/least-squares/"), []
    for id, outcome in found.items():
        rows = [row for row in outcome.rows if row.status == "ok"]
        counts = ", ".join(str(row.metrics["solved"]) for row in rows)
        elsewhere = sum(row.metrics["elsewhere"] for row in rows)
        said += [f"{id.split('/')[-1]} {counts} (successes elsewhere: {elsewhere})"] if rows else []
    number = next(iter(found.values())).sizes.get("problems", 0) if found else 0
    answer = f"Solved of {number:.0f} from x0, 10 x0 and 100 x0: {'; '.join(said)}." if said else "It was not run."
    return [Finding("Which least-squares solver reaches the published minima, and from how far?", answer)]


def against_sif2jax(problems: list[Problem], report: Callable[[str], Any]) -> Outcome:
    """Each function beside its counterpart at two points: those that agree, that differ, and that have none."""
    rng = np.random.default_rng(0)
    found: dict[str, list[str]] = {"agree with": [], "differ from": [], "have no counterpart in": []}
    for problem in problems:
        report(problem.name)
        start = np.array(problem.start)
        peer = sum_of_sif2jax(problem.peer, start.size)
        if peer is None:
            found["have no counterpart in"].append(problem.name)
            continue
        points = [jnp.asarray(point) for point in (start, start + 0.1 * rng.normal(size=start.size))]
        pairs = [(float(jnp.sum(problem.residuals(point) ** 2)), float(peer(point))) for point in points]
        agree = all(abs(mine - theirs) <= 1e-9 * max(abs(mine), 1e-9) for mine, theirs in pairs)
        found["agree with" if agree else "differ from"].append(problem.name)
    said = [f"{len(names)} functions {verb} sif2jax: {', '.join(names) or 'none'}" for verb, names in found.items()]
    return Outcome(claims=[Claim(text, "differ" not in text or not found["differ from"]) for text in said])


def sum_of_sif2jax(name: str | None, n: int) -> Callable[[Any], Any] | None:
    """The sum of squares of a class of sif2jax in n variables, if it has one of that size."""
    import sif2jax

    everything = [*sif2jax.unconstrained_minimisation_problems, *sif2jax.nonlinear_equations_problems]
    peer: Any = {type(p).__name__: p for p in everything}.get(name or "")
    if peer is not None and np.size(peer.y0) != n and "n" in getattr(type(peer), "__dataclass_fields__", {}):
        peer = type(peer)(n=n)
    if peer is None or np.size(peer.y0) != n:
        return None
    if hasattr(peer, "constraint"):
        return lambda x: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(peer.constraint(x)[0]))
    return lambda x: peer.objective(x, peer.args)


def main() -> int:
    from benchmarks import session  # which imports the suites, and they this module

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    parser.add_argument("--problems", nargs="+", help="parts of names, instead of all")
    options = parser.parse_args()
    chosen = [p for p in PROBLEMS if not options.problems or any(part in p.name for part in options.problems)]
    every: list[Case] = list(studies(options.solvers, chosen))
    if importlib.util.find_spec("sif2jax"):
        check = functools.partial(against_sif2jax, chosen)
        every.append(Study("least-squares/sif2jax", "The functions, compared with sif2jax", "mgh", check))
    return session.alone(every)


if __name__ == "__main__":
    sys.exit(main())
