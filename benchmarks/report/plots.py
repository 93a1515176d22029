"""Pictures, from data to SVG that takes its colors from the page."""

import io
import itertools
import math
import re
import textwrap
from collections import Counter
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter

from benchmarks import peers
from benchmarks.cases import OURS, Line, Plot
from benchmarks.report import facts
from benchmarks.results import Results
from benchmarks.timing import digits

# By name: on white paper, on black. The page has them as variables, so that pictures follow its scheme.
COLORS = {
    "ink": ("#23282f", "#e6e9ee"),
    "faint": ("#8a929d", "#8b94a1"),
    "grid": ("#e3e6ea", "#343b45"),
    "paper": ("#fefefe", "#15181d"),
    "ours": ("#d1360f", "#ff7a50"),
    "also_ours": ("#7d1226", "#ffb3a0"),
    "blue": ("#1f6fb5", "#6cb4f0"),
    "green": ("#12876b", "#45c9a5"),
    "purple": ("#8a4fb3", "#c99aec"),
    "gold": ("#b07a00", "#e9b949"),
    "sky": ("#2a9db5", "#7bd8ea"),
    "rose": ("#b83a7d", "#f08fc0"),
    "olive": ("#6f7a1d", "#bcc85a"),
    "brown": ("#8a5a3c", "#d1a284"),
}
_HUES = ("blue", "green", "purple", "gold", "sky", "rose", "olive", "brown")
_MARKERS = "sD^vPXp"
_OWN = ("ours", "also_ours")
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
# The same library has the same color and marker in every picture.
_LIBRARIES = [peer for peer in peers.PACKAGES if peer != OURS]
_SIZE = 10  # points, of all text
_AXES = (5.4, 3.4)  # inches; higher where the labels need it
_LABEL = 1.25 * _SIZE / 72  # inches of one line of a label
_CROWD = 0.5  # of the width: where the name of a mark would be; names go below the highest marks so close together
_LEFT, _BOTTOM, _TOP = 0.78, 0.62, 0.22


def draw(plot: Plot) -> Figure | None:
    """A figure with lines and marks named beside their ends, clouds of marks in a legend; None without a point."""
    lines = [(line, *_points(line, plot)) for line in plot.lines]
    lines = [(line, x, y) for line, x, y in lines if np.any(np.isfinite(x + y))]
    if not lines:
        return None
    labels = {line.label: wrap(line.label) for line, _, _ in lines}
    parts = [(part, _library(line) == OURS) for line, _, _ in lines for part in labels[line.label].split("\n")]
    longest = max(len(part) * (0.7 if bold else 0.6) for part, bold in parts)
    clouds = any(line.style == "marks" and len(line.x) > 1 for line, _, _ in lines)
    right = (0.75 if clouds else 0.45) + _SIZE / 72 * longest
    inner = _AXES[0], max(_AXES[1], _LABEL * len(parts))
    width, height = _LEFT + inner[0] + right, _BOTTOM + inner[1] + _TOP
    figure = Figure((width, height))
    axes = figure.add_axes((_LEFT / width, _BOTTOM / height, inner[0] / width, inner[1] / height))
    _prepare(axes, plot)
    for (line, x, y), look in zip(lines, _looks([line for line, _, _ in lines]), strict=True):
        axes.plot(x, y, label=labels[line.label], **look)
    _ticks(axes, plot)
    if clouds:
        axes.legend(
            loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False, fontsize=_SIZE, labelcolor=_ink("ink")
        )
    else:
        _name_ends(axes, [_library(line) for line, _, _ in lines])
    return figure


def wrap(label: str) -> str:
    """A label in lines that fit beside a picture, none of which begins with a comma."""
    return textwrap.fill(label, 36, break_long_words=False, break_on_hyphens=False)


def _points(line: Line, plot: Plot) -> tuple[np.ndarray, np.ndarray]:
    """The coordinates, with a gap where a logarithm has none."""
    found = []
    for values, log in ((line.x, plot.x_log), (line.y, plot.y_log)):
        array = np.array([math.nan if v is None else v for v in values], float)
        found.append(np.where(array > 0, array, math.nan) if log else array)
    return found[0], found[1]


