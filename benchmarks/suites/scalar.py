"""Every solver on every objective, a race for each objective: who solves it, who says so truly, at what cost.

The objectives are those of CUTEst by way of sif2jax, or the sums of squares of Moré, Garbow and Hillstrom.

References: Dolan and Moré (2002), doi:10.1007/s101070100263; Moré and Wild (2009), doi:10.1137/080724083.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks import cutest, mgh, peers
from benchmarks.cases import OURS, Case, Choice, Contestant, Finding, Line, Outcome, Outcomes, Plot, Race, Row
from benchmarks.solvers import GTOL, PAIRS, SOLVERS, Answer, Solver
from benchmarks.timing import digits

SOURCES = {"cutest": "CUTEst without constraints, n <= 50", "mgh": "Moré, Garbow and Hillstrom, sums of squares"}
THINNED = 3  # with all of them an hour goes into compilation; ``--models cutest`` takes it
QUICK = ("rosenbrock", "wood")
EXCESS = 1e-6  # over the best value known, relative to it where it is larger than one: solved
STATIONARY = 100 * GTOL  # the largest entry of a gradient, relative to the value in the same way
CAPTION = (
    f"Solved: within {EXCESS:.0e} max(1, |best|) of the best value known. A false success is one that is claimed where "
    f"nothing is solved and an entry of the gradient, recomputed, exceeds {STATIONARY:.0e} max(1, |value|). "
    "Evaluations are points at which the objective, with or without derivatives, is computed; products with a Hessian "
    "are in no count. Only who solves the problem is timed: warm, with the best of what each library has to compile, "
    "and compared with the fastest of ours."
)
ORDERS = {"second": "with second derivatives", "first": "with first derivatives only"}
Costs = Mapping[str, Sequence[float]]  # of each solver, the costs of the problems; infinity for one not solved
Curve = tuple[list[float], list[float]]
Loaded = tuple[Callable[..., Any], jax.Array, Any]  # ``fun(x, args)``, where it starts, and ``args``


@dataclass(frozen=True)
class Problem:
    """An objective before ``load`` builds it, with the least value known: importing CUTEst takes a minute."""

    name: str
    source: str
    n: int
    best: float | None
    load: Callable[[], Loaded]


def chosen(choice: Choice) -> list[Problem]:
    """A few of Moré, Garbow and Hillstrom for a quick run; else of CUTEst, or the former where that is absent."""
    if choice.quick or not peers.is_installed("sif2jax"):
        return [
            Problem(p.name, "mgh", len(p.start), min(p.minima), functools.partial(_squares, p))
            for p in mgh.PROBLEMS
            if p.name in QUICK or not choice.quick
        ]
    known = [(name, entry) for name, entry in sorted(cutest.known().items()) if entry["best"] is not None]
    found = [Problem(n, "cutest", e["n"], e["best"], functools.partial(_cutest, n)) for n, e in known]
    return found if "cutest" in choice.models else found[::THINNED]


def _squares(problem: mgh.Problem) -> Loaded:
    return lambda x, _: jnp.sum(problem.residuals(x) ** 2), jnp.asarray(problem.start, float), None


def _cutest(name: str) -> Loaded:
    import sif2jax

    return flattened(next(p for p in sif2jax.unconstrained_minimisation_problems if type(p).__name__ == name))


def flattened(problem: Any) -> Loaded:
    x0, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem.y0))
    return lambda x, args: problem.objective(unravel(x), args), x0, problem.args


def cases(choice: Choice) -> Iterator[Case]:
    solvers = [solver for solver in SOLVERS if solver.quick or not choice.quick]
    for problem in chosen(choice):
        yield race(problem, solvers, choice.quick, budget=0.03 if choice.quick else 0.1, rounds=3)


def race(problem: Problem, solvers: Sequence[Solver], quick: bool, **how: Any) -> Race:
    """Each solver once; the answers are judged, and those that solve the problem take turns."""
    load, by_name = functools.cache(problem.load), {solver.name: solver for solver in solvers}
    value_and_grad = functools.cache(lambda: jax.jit(jax.value_and_grad(load()[0])))  # one program for all answers

    def contestants() -> Iterator[Contestant]:
        for solver in solvers:
            make = functools.partial(solver.build, *load())
            yield Contestant(solver.name, solver.peer, make=make, read=lambda found: Answer(*found))

    def judge(row: Row, answer: Answer, cold: float) -> bool:
        """Record where the solver ended, by the value and the gradient recomputed there; whether that is solved."""
        fun, x0, args = load()
        value, grad = value_and_grad()(jnp.asarray(answer.x), args)
        end, slope = float(value), float(jnp.max(jnp.abs(grad)))
        best = math.nan if problem.best is None else problem.best
        solved = end - best <= EXCESS * max(1, abs(best))  # false for a NaN
        stationary = slope <= STATIONARY * max(1, abs(end))
        false = bool(answer.claims) and not solved and not stationary
        evaluations, solver = answer.evaluations, by_name[row.name]
        if solved and not quick and not solver.counts:  # it compiles once more
            evaluations = solver.count(fun, x0, args)
        row.metrics |= {
            "cold_seconds": cold, "solved": solved, "claims": bool(answer.claims), "false": false,
            "steps": int(answer.steps), "evaluations": None if evaluations is None else int(evaluations),
            "excess": end - best, "gradient": slope,
        }  # fmt: skip
        if false:
            row.status = "wrong"
            row.note = f"claims success at {end:.6g} with a gradient of {slope:.1e}; best is {best:.6g}"
        elif not solved:
            row.note = f"ends at {end:.6g}, {'stationary' if stationary else 'not stationary'}"
        return solved

    id = f"optimizers/{problem.source}/{problem.name.replace(' ', '-').replace(',', '')}"
    title = f"{problem.name}, {problem.n} variables"
    return Race(id, title, problem.source, contestants, sizes={"n": problem.n}, judge=judge, caption=CAPTION, **how)


def performance_profile(costs: Costs) -> dict[str, Curve]:
    """The share of the problems that each solver solves at no more than ``tau`` times the least cost of all solvers.

    ``rho_s(tau) = |{p : t_ps <= tau min_s t_ps}| / |P|``, Dolan and Moré (2002), (2.1) and (2.2). A problem that no
    solver solves stays in the count. All costs are positive.
    """
    least = [min(of_problem) for of_problem in zip(*costs.values(), strict=True)]
    return data_profile(
        {
            solver: [cost / best if math.isfinite(cost) else math.inf for cost, best in zip(row, least, strict=True)]
            for solver, row in costs.items()
        }
    )


def data_profile(costs: Costs) -> dict[str, Curve]:
    """The share of the problems that each solver solves at a cost of at most ``alpha``.

    ``d_s(alpha) = |{p : t_ps <= alpha}| / |P|``, Moré and Wild (2009), (2.3), without their division of the cost by
    ``n_p + 1``: that counts gradients by differences, and here a gradient comes with an evaluation.
    """
    end = max((cost for row in costs.values() for cost in row if math.isfinite(cost)), default=1.0)
    found = {}
    for solver, row in costs.items():
        stairs = sorted({1.0, max(1.0, end), *(cost for cost in row if 1.0 < cost < math.inf)})
        found[solver] = stairs, [sum(cost <= x for cost in row) / max(len(row), 1) for x in stairs]
    return found


def select(outcomes: Outcomes) -> dict[str, Outcome]:
    """The outcomes of this part that have rows: those of CUTEst, or else the others."""
    of_sources = (
        {id: outcome for id, outcome in outcomes.items() if id.startswith(f"optimizers/{source}/") and outcome.rows}
        for source in SOURCES
    )
    return next(filter(None, of_sources), {})


def costs(outcomes: Outcomes, measure: str) -> dict[str, list[float]]:
    """The costs of the objectives, by solver, of those that were there for every objective."""

    def cost(row: Row | None) -> float:
        found = row.metrics.get(measure) if row is not None and row.metrics.get("solved") else None
        return math.inf if found is None else float(found)

    found = [{row.name for row in outcome.rows if row.status != "absent"} for outcome in outcomes.values()]
    present = [solver.name for solver in SOLVERS if found and all(solver.name in names for names in found)]
    return {name: [cost(outcome.row(name)) for outcome in outcomes.values()] for name in present}


def plots(outcomes: Outcomes) -> list[Plot]:
    """For each order of derivatives the profiles of Dolan and Moré, by time, and of Moré and Wild, by evaluations."""
    outcomes = select(outcomes)
    if not outcomes:
        return []
    problems = f"{len(outcomes)} objectives, {SOURCES[next(iter(outcomes)).split('/')[1]]}"
    share = "share of the problems solved"
    times, evaluations, found = costs(outcomes, "seconds"), costs(outcomes, "evaluations"), []
    kinds = (
        ("time", times, performance_profile, "times the least time of all that are drawn",
         "At 1 stands the share on which a solver is the fastest, on the right what it solves at all; Dolan and Moré."),
        ("evaluations", evaluations, data_profile, "evaluations of the objective",
         "Data profile of Moré and Wild; products with a Hessian are not counted."),
    )  # fmt: skip
    for order, words in ORDERS.items():
        names = {solver.name for solver in SOLVERS if solver.second == (order == "second")}
        for word, table, profile, label, meaning in kinds:
            if any(math.isfinite(cost) for name in PAIRS.keys() & table.keys() for cost in table[name]):
                drawn = profile({name: row for name, row in table.items() if name in names})
                leader = max(drawn, key=lambda name, drawn=drawn: _area(drawn[name]), default="nobody")
                lines = [Line(name, *curve, "steps") for name, curve in drawn.items()]
                title = f"By {word}, solvers {words}: {leader} is ahead"
                caption = f"{problems}. Higher is better, and further left. {meaning}"
                found.append(Plot(f"profile-{word}-{order}", title, label, share, lines, y_log=False, caption=caption))
    marks = []
    for name, row in times.items():
        if finite := [1e3 * seconds for seconds in row if math.isfinite(seconds)]:
            marks.append(Line(name, [statistics.median(finite)], [len(finite) / len(row)], "marks"))
    title, label = "What each solver solves, and what that takes", "milliseconds, the median of the problems it solves"
    caption = f"{problems}. Better is up and to the left."
    return [*found, Plot("solved", title, label, share, marks, y_log=False, caption=caption)]


def _area(curve: Curve) -> float:
    """Under a staircase, with a logarithmic axis."""
    x, y = curve
    return sum(y[i] * math.log(x[i + 1] / x[i]) for i in range(len(x) - 1)) or y[-1]


def findings(outcomes: Outcomes) -> list[Finding]:
    outcomes = select(outcomes)
    if not outcomes:
        return [Finding("Which minimizer solves most?", "No objective was run.")]
    pairs = " ".join(text for mine, theirs in PAIRS.items() if (text := pair(outcomes, mine, theirs)))
    return [
        Finding("Which minimizer solves most, and which claims success elsewhere?", _counts(outcomes)),
        Finding("Who is fastest, and where is ours behind?", _fastest(outcomes)),
        Finding("How much faster than SciPy's is a compiled solve by the same method?",
                pairs or "No pair of methods solved an objective together."),
    ]  # fmt: skip


def _counts(outcomes: Outcomes) -> str:
    said = []
    for name in costs(outcomes, "seconds"):
        rows = [row for outcome in outcomes.values() for row in outcome.rows if row.name == name]
        solved, false = (sum(bool(row.metrics.get(key)) for row in rows) for key in ("solved", "false"))
        said.append((-solved, f"{name} {solved}" + (f" (false successes: {false})" if false else "")))
    return f"Solved, of {len(outcomes)}: " + "; ".join(text for _, text in sorted(said)) + "."


def _fastest(outcomes: Outcomes) -> str:
    """The number of objectives on which each solver is the fastest, and on how many a peer beats all of ours."""
    table = costs(outcomes, "seconds")
    wins, behind = dict.fromkeys(table, 0), []
    for number, id in enumerate(outcomes):
        times = {name: row[number] for name, row in table.items()}
        winner = min(times, key=lambda name: times[name], default="")
        if not winner or math.isinf(times[winner]):
            continue
        wins[winner] += 1
        mine = min((seconds for name, seconds in times.items() if name.startswith(OURS)), default=math.inf)
        if mine > 1.05 * times[winner]:
            factor = f"{digits(mine / times[winner])} times" if math.isfinite(mine) else "not solved by ours"
            behind.append(f"{id.split('/')[-1]} ({winner}, {factor})")
    ranks = ", ".join(f"{name} {count}" for name, count in sorted(wins.items(), key=lambda w: -w[1]) if count)
    rest = f" All of ours are behind a peer by more than 5% on {len(behind)}: {', '.join(behind)}." if behind else (
        " On none is the best of ours more than 5% behind a peer.")  # fmt: skip
    return f"Fastest of all on: {ranks or 'none'}.{rest}"


def pair(outcomes: Outcomes, mine: str, theirs: str) -> str:
    """The ratio of warm times, and both cold times, on the objectives that both solve; empty where there are none."""
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
