"""How fast the objective falls: the same solve cut off after more and more steps, each of them timed as a whole."""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

import curvature
from benchmarks import peers
from benchmarks.cases import OURS, Case, Choice, Claim, Finding, Line, Outcome, Plot, Row, Study
from benchmarks.suites.optimizers.solvers import run_optax_lbfgs
from benchmarks.timing import clock
from benchmarks.timing import digits as figures

PREFIX = "optimizers/curves/"
TITLES = {"regression": "softmax regression on digits", "network": "a 64-16-10 tanh network on digits"}
MEASURES = ("steps", "seconds")
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


class Setting(NamedTuple):
    """A loss of one example, its mean, the start and the data."""

    loss: Callable[..., jax.Array]
    objective: Callable[..., jax.Array]
    start: Any
    data: tuple[jax.Array, jax.Array]


def cases(choice: Choice) -> Iterator[Case]:
    """Both, in a full run; nothing without scikit-learn's images."""
    if peers.is_installed("scikit-learn") and not choice.quick:
        for name, title in TITLES.items():
            yield Study(f"{PREFIX}{name}", f"Convergence on {title}", "digits", functools.partial(run, name))


def setting(name: str) -> Setting:
    """The problem of that name."""
    from sklearn.datasets import load_digits

    from benchmarks import digits

    images, labels = load_digits(return_X_y=True)
    zeros = {"weights": jnp.zeros((64, digits.CLASSES)), "bias": jnp.zeros(digits.CLASSES - 1)}
    loss, start = {
        "regression": (digits.regression_loss, zeros),
        "network": (digits.network_loss, digits.network_params()),
    }[name]
    return Setting(loss, digits.mean_of(loss), start, (jnp.asarray(images / 16), jnp.asarray(labels)))


def ways(name: str, s: Setting) -> Iterator[tuple[str, str, Solve]]:
    """The solvers by name and library; the number of steps is an operand, so each compiles once."""

    def ours(method: str, **how: Any) -> Solve:
        return lambda steps: (
            curvature.minimize(s.objective, s.start, s.data, method=method, gtol=GTOL, max_steps=steps, **how).x
        )

    hessian = curvature.mean_hessian(s.loss)
    exact = "newton" if name == "regression" else "trust-exact"
    yield f"curvature {exact}", OURS, ours(exact, hessian=hessian)
    yield "curvature trust-region", OURS, ours("trust-region")
    yield "curvature l-bfgs", OURS, ours("l-bfgs")
    lbfgs = jax.jit(lambda steps, x, data: run_optax_lbfgs(s.objective, x, data, GTOL, steps)[0])
    yield "optax.lbfgs", "optax", lambda steps: lbfgs(steps, s.start, s.data)
    adam = jax.jit(functools.partial(_adam, s.objective))
    yield "optax.adam", "optax", lambda steps: adam(steps, s.start, s.data)


def _adam(objective: Callable[..., jax.Array], most_steps: Any, x: Any, data: Any) -> Any:
    """So many steps with all of the data."""
    solver = optax.adam(RATE)

    def step(_: Any, carry: Any) -> Any:
        x, state = carry
        updates, state = solver.update(jax.grad(objective)(x, *data), state, x)
        return optax.apply_updates(x, updates), state

    return jax.lax.fori_loop(0, most_steps, step, (x, solver.init(x)))[0]


def run(name: str, report: Callable[[str], Any]) -> Outcome:
    """The curve of each way: steps, seconds, value, largest entry of the gradient."""
    s = setting(name)
    value_and_grad = jax.jit(jax.value_and_grad(s.objective))
    outcome = Outcome(caption=CAPTION)
    for label, peer, solve in ways(name, s):
        report(label)
        curve = trace(solve, lambda x: _measure(value_and_grad(x, *s.data)))
        outcome.series[label] = curve
        steps, seconds, value, slope = curve[-1]
        metrics = {"steps": steps, "seconds": seconds, "value": value, "gradient": slope}
        outcome.rows.append(Row(label, peer, metrics=metrics))
    _compare(outcome)
    return outcome


def trace(solve: Solve, measure: Callable[[Any], tuple[float, float]]) -> list[list[float]]:
    """Runs of 0, 1, 2, 3, 4, 6, 8, 12 ... steps, until one takes too long, converges or comes to the last count."""
    jax.block_until_ready(solve(0))  # compiles
    curve: list[list[float]] = []
    for steps in counts():
        x, seconds = _timed(solve, steps)
        value, slope = measure(x)
        curve.append([float(steps), seconds, value, slope])
        still = len(curve) > 3 and curve[-1][2:] == curve[-3][2:]
        if seconds > LONGEST or slope <= GTOL or still:
            break
    return curve


