"""A stopwatch: compile time separate, warm programs, turns taken round by round, memory from XLA itself."""

import hashlib
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

Contestant = tuple[Callable[..., Any], tuple[Any, ...]]
Report = Callable[[str], Any]

_MOST_REPEATS = 100  # in one round; more of them would only stretch the round
_OVERDRAWN = 4  # budgets
_SLOW = 1.0  # seconds; whatever happens only once in a process is small beside it


@dataclass(frozen=True)
class Row:
    """What was measured of one contestant; of one that failed, only the error.

    Attributes:
        seconds: the median time of a call.
        spread: the quartiles of the same calls.
        compile_seconds: tracing, lowering and compiling together; None where the caller compiled.
        temporary_bytes: what XLA sets aside for intermediates, beyond arguments and results.
        flops, bytes_accessed: XLA's counts of the compiled program, which take the body of a loop once.
        has_loop: whether the compiled program loops, so that those counts are too small.
        program: a fingerprint of the compiled program: contestants that share it are one program.
        error: the first line of what it raised.
    """

    name: str
    seconds: float = math.nan
    spread: tuple[float, float] = (math.nan, math.nan)
    compile_seconds: float | None = None
    temporary_bytes: int | None = None
    flops: float | None = None
    bytes_accessed: float | None = None
    has_loop: bool = False
    program: str | None = None
    error: str | None = None


def compare(
    contestants: Mapping[str, Contestant], *, budget: float = 2.0, rounds: int = 5, report: Report | None = None
) -> dict[str, Row]:
    """Compile each function for its arguments, then time the compiled programs against each other.

    Args:
        contestants: name -> (function, arguments).
        budget: the seconds that each may take, in all its turns together; a slow one takes fewer turns.
        rounds: how many turns each gets.
        report: called with a line about what is going on.

    Returns:
        name -> row, in the order given. One that raises has a row with its error, and stops nobody else.
    """
    rows, calls = {}, {}
    for name, (function, args) in contestants.items():
        if report is not None:
            report(f"compiling {name}")
        try:
            rows[name], calls[name] = prepare(name, function, args)
        except Exception as error:  # an exception of a contestant is a result
            rows[name] = Row(name, error=first_line(error))
    for name, timed in measure(calls, budget=budget, rounds=rounds, report=report).items():
        rows[name] = replace(rows[name], seconds=timed.seconds, spread=timed.spread, error=timed.error)
    return rows


def prepare(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Row, Callable[[], Any]]:
    """Compile a function for its arguments: a row with all that is known before the first run, and the call."""

    def fresh(*args: Any) -> Any:  # a function that jit has never seen, so that no cache answers for the compiler
        return function(*args)

    start = time.perf_counter()
    compiled = jax.jit(fresh).lower(*args).compile()
    seconds = time.perf_counter() - start
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    costs = costs if isinstance(costs, dict) else {}
    row = Row(
        name,
        compile_seconds=seconds,
        temporary_bytes=getattr(memory, "temp_size_in_bytes", None),
        flops=costs.get("flops"),
        bytes_accessed=costs.get("bytes accessed"),
        has_loop=" while(" in text,
        program=_fingerprint(text),
    )
    return row, lambda: compiled(*args)


