"""Runs cases: checks each answer against the reference, then lets those that are right take turns."""

import contextlib
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import peers
from benchmarks.cases import OURS, Case, Claim, Contestant, Outcome, Race, Row
from benchmarks.crashes import Journal
from benchmarks.timing import Row as Timing
from benchmarks.timing import first_line, measure, prepare

Report = Callable[[str], Any]
RIGHT = ("ok", "floor")


def run(case: Case, report: Report, journal: Journal | None = None) -> Outcome:
    """The outcome of a case; an exception of a whole case is an outcome as well."""
    start = time.perf_counter()
    try:
        outcome = race(case, report, journal) if isinstance(case, Race) else case.run(report)
    except Exception as error:
        outcome = Outcome(claims=[Claim(f"did not run: {first_line(error)}", holds=False, correctness=True)])
    outcome.title, outcome.model, outcome.sizes = case.title, case.model, dict(case.sizes)
    outcome.seconds = time.perf_counter() - start
    return outcome


def race(case: Race, report: Report, journal: Journal | None = None) -> Outcome:
    """Prepare, check, time; every contestant has a row, also one that raises."""
    reference = arrays(case.reference())
    contestants = list(case.contestants())
    rows: dict[str, Row] = {}
    timings: dict[str, Timing] = {}
    calls: dict[str, Callable[[], Any]] = {}
    for contestant in contestants:
        report(f"compiling {contestant.name}")
        row = rows[contestant.name] = Row(contestant.name, contestant.peer)
        if why := absence(contestant):
            row.status, row.note = "absent", why
            continue
        try:
            with journal.starting(case.id, contestant.name) if journal else contextlib.nullcontext():
                timings[contestant.name], call, answer = start(contestant)
            if contestant.floor:
                row.status = "floor"
            else:
                check(row, answer, reference, case.tolerance)
        except Exception as error:  # an exception of a contestant is a result
            row.status, row.note = "failed", first_line(error)
        if row.status in RIGHT:
            calls[contestant.name] = call
    timed = measure(calls, budget=case.budget, rounds=case.rounds, report=report)
    for contestant in contestants:
        if contestant.name in timed:
            fill(rows[contestant.name], contestant, timings[contestant.name], timed[contestant.name])
    relate(list(rows.values()))
    mark_twins(list(rows.values()))
    outcome = Outcome(rows=list(rows.values()), claims=correctness(rows), caption=case.caption)
    outcome.claims += case.claims(outcome)
    return outcome


def absence(contestant: Contestant) -> str:
    """Why a contestant does not take part; empty if it does."""
    if not peers.is_installed(contestant.peer):
        return f"{contestant.peer} is not installed"
    if contestant.only_cpu and jax.default_backend() == "gpu":
        return "written for the CPU only, and no match for ours on a GPU"
    return ""


def start(contestant: Contestant) -> tuple[Timing, Callable[[], Any], Any]:
    """What is known before the first turn, the call, and its answer as arrays."""
    if contestant.function is not None:
        timing, call = prepare(contestant.name, contestant.function, contestant.args)
        return timing, call, arrays(contestant.read(jax.block_until_ready(call())))
    assert contestant.make is not None, f"{contestant.name} has neither function nor make"
    begin = time.perf_counter()
    call = contestant.make()
    answer = call()  # a library that compiles at the first call compiles now
    timing = Timing(contestant.name, compile_seconds=time.perf_counter() - begin)
    return timing, call, arrays(contestant.read(answer))


def arrays(answer: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(answer)]


def check(row: Row, answer: list[np.ndarray], reference: list[np.ndarray], tolerance: float) -> None:
    """Record how far an answer is from the reference, and whether that is too far."""
    shapes, wanted = [a.shape for a in answer], [r.shape for r in reference]
    if shapes != wanted:
        row.status, row.note = "wrong", f"the answer has shapes {shapes}, the reference {wanted}"
        return
    error = max((distance(a, r) for a, r in zip(answer, reference, strict=True)), default=0.0)
    row.metrics["error"] = error
    if not error <= tolerance:  # a NaN is wrong as well
        row.status, row.note = "wrong", f"differs from the reference by {error:.1e} of it; {tolerance:.0e} is allowed"


def distance(answer: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference, relative to the largest entry of the reference."""
    scale = np.max(np.abs(reference), initial=0.0)
    return float(np.max(np.abs(answer - reference), initial=0.0) / (scale or 1.0))


def fill(row: Row, contestant: Contestant, compiled: Timing, timed: Timing) -> None:
    if timed.error is not None:
        row.status, row.note = "failed", timed.error
        return
    pieces, (low, high) = contestant.pieces, timed.spread
    counts = (compiled.flops, compiled.bytes_accessed)
    flops, moved = (None if c is None or compiled.has_loop else c / pieces for c in counts)
    metrics: dict[str, Any] = {
        "ratio": math.nan, "seconds": timed.seconds / pieces, "low": low / pieces, "high": high / pieces,
        "compile_seconds": compiled.compile_seconds, "temporary_bytes": compiled.temporary_bytes,
        "flops": flops, "bytes": moved, "program": compiled.program,
    }  # fmt: skip
    row.metrics = metrics | row.metrics


def relate(rows: list[Row], *, to_fastest: bool = False) -> None:
    """The ratio of each time to that of the first, or the fastest, of ours that was right; None where none was."""
    timed = [row for row in rows if "seconds" in row.metrics]
    right = [row for row in timed if row.peer == OURS and row.status == "ok"]
    if to_fastest:
        right.sort(key=lambda row: row.metrics["seconds"])
    ours = next(iter(right), None)
    for row in timed:
        row.metrics["ratio"] = None if ours is None else row.metrics["seconds"] / ours.metrics["seconds"]


def mark_twins(rows: list[Row]) -> None:
    """Note on each of ours with which other row it shares its program: only the clock separates their times."""
    for row in rows:
        program = row.metrics.pop("program", None)
        if program is not None:
            row.metrics["program"] = str(program)[:12]
    for row in rows:
        twins = [other.name for other in rows if other is not row and row.shares_program_with(other)]
        if row.peer == OURS and twins and not row.note:
            row.note = f"the same program as {twins[0]}"


def correctness(rows: dict[str, Row]) -> list[Claim]:
    """What every run asserts: that each of our rows has an answer, and a right one."""
    return [
        Claim(f"{row.name} {'agrees with the reference' if ok else f'{row.status}: {row.note}'}", ok, correctness=True)
        for row in rows.values()
        if row.peer == OURS
        for ok in [row.status in RIGHT]
    ]
