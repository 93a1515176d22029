"""Printing of reports: a rich table in a terminal if rich is installed, aligned plain text otherwise."""

import abc
import io
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

try:  # an optional extra; a report must print without it
    import rich.box
    import rich.console
    import rich.table
    import rich.text
except ImportError:
    _HAS_RICH = False
else:
    _HAS_RICH = True

_WIDTH = 100  # of plain text


class Sheet(NamedTuple):
    """The content of a printed report: a table and remarks. The first ``words`` columns are text, the others numbers.

    A row with fewer cells than columns ends in a sentence that spans the remaining columns.
    """

    title: str
    columns: tuple[str, ...]
    words: int
    rows: tuple[tuple[str, ...], ...]
    remarks: tuple[str, ...]


class Printable(abc.ABC):
    """A report that prints as its ``sheet()``."""

    @abc.abstractmethod
    def sheet(self) -> Sheet:
        """The content to print."""

    def __str__(self) -> str:
        """A rich table if stdout is a terminal and rich is installed, plain text otherwise."""
        if not _HAS_RICH or not sys.stdout.isatty():
            return plain_text(self.sheet())
        page = io.StringIO()
        rich.console.Console(file=page, width=rich.console.Console().width).print(self)
        return page.getvalue().rstrip("\n")

    def __repr__(self) -> str:
        """The printed report, so that a notebook or a prompt shows it."""
        return str(self)

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """The parts that ``rich.print`` shows."""
        return _rich_parts(self.sheet())


def plain_text(sheet: Sheet) -> str:
    """The sheet as aligned text."""
    full = [row for row in sheet.rows if len(row) == len(sheet.columns)]
    short = [row[:-1] for row in sheet.rows if len(row) < len(sheet.columns)]
    widths = [
        max(len(row[i]) for row in [sheet.columns, *full, *short] if i < len(row)) for i in range(len(sheet.columns))
    ]
    lines = [sheet.title, "", _line(sheet.columns, widths, sheet.words)]
    lines.append("-" * max(len(lines[-1]), 8))
    for row in sheet.rows:
        if len(row) == len(sheet.columns):
            lines.append(_line(row, widths, sheet.words))
            continue
        start = _line(row[:-1], widths, sheet.words)
        indent = sum(widths[: len(row) - 1]) + 2 * (len(row) - 1)
        wrapped = textwrap.wrap(row[-1], max(_WIDTH - indent, 40), break_on_hyphens=False, break_long_words=False)
        lines.append(f"{start:<{indent}}{wrapped[0] if wrapped else ''}")
        lines += [" " * indent + more for more in wrapped[1:]]
    lines.append("")
    for remark in sheet.remarks:
        lines += textwrap.wrap(remark, _WIDTH, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    return "\n".join(line.rstrip() for line in lines).rstrip()


def _line(cells: tuple[str, ...], widths: list[int], words: int) -> str:
    aligned = [
        f"{cell:<{width}}" if i < words else f"{cell:>{width}}"
        for i, (cell, width) in enumerate(zip(cells, widths, strict=False))
    ]
    return "  ".join(aligned)


def _rich_parts(sheet: Sheet) -> Iterator[Any]:
    title = rich.text.Text(sheet.title, style="bold")
    table = rich.table.Table(title=title, title_justify="left", box=rich.box.SIMPLE_HEAD, pad_edge=False)
    for i, name in enumerate(sheet.columns):
        table.add_column(rich.text.Text(name), justify="left" if i < sheet.words else "right", no_wrap=i < sheet.words)
    sentences: dict[str, int] = {}  # printed as footnotes, because they would widen their column
    for row in sheet.rows:
        cells = row
        if len(row) < len(sheet.columns):
            cells = (*row[:-1], f"[{sentences.setdefault(row[-1], len(sentences) + 1)}]")
        style = "green" if any("<-" in cell for cell in row) else "dim" if cells is not row else None
        table.add_row(*map(rich.text.Text, cells), style=style)
    yield table
    for sentence, number in sentences.items():
        yield rich.text.Text(f"[{number}] {sentence}", style="dim")
    for remark in sheet.remarks:
        yield rich.text.Text(remark)