def _prepare(axes: Axes, plot: Plot) -> None:
    axes.set_facecolor("none")
    axes.figure.patch.set_alpha(0.0)
    axes.set_xscale("log" if plot.x_log else "linear")
    axes.set_yscale("log" if plot.y_log else "linear")
    axes.set_xlabel(plot.x_label, color=_ink("ink"), fontsize=_SIZE)
    axes.set_ylabel(plot.y_label, color=_ink("ink"), fontsize=_SIZE)
    axes.grid(color=_ink("grid"), linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_ink("ink"), which="both", labelsize=_SIZE - 1, length=3, color=_ink("faint"))
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_ink("faint"))


def _ticks(axes: Axes, plot: Plot) -> None:
    """Ticks at 1, 2 and 5 where a logarithmic axis is short, at powers of ten where it is long; at few sizes, there."""
    axes.margins(x=0.04, y=0.06)
    axes.autoscale_view()
    sizes = {x for line in plot.lines for x in line.x}
    for axis, log in ((axes.xaxis, plot.x_log), (axes.yaxis, plot.y_log)):
        if log:
            low, high = sorted(axis.get_view_interval())
            decades = math.log10(high / low)
            subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
            few = AutoLocator() if decades < 0.6 else LogLocator(10, subs=subs, numticks=8 if decades > 6 else 12)
            axis.set_major_locator(few)
            axis.set_minor_formatter(NullFormatter())
        if axis is axes.xaxis and len(sizes) <= 5 and all(float(size).is_integer() for size in sizes):
            axis.set_ticks(sorted(sizes), [f"{size:.0f}" if size < 1e4 else tick(size) for size in sorted(sizes)])
        else:
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """A number as one says it: 0.05, 20, 3k, 10M; a power of ten where it is far below one."""
    if value == 0:
        return "0"
    size = abs(value)
    for least, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= least * 0.9999:
            return f"{value / least:.3g}{unit}" if size < 1e16 else f"{value:.0e}"
    if size >= 1e-3:
        return f"{value:.4g}"
    power = math.floor(math.log10(size) + 1e-9)
    factor = value / 10**power
    exponent = str(power).translate(
        str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
    )
    return f"10{exponent}" if abs(factor - 1) < 1e-6 else f"{factor:.3g}\u00b710{exponent}"


def _looks(lines: list[Line]) -> list[dict[str, Any]]:
    """How each line is drawn: a library has its color and marker, and dashes tell its lines apart."""
    seen: Counter[str | None] = Counter()
    others = itertools.count(len(_LIBRARIES))
    found = []
    for line in lines:
        library = _library(line)
        index = next(others) if library is None else 0
        found.append(_look(line, library, index, seen[library]))
        seen[library] += 1
    return found


