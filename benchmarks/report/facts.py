"""What the rows say: who is level, ahead or behind, by which rule; and the sentences that page and summary share."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
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


@dataclass
class Standing:
    """How a library did, by its fastest right row of each case, and what became of its other rows."""

    peer: str
    ratios: list[float] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))


COUNTS = ("ahead", "level", "behind", "wrong", "failed", "absent")
STANDINGS = ["cases", "mean, \u00d7 ours", "least", "most", "ours ahead", "level", "ours behind", *COUNTS[3:]]


def standings(outcomes: Outcomes) -> list[list[str]]:
    """For each library that has a row the cells that ``library`` and ``STANDINGS`` head."""
    found = {peer: Standing(peer) for peer in (*peers.PACKAGES, *reading.others(outcomes)) if peer != OURS}
    for outcome in outcomes.values():
        for row in outcome.rows:
            if row.peer != OURS and row.status in COUNTS:
                found[row.peer].counts[row.status] += 1
        own = ours(outcome)
        for peer in {row.peer for row in outcome.rows} - {OURS}:
            row = best(outcome, peer)
            if row is not None and own is not None:
                found[peer].ratios.append(row.metrics["ratio"])
                found[peer].counts[standing(row, own)] += 1
    lines = []
    for peer, one in found.items():
        if one.ratios or any(one.counts.values()):
            mean = math.exp(sum(map(math.log, one.ratios)) / len(one.ratios)) if one.ratios else 0.0
            figures = [digits(mean), digits(min(one.ratios)), digits(max(one.ratios))] if one.ratios else [""] * 3
            lines.append([peer, str(len(one.ratios)), *figures, *(str(count or "") for count in one.counts.values())])
    return lines


def rates(results: Results, suite: str) -> dict[str, float]:
    """The measured roofs for the precision that a suite runs in; empty where they were not measured."""
    dtype = getattr(suites.SUITES.get(suite), "DTYPE", results.options.get("dtype"))
    return results.rates.get(dtype, {})


def findings(suite: str, outcomes: Outcomes) -> list[Finding]:
    """What a suite concludes from the outcomes of a run; one that cannot conclude must not cost the report.

    An entry of ``notes.toml`` compares pairs of rows, or, without pairs, the other libraries with ours.
    """

    def of_notes() -> list[Finding]:
        found = []
        for entry in reading.NOTES.get(suite, {}).get("findings", []):
            chosen = reading.part(outcomes, entry["cases"])
            pairs = {label: (row, of) for label, row, of in entry.get("pairs", [])}
            if not pairs:
                found.append(reading.compared(entry["question"], chosen))
            else:
                found += reading.ratios(entry["question"], chosen, pairs, entry.get("metric", "seconds"))
        return found

    return _ask(suite, "findings", outcomes, of_notes, lambda why: Finding("(no findings)", why))


def plots(suite: str, outcomes: Outcomes) -> list[Plot]:
    def of_notes() -> list[Plot]:
        entries = [dict(entry) for entry in reading.NOTES.get(suite, {}).get("plots", [])]
        return [p for entry in entries for p in reading.over(reading.part(outcomes, entry.pop("cases")), **entry)]

    return _ask(suite, "plots", outcomes, of_notes, lambda why: Plot("none", why, "", "", []))


def _ask(suite: str, name: str, outcomes: Outcomes, of_notes: Any, instead: Any) -> list[Any]:
    make = getattr(suites.SUITES.get(suite), name, lambda outcomes: [])
    try:
        return [*make(outcomes), *of_notes()]
    except Exception as error:
        return [instead(f"The {name} of this suite could not be made: {type(error).__name__}: {error}")]


def scope(results: Results) -> str:
    options = results.options
    dtype = options["dtype"]
    own = {suite: getattr(suites.SUITES.get(suite), "DTYPE", dtype) for suite in results.suites()}
    others = [f"{other} in {suite}" for suite, other in own.items() if other != dtype]
    dtype = f"{dtype} ({', '.join(others)})" if others else dtype
    parts = ["Quick run" if options["quick"] else "Full run", dtype, options["device"].upper()]
    parts += [f"models {', '.join(options['models'])}"] if options["models"] else []
    cases = f"{len(results.outcomes)} cases"
    return ", ".join([*parts, cases if results.complete else f"{cases}, cut off before its end"])


def environment(results: Results) -> list[list[str]]:
    here = results.environment
    packages: Mapping[str, str | None] = here["packages"]
    rates = [
        f"{digits(rate['flops_per_second'] / 1e9)} GFLOP/s, {digits(rate['bytes_per_second'] / 1e9)} GB/s ({dtype})"
        for dtype, rate in results.rates.items()
    ]
    rows = {
        "Machine": f"{here['processor']}, {here['memory_gib']} GiB, {here['system']}",
        "Device": f"{here['device']} ({here['platform']})",
        "Threads": f"{here['threads']} for every library",
        "Measured rates": "; ".join(rates),
        "Commit": here["commit"],
        "Begun": results.started,
        "Python": here["python"],
        "Packages": ", ".join(f"{name} {version}" for name, version in packages.items() if version is not None),
        "Absent": ", ".join(name for name, version in packages.items() if version is None),
    }
    return [[name, value] for name, value in rows.items() if value]


def summary(results: Results) -> str:
    outcomes = results.outcomes
    found = [(outcome, own) for outcome in outcomes.values() if (own := ours(outcome))]
    if not found:
        return "No race of this run has a right answer of ours."
    late = {entry.id for entry in behind(outcomes)}
    wrong = sum(row.status == "wrong" for outcome in outcomes.values() for row in outcome.rows)
    without = f" Others have a right answer where ours has none: {', '.join(lost(outcomes))}." if lost(outcomes) else ""
    pairs = [(row, own) for outcome, own in found for row in timed(outcome.rows) if row is not own]
    twins = sorted(row.metrics["ratio"] for row, own in pairs if row.shares_program_with(own))
    noise = (
        " Rows that are one and the same compiled program as ours differ from it by factors from "
        f"{digits(twins[0])} to {digits(twins[-1])}: finer than that the clock was not." if twins else ""
    )  # fmt: skip
    return (
        f"Ours is ahead of or level with every row of every other library in {len(found) - len(late)} of {len(found)} "
        f"races, and behind one in {len(late)}. {wrong or 'No'} answer{'s' * (wrong != 1)} "
        f"{'was' if wrong == 1 else 'were'} wrong.{without}{noise}"
    )


def is_one_call(row: Row) -> bool:
    """Whether a row was so slow that one call is all there is of it."""
    return number(row, "low") == number(row, "seconds") == number(row, "high") is not None


LATE = ["case", "who", "\u00d7 ours", "ms", "ours, ms", "note"]
NOT_LATE = "In no row: no right answer of another library came over 5% sooner, beyond the quartiles of ours."


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
