"""Runs of toy suites: no machine is measured, no thread pinned, no real suite taken."""

from types import SimpleNamespace

import pytest

from benchmarks import __main__, machine, results, session
from benchmarks.suites import SUITES


@pytest.fixture(autouse=True)
def a_machine_of_known_speed(monkeypatch):
    """Measuring it takes seconds, and says nothing here."""
    monkeypatch.setattr(machine, "rates", lambda dtype, device: {"flops_per_second": 1e11, "bytes_per_second": 1e10})


@pytest.fixture
def only(monkeypatch):
    """Makes a suite with these cases the only one."""

    def replace(suite, name="toy"):
        for other in list(SUITES):
            monkeypatch.delitem(SUITES, other)
        monkeypatch.setitem(SUITES, name, suite)

    return replace


@pytest.fixture
def run(tmp_path):
    """Runs the command in a folder of its own; returns the exit code and what was found."""

    def command(*arguments):
        code = session.run(__main__.parse(["--output", str(tmp_path), *arguments]))
        return code, results.load(tmp_path / results.NAME)

    return command


@pytest.fixture
def report(tmp_path):
    """What the report says, as text."""

    def read():
        return SimpleNamespace(
            page=(tmp_path / "index.html").read_text(), summary=(tmp_path / "summary.md").read_text()
        )

    return read
