"""The rows of a case as the cells of a table, the same for the terminal, the page and the markdown."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from benchmarks import peers
from benchmarks.cases import OURS, Outcome, Outcomes, Row
from benchmarks.report import facts
from benchmarks.timing import digits

MINUS = "\N{MINUS SIGN}"
_BRIEF = 6  # columns beside the names that fit a terminal
Column = tuple[str, Callable[[Row], str]]


class Table(NamedTuple):
    """The heads, and the row that each line of cells was made from."""

    columns: list[str]
    lines: list[tuple[Row, list[str]]]


def table(outcome: Outcome, rates: Mapping[str, float] | None = None, *, brief: bool = False) -> Table:
    """The table of a case; columns that would be empty are left out.

    ``rates`` are the machine's roofs, for the columns of what share of them was reached; ``brief`` leaves out what does
    not fit a terminal.
    """
    rows = facts.by_time(outcome)
    columns: list[Column] = [
        ("\u00d7 ours", lambda row: _scaled(row, "ratio")),
        ("ms", lambda row: _scaled(row, "seconds", 1e3, 5)),
        ("quartiles, ms", _quartiles),
        ("temporary MiB", lambda row: _scaled(row, "temporary_bytes", 2**-20)),
        ("compile s", lambda row: _scaled(row, "compile_seconds")),
    ]
    if not brief:
        columns += [
            ("of matmul rate", lambda row: _share(row, "flops", (rates or {}).get("flops_per_second"))),
            ("of bandwidth", lambda row: _share(row, "bytes", (rates or {}).get("bytes_per_second"))),
            ("error", lambda row: _exponent(facts.number(row, "error"))),
        ]
    # A column for each metric that no race has, in the order they first appear.
    names = dict.fromkeys(name for row in rows for name in row.metrics if name not in facts.RACE)
    columns += [(head(name), lambda row, name=name: value(name, row.metrics.get(name))) for name in names]
    columns = [column for column in columns if any(column[1](row) for row in rows)][: _BRIEF if brief else None]
    return Table([head for head, _ in columns], [(row, [cell(row) for _, cell in columns]) for row in rows])


def _scaled(row: Row, name: str, factor: float = 1, decimals: int = 3) -> str:
    found = facts.number(row, name)
    return "" if found is None else digits(factor * found, decimals)


def _quartiles(row: Row) -> str:
    if facts.number(row, "low") == facts.number(row, "seconds") == facts.number(row, "high") is not None:
        return "one call"  # so slow that one is all there is
    low, high = _scaled(row, "low", 1e3, 5), _scaled(row, "high", 1e3, 5)
    return f"{low} \u2013 {high}" if low and high else ""


def _share(row: Row, work: str, roof: float | None) -> str:
    amount, seconds = facts.number(row, work), facts.number(row, "seconds")
    if not amount or not seconds or not roof:
        return ""
    percent = 100 * amount / seconds / roof
    return f"{digits(percent, 1)}%" if percent >= 0.1 else "< 0.1%"


def _exponent(number: float | None) -> str:
    return "" if number is None else f"{number:.0e}".replace("-", MINUS) if number else "0"


def head(metric: str) -> str:
    """What stands above a metric of a study: its name, and the unit that its ending says."""
    for ending, unit in (("_seconds", " s"), ("_bytes", " MiB"), ("_share", " %"), ("_ratio", " \u00d7")):
        if metric.endswith(ending):
            return metric.removesuffix(ending).replace("_", " ") + unit
    return metric.replace("_", " ")


def value(metric: str, number: Any) -> str:
    if number is None or isinstance(number, str):
        return number or ""
    if isinstance(number, bool):
        return "yes" if number else "no"
    if metric.endswith(("_bytes", "_share")):
        return digits(number / 2**20) if metric.endswith("_bytes") else digits(100 * number, 1)
    if isinstance(number, int) or (abs(number) < 1e15 and number == int(number)):
        return f"{int(number):,}"
    return digits(number, 4) if 1e-3 <= abs(number) < 1e6 else f"{number:.2e}".replace("-", MINUS)


def overview(outcomes: Outcomes) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """The races of a suite in one table: the time of ours, and the ratio of the best right row of each library.

    Returns:
        The heads, and for each race its id, title and cells. One that has no right row says what became of it.
    """
    races = {id: outcome for id, outcome in outcomes.items() if any("ratio" in row.metrics for row in outcome.rows)}
    present = {row.peer for outcome in races.values() for row in outcome.rows} - {OURS}
    names = [peer for peer in peers.PACKAGES if peer in present]
    lines = []
    for id, outcome in races.items():
        best = {name: facts.best(outcome, name) for name in (OURS, *names)}
        became = {row.peer: row.status for row in reversed(outcome.rows) if row.status not in ("ok", "floor")}
        cells = [
            became.get(name, "") if row is None
            else digits(1e3 * row.metrics["seconds"], 5) if name == OURS else digits(row.metrics["ratio"])
            for name, row in best.items()
        ]  # fmt: skip
        lines.append((id, outcome.title, cells))
    return ["ours, ms", *names], lines
