"""What suites read from outcomes: shares of one row in another, claims, lines of a plot, and findings made of ratios.

A value that is missing is None, or left out.
"""

import fnmatch
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases import OURS, Claim, Finding, Line, Outcome, Outcomes, Plot, Row
from benchmarks.timing import digits

# By suite: what needs no code of its own, claims, reasons why ours is behind, plots and findings.
NOTES: dict[str, dict[str, Any]] = tomllib.loads((Path(__file__).parent / "suites" / "notes.toml").read_text("utf-8"))
MISSING = "Not measured in this run."
AXES = {"seconds": ("time", "ms", 1e3), "temporary_bytes": ("temporaries", "MiB", 2**-20)}


def part(outcomes: Outcomes, prefix: str) -> dict[str, Outcome]:
    return {id: outcome for id, outcome in outcomes.items() if id.startswith(prefix)}


def number(row: Row | None, metric: str) -> float | None:
    value = None if row is None else row.metrics.get(metric)
    return float(value) if isinstance(value, int | float) else None


def timed(outcome: Outcome, name: str) -> Row | None:
    return next((row for row in outcome.rows if row.name == name and row.status in ("ok", "floor")), None)


def share(outcome: Outcome, name: str, of: str, metric: str = "seconds") -> float | None:
    """A metric of one row relative to that of another; None where one of them is missing."""
    a, b = (number(timed(outcome, row), metric) for row in (name, of))
    return a / b if a is not None and b else None


def shares(outcomes: Outcomes, name: str, of: str, metric: str = "seconds") -> list[float]:
    return [value for outcome in outcomes.values() if (value := share(outcome, name, of, metric)) is not None]


def at_most(outcome: Outcome, name: str, of: str, wanted: float, metric: str = "seconds") -> list[Claim]:
    """The claim that a row takes at most so much of another; none where one of them is missing."""
    measured = share(outcome, name, of, metric)
    if measured is None:
        return []
    what = {"seconds": "the time", "temporary_bytes": "the temporary memory"}[metric]
    text = f"{name} takes {measured:.2f} of {what} of: {of} (wanted: at most {wanted:.2f})"
    return [Claim(text, measured <= wanted)]


def noted_claims(id: str, outcome: Outcome) -> list[Claim]:
    """The claims of ``notes.toml`` about the case with this id."""
    noted = NOTES.get(id.split("/")[0], {}).get("claims", [])
    return [claim for pattern, *of in noted if fnmatch.fnmatchcase(id, pattern) for claim in at_most(outcome, *of)]


def fastest(outcome: Outcome, peer: str) -> Row | None:
    rows = [row for row in outcome.rows if row.peer == peer and row.status == "ok" and number(row, "seconds")]
    return min(rows, key=lambda row: row.metrics["seconds"], default=None)


def ratio_of_fastest(outcome: Outcome, peer: str, to: str = OURS) -> float | None:
    a, b = (number(fastest(outcome, name), "seconds") for name in (peer, to))
    return a / b if a is not None and b else None


def others(outcomes: Outcomes) -> list[str]:
    return list(dict.fromkeys(row.peer for outcome in outcomes.values() for row in outcome.rows if row.peer != OURS))


def curves(outcomes: Outcomes, axis: str, metric: str = "seconds", scale: float = 1.0) -> list[Line]:
    """For each name of a row the metric over a size, where there are two points or more."""
    lines: dict[str, Line] = {}
    for outcome in sorted(outcomes.values(), key=lambda outcome: outcome.sizes.get(axis, 0.0)):
        for row in outcome.rows:
            value = number(row, metric)
            if row.status in ("ok", "floor") and value and axis in outcome.sizes:
                style = "dashed" if row.status == "floor" else "line"
                line = lines.setdefault(row.name, Line(row.name, [], [], style, row.peer))
                line.x.append(outcome.sizes[axis])
                line.y.append(scale * value)
    names = dict.fromkeys(row.name for outcome in outcomes.values() for row in outcome.rows)
    return [lines[name] for name in names if name in lines and len(lines[name].x) > 1]


def over(
    outcomes: Outcomes, axis: str, name: str, title: str, label: str, metric: str = "seconds", *, x_log: bool = True
) -> list[Plot]:
    """A plot of a metric over a size, in a list that is empty where there is nothing to draw."""
    what, unit, scale = AXES[metric]
    lines = curves(outcomes, axis, metric, scale)
    return [Plot(name, title, label, f"{what}, {unit}", lines, x_log=x_log)] if lines else []


def spread(values: Iterable[float | None]) -> str:
    """The range of ratios in words."""
    found = sorted(value for value in values if value is not None)
    if not found:
        return "not measured"
    low, high = digits(found[0]), digits(found[-1])
    return f"{low} times" if low == high else f"{low} to {high} times"


def ratios(
    question: str, outcomes: Outcomes, pairs: Mapping[str, tuple[str, str]], metric: str = "seconds"
) -> list[Finding]:
    """How many times as much one row takes as another, for each label of a pair; empty without outcomes."""
    said = [
        f"{label}: {spread(found)} (above 1 in {sum(ratio > 1 for ratio in found)} of {len(found)})"
        for label, pair in pairs.items()
        if (found := shares(outcomes, *pair, metric))
    ]
    return [Finding(question, "; ".join(said) + "." if said else MISSING)] if outcomes else []


def comparison(outcome: Outcome) -> str:
    """How many times as long each right row of another library takes as ours, as one sentence."""
    others = [
        f"{row.name} {row.metrics['ratio']:.2f}"
        for row in outcome.rows
        if row.status == "ok" and row.peer != OURS and row.metrics.get("ratio") is not None
    ]
    return f"{outcome.title}: {'times ours, ' + ', '.join(others) if others else 'nobody to compare with'}."


def compared(question: str, outcomes: Outcomes) -> Finding:
    return Finding(question, " ".join(map(comparison, outcomes.values())) or MISSING)
