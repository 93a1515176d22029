"""A physics-informed network: Poisson's equation on a square, trained on second derivatives of a network.

Run it with ``python -m examples.pinn``. It needs matplotlib and rich, takes about half a minute on two cores, and
writes ``examples/output/pinn.png``.

The network never sees the solution. It is trained to make ``laplacian(u) + f`` vanish at points inside the square. Here
``f`` belongs to a solution that is known, so that the error can be told at the end.
"""

import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import curvature
from benchmarks import timing

WIDTHS = (2, 24, 24, 1)
POINTS = 16  # along each side, where the equation must hold
GRID = 121  # along each side, where the answer is looked at
MAX_STEPS = 100
PICTURE = Path(__file__).parent / "output" / "pinn.png"

Params = list[dict[str, jax.Array]]
Curve = list[tuple[float, float]]  # seconds and loss


# ---- the problem -------------------------------------------------------------------------------------------------


def exact(x: jax.Array) -> jax.Array:
    """The solution that the network has to find: a slow wave and a fast one, zero on the border."""
    slow = jnp.sin(jnp.pi * x[0]) * jnp.sin(jnp.pi * x[1])
    return slow + jnp.sin(4 * jnp.pi * x[0]) * jnp.sin(3 * jnp.pi * x[1]) / 2


def source(x: jax.Array) -> jax.Array:
    """The right-hand side of ``-laplacian(u) = f``."""
    return -curvature.laplacian(exact)(x)


def solution(x: jax.Array, params: Params) -> jax.Array:
    """The network's ``u(x)``, with a factor that holds it at zero on the border."""
    hidden = 2 * x - 1
    for layer in params[:-1]:
        hidden = jnp.tanh(hidden @ layer["weights"] + layer["bias"])
    border = 16 * x[0] * (1 - x[0]) * x[1] * (1 - x[1])
    return border * (hidden @ params[-1]["weights"] + params[-1]["bias"])[0]


def loss(params: Params, points: jax.Array, right_hand_side: jax.Array) -> jax.Array:
    """The mean square by which the equation is missed."""
    laplacians = jax.vmap(curvature.laplacian(solution), in_axes=(0, None))(points, params)
    return jnp.mean((laplacians + right_hand_side) ** 2)


def start() -> Params:
    """Random parameters; the first layer is steep enough for waves."""
    rng = np.random.default_rng(0)
    scales = [2.0] + [WIDTHS[1] ** -0.5] * (len(WIDTHS) - 2)
    params = []
    for scale, rows, columns in zip(scales, WIDTHS[:-1], WIDTHS[1:], strict=True):
        weights, bias = scale * rng.normal(size=(rows, columns)), rng.normal(size=columns)
        params.append({"weights": jnp.asarray(weights), "bias": jnp.asarray(bias)})
    return params


def square(side: int) -> jax.Array:
    """The centers of ``side * side`` cells of the unit square, shape ``(side * side, 2)``."""
    ticks = (jnp.arange(side) + 0.5) / side
    return jnp.stack(jnp.meshgrid(ticks, ticks, indexing="ij"), axis=-1).reshape(-1, 2)


# ---- training, watched -------------------------------------------------------------------------------------------


def train(max_steps: int) -> tuple[curvature.MinimizeResult, Curve]:
    """Trust-region Newton steps, each printed once in a while; and the loss after each."""
    screen, points, curve, began = timing.console(), square(POINTS), [], time.perf_counter()
    screen.print("step   mean square residual   max|gradient|   CG steps   seconds")

    def show(step: curvature.types.MinimizeStep) -> None:
        seconds = time.perf_counter() - began
        curve.append((seconds, float(step.value)))
        if int(step.num_steps) % 10 == 0:
            numbers = f"{float(step.value):20.3e}   {float(step.grad_norm):13.1e}   {int(step.state.num_inner_steps):8}"
            screen.print(f"{int(step.num_steps):4}   {numbers}   {seconds:7.1f}")

    data = points, jax.vmap(source)(points)
    result = curvature.minimize(loss, start(), data, method="trust-region", max_steps=max_steps, callback=show)
    jax.effects_barrier()  # the last lines may still be under way
    return result, curve


