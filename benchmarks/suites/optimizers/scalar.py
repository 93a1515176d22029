"""Every solver on every objective, a study for each objective: who solves it, who says so truly, at what cost."""

import functools
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers, runner
from benchmarks.cases import OURS, Case, Choice, Claim, Finding, Line, Outcome, Plot, Row, Study
from benchmarks.suites.optimizers.problems import SOURCES, Problem, chosen
from benchmarks.suites.optimizers.profiles import Costs, data_profile, performance_profile
from benchmarks.suites.optimizers.solvers import GTOL, PAIRS, SOLVERS, Answer, Solver
from benchmarks.timing import digits, first_line, measure

EXCESS = 1e-6  # over the best value known, relative to it where it is larger than one: solved
STATIONARY = (
    100 * GTOL
)  # the largest entry of a gradient, relative to the value likewise: beyond it nothing is stationary
CAPTION = (
    f"Solved: within {EXCESS:.0e} max(1, |best|) of the best value known. A false success is one that is claimed where "
    f"nothing is solved and an entry of the gradient, computed anew, exceeds {STATIONARY:.0e} max(1, |value|). "
    "Evaluations are points at which the objective, with or without derivatives, is computed; products with a Hessian "
    "are in no count. Only who solves the problem is timed: warm, with the best of what each library has to compile, "
    "and set against the fastest of ours."
)
SECOND = {solver.name for solver in SOLVERS if solver.second}
ORDERS = {"second": "with second derivatives", "first": "with first derivatives only"}
COSTS = {
    "seconds": ("time", "times the least time of all that are drawn"),
    "evaluations": ("evaluations", "evaluations of the objective"),
}


def cases(choice: Choice) -> Iterator[Case]:
    """A study for each objective."""
    for problem in chosen(choice):
        yield Study(
            f"optimizers/{problem.source}/{problem.name.replace(' ', '-').replace(',', '')}",
            f"{problem.name}, {problem.n} variables", problem.source,
            functools.partial(run, problem, [s for s in SOLVERS if s.quick or not choice.quick], choice.quick),
            {"n": problem.n},
        )  # fmt: skip


def run(problem: Problem, solvers: list[Solver], quick: bool, report: Callable[[str], Any]) -> Outcome:
    """Let each solve it once, judge the answers, and let those that were right take turns."""
    fun, x0, args = problem.load()
    value_and_grad = jax.jit(jax.value_and_grad(fun))
    rows, calls = {}, {}
    for solver in solvers:
        row = rows[solver.name] = Row(solver.name, solver.peer)
        if not peers.is_installed(solver.peer):
            row.status, row.note = "absent", f"{solver.peer} is not installed"
            continue
        report(f"solving with {solver.name}")
        try:
            call, answer, row.metrics["cold_seconds"] = solve(solver, fun, x0, args)
        except Exception as error:  # whatever a solver raises is a result
            row.status, row.note = "failed", first_line(error)
            continue
        judge(row, answer, problem.best, *value_and_grad(jnp.asarray(answer.x), args))
        if row.metrics["solved"]:
            calls[solver.name] = call
            if solver.count is not None and not quick:  # it compiles once more
                row.metrics["evaluations"] = solver.count(fun, x0, args)
    timed = measure(calls, budget=0.03 if quick else 0.1, rounds=3, report=report)
    for name, timing in timed.items():
        rows[name].metrics |= {"seconds": timing.seconds, "low": timing.spread[0], "high": timing.spread[1]}
    runner.relate(list(rows.values()), to_fastest=True)
    return Outcome(rows=list(rows.values()), claims=honesty(rows.values()), caption=CAPTION)


