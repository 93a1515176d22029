"""``index.html``: one file with everything in it, for a screen, a phone, a talk or paper."""

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path

from benchmarks.cases import OURS, Claim, Outcome, Plot, Row
from benchmarks.report import facts, markdown, plots, tables, words
from benchmarks.report.compare import Comparison
from benchmarks.results import Results

_STYLE = Path(__file__).with_name("style.css")


def render(results: Results, comparison: Comparison | None) -> str:
    """The whole page."""
    sections = list(_sections(results, comparison))
    contents = "".join(f'<li><a href="#{id}">{escape(title)}</a></li>' for id, title, _ in sections)
    body = "".join(f'<section id="{id}"><h2>{escape(title)}</h2>{inner}</section>' for id, title, inner in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>curvature: benchmarks</title><style>{_variables()}{_STYLE.read_text()}</style></head><body>"
        f"<header><h1>curvature: benchmarks</h1><p>{escape(words.scope(results))}</p>"
        f'<p class="summary">{escape(words.summary(results))}</p></header>'
        f'<nav><ul>{contents}</ul></nav><main>{body}</main></body></html>\n'
    )  # fmt: skip


def _variables() -> str:
    """The colors of the pictures, for a light page and a dark one."""
    light, dark = ("".join(f"--{name}:{pair[i]};" for name, pair in plots.COLORS.items()) for i in (0, 1))
    return f":root{{{light}}}@media screen and (prefers-color-scheme: dark){{:root{{{dark}}}}}"


def _sections(results: Results, comparison: Comparison | None) -> Iterator[tuple[str, str, str]]:
    """The id, title and inside of each."""
    standings = grid(["library", *words.STANDINGS], [[peer, *cells] for peer, cells in words.standings(results)])
    yield "libraries", "Against each library", f"<p>{words.BY_FASTEST}</p>{standings}"
    late = words.behind(results)
    yield (
        "behind",
        "Where we are behind",
        (
            grid(words.BEHIND, late, text=2, cases=[line[0] for line in late])
            if late
            else f"<p>{escape(words.NOT_BEHIND)}</p>"
        ),
    )
    if comparison is not None:
        yield "changes", "What changed", _changes(comparison)
    for suite, outcomes in results.suites().items():
        yield f"suite-{suite}", words.title(suite), "".join(_suite(results, suite, outcomes))
    roofline = plots.roofline(results)
    if roofline is not None:
        yield "roofline", "Roofline", _picture(roofline, "all")
    environment = [[name, value] for name, value in words.environment(results)]
    yield "machine", "The machine", grid(["", ""], environment, text=2, kind="facts")
    yield "reading", "How to read this", "<ul>" + "".join(f"<li>{_inline(x)}</li>" for x in words.HOW_TO_READ) + "</ul>"


def _inline(text: str) -> str:
    """Text in which stars and back quotes mean what they do in markdown."""
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def grid(heads: list[str], lines: list[list[str]], text: int = 1, kind: str = "", cases: Sequence[str] = ()) -> str:
    """A table that scrolls by itself where it is too wide.

    Args:
        heads: of the columns.
        lines: the cells.
        text: how many columns from the left are flush left; notes are, too.
        kind: a class of the style.
        cases: the id of a case for each line, which its first cell links to.
    """
    sides = ["text" if i < text or head in ("", "note") else "" for i, head in enumerate(heads)]
    top = "".join(_cell("th", head, side) for head, side in zip(heads, sides, strict=True)) if any(heads) else ""
    links = [f"#{anchor(case)}" for case in cases] or [""] * len(lines)
    body = "".join(
        "<tr>"
        + _cell("td", line[0], sides[0], link)
        + "".join(_cell("td", cell, side) for cell, side in zip(line[1:], sides[1:], strict=True))
        + "</tr>"
        for line, link in zip(lines, links, strict=True)
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(tag: str, cell: str, side: str, link: str = "") -> str:
    inner = f'<a href="{escape(link)}">{escape(cell)}</a>' if link else escape(cell)
    return f"<{tag}{f' class={side}' if side else ''}>{inner}</{tag}>"


def anchor(name: str) -> str:
    """A name as an id of the page."""
    return re.sub(r"[^\w.-]+", "-", name)


def _changes(comparison: Comparison) -> str:
    said = "".join(f"<li>{escape(line)}</li>" for line in comparison.lines())
    lines = [markdown.cells(change) for change in comparison.changes]
    return f"<ul>{said}</ul>" + (grid(markdown.CHANGES, lines, text=3) if lines else "")


def _suite(results: Results, suite: str, outcomes: Mapping[str, Outcome]) -> Iterator[str]:
    yield f'<p class="question">{escape(words.question(suite))}</p>'
    found = facts.findings(suite, outcomes)
    if found:
        yield '<div class="findings">'
        for finding in found:
            yield f"<p><strong>{escape(finding.question)}</strong> {escape(finding.answer)}</p>"
        yield "</div>"
    yield from (_picture(plot, suite) for plot in facts.plots(suite, outcomes))
    heads, lines = tables.overview(outcomes)
    if len(lines) > 1:
        yield "<h3>All races: the best right row of each library, time \u00d7 ours</h3>"
        yield grid(["", *heads], [[title, *cells] for _, title, cells in lines], cases=[id for id, _, _ in lines])
    for id, outcome in outcomes.items():
        yield from _case(results, suite, id, outcome)


def _picture(plot: Plot, suite: str) -> str:
    figure = plots.draw(plot)
    inner = plots.svg(figure, anchor(f"{suite}-{plot.name}")) if figure else "<p>This run has no row to draw.</p>"
    title = f"<h3>{escape(plot.title)}</h3>"
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else ""
    return f'<figure>{title}<div class="wide">{inner}</div>{caption}</figure>'


def _case(results: Results, suite: str, id: str, outcome: Outcome) -> Iterator[str]:
    yield f'<article id="{anchor(id)}"><h3>{escape(outcome.title)}</h3><p class="id">{escape(id)}</p>'
    if outcome.caption:
        yield f"<p>{escape(outcome.caption)}</p>"
    if outcome.rows:
        yield _rows(tables.table(outcome, facts.rates(results, suite)))
    yield from map(_claim, outcome.claims)
    yield "</article>"


def _rows(table: tables.Table) -> str:
    """The table of a case, with the reason of each row that has no time."""
    notes = table.has_notes
    top = "".join(_cell("th", head, "") for head in table.columns)
    top = f"<th class=text></th>{top}" + ("<th class=text>note</th>" if notes else "")
    body = "".join(_row(row, cells, notes) for row, cells in table.lines)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(row: Row, cells: list[str], notes: bool) -> str:
    badge = f' <span class="badge">{words.STATUS[row.status]}</span>' if row.status in words.STATUS else ""
    inner = f"<td class=text>{escape(row.name)}{badge}</td>" + "".join(_cell("td", cell, "") for cell in cells)
    note = f'<td class="text note">{escape(row.note)}</td>' if notes else ""
    kind = "ok own" if row.peer == OURS and row.status == "ok" else row.status
    return f'<tr class="{kind}">{inner}{note}</tr>'


def _claim(claim: Claim) -> str:
    """A claim; that a row of ours is right is told only where it is not."""
    if claim.correctness and claim.holds:
        return ""
    word, kind = ("holds", "holds") if claim.holds else ("FAILS", "fails")
    return f'<p class="claim {kind}"><span class="badge">{word}</span> {escape(claim.text)}</p>'
