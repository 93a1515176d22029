"""Least squares from near and far: how many of the problems of Moré, Garbow and Hillstrom each solver solves."""

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from benchmarks import least_squares, mgh, peers
from benchmarks.cases import OURS, Case, Choice, Claim, Finding, Outcome, Plot, Row, Study
from benchmarks.timing import first_line

PEERS = {"curvature": "curvature", "scipy lm": "scipy", "optimistix": "optimistix"}
QUICK = ("rosenbrock", "bard", "kowalik-osborne")
CAPTION = (
    "Solved: the sum of squares is one of the published ones to eight digits. Elsewhere: a success that is claimed at "
    "another sum, be it stationary or not. Steps are those of each solver's own count, the median over what it solves."
)


def cases(choice: Choice) -> Iterator[Case]:
    """A study for each solver, with a row for each distance of the start."""
    problems = [p for p in mgh.PROBLEMS if not choice.quick or p.name in QUICK]
    for solver in least_squares.SOLVERS:
        yield Study(
            f"optimizers/least-squares/{solver.replace(' ', '-')}",
            f"Least squares, {len(problems)} problems: {solver}",
            "mgh", functools.partial(run, solver, problems), {"problems": len(problems)},
        )  # fmt: skip


def run(solver: str, problems: list[mgh.Problem], report: Callable[[str], Any]) -> Outcome:
    """Every problem from every start; a row for each factor of the start."""
    peer = PEERS.get(solver, solver)
    names = [f"{solver}, from {'' if factor == 1 else f'{factor} '}x0" for factor in least_squares.FACTORS]
    if not peers.is_installed(peer):
        return Outcome(rows=[Row(name, peer, "absent", note=f"{peer} is not installed") for name in names])
    found: dict[str, list[least_squares.Outcome]] = {}
    raised: dict[str, str] = {}
    for problem in problems:
        report(problem.name)
        try:
            found[problem.name] = least_squares.run_starts(least_squares.SOLVERS[solver](problem), problem)
        except Exception as error:  # whatever a solver raises is a result
            raised[problem.name] = first_line(error)
    rows = [_row(name, peer, problems, found, raised, k) for k, name in enumerate(names)]
    return Outcome(rows=rows, claims=_claims(rows, len(problems)) if peer == OURS else [], caption=CAPTION)


def _row(
    name: str, peer: str, problems: list[mgh.Problem], found: Mapping[str, list[least_squares.Outcome]],
    raised: Mapping[str, str], k: int,
) -> Row:  # fmt: skip
    """The counts from the k-th start, and the names of the problems that were not solved."""
    tried = [(problem, found[problem.name][k]) for problem in problems if problem.name in found]
    solved = [outcome for problem, outcome in tried if least_squares.is_solved(problem, outcome)]
    rest = [(problem, outcome) for problem, outcome in tried if not least_squares.is_solved(problem, outcome)]
    told = [f"{p.name}{' (success claimed)' if o.success else ''}" for p, o in rest]
    told += [f"{problem}: {error}" for problem, error in raised.items()]
    metrics = {
        "solved": len(solved), "of": len(problems), "elsewhere": sum(bool(o.success) for _, o in rest),
        "steps": float(statistics.median(o.steps for o in solved)) if solved else None,
    }  # fmt: skip
    return Row(name, peer, metrics=metrics, note=f"not solved: {', '.join(told)}" if told else "")


def _claims(rows: list[Row], number: int) -> list[Claim]:
    """All from x0, most from far."""
    near, far = rows[0].metrics["solved"], rows[1].metrics["solved"]
    claims = [Claim(f"curvature solves {near} of {number} from x0", near == number, correctness=True)]
    if number == len(mgh.PROBLEMS):  # a share of a handful says nothing
        claims.append(Claim(f"curvature solves {far} of {number} from 10 x0 (wanted: 80%)", far >= 0.8 * number))
    return claims


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """None: the counts are few."""
    return []


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """The counts of all solvers side by side."""
    found = {id: outcome for id, outcome in outcomes.items() if id.startswith("optimizers/least-squares/")}
    told = []
    for id, outcome in found.items():
        counts = [row.metrics["solved"] for row in outcome.rows if row.status == "ok"]
        elsewhere = sum(row.metrics["elsewhere"] for row in outcome.rows if row.status == "ok")
        if counts:
            told.append(f"{id.split('/')[-1]} {', '.join(map(str, counts))} (successes elsewhere: {elsewhere})")
    number = next(iter(found.values())).sizes.get("problems", 0) if found else 0
    answer = f"Solved of {number:.0f} from x0, 10 x0 and 100 x0: {'; '.join(told)}." if told else "It was not run."
    return [Finding("Which least-squares solver reaches the published minima, and from how far?", answer, list(found))]
