"""``results.json.gz``: written after every case, so that a run can be cut off, resumed, and compared later."""

import dataclasses
import gzip
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Claim, Outcome, Row

FORMAT = 1
NAME = "results.json.gz"


@dataclass
class Results:
    """A run: its machine and options, the measured rates by precision, and the outcome of each case by its id."""

    environment: dict[str, Any]
    options: dict[str, Any]
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    complete: bool = False
    started: str = ""

    def suites(self) -> dict[str, dict[str, Outcome]]:
        """The outcomes of each suite; the first part of an id names it."""
        found: dict[str, dict[str, Outcome]] = {}
        for id, outcome in self.outcomes.items():
            found.setdefault(id.split("/")[0], {})[id] = outcome
        return found

    def same_run(self, other: "Results") -> bool:
        """Whether the other was begun on the same machine, with the same packages, commit and options."""
        return (self.environment, self.options) == (other.environment, other.options)

    def save(self, file: Path) -> None:
        """Write it, whole or not at all; the same results give the same bytes."""
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT} | dataclasses.asdict(self), indent=1)
        partial = file.with_suffix(".partial")
        partial.write_bytes(gzip.compress(text.encode(), mtime=0))
        partial.replace(file)


def load(file: Path) -> Results:
    """Read what ``save`` wrote, compressed or not.

    Raises:
        ValueError: if the file is of another format.
    """
    raw = file.read_bytes()
    entry = json.loads(gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw)
    if (format := entry.pop("format", None)) != FORMAT:
        raise ValueError(f"{file} has format {format!r}, this version reads {FORMAT}; run it again")
    for id, outcome in entry["outcomes"].items():
        rows, claims = [Row(**row) for row in outcome["rows"]], [Claim(**claim) for claim in outcome["claims"]]
        entry["outcomes"][id] = Outcome(**outcome | {"rows": rows, "claims": claims})
    return Results(**entry)
