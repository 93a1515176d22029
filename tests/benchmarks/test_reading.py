"""What suites read from outcomes, on rows made up for the purpose."""

from benchmarks.cases import Outcome, Row
from benchmarks.reading import at_most, comparison, curves, ratios, share


def outcome(n, ours, theirs, floor):
    rows = [
        Row("curvature.x", "curvature", metrics={"ratio": 1.0, "seconds": ours}),
        Row("jax, x", "jax", metrics={"ratio": theirs / ours, "seconds": theirs}),
        Row("wrong, x", "torch", "wrong"),
        Row("floor", "jax", "floor", {"seconds": floor}),
    ]
    return Outcome("X", "mlp", {"n": n}, rows)


def test_a_share_is_of_rows_that_were_right_or_a_floor():
    one = outcome(3, 2.0, 4.0, 1.0)
    assert share(one, "curvature.x", "jax, x") == 0.5
    assert share(one, "curvature.x", "floor") == 2.0
    assert share(one, "curvature.x", "wrong, x") is None


def test_a_claim_holds_or_does_not_and_is_silent_about_absent_rows():
    one = outcome(3, 2.0, 4.0, 1.0)
    assert [claim.holds for claim in at_most(one, "curvature.x", "floor", 2.5)] == [True]
    assert [claim.holds for claim in at_most(one, "curvature.x", "floor", 1.5)] == [False]
    assert at_most(one, "curvature.x", "nobody", 1.5) == []


def test_curves_go_over_the_size_and_leave_wrong_rows_out():
    lines = curves({"s/b/n=9": outcome(9, 3.0, 9.0, 1.0), "s/b/n=3": outcome(3, 2.0, 4.0, 1.0)}, "n")
    assert {line.label: (line.x, line.y) for line in lines}["jax, x"] == ([3, 9], [4.0, 9.0])
    assert {line.label for line in lines} == {"curvature.x", "jax, x", "floor"}


def test_the_comparison_names_right_rows_of_others():
    assert comparison(outcome(3, 2.0, 4.0, 1.0)) == "X: times ours, jax, x 2.00."


def test_ratios_span_all_outcomes_and_leave_out_what_is_missing():
    outcomes = {"a": outcome(3, 2.0, 4.0, 1.0), "b": outcome(9, 3.0, 9.0, 1.0)}
    pairs = {"JAX": ("jax, x", "curvature.x"), "nobody": ("nobody", "curvature.x")}
    assert [f.answer for f in ratios("?", outcomes, pairs)] == ["JAX: 2.00 to 3.00 times (above 1 in 2 of 2)."]
    assert ratios("?", {}, pairs) == []