def _timed(solve: Solve, steps: int) -> tuple[Any, float]:
    """The end of a solve, and its seconds: the median of five where they are short, once where they are long."""
    taken: list[float] = []
    while len(taken) < 5 and sum(taken) < 0.5:
        x, seconds = clock(lambda: solve(steps))
        taken.append(seconds)
    return x, statistics.median(taken)


def counts() -> Iterator[int]:
    """0, 1, 2, 3, 4, 6, 8, 12, 16 ... up to the last."""
    yield 0
    yield 1
    for power in itertools.count(1):
        for count in (2**power, 3 * 2 ** (power - 1)):
            if count > MOST_STEPS:
                return
            yield count


def _measure(pair: Any) -> tuple[float, float]:
    value, grad = pair
    return float(value), float(jnp.max(jnp.abs(ravel_pytree(grad)[0])))


def _least(outcome: Outcome) -> tuple[float, bool]:
    """The least value of all curves, and whether the gradient says that it is at a minimum."""
    *_, value, slope = min((point for curve in outcome.series.values() for point in curve), key=lambda p: p[2])
    return value, slope <= STATIONARY


def _compare(outcome: Outcome) -> None:
    """When each comes close to the minimum, beside the rows; a claim that ours do."""
    least, is_minimum = _least(outcome)
    for row in outcome.rows:
        curve = outcome.series[row.name]
        level = least + CLOSE * (curve[0][2] - least)
        reached = next((point for point in curve if is_minimum and point[2] <= level), None)
        row.metrics["seconds_to_close"] = reached[1] if reached else None
        row.metrics["steps_to_close"] = reached[0] if reached else None
        if row.peer == OURS:
            fell = curve[-1][2] < curve[0][2]
            outcome.claims.append(Claim(f"{row.name} lowers the objective", fell, correctness=True))


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """For each problem the excess over the minimum and the gradient, against steps and against seconds."""
    found = [(id.removeprefix(PREFIX), o) for id, o in outcomes.items() if id.startswith(PREFIX) and o.series]
    return [plot for name, outcome in found for plot in _plots(name, outcome)]


def _plots(name: str, outcome: Outcome) -> Iterator[Plot]:
    least, is_minimum = _least(outcome)
    lowest = 1e-12 * max(1.0, abs(least))  # what rounding leaves of a difference
    for axis, measure in enumerate(MEASURES):
        excess, slopes = [], []
        for label, curve in outcome.series.items():
            points = [p for p in curve if p[0] > 0]
            x = [p[axis] for p in points]
            excess.append(Line(label, x, [max(p[2] - least, lowest) for p in points]))
            slopes.append(Line(label, x, [p[3] for p in points]))
        unit = "steps" if measure == "steps" else "seconds on this machine, without compilation"
        title = f"Convergence on {TITLES[name]}, against {measure}"
        if is_minimum:
            yield Plot(f"curve-{name}-{measure}", title, unit, "objective above its minimum", excess, caption=CAPTION)
        title = f"Gradient on {TITLES[name]}, against {measure}"
        yield Plot(f"gradient-{name}-{measure}", title, unit, "largest entry of the gradient", slopes, caption=CAPTION)


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """Who comes close to the minimum first."""
    question = f"Who is first within {CLOSE:.0e} of the way to the minimum, all data in every step?"
    told = []
    for id, outcome in outcomes.items():
        if id.startswith(PREFIX) and outcome.series:
            there = [r for r in outcome.rows if r.metrics.get("seconds_to_close") is not None]
            there.sort(key=lambda row: row.metrics["seconds_to_close"])
            times = [
                f"{row.name} {figures(1e3 * row.metrics['seconds_to_close'])} ms, at most "
                f"{row.metrics['steps_to_close']:.0f} steps"
                for row in there
            ]
            never = [r.name for r in outcome.rows if r not in there]
            rest = f" Not there, for want of time or at another minimum: {', '.join(never)}." if never else ""
            told.append(f"On {TITLES[id.removeprefix(PREFIX)]}: {'; '.join(times) or 'nobody'}.{rest}")
    ids = [id for id in outcomes if id.startswith(PREFIX)]
    return [Finding(question, " ".join(told), ids)] if told else []
