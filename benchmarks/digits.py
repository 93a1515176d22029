"""Handwritten digits: exact Newton against scikit-learn and others: ``python -m benchmarks.digits``.

Multinomial logistic regression with an L2 term, double precision: ``minimize`` with ``hessian=mean_hessian(loss)``
against scikit-learn's ``newton-cholesky`` and ``lbfgs`` on the same objective, and quasi-Newton methods of others. Then
exact Newton on a network of 1,210 parameters.
"""

import itertools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

import curvature
from benchmarks import peers
from benchmarks.cases import OURS, Case, Choice, Claim, Contestant, Finding, Outcome, Outcomes, Race, Row, Study
from benchmarks.reading import number
from benchmarks.solvers import largest, run_optax_lbfgs
from benchmarks.timing import digits as figures

ID = "optimizers/digits/regression"
CLASSES = 10
L2 = 1e-3  # the penalty, L2 / 2 times the square of all weights but the biases
GTOL = 1e-6  # where the objective is within 1e-9 of the minimum
GAP = 1e-8  # in the objective, relative: what every solver here reaches
FIRST_GTOL = 1e-7  # where the methods of first order are within that gap
NORM_TOL = 1e-6  # of jaxopt, which tests the Euclidean norm: a smaller one it does not reach
MAX_STEPS = 1000
WANTED_GAP = 1e-9  # in the objective of exact Newton
HIDDEN, NETWORK_L2 = 16, 1e-2
WANTED_GRADIENT = 1e-8

Params = Any


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, label)


