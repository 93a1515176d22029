"""The committed results of a full run, and the figures that the README quotes of them."""

import re
import statistics
from pathlib import Path

import pytest

from benchmarks import reading, report, results
from benchmarks.cases import OURS
from benchmarks.report import facts, plots
from benchmarks.solvers import PAIRS
from benchmarks.suites import SUITES

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "benchmarks" / "results" / "cpu"


@pytest.fixture(scope="module")
def published():
    return results.load(PUBLISHED / results.NAME)


def test_a_full_run_is_published_in_which_all_of_ours_is_right(published):
    assert published.complete
    assert not published.options["quick"]
    assert {id.split("/")[0] for id in published.outcomes} == set(SUITES)
    every = published.outcomes.items()
    assert not [(id, c.text) for id, outcome in every for c in outcome.claims if c.correctness and not c.holds]
    rows = [(id, row) for id, outcome in every for row in outcome.rows]
    assert not [(id, row.name) for id, row in rows if row.status == "wrong" and row.peer == OURS]
    assert not [(id, row.name) for id, row in rows if row.status == "absent"]


def test_the_summary_and_the_pictures_are_those_of_the_published_rows(published):
    headlines = plots.headlines(published.outcomes)
    assert (PUBLISHED / "summary.md").read_text() == report.render("summary.md", published, headlines=headlines)
    assert {file.name for file in PUBLISHED.iterdir()} - {"index.html"} == {
        "summary.md", "results.json.gz", "hessians.svg", "optimizers.svg", "per_example.svg",
    }  # fmt: skip
    assert [plot.name for plot in headlines] == ["hessians", "optimizers", "per_example"]
    committed = [file for file in PUBLISHED.iterdir() if file.name != "index.html"]
    assert sum(file.stat().st_size for file in committed) < 1_000_000
    assert len((PUBLISHED / "summary.md").read_text()) < 60_000, "of a length that is read"


def test_each_row_that_ours_is_behind_has_its_reason(published):
    behind = facts.behind(published.outcomes)
    assert not [f"{entry.id}: {entry.peer.name}" for entry in behind if not entry.note]


def test_the_readme_quotes_the_published_rows(published):
    readme = " ".join((ROOT / "README.md").read_text().split())
    every = reading.part(published.outcomes, "modes/hessian/")
    networks = reading.part(every, "modes/hessian/network-")
    others = {id: race for id, race in every.items() if id not in networks}
    sizes = [race.sizes["n"] for race in networks.values()]
    objectives = reading.part(published.outcomes, "optimizers/cutest/")
    medians = []
    for pair in PAIRS.items():
        rows = [[outcome.row(name) for name in pair] for outcome in objectives.values()]
        times = [
            [row.metrics["seconds"] for row in both] for both in rows if all(r and r.metrics["solved"] for r in both)
        ]
        medians.append(statistics.median(theirs / ours for ours, theirs in times))
    mean = "one gradient of the mean"
    gradients = [
        share
        for what, way in (("norms", "curvature.per_example_grad_norm"), ("clipped-mean", "curvature.clipped_grad"))
        for share in reading.shares(reading.part(published.outcomes, f"per_example/{what}/"), way, mean)
    ]
    quoted = [
        f"| `hessian` of tanh networks with {min(sizes)} to {max(sizes):,} parameters | `jax.hessian` | "
        f"{span(reading.shares(networks, 'jax.hessian', 'curvature.hessian'))} |",
        f"| `minimize`, five methods on CUTEst problems, median, warm | the same method of SciPy | {span(medians)} |",
        f"cost {span(gradients)} |",
        f"On other models `hessian` is {span(reading.shares(others, 'jax.hessian', 'curvature.hessian'))} times as",
    ]
    assert not [figure for figure in quoted if figure not in readme]


def span(values):
    return f"{min(values):.2g} to {max(values):.2g}"


def test_the_picture_of_the_readme_is_there():
    (source,) = re.findall(r"!\[[^\]]+\]\((benchmarks/results/[^)]+)\)", (ROOT / "README.md").read_text())
    assert (ROOT / source).read_text().startswith("<?xml")
