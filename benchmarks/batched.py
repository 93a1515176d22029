"""Many small problems at once: ``python -m benchmarks.batched``.

A thousand ten-dimensional Rosenbrock problems from random starts, double precision: ``minimize_batched`` and
``jax.vmap`` of ``minimize`` against a loop over SciPy, whose methods get compiled functions. Then a batch of which a
tenth needs ten times the steps of the others.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from rich.console import Console

import curvature
from benchmarks.timing import Row, console, digits, measure, share, table

LANES, SIZE = 1000, 10
SCIPY_LANES = 50  # of the same starts; the loop takes as long for each
METHOD = "newton-cg"  # without the eigendecompositions that take most of the time of a trust region in a batch
COSTLY = "trust-region"  # whose steps take long enough that it pays to leave lanes out
WANTED_SPEEDUP = 50  # over the fastest of SciPy's methods
WANTED_GAIN = 1.3  # of minimize_batched over vmap when a tenth needs ten times the steps
VMAP, BATCHED = "jax.vmap(minimize)", "minimize_batched"


def rosenbrock(x: jax.Array) -> jax.Array:
    """The chained function."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def starts(spread: np.ndarray) -> jax.Array:
    """Random starts, one for each entry of ``spread``, around the minimizer."""
    return jnp.asarray(1 + spread[:, None] * np.random.default_rng(0).uniform(-1, 1, (len(spread), SIZE)))


def ours(x0: jax.Array, method: str) -> dict[str, Callable[[], Any]]:
    """Both of our ways, warm."""
    mapped = jax.jit(jax.vmap(functools.partial(curvature.minimize, rosenbrock, method=method)))
    ways = {
        VMAP: lambda: mapped(x0),
        BATCHED: lambda: curvature.minimize_batched(rosenbrock, x0, method=method),
    }
    for way in ways.values():
        jax.block_until_ready(way())  # compiles
    return ways


def scipy_loops(x0: np.ndarray) -> dict[str, Callable[[], Any]]:
    """A solve for each start by each of SciPy's comparable methods, on compiled functions, to the same tolerance."""
    value_and_grad, hessian = jax.jit(jax.value_and_grad(rosenbrock)), jax.jit(jax.hessian(rosenbrock))
    product = jax.jit(functools.partial(curvature.hvp, rosenbrock))
    gtol = float(np.sqrt(np.finfo(np.float64).eps))

    def fun(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = value_and_grad(x)
        return float(value), np.asarray(grad)

    def loop(method: str, **how: Any) -> list[Any]:
        return [scipy.optimize.minimize(fun, x, jac=True, method=method, **how) for x in x0]

    def product_at(x: np.ndarray, v: np.ndarray) -> np.ndarray:
        return np.asarray(product(x, v))

    options = {"gtol": gtol, "maxiter": 1000}
    how = {
        "trust-exact": {"hess": lambda x: np.asarray(hessian(x)), "options": options},
        "trust-ncg": {"hessp": product_at, "options": options},
        "BFGS": {"options": options},
    }
    return {f"SciPy {method}, a loop": functools.partial(loop, method, **how[method]) for method in how}


def bench(
    screen: Console, title: str, x0: jax.Array, method: str, peers: Mapping[str, Callable[[], Any]]
) -> dict[str, Row]:
    """Time one batch, and print the table."""
    contestants = {**ours(x0, method), **peers}
    with screen.status(title) as status:
        rows = measure(contestants, budget=3.0, rounds=3, report=lambda line: status.update(f"{title}: {line}"))
        scale = len(x0) / SCIPY_LANES
        rows = {name: share(row, 1 / scale) if name in peers else row for name, row in rows.items()}
        result = contestants[BATCHED]()
    steps = np.asarray(result.num_steps)
    caption = (
        f"{int(result.success.sum())} of {len(x0)} converged; steps {steps.min()} to {steps.max()}, median "
        f"{digits(float(np.median(steps)))}. SciPy's times are those of {SCIPY_LANES} starts, times {scale:g}."
    )
    screen.print(table(title, rows.values(), rows[BATCHED], caption if peers else caption.partition(" SciPy")[0]))
    screen.print()
    return rows


def main() -> None:
    """Run it all."""
    jax.config.update("jax_enable_x64", True)
    screen = console()
    screen.print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; float64; medians.\n")
    x0 = starts(np.full(LANES, 3.0))
    rows = bench(
        screen, f"{LANES:,} Rosenbrock problems in {SIZE} dimensions, {METHOD}", x0, METHOD,
        scipy_loops(np.asarray(x0)[:SCIPY_LANES]),
    )  # fmt: skip
    converged = bool(curvature.minimize_batched(rosenbrock, x0, method=METHOD).success.all())
    uneven = starts(np.where(np.arange(LANES) % 10 == 0, 3.0, 0.02))
    slow = bench(screen, f"Nine tenths of them start next to the minimizer, {COSTLY}", uneven, COSTLY, {})
    screen.print("The claims, as measured in this run (other work on the machine moves them):")
    for line in verdicts(rows, converged, slow):
        screen.print(line, soft_wrap=True)


def verdicts(rows: Mapping[str, Row], converged: bool, uneven: Mapping[str, Row]) -> list[str]:
    """Each claim, with what was measured of it."""
    claims = [(converged, f"all of {LANES:,} converged")]
    peer = min((row for row in rows.values() if row.name.startswith("SciPy")), key=lambda row: row.seconds)
    speedup = peer.seconds / rows[BATCHED].seconds
    claims.append((speedup >= WANTED_SPEEDUP, f"{speedup:.0f} times as fast as {peer.name} (wanted: {WANTED_SPEEDUP})"))
    gain = uneven[VMAP].seconds / uneven[BATCHED].seconds
    claims.append((gain >= WANTED_GAIN, f"{gain:.1f} times as fast as vmap when uneven (wanted: {WANTED_GAIN})"))
    return [f"{'holds' if holds else 'FAILS'}  {claim}" for holds, claim in claims]


if __name__ == "__main__":
    main()
