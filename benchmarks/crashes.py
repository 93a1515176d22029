"""Contestants that bring the whole process down: only a line on disk outlives them."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

_CHILD = "CURVATURE_BENCHMARKS_CHILD"


class ProcessLostError(Exception):
    """The process ended while this contestant started, in an earlier part of the run."""


class Journal:
    """A file with a line for each contestant that has begun to start and has not come back.

    Those that an earlier process left there have ended it; they are not started again.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "starting.txt"
        self.lost = self.file.read_text().splitlines() if self.file.exists() else []

    @contextlib.contextmanager
    def starting(self, case: str, name: str) -> Iterator[None]:
        """Around the start of a contestant; raises ``ProcessLostError`` if that has ended a process before."""
        line = f"{case}: {name}"
        if line in self.lost:
            raise ProcessLostError("the whole process ended while it started")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._write([*self.lost, line])
        try:
            yield
        finally:
            self._write(self.lost)

    def forget(self) -> None:
        """For a run that begins from the start, or has come to its end."""
        self.lost = []
        self.file.unlink(missing_ok=True)

    def _write(self, lines: list[str]) -> None:
        self.file.write_text("".join(f"{line}\n" for line in lines))


def is_child() -> bool:
    """Whether this process runs the benchmarks; otherwise it watches the one that does."""
    return _CHILD in os.environ


def watch(arguments: Sequence[str], folder: Path) -> int:
    """Run the command in a child process, and resume without a contestant that ends it; the exit code."""
    known = 0
    while True:
        with subprocess.Popen([sys.executable, "-m", "benchmarks", *arguments], env={**os.environ, _CHILD: "1"}) as run:
            code = _wait(run)
        lost = Journal(folder).lost
        if code >= 0:
            return code
        if len(lost) <= known:
            return 128 - code
        known = len(lost)
        print(f"{lost[-1]} ended the process ({signal.Signals(-code).name}). The run goes on without it.", flush=True)
        arguments = [argument for argument in arguments if argument != "--fresh"]


def _wait(child: subprocess.Popen[bytes]) -> int:
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:  # the child has it too, and says how to go on
            continue
