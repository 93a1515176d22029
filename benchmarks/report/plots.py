"""Pictures, from data to SVG: one color and marker for each library, dashes for its lines, a legend beside."""

import base64
import io
import itertools
import math
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import AutoLocator, FuncFormatter, LogLocator, NullFormatter

from benchmarks import peers, reading
from benchmarks.cases import OURS, Line, Outcomes, Plot
from benchmarks.report import facts
from benchmarks.results import Results
from benchmarks.suites import scalar
from benchmarks.timing import digits

FAINT = "#8a929d"
_OWN = ("#d1360f", "#7d1226")
_HUES = ("#1f6fb5", "#12876b", "#8a4fb3", "#b07a00", "#2a9db5", "#b83a7d", "#6f7a1d", "#8a5a3c")
_MARKERS = "sD^vPXp"
_DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_LIBRARIES = [peer for peer in peers.PACKAGES if peer != OURS]  # the same color and marker in every picture
_STYLE = Path(__file__).with_name("pictures.mplstyle")
_LABEL = 0.2  # inches of one line of the legend


@matplotlib.style.context(_STYLE)
def draw(plot: Plot) -> Figure | None:
    """A figure with a legend in the order of the ends of its lines; None without a point."""
    lines = [(line, _values(line.x, plot.x_log), _values(line.y, plot.y_log)) for line in plot.lines]
    lines = [(line, x, y) for line, x, y in lines if np.any(np.isfinite(x + y))]
    if not lines:
        return None
    labels = [textwrap.fill(line.label, 36, break_on_hyphens=False) for line, _, _ in lines]
    height = max(4.0, 0.7 + _LABEL * sum(1 + label.count("\n") for label in labels))
    figure = Figure((9.0, height), layout="constrained")
    axes = figure.add_subplot()
    for (_, x, y), look, label in zip(lines, _looks([line for line, _, _ in lines]), labels, strict=True):
        axes.plot(x, y, label=label, **look)
    _prepare(axes, plot)
    ends = sorted(axes.get_lines(), key=lambda line: -[y for y in np.asarray(line.get_ydata()) if np.isfinite(y)][-1])
    legend = figure.legend(handles=ends, loc="outside right center")
    for text, end in zip(legend.get_texts(), ends, strict=True):
        text.set_fontweight("bold" if str(end.get_label()).startswith(OURS) else "normal")
    return figure


def _values(values: list[float], log: bool) -> np.ndarray:
    array = np.array([math.nan if v is None else v for v in values], float)
    return np.where(array > 0, array, math.nan) if log else array


def _prepare(axes: Axes, plot: Plot) -> None:
    """Scales and labels; ticks at 1, 2 and 5 where a logarithmic axis is short, or at the few sizes."""
    scales = {"xscale": "log" if plot.x_log else "linear", "yscale": "log" if plot.y_log else "linear"}
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label, **scales)
    axes.autoscale_view()
    sizes = sorted({x for line in plot.lines for x in line.x})
    for axis, log in ((axes.xaxis, plot.x_log), (axes.yaxis, plot.y_log)):
        if log:
            low, high = sorted(axis.get_view_interval())
            decades = math.log10(high / low)
            subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
            axis.set_major_locator(AutoLocator() if decades < 0.6 else LogLocator(10, subs=subs, numticks=12))
            axis.set_minor_formatter(NullFormatter())
        if axis is axes.xaxis and len(sizes) <= 5 and all(float(size).is_integer() for size in sizes):
            axis.set_ticks(sizes, [f"{size:.0f}" if size < 1e4 else tick(size) for size in sizes])
        else:
            axis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))


def tick(value: float) -> str:
    """A number as one says it: 0.05, 20, 3k, 10M; a power of ten where it is far below one."""
    for least, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if 1e16 > abs(value) >= least * 0.9999:
            return f"{value / least:.3g}{unit}"
    if value == 0 or 1e-3 <= abs(value) < 1e3:
        return f"{value:.4g}"
    power = math.floor(math.log10(abs(value)) + 1e-9)
    factor = f"{value / 10**power:.3g}"
    return f"$10^{{{power}}}$" if factor == "1" else f"${factor}\\cdot10^{{{power}}}$"


