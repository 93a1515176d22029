"""How fast an objective falls on digits: solves cut off after more and more steps, and training on mini-batches."""

import itertools
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvature
from benchmarks import digits, peers
from benchmarks.cases import OURS, Case, Choice, Claim, Finding, Line, Outcome, Outcomes, Plot, Row, Study
from benchmarks.reading import part
from benchmarks.solvers import largest, run_optax_lbfgs
from benchmarks.timing import clock
from benchmarks.timing import digits as figures

PREFIX, TRAINING = "optimizers/curves/", "optimizers/training/digits"
TITLES = {"regression": "softmax regression on digits", "network": "a 64-16-10 tanh network on digits"}
RATE = 0.01  # of Adam
GTOL = 1e-8
STATIONARY = 1e-6  # the largest entry of the gradient at what passes for a minimum
CLOSE = 1e-6  # relative to the fall of the objective: the level at which times are compared
MOST_STEPS = 3000
LONGEST = 3.0  # seconds: a curve ends with the first run that takes as long
CAPTION = (
    "Each mark is a run of its own, cut off after so many steps and timed whole, warm. Every step takes all of the "
    f"data. Adam has the rate {RATE}. The minimum is the least value that any of them reached."
)

Solve = Callable[[Any], Any]  # from the number of steps allowed to the parameters


def cases(choice: Choice) -> Iterator[Case]:
    """The curves in a full run, and training; nothing without scikit-learn's images."""
    if not peers.is_installed("scikit-learn"):
        return
    for name, title in () if choice.quick else TITLES.items():
        yield Study(f"{PREFIX}{name}", f"Convergence on {title}", "digits", partial(run, name))
    sizes, study = {"batch": BATCH, "epochs": EPOCHS[choice.quick]}, partial(train_all, choice.quick)
    yield Study(TRAINING, "Training on mini-batches of digits", "digits", study, sizes)


def run(name: str, report: Callable[[str], Any]) -> Outcome:
    """The curve of each solver: steps, seconds, value, largest entry of the gradient."""
    loss, start, exact = {
        "regression": (digits.regression_loss, digits.regression_params(), "newton"),
        "network": (digits.network_loss, digits.network_params(digits.HIDDEN), "trust-exact"),
    }[name]
    objective, data = digits.mean_of(loss), digits.data()
    value_and_grad = jax.jit(jax.value_and_grad(objective))

    def adam(most_steps: Any, x: Any, data: Any) -> Any:
        solver = optax.adam(RATE)

        def step(_: Any, carry: Any) -> Any:
            x, state = carry
            updates, state = solver.update(jax.grad(objective)(x, *data), state, x)
            return optax.apply_updates(x, updates), state

        return jax.lax.fori_loop(0, most_steps, step, (x, solver.init(x)))[0]

    def ours(method: str, **how: Any) -> Solve:
        solve = partial(curvature.minimize, objective, start, data, method=method, gtol=GTOL, **how)
        return lambda steps: solve(max_steps=steps).x

    def lbfgs(most_steps: Any, x: Any, data: Any) -> Any:
        return run_optax_lbfgs(objective, x, data, GTOL, most_steps).x

    def compiled(way: Callable[..., Any]) -> Solve:
        jitted = jax.jit(way)  # once: the number of steps is an operand
        return lambda steps: jitted(steps, start, data)

    ways: dict[str, Solve] = {
        f"curvature {exact}": ours(exact, hessian=curvature.mean_hessian(loss)),
        "curvature trust-region": ours("trust-region"),
        "curvature l-bfgs": ours("l-bfgs"),
        "optax.lbfgs": compiled(lbfgs),
        "optax.adam": compiled(adam),
    }
    outcome = Outcome(caption=CAPTION)
    for label, solve in ways.items():
        report(label)
        outcome.series[label] = curve = trace(solve, lambda x: value_and_grad(x, *data))
        metrics = dict(zip(("steps", "seconds", "value", "gradient"), curve[-1], strict=True))
        outcome.rows.append(Row(label, label.replace(".", " ").split()[0], metrics=metrics))
    compare(outcome)
    return outcome


def trace(solve: Solve, value_and_grad: Callable[[Any], Any]) -> list[list[float]]:
    """Runs of 0, 1, 2, 3, 4, 6, 8, 12 ... steps, until one takes too long, converges or comes to the last count."""
    jax.block_until_ready(solve(0))  # compiles
    curve: list[list[float]] = []
    pairs = itertools.takewhile(lambda c: c <= MOST_STEPS, (n << k >> 1 for k in itertools.count(1) for n in (2, 3)))
    for steps in (0, 1, *pairs):
        taken: list[float] = []  # the median of five where they are short, once where they are long
        while len(taken) < 5 and sum(taken) < 0.5:
            x, seconds = clock(lambda steps=steps: solve(steps))
            taken.append(seconds)
        value, grad = value_and_grad(x)
        slope = float(largest(grad))
        curve.append([float(steps), statistics.median(taken), float(value), slope])
        still = len(curve) > 3 and curve[-1][2:] == curve[-3][2:]
        if statistics.median(taken) > LONGEST or slope <= GTOL or still:
            break
    return curve


