"""A contestant that ends the process ends its own row only."""

import sys

import pytest

from benchmarks import crashes
from benchmarks.cases import OURS, Contestant, Race


def test_who_did_not_come_back_is_not_started_again(only, run, tmp_path):
    started = []

    def start(name):
        started.append(name)
        return lambda: 1.0

    def contestants():
        yield Contestant("curvature", OURS, make=lambda: start("curvature"))
        yield Contestant("jax, crashing", "jax", make=lambda: start("jax, crashing"))

    class Suite:
        TITLE, QUESTION = "Toy", "?"

        @staticmethod
        def cases(choice):
            return [Race("toy/one", "One", "mlp", contestants, lambda: 1.0, 1e-6, budget=1e-3, rounds=2)]

    only(Suite)
    file = tmp_path / "starting.txt"
    file.write_text("toy/one: jax, crashing\n")  # what a process leaves that ended in there
    code, found = run("--quick")
    rows = {row.name: row for row in found.outcomes["toy/one"].rows}
    assert (code, started) == (0, ["curvature"])
    assert rows["curvature"].status == "ok"
    assert rows["jax, crashing"].status == "failed"
    assert "process ended" in rows["jax, crashing"].note
    assert not file.exists(), "a run that came to its end leaves nothing"


@pytest.mark.parametrize(("blamed", "code", "calls"), [(True, 0, 2), (False, 128 + 11, 1)])
def test_the_run_goes_on_behind_a_crash_that_somebody_can_be_blamed_for(
    tmp_path, monkeypatch, capsys, blamed, code, calls
):
    script, log, journal = tmp_path / "python", tmp_path / "calls", tmp_path / "starting.txt"
    blame = f'echo "toy/one: jax" > {journal}; ' if blamed else ""
    script.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ $(wc -l < {log}) = 2 ] || {{ {blame}kill -SEGV $$; }}\n')
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    assert crashes.watch(["--quick", "--fresh"], tmp_path) == code
    said = log.read_text().splitlines()
    assert said == ["-m benchmarks --quick --fresh", "-m benchmarks --quick"][:calls]
    assert ("toy/one: jax ended the process (SIGSEGV)" in capsys.readouterr().out) == blamed
