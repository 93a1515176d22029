"""Several minimizers on one objective to one tolerance: ours, optax's and SciPy's."""

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize
from jax.flatten_util import ravel_pytree
from rich.console import Console
from rich.table import Table

import curvature
from benchmarks import timing

MAX_STEPS = 1000

Data = tuple[jax.Array, ...]
Loss = Callable[..., jax.Array]
Curve = list[tuple[float, float]]  # the seconds and the objective after some number of steps


@dataclass(frozen=True)
class Solver:
    """One way to fit, compiled: ``run(max_steps)``, and the seconds that compiling took."""

    run: Callable[[int], Any]
    compile_seconds: float


class Fit(NamedTuple):
    """Where a solver ended."""

    steps: int
    value: float
    grad_norm: float
    converged: bool


def our_solver(loss: Loss, x0: Any, data: Data, gtol: float, method: Any) -> Solver:
    """``minimize`` with any method, ours or optax's: one compiled program, whatever the number of steps."""

    def fit(max_steps: jax.Array, x0: Any, *data: jax.Array) -> curvature.MinimizeResult:
        return curvature.minimize(loss, x0, data, method=method, gtol=gtol, max_steps=max_steps)

    start = time.perf_counter()
    compiled = jax.jit(fit).lower(MAX_STEPS, x0, *data).compile()
    seconds = time.perf_counter() - start
    return Solver(lambda max_steps: jax.block_until_ready(compiled(max_steps, x0, *data)), seconds)


def scipy_solvers(loss: Loss, x0: Any, data: Data, gtol: float) -> dict[str, Solver]:
    """SciPy's methods on the same functions, compiled and warm."""
    start, unravel = ravel_pytree(x0)
    start = np.asarray(start)

    def flat_loss(vector: jax.Array, *data: jax.Array) -> jax.Array:
        return loss(unravel(vector), *data)

    value_and_grad = jax.jit(jax.value_and_grad(flat_loss))
    product = jax.jit(functools.partial(curvature.hvp, flat_loss))
    begin = time.perf_counter()
    jax.block_until_ready(value_and_grad(start, *data))
    first_order = time.perf_counter() - begin
    jax.block_until_ready(product(start, start, *data))
    second_order = time.perf_counter() - begin
    minimize = functools.partial(scipy.optimize.minimize, value_and_grad, start, data, jac=True)

    def trust_ncg(max_steps: int) -> Any:
        options = {"gtol": gtol, "maxiter": max_steps}
        return minimize(method="trust-ncg", hessp=lambda x, v, *data: np.asarray(product(x, v, *data)), options=options)

    def l_bfgs_b(max_steps: int) -> Any:
        options = {"gtol": gtol, "ftol": 0.0, "maxcor": 10, "maxiter": max_steps}  # as many pairs as optax keeps
        return minimize(method="L-BFGS-B", options=options)

    return {"SciPy trust-ncg": Solver(trust_ncg, second_order), "SciPy L-BFGS-B": Solver(l_bfgs_b, first_order)}


def summarize(result: Any) -> Fit:
    """Our result or SciPy's."""
    if isinstance(result, curvature.MinimizeResult):
        largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(result.grad))
        return Fit(int(result.num_steps), float(result.value), largest, bool(result.success))
    return Fit(result.nit, float(result.fun), float(np.max(np.abs(result.jac))), bool(result.success))


def trace_curve(solver: Solver, steps: int) -> Curve:
    """Seconds and objective on the way, each point by runs of its own: no callback slows them down.

    A longer run contains the shorter ones, so where the machine was busy the time of the longer one stands for both.
    """
    stops = range(1, steps + 1) if steps <= 20 else sorted({round(k) for k in np.geomspace(1, steps, 30)})
    seconds, results = zip(*(fastest_run(solver, max_steps) for max_steps in stops), strict=True)
    seconds = np.minimum.accumulate(seconds[::-1])[::-1]
    return [(float(end), summarize(result).value) for end, result in zip(seconds, results, strict=True)]


def fastest_run(solver: Solver, max_steps: int) -> tuple[float, Any]:
    """Seconds and result of the fastest of up to five runs; one is enough if it is long."""
    runs: list[tuple[float, Any]] = []
    while sum(seconds for seconds, _ in runs) < 0.2 and len(runs) < 5:
        start = time.perf_counter()
        result = solver.run(max_steps)
        runs.append((time.perf_counter() - start, result))
    return min(runs, key=lambda run: run[0])


def compare_methods(
    screen: Console, loss: Loss, x0: Any, data: Data, gtol: float
) -> tuple[dict[str, Fit], dict[str, Curve]]:
    """Every method to the same gradient tolerance, timed in turns; then the way of each to its end."""
    title = "All methods to the same gradient tolerance"
    screen.print(f"{title}: measuring ...", style="dim")
    with screen.status(title) as status:
        methods = {name: name for name in ("trust-region", "trust-exact", "newton")} | {"optax.lbfgs": optax.lbfgs()}
        solvers = {}
        for name in methods:
            status.update(f"{title}: compiling {name}")
            solvers[name] = our_solver(loss, x0, data, gtol, methods[name])
        solvers |= scipy_solvers(loss, x0, data, gtol)
        calls = {name: functools.partial(solver.run, MAX_STEPS) for name, solver in solvers.items()}
        rows = timing.measure(calls, budget=1.0, report=lambda line: status.update(f"{title}: {line}"))
        fits, curves = {}, {}
        for name, solver in solvers.items():
            status.update(f"{title}: following {name}")
            fits[name] = summarize(solver.run(MAX_STEPS))
            curves[name] = trace_curve(solver, fits[name].steps)
    rows = {name: replace(row, compile_seconds=solvers[name].compile_seconds) for name, row in rows.items()}
    screen.print(method_table(title, rows, fits, gtol))
    screen.print()
    return fits, curves


def method_table(title: str, rows: Mapping[str, timing.Timing], fits: Mapping[str, Fit], gtol: float) -> Table:
    """What each method took, and where it ended."""
    best = min(fit.value for fit in fits.values())
    caption = (
        f"Converged: no entry of the gradient above {gtol:.0e}; SciPy's trust-ncg tests the 2-norm, which asks for "
        "more. Excess: objective above the lowest of them all. SciPy calls compiled functions from Python; the others "
        "are one compiled loop."
    )
    columns = ("", "steps", "ms", "quartiles", "compile\ns", "excess", "max|grad|", "converged")
    result = timing.plain_table(title, columns, caption)
    for name, fit in fits.items():
        row = rows[name]
        spread = " - ".join(timing.digits(1e3 * seconds) for seconds in row.spread)
        times = [timing.digits(1e3 * row.seconds), spread, timing.digits(row.compile_seconds or 0.0)]
        end = [f"{fit.value - best:.0e}", f"{fit.grad_norm:.0e}", "yes" if fit.converged else "NO"]
        result.add_row(name, str(fit.steps), *times, *end)
    return result
