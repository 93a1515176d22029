"""The examples of ``benchmarks/README.md``: short, and they run as they stand there."""

import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from benchmarks import models, peers, report
from benchmarks.cases import Choice, Race
from benchmarks.peers import jax_ways

README = Path(report.__file__).parents[1] / "README.md"


@pytest.fixture(autouse=True)
def standard_promotion():
    """Benchmarks speak to JAX as it comes."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def example(name: str) -> str:
    """The code below a mark of the README."""
    return re.search(rf"<!-- {name} -->\n```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)


@pytest.fixture
def poisson(monkeypatch):
    """The model of the README, among the others."""
    monkeypatch.setitem(models.MODELS, "poisson", None)
    exec(example("model"), dict(vars(models)))
    return models.MODELS["poisson"]()


@pytest.mark.parametrize("name", ["model", "peer", "suite"])
def test_each_takes_less_than_thirty_lines(name):
    assert len([line for line in example(name).splitlines() if line]) < 30


def test_the_model_has_a_gradient(poisson):
    gradient = jax_ways.reference(poisson, "gradient")
    x, batch = poisson.pack(poisson.params()), poisson.batch
    residual = np.exp(batch[0] @ x[:-1] + x[-1]) - batch[1]
    np.testing.assert_allclose(gradient, np.append(batch[0].T @ residual, residual.sum()) / len(residual), rtol=1e-12)


def test_the_peer_races(poisson, only, run, monkeypatch):
    monkeypatch.setitem(peers.PACKAGES, "numpy", None)
    module = {}
    exec(example("peer"), module)
    reference = jax_ways.reference(poisson, "gradient")
    race = Race("toy/gradient", "Gradient", "poisson", lambda: [module["gradient"](poisson)], lambda: reference, 1e-6,
                budget=1e-3, rounds=1)  # fmt: skip
    only(SimpleNamespace(TITLE="Toy", QUESTION="?", cases=lambda choice: [race]))
    _, found = run()
    row = found.outcomes["toy/gradient"].rows[0]
    assert (row.status, row.peer) == ("ok", "numpy")
    assert found.environment["packages"]["numpy"] == np.__version__


def test_the_suite_runs(only, run, report):
    module = {}
    exec(example("suite"), module)
    suite = SimpleNamespace(**{**module, "cases": lambda choice: list(module["cases"](choice))[:1]})
    only(suite, "logistic")
    code, found = run("--quick")
    assert code == 0
    assert [row.status for row in found.outcomes["logistic/hessian/n=10"].rows] == ["ok", "ok"]
    assert re.search(r"How long does jax.hessian take\?</strong> \d+\.\d\d to \d+\.\d\d times", report().page)
    assert len(list(module["cases"](Choice()))) == 3
