"""What the rows say: who is level, ahead or behind, by which rule; and the sentences that page and summary share."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from benchmarks import peers, reading, suites
from benchmarks.cases import OURS, Finding, Outcome, Outcomes, Plot, Row
from benchmarks.results import Results
from benchmarks.timing import digits

MARGIN = 0.95  # a ratio closer to one than this is a tie, even where the quartiles are apart
RACE = {"ratio", "seconds", "low", "high", "compile_seconds", "temporary_bytes", "flops", "bytes", "error", "program"}
STATUS = {"wrong": "WRONG", "failed": "failed", "absent": "absent", "floor": "a part"}


def number(row: Row, name: str) -> float | None:
    value = row.metrics.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def by_time(outcome: Outcome) -> list[Row]:
    """The rows of a race, fastest first and those without a time last; those of a study as they came."""
    if any(set(row.metrics) - RACE for row in outcome.rows):
        return outcome.rows
    return sorted(outcome.rows, key=lambda row: number(row, "seconds") or math.inf)


def timed(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row.status == "ok" and number(row, "ratio") and number(row, "seconds")]


def ours(outcome: Outcome) -> Row | None:
    """The row that ratios refer to: the first of ours in a race, the fastest in a study."""
    return next((row for row in timed(outcome.rows) if row.peer == OURS and row.metrics["ratio"] == 1), None)


def apart(a: Row, b: Row) -> bool:
    """Whether the median of neither row lies between the quartiles of the other."""

    def holds(a: Row, b: Row) -> bool:
        low, median, high = number(a, "low"), number(b, "seconds"), number(a, "high")
        return low is not None and median is not None and high is not None and low <= median <= high

    return not (holds(a, b) or holds(b, a))


def standing(row: Row, ours: Row) -> str:
    """Whether ours is ``"ahead"`` of a row, ``"level"`` with it or ``"behind"``: by over 5%, and apart."""
    ratio = row.metrics["ratio"]
    if MARGIN <= ratio <= 1 / MARGIN or not apart(row, ours):
        return "level"
    return "behind" if ratio < 1 else "ahead"


@dataclass
class Behind:
    """A right answer of a peer that came clearly sooner than ours."""

    id: str
    title: str
    peer: Row
    ours: Row

    @property
    def note(self) -> str:
        reasons = reading.NOTES.get(self.id.split("/")[0], {}).get("reasons", [])
        why = [why for case, row, why in reasons if self.id.startswith(case) and self.peer.name.startswith(row)]
        if self.ours.shares_program_with(self.peer):
            why = ["the same program: a difference of the clock"]
        notes = [row.note for row in (self.ours, self.peer) if row.note]
        return "; ".join(dict.fromkeys([*why, *notes]))


def behind(outcomes: Outcomes) -> list[Behind]:
    found = [
        Behind(id, outcome.title, row, own)
        for id, outcome in outcomes.items()
        if (own := ours(outcome)) is not None
        for row in timed(outcome.rows)
        if row.peer != OURS and standing(row, own) == "behind"
    ]
    return sorted(found, key=lambda entry: entry.peer.metrics["ratio"])


def lost(outcomes: Outcomes) -> list[str]:
    """The races in which another library has a right answer, and ours none."""
    races = {id: any("ratio" in row.metrics and row.status == "ok" for row in o.rows) for id, o in outcomes.items()}
    return [id for id, outcome in outcomes.items() if ours(outcome) is None and races[id]]


def best(outcome: Outcome, peer: str) -> Row | None:
    """The fastest right row of a library; of ours, the one that ratios refer to."""
    if peer == OURS:
        return ours(outcome)
    return min((row for row in timed(outcome.rows) if row.peer == peer), key=lambda r: r.metrics["ratio"], default=None)


COUNTS = ("ahead", "level", "behind", "wrong", "failed", "absent")
STANDINGS = ["cases", "mean, \u00d7 ours", "least", "most", "ours ahead", "level", "ours behind", *COUNTS[3:]]


def standings(outcomes: Outcomes) -> list[list[str]]:
    """How each library did by its fastest right row of each case, and its other rows: what ``STANDINGS`` heads."""
    ratios: dict[str, list[float]] = {p: [] for p in (*peers.PACKAGES, *reading.others(outcomes)) if p != OURS}
    counts = {peer: dict.fromkeys(COUNTS, 0) for peer in ratios}
    for outcome in outcomes.values():
        for row in outcome.rows:
            if row.peer != OURS and row.status in COUNTS:
                counts[row.peer][row.status] += 1
        own = ours(outcome)
        for peer in {row.peer for row in outcome.rows} - {OURS}:
            row = best(outcome, peer)
            if row is not None and own is not None:
                ratios[peer].append(row.metrics["ratio"])
                counts[peer][standing(row, own)] += 1
    lines = []
    for peer, found in ratios.items():
        if found or any(counts[peer].values()):
            mean = math.exp(sum(map(math.log, found)) / len(found)) if found else 0.0
            figures = [digits(mean), digits(min(found)), digits(max(found))] if found else [""] * 3
            lines.append([peer, str(len(found)), *figures, *(str(count or "") for count in counts[peer].values())])
    return lines


def rates(results: Results, suite: str) -> dict[str, float]:
    """The measured roofs for the precision that a suite runs in; empty where they were not measured."""
    dtype = getattr(suites.SUITES.get(suite), "DTYPE", results.options.get("dtype"))
    return results.rates.get(dtype, {})


def findings(suite: str, outcomes: Outcomes) -> list[Finding]:
    """What a suite concludes from the outcomes of a run.

    An entry of ``notes.toml`` compares pairs of rows, or, without pairs, the other libraries with ours.
    """

    def noted(question: str, cases: str, pairs: Any = (), metric: str = "seconds") -> list[Finding]:
        chosen = reading.part(outcomes, cases)
        named = {label: (row, of) for label, row, of in pairs}
        return reading.ratios(question, chosen, named, metric) if pairs else [reading.compared(question, chosen)]

    return _made("findings", suite, outcomes, noted, lambda why: Finding("(no findings)", why))


def plots(suite: str, outcomes: Outcomes) -> list[Plot]:
    def noted(cases: str, **entry: Any) -> list[Plot]:
        return reading.over(reading.part(outcomes, cases), **entry)

    return _made("plots", suite, outcomes, noted, lambda why: Plot("none", why, "", "", []))


def _made(kind: str, suite: str, outcomes: Outcomes, noted: Any, instead: Any) -> list[Any]:
    """What the suite makes and what is noted of it; a suite that cannot conclude must not cost the report."""
    make = getattr(suites.SUITES.get(suite), kind, lambda outcomes: [])
    try:
        return [*make(outcomes), *(one for e in reading.NOTES.get(suite, {}).get(kind, []) for one in noted(**e))]
    except Exception as error:
        return [instead(f"The {kind} of this suite could not be made: {type(error).__name__}: {error}")]


def precisions(results: Results) -> dict[str, str]:
    """The suites that have a precision of their own, and it."""
    run = results.options["dtype"]
    found = {suite: getattr(suites.SUITES.get(suite), "DTYPE", run) for suite in results.suites()}
    return {suite: dtype for suite, dtype in found.items() if dtype != run}


def twins(outcomes: Outcomes) -> list[float]:
    """The ratios of rows that are one and the same compiled program as ours, sorted."""
    pairs = [(row, own) for o in outcomes.values() if (own := ours(o)) for row in timed(o.rows) if row is not own]
    return sorted(row.metrics["ratio"] for row, own in pairs if row.shares_program_with(own))


LATE = ["case", "who", "\u00d7 ours", "ms", "ours, ms", "note"]


def late(outcomes: Outcomes) -> list[list[str]]:
    lines = []
    for entry in behind(outcomes):
        ms = [digits(1e3 * row.metrics["seconds"], 5) for row in (entry.peer, entry.ours)]
        lines.append([entry.id, entry.peer.name, digits(entry.peer.metrics["ratio"]), *ms, entry.note])
    return lines


def late_by_reason(outcomes: Outcomes) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for id, name, ratio, *_, note in late(outcomes):
        found.setdefault(note, []).append(f"`{id}` {name} {ratio}")
    return found


def failing(outcomes: Outcomes) -> list[tuple[str, str]]:
    return [(id, claim.text) for id, o in outcomes.items() for claim in o.claims if not claim.holds]