# ---- the picture -------------------------------------------------------------------------------------------------

_LABEL, _TITLE = 13, 15


def draw_field(figure: Figure, axes: Axes, field: np.ndarray, title: str, colors: str) -> None:
    """A function on the square, with its scale centered at zero."""
    bound = np.abs(field).max()
    options = {"extent": (0, 1, 0, 1), "origin": "lower", "interpolation": "bicubic"}
    image = axes.imshow(field.T, cmap=colors, vmin=-bound, vmax=bound, **options)
    bar = figure.colorbar(image, ax=axes, shrink=0.8)
    bar.ax.tick_params(labelsize=_LABEL - 2)
    bar.formatter.set_powerlimits((-2, 3))
    axes.set_title(title, fontsize=_TITLE, pad=12)
    axes.set_xlabel("$x_1$", fontsize=_LABEL)
    axes.set_ylabel("$x_2$", fontsize=_LABEL)
    axes.set_xticks([0, 0.5, 1])
    axes.set_yticks([0, 0.5, 1])


def draw_curve(axes: Axes, curve: Curve) -> None:
    """The loss against time; what comes before the first step is compilation."""
    seconds, losses = np.array(curve).T
    axes.semilogy(seconds - seconds[0], losses, color="#c1121f", linewidth=2.2)
    axes.set_title(f"{len(curve) - 1} trust-region Newton steps", fontsize=_TITLE, pad=12)
    axes.set_xlabel("seconds without compilation", fontsize=_LABEL)
    axes.set_ylabel("mean square of laplacian(u) + f", fontsize=_LABEL)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)


def save_picture(path: Path, found: np.ndarray, error: np.ndarray, curve: Curve) -> None:
    """Draw the solution, its error and the training into a file, whose folder is made if missing."""
    figure = Figure(figsize=(16, 4.9), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    draw_field(figure, left, found, "The network's solution u", "RdBu_r")
    draw_field(figure, middle, error, "Its error against the exact solution", "PuOr_r")
    draw_curve(right, curve)
    for axes in (left, middle, right):
        axes.tick_params(labelsize=_LABEL)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(max_steps: int = MAX_STEPS, picture: Path = PICTURE) -> float:
    """Run it all; returns the relative error of the solution."""
    jax.config.update("jax_enable_x64", True)
    screen, began = timing.console(), time.perf_counter()
    count = sum(leaf.size for leaf in jax.tree.leaves(start()))
    screen.print("A physics-informed network for Poisson's equation", style="bold")
    screen.print("-laplacian(u) = f on the unit square, u = 0 on its border.")
    screen.print(f"{POINTS**2} points, {count} parameters, double precision.\n")
    screen.print("curvature.laplacian(solution).explain(x, params): equations, and how each is differentiated")
    screen.print(f"{curvature.laplacian(solution).explain(jnp.ones(2), start())}\n")

    result, curve = train(max_steps)
    grid = square(GRID)
    found = np.asarray(jax.jit(jax.vmap(solution, (0, None)))(grid, result.x)).reshape(GRID, GRID)
    error = found - np.asarray(jax.vmap(exact)(grid)).reshape(GRID, GRID)
    relative = float(np.linalg.norm(error) / np.linalg.norm(found - error))
    screen.print(f"\n{result.message} {int(result.num_steps)} steps.")
    screen.print(f"Against the exact solution: relative error {relative:.1e}, largest error {np.abs(error).max():.1e}.")
    save_picture(picture, found, error, curve)
    screen.print(f"Picture: {os.path.relpath(picture)}")
    screen.print(f"Done in {time.perf_counter() - began:.0f} s.")
    return relative


if __name__ == "__main__":
    main()
