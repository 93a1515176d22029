"""The rows of a case as the cells of a table, the same for the terminal, the page and the markdown."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks import peers
from benchmarks.cases import OURS, Number, Outcome, Row
from benchmarks.report import facts
from benchmarks.timing import digits

MINUS = "\N{MINUS SIGN}"
_BRIEF = 6  # columns beside the names that fit a terminal


@dataclass
class Column:
    """A head, with its unit, and what stands below it."""

    head: str
    cell: Callable[[Row], str]


@dataclass
class Table:
    """Cells, and the row that each line was made from."""

    columns: list[str]
    lines: list[tuple[Row, list[str]]]

    @property
    def has_notes(self) -> bool:
        """Whether there is something to say on a row."""
        return any(row.note for row, _ in self.lines)


def table(outcome: Outcome, rates: Mapping[str, float] | None = None, *, brief: bool = False) -> Table:
    """The table of a case; columns that would be empty are left out.

    Args:
        outcome: of the case.
        rates: the machine's roofs, for the columns of what share of them was reached.
        brief: leave out what does not fit a terminal.
    """
    rows = facts.by_time(outcome)
    columns = _of_races(rates or {}, brief) + _of_studies(rows)
    columns = [column for column in columns if any(column.cell(row) for row in rows)][: _BRIEF if brief else None]
    return Table([column.head for column in columns], [(row, [column.cell(row) for column in columns]) for row in rows])


def _of_races(rates: Mapping[str, float], brief: bool) -> list[Column]:
    columns = [
        Column("\u00d7 ours", lambda row: _scaled(row, "ratio", 1)),
        Column("ms", lambda row: _scaled(row, "seconds", 1e3)),
        Column("quartiles, ms", _quartiles),
        Column("temporary MiB", lambda row: _scaled(row, "temporary_bytes", 2**-20)),
        Column("compile s", lambda row: _scaled(row, "compile_seconds", 1)),
    ]
    if brief:
        return columns
    return [
        *columns,
        Column("of matmul rate", lambda row: share(row, "flops", rates.get("flops_per_second"))),
        Column("of bandwidth", lambda row: share(row, "bytes", rates.get("bytes_per_second"))),
        Column("error", lambda row: exponent(facts.number(row, "error"))),
    ]


def _of_studies(rows: list[Row]) -> list[Column]:
    """One for each metric that no race has, in the order they first appear."""
    names = dict.fromkeys(name for row in rows for name in row.metrics if name not in facts.RACE)
    return [Column(head(name), lambda row, name=name: value(name, row.metrics.get(name))) for name in names]


def _scaled(row: Row, name: str, factor: float) -> str:
    found = facts.number(row, name)
    return "" if found is None else digits(factor * found, 5 if name == "seconds" else 3)


def _quartiles(row: Row) -> str:
    if facts.is_one_call(row):
        return "one call"
    low, high = facts.number(row, "low"), facts.number(row, "high")
    return "" if low is None or high is None else f"{digits(1e3 * low, 5)} \u2013 {digits(1e3 * high, 5)}"


def share(row: Row, work: str, roof: float | None) -> str:
    """What part of a roof a row reached, in percent."""
    amount, seconds = facts.number(row, work), facts.number(row, "seconds")
    if not amount or not seconds or not roof:
        return ""
    percent = 100 * amount / seconds / roof
    return f"{digits(percent, 1)}%" if percent >= 0.1 else "< 0.1%"


def exponent(number: float | None) -> str:
    """A number of which only the order of magnitude matters."""
    return "" if number is None else f"{number:.0e}".replace("-", MINUS) if number else "0"


def head(metric: str) -> str:
    """What stands above a metric of a study: its name, and the unit that its ending says."""
    for ending, unit in (("_seconds", " s"), ("_bytes", " MiB"), ("_share", " %"), ("_ratio", " \u00d7")):
        if metric.endswith(ending):
            return metric.removesuffix(ending).replace("_", " ") + unit
    return metric.replace("_", " ")


def value(metric: str, number: Number) -> str:
    """A metric of a study, in the unit of its head."""
    if number is None or isinstance(number, str):
        return number or ""
    if isinstance(number, bool):
        return "yes" if number else "no"
    if metric.endswith("_bytes"):
        return digits(number / 2**20)
    if metric.endswith("_share"):
        return digits(100 * number, 1)
    if isinstance(number, int) or (number == int(number) if abs(number) < 1e15 else False):
        return f"{int(number):,}"
    return digits(number, 4) if 1e-3 <= abs(number) < 1e6 else f"{number:.2e}".replace("-", MINUS)


def overview(outcomes: Mapping[str, Outcome]) -> tuple[list[str], list[tuple[str, str, list[str]]]]:
    """The races of a suite in one table: the time of ours, and the ratio of the best right row of each library.

    Returns:
        The heads, and for each race its id, title and cells. One that has no right row says what became of it.
    """
    races = {id: outcome for id, outcome in outcomes.items() if any("ratio" in row.metrics for row in outcome.rows)}
    present = {row.peer for outcome in races.values() for row in outcome.rows} - {OURS}
    names = [peer for peer in peers.PACKAGES if peer in present]
    lines = [(id, outcome.title, _overview_cells(outcome, names)) for id, outcome in races.items()]
    return ["ours, ms", *names], lines


def _overview_cells(outcome: Outcome, names: list[str]) -> list[str]:
    own = facts.ours(outcome)
    cells = [_status(outcome, OURS) if own is None else digits(1e3 * own.metrics["seconds"], 5)]
    for name in names:
        row = facts.best(outcome, name)
        cells.append(_status(outcome, name) if row is None else digits(row.metrics["ratio"]))
    return cells


def _status(outcome: Outcome, peer: str) -> str:
    """What became of a library that has no time to show; empty where it has no row."""
    return next((row.status for row in outcome.rows if row.peer == peer and row.status not in ("ok", "floor")), "")