def least(outcome: Outcome) -> tuple[float, bool]:
    """The least value of all curves, and whether the gradient says that it is at a minimum."""
    *_, value, slope = min((point for curve in outcome.series.values() for point in curve), key=lambda p: p[2])
    return value, slope <= STATIONARY


def compare(outcome: Outcome) -> None:
    """When each comes close to the minimum, beside the rows; a claim that ours do."""
    lowest, is_minimum = least(outcome)
    for row in outcome.rows:
        curve = outcome.series[row.name]
        level = lowest + CLOSE * (curve[0][2] - lowest)
        reached = next((point for point in curve if is_minimum and point[2] <= level), (None, None))
        row.metrics |= {"seconds_to_close": reached[1], "steps_to_close": reached[0]}
        if row.peer == OURS:
            fell = curve[-1][2] < curve[0][2]
            outcome.claims.append(Claim(f"{row.name} lowers the objective", fell, correctness=True))


def curve_plots(name: str, outcome: Outcome) -> Iterator[Plot]:
    """The excess over the minimum and the gradient, against steps and against seconds."""
    lowest, is_minimum = least(outcome)
    floor = 1e-12 * max(1.0, abs(lowest))  # what rounding leaves of a difference
    for axis, (measure, unit) in enumerate(
        {"steps": "steps", "seconds": "seconds on this machine, without compilation"}.items()
    ):
        curves = {label: [p for p in curve if p[0] > 0] for label, curve in outcome.series.items()}
        excess = [Line(n, [p[axis] for p in c], [max(p[2] - lowest, floor) for p in c]) for n, c in curves.items()]
        slopes = [Line(n, [p[axis] for p in c], [p[3] for p in c]) for n, c in curves.items()]
        title = f"{TITLES[name]}, against {measure}"
        if is_minimum:
            label = "objective above its minimum"
            yield Plot(f"curve-{name}-{measure}", f"Convergence on {title}", unit, label, excess, caption=CAPTION)
        label = "largest entry of the gradient"
        yield Plot(f"gradient-{name}-{measure}", f"Gradient on {title}", unit, label, slopes, caption=CAPTION)


def curve_findings(outcomes: Outcomes) -> Iterator[Finding]:
    said = []
    for id, outcome in part(outcomes, PREFIX).items():
        if outcome.series:
            there = [row for row in outcome.rows if row.metrics.get("seconds_to_close") is not None]
            times = [
                f"{row.name} {figures(1e3 * row.metrics['seconds_to_close'])} ms, at most "
                f"{row.metrics['steps_to_close']:.0f} steps"
                for row in sorted(there, key=lambda row: row.metrics["seconds_to_close"])
            ]
            never = [row.name for row in outcome.rows if row not in there]
            rest = f" Not there, for want of time or at another minimum: {', '.join(never)}." if never else ""
            said.append(f"On {TITLES[id.removeprefix(PREFIX)]}: {'; '.join(times) or 'nobody'}.{rest}")
    if said:
        question = f"Who is first within {CLOSE:.0e} of the way to the minimum, all data in every step?"
        yield Finding(question, " ".join(said))


