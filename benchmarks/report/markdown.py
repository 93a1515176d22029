"""``summary.md``: the report without its pictures, for a repository's pages."""

import html
from collections.abc import Iterator, Mapping

from benchmarks.cases import OURS, Outcome
from benchmarks.report import facts, tables, words
from benchmarks.report.compare import Comparison
from benchmarks.results import Results


def render(results: Results, comparison: Comparison | None) -> str:
    """The whole file."""
    parts = ["# Benchmarks", words.scope(results) + ". " + words.summary(results)]
    parts += [
        "## Against each library",
        words.BY_FASTEST,
        _standings(results),
    ]
    parts += ["## Where we are behind", _behind(results)]
    if comparison is not None:
        parts += ["## What changed", *_changes(comparison)]
    parts += ["## Findings", *_findings(results)]
    for suite, outcomes in results.suites().items():
        parts += [f"## {words.title(suite)}", words.question(suite), *_suite(results, suite, outcomes)]
    parts += ["## The machine", grid(["", ""], [[f"**{name}**", value] for name, value in words.environment(results)])]
    parts += ["## How to read", "\n".join(f"- {line}" for line in words.HOW_TO_READ)]
    return "\n\n".join(part for part in parts if part) + "\n"


def grid(heads: list[str], lines: list[list[str]], text: int = 1) -> str:
    """A table; the first ``text`` columns are flush left."""
    rules = [":--" if i < text or head in ("", "note") else "--:" for i, head in enumerate(heads)]
    return "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in (heads, rules, *lines))


def _escape(cell: str) -> str:
    return html.escape(cell, quote=False).replace("|", "\\|").replace("\n", " ")


def _standings(results: Results) -> str:
    lines = [[peer, *cells] for peer, cells in words.standings(results)]
    return grid(["library", *words.STANDINGS], lines) if lines else "No other library has a row."


def _behind(results: Results) -> str:
    lines = words.behind(results)
    return grid(words.BEHIND, lines, text=2) if lines else words.NOT_BEHIND


def _changes(comparison: Comparison) -> Iterator[str]:
    yield "\n".join(f"- {line}" for line in comparison.lines())
    if comparison.changes:
        yield grid(CHANGES, [cells(change) for change in comparison.changes], text=3)


CHANGES = ["what", "case", "who", "before", "after", "time, \u00d7 before"]


def cells(change) -> list[str]:
    """The cells below ``CHANGES``."""
    factor = "" if change.factor is None else f"{change.factor:.2f}"
    return [change.kind, change.id, change.name, change.before, change.after, factor]


def _findings(results: Results) -> Iterator[str]:
    found = [f for suite, outcomes in results.suites().items() for f in facts.findings(suite, outcomes)]
    yield from (f"**{finding.question}** {finding.answer}" for finding in found)
    if not found:
        yield "The suites of this run conclude nothing."


def _suite(results: Results, suite: str, outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    """The overview of the races, then each case in full."""
    heads, lines = tables.overview(outcomes)
    if lines:
        yield grid(["time, \u00d7 ours", *heads], [[title, *cells] for _, title, cells in lines])
    for id, outcome in outcomes.items():
        yield from _case(results, suite, id, outcome)


def _case(results: Results, suite: str, id: str, outcome: Outcome) -> Iterator[str]:
    yield f"<details><summary>{html.escape(outcome.title)} <code>{id}</code></summary>"
    if outcome.caption:
        yield outcome.caption
    if outcome.rows:
        found = tables.table(outcome, facts.rates(results, suite))
        notes = ["note"] if found.has_notes else []
        yield grid(["", *found.columns, *notes], [[_name(row), *cells, *[row.note for _ in notes]]
                                                  for row, cells in found.lines])  # fmt: skip
    claims = [claim for claim in outcome.claims if not (claim.correctness and claim.holds)]
    if claims:
        yield "\n".join(f"- {'holds' if claim.holds else '**FAILS**'}: {claim.text}" for claim in claims)
    yield "</details>"


def _name(row) -> str:
    name = f"**{row.name}**" if row.peer == OURS else row.name
    return f"{name} ({words.STATUS[row.status]})" if row.status in words.STATUS else name
