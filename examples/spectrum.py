"""What training does to the Hessian: its spectrum for a network that reads digits, before and after.

Run it with ``python -m examples.spectrum``. It needs scikit-learn, matplotlib and rich, takes about half a minute on
two cores, and writes ``examples/output/spectrum.png``.

The Hessian has 2,410 rows and is never formed: the density of its eigenvalues comes from Lanczos steps from random
vectors, with a standard error, and the largest ones from ``curvature.eigsh``.
"""

import os
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import curvature
from benchmarks import timing

WIDTH, CLASSES, L2 = 32, 10, 1e-3
PICTURE = Path(__file__).parent / "output" / "spectrum.png"
COLORS = {"before": "#1f77b4", "after": "#c1121f"}

Params = dict[str, jax.Array]


class Spectrum(NamedTuple):
    """The density of the eigenvalues, and the ends of the spectrum."""

    density: curvature.types.SpectralDensity
    largest: jax.Array
    smallest: jax.Array


def logits(params: Params, images: jax.Array) -> jax.Array:
    """A network of one tanh layer."""
    return jnp.tanh(images @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean softmax cross entropy with a small L2 term."""
    errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
    return jnp.mean(errors) + L2 / 2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


@jax.jit
def spectrum(params: Params, images: jax.Array, labels: jax.Array) -> Spectrum:
    """The spectrum of the Hessian at one point; the same program serves every point."""
    op = curvature.HessianOperator(loss, params, images, labels)
    density = curvature.spectral_density(op, key=jax.random.key(1), num_samples=6, num_steps=60)
    largest = curvature.eigsh(op, CLASSES, which="LA", rtol=1e-3)
    smallest = curvature.eigsh(op, 3, which="SA", rtol=1e-3)
    return Spectrum(density, largest.eigenvalues, smallest.eigenvalues)


def draw(axes: Axes, found: Spectrum, title: str, color: str) -> None:
    """The density on a log scale with a band of two standard errors, and the largest eigenvalues as ticks."""
    grid, density, error = (np.asarray(array) for array in found.density[:3])
    floor = 1e-4
    axes.fill_between(grid, floor, np.maximum(density, floor), color=color, alpha=0.12, linewidth=0)
    low, high = (np.maximum(density + sign * 2 * error, floor) for sign in (-1, 1))
    axes.fill_between(grid, low, high, color=color, alpha=0.4, linewidth=0, label="two standard errors")
    axes.semilogy(grid, np.maximum(density, floor), color=color, linewidth=2, label="density of the eigenvalues")
    heights = np.full(CLASSES, 1.6 * floor)
    axes.plot(found.largest, heights, "|", color="black", markersize=18, markeredgewidth=2, label="the ten largest")
    axes.set_ylim(floor, 100)
    axes.set_title(title, fontsize=17, pad=12)
    axes.set_xlabel("eigenvalue of the Hessian", fontsize=14)
    axes.tick_params(labelsize=13)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=13, frameon=False)


def save_picture(path: Path, spectra: dict[str, Spectrum], accuracies: dict[str, float]) -> None:
    """Before and after side by side, on one scale."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (when, found) in zip(panels, spectra.items(), strict=True):
        title = f"{when.capitalize()} training: {accuracies[when]:.1%} of the images are read right"
        draw(axes, found, title, COLORS[when])
    panels[0].set_ylabel("share of eigenvalues per unit", fontsize=14)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(max_steps: int = 40, picture: Path = PICTURE) -> dict[str, Spectrum]:
    """Run it all; returns the two spectra."""
    jax.config.update("jax_enable_x64", True)
    screen, began = timing.console(), time.perf_counter()
    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16), jnp.asarray(labels)
    keys, shapes = jax.random.split(jax.random.key(0)), {"w1": (64, WIDTH), "w2": (WIDTH, CLASSES)}
    pairs = zip(keys, shapes.items(), strict=True)
    start = {name: jax.random.normal(key, shape) / shape[0] ** 0.5 for key, (name, shape) in pairs}
    start |= {"b1": jnp.zeros(WIDTH), "b2": jnp.zeros(CLASSES)}
    screen.print("The spectrum of the Hessian of a network that reads digits", style="bold")
    size = sum(leaf.size for leaf in jax.tree.leaves(start))
    screen.print(f"{len(labels):,} images, {size:,} parameters, L2 term {L2:g}, double precision.\n")
    fitted = curvature.minimize(loss, start, data, method="trust-region", max_steps=max_steps)
    spectra, accuracies = {}, {}
    for when, params in (("before", start), ("after", fitted.x)):
        spectra[when] = found = spectrum(params, *data)
        accuracies[when] = right = float(jnp.mean(jnp.argmax(logits(params, data[0]), axis=1) == data[1]))
        values = " ".join(f"{float(value):.2g}" for value in found.largest)
        screen.print(f"{when.capitalize()} training: loss {float(loss(params, *data)):.3f}, {right:.1%} read right.")
        screen.print(f"  Eigenvalues from {float(found.smallest[0]):.2g}, the ten largest:\n  {values}")
        near = np.abs(found.density.ritz_values) < 0.01 * found.largest[0]
        share = float(jnp.mean(jnp.sum(jnp.where(near, found.density.weights, 0), axis=1)))
        screen.print(f"  Within 1% of the largest from zero lie {share:.0%} of all.")
    save_picture(picture, spectra, accuracies)
    screen.print(f"\nPicture: {os.path.relpath(picture)}\nDone in {time.perf_counter() - began:.0f} s.")
    return spectra


if __name__ == "__main__":
    main()
