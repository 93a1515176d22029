"""Profiles of solvers against tables that can be counted by hand, and the order the optimizer suite reads them in."""

import math

import pytest

from benchmarks import runner
from benchmarks.cases import Choice, Outcome, Row
from benchmarks.report import facts
from benchmarks.suites import curves, optimizers, scalar
from benchmarks.suites.scalar import data_profile, performance_profile

# Four problems; nobody solves the last.
COSTS = {"a": [1.0, 6.0, math.inf, math.inf], "b": [4.0, 2.0, 5.0, math.inf]}


def test_performance_profile_counts_ratios_to_the_best():
    # a: 1, 3, inf, inf; b: 4, 1, 1, inf.
    assert performance_profile(COSTS) == {
        "a": ([1.0, 3.0, 4.0], [0.25, 0.5, 0.5]),
        "b": ([1.0, 4.0], [0.5, 0.75]),
    }


def test_performance_profile_does_not_change_with_the_unit():
    scaled = {solver: [1e-6 * cost for cost in row] for solver, row in COSTS.items()}
    for solver, (ratios, shares) in performance_profile(scaled).items():
        assert ratios == pytest.approx(performance_profile(COSTS)[solver][0])
        assert shares == performance_profile(COSTS)[solver][1]


def test_data_profile_counts_costs():
    assert data_profile(COSTS) == {
        "a": ([1.0, 6.0], [0.25, 0.5]),
        "b": ([1.0, 2.0, 4.0, 5.0, 6.0], [0.0, 0.25, 0.5, 0.75, 0.75]),
    }


def test_profiles_of_nothing_solved_are_zero():
    nothing = {"a": [math.inf], "b": [math.inf]}
    for profile in (performance_profile, data_profile):
        assert profile(nothing) == {"a": ([1.0], [0.0]), "b": ([1.0], [0.0])}


def outcome_of(seconds: dict[str, float | None]) -> Outcome:
    """An objective with a time for each solver that solves it; the others are absent or claim a false success."""
    rows = []
    for solver in scalar.SOLVERS:
        time = seconds.get(solver.name)
        metrics = {"solved": True, "seconds": time, "cold_seconds": 1.0} if time else {"solved": False, "false": True}
        status = "absent" if solver.name not in seconds else "ok" if time else "wrong"
        rows.append(Row(solver.name, solver.peer, status, metrics))
    return Outcome(rows=rows)


def test_findings_are_read_off_the_rows():
    outcomes = {
        "optimizers/mgh/one": outcome_of({"curvature bfgs": 1e-3, "SciPy BFGS": 8e-3, "optax.lbfgs": None}),
        "optimizers/mgh/two": outcome_of({"curvature bfgs": 3e-3, "SciPy BFGS": 9e-3, "optax.lbfgs": 1e-3}),
    }
    counts, fastest, pairs = (finding.answer for finding in scalar.findings(outcomes))
    assert "curvature bfgs 2;" in counts
    assert "optax.lbfgs 1 (false successes: 1)" in counts
    assert "two (optax.lbfgs, 3.00 times)" in fastest
    assert "one (" not in fastest
    assert "5.50 times as fast as SciPy BFGS warm" in pairs
    assert len({plot.name for plot in scalar.plots(outcomes)}) == len(scalar.plots(outcomes))


def test_a_run_of_nothing_says_so():
    assert optimizers.plots({}) == []
    assert all("not run" in finding.answer or "No objective" in finding.answer for finding in optimizers.findings({}))


@pytest.mark.parametrize("quick", [True, False])
def test_cases_have_ids_of_their_own(quick):
    ids = [case.id for case in optimizers.cases(Choice(quick=quick, dtype="float64"))]
    assert len(set(ids)) == len(ids)
    assert all(id.startswith("optimizers/") for id in ids)


@pytest.mark.parametrize("slope", [1e-9, 1e-3])
def test_no_curve_ends_at_a_minimum_where_its_gradient_does_not_vanish(slope):
    outcome = Outcome(
        rows=[Row("curvature newton", "curvature"), Row("optax.adam", "optax")],
        series={
            "curvature newton": [[0.0, 0.1, 2.0, 1.0], [1.0, 0.2, 1.0, slope]],
            "optax.adam": [[0.0, 0.1, 2.0, 1.0], [9.0, 0.3, 1.5, 1.0]],
        },
    )
    curves.compare(outcome)
    found = {"optimizers/curves/regression": outcome}
    drawn = {plot.title.split(" on ")[0] for plot in curves.plots(found)}
    (finding,) = curves.curve_findings(found)
    if slope < curves.STATIONARY:
        assert [row.metrics["steps_to_close"] for row in outcome.rows] == [1.0, None]
        assert drawn == {"Convergence", "Gradient"}
        assert "curvature newton 200 ms, at most 1 steps. Not there" in finding.answer
    else:
        assert [row.metrics["steps_to_close"] for row in outcome.rows] == [None, None]
        assert drawn == {"Gradient"}
        assert "digits: nobody. Not there" in finding.answer


def test_minimizers_are_set_against_the_fastest_of_ours():
    times = {"curvature": 3.0, "curvature too": 2.0, "scipy": 1.0}
    rows = [Row(name, name.split()[0], metrics={"seconds": seconds}) for name, seconds in times.items()]
    unsolved = Row("optax", "optax", metrics={"solved": False})
    runner.relate([*rows, unsolved], to_fastest=True)
    assert [row.metrics["ratio"] for row in rows] == [1.5, 1.0, 0.5]
    assert "ratio" not in unsolved.metrics
    assert facts.ours(Outcome(rows=rows)) is rows[1]
    assert [entry.peer.name for entry in facts.behind({"optimizers/made/up": Outcome(rows=rows)})] == ["scipy"]
    alone = Outcome(rows=[Row("scipy", "scipy", metrics={"seconds": 1.0})])
    runner.relate(alone.rows, to_fastest=True)
    assert facts.lost({"a": alone, "b": Outcome(rows=rows)}) == ["a"]
