"""Exact Newton on handwritten digits against scikit-learn: ``python -m benchmarks.digits``.

Multinomial logistic regression with an L2 term, double precision: ``minimize`` with ``hessian=mean_hessian(loss)``
against scikit-learn's ``newton-cholesky`` and ``lbfgs`` on the same objective, all warm, with the threads that each
takes by itself. Then exact Newton on a network of 1,210 parameters.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import curvature
from benchmarks.timing import Row, console, digits, measure, table

CLASSES = 10
L2 = 1e-3  # the penalty, L2 / 2 times the square of all weights but the biases
GTOL = 1e-6  # where the objective is within 1e-9 of the minimum
WANTED_GAP = 1e-9  # in the objective, relative
WANTED_SHARE = 0.5  # of scikit-learn's time
HIDDEN, NETWORK_L2 = 16, 1e-2
WANTED_GRADIENT = 1e-8
OURS = "minimize, mean_hessian"

Params = Any


def regression_loss(params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
    """The penalized loss of one example, of which the objective is the mean.

    The last bias is zero: a constant added to all of them changes nothing, and would leave the Hessian singular.
    """
    logits = image @ params["weights"] + jnp.append(params["bias"], 0.0)
    fit = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    return fit + L2 / 2 * jnp.sum(params["weights"] ** 2)


def network_loss(params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
    """The same for a tanh network, with a penalty on every parameter."""
    hidden = jnp.tanh(image @ params["first"]["weights"] + params["first"]["bias"])
    logits = hidden @ params["last"]["weights"] + params["last"]["bias"]
    fit = optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)
    return fit + NETWORK_L2 / 2 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def mean_of(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The objective, and the same for every call, so that its program is found again."""

    def objective(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, images, labels))

    return objective


def network_params() -> Params:
    """64-16-10, in the usual random scale."""
    first, last = jax.random.split(jax.random.key(0))
    return {
        "first": {"weights": jax.random.normal(first, (64, HIDDEN)) / 8, "bias": jnp.zeros(HIDDEN)},
        "last": {"weights": jax.random.normal(last, (HIDDEN, CLASSES)) / 4, "bias": jnp.zeros(CLASSES)},
    }


def peers(images: np.ndarray, labels: np.ndarray) -> dict[str, Callable[[], LogisticRegression]]:
    """Scikit-learn's solvers, each at a tolerance that reaches the same objective to 1e-9."""

    def fit(solver: str, tol: float) -> LogisticRegression:
        model = LogisticRegression(C=1 / (L2 * len(images)), solver=solver, tol=tol, max_iter=10_000)
        return model.fit(images, labels)

    return {
        "scikit-learn newton-cholesky": functools.partial(fit, "newton-cholesky", 1e-6),
        "scikit-learn lbfgs": functools.partial(fit, "lbfgs", 1e-7),
    }


def bench_regression(screen: Console, images: np.ndarray, labels: np.ndarray) -> list[str]:
    """The regression, timed; the claims about it."""
    data = jnp.asarray(images), jnp.asarray(labels)
    objective, hessian = mean_of(regression_loss), curvature.mean_hessian(regression_loss)
    start = {"weights": jnp.zeros((64, CLASSES)), "bias": jnp.zeros(CLASSES - 1)}
    solve = functools.partial(curvature.minimize, objective, start, data, method="newton", hessian=hessian, gtol=GTOL)
    contestants = {OURS: solve, **peers(images, labels)}
    title = f"Softmax regression, {len(images):,} digits, 649 parameters"
    with screen.status(title) as status:
        jax.block_until_ready(solve())  # compiles
        rows = measure(contestants, budget=4.0, rounds=5, report=lambda line: status.update(f"{title}: {line}"))
        result = solve()
        values = {OURS: float(result.value)}
        for name in contestants.keys() - {OURS}:
            model = contestants[name]()
            fitted = {
                "weights": jnp.asarray(model.coef_.T),
                "bias": jnp.asarray(model.intercept_[:-1] - model.intercept_[-1]),
            }
            values[name] = float(objective(fitted, *data))
    caption = f"{int(result.num_steps)} Newton steps; objective {values[OURS]:.12f}."
    screen.print(table(title, rows.values(), rows[OURS], caption))
    screen.print()
    return regression_verdicts(rows, values, bool(result.success))


def regression_verdicts(rows: Mapping[str, Row], values: Mapping[str, float], converged: bool) -> list[str]:
    """Each claim, with what was measured of it."""
    best = min(values.values())
    excess = {name: (value - best) / abs(best) for name, value in values.items()}
    claims = [
        (
            converged and excess[OURS] <= WANTED_GAP,
            f"our objective within {excess[OURS]:.0e} of the lowest (wanted: {WANTED_GAP:.0e})",
        )
    ]
    for name in (name for name in rows if name != OURS):
        part = rows[OURS].seconds / rows[name].seconds
        claims.append(
            (
                part <= WANTED_SHARE,
                f"{digits(part)} of the time of {name} (wanted: {WANTED_SHARE}), which ends {excess[name]:.0e} above",
            )
        )
    return [f"{'holds' if holds else 'FAILS'}  {claim}" for holds, claim in claims]


def bench_network(screen: Console, images: np.ndarray, labels: np.ndarray) -> list[str]:
    """Exact Newton in a trust region on the network; the claim about it."""
    data = jnp.asarray(images), jnp.asarray(labels)
    result = curvature.minimize(
        mean_of(network_loss), network_params(), data, hessian=curvature.mean_hessian(network_loss),
        method="trust-exact", gtol=WANTED_GRADIENT,
    )  # fmt: skip
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(result.grad))
    screen.print(f"64-16-10 network, 1,210 parameters: {int(result.num_steps)} steps. {result.message}\n")
    holds = bool(result.success) and largest <= WANTED_GRADIENT
    return [f"{'holds' if holds else 'FAILS'}  network: max|grad| {largest:.0e} (wanted: {WANTED_GRADIENT:.0e})"]


def main() -> None:
    """Run it all."""
    jax.config.update("jax_enable_x64", True)
    screen = console()
    screen.print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; float64; medians.\n")
    images, labels = load_digits(return_X_y=True)
    lines = bench_regression(screen, images / 16, labels) + bench_network(screen, images / 16, labels)
    screen.print("The claims, as measured in this run (other work on the machine moves them):")
    for line in lines:
        screen.print(line, soft_wrap=True)


if __name__ == "__main__":
    main()
