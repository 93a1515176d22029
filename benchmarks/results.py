"""``results.json``: written after every case, so that a run can be cut off and taken up again, and compared later."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.cases import Outcome

FORMAT = 1


@dataclass
class Results:
    """A run: where, with which options, and what came of each case by its id, in the order they ran.

    Attributes:
        environment: of ``benchmarks.machine.environment``.
        options: the choice of the command line.
        rates: the machine's measured rates, by precision.
        outcomes: by id.
        complete: whether the run came to its end.
        started: when it began, for the reader; a run that is taken up again keeps it.
    """

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
        """Write it, whole or not at all."""
        file.parent.mkdir(parents=True, exist_ok=True)
        entry = {
            "format": FORMAT, "complete": self.complete, "started": self.started,
            "environment": self.environment, "options": self.options,
            "rates": self.rates, "outcomes": {id: outcome.to_json() for id, outcome in self.outcomes.items()},
        }  # fmt: skip
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(entry, indent=1) + "\n")
        partial.replace(file)


def load(file: Path) -> Results:
    """Read what ``save`` wrote.

    Raises:
        ValueError: if the file is of another format.
    """
    entry = json.loads(file.read_text())
    if entry.get("format") != FORMAT:
        raise ValueError(f"{file} has format {entry.get('format')!r}, this version reads {FORMAT}; run it again")
    outcomes = {id: Outcome.from_json(outcome) for id, outcome in entry["outcomes"].items()}
    return Results(
        entry["environment"], entry["options"], entry["rates"], outcomes, entry["complete"], entry.get("started", "")
    )
