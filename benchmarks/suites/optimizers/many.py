"""A thousand small problems at once, against a loop over SciPy and against other solvers under ``vmap``."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks import batched
from benchmarks.cases import Case, Choice, Claim, Contestant, Finding, Outcome, Plot, Race
from benchmarks.suites.optimizers.solvers import run_optax_lbfgs
from benchmarks.timing import digits

ROSENBROCKS, UNEVEN = "optimizers/batched/rosenbrock", "optimizers/batched/uneven"
GTOL = float(np.finfo(np.float64).eps ** 0.5)  # the default of minimize
STATIONARY = 1e-4  # SciPy's BFGS stops short where its line search finds no descent
MAX_STEPS = 1000
ALIKE = ("bfgs", "l-bfgs")  # those of ours that the peers have too


def cases(choice: Choice) -> Iterator[Case]:
    """The batch from random starts, and one of which a tenth needs many more steps than the others."""
    lanes = 200 if choice.quick else batched.LANES
    sample = 10 if choice.quick else batched.SCIPY_LANES
    how = {"budget": 0.5 if choice.quick else 3.0, "rounds": 3}
    even = np.full(lanes, 3.0)
    yield Race(
        ROSENBROCKS, f"{lanes:,} Rosenbrock problems in {batched.SIZE} dimensions; {batched.METHOD}", "rosenbrock",
        functools.partial(contestants, even, sample, choice.quick), lambda: 0.0, STATIONARY,
        {"n": batched.SIZE, "lanes": lanes}, claims=speedup,
        caption=f"Seconds for each problem. SciPy solves {sample} of the {lanes:,}, one after the other. An answer is "
        "right where the largest entry of all gradients is small; the problem has minima in two places.", **how,
    )  # fmt: skip
    if not choice.quick:
        uneven = np.where(np.arange(lanes) % 10 == 0, 3.0, 0.02)
        yield Race(
            UNEVEN, f"The same, and nine tenths start next to the minimizer; {batched.COSTLY}", "rosenbrock",
            functools.partial(both_of_ours, uneven, batched.COSTLY), lambda: 0.0, STATIONARY,
            {"n": batched.SIZE, "lanes": lanes}, claims=gain,
            caption="vmap runs every lane until the slowest is done; minimize_batched sorts out those that are.", **how,
        )  # fmt: skip


def both_of_ours(spread: np.ndarray, method: str) -> Iterator[Contestant]:
    """``minimize_batched``, and ``vmap`` of ``minimize``."""
    x0 = batched.starts(spread)
    for name in (batched.BATCHED, batched.VMAP):
        make = functools.partial(_one_of_ours, name, x0, method)
        yield Contestant(f"curvature {name}", "curvature", make=make, read=steepest, pieces=len(spread))


def contestants(spread: np.ndarray, sample: int, quick: bool) -> Iterator[Contestant]:
    """Ours, SciPy's loops over a sample, and the solvers of others under ``vmap``.

    A quick run leaves ``minimize_batched`` out, which compiles a program for each of several sizes of the batch.
    """
    yield from (c for c in both_of_ours(spread, batched.METHOD) if not quick or c.name == f"curvature {batched.VMAP}")
    x0 = batched.starts(spread)
    lanes = len(spread)
    for name in ("trust-exact", "BFGS") if quick else ("trust-exact", "trust-ncg", "BFGS"):
        key = f"SciPy {name}, a loop"
        make = functools.partial(_one_of_scipy, key, x0, sample)
        yield Contestant(key, "scipy", make=make, read=steepest, pieces=sample)
    ways: dict[str, tuple[str, Callable[[], Callable[[jax.Array], Any]]]] = {
        "optax.lbfgs under vmap": (
            "optax",
            lambda: lambda x: run_optax_lbfgs(batched.rosenbrock, x, (), GTOL, MAX_STEPS)[0],
        ),
        "optimistix BFGS under vmap": ("optimistix", _optimistix),
    }
    if not quick:
        ways["jaxopt BFGS under vmap"] = ("jaxopt", _jaxopt)
        ways |= {f"curvature {method} under vmap": ("curvature", functools.partial(_ours, method)) for method in ALIKE}
    for name, (peer, way) in ways.items():
        make = functools.partial(_mapped, way, x0)
        yield Contestant(name, peer, make=make, read=steepest, pieces=lanes)


def _one_of_ours(name: str, x0: jax.Array, method: str) -> Callable[[], Any]:
    call = batched.ours(x0, method)[name]
    return lambda: jax.block_until_ready(call().x)


def _one_of_scipy(name: str, x0: jax.Array, sample: int) -> Callable[[], Any]:
    loop = batched.scipy_loops(np.asarray(x0)[:sample])[name]
    return lambda: np.stack([result.x for result in loop()])


def _mapped(way: Callable[[], Callable[[jax.Array], Any]], x0: jax.Array) -> Callable[[], Any]:
    run = jax.jit(jax.vmap(way()))
    return lambda: jax.block_until_ready(run(x0))


def _ours(method: str) -> Callable[[jax.Array], Any]:
    return lambda x: curvature.minimize(batched.rosenbrock, x, method=method).x


def _optimistix() -> Callable[[jax.Array], Any]:
    import optimistix

    solver = optimistix.BFGS(rtol=GTOL, atol=GTOL)

    def solve(x: jax.Array) -> jax.Array:
        return optimistix.minimise(
            lambda x, _: batched.rosenbrock(x), solver, x, max_steps=MAX_STEPS, throw=False
        ).value  # fmt: skip

    return solve


def _jaxopt() -> Callable[[jax.Array], Any]:
    import jaxopt

    solver = jaxopt.BFGS(batched.rosenbrock, tol=GTOL, maxiter=MAX_STEPS)
    return lambda x: solver.run(x).params


def steepest(points: Any) -> float:
    """The largest entry of all gradients, computed anew."""
    return float(jnp.max(jnp.abs(jax.jit(jax.vmap(jax.grad(batched.rosenbrock)))(jnp.asarray(points)))))


def _seconds(outcome: Outcome, name: str) -> Any:
    row = outcome.row(name)
    return None if row is None else row.metrics.get("seconds")


def _fastest(outcome: Outcome, peer: str) -> Any:
    """The least time of a library's ways; None if none was right."""
    return min(
        (row.metrics["seconds"] for row in outcome.rows if row.peer == peer and row.status == "ok"), default=None
    )


