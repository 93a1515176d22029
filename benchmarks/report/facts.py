"""What the rows say: who is level, ahead or behind, and by which rule."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from benchmarks import peers, suites
from benchmarks.cases import OURS, Claim, Finding, Outcome, Plot, Row
from benchmarks.results import Results

MARGIN = 0.95  # a ratio closer to one than this is a tie, whatever the quartiles say
RACE = {"ratio", "seconds", "low", "high", "compile_seconds", "temporary_bytes", "flops", "bytes", "error", "program"}


def number(row: Row, name: str) -> float | None:
    """A metric of a row, if it is there and finite."""
    value = row.metrics.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def is_race(outcome: Outcome) -> bool:
    """Whether its rows have the metrics of a race only, so that they may be sorted by time."""
    return all(set(row.metrics) <= RACE for row in outcome.rows)


def by_time(outcome: Outcome) -> list[Row]:
    """The rows of a race, fastest first and those without a time last; those of a study as they came."""
    if not is_race(outcome):
        return outcome.rows
    return sorted(outcome.rows, key=lambda row: number(row, "seconds") or math.inf)


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows whose answers were right and which were set against ours."""
    return [row for row in rows if row.status == "ok" and number(row, "ratio") and number(row, "seconds")]


def ours(outcome: Outcome) -> Row | None:
    """The row that ratios are to: the first of ours in a race, the fastest in a study."""
    return next((row for row in timed(outcome.rows) if row.peer == OURS and row.metrics["ratio"] == 1), None)


def apart(a: Row, b: Row) -> bool:
    """Whether the median of neither row lies between the quartiles of the other."""
    return not (_holds(a, b) or _holds(b, a))


def _holds(a: Row, b: Row) -> bool:
    """Whether the quartiles of one row hold the median of the other."""
    low, median, high = number(a, "low"), number(b, "seconds"), number(a, "high")
    return low is not None and median is not None and high is not None and low <= median <= high


def is_one_call(row: Row) -> bool:
    """Whether a row was so slow that one call is all there is of it."""
    return number(row, "low") == number(row, "seconds") == number(row, "high") is not None


def twins(outcomes: Mapping[str, Outcome]) -> list[float]:
    """The ratios of rows that are the same program as ours, from which only the clock can have kept them: sorted."""
    pairs = [(row, own) for outcome in outcomes.values() if (own := ours(outcome)) for row in timed(outcome.rows)]
    return sorted(row.metrics["ratio"] for row, own in pairs if row is not own and row.shares_program_with(own))


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
        """What the two rows say about it."""
        same = self.ours.shares_program_with(self.peer)
        why = ["the same program: a difference of the clock"] if same else self._reasons()
        notes = [row.note for row in (self.ours, self.peer) if row.note]
        return "; ".join(dict.fromkeys([*why, *notes]))

    def _reasons(self) -> list[str]:
        """What the suite says of the cases whose ids begin so, against rows whose names begin so."""
        reasons = getattr(suites.SUITES.get(self.id.split("/")[0]), "REASONS", {})
        return [
            why for (case, row), why in reasons.items() if self.id.startswith(case) and self.peer.name.startswith(row)
        ]


def behind(outcomes: Mapping[str, Outcome]) -> list[Behind]:
    """Every row of a peer that ours is behind, the worst first."""
    found = []
    for id, outcome in outcomes.items():
        own = ours(outcome)
        found += [
            Behind(id, outcome.title, row, own)
            for row in timed(outcome.rows)
            if own is not None and row.peer != OURS and standing(row, own) == "behind"
        ]
    return sorted(found, key=lambda entry: entry.peer.metrics["ratio"])


def lost(outcomes: Mapping[str, Outcome]) -> list[str]:
    """The races in which another library has a right answer, and ours none."""
    return [
        id
        for id, outcome in outcomes.items()
        if ours(outcome) is None and any("ratio" in row.metrics and row.status == "ok" for row in outcome.rows)
    ]


def best(outcome: Outcome, peer: str) -> Row | None:
    """The fastest right row of a library; of ours, the one that ratios are to."""
    if peer == OURS:
        return ours(outcome)
    return min((row for row in timed(outcome.rows) if row.peer == peer), key=lambda r: r.metrics["ratio"], default=None)


@dataclass
class Standing:
    """How a library did, by its fastest right row of each case, and what became of its other rows."""

    peer: str
    ratios: list[float] = field(default_factory=list)
    ahead: int = 0
    level: int = 0
    behind: int = 0
    wrong: int = 0
    failed: int = 0
    absent: int = 0

    @property
    def mean(self) -> float | None:
        """The geometric mean of its ratios."""
        return math.exp(sum(map(math.log, self.ratios)) / len(self.ratios)) if self.ratios else None


def standings(outcomes: Mapping[str, Outcome]) -> list[Standing]:
    """One for each library that has a row, in the order of ``peers.PACKAGES``."""
    found: dict[str, Standing] = {}
    for outcome in outcomes.values():
        for row in outcome.rows:
            one = found.setdefault(row.peer, Standing(row.peer))
            if row.status in ("wrong", "failed", "absent"):
                setattr(one, row.status, getattr(one, row.status) + 1)
        own = ours(outcome)
        for peer in {row.peer for row in outcome.rows} - {OURS}:
            row = best(outcome, peer)
            if row is not None and own is not None:
                found[peer].ratios.append(row.metrics["ratio"])
                name = standing(row, own)
                setattr(found[peer], name, getattr(found[peer], name) + 1)
    order = list(peers.PACKAGES)
    met = [one for one in found.values() if one.ratios or one.wrong or one.failed or one.absent]
    return sorted(met, key=lambda one: order.index(one.peer) if one.peer in order else len(order))


def rates(results: Results, suite: str) -> dict[str, float]:
    """The measured roofs for the precision that a suite runs in; empty where they were not measured."""
    dtype = getattr(suites.SUITES.get(suite), "DTYPE", results.options.get("dtype"))
    return results.rates.get(dtype, {})


def failing(outcomes: Mapping[str, Outcome]) -> Iterator[tuple[str, Claim]]:
    """The claims that do not hold, with the ids of their cases."""
    for id, outcome in outcomes.items():
        for claim in outcome.claims:
            if not claim.holds:
                yield id, claim


def findings(suite: str, outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """What a suite concludes; one that cannot conclude must not cost the report, and says why."""
    return _ask(suite, "findings", outcomes, lambda why: Finding("(no findings)", why, []))


def plots(suite: str, outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """What a suite draws."""
    return _ask(suite, "plots", outcomes, lambda why: Plot("none", why, "", "", []))


def _ask(suite, name, outcomes, instead):
    module = suites.SUITES.get(suite)
    try:
        return list(getattr(module, name, lambda outcomes: [])(outcomes))
    except Exception as error:
        return [instead(f"The {name} of this suite could not be made: {type(error).__name__}: {error}")]