def _fingerprint(text: str) -> str:
    """A hash of a compiled program that ignores the names and source positions of its instructions."""
    names: dict[str, str] = {}
    instructions = [line for line in text.splitlines() if line.startswith((" ", "%", "ENTRY", "}"))]
    bare = re.sub(r", metadata=\{[^}]*\}", "", "\n".join(instructions))
    bare = re.sub(r"(?<=[(, ])[\w.\-]+(?=: )", "", bare)  # the names of parameters
    bare = re.sub(r"%[\w.\-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), bare)
    return hashlib.sha256(bare.encode()).hexdigest()


def measure(
    calls: Mapping[str, Callable[[], Any]], *, budget: float = 2.0, rounds: int = 5, report: Report | None = None
) -> dict[str, Row]:
    """Time calls that have been compiled, or need no compilation, against each other, as ``compare`` does.

    They take turns, so that a machine that is busy for a while is busy for all of them, and each time in another order,
    since the threads of some libraries stay awake and disturb who comes next. A turn of several calls begins with one
    that does not count, which brings back caches and threads. Who has spent its budget ``_OVERDRAWN`` times over takes
    no more turns. The first run of a call counts if it is a slow one.
    """
    repeats: dict[str, int] = {}
    spent = dict.fromkeys(calls, 0.0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    errors: dict[str, str] = {}
    shuffle = random.Random(0)
    for turn in range(rounds + 1):
        for name in shuffle.sample(list(calls), len(calls)):
            call = calls[name]
            if name in errors or (samples[name] and spent[name] > _OVERDRAWN * budget):
                continue
            if report is not None:
                report(f"round {turn} of {rounds}: {name}" if turn else f"warming up {name}")
            begin = time.perf_counter()
            try:
                if turn == 0:
                    repeats[name], samples[name] = _warm_up(call, budget / rounds)
                else:
                    samples[name] += _turn(call, repeats[name])
            except Exception as error:  # an exception of a contestant is a result
                errors[name] = first_line(error)
            spent[name] += time.perf_counter() - begin
    return {name: _summarize(name, samples[name], errors.get(name)) for name in calls}


def _summarize(name: str, samples: list[float], error: str | None) -> Row:
    if error is not None:
        return Row(name, error=error)
    low, median, high = (float(seconds) for seconds in np.quantile(samples, (0.25, 0.5, 0.75)))
    return Row(name, median, (low, high))


def _warm_up(call: Callable[[], Any], seconds: float) -> tuple[int, list[float]]:
    """How many calls fit into ``seconds``, judged by the second; of a slow one, one, and the time of the first."""
    first = clock(call)[1]
    if first > max(_OVERDRAWN * seconds, _SLOW):
        return 1, [first]
    return min(max(int(seconds / max(clock(call)[1], 1e-9)), 1), _MOST_REPEATS), []


def _turn(call: Callable[[], Any], repeats: int) -> list[float]:
    """The times of so many calls, after one that does not count if there are several."""
    if repeats > 1:
        clock(call)
    return [clock(call)[1] for _ in range(repeats)]


def clock(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def share(row: Row, pieces: int) -> Row:
    """The cost of one of ``pieces`` equal pieces of work that a contestant does in a row."""
    low, high = row.spread
    return replace(row, seconds=row.seconds / pieces, spread=(low / pieces, high / pieces), flops=None)


def mark_choice(rows: Mapping[str, Row], choice: str = "auto") -> list[Row]:
    """The rows, with the choice as a mark on the contestant that is the very same program, if there is one."""
    chosen = rows[choice]
    twins = [name for name, row in rows.items() if name != choice and row.program and row.program == chosen.program]
    kept = [row for name, row in rows.items() if name != choice or not twins]
    return [replace(row, name=f"{row.name}  <- {choice}") if row.name in twins else row for row in kept]


def table(title: str, rows: Iterable[Row], baseline: Row, caption: str | None = None) -> Table:
    """The rows as a table for the terminal, with the time of each relative to ``baseline``."""
    columns: dict[str, Callable[[Row], str]] = {
        "": lambda row: row.name,
        "ms": lambda row: digits(1e3 * row.seconds),
        "quartiles": lambda row: " - ".join(digits(1e3 * seconds) for seconds in row.spread),
        f"x {baseline.name}": lambda row: digits(row.seconds / baseline.seconds),
        "temporary\nMiB": lambda row: "" if row.temporary_bytes is None else digits(row.temporary_bytes / 2**20),
        "compile\ns": lambda row: "" if row.compile_seconds is None else digits(row.compile_seconds),
    }
    result = plain_table(title, columns, caption)
    for row in rows:
        cells = [cell(row) for cell in columns.values()] if row.error is None else [f"{row.name}: {row.error}"]
        result.add_row(*cells)
    return result


def plain_table(title: str, columns: Iterable[str], caption: str | None = None) -> Table:
    """An empty table that reads as well in a log as on a screen; the first column is text, the others numbers."""
    looks = {"title_justify": "left", "caption_justify": "left", "box": rich.box.SIMPLE_HEAD, "pad_edge": False}
    result = Table(title=title, caption=caption, **looks)
    for name in columns:
        result.add_column(name, justify="right" if name else "left", no_wrap=bool(name), vertical="bottom")
    return result


def digits(number: float, decimals: int = 3) -> str:
    """Three significant digits, at most ``decimals`` of them after the point, and no exponent."""
    if number == 0 or not math.isfinite(number):
        return f"{number:.2f}"
    after_point = 2 - math.floor(math.log10(abs(number)))
    return f"{number:.{min(max(after_point, 0), decimals)}f}"


def console() -> Console:
    """A console that fits the terminal, or 100 columns of plain text where there is none."""
    return Console(width=None if sys.stdout.isatty() else 100, highlight=False)
