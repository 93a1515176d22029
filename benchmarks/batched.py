"""Many small problems at once: ``python -m benchmarks.batched``.

A thousand ten-dimensional Rosenbrock problems from random starts, double precision: ``minimize_batched`` and
``jax.vmap`` of ``minimize`` against a loop over SciPy, whose methods get compiled functions, and against the solvers of
others under ``vmap``. Then a batch of which a tenth needs ten times the steps of the others.
"""

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import OURS, Case, Choice, Contestant, Finding, Outcomes, Race
from benchmarks.reading import fastest, number
from benchmarks.solvers import MAX_STEPS, rosenbrock, run_optax_lbfgs, scipy_solver
from benchmarks.timing import digits

LANES, SIZE = 1000, 10
SCIPY_LANES = 50  # of the same starts; the loop takes as long for each
METHOD = "newton-cg"  # without the eigendecompositions that take most of the time of a trust region in a batch
COSTLY = "trust-region"  # whose steps take long enough that it pays to leave lanes out
VMAP, BATCHED = "curvature jax.vmap(minimize)", "curvature minimize_batched"
ROSENBROCKS, UNEVEN = "optimizers/batched/rosenbrock", "optimizers/batched/uneven"
GTOL = float(np.finfo(np.float64).eps ** 0.5)  # the default of minimize
STATIONARY = 1e-4  # SciPy's BFGS stops short where its line search finds no descent
QUESTION = "What does a batch of small problems gain?"


def starts(spread: np.ndarray) -> jax.Array:
    """Random starts, one for each entry of ``spread``, around the minimizer."""
    return jnp.asarray(1 + spread[:, None] * np.random.default_rng(0).uniform(-1, 1, (len(spread), SIZE)))


def cases(choice: Choice) -> Iterator[Case]:
    lanes, sample = (200, 10) if choice.quick else (LANES, SCIPY_LANES)
    how: dict[str, Any] = {"sizes": {"n": SIZE, "lanes": lanes}, "budget": 0.5 if choice.quick else 3.0, "rounds": 3}
    yield Race(
        ROSENBROCKS, f"{lanes:,} Rosenbrock problems in {SIZE} dimensions; {METHOD}", "rosenbrock",
        partial(contestants, np.full(lanes, 3.0), sample, choice.quick), lambda: 0.0, STATIONARY,
        caption=f"Seconds for each problem. SciPy solves {sample} of the {lanes:,}, one after the other. An answer is "
        "right where the largest entry of all gradients is small; the problem has minima in two places.", **how,
    )  # fmt: skip
    if not choice.quick:
        uneven = np.where(np.arange(lanes) % 10 == 0, 3.0, 0.02)
        yield Race(
            UNEVEN, f"The same, and nine tenths start next to the minimizer; {COSTLY}", "rosenbrock",
            partial(both_of_ours, uneven, COSTLY), lambda: 0.0, STATIONARY,
            caption="vmap runs every lane until the slowest is done; minimize_batched sorts out those that are.", **how,
        )  # fmt: skip


def both_of_ours(spread: np.ndarray, method: str) -> Iterator[Contestant]:
    """``minimize_batched``, and ``vmap`` of ``minimize``; all lanes must converge."""
    x0 = starts(spread)
    mapped = jax.jit(jax.vmap(partial(curvature.minimize, rosenbrock, method=method)))
    ways = {BATCHED: partial(curvature.minimize_batched, rosenbrock, method=method), VMAP: mapped}

    def read(result: Any) -> float:
        return steepest(result.x) if bool(result.success.all()) else float("nan")

    for name, way in ways.items():
        make = lambda way=way: lambda: jax.block_until_ready(way(x0))  # noqa: E731
        yield Contestant(name, OURS, make=make, read=read, pieces=len(spread))


def contestants(spread: np.ndarray, sample: int, quick: bool) -> Iterator[Contestant]:
    """Ours, SciPy's loops over a sample, and the solvers of others under ``vmap``.

    A quick run leaves ``minimize_batched`` out, which compiles a program for each of several sizes of the batch.
    """
    yield from (c for c in both_of_ours(spread, METHOD) if not quick or c.name == VMAP)
    x0 = starts(spread)

    def loop(method: str) -> Callable[[], Any]:
        solve = scipy_solver(lambda x, _: rosenbrock(x), method, GTOL)
        return lambda: np.stack([solve(x, None).x for x in np.asarray(x0)[:sample]])

    for method in ("trust-exact", "BFGS") if quick else ("trust-exact", "trust-ncg", "BFGS"):
        name = f"SciPy {method}, a loop"
        yield Contestant(name, "scipy", make=partial(loop, method), read=steepest, pieces=sample)

    def by_optimistix(x: jax.Array) -> jax.Array:
        import optimistix

        solver = optimistix.BFGS(rtol=GTOL, atol=GTOL)
        return optimistix.minimise(lambda x, _: rosenbrock(x), solver, x, max_steps=MAX_STEPS, throw=False).value

    def by_jaxopt(x: jax.Array) -> jax.Array:
        import jaxopt

        return jaxopt.BFGS(rosenbrock, tol=GTOL, maxiter=MAX_STEPS).run(x).params

    ways: dict[str, tuple[str, Callable[[jax.Array], jax.Array]]] = {
        "optax.lbfgs": ("optax", lambda x: run_optax_lbfgs(rosenbrock, x, (), GTOL, MAX_STEPS).x),
        "optimistix BFGS": ("optimistix", by_optimistix),
    }
    if not quick:
        ways["jaxopt BFGS"] = ("jaxopt", by_jaxopt)
        for method in ("bfgs", "l-bfgs"):  # those of ours that the peers have too
            ways[f"curvature {method}"] = OURS, lambda x, how=method: curvature.minimize(rosenbrock, x, method=how).x
    for name, (peer, way) in ways.items():
        yield Contestant(f"{name} under vmap", peer, jax.vmap(way), (x0,), read=steepest, pieces=len(spread))


def steepest(points: Any) -> float:
    return float(jnp.max(jnp.abs(jax.jit(jax.vmap(jax.grad(rosenbrock)))(jnp.asarray(points)))))


def findings(outcomes: Outcomes) -> list[Finding]:
    outcome = outcomes.get(ROSENBROCKS)
    if outcome is None or not outcome.rows:
        return [Finding(QUESTION, "It was not run.")]
    ours = number(fastest(outcome, OURS), "seconds")
    timed = sorted((row.metrics["seconds"], row.name) for row in outcome.rows if row.status == "ok")
    said = [f"{name} {digits(1e6 * time)} µs" for time, name in timed]
    wrong = [f"{row.name} ({row.note})" for row in outcome.rows if row.status not in ("ok", "absent")]
    ahead = [name for time, name in timed if ours is not None and time < 0.95 * ours and "curvature" not in name]
    answer = f"For each of {outcome.sizes['lanes']:,.0f} problems: {', '.join(said)}."
    answer += f" Faster than the fastest of ours: {', '.join(ahead)}." if ahead else " Nobody is faster than ours."
    return [Finding(QUESTION, answer + (f" Not right, and not timed: {'; '.join(wrong)}." if wrong else ""))]


if __name__ == "__main__":
    from benchmarks import session  # which imports the suites, and they this module

    sys.exit(session.alone(cases(Choice())))
