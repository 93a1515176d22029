"""Reads outcomes for plots and findings; what is missing is None, or left out."""

from collections.abc import Iterable, Mapping

from benchmarks.cases import OURS, Line, Outcome, Row
from benchmarks.timing import digits

Outcomes = Mapping[str, Outcome]


def part(outcomes: Outcomes, prefix: str) -> dict[str, Outcome]:
    """The outcomes whose ids begin so."""
    return {id: outcome for id, outcome in outcomes.items() if id.startswith(prefix)}


def seconds(outcome: Outcome, name: str) -> float | None:
    """The median time of a row that was right."""
    row = outcome.row(name)
    return None if row is None else number(row, "seconds")


def number(row: Row, metric: str) -> float | None:
    """A metric, if it was measured."""
    value = row.metrics.get(metric)
    return float(value) if isinstance(value, int | float) else None


def ratio(outcome: Outcome, slow: str, fast: str, metric: str = "seconds") -> float | None:
    """How many times as much as ``fast`` a row took."""
    rows = [outcome.row(name) for name in (slow, fast)]
    a, b = (None if row is None else number(row, metric) for row in rows)
    return a / b if a is not None and b else None


def fastest(outcome: Outcome, peer: str) -> Row | None:
    """The fastest right row of a library."""
    rows = [row for row in outcome.rows if row.peer == peer and row.status == "ok" and number(row, "seconds")]
    return min(rows, key=lambda row: number(row, "seconds") or 0.0, default=None)


def peers(outcomes: Outcomes) -> list[str]:
    """The other libraries that have rows, in the order of their first."""
    return list(dict.fromkeys(row.peer for outcome in outcomes.values() for row in outcome.rows if row.peer != OURS))


def curves(outcomes: Outcomes, axis: str, metric: str = "seconds", names: Iterable[str] | None = None) -> list[Line]:
    """A line for each row's name, or for those given: the metric against a size, where there are two points or more."""
    points: dict[str, list[tuple[float, float]]] = {}
    for outcome in outcomes.values():
        for row in outcome.rows:
            value = number(row, metric)
            if row.status == "ok" and value and axis in outcome.sizes:
                points.setdefault(row.name, []).append((outcome.sizes[axis], value))
    wanted = list(points) if names is None else [name for name in names if name in points]
    return [_line(name, sorted(points[name])) for name in wanted if len(points[name]) > 1]


def _line(name: str, points: list[tuple[float, float]]) -> Line:
    x, y = zip(*points, strict=True)
    return Line(name, list(x), list(y))


def times(value: float | None) -> str:
    """A ratio in words."""
    return "not measured" if value is None else f"{digits(value)} times"


def spread(values: Iterable[float | None]) -> str:
    """The range of ratios in words."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return "not measured"
    low, high = digits(found[0]), digits(found[-1])
    return f"{low} times" if low == high else f"{low} to {high} times"