def speedup(outcome: Outcome) -> list[Claim]:
    """Of the fastest of ours over the fastest of SciPy's methods."""
    ours, theirs = _fastest(outcome, "curvature"), _fastest(outcome, "scipy")
    if ours is None or theirs is None:
        return []
    factor = theirs / ours
    text = f"{factor:.0f} times as fast as the fastest of SciPy's loops (wanted: {batched.WANTED_SPEEDUP})"
    return [Claim(text, factor >= batched.WANTED_SPEEDUP)]


def gain(outcome: Outcome) -> list[Claim]:
    """Of ``minimize_batched`` over ``vmap``."""
    times = [_seconds(outcome, f"curvature {name}") for name in (batched.VMAP, batched.BATCHED)]
    if None in times:
        return []
    factor = times[0] / times[1]
    text = f"{factor:.1f} times as fast as vmap when uneven (wanted: {batched.WANTED_GAIN})"
    return [Claim(text, factor >= batched.WANTED_GAIN)]


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """None: the tables say it."""
    return []


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """How the ways compare, slowest first."""
    outcome = outcomes.get(ROSENBROCKS)
    if outcome is None or not outcome.rows:
        return [Finding("What does a batch of small problems gain?", "It was not run.", [])]
    ours = _fastest(outcome, "curvature")
    timed = [(row.metrics["seconds"], row.name) for row in outcome.rows if row.status == "ok"]
    told = [f"{name} {digits(1e6 * seconds)} µs" for seconds, name in sorted(timed)]
    wrong = [f"{row.name} ({row.note})" for row in outcome.rows if row.status not in ("ok", "absent")]
    ahead = [name for seconds, name in timed if ours is not None and seconds < 0.95 * ours and "curvature" not in name]
    answer = f"For each of {outcome.sizes['lanes']:,.0f} problems: {', '.join(told)}."
    answer += f" Faster than the fastest of ours: {', '.join(ahead)}." if ahead else " Nobody is faster than ours."
    answer += f" Not right, and not timed: {'; '.join(wrong)}." if wrong else ""
    return [Finding("What does a batch of small problems gain?", answer, [ROSENBROCKS])]
