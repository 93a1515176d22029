"""The report of a run: lines in the terminal, a page, and markdown, all made from what ``results.json`` holds."""

import textwrap
from pathlib import Path

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks.cases import OURS, Outcome, Row
from benchmarks.report import facts, markdown, page, tables, words
from benchmarks.report.compare import Comparison, compare
from benchmarks.results import Results
from benchmarks.timing import plain_table

_LOOKS = {"wrong": "bold red", "failed": "yellow", "absent": "dim", "floor": "dim"}


def short_lines(id: str, outcome: Outcome) -> list[RenderableType]:
    """What the terminal shows of a case: its table, why a row has no time, the claims."""
    said: list[RenderableType] = [Text.assemble((outcome.title, "bold"), f"  {id}, {outcome.seconds:.0f} s")]
    if outcome.rows:
        found = tables.table(outcome, brief=True)
        screen = plain_table("", ["", *(textwrap.fill(head, 11) for head in found.columns)])
        screen.title = None
        for row, cells in found.lines:
            screen.add_row(_name(row), *cells, style=_LOOKS.get(row.status, "bold" if row.peer == OURS else ""))
        said.append(screen)
    said += [Text(f"  {row.name}: {row.note}", _LOOKS[row.status]) for row in outcome.rows
             if row.status in ("wrong", "failed") and row.note]  # fmt: skip
    for claim in outcome.claims:
        if not claim.holds:
            said.append(Text(f"  FAILS  {claim.text}", "bold red"))
        elif not claim.correctness:
            said.append(Text(f"  holds  {claim.text}", "green"))
    return said


def _name(row: Row) -> str:
    return escape(f"{row.name}  {words.STATUS[row.status]}" if row.status in words.STATUS else row.name)


def write(results: Results, output: Path, old: Results | None, screen: Console) -> None:
    """Write ``index.html`` and ``summary.md``, and say what they conclude.

    Args:
        results: the run.
        output: the folder.
        old: an earlier run to compare with.
        screen: the terminal.
    """
    comparison = None if old is None else compare(old, results)
    output.mkdir(parents=True, exist_ok=True)
    (output / "index.html").write_text(page.render(results, comparison), encoding="utf-8")
    (output / "summary.md").write_text(markdown.render(results, comparison), encoding="utf-8")
    for suite, outcomes in results.suites().items():
        for finding in facts.findings(suite, outcomes):
            screen.print(Text.assemble((finding.question, "bold"), f"\n  {finding.answer}"))
    if comparison is not None:
        _say_changes(screen, comparison)
    screen.print(words.summary(results), style="bold", soft_wrap=True)
    screen.print(f"The report: {output / 'index.html'}, {output / 'summary.md'}", soft_wrap=True)


def _say_changes(screen: Console, comparison: Comparison) -> None:
    for line in comparison.lines():
        screen.print(line, soft_wrap=True)
    if comparison.changes:
        table = Table(box=None, pad_edge=False)
        for i, head in enumerate(markdown.CHANGES):
            table.add_column(head, justify="left" if i < 3 else "right")
        for change in comparison.changes:
            look = {"slower": "yellow", "faster": "green", "status": "bold red"}.get(change.kind, "")
            table.add_row(*map(escape, markdown.cells(change)), style=look)
        screen.print(table)