def solve(solver: Solver, fun: Callable[..., Any], x0: jax.Array, args: Any) -> tuple[Callable[[], Any], Answer, float]:
    """The call, the answer of the first one, and the seconds until then, compilation included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what solvers complain of is in their answers
        start = time.perf_counter()
        call = solver.build(fun, x0, args)
        found = call()
        seconds = time.perf_counter() - start
    return call, solver.read(found), seconds


def judge(row: Row, answer: Answer, best: float, value: Any, grad: Any) -> None:
    """Write down where the solver ended, by the value and the gradient computed anew."""
    end, slope = float(value), float(jnp.max(jnp.abs(grad)))
    solved = end - best <= EXCESS * max(1, abs(best))  # false for a NaN
    false = answer.claims and not solved and not slope <= STATIONARY * max(1, abs(end))
    row.metrics |= {
        "solved": solved, "claims": answer.claims, "false": false, "steps": answer.steps,
        "evaluations": answer.evaluations, "excess": end - best, "gradient": slope,
    }  # fmt: skip
    if false:
        row.status, row.note = (
            "wrong",
            f"claims success at {end:.6g} with a gradient of {slope:.1e}; best is {best:.6g}",
        )
    elif not solved:
        row.note = f"ends at {end:.6g}, {'stationary' if slope <= STATIONARY * max(1, abs(end)) else 'not stationary'}"


def honesty(rows: Any) -> list[Claim]:
    """That none of ours claims success elsewhere, nor raises."""
    return [
        Claim(
            f"{row.name} {row.note if row.status != 'ok' else 'claims no false success'}", row.status == "ok", True
        )
        for row in rows
        if row.peer == OURS
    ]  # fmt: skip


# ---- what all studies say together -------------------------------------------------------------------------------


def select(outcomes: Mapping[str, Outcome]) -> dict[str, Outcome]:
    """The outcomes of this part that have rows: those of CUTEst, or else the others."""
    of_sources = [
        {id: outcome for id, outcome in outcomes.items() if id.startswith(f"optimizers/{source}/") and outcome.rows}
        for source in SOURCES
    ]
    return next((found for found in of_sources if found), {})


def present(outcomes: Mapping[str, Outcome]) -> list[str]:
    """The solvers that were there for every objective."""
    found = [{row.name for row in outcome.rows if row.status != "absent"} for outcome in outcomes.values()]
    return [solver.name for solver in SOLVERS if all(solver.name in names for names in found)] if found else []


def costs(outcomes: Mapping[str, Outcome], measure: str) -> dict[str, list[float]]:
    """Of each solver the cost of each objective; infinity for one that it does not solve."""
    return {name: [_cost(outcome.row(name), measure) for outcome in outcomes.values()] for name in present(outcomes)}


def _cost(row: Row | None, measure: str) -> float:
    cost = row.metrics.get(measure) if row is not None and row.metrics.get("solved") else None
    return math.inf if cost is None else float(cost)


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """Profiles by time and by evaluations, and what each solver costs where it solves."""
    outcomes = select(outcomes)
    if not outcomes:
        return []
    source = SOURCES[next(iter(outcomes)).split("/")[1]]
    measures = [
        m for m in COSTS if any(math.isfinite(c) for n, row in costs(outcomes, m).items() for c in row if n in PAIRS)
    ]
    drawn = [
        _profile(f"{len(outcomes)} objectives, {source}", order, measure, costs(outcomes, measure))
        for order in ORDERS
        for measure in measures
    ]
    return [*drawn, _scatter(outcomes, source)]


def _profile(problems: str, order: str, measure: str, table: Costs) -> Plot:
    """The profile of the solvers of one order: of Dolan and Moré for times, of Moré and Wild for evaluations."""
    table = {name: row for name, row in table.items() if (name in SECOND) == (order == "second")}
    curves = performance_profile(table) if measure == "seconds" else data_profile(table)
    leader = max(curves, key=lambda name: _area(curves[name])) if curves else "nobody"
    kind, label = COSTS[measure]
    return Plot(
        f"profile-{kind}-{order}",
        f"By {kind}, solvers {ORDERS[order]}: {leader} is ahead",
        label, "share of the problems solved", [Line(name, *curve, "steps") for name, curve in curves.items()],
        y_log=False,
        caption=f"{problems}. Higher is better, and further left. "
        + ("At 1 stands the share on which a solver is the fastest, on the right what it solves at all; Dolan and Moré."
           if measure == "seconds" else "Data profile of Moré and Wild; products with a Hessian are not counted."),
    )  # fmt: skip


def _area(curve: tuple[list[float], list[float]]) -> float:
    """Under a staircase, with a logarithmic axis."""
    x, y = curve
    return sum(y[i] * math.log(x[i + 1] / x[i]) for i in range(len(x) - 1)) or y[-1]


def _scatter(outcomes: Mapping[str, Outcome], source: str) -> Plot:
    """A mark for each solver: how much it solves, and how long it takes where it does."""
    marks = []
    for name, row in costs(outcomes, "seconds").items():
        times = [1e3 * seconds for seconds in row if math.isfinite(seconds)]
        if times:
            marks.append(Line(name, [statistics.median(times)], [len(times) / len(row)], "marks"))
    return Plot(
        "solved", "What each solver solves, and what that takes", "milliseconds, the median of the problems it solves",
        "share of the problems solved", marks, y_log=False,
        caption=f"{len(outcomes)} objectives, {source}. Better is up and to the left.",
    )  # fmt: skip


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """Who solves how many and claims what, and what a compiled loop gains over SciPy's."""
    outcomes = select(outcomes)
    if not outcomes:
        return [Finding("Which minimizer solves most?", "No objective was run.", [])]
    ids = list(outcomes)
    return [
        Finding("Which minimizer solves most, and which claims success elsewhere?", _counts(outcomes), ids),
        Finding("Who is fastest, and where is ours behind?", _fastest(outcomes), ids),
        Finding("How much faster than SciPy's is a compiled solve by the same method?", _pairs(outcomes), ids),
    ]