def _look(line: Line, library: str | None, index: int, before: int) -> dict[str, Any]:
    """Of one line; ours is thick and below the others, ideals are thin and above them, so that none hides another."""
    if line.style == "dashed":
        return {"color": _ink("faint"), "linestyle": _DASHES[1 + before % 3], "linewidth": 1.3, "zorder": 5}
    own = library == OURS
    index = _LIBRARIES.index(library) if library in _LIBRARIES else index
    color = _ink(_OWN[before % 2] if own else _HUES[index % len(_HUES)])
    marker = "o" if own else _MARKERS[index % len(_MARKERS)]
    look = {"color": color, "marker": marker, "zorder": 3 if own else 4, "markersize": 7 if own else 4.5}
    if line.style == "marks":
        return look | {"linestyle": "none", "markeredgewidth": 1.0, "markerfacecolor": color if own else "none"}
    dashes = _DASHES[(before // 2 if own else before if library else 0) % len(_DASHES)]
    every = 1 if len(line.x) <= 25 else len(line.x) // 8
    style = {"drawstyle": "steps-post"} if line.style == "steps" else {}
    return look | style | {"linestyle": dashes, "linewidth": 3.2 if own else 1.4, "markevery": every}


def _library(line: Line) -> str | None:
    """The library that a line belongs to; that of all ideals and floors is nobody's, ``""``."""
    if line.style == "dashed":
        return ""
    return line.library if line.library in peers.PACKAGES else library_of(line.label)


def library_of(label: str) -> str | None:
    """The library that a label begins with."""
    return next(
        (peer for peer in sorted(peers.PACKAGES, key=len, reverse=True) if label.lower().startswith(peer)), None
    )


def _name_ends(axes: Axes, libraries: list[str | None]) -> None:
    """The label of each line to the right of its end, of a mark beside it, moved apart where they are close."""
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = []
    for line, library in zip(axes.get_lines(), libraries, strict=True):
        x, y = (np.asarray(values, float) for values in line.get_data())
        last = int(np.flatnonzero(np.isfinite(x) & np.isfinite(y))[-1])
        across, up = to_axes.transform((x[last], y[last]))
        ends.append((up, across if line.get_linestyle() == "None" else 1.0, (x[last], y[last]), line, library))
    ends.sort(key=lambda end: end[0])
    line_height = _LABEL / (axes.get_position().height * axes.figure.get_figheight())
    heights = [line_height * (1 + line.get_label().count("\n")) for *_, line, _ in ends]
    marks = [(up, across) for up, across, *_ in ends if across < 1]
    top = [across for up, across in marks if up > marks[-1][0] - line_height]
    crowded = any(0 < b - a < _CROWD for a, b in itertools.permutations(top, 2))
    places = spread([end[0] for end in ends], heights, marks[-1][0] - 1.5 * line_height if crowded else 1.0)
    for place, (_, across, point, line, library) in zip(places, ends, strict=True):
        axes.annotate(
            line.get_label(), point, (across + 0.06, place), textcoords=axes.transAxes, color=line.get_color(),
            fontsize=_SIZE, va="center", annotation_clip=False, weight="bold" if library == OURS else "normal",
            arrowprops={"arrowstyle": "-", "color": _ink("faint"), "linewidth": 0.6, "shrinkA": 2, "shrinkB": 3,
                        "relpos": (0, 0.5)},
        )  # fmt: skip


def spread(wanted: list[float], heights: list[float], most: float = 1.0) -> list[float]:
    """Places in the same order, as near to the wanted ones as labels of these heights allow, within [0, most]."""
    gaps = [(a + b) / 2 for a, b in itertools.pairwise(heights)]
    places = list(wanted)
    for i, gap in enumerate(gaps):
        places[i + 1] = max(places[i + 1], places[i] + gap)
    if places:
        places[-1] = min(places[-1], max(most, sum(gaps)))
    for i in reversed(range(len(gaps))):
        places[i] = min(places[i], places[i + 1] - gaps[i])
    return places


def _ink(name: str) -> str:
    return COLORS[name][0]


def svg(figure: Figure, name: str) -> str:
    """The figure as an element of a page, with ids of its own.

    Its colors are variables of the page, with those of white paper for whoever takes it out of there.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = (
        re.sub(r'\bid="', f'id="{name}-', text).replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    )
    for color, (hexadecimal, _) in COLORS.items():
        text = text.replace(hexadecimal, f"var(--{color},{hexadecimal})")
    text = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", text)
    return text.strip()


def roofline(results: Results) -> Plot | None:
    """What XLA's programs reach, against what the machine can: every timed row without a loop, by library.

    Of the suites in the precision of the run, for which the roofs are.
    """
    rates = results.rates.get(results.options.get("dtype", ""))
    points: dict[str, list[tuple[float, float]]] = {}
    for id, outcome in results.outcomes.items():
        if facts.rates(results, id.split("/")[0]) != rates:
            continue
        for row in outcome.rows:
            flops, moved, seconds = (facts.number(row, name) for name in ("flops", "bytes", "seconds"))
            if row.status == "ok" and flops and moved and seconds:
                points.setdefault(row.peer, []).append((flops / moved, flops / seconds))
    if not points or not rates:
        return None
    marks = [
        Line(peer, *map(list, zip(*points[peer], strict=True)), "marks") for peer in peers.PACKAGES if peer in points
    ]
    peak, bandwidth = rates["flops_per_second"], rates["bytes_per_second"]
    intensities = [x for line in marks for x in line.x] + [peak / bandwidth]
    low, high = min(intensities) / 2, max(intensities) * 4
    ridge = peak / bandwidth
    roofs = [
        Line(f"bandwidth, {digits(bandwidth / 1e9)} GB/s", [low, ridge], [low * bandwidth, peak], "dashed"),
        Line(f"matmul rate, {digits(peak / 1e9)} GFLOP/s", [ridge, high], [peak, peak], "dashed"),
    ]
    return Plot(
        "roofline", "What the compiled programs reach of what the machine can",
        "intensity, FLOP per byte accessed (XLA's counts)", "achieved FLOP/s", [*roofs, *marks],
        caption="Each mark is a compiled program without a loop, at XLA's own count of its FLOPs and bytes. A mark "
        "above the slanted roof works from cache: XLA counts accesses, not misses. Far below both roofs, what costs is "
        "neither arithmetic nor memory, but small operations one after the other.",
    )  # fmt: skip
