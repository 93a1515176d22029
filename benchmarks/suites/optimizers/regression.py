"""Softmax regression on handwritten digits: the time to the same objective, against scikit-learn and others."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import curvature
from benchmarks import peers
from benchmarks.cases import OURS, Case, Choice, Claim, Contestant, Finding, Outcome, Plot, Race
from benchmarks.suites.optimizers.solvers import run_optax_lbfgs
from benchmarks.timing import digits as figures

ID = "optimizers/digits/regression"
GAP = 1e-8  # in the objective, relative: what every solver here reaches
FIRST_GTOL = 1e-7  # where the methods of first order are within that gap
NORM_TOL = 1e-6  # of jaxopt, which tests the Euclidean norm: a smaller one it does not reach
MAX_STEPS = 1000


def cases(choice: Choice) -> Iterator[Case]:
    """One race; none without scikit-learn, whose images it takes."""
    if peers.is_installed("scikit-learn"):
        yield Race(
            ID, "Softmax regression, 1,797 digits, 649 parameters", "digits",
            functools.partial(contestants, choice.quick), minimum, GAP, {"n": 649, "batch": 1797},
            budget=0.5 if choice.quick else 6.0, rounds=2 if choice.quick else 5, claims=claims,
            caption=f"Every solver is run to a tolerance at which its objective is within {GAP:.0e} of the minimum, "
            "relative; that is the answer which is checked. The minimum is that of plain Newton steps.",
        )  # fmt: skip


def problem() -> tuple[Callable[..., jax.Array], Any, tuple[np.ndarray, np.ndarray]]:
    """The objective, the start, and the images with their labels."""
    from sklearn.datasets import load_digits

    from benchmarks import digits

    images, labels = load_digits(return_X_y=True)
    start = {"weights": jnp.zeros((64, digits.CLASSES)), "bias": jnp.zeros(digits.CLASSES - 1)}
    return digits.mean_of(digits.regression_loss), start, (images / 16, labels)


def minimum() -> float:
    """By plain Newton steps, with a Hessian from ``jax.hessian``."""
    objective, start, data = problem()
    x, unravel = ravel_pytree(start)
    derivatives = jax.jit(lambda x, *data: [d(lambda x: objective(unravel(x), *data))(x)
                                            for d in (jax.grad, jax.hessian)])  # fmt: skip
    largest = jnp.inf
    while largest > 1e-9:  # convex, and from zero it converges in a few steps
        grad, hessian = derivatives(x, *map(jnp.asarray, data))
        x, largest = x - jnp.linalg.solve(hessian, grad), jnp.max(jnp.abs(grad))
    return float(objective(unravel(x), *map(jnp.asarray, data)))


def contestants(quick: bool) -> Iterator[Contestant]:
    """Ours, scikit-learn's, and the quasi-Newton methods of others."""
    from benchmarks import digits

    objective, start, arrays = problem()
    data = tuple(map(jnp.asarray, arrays))

    def value(params: Any) -> float:
        return float(objective(params, *data))

    def ours(**how: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(
            curvature.minimize(objective, start, data, max_steps=MAX_STEPS, **how).x
        )  # fmt: skip

    hessian = curvature.mean_hessian(digits.regression_loss)
    newton = functools.partial(ours, method="newton", hessian=hessian, gtol=digits.GTOL)
    yield Contestant("curvature newton", "curvature", make=newton, read=value)
    if not quick:
        lbfgs = functools.partial(ours, method="l-bfgs", gtol=FIRST_GTOL)
        yield Contestant("curvature l-bfgs", "curvature", make=lbfgs, read=value)
        krylov = functools.partial(ours, method="trust-region", gtol=FIRST_GTOL)
        yield Contestant("curvature trust-region", "curvature", make=krylov, read=value)
    for name, call in digits.peers(*arrays).items():
        if quick and not name.endswith("newton-cholesky"):
            continue
        yield Contestant(
            name, "scikit-learn", make=functools.partial(lambda c: c, call), read=lambda m: value(_params(m))
        )
    if not quick:
        yield Contestant("optax.lbfgs", "optax", make=functools.partial(_optax, objective, start, data), read=value)
        yield Contestant("jaxopt LBFGS", "jaxopt", make=functools.partial(_jaxopt, objective, start, data), read=value)


def _params(model: Any) -> Any:
    """What scikit-learn has fitted, with the last bias taken off all of them."""
    weights, bias = jnp.asarray(model.coef_.T), jnp.asarray(model.intercept_)
    return {"weights": weights, "bias": bias[:-1] - bias[-1]}


def _optax(objective: Any, start: Any, data: Any) -> Callable[[], Any]:
    run = jax.jit(lambda x, data: run_optax_lbfgs(objective, x, data, FIRST_GTOL, MAX_STEPS)[0])
    return lambda: jax.block_until_ready(run(start, data))


def _jaxopt(objective: Any, start: Any, data: Any) -> Callable[[], Any]:
    import jaxopt

    solver = jaxopt.LBFGS(objective, tol=NORM_TOL, maxiter=MAX_STEPS)
    run = jax.jit(lambda x, data: solver.run(x, *data).params)
    return lambda: jax.block_until_ready(run(start, data))


def claims(outcome: Outcome) -> list[Claim]:
    """The share of scikit-learn's times that ours takes."""
    from benchmarks import digits

    ours = outcome.row("curvature newton")
    if ours is None:
        return []
    shares = {
        row.name: ours.metrics["seconds"] / row.metrics["seconds"]
        for row in outcome.rows
        if row.peer == "scikit-learn" and row.status == "ok"
    }
    return [
        Claim(f"{figures(share)} of the time of {name} (wanted: {digits.WANTED_SHARE})", share <= digits.WANTED_SHARE)
        for name, share in shares.items()
    ]


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """None: the table says it."""
    return []


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """Who reaches the minimum first."""
    question = "Is exact Newton faster than scikit-learn at logistic regression?"
    outcome = outcomes.get(ID)
    timed = [] if outcome is None else [row for row in outcome.rows if row.status == "ok"]
    if not any(row.peer == OURS for row in timed):
        return [Finding(question, "It was not run, or ours had no right answer.", [])]
    told = [f"{row.name} {figures(1e3 * row.metrics['seconds'])} ms"
            for row in sorted(timed, key=lambda row: row.metrics["seconds"])]  # fmt: skip
    answer = f"Time to within {GAP:.0e} of the least objective: {', '.join(told)}."
    others = [f"{row.name} ({row.note})" for row in outcome.rows if row.status in ("wrong", "failed")]
    return [Finding(question, answer + (f" Not there: {'; '.join(others)}." if others else ""), [ID])]
