"""The report of a run; placeholder."""

from pathlib import Path

from benchmarks.cases import Outcome
from benchmarks.results import Results


def short_lines(id: str, outcome: Outcome) -> list[str]:
    return [f"{id}"] + [
        f"   {r.name:44} {r.status:7} "
        + " ".join(f"{k}={v:.4g}" for k, v in r.metrics.items() if isinstance(v, float))
        + " "
        + r.note
        for r in outcome.rows
    ]


def write(found: Results, output: Path, old: Results | None, screen) -> None:
    pass
