"""How sure is a network? Laplace's approximation from one Gauss-Newton operator.

Run it with ``python -m examples.laplace``. It needs matplotlib and rich, takes about half a minute on two cores, and
writes ``examples/output/laplace.png``.

A small network is fitted to points with a gap between them. Around the fit its parameters have nearly a normal
posterior of precision ``P = sum_b J_b' J_b / NOISE^2 + prior I``. It tells how sure the network is at any input,
``J P^-1 J'``, and by ``log det P`` how likely the data are under a prior: this evidence chooses the prior.
"""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import curvature
from benchmarks import timing

WIDTH, NOISE, NUM_PRIORS = 24, 0.2, 9
PICTURE = Path(__file__).parent / "output" / "laplace.png"
RED, BLUE, GRAY = "#c1121f", "#1f77b4", "0.35"

Params = dict[str, jax.Array]


def truth(x):
    return np.sin(2 * x) + x / 3


def model(params: Params, x: jax.Array, *_: jax.Array) -> jax.Array:
    """A network of two tanh layers, at all inputs ``x``."""
    hidden = jnp.tanh(x[:, None] @ params["w1"] + params["b1"])
    return (jnp.tanh(hidden @ params["w2"] + params["b2"]) @ params["w3"] + params["b3"])[:, 0]


def misfit(outputs: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Minus the log likelihood, without its constant."""
    return jnp.sum((outputs - y) ** 2) / (2 * NOISE**2)


def objective(params: Params, x: jax.Array, y: jax.Array, prior: jax.Array) -> jax.Array:
    """Minus the log of the posterior, without its constant."""
    return misfit(model(params, x), x, y) + prior / 2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def precision(params: Params, x: jax.Array, y: jax.Array, prior: jax.Array) -> curvature.LinearOperator:
    """The precision ``P`` of the posterior, never formed."""
    return curvature.GaussNewtonOperator(model, misfit, params, x, y, reduction="sum") + curvature.damping(prior)


@jax.jit
def log_evidence(params: Params, x: jax.Array, y: jax.Array, prior: jax.Array) -> jax.Array:
    """The log probability of the data under a prior: how well the fit does, less what it had to be tuned for it."""
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    logdet = curvature.logdet(precision(params, x, y, prior), key=jax.random.key(1)).value  # exact for so few
    constant = x.size * (np.log(NOISE) + np.log(2 * np.pi) / 2)
    return -objective(params, x, y, prior) - (logdet - size * jnp.log(prior)) / 2 - constant


@jax.jit
def deviations(params: Params, x: jax.Array, y: jax.Array, prior: jax.Array, grid: jax.Array) -> jax.Array:
    """The standard deviation of the network's output at each point: the root of ``J P^-1 J'``."""
    op = precision(params, x, y, prior)

    def variance(point: jax.Array) -> jax.Array:
        slope = jax.grad(lambda params: model(params, point[None])[0])(params)
        solution, _ = curvature.solve(op, slope, method="cholesky")
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, slope, solution)))

    return jnp.sqrt(jax.vmap(variance)(grid))  # all solves share one factor


def start() -> Params:
    """Random parameters."""
    keys, w = jax.random.split(jax.random.key(0), 5), WIDTH
    shapes = {"w1": (1, w), "b1": (w,), "w2": (w, w), "b2": (w,), "w3": (w, 1)}
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    return params | {"w2": params["w2"] / w**0.5, "w3": params["w3"] / w**0.5, "b3": jnp.zeros(1)}


def save_picture(path: Path, points: tuple, curve: tuple, prediction: tuple) -> None:
    """On the left what the network says and how sure it is, on the right how its prior was chosen."""
    figure = Figure(figsize=(15, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    grid, mean, deviation = prediction
    for times, alpha, label in ((1, 0.3, "1 standard deviation, with noise"), (2, 0.18, "2 standard deviations")):
        reach = times * np.hypot(deviation, NOISE)
        left.fill_between(grid, mean - reach, mean + reach, color=BLUE, alpha=alpha, linewidth=0, label=label)
    left.plot(grid, mean, color=BLUE, linewidth=2.5, label="the network")
    left.plot(grid, truth(grid), "--", color=GRAY, linewidth=2, label="the truth")
    left.plot(*points, "o", color=RED, markersize=5, label="the data")
    left.legend(fontsize=13, frameon=False, loc="upper left")
    left.set(xlim=(grid[0], grid[-1]))
    left.set_title("The network doubts itself where it has seen no data", fontsize=17, pad=12)
    priors, evidences = curve
    right.semilogx(priors, evidences, "o-", color=BLUE, linewidth=2.2)
    right.plot(priors[np.argmax(evidences)], max(evidences), "o", color=RED, markersize=12)
    right.set_title("The evidence chooses the prior", fontsize=17, pad=12)
    for axes, names in ((left, ("input", "output")), (right, ("precision of the prior", "log evidence"))):
        axes.set_xlabel(names[0], fontsize=14)
        axes.set_ylabel(names[1], fontsize=14)
        axes.tick_params(labelsize=13)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(num_priors: int = NUM_PRIORS, picture: Path = PICTURE) -> tuple[float, float]:
    """Run it all; returns the standard deviation of the network in the gap and the mean one at the data."""
    jax.config.update("jax_enable_x64", True)
    screen, began, rng = timing.console(), time.perf_counter(), np.random.default_rng(1)
    x = jnp.asarray(np.concatenate([rng.uniform(-3, -1, 30), rng.uniform(1, 3, 30)]))
    y = jnp.asarray(truth(x) + NOISE * rng.normal(size=x.size))
    screen.print("How sure is a network? Laplace's approximation", style="bold")
    screen.print(f"{x.size} noisy points on both sides of a gap. For each prior: fit, then the evidence.\n")
    screen.print("prior precision   log evidence   fit")
    priors, fits, evidences = jnp.logspace(1, -1, num_priors), [], []
    for prior in priors:
        begin = fits[-1] if fits else start()  # from the strongest prior on, each fit starts at the last
        result = curvature.minimize(objective, begin, (x, y, prior), method="trust-region")
        fits.append(result.x)
        evidences.append(float(log_evidence(fits[-1], x, y, prior)))
        ended = curvature.Status(int(result.status)).name.lower()
        screen.print(f"{float(prior):15.3f}   {evidences[-1]:12.2f}   {ended}, {int(result.num_steps)} steps")
    best = int(np.argmax(evidences))
    params, prior, grid = fits[best], priors[best], jnp.linspace(-4.5, 4.5, 181)
    deviation, at_data = deviations(params, x, y, prior, grid), deviations(params, x, y, prior, x)
    in_gap, near = float(deviation[90]), float(jnp.mean(at_data))
    screen.print(f"\nThe evidence is largest at prior precision {float(prior):.3g}.")
    screen.print(f"With it the output at 0, in the gap, has a standard deviation of {in_gap:.2f}; where there are")
    screen.print(f"data {near:.2f}: {in_gap / near:.1f} times less. The noise of {NOISE} of the data comes on top.")
    prediction = tuple(map(np.asarray, (grid, model(params, grid), deviation)))
    save_picture(picture, (x, y), (np.asarray(priors), evidences), prediction)
    screen.print(f"Picture: {os.path.relpath(picture)}\nDone in {time.perf_counter() - began:.0f} s.")
    return in_gap, near


if __name__ == "__main__":
    main()