def _counts(outcomes: Mapping[str, Outcome]) -> str:
    """Solved and false successes of each solver, most solved first."""
    told = []
    for name in present(outcomes):
        rows = [row for outcome in outcomes.values() for row in outcome.rows if row.name == name]
        solved = sum(bool(row.metrics.get("solved")) for row in rows)
        false = sum(bool(row.metrics.get("false")) for row in rows)
        told.append((-solved, f"{name} {solved}" + (f" (false successes: {false})" if false else "")))
    return f"Solved, of {len(outcomes)}: " + "; ".join(text for _, text in sorted(told)) + "."


def _fastest(outcomes: Mapping[str, Outcome]) -> str:
    """The number of objectives on which each solver is the fastest, and on how many a peer beats all of ours."""
    table = costs(outcomes, "seconds")
    wins = dict.fromkeys(table, 0)
    behind = []
    for number, (id, times) in enumerate(zip(outcomes, zip(*table.values(), strict=True), strict=True)):
        if math.isinf(best := min(times)):
            continue
        winner = list(table)[times.index(best)]
        wins[winner] += 1
        mine = min((row[number] for name, row in table.items() if name.startswith(OURS)), default=math.inf)
        if mine > 1.05 * best:
            factor = f"{digits(mine / best)} times" if math.isfinite(mine) else "not solved by ours"
            behind.append(f"{id.split('/')[-1]} ({winner}, {factor})")
    ranks = ", ".join(f"{name} {count}" for name, count in sorted(wins.items(), key=lambda w: -w[1]) if count)
    rest = f" All of ours are behind a peer by more than 5% on {len(behind)}: {', '.join(behind)}." if behind else (
        " On none is the best of ours more than 5% behind a peer.")  # fmt: skip
    return f"Fastest of all on: {ranks or 'none'}.{rest}"


def _pairs(outcomes: Mapping[str, Outcome]) -> str:
    """The ratio of warm times, and both cold times, on the objectives that both solve."""
    told = [text for mine, theirs in PAIRS.items() if (text := _pair(outcomes, mine, theirs))]
    return " ".join(told) or "No pair of methods solved an objective together."


def _pair(outcomes: Mapping[str, Outcome], mine: str, theirs: str) -> str:
    rows = [(outcome.row(mine), outcome.row(theirs)) for outcome in outcomes.values()]
    both = [(a, b) for a, b in rows if a and b and "seconds" in a.metrics and "seconds" in b.metrics]
    if not both:
        return ""
    ratios = [b.metrics["seconds"] / a.metrics["seconds"] for a, b in both]
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    cold = [statistics.median(row.metrics["cold_seconds"] for row in side) for side in zip(*both, strict=True)]
    return (
        f"{mine}: {digits(middle)} times as fast as {theirs} warm (quartiles {digits(low)} to {digits(high)}, least "
        f"{digits(min(ratios))}, {len(both)} objectives), {digits(cold[0])} s against {digits(cold[1])} s cold."
    )
