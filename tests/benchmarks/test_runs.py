"""A run: what becomes of contestants that are wrong, raise or are not there, and of a run that is cut off."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers, results, runner
from benchmarks.cases import Choice, Contestant, Outcome, Race, Study
from benchmarks.suites import SUITES
from tests.benchmarks import made_up

X = np.arange(3.0)


def contestant(name, peer, answer, **options):
    """Answers the same each time, without a compiler."""
    return Contestant(name, peer, make=lambda: lambda: answer, **options)


def race(*contestants, id="toy/square/mlp"):
    """Who squares X?"""
    return Race(id, "Squares", "mlp", lambda: contestants, lambda: X**2, 1e-5, {"n": 3}, budget=1e-3, rounds=1)


def suite(*cases):
    return SimpleNamespace(TITLE="Toy", QUESTION="Who squares?", cases=lambda choice: list(cases))


def broken():
    raise RuntimeError("no such luck")


OURS = contestant("curvature.square", "curvature", X**2)


@pytest.mark.parametrize(
    ("planted", "why"),
    [
        (X**2 + [0, 0, 1e-3], "differs from the reference by 2.5e-04 of it; 1e-05 is allowed"),
        (X**2 + np.nan, "differs from the reference by nan of it"),
        (X[:2] ** 2, "the answer has shapes [(2,)], the reference [(3,)]"),
    ],
    ids=["perturbed", "nan", "shape"],
)
def test_a_wrong_contestant_is_wrong_and_has_no_time(only, run, report, planted, why):
    only(suite(race(OURS, contestant("jax, planted", "jax", planted))))
    code, found = run()
    assert code == 0, "the peer is wrong, not ours"
    ours, wrong = found.outcomes["toy/square/mlp"].rows
    assert ours.status == "ok"
    assert ours.metrics["seconds"] > 0
    assert wrong.status == "wrong"
    assert why in wrong.note
    assert not {"seconds", "ratio"} & set(wrong.metrics)
    assert '<tr class="wrong"><td class="text">jax, planted <span class="badge">WRONG</span>' in report().page
    assert "| Squares | " in report().summary
    assert "| wrong |" in report().summary
    assert "1 answer was wrong" in report().page


def test_a_compiled_contestant_is_checked_as_well(only, run):
    args = (jnp.arange(3.0),)
    right = Contestant("curvature.square", "curvature", lambda x: x**2, args)
    wrong = Contestant("jax, planted", "jax", lambda x: x**2 + 1, args)
    only(suite(race(right, wrong)))
    _, found = run("--dtype", "float64")
    ours, planted = found.outcomes["toy/square/mlp"].rows
    assert (ours.status, planted.status) == ("ok", "wrong")
    assert ours.metrics["compile_seconds"] > 0


def test_a_contestant_for_the_cpu_is_no_rival_on_a_gpu(monkeypatch):
    monkeypatch.setattr(runner.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(peers, "is_installed", lambda name: True)
    contestants = [contestant("curvature.square", "curvature", X), contestant("torch", "torch", X, only_cpu=True)]
    rows = runner.race(Race("toy/gpu", "", "", lambda: contestants, lambda: X, 1e-6, budget=0.01), print).rows
    assert [row.status for row in rows] == ["ok", "absent"]
    assert "CPU only" in rows[1].note


def test_the_cost_of_one_piece_is_told():
    args = (np.arange(1000.0, dtype=np.float32),)
    whole = Contestant("curvature.square", "curvature", lambda x: x**2, args)
    part = Contestant("curvature.square, in four", "curvature", lambda x: x**2, args, pieces=4)
    case = Race("toy/pieces", "", "", lambda: [whole, part], lambda: args[0] ** 2, 1e-6, budget=0.01, rounds=1)
    rows = runner.race(case, lambda line: None).rows
    for name in ("flops", "bytes"):
        assert rows[0].metrics[name] == 4 * rows[1].metrics[name] > 0


def test_an_answer_of_ours_that_is_wrong_fails_the_run(only, run, capsys):
    only(suite(race(contestant("curvature.square", "curvature", X), contestant("jax", "jax", X**2))))
    code, found = run()
    assert code == 1
    assert found.outcomes["toy/square/mlp"].rows[1].metrics["ratio"] is None
    assert "WRONG  curvature.square wrong" in capsys.readouterr().out


def test_one_that_raises_stops_nobody(only, run, report):
    early = Contestant("jax, at once", "jax", make=broken)
    calls = iter([X**2])
    late = Contestant("jax, while timed", "jax", make=lambda: lambda: next(calls))
    only(suite(race(OURS, early, late, contestant("scipy", "scipy", X**2))))
    code, found = run()
    rows = {row.name: row for row in found.outcomes["toy/square/mlp"].rows}
    assert code == 0
    assert [row.status for row in rows.values()] == ["ok", "failed", "failed", "ok"]
    assert rows["jax, at once"].note == "RuntimeError: no such luck"
    assert "RuntimeError: no such luck" in report().page


def test_a_study_that_raises_fails_the_run(only, run):
    only(suite(Study("toy/study", "A study", "mlp", lambda report: broken()), race(OURS)))
    code, found = run()
    assert code == 1
    assert list(found.outcomes) == ["toy/study", "toy/square/mlp"]
    assert "no such luck" in found.outcomes["toy/study"].claims[0].text


def test_a_library_that_is_not_installed_is_absent(only, run, report, monkeypatch):
    monkeypatch.setitem(peers.PACKAGES, "folx", ("no_such_module", "no-such-package"))
    only(suite(race(OURS, Contestant("folx.square", "folx", make=broken))))
    code, found = run()
    row = found.outcomes["toy/square/mlp"].rows[1]
    assert (code, row.status, row.note) == (0, "absent", "folx is not installed")
    assert found.environment["packages"]["folx"] is None
    assert 'folx.square <span class="badge">absent</span>' in report().page


class CutOff:
    """Three studies, of which the second is interrupted the first time."""

    def __init__(self):
        self.ran = []

    def case(self, name, interrupted=False):
        def measure(report):
            self.ran.append(name)
            if interrupted and self.ran.count(name) == 1:
                raise KeyboardInterrupt
            return Outcome()

        return Study(f"toy/{name}", name, "mlp", measure)

    def cases(self, choice):
        return [self.case("one"), self.case("two", interrupted=True), self.case("three")]


@pytest.fixture
def cut_off(only, run, capsys):
    """A run that was stopped in its second case."""
    suite = CutOff()
    only(suite)
    code, found = run("--quick")
    assert code == 130
    assert list(found.outcomes) == ["toy/one"]
    assert not found.complete
    assert "the same command does the rest" in " ".join(capsys.readouterr().out.split())
    return suite


def test_a_run_is_taken_up_where_it_stopped(cut_off, run):
    code, found = run("--quick")
    assert code == 0
    assert cut_off.ran == ["one", "two", "two", "three"]
    assert list(found.outcomes) == ["toy/one", "toy/two", "toy/three"]
    assert found.complete
    run("--quick")
    assert len(cut_off.ran) == 7, "a run that came to its end is not taken up"


@pytest.mark.parametrize("option", [["--quick", "--fresh"], [], ["--quick", "--dtype", "float64"]])
def test_a_run_with_other_options_begins_anew(cut_off, run, option):
    run(*option)
    assert cut_off.ran == ["one", "two", "one", "two", "three"]


def test_the_report_is_made_again_without_running(cut_off, run, report, tmp_path):
    assert not (tmp_path / "index.html").exists()
    code, _ = run("--only-report")
    assert code == 0
    assert "cut off before its end" in report().summary
    assert cut_off.ran == ["one", "two"]


def test_results_come_back_as_they_were_saved(tmp_path):
    saved = made_up.results()
    saved.save(tmp_path / results.NAME)
    assert results.load(tmp_path / results.NAME) == saved


def test_another_format_is_refused(tmp_path):
    (tmp_path / results.NAME).write_text('{"format": 0}')
    with pytest.raises(ValueError, match="has format 0, this version reads 1; run it again"):
        results.load(tmp_path / results.NAME)


def test_a_file_that_is_not_there_is_named_before_anything_runs(cut_off, run):
    for option in (["--compare", "none.json"], ["--only-report", "--output", "nowhere"]):
        with pytest.raises(SystemExit, match=r"no results are read: .*No such file"):
            run(*option)
    assert cut_off.ran == ["one", "two"]


def test_a_run_is_compared_with_the_file_it_writes_over(only, run, report, tmp_path):
    only(suite(race(OURS, contestant("jax", "jax", X))))
    run()
    only(suite(race(OURS, contestant("jax", "jax", X**2))))
    run("--compare", str(tmp_path / results.NAME))
    assert "| status | toy/square/mlp | jax | wrong | ok |  |" in report().summary


def test_two_cases_with_one_id_are_refused(only, run):
    only(suite(race(OURS), race(OURS)))
    with pytest.raises(SystemExit, match="two cases have the id toy/square/mlp"):
        run()


def test_unknown_names_are_refused(only, run):
    only(suite(race(OURS)))
    with pytest.raises(SystemExit, match="there is no suite modez; there are toy"):
        run("--suite", "modez")
    with pytest.raises(SystemExit, match="no case is of mlpp"):
        run("--models", "mlpp")


@pytest.mark.parametrize("name", SUITES)
@pytest.mark.parametrize("quick", [True, False], ids=["quick", "full"])
def test_every_suite_has_cases_with_ids_of_its_own(name, quick):
    ids = [case.id for case in SUITES[name].cases(Choice(quick=quick, threads=1))]
    assert ids
    assert all(id.startswith(f"{name}/") for id in ids)
    assert len(set(ids)) == len(ids)
    assert SUITES[name].TITLE
    assert SUITES[name].QUESTION