def regression_loss(params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
    """The penalized loss of one example, of which the objective is the mean.

    The last bias is zero: a constant added to all of them changes nothing, and would leave the Hessian singular.
    """
    logits = image @ params["weights"] + jnp.append(params["bias"], 0.0)
    return cross_entropy(logits, label) + L2 / 2 * jnp.sum(params["weights"] ** 2)


def network(params: Params, image: jax.Array) -> jax.Array:
    """The logits of a tanh network, of one image or of many."""
    for layer in params[:-1]:
        image = jnp.tanh(image @ layer["weights"] + layer["bias"])
    return image @ params[-1]["weights"] + params[-1]["bias"]


def network_loss(params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
    """The loss of one example of a tanh network, with a penalty on every parameter."""
    penalty = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
    return cross_entropy(network(params, image), label) + NETWORK_L2 / 2 * penalty


def network_params(*hidden: int) -> Params:
    rng = np.random.default_rng(0)
    return [
        {"weights": jnp.asarray(rng.normal(size=(rows, columns)) / rows**0.5), "bias": jnp.zeros(columns)}
        for rows, columns in itertools.pairwise((64, *hidden, CLASSES))
    ]


def mean_of(loss: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The objective, and the same for every call, so that its program is found in the cache."""

    def objective(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(jax.vmap(loss, (None, 0, 0))(params, images, labels))

    return objective


def regression_params() -> Params:
    return {"weights": jnp.zeros((64, CLASSES)), "bias": jnp.zeros(CLASSES - 1)}


def data() -> tuple[jax.Array, jax.Array]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return jnp.asarray(images / 16), jnp.asarray(labels)


def cases(choice: Choice) -> Iterator[Case]:
    """One race; none without scikit-learn, whose images it takes."""
    if peers.is_installed("scikit-learn"):
        yield Race(
            ID, "Softmax regression, 1,797 digits, 649 parameters", "digits", partial(contestants, choice.quick),
            minimum, GAP, {"n": 649, "batch": 1797}, budget=0.5 if choice.quick else 6.0,
            rounds=2 if choice.quick else 5, claims=gap_claim,
            caption=f"Every solver is run to a tolerance at which its objective is within {GAP:.0e} of the minimum, "
            "relative; that is the answer which is checked. The minimum is that of plain Newton steps.",
        )  # fmt: skip


def minimum() -> float:
    """By plain Newton steps, with a Hessian from ``jax.hessian``."""
    objective, batch = mean_of(regression_loss), data()
    x, unravel = ravel_pytree(regression_params())

    def flat(x: Any) -> Any:
        return objective(unravel(x), *batch)

    derivatives, steepest = jax.jit(lambda x: (jax.grad(flat)(x), jax.hessian(flat)(x))), jnp.inf
    while steepest > 1e-9:  # convex, and from zero it converges in a few steps
        grad, hessian = derivatives(x)
        x, steepest = x - jnp.linalg.solve(hessian, grad), jnp.max(jnp.abs(grad))
    return float(flat(x))


def contestants(quick: bool) -> Iterator[Contestant]:
    """Ours, scikit-learn's, and the quasi-Newton methods of others; a quick run takes the exact Newton methods."""
    objective, args = mean_of(regression_loss), (regression_params(), *data())
    images, labels = map(np.asarray, args[1:])

    def value(params: Any) -> float:
        return float(objective(params, *args[1:]))

    def ours(method: str, **how: Any) -> Contestant:
        def solve(x: Any, *batch: Any) -> Any:
            return curvature.minimize(objective, x, batch, method=method, max_steps=MAX_STEPS, **how).x

        return Contestant(f"curvature {method}", OURS, solve, args, read=value)

    def by_sklearn(solver: str, tol: float) -> Contestant:
        """At a tolerance that reaches the same objective to 1e-9."""

        def make() -> Callable[[], Any]:
            from sklearn.linear_model import LogisticRegression

            model = LogisticRegression(C=1 / (L2 * len(images)), solver=solver, tol=tol, max_iter=10_000)
            return lambda: model.fit(images, labels)

        def read(model: Any) -> float:  # the last bias is subtracted from all of them
            weights, bias = jnp.asarray(model.coef_.T), jnp.asarray(model.intercept_)
            return value({"weights": weights, "bias": bias[:-1] - bias[-1]})

        return Contestant(f"scikit-learn {solver}", "scikit-learn", make=make, read=read)

    def by_optax(x: Any, *batch: Any) -> Any:
        return run_optax_lbfgs(objective, x, batch, FIRST_GTOL, MAX_STEPS).x

    def by_jaxopt(x: Any, *batch: Any) -> Any:
        import jaxopt

        return jaxopt.LBFGS(objective, tol=NORM_TOL, maxiter=MAX_STEPS).run(x, *batch).params

    exact = ours("newton", hessian=curvature.mean_hessian(regression_loss), gtol=GTOL)
    cholesky = by_sklearn("newton-cholesky", 1e-6)
    yield from (exact, cholesky) if quick else (
        exact, ours("l-bfgs", gtol=FIRST_GTOL), ours("trust-region", gtol=FIRST_GTOL),
        cholesky, by_sklearn("lbfgs", 1e-7),
        Contestant("optax.lbfgs", "optax", by_optax, args, read=value),
        Contestant("jaxopt LBFGS", "jaxopt", by_jaxopt, args, read=value),
    )  # fmt: skip


def gap_claim(outcome: Outcome) -> list[Claim]:
    gap = number(outcome.row("curvature newton"), "error")
    text = f"our objective is within {gap:.0e} of the least (wanted: {WANTED_GAP:.0e})" if gap is not None else ""
    return [] if gap is None else [Claim(text, gap <= WANTED_GAP)]


def findings(outcomes: Outcomes) -> list[Finding]:
    question = "Is exact Newton faster than scikit-learn at logistic regression?"
    outcome = outcomes.get(ID, Outcome())
    timed = [row for row in outcome.rows if row.status == "ok"]
    if not any(row.peer == OURS for row in timed):
        return [Finding(question, "It was not run, or ours had no right answer.")]
    timed.sort(key=lambda row: row.metrics["seconds"])
    said = [f"{row.name} {figures(1e3 * row.metrics['seconds'])} ms" for row in timed]
    others = [f"{row.name} ({row.note})" for row in outcome.rows if row.status in ("wrong", "failed")]
    answer = f"Time to within {GAP:.0e} of the least objective: {', '.join(said)}."
    return [Finding(question, answer + (f" Not there: {'; '.join(others)}." if others else ""))]


def fit_network(report: Callable[[str], Any]) -> Outcome:
    """Exact Newton in a trust region on the network; the claim about it."""
    report("trust-exact")
    hessian = curvature.mean_hessian(network_loss)
    how: dict[str, Any] = {"method": "trust-exact", "gtol": WANTED_GRADIENT, "hessian": hessian}
    result = curvature.minimize(mean_of(network_loss), network_params(HIDDEN), data(), **how)
    steepest = float(largest(result.grad))
    text = f"network: max|grad| {steepest:.0e} (wanted: {WANTED_GRADIENT:.0e}). {result.message}"
    rows = [Row("curvature trust-exact", OURS, metrics={"steps": int(result.num_steps), "max|grad|": steepest})]
    return Outcome(rows=rows, claims=[Claim(text, bool(result.success) and steepest <= WANTED_GRADIENT)])


if __name__ == "__main__":
    from benchmarks import session  # which imports the suites, and they this module

    study = Study("digits/network", "64-16-10 network, 1,210 parameters", "digits", fit_network)
    sys.exit(session.alone([*cases(Choice()), study]))