BATCH, WIDTH = 256, 32
EPOCHS = {True: 4, False: 30}
TRAINING_CAPTION = (
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
    return digits.network(params, images)


def mean_loss(logits: jax.Array, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(digits.cross_entropy(logits, labels))


def objective(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return mean_loss(model(params, images, labels), images, labels)


def methods() -> dict[str, Method]:
    key, kind = jax.random.key(0), {"likelihood": "categorical"}
    example = jax.ShapeDtypeStruct((2, 64), jnp.float64), jax.ShapeDtypeStruct((2,), jnp.int32)
    sampled = {"estimator": "gauss-newton-bartlett", "gamma": 0.05, "model": model, "loss": mean_loss} | kind
    nan = float("nan")
    return {
        "curvature.kfac": Method(OURS, lambda _: curvature.kfac(model, mean_loss, example, **kind), (nan,), True),
        "curvature.sophia": Method(OURS, lambda rate: curvature.sophia(rate, key=key, **sampled), (0.003, 0.01, 0.03)),
        "curvature.adahessian": Method(OURS, lambda rate: curvature.adahessian(rate, key=key), (0.05, 0.1, 0.2)),
        "optax.adam": Method("optax", optax.adam, (0.01, 0.03, 0.1), True),
    }


def train_all(quick: bool, report: Callable[[str], Any]) -> Outcome:
    """Train by each method at each rate, and keep the best: epochs, seconds, loss."""
    images, labels = digits.data()
    data, outcome = (images, labels.astype(jnp.int32)), Outcome(caption=TRAINING_CAPTION)
    for name, method in methods().items():
        if quick and not method.quick:
            continue
        report(name)
        rates = method.rates[:1] if quick else method.rates
        curves = dict(zip(rates, train(method, rates, EPOCHS[quick], data), strict=True))
        rate = min(curves, key=lambda rate: curves[rate][-1][2])
        outcome.series[name] = curve = curves[rate]
        tried = ", ".join(f"{r:g}" for r in rates if r == r)
        number, spent, loss = curve[-1]
        metrics = {"loss": loss, "seconds_per_epoch": spent / number, "rate": rate if tried else None}
        outcome.rows.append(Row(name, method.peer, metrics=metrics, note=f"rates tried: {tried}" if tried else ""))
        if method.peer == OURS:
            outcome.claims.append(Claim(f"{name} lowers the loss", loss < curve[0][2], correctness=True))
    return outcome


def train(method: Method, rates: tuple[float, ...], epochs: int, data: Any) -> Iterator[list[list[float]]]:
    """For each rate, after every epoch: its number, the seconds spent in epochs, the loss of all images."""

    @jax.jit
    def epoch(params: Any, state: Any, rate: jax.Array, order: jax.Array, data: Any) -> Any:
        solver = optax.with_extra_args_support(method.make(rate))

        def step(carry: Any, batch: Any) -> tuple[Any, None]:
            params, state = carry
            value, grad, hvp_fn = curvature.linearize_grad(objective, params, *batch)  # unused products cost nothing
            more = {"value_fn": lambda params: objective(params, *batch), "args": batch, "hvp_fn": hvp_fn}
            updates, state = solver.update(grad, state, params, value=value, **more)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, state), jax.tree.map(lambda leaf: leaf[order], data))[0]

    size, full_loss = len(data[1]) // BATCH * BATCH, jax.jit(objective)
    for rate in map(jnp.asarray, rates):
        params = digits.network_params(WIDTH, WIDTH)
        state = optax.with_extra_args_support(method.make(rate)).init(params)
        jax.block_until_ready(epoch(params, state, rate, jnp.arange(size).reshape(-1, BATCH), data))  # compiles
        curve, spent, rng = [[0.0, 0.0, float(full_loss(params, *data))]], 0.0, np.random.default_rng(1)
        for number in range(1, epochs + 1):
            order = jnp.asarray(rng.permutation(len(data[1]))[:size].reshape(-1, BATCH))
            (params, state), seconds = clock(partial(epoch, params, state, rate, order, data))
            spent += seconds
            curve.append([float(number), spent, float(full_loss(params, *data))])
        yield curve


def plots(outcomes: Outcomes) -> list[Plot]:
    found = [plot for id, o in part(outcomes, PREFIX).items() if o.series
             for plot in curve_plots(id.removeprefix(PREFIX), o)]  # fmt: skip
    curves = outcomes.get(TRAINING, Outcome()).series
    for axis, label in enumerate(("epochs", "seconds on this machine")) if curves else ():
        lines = [Line(name, [p[axis] for p in curve[1:]], [p[2] for p in curve[1:]]) for name, curve in curves.items()]
        unit, what = label.split()[0], "cross entropy of all images"
        title = f"Training loss on digits, against {unit}"
        found.append(Plot(f"training-{unit}", title, label, what, lines, axis == 1, caption=TRAINING_CAPTION))
    return found


def findings(outcomes: Outcomes) -> list[Finding]:
    question = "Do second-order methods train a network faster than Adam?"
    outcome = outcomes.get(TRAINING, Outcome())
    adam = outcome.series.get("optax.adam")
    if adam is None:
        return [*curve_findings(outcomes), Finding(question, "It was not run.")]
    said = []
    for name, curve in outcome.series.items():
        passed = None if name == "optax.adam" else next((point for point in curve if point[2] <= adam[-1][2]), None)
        when = f", where Adam ends after {passed[0]:.0f} epochs and {figures(passed[1])} s" if passed else ""
        said.append(f"{name} ends at {curve[-1][2]:.1e} after {figures(curve[-1][1])} s{when}")
    answer = f"{outcome.sizes['epochs']:.0f} epochs: {'; '.join(said)}."
    return [*curve_findings(outcomes), Finding(question, answer)]
