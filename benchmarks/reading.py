"""What suites read from outcomes: shares of one row in another, claims about them, lines of a plot.

What is missing is None, or left out.
"""

from collections.abc import Iterable, Mapping

from benchmarks.cases import OURS, Claim, Line, Outcome, Row
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


def timed(outcome: Outcome, name: str) -> Row | None:
    """The row of that name, of a right answer or a floor."""
    return next((row for row in outcome.rows if row.name == name and row.status in ("ok", "floor")), None)


def share(outcome: Outcome, name: str, of: str, metric: str = "seconds") -> float | None:
    """A metric of one row relative to that of another; None where one of them is missing."""
    a, b = (None if row is None else number(row, metric) for row in (timed(outcome, name), timed(outcome, of)))
    return a / b if a is not None and b else None


def at_most(outcome: Outcome, name: str, of: str, wanted: float, metric: str = "seconds") -> list[Claim]:
    """The claim that a row takes at most so much of another; none where one of them is missing."""
    measured = share(outcome, name, of, metric)
    if measured is None:
        return []
    what = {"seconds": "the time", "temporary_bytes": "the temporary memory"}[metric]
    text = f"{name} takes {measured:.2f} of {what} of: {of} (wanted: at most {wanted:.2f})"
    return [Claim(text, measured <= wanted)]


def fastest(outcome: Outcome, peer: str) -> Row | None:
    """The fastest right row of a library."""
    rows = [row for row in outcome.rows if row.peer == peer and row.status == "ok" and number(row, "seconds")]
    return min(rows, key=lambda row: number(row, "seconds") or 0.0, default=None)


def peers(outcomes: Outcomes) -> list[str]:
    """The other libraries that have rows, in the order of their first."""
    return list(dict.fromkeys(row.peer for outcome in outcomes.values() for row in outcome.rows if row.peer != OURS))


def curves(
    outcomes: Outcomes, axis: str, metric: str = "seconds", *, prefix: str = "", scale: float = 1.0
) -> list[Line]:
    """For each row name of the outcomes whose id begins so, a line of a metric over a size; of two points or more."""
    points: dict[str, list[tuple[float, float]]] = {}
    rows: dict[str, Row] = {}
    for outcome in part(outcomes, prefix).values():
        for row in outcome.rows:
            value = number(row, metric)
            if row.status in ("ok", "floor") and value and axis in outcome.sizes:
                points.setdefault(row.name, []).append((outcome.sizes[axis], scale * value))
                rows[row.name] = row
    return [
        Line(
            name,
            *(list(values) for values in zip(*sorted(found), strict=True)),
            "dashed" if rows[name].status == "floor" else "line",
            rows[name].peer,
        )
        for name, found in points.items()
        if len(found) > 1
    ]


def comparison(outcome: Outcome) -> str:
    """How many times as long each right row of another library takes as ours, as one sentence."""
    others = [
        f"{row.name} {row.metrics['ratio']:.2f}"
        for row in outcome.rows
        if row.status == "ok" and row.peer != "curvature" and row.metrics.get("ratio") is not None
    ]
    told = f"times ours, {', '.join(others)}" if others else "nobody to compare with"
    return f"{outcome.title}: {told}."


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
