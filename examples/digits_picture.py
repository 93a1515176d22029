"""The picture of the digits example: how each method converges, and the spectrum of the Hessian where they end."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from examples.digits_methods import Curve

_RED, _BLUE = "#c1121f", "#1f77b4"
_STYLES = {
    "trust-region": (_RED, "-", "o"),
    "trust-exact": ("#f28500", "-", "s"),
    "newton": ("#6a4c93", "-", "D"),
    "optax.lbfgs": (_BLUE, "-", "^"),
    "SciPy trust-ncg": ("#e5899a", "--", "o"),
    "SciPy L-BFGS-B": ("#7ab8e0", "--", "^"),
}
_LABEL, _TITLE = 15, 18  # sizes that can be read from the last row


def save_picture(
    path: Path, curves: Mapping[str, Curve], steps: Mapping[str, int], eigenvalues: np.ndarray, l2: float
) -> None:
    """Draw both panels into a file, whose folder is made if missing."""
    figure = Figure(figsize=(16, 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    draw_convergence(left, curves, steps)
    draw_spectrum(right, eigenvalues, l2)
    for axes in (left, right):
        axes.tick_params(labelsize=_LABEL)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    figure.legend(fontsize=14, loc="outside lower left", ncols=3, frameon=False)  # of the left panel
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_convergence(axes: Axes, curves: Mapping[str, Curve], steps: Mapping[str, int]) -> None:
    """The objective above the lowest one seen, against time."""
    best = min(value for points in curves.values() for _, value in points)
    rounding = 10 * np.spacing(best)
    for name, points in curves.items():
        color, line, marker = _STYLES[name]
        seconds, values = np.array(points).T
        label = f"{name}, {steps[name]} steps"
        gap = np.maximum(values - best, rounding)
        axes.loglog(seconds, gap, line, marker=marker, color=color, linewidth=2.2, markersize=7, label=label)
    axes.axhspan(rounding / 10, rounding, color="0.9", linewidth=0)
    axes.text(0.98, 0.02, "rounding error", transform=axes.transAxes, fontsize=13, color="0.35", ha="right")
    axes.set_ylim(rounding / 10, None)
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g} s" if seconds >= 1 else f"{1e3 * seconds:g} ms")
    axes.set_xlabel("time without compilation", fontsize=_LABEL)
    axes.set_ylabel("objective above the lowest seen", fontsize=_LABEL)
    newton, lbfgs = steps["trust-region"], steps["optax.lbfgs"]
    axes.set_title(f"{newton} trust-region Newton steps do the work of {lbfgs} L-BFGS steps", fontsize=_TITLE, pad=14)


def draw_spectrum(axes: Axes, eigenvalues: np.ndarray, l2: float) -> None:
    """All positive eigenvalues, the largest first; those that are ``l2`` itself stand out."""
    ordered = np.sort(eigenvalues)[::-1]
    ranks = np.arange(1, ordered.size + 1)
    held, below = held_by(ordered, l2), ordered < (1 - 1e-3) * l2
    drawn = ordered > 1e-6 * l2
    for chosen, color in ((drawn & ~held, _BLUE), (held, _RED)):
        axes.semilogy(ranks[chosen], ordered[chosen], "o", color=color, markersize=4)
    arrow = {"arrowstyle": "->", "color": "0.35"}
    notes = [
        (f"{held.sum()} eigenvalues are the L2 term\nand nothing else: along these\ndirections the data say nothing",
         (np.mean(ranks[held]), l2), (0.99, 0.52), _RED),
        (f"{below.sum()} belong to the biases, which the L2 term\nleaves alone; one of them is 0 (not drawn)",
         (ranks[drawn][-1], ordered[drawn][-1]), (0.90, 0.06), _BLUE),
    ]  # fmt: skip
    for text, target, place, color in notes:
        axes.annotate(
            text, target, place, textcoords="axes fraction", fontsize=14, color=color, ha="right", arrowprops=arrow
        )
    axes.set_xlabel("rank", fontsize=_LABEL)
    axes.set_ylabel("eigenvalue of the Hessian at the minimum", fontsize=_LABEL)
    title = f"Of {ordered.size} directions, {held.sum()} are held by the L2 term alone"
    axes.set_title(title, fontsize=_TITLE, pad=14)


def held_by(eigenvalues: np.ndarray, l2: float) -> np.ndarray:
    """Which eigenvalues are ``l2`` to rounding."""
    return np.abs(eigenvalues / l2 - 1) < 1e-10