def _looks(lines: list[Line]) -> list[dict[str, Any]]:
    """How each line is drawn: ours thick and below the others, ideals thin and above, so that none hides another."""
    seen: Counter[str | None] = Counter()
    others = itertools.count(len(_LIBRARIES))
    found = []
    for line in lines:
        library = "" if line.style == "dashed" else _library(line)
        before, own = seen[library], library == OURS
        seen[library] += 1
        if line.style == "dashed":
            found.append({"color": FAINT, "linestyle": _DASHES[1 + before % 3], "linewidth": 1.3, "zorder": 5})
            continue
        index = next(others) if library is None else 0 if own else _LIBRARIES.index(library)
        color = _OWN[before % 2] if own else _HUES[index % len(_HUES)]
        marker = "o" if own else _MARKERS[index % len(_MARKERS)]
        look = {"color": color, "marker": marker, "zorder": 3 if own else 4, "markersize": 7 if own else 4.5}
        if line.style == "marks":
            found.append(look | {"linestyle": "none", "markerfacecolor": color if own else "none"})
            continue
        dashes = _DASHES[(before // 2 if own else before if library else 0) % len(_DASHES)]
        every = 1 if len(line.x) <= 25 else len(line.x) // 8
        style = {"drawstyle": "steps-post"} if line.style == "steps" else {}
        found.append(look | style | {"linestyle": dashes, "linewidth": 3.2 if own else 1.4, "markevery": every})
    return found


def _library(line: Line) -> str | None:
    names = sorted(peers.PACKAGES, key=len, reverse=True)
    found = next((peer for peer in names if line.label.lower().startswith(peer)), None)
    return line.library if line.library in peers.PACKAGES else found


def svg(figure: Figure, name: str) -> bytes:
    buffer = io.BytesIO()
    with matplotlib.style.context([_STYLE, {"svg.hashsalt": name}]):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def data_uri(plot: Plot) -> str:
    """The picture as the source of an image; empty where it has no point."""
    figure = draw(plot)
    encoded = "" if figure is None else base64.b64encode(svg(figure, plot.name)).decode()
    return f"data:image/svg+xml;base64,{encoded}" if encoded else ""


def headlines(outcomes: Outcomes) -> list[Plot]:
    """What a stranger wants to see first: Hessians, optimizers, per-example gradients; those that have rows."""
    found = []
    races = {id: o for id, o in reading.part(outcomes, "modes/hessian/mlp/").items() if o.sizes.get("batch") == 256}
    lines = []
    for peer in (OURS, *reading.others(races)):
        fastest = [(o.sizes["n"], row) for o in races.values() if (row := reading.fastest(o, peer))]
        points = sorted((n, 1e3 * row.metrics["seconds"]) for n, row in fastest)
        if len(points) > 1:
            lines.append(Line(peer, [n for n, _ in points], [ms for _, ms in points], library=peer))
    if lines:
        found.append(
            Plot("hessians", "The Hessian of a network's loss, by the fastest way of each library", "parameters",
                 "time, ms", lines, caption="A tanh network that classifies, a batch of 256.")
        )  # fmt: skip
    table = scalar.costs(objectives := scalar.select(outcomes), "seconds")
    if any(math.isfinite(cost) for row in table.values() for cost in row):

        def solved(name: str) -> tuple[int, float]:
            times = [math.log(cost) for cost in table[name] if math.isfinite(cost)]
            return len(times), -sum(times)

        best: dict[str | None, str] = {}
        for name in table:
            library = _library(Line(name, [], []))
            best[library] = max(best.get(library, name), name, key=solved)
        curves = scalar.performance_profile({name: table[name] for name in best.values()})
        found.append(
            Plot("optimizers", "Problems solved, by the solver of each library that solves the most",
                 "time, \u00d7 that of the fastest solver here", "share of the problems solved",
                 [Line(name, *curve, "steps") for name, curve in curves.items()], y_log=False,
                 caption=f"{len(objectives)} objectives. Higher is better, and further left.")
        )  # fmt: skip
    if lines := reading.curves(reading.part(outcomes, "per_example/norms/mlp/"), "batch", scale=1e3):
        found.append(
            Plot("per_example", "The norm of every example's gradient", "examples in the batch", "time, ms", lines,
                 caption="An MLP 784-256-10; the dashed line is what plain training pays.")
        )  # fmt: skip
    return found


def roofline(results: Results) -> Plot | None:
    """What XLA's programs reach, against what the machine can: every timed row without a loop, by library.

    Of the suites in the precision of the run, for which the roofs are.
    """
    rates = results.rates.get(results.options.get("dtype", ""))
    points: dict[str, list[tuple[float, float]]] = {}
    for id, outcome in results.outcomes.items():
        for row in outcome.rows if facts.rates(results, id.split("/")[0]) == rates else ():
            flops, moved, seconds = (facts.number(row, name) for name in ("flops", "bytes", "seconds"))
            if row.status == "ok" and flops and moved and seconds:
                points.setdefault(row.peer, []).append((flops / moved, flops / seconds))
    if not points or not rates:
        return None
    marks = [Line(p, *map(list, zip(*points[p], strict=True)), "marks") for p in peers.PACKAGES if p in points]
    peak, bandwidth = rates["flops_per_second"], rates["bytes_per_second"]
    ridge = peak / bandwidth
    intensities = [x for line in marks for x in line.x] + [ridge]
    low, high = min(intensities) / 2, max(intensities) * 4
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
