"""The report of a run: lines in the terminal, a page, markdown and pictures, all made from the results.

The page and the markdown are the templates ``index.html`` and ``summary.md`` of this folder, and ``say.jinja`` is what
they share.
"""

import re
import textwrap
from pathlib import Path

import jinja2
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks.cases import OURS, Outcome
from benchmarks.report import compare, facts, plots, tables
from benchmarks.results import Results
from benchmarks.suites import SUITES
from benchmarks.timing import digits, plain_table

_LOOKS = {"wrong": "bold red", "failed": "yellow", "absent": "dim", "floor": "dim"}


def short_lines(id: str, outcome: Outcome, *, brief: bool = True) -> list[RenderableType]:
    """What the terminal shows of a case: its table, why a row has no time, the claims."""
    said: list[RenderableType] = [Text.assemble((outcome.title, "bold"), f"  {id}, {outcome.seconds:.0f} s")]
    if outcome.rows:
        found = tables.table(outcome, brief=brief)
        screen = plain_table("", ["", *(textwrap.fill(head, 11) for head in found.columns)])
        screen.title = None
        for row, cells in found.lines:
            name = escape(f"{row.name}  {facts.STATUS[row.status]}" if row.status in facts.STATUS else row.name)
            screen.add_row(name, *cells, style=_LOOKS.get(row.status, "bold" if row.peer == OURS else ""))
        said.append(screen)
    said += [Text(f"  {outcome.caption}")] if outcome.caption and not brief else []
    noted = ("wrong", "failed") if brief else ("ok", *_LOOKS)
    said += [
        Text(f"  {r.name}: {r.note}", _LOOKS.get(r.status, "")) for r in outcome.rows if r.status in noted and r.note
    ]
    for claim in outcome.claims:
        if not claim.holds:
            said.append(Text(f"  FAILS  {claim.text}", "bold red"))
        elif not claim.correctness:
            said.append(Text(f"  holds  {claim.text}", "green"))
    return said


def write(results: Results, output: Path, old: Results | None, screen: Console) -> None:
    """Write ``index.html``, ``summary.md`` and the pictures into a folder, and print what they conclude.

    ``old`` is an earlier run to compare with.
    """
    comparison = None if old is None else compare.compare(old, results)
    output.mkdir(parents=True, exist_ok=True)
    headlines = plots.headlines(results.outcomes)
    for plot in headlines:
        if (figure := plots.draw(plot)) is not None:
            (output / f"{plot.name}.svg").write_bytes(plots.svg(figure, plot.name))
    for name in ("index.html", "summary.md"):
        (output / name).write_text(render(name, results, comparison, headlines), encoding="utf-8")
    for suite in results.suites():
        for finding in facts.findings(suite, results.outcomes):
            screen.print(Text.assemble((finding.question, "bold"), f"\n  {finding.answer}"))
    for line in comparison.lines() if comparison else ():
        screen.print(line, soft_wrap=True)
    if comparison and comparison.changes:
        table = Table(box=None, pad_edge=False)
        for i, head in enumerate(compare.HEADS):
            table.add_column(head, justify="left" if i < 3 else "right")
        for change in comparison.changes:
            look = {"slower": "yellow", "faster": "green", "status": "bold red"}.get(change.kind, "")
            table.add_row(*map(escape, change.cells), style=look)
        screen.print(table)
    screen.print(environment().get_template("say.jinja").make_module({"results": results}).summary().strip(),
                 style="bold", soft_wrap=True)  # fmt: skip
    screen.print(f"The report: {output / 'index.html'}, {output / 'summary.md'}", soft_wrap=True)


def environment(*, autoescape: bool = False) -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=autoescape, trim_blocks=True,
        lstrip_blocks=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {
        "anchor": lambda text: re.sub(r"[^\w.-]+", "-", text), "picture": plots.data_uri, "own": facts.ours,
        "cell": lambda text: text.replace("\n", " ").replace("|", "\\|").replace("<", "&lt;"), "digits": digits,
    }  # fmt: skip
    made.globals |= {"facts": facts, "tables": tables, "compare": compare, "ours": OURS}
    made.globals["of_suite"] = lambda suite, name: getattr(SUITES.get(suite), name, "")
    return made


def render(
    name: str, results: Results, comparison: compare.Comparison | None = None, headlines: list[plots.Plot] | None = None
) -> str:
    return environment(autoescape=name.endswith(".html")).get_template(name).render(
        results=results, comparison=comparison, headlines=headlines or [], roofline=plots.roofline(results)
    )  # fmt: skip
