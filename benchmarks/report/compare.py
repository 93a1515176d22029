"""What changed between two runs, once the speed of the machine has been taken out."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.cases import OURS, Outcome, Row
from benchmarks.report import facts
from benchmarks.results import Results

_MACHINE = ("processor", "device", "platform", "threads", "memory_gib", "system", "python")
_ORDER = ("status", "claim", "slower", "faster", "gone", "new")
HEADS = ["what", "case", "who", "before", "after", "time, \u00d7 before"]


@dataclass
class Change:
    """A row that differs by more than its quartiles.

    Attributes:
        kind: ``"status"``, ``"claim"``, ``"slower"``, ``"faster"``, ``"gone"`` or ``"new"``.
        name: of the contestant; of a claim, its text.
        before, after: the ratio to ours, or the status, as text.
        factor: time after by time before, over the same factor of the machine.
    """

    kind: str
    id: str
    name: str
    before: str = ""
    after: str = ""
    factor: float | None = None

    @property
    def cells(self) -> list[str]:
        factor = "" if self.factor is None else f"{self.factor:.2f}"
        return [self.kind, self.id, self.name, self.before, self.after, factor]


@dataclass
class Comparison:
    """The changes, and what a reader must know to trust them.

    Attributes:
        machine: the factor of the time of unchanged peers, by its geometric mean; None if there are none.
        peers: over how many rows that mean was taken.
        differences: of machine, options and packages, as sentences.
        changes: changes of status first, then the largest factor first.
        commits: before and after.
    """

    machine: float | None
    peers: int
    differences: list[str]
    changes: list[Change]
    commits: tuple[str, str]

    def lines(self) -> list[str]:
        said = [f"From commit {self.commits[0] or 'unknown'} to {self.commits[1] or 'unknown'}."]
        if self.machine is None:
            said.append("No row of an unchanged peer is in both runs: times are compared as measured.")
        else:
            said.append(
                f"The {self.peers} rows of unchanged peers took {self.machine:.2f} times as long as before (geometric "
                "mean); the times below are divided by that."
            )
        return said + self.differences + ([] if self.changes else ["Nothing changed by more than its quartiles."])


def compare(old: Results, new: Results) -> Comparison:
    versions = old.environment["packages"], new.environment["packages"]
    both, unchanged = [], []  # the rows of both runs; how many times as long those of others took that have not changed
    for id, outcome in new.outcomes.items():
        before = {row.name: row for row in old.outcomes.get(id, Outcome()).rows}
        for row in outcome.rows:
            if row.name in before:
                both.append((id, before[row.name], row))
                same = row.peer != OURS and versions[0].get(row.peer) == versions[1].get(row.peer)
                if same and _has_time(before[row.name], row):
                    unchanged.append(row.metrics["seconds"] / before[row.name].metrics["seconds"])
    machine = math.exp(sum(map(math.log, unchanged)) / len(unchanged)) if unchanged else None
    changes = [Change("status", id, b.name, a.status, b.status) for id, a, b in both if a.status != b.status]
    changes += [*_claims(old, new), *_times(both, machine or 1.0)]
    changes += [*_missing("gone", old, new), *_missing("new", new, old)]
    changes.sort(key=lambda c: (_ORDER.index(c.kind), -abs(math.log(c.factor)) if c.factor else 0.0))
    commits = (old.environment.get("commit", ""), new.environment.get("commit", ""))
    return Comparison(machine, len(unchanged), list(_differences(old, new)), changes, commits)


def _has_time(*rows: Row) -> bool:
    return all(row.status in ("ok", "floor") and facts.number(row, "seconds") for row in rows)


def _claims(old: Results, new: Results) -> Iterator[Change]:
    """Claims that hold now and did not, or the reverse; those of correctness show in the status of their rows."""
    words = {True: "holds", False: "FAILS"}
    for id, outcome in new.outcomes.items():
        before = {claim.text: claim.holds for claim in old.outcomes.get(id, Outcome()).claims}
        for claim in outcome.claims:
            was = before.get(claim.text, claim.holds)
            if was != claim.holds and not claim.correctness:
                yield Change("claim", id, claim.text, words[was], words[claim.holds])


def _times(both: list[tuple[str, Row, Row]], machine: float) -> Iterator[Change]:
    """Times whose medians differ by over 5% and lie out of each other's quartiles, both on the new machine's clock."""
    for id, old, new in both:
        if _has_time(old, new):
            times = {name: facts.number(old, name) for name in ("seconds", "low", "high")}
            scaled = Row(old.name, old.peer, metrics={k: None if v is None else v * machine for k, v in times.items()})
            factor = new.metrics["seconds"] / scaled.metrics["seconds"]
            if not facts.MARGIN <= factor <= 1 / facts.MARGIN and facts.apart(scaled, new):
                ratios = [row.status if (r := facts.number(row, "ratio")) is None else f"{r:.2f}" for row in (old, new)]
                yield Change("slower" if factor > 1 else "faster", id, new.name, *ratios, factor)


def _missing(kind: str, here: Results, there: Results) -> Iterator[Change]:
    """Rows that only one of the runs has; a case that one of them did not run has one line."""
    for id, outcome in here.outcomes.items():
        if id not in there.outcomes:
            yield Change(kind, id, "the whole case")
            continue
        names = {row.name for row in there.outcomes[id].rows}
        yield from (Change(kind, id, row.name, "", row.status) for row in outcome.rows if row.name not in names)


def _differences(old: Results, new: Results) -> Iterator[str]:
    packages = [run.environment.get("packages", {}) for run in (old, new)]
    for what, keys, before, after in (
        ("The machines", _MACHINE, old.environment, new.environment),
        ("Packages", packages[1], *packages),
        ("The options", new.options, old.options, new.options),
    ):
        pairs = {key: (before.get(key), after.get(key)) for key in keys}
        moved = [f"{key} {was} \u2192 {now}" for key, (was, now) in pairs.items() if was != now]
        if moved:
            yield f"{what} differ: {'; '.join(moved)}."
