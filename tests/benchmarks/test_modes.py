"""The suites of modes and folklore: their cases, the crossover, and findings from whatever rows there are."""

import math

import pytest

from benchmarks import reading
from benchmarks.cases import Choice, Outcome, Row
from benchmarks.report import facts
from benchmarks.suites import folklore, modes


def outcome(sizes=None, **seconds):
    """One whose rows took so long; a first underscore of a name stands for a point."""
    rows = [
        Row(name.replace("_", ".", 1), name.split("_")[0], metrics={"seconds": s, "low": s})
        for name, s in seconds.items()
    ]
    return Outcome(sizes=sizes or {}, rows=rows)


@pytest.mark.parametrize("suite", [modes, folklore])
@pytest.mark.parametrize("quick", [False, True])
def test_cases_have_ids_of_their_own(suite, quick):
    ids = [case.id for case in suite.cases(Choice(quick=quick))]
    assert len(ids) == len(set(ids)) > 3
    assert len({id.split("/")[0] for id in ids}) == 1


@pytest.mark.parametrize("suite", [modes, folklore])
def test_rows_that_are_missing_fail_nothing(suite):
    empty = {case.id: Outcome(sizes=dict(case.sizes)) for case in suite.cases(Choice())}
    for outcomes in ({}, empty):
        name = suite.__name__.split(".")[-1]
        assert facts.plots(name, outcomes) == []
        for finding in facts.findings(name, outcomes):
            assert finding.question
            assert finding.answer


def test_crossover_is_found_between_two_shapes():
    """Forward takes 4 / sqrt(ratio) of the time of reverse: they meet at a ratio of 16."""
    races = {
        f"modes/jacobian/m={m}": outcome(
            {"m": m, "n": 4096 / m, "m/n": m * m / 4096}, jax_jacfwd=4 / math.sqrt(m * m / 4096), jax_jacrev=1.0
        )
        for m in (16, 64, 512, 1024)
    }
    assert modes.crossover(races, "jax.jacfwd", "jax.jacrev") == pytest.approx(16)
    assert modes.crossover(races, "torch.func.jacfwd", "torch.func.jacrev") is None
    assert "m/n = 16" in modes.jacobian_finding(races)[0].answer
    assert "m/n = 16" in modes.jacobian_plots(races)[0].title


def test_regret_is_against_the_best_by_hand():
    (claim,) = modes.regret("Jacobian", outcome(curvature_jacobian=1.2, jax_jacfwd=1.0, jax_jacrev=9.0))
    assert "1.20 times" in claim.text
    assert "jax.jacfwd" in claim.text
    assert not claim.holds
    (claim,) = modes.regret("Jacobian", outcome(curvature_jacobian=1.0, jax_jacfwd=1.0))
    assert claim.holds
    assert modes.regret("Jacobian", outcome(jax_jacfwd=1.0)) == []


def test_higher_orders_are_held_against_jax():
    races = {
        f"folklore/higher/scalar/points=1/order={order}": outcome(
            {"order": order}, jax_nested=1e-6, torch_nested=factor * 1e-6
        )
        for order, factor in ((1, 10.0), (2, 200.0))
    }
    (answer,) = (finding.answer for finding in folklore.findings(races))
    assert "torch over JAX: 10.0 at order 1, 200 at order 2; it holds at order 2." in answer


def test_curves_need_two_points():
    races = {"a": outcome({"n": 2.0}, jax_grad=1.0, torch_grad=1.0), "b": outcome({"n": 1.0}, jax_grad=3.0)}
    (line,) = reading.curves(races, "n")
    assert (line.label, line.x, line.y) == ("jax.grad", [1.0, 2.0], [3.0, 1.0])
