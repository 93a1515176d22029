"""A network trained on mini-batches by second-order methods, against Adam.

Run it with ``python -m examples.training``. It needs equinox, scikit-learn, matplotlib and rich, takes under a minute
on two cores, and writes ``examples/output/training.png``.

Handwritten digits, a multilayer perceptron of equinox, and one and the same loop for every method, each of which is an
optax transformation. Those that have a learning rate get the best of a few, by the training loss at the end, and the
same cosine decay; the others have nothing to tune. KFAC runs twice: with the curvature of the gradient's batch, as all
others, and with that of another batch, which removes a bias and adds noise. The loss that is drawn is that of all
training images, and its evaluation is not in the times.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import curvature
from benchmarks import timing

EPOCHS, BATCH, WIDTH = 30, 256, 32
PICTURE = Path(__file__).parent / "output" / "training.png"
KEY = jax.random.key(0)

Data = tuple[jax.Array, jax.Array]
NETWORK = equinox.nn.MLP(64, 10, WIDTH, 2, activation=jnp.tanh, key=KEY)
PARAMS, STATIC = equinox.partition(NETWORK, equinox.is_inexact_array)


# ---- the problem -------------------------------------------------------------------------------------------------


def load() -> tuple[Data, Data]:
    """The images that come with scikit-learn: 1,437 to train with and 360 to test with."""
    images, labels = load_digits(return_X_y=True)
    images, labels = (images / 16).astype(np.float32), labels.astype(np.int32)
    parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
    return (train_images, train_labels), (test_images, test_labels)


def model(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The logits of a batch."""
    return jax.vmap(equinox.combine(params, STATIC))(images)


