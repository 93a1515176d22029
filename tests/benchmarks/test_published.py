"""The committed results of a full run, and the figures that the README quotes of them."""

from pathlib import Path

import pytest

from benchmarks import reading, results
from benchmarks.cases import OURS
from benchmarks.report import facts
from benchmarks.suites import SUITES
from benchmarks.suites.modes.networks import PRODUCT

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "benchmarks" / "results" / "cpu"


@pytest.fixture(scope="module")
def published():
    return results.load(PUBLISHED / "results.json")


def test_a_full_run_is_published_in_which_all_of_ours_is_right(published):
    assert published.complete
    assert not published.options["quick"]
    assert {id.split("/")[0] for id in published.outcomes} == set(SUITES)
    every = published.outcomes.items()
    assert not [(id, c.text) for id, outcome in every for c in outcome.claims if c.correctness and not c.holds]
    rows = [(id, row) for id, outcome in every for row in outcome.rows]
    assert not [(id, row.name) for id, row in rows if row.status == "wrong" and row.peer == OURS]
    assert not [(id, row.name) for id, row in rows if row.status == "absent"]
    for page in ("summary.md", "index.html"):
        assert published.environment["commit"] in (PUBLISHED / page).read_text()


def test_each_row_that_ours_is_behind_has_its_reason(published):
    behind = facts.behind(published.outcomes)
    assert not [f"{entry.id}: {entry.peer.name}" for entry in behind if not entry.note]


def span(values):
    return f"{min(values):.2g} to {max(values):.2g} times"


def test_the_readme_quotes_the_published_rows(published):
    readme = " ".join((ROOT / "README.md").read_text().split())
    every = reading.part(published.outcomes, "modes/hessian/")
    networks = reading.part(every, "modes/hessian/network-")
    others = {id: race for id, race in every.items() if id not in networks}
    mean = {id: race for id, race in networks.items() if race.row("curvature.mean_hessian").status == "ok"}
    largest = networks["modes/hessian/network-30-64-1/n=1984/batch=512"]

    def faster(way, races):
        shares = [reading.share(race, "jax.hessian", way) for race in races.values()]
        return span([share for share in shares if share is not None])  # some are there for one mode only

    def mebibytes(name):
        return f"{reading.number(largest.row(name), 'temporary_bytes') / 2**20:.0f}"

    mean_gradient = "one gradient of the mean"
    gradients = [
        share
        for what, way in (("norms", "curvature.per_example_grad_norm"), ("clipped-mean", "curvature.clipped_grad"))
        for race in reading.part(published.outcomes, f"per_example/{what}/").values()
        if (share := reading.share(race, way, mean_gradient)) is not None
    ]
    products = max(reading.share(race, "curvature.mean_hessian", PRODUCT) for race in mean.values())
    quoted = [
        f"it is {faster('curvature.hessian', networks)} as fast",
        f"{mebibytes('curvature.hessian')} MiB of temporaries against {mebibytes('jax.hessian')}",
        f"that is {faster('curvature.hessian, by products', networks)} as fast",
        f"On other models `hessian` is {faster('curvature.hessian', others)} as fast",
        f"{faster('curvature.mean_hessian', mean)} as fast as `jax.hessian` on these networks, at most {products:.2g} "
        f"times the product of matrices that it cannot do without; {faster('curvature.mean_hessian', others)} on other",
        f"cost {span(gradients).removesuffix(' times')} gradients",
    ]
    assert not [figure for figure in quoted if figure not in readme]
