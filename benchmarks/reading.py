"""What suites read from outcomes: shares of one row in another, claims about them, lines of a plot."""

from collections.abc import Mapping

from benchmarks.cases import Claim, Line, Outcome, Row


def timed(outcome: Outcome, name: str) -> Row | None:
    """The row of that name, of a right answer or a floor."""
    return next((row for row in outcome.rows if row.name == name and row.status in ("ok", "floor")), None)


def share(outcome: Outcome, name: str, of: str, metric: str = "seconds") -> float | None:
    """A metric of one row relative to that of another; None where one of them is missing."""
    ours, other = timed(outcome, name), timed(outcome, of)
    if ours is None or other is None:
        return None
    above, below = ours.metrics.get(metric), other.metrics.get(metric)
    return float(above) / float(below) if above is not None and below else None


def at_most(outcome: Outcome, name: str, of: str, wanted: float, metric: str = "seconds") -> list[Claim]:
    """The claim that a row takes at most so much of another; none where one of them is missing."""
    measured = share(outcome, name, of, metric)
    if measured is None:
        return []
    what = {"seconds": "the time", "temporary_bytes": "the temporary memory"}[metric]
    text = f"{name} takes {measured:.2f} of {what} of: {of} (wanted: at most {wanted:.2f})"
    return [Claim(text, measured <= wanted)]


def curves(outcomes: Mapping[str, Outcome], prefix: str, axis: str, metric: str, scale: float = 1.0) -> list[Line]:
    """For each row name of the outcomes whose id begins so, a line of a metric over a size; of two points or more."""
    points: dict[str, list[tuple[float, float]]] = {}
    for id, outcome in outcomes.items():
        if id.startswith(prefix) and axis in outcome.sizes:
            for row in outcome.rows:
                value = row.metrics.get(metric)
                if row.status in ("ok", "floor") and isinstance(value, int | float) and value > 0:
                    points.setdefault(row.name, []).append((outcome.sizes[axis], scale * value))
    return [
        Line(name, *(list(axis) for axis in zip(*sorted(found), strict=True)))
        for name, found in points.items()
        if len(found) > 1
    ]


def behind(outcome: Outcome, level: float = 0.95) -> list[Row]:
    """The right rows of others that are faster than the first of ours by more than the clock explains."""
    return [
        row
        for row in outcome.rows
        if row.status == "ok" and row.peer != "curvature" and (row.metrics.get("ratio") or 1.0) < level
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
