"""A stopwatch: compile time separate, warm programs, turns taken round by round, memory from XLA itself."""

import hashlib
import math
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import rich.box
from rich.console import Console
from rich.table import Table

Report = Callable[[str], Any]

_MOST_REPEATS = 100  # in one round; more of them would only stretch the round
_OVERDRAWN = 4  # budgets
_SLOW = 1.0  # seconds; whatever happens only once in a process is small beside it


@dataclass(frozen=True)
class Timing:
    """What was measured of one contestant; of one that failed, only the error.

    Attributes:
        seconds: the median time of a call.
        spread: the quartiles of the same calls.
        compile_seconds: tracing, lowering and compiling together; None where the caller compiled.
        temporary_bytes: what XLA sets aside for intermediates, beyond arguments and results.
        flops, bytes_accessed: XLA's counts of the compiled program; None where it loops, since XLA counts a body once.
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
    program: str | None = None
    error: str | None = None


def prepare(name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Timing, Callable[[], Any]]:
    """Compile a function for its arguments: all that is known before the first run, and the call."""

    def fresh(*args: Any) -> Any:  # a function that jit has never seen, so that no cache answers for the compiler
        return function(*args)

    start = time.perf_counter()
    compiled = jax.jit(fresh).lower(*args).compile()
    seconds, text, costs = time.perf_counter() - start, compiled.as_text(), compiled.cost_analysis()
    counts = costs if isinstance(costs, dict) and " while(" not in text else {}
    timing = Timing(
        name,
        compile_seconds=seconds,
        temporary_bytes=getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
        flops=counts.get("flops"),
        bytes_accessed=counts.get("bytes accessed"),
        program=_fingerprint(text),
    )
    return timing, lambda: compiled(*args)


def _fingerprint(text: str) -> str:
    """A hash of a compiled program that ignores the names and source positions of its instructions."""
    names: dict[str, str] = {}
    instructions = [line for line in text.splitlines() if line.startswith((" ", "%", "ENTRY", "}"))]
    bare = re.sub(r", metadata=\{[^}]*\}", "", "\n".join(instructions))
    bare = re.sub(r"(?<=[(, ])[\w.\-]+(?=: )", "", bare)  # the names of parameters
    bare = re.sub(r"%[\w.\-]+", lambda name: names.setdefault(name[0], f"%{len(names)}"), bare)
    return hashlib.sha256(bare.encode()).hexdigest()


def measure(
    calls: Mapping[str, Callable[[], Any]], *, budget: float = 2.0, rounds: int = 5, report: Report = lambda line: None
) -> dict[str, Timing]:
    """Time calls that have been compiled, or need no compilation, against each other.

    They take turns, so that a machine that is busy for a while is busy for all of them, and each time in another order,
    since the threads of some libraries stay awake and disturb who comes next. A turn of several calls begins with one
    that does not count, which brings back caches and threads. Who has spent its budget ``_OVERDRAWN`` times over takes
    no more turns. The first run of a call counts if it is a slow one.

    Args:
        calls: name -> call.
        budget: the seconds that each may take, in all its turns together; a slow one takes fewer turns.
        rounds: how many turns each gets.
        report: called with a line about what is going on.

    Returns:
        name -> timing, in the order given. One that raises has its error, and stops nobody else.
    """
    repeats: dict[str, int] = {}
    errors: dict[str, str] = {}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    spent, shuffle = dict.fromkeys(calls, 0.0), random.Random(0)
    for turn in range(rounds + 1):
        for name in shuffle.sample(list(calls), len(calls)):
            if name in errors or (samples[name] and spent[name] > _OVERDRAWN * budget):
                continue
            report(f"round {turn} of {rounds}: {name}" if turn else f"warming up {name}")
            begin = time.perf_counter()
            try:
                if turn == 0:
                    repeats[name], samples[name] = _warm_up(calls[name], budget / rounds)
                else:
                    uncounted = 1 if repeats[name] > 1 else 0
                    times = [clock(calls[name])[1] for _ in range(uncounted + repeats[name])]
                    samples[name] += times[uncounted:]
            except Exception as error:  # an exception of a contestant is a result
                errors[name] = first_line(error)
            spent[name] += time.perf_counter() - begin
    found = {name: Timing(name, error=error) for name, error in errors.items()}
    for name in calls.keys() - errors.keys():
        low, median, high = (float(seconds) for seconds in np.quantile(samples[name], (0.25, 0.5, 0.75)))
        found[name] = Timing(name, median, (low, high))
    return {name: found[name] for name in calls}


def _warm_up(call: Callable[[], Any], seconds: float) -> tuple[int, list[float]]:
    """How many calls fit into ``seconds``, judged by the second; of a slow one, one, and the time of the first."""
    first = clock(call)[1]
    if first > max(_OVERDRAWN * seconds, _SLOW):
        return 1, [first]
    return min(max(int(seconds / max(clock(call)[1], 1e-9)), 1), _MOST_REPEATS), []


def clock(call: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = jax.block_until_ready(call())
    return result, time.perf_counter() - start


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def plain_table(title: str | None, columns: Iterable[str], caption: str | None = None) -> Table:
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
