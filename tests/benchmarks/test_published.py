"""The committed results of a full run, and the figures that the README quotes of them."""

from pathlib import Path

import pytest

from benchmarks import reading, results
from benchmarks.suites.modes.networks import PRODUCT

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "benchmarks" / "results" / "cpu"

pytestmark = pytest.mark.skipif(not PUBLISHED.exists(), reason="no full run is published yet")


@pytest.fixture(scope="module")
def published():
    return results.load(PUBLISHED / "results.json")


def test_a_full_run_is_published(published):
    assert published.complete
    assert not published.options["quick"]
    assert not [id for id, outcome in published.outcomes.items() for row in outcome.rows if row.status == "wrong"]
    assert not [
        claim for o in published.outcomes.values() for claim in o.claims if claim.correctness and not claim.holds
    ]
    for page in ("summary.md", "index.html"):
        assert published.environment["commit"] in (PUBLISHED / page).read_text()


def span(values):
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return f"{low} to {high} times"


def test_the_readme_quotes_the_published_rows(published):
    readme = " ".join((ROOT / "README.md").read_text().split())
    networks = reading.part(published.outcomes, "modes/hessian/network-")
    mean = {id: race for id, race in networks.items() if race.row("curvature.mean_hessian").status == "ok"}

    def faster(way, races):
        return span([reading.share(race, "jax.hessian", way) for race in races.values()])

    def mebibytes(name):
        return (
            reading.number(networks["modes/hessian/network-30-64-1/n=1984/batch=512"].row(name), "temporary_bytes")
            / 2**20
        )

    products = max(reading.share(race, "curvature.mean_hessian", PRODUCT) for race in mean.values())
    quoted = [
        f"it is {faster('curvature.hessian', networks)} as fast",
        f"{mebibytes('curvature.hessian'):.0f} MiB of temporaries against {mebibytes('jax.hessian'):.0f}",
        f"is {faster('curvature.hessian, by products', networks)} as fast",
        f"{faster('curvature.mean_hessian', mean)} as fast as `jax.hessian`, at most {products:.2g} times the product",
    ]
    assert not [figure for figure in quoted if figure not in readme]