def loss(logits: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Their mean cross entropy."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def objective(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return loss(model(params, images, labels), images, labels)


@jax.jit
def training_loss(params: Any, data: Data) -> jax.Array:
    return objective(params, *data)


@jax.jit
def accuracy(params: Any, data: Data) -> jax.Array:
    """The share of images that are read right."""
    return jnp.mean(jnp.argmax(model(params, *data), axis=1) == data[1])


# ---- the methods -------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """A way to train.

    Attributes:
        make: the optimizer of a learning rate.
        rates: those to try; none if it has no rate.
        look: color and line.
        apart: whether the curvature has a batch of its own.
    """

    make: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    look: tuple[str, str]
    apart: bool = False


def _sophia(rate: Any) -> optax.GradientTransformation:
    """With the curvature at drawn labels, every tenth step."""
    how = {"estimator": "gauss-newton-bartlett", "likelihood": "categorical", "gamma": 0.05}
    return curvature.sophia(rate, key=KEY, model=model, loss=loss, **how)


def _adahessian(rate: Any) -> optax.GradientTransformation:
    """With a probe at every step."""
    return curvature.adahessian(rate, key=KEY)


def _natural_gradient(rate: Any) -> optax.GradientTransformation:
    return curvature.natural_gradient(model, loss, learning_rate=rate, likelihood="categorical")


def _kfac(_: Any) -> optax.GradientTransformation:
    return curvature.kfac(model, loss, EXAMPLE, likelihood="categorical")


EXAMPLE = jax.ShapeDtypeStruct((2, 64), jnp.float32), jax.ShapeDtypeStruct((2,), jnp.int32)
METHODS = {
    "Adam": Method(optax.adam, (0.01, 0.03, 0.1, 0.3), ("0.2", "-")),
    "Sophia": Method(_sophia, (0.003, 0.01, 0.03, 0.1), ("#6a4c93", "-")),
    "AdaHessian": Method(_adahessian, (0.05, 0.1, 0.2, 0.4), ("#f28500", "-")),
    "Hessian-free": Method(lambda _: curvature.trust_region("cg", max_inner_steps=30), (), ("#2a9d8f", "-")),
    "natural gradient": Method(_natural_gradient, (0.1, 0.3, 1.0), ("#1f77b4", "-")),
    "KFAC": Method(_kfac, (), ("#c1121f", "-")),
    "KFAC, batches apart": Method(_kfac, (), ("#c1121f", ":"), apart=True),
}


def trainer(make: Callable[[Any], optax.GradientTransformation], epochs: int, data: Data) -> Callable[..., Any]:
    """One epoch, compiled: ``epoch(params, state, rate, key, apart) -> (params, state)``; the state None begins one."""
    batches = len(data[1]) // BATCH

    def solver_of(rate: jax.Array) -> optax.GradientTransformationExtraArgs:
        schedule = optax.cosine_decay_schedule(rate, epochs * batches)
        return optax.with_extra_args_support(make(schedule))

    def drawn(key: jax.Array, data: Data) -> Data:
        """All batches of an epoch, in an order of their own."""
        order = jax.random.permutation(key, len(data[1]))[: batches * BATCH]
        return jax.tree.map(lambda leaf: leaf[order].reshape(batches, BATCH, *leaf.shape[1:]), data)

    def epoch(params: Any, state: Any, rate: jax.Array, key: jax.Array, apart: jax.Array, data: Data) -> Any:
        solver = solver_of(rate)

        def step(carry: Any, pair: tuple[Data, Data]) -> tuple[Any, None]:
            (params, state), (batch, other) = carry, pair
            value, grad = jax.value_and_grad(objective)(params, *batch)
            ggn = curvature.GaussNewtonOperator(model, loss, params, *other, likelihood="categorical")
            updates, state = solver.update(
                grad, state, params, value=value, value_fn=lambda params: objective(params, *batch),
                args=other, hvp_fn=ggn.linearize(),
            )  # fmt: skip
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(key)
        pairs = drawn(keys[0], data), drawn(keys[apart], data)
        return jax.lax.scan(step, (params, state), pairs)[0]

    begin = solver_of(jnp.asarray(1.0)).init(PARAMS)
    zero = jnp.asarray(0)
    compiled = jax.jit(epoch).lower(PARAMS, begin, jnp.asarray(1.0), KEY, zero, data).compile()
    jax.block_until_ready(compiled(PARAMS, begin, jnp.asarray(1.0), KEY, zero, data))  # the first run warms up
    return lambda params, state, *rest: compiled(params, begin if state is None else state, *rest, data)


class Run(NamedTuple):
    """What came of a rate: the loss after each epoch, the seconds spent, the parameters at the end."""

    rate: float
    losses: np.ndarray
    seconds: np.ndarray
    params: Any


def train(epoch: Callable[..., Any], rate: float, apart: bool, epochs: int, data: Data) -> Run:
    """All epochs from the same start; the seconds do not hold the evaluations."""
    params, state, spent = PARAMS, None, 0.0
    losses, seconds = [float(training_loss(params, data))], [0.0]
    for key in jax.random.split(jax.random.key(1), epochs):
        began = time.perf_counter()
        params, state = jax.block_until_ready(epoch(params, state, jnp.asarray(rate), key, jnp.asarray(int(apart))))
        spent += time.perf_counter() - began
        losses.append(float(training_loss(params, data)))
        seconds.append(spent)
    return Run(rate, np.array(losses), np.array(seconds), params)


# ---- what is shown -----------------------------------------------------------------------------------------------


def first_below(values: np.ndarray, level: float) -> int | None:
    """The epoch at which a loss first reaches a level."""
    reached = np.flatnonzero(values <= level)
    return int(reached[0]) if reached.size else None


def save_picture(path: Path, runs: dict[str, Run], batches: int) -> None:
    """The training loss against steps and against seconds; names stand where the curves end."""
    figure = Figure(figsize=(16, 7), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for name, run in runs.items():
        steps = batches * np.arange(len(run.losses))
        color, line = METHODS[name].look
        how = {"color": color, "linestyle": line, "linewidth": 2.4}
        rate = f", rate {run.rate:g}" if METHODS[name].rates else ""
        left.semilogy(steps, run.losses, label=f"{name}{rate}", **how)
        right.loglog(run.seconds[1:], run.losses[1:], **how)
    left.legend(fontsize=14, frameon=False)
    left.set_title("Training loss against steps", fontsize=18, pad=12)
    right.set_title("The same against time, without compilation", fontsize=18, pad=12)
    left.set_xlabel(f"steps of {BATCH} images", fontsize=15)
    right.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g} s" if seconds >= 1 else f"{1e3 * seconds:g} ms")
    right.set_xlabel("time on this machine", fontsize=15)
    left.set_ylabel("cross entropy of all training images", fontsize=15)
    for axes in (left, right):
        axes.tick_params(labelsize=14)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def show(screen: Console, name: str, run: Run, epochs: int, batches: int, level: float, test: Data) -> None:
    """The line of a method."""
    reached = first_below(run.losses, level)
    tried = ", ".join(f"{rate:g}" for rate in METHODS[name].rates) or "none to tune"
    screen.print(
        f"{name:20} {tried:23} {run.rate if METHODS[name].rates else '':<4} {run.losses[-1]:11.1e} "
        f"{float(accuracy(run.params, test)):8.1%} {1e3 * run.seconds[-1] / (epochs * batches):8.2f} "
        f"{'never' if reached is None else reached * batches:>16}"
    )


def main(epochs: int = EPOCHS, picture: Path = PICTURE, most_rates: int = 4) -> dict[str, float]:
    """Run it all; returns the training loss at the end of each method."""
    screen, began = timing.console(), time.perf_counter()
    data, test = load()
    batches, count = len(data[1]) // BATCH, sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    screen.print("A network trained by second-order methods", style="bold")
    screen.print(f"{len(data[1]):,} digits, {count:,} parameters, {epochs * batches} steps on batches of {BATCH}.\n")
    screen.print("method               rates tried             best  final loss  testing  ms/step  steps to Adam's")
    programs, runs = {}, {}
    for name, method in METHODS.items():
        if method.make not in programs:
            programs[method.make] = trainer(method.make, epochs, data)
        rates = method.rates[:most_rates] or (1.0,)
        tried = [train(programs[method.make], rate, method.apart, epochs, data) for rate in rates]
        runs[name] = min(tried, key=lambda run: np.nan_to_num(run.losses[-1], nan=np.inf))
        show(screen, name, runs[name], epochs, batches, runs["Adam"].losses[-1], test)
    save_picture(picture, runs, batches)
    screen.print(f"\nPicture: {os.path.relpath(picture)}\nDone in {time.perf_counter() - began:.0f} s.")
    return {name: float(run.losses[-1]) for name, run in runs.items()}


if __name__ == "__main__":
    main()
