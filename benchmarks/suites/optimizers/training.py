"""Training on mini-batches: methods of second order against Adam, by epochs and by seconds."""

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvature
from benchmarks import peers
from benchmarks.cases import OURS, Case, Choice, Claim, Finding, Line, Outcome, Plot, Row, Study
from benchmarks.timing import digits as figures

ID = "optimizers/training/digits"
BATCH, WIDTH, CLASSES, PIXELS = 256, 32, 10, 64
EPOCHS = {True: 4, False: 30}
CAPTION = (
    f"A 64-{WIDTH}-{WIDTH}-10 tanh network, batches of {BATCH}, the same batches for all. A method that has a learning "
    "rate takes the best of those that are named, by the loss at the end; KFAC has none. The loss is that of all "
    "images, and its evaluation and the compilation are not in the seconds."
)


class Method(NamedTuple):
    """An optimizer of a learning rate, and the rates to be tried; one NaN if it has none."""

    peer: str
    make: Callable[[Any], optax.GradientTransformation]
    rates: tuple[float, ...]
    quick: bool = False


def model(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The logits of a batch."""
    for layer in params[:-1]:
        images = jnp.tanh(images @ layer["weights"] + layer["bias"])
    return images @ params[-1]["weights"] + params[-1]["bias"]


def loss(logits: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Their mean cross entropy."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def objective(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The loss of the parameters."""
    return loss(model(params, images, labels), images, labels)


def start() -> list[dict[str, jax.Array]]:
    """Random weights in the usual scale."""
    sizes = (PIXELS, WIDTH, WIDTH, CLASSES)
    rng = np.random.default_rng(0)
    return [
        {"weights": jnp.asarray(rng.normal(size=(rows, columns)) / rows**0.5), "bias": jnp.zeros(columns)}
        for rows, columns in itertools.pairwise(sizes)
    ]


def methods() -> dict[str, Method]:
    """The contestants by name."""
    key = jax.random.key(0)
    example = jax.ShapeDtypeStruct((2, PIXELS), jnp.float64), jax.ShapeDtypeStruct((2,), jnp.int32)
    sampled = {"estimator": "gauss-newton-bartlett", "likelihood": "categorical", "gamma": 0.05}
    return {
        "curvature.kfac": Method(
            OURS, lambda _: curvature.kfac(model, loss, example, likelihood="categorical"), (float("nan"),), True
        ),
        "curvature.sophia": Method(
            OURS, lambda rate: curvature.sophia(rate, key=key, model=model, loss=loss, **sampled), (0.003, 0.01, 0.03)
        ),
        "curvature.adahessian": Method(OURS, lambda rate: curvature.adahessian(rate, key=key), (0.05, 0.1, 0.2)),
        "optax.adam": Method("optax", optax.adam, (0.01, 0.03, 0.1), True),
    }  # fmt: skip


def cases(choice: Choice) -> Iterator[Case]:
    """One study; none without scikit-learn's images."""
    if peers.is_installed("scikit-learn"):
        yield Study(
            ID, "Training on mini-batches of digits", "digits", functools.partial(run, choice.quick),
            {"batch": BATCH, "epochs": EPOCHS[choice.quick]},
        )  # fmt: skip


def run(quick: bool, report: Callable[[str], Any]) -> Outcome:
    """Train by each method at each rate, and keep the best: epochs, seconds, loss."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    data = jnp.asarray(images / 16), jnp.asarray(labels, jnp.int32)
    outcome = Outcome(caption=CAPTION)
    for name, method in methods().items():
        if quick and not method.quick:
            continue
        report(name)
        epoch = compiled_epoch(method, data)
        rates = method.rates[:1] if quick else method.rates
        curves = {rate: train(epoch, method, rate, EPOCHS[quick], data) for rate in rates}
        rate = min(curves, key=lambda rate: curves[rate][-1][2])
        outcome.series[name] = curve = curves[rate]
        tried = ", ".join(f"{r:g}" for r in rates if r == r)
        metrics = {
            "loss": curve[-1][2],
            "seconds_per_epoch": curve[-1][1] / curve[-1][0],
            "rate": rate if tried else None,
        }
        outcome.rows.append(Row(name, method.peer, metrics=metrics, note=f"rates tried: {tried}" if tried else ""))
        if method.peer == OURS:
            outcome.claims.append(Claim(f"{name} lowers the loss", curve[-1][2] < curve[0][2], correctness=True))
    return outcome


def compiled_epoch(method: Method, data: Any) -> Callable[..., Any]:
    """``epoch(params, state, rate, order) -> (params, state)`` in one program."""

    def step(solver: Any, carry: Any, batch: Any) -> tuple[Any, None]:
        params, state = carry
        value, grad, hvp_fn = curvature.linearize_grad(objective, params, *batch)  # unused products cost nothing
        updates, state = solver.update(
            grad, state, params, value=value, value_fn=lambda params: objective(params, *batch), args=batch,
            hvp_fn=hvp_fn,
        )  # fmt: skip
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def epoch(params: Any, state: Any, rate: jax.Array, order: jax.Array, data: Any) -> Any:
        solver = optax.with_extra_args_support(method.make(rate))
        batches = jax.tree.map(lambda leaf: leaf[order], data)
        return jax.lax.scan(functools.partial(step, solver), (params, state), batches)[0]

    return lambda *args: jax.block_until_ready(epoch(*args, data))


def train(epoch: Callable[..., Any], method: Method, rate: float, epochs: int, data: Any) -> list[list[float]]:
    """After every epoch its number, the seconds spent in epochs, the loss of all images."""
    rng = np.random.default_rng(1)
    full_loss = jax.jit(objective)
    size, operand = len(data[1]) // BATCH * BATCH, jnp.asarray(rate)
    params = start()
    state = optax.with_extra_args_support(method.make(operand)).init(params)
    epoch(params, state, operand, jnp.arange(size).reshape(-1, BATCH))  # compiles
    curve, spent = [[0.0, 0.0, float(full_loss(params, *data))]], 0.0
    for number in range(1, epochs + 1):
        order = jnp.asarray(rng.permutation(len(data[1]))[:size].reshape(-1, BATCH))
        begin = time.perf_counter()
        params, state = epoch(params, state, operand, order)
        spent += time.perf_counter() - begin
        curve.append([float(number), spent, float(full_loss(params, *data))])
    return curve


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """The loss against epochs and against seconds."""
    outcome = outcomes.get(ID)
    if outcome is None or not outcome.series:
        return []
    return [
        Plot(
            f"training-{unit}", f"Training loss on digits, against {unit}", label, "cross entropy of all images",
            [Line(name, *_columns(curve, axis)) for name, curve in outcome.series.items()],
            x_log=axis == 1, caption=CAPTION,
        )
        for axis, (unit, label) in enumerate({"epochs": "epochs", "seconds": "seconds on this machine"}.items())
    ]  # fmt: skip


def _columns(curve: list[list[float]], axis: int) -> tuple[list[float], list[float]]:
    """Epochs or seconds, and losses, from the first epoch on."""
    return [point[axis] for point in curve[1:]], [point[2] for point in curve[1:]]


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """The losses at the end, and when each passes the last one of Adam."""
    question = "Do second-order methods train a network faster than Adam?"
    outcome = outcomes.get(ID)
    adam = outcome.series.get("optax.adam") if outcome else None
    if outcome is None or adam is None:
        return [Finding(question, "It was not run.", [])]
    told = []
    for name, curve in outcome.series.items():
        passed = next((point for point in curve if point[2] <= adam[-1][2]), None)
        when = f", where Adam ends after {passed[0]:.0f} epochs and {figures(passed[1])} s" if passed else ""
        told.append(
            f"{name} ends at {curve[-1][2]:.1e} after {figures(curve[-1][1])} s{when if name != 'optax.adam' else ''}"
        )
    return [Finding(question, f"{outcome.sizes['epochs']:.0f} epochs: {'; '.join(told)}.", [ID])]
