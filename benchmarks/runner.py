"""Runs cases: checks each answer against the reference, then lets those that are right take turns."""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from benchmarks import peers, reading
from benchmarks.cases import OURS, Case, Claim, Contestant, Outcome, Race, Row
from benchmarks.crashes import Journal
from benchmarks.timing import Report, Timing, first_line, measure, prepare

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
    reference, contestants = arrays(case.reference()), list(case.contestants())
    rows: dict[str, Row] = {}
    calls: dict[str, Callable[[], Any]] = {}
    compiled: dict[str, Timing] = {}
    for contestant in contestants:
        name = contestant.name
        report(f"compiling {name}")
        row = rows[name] = Row(name, contestant.peer)
        if why := absence(contestant):
            row.status, row.note = "absent", why
            continue
        try:
            with journal.starting(case.id, name) if journal else contextlib.nullcontext():
                compiled[name], calls[name], answer = start(contestant)
            if contestant.floor:
                row.status = "floor"
            elif case.judge is None:
                check(row, arrays(answer), reference, case.tolerance)
            elif not case.judge(row, answer, compiled[name].compile_seconds or 0.0):
                del calls[name]
        except Exception as error:  # an exception of a contestant is a result
            row.status, row.note = "failed", first_line(error)
    calls = {name: call for name, call in calls.items() if rows[name].status in RIGHT}
    timed = measure(calls, budget=case.budget, rounds=case.rounds, report=report)
    for contestant in contestants:
        if (name := contestant.name) in timed:
            record(rows[name], timed[name], contestant.pieces, None if case.judge else compiled[name])
    relate(rows.values(), to_fastest=case.judge is not None)
    mark_twins(list(rows.values()))
    outcome = Outcome(rows=list(rows.values()), caption=case.caption)
    for row in outcome.rows:
        if row.peer == OURS:
            right = "agrees with the reference" if case.judge is None else "claims no false success"
            said = right if row.status in RIGHT else f"{row.status}: {row.note}"
            outcome.claims.append(Claim(f"{row.name} {said}", row.status in RIGHT, correctness=True))
    outcome.claims += [*case.claims(outcome), *reading.noted_claims(case.id, outcome)]
    return outcome


def absence(contestant: Contestant) -> str:
    """Why a contestant does not take part; empty if it does."""
    if not peers.is_installed(contestant.peer):
        return f"{contestant.peer} is not installed"
    if contestant.only_cpu and jax.default_backend() == "gpu":
        return "written for the CPU only, and no match for ours on a GPU"
    return ""


def start(contestant: Contestant) -> tuple[Timing, Callable[[], Any], Any]:
    """What is known before the first turn, the call, and its answer."""
    if contestant.function is not None:
        timing, call = prepare(contestant.name, contestant.function, contestant.args)
        return timing, call, contestant.read(jax.block_until_ready(call()))
    assert contestant.make is not None, f"{contestant.name} has neither function nor make"
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what solvers complain of is in their answers
        call = contestant.make()
        answer = call()  # a library that compiles at the first call compiles now
    timing = Timing(contestant.name, compile_seconds=time.perf_counter() - begin)
    return timing, call, contestant.read(answer)


def arrays(answer: Any) -> list[np.ndarray]:
    return [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(answer)]


def check(row: Row, answer: list[np.ndarray], reference: list[np.ndarray], tolerance: float) -> None:
    """Record how far an answer is from the reference, and whether that is too far."""
    shapes, wanted = [a.shape for a in answer], [r.shape for r in reference]
    if shapes != wanted:
        row.status, row.note = "wrong", f"the answer has shapes {shapes}, the reference {wanted}"
        return
    row.metrics["error"] = error = max(map(distance, answer, reference), default=0.0)
    if not error <= tolerance:  # a NaN is wrong as well
        row.status, row.note = "wrong", f"differs from the reference by {error:.1e} of it; {tolerance:.0e} is allowed"


def distance(answer: np.ndarray, reference: np.ndarray) -> float:
    """The largest difference, relative to the largest entry of the reference."""
    scale = np.max(np.abs(reference), initial=0.0)
    return float(np.max(np.abs(answer - reference), initial=0.0) / (scale or 1.0))


def record(row: Row, timed: Timing, pieces: int = 1, compiled: Timing | None = None) -> None:
    """Add to a row the time of one piece of a call, and what is known of its program."""
    if timed.error is not None:
        row.status, row.note = "failed", timed.error
        return
    low, high = timed.spread
    row.metrics |= {"seconds": timed.seconds / pieces, "low": low / pieces, "high": high / pieces}
    if compiled is not None:
        flops, moved = (c and c / pieces for c in (compiled.flops, compiled.bytes_accessed))
        row.metrics |= {
            "compile_seconds": compiled.compile_seconds, "temporary_bytes": compiled.temporary_bytes,
            "flops": flops, "bytes": moved, "program": compiled.program,
        }  # fmt: skip


def relate(rows: Iterable[Row], *, to_fastest: bool = False) -> None:
    """The ratio of each time to that of the first, or the fastest, of ours that was right; None where none was."""
    timed = [row for row in rows if "seconds" in row.metrics]
    right = [row.metrics["seconds"] for row in timed if row.peer == OURS and row.status == "ok"]
    ours = min(right, default=None) if to_fastest else next(iter(right), None)
    for row in timed:
        row.metrics["ratio"] = None if ours is None else row.metrics["seconds"] / ours


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
