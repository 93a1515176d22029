"""The costs of several ways to one derivative, timed against each other and shown as a table."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from rich.table import Table

from benchmarks.timing import Report, Timing, digits, first_line, measure, plain_table, prepare

Contestant = tuple[Callable[..., Any], tuple[Any, ...]]


def compare(
    contestants: Mapping[str, Contestant], *, budget: float, rounds: int = 5, report: Report = lambda line: None
) -> dict[str, Timing]:
    """Compile each function for its arguments, then time the compiled programs in turns, as ``measure`` does."""
    found, calls = {}, {}
    for name, (function, args) in contestants.items():
        report(f"compiling {name}")
        try:
            found[name], calls[name] = prepare(name, function, args)
        except Exception as error:  # an exception of a contestant is a result
            found[name] = Timing(name, error=first_line(error))
    for name, timed in measure(calls, budget=budget, rounds=rounds, report=report).items():
        found[name] = replace(found[name], seconds=timed.seconds, spread=timed.spread, error=timed.error)
    return found


def share(timing: Timing, pieces: int) -> Timing:
    """The cost of one of ``pieces`` equal pieces of work that a contestant does in a row."""
    low, high = timing.spread
    return replace(timing, seconds=timing.seconds / pieces, spread=(low / pieces, high / pieces), flops=None)


def mark_choice(timings: Mapping[str, Timing], choice: str = "auto") -> list[Timing]:
    """The rows, with the choice as a mark on the contestant that is the very same program, if there is one."""
    program = timings[choice].program
    twins = [name for name, t in timings.items() if name != choice and program is not None and t.program == program]
    kept = [timing for name, timing in timings.items() if name != choice or not twins]
    return [replace(timing, name=f"{timing.name}  <- {choice}") if timing.name in twins else timing for timing in kept]


def table(title: str, timings: Iterable[Timing], baseline: Timing, caption: str | None = None) -> Table:
    """A row for each timing, with its time relative to ``baseline``."""
    columns: dict[str, Callable[[Timing], str]] = {
        "": lambda timing: timing.name,
        "ms": lambda timing: digits(1e3 * timing.seconds),
        "quartiles": lambda timing: " - ".join(digits(1e3 * seconds) for seconds in timing.spread),
        f"x {baseline.name}": lambda timing: digits(timing.seconds / baseline.seconds),
        "temporary\nMiB": lambda timing: digits((timing.temporary_bytes or 0) / 2**20),
        "compile\ns": lambda timing: digits(timing.compile_seconds or 0.0),
    }
    result = plain_table(title, columns, caption)
    for timing in timings:
        failed = [f"{timing.name}: {timing.error}"]
        result.add_row(*([cell(timing) for cell in columns.values()] if timing.error is None else failed))
    return result
