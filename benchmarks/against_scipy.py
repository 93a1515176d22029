"""Warm ``minimize`` against SciPy's method of the same name, on the same compiled functions.

``python -m benchmarks.against_scipy --pairs trust-exact/trust-exact --seconds 170`` needs sif2jax. The problems are
those of CUTEst without constraints, of at most 50 variables, in double precision. SciPy is handed jitted functions of
flat vectors as they are: value and gradient in one, a Hessian product, or the Hessian. Both sides end at the same
tolerance of the gradient, as far as SciPy's method tests one. They take turns on each problem, so that a machine that
is busy for a while is busy for both, and each counts by its median. On a busy machine the fastest turns say more, since
what waits for a core is not the solve; their ratio stands beside.
"""

import argparse
import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

import curvature
from benchmarks.cutest import load_problems
from benchmarks.timing import measure

PAIRS = (
    "trust-exact/trust-exact",
    "trust-region/trust-ncg",
    "trust-region/trust-krylov",
    "bfgs/BFGS",
    "l-bfgs/L-BFGS-B",
    "newton-cg/Newton-CG",
)
GTOL = 1e-5
MAX_STEPS = 1000
WANTED = 20  # times as fast
BUDGET = 0.25  # seconds for each side of a problem, in all its turns


class PeerError(Exception):
    """SciPy raised instead of returning a result."""


class Duel(NamedTuple):
    """One problem solved by both, warm; ``solved`` is whether both ended at the best known value."""

    name: str
    n: int
    ours: float
    theirs: float
    fastest: tuple[float, float]
    compilation: float
    our_steps: int
    their_steps: int
    solved: bool

    @property
    def ratio(self) -> float:
        """How many times as fast."""
        return self.theirs / self.ours

    @property
    def ratio_of_fastest(self) -> float:
        """The same of the fastest turns."""
        ours, theirs = self.fastest
        return theirs / ours


def main() -> None:
    """Each pair in its own turn; those of methods that do not exist are skipped with a line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS))
    parser.add_argument("--seconds", type=float, default=170.0, help="for each pair, after which no problem is begun")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-n", type=int, default=50)
    parser.add_argument("--all", action="store_true", help="print every problem")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    problems = load_problems(options.max_n)
    random.Random(0).shuffle(problems)  # so that a run that is cut short has a fair sample
    print(f"{len(problems)} problems, jax {jax.__version__}, scipy {scipy.__version__}, gradient to {GTOL}")
    for pair in options.pairs:
        ours, theirs = pair.split("/")
        if not exists(ours):
            print(f"{pair:28} skipped: minimize has no method {ours!r}")
            continue
        duels = []
        for duel in fight(ours, theirs, problems, options.seconds, options.rounds):
            duels.append(duel)
            if options.all:
                print(line(duel), flush=True)
        print(summary(pair, duels, len(problems)), flush=True)


def exists(method: str) -> bool:
    """Whether ``minimize`` knows the method."""
    try:
        curvature.minimize(lambda x: jnp.sum(x**2), jnp.ones(2), method=method)
    except ValueError as error:
        if "is unknown" in str(error):
            return False
        raise
    return True


def fight(ours: str, theirs: str, problems: list[Any], seconds: float, rounds: int) -> Iterator[Duel]:
    """The problems one after the other, until the time is up."""
    end = time.perf_counter() + seconds
    for name, problem, best in problems:
        if time.perf_counter() > end:
            return
        try:
            yield duel(name, problem, best, ours, theirs, rounds)
        except PeerError as failure:
            print(f"  {name:12} not solved by SciPy, which raised {failure}", flush=True)


def duel(name: str, problem: Any, best: float | None, ours: str, theirs: str, rounds: int) -> Duel:
    """Warm both up, then let them take turns."""
    x0, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem.y0))
    args = problem.args

    def fun(x: jax.Array, args: Any) -> jax.Array:
        return problem.objective(unravel(x), args)

    def solve() -> Any:
        return jax.block_until_ready(curvature.minimize(fun, x0, (args,), method=ours, gtol=GTOL, max_steps=MAX_STEPS))

    solve_by_scipy = scipy_call(fun, np.asarray(x0), args, theirs)
    compilation, result = clock(solve)
    peer = solve_by_scipy()
    rows = measure({"ours": solve, "theirs": solve_by_scipy}, budget=BUDGET, rounds=rounds)
    values = float(result.value), float(peer.fun)
    solved = best is not None and all(value - best <= 1e-6 * max(1, abs(best)) for value in values)
    return Duel(
        name, x0.size, rows["ours"].seconds, rows["theirs"].seconds, (rows["ours"].spread[0], rows["theirs"].spread[0]),
        compilation, int(result.num_steps), int(peer.nit), solved,
    )  # fmt: skip


def scipy_call(fun: Callable[..., Any], x0: np.ndarray, args: Any, method: str) -> Callable[[], Any]:
    """SciPy's solve, with the jitted functions that its method takes and nothing else between them."""
    value_and_grad = jax.jit(jax.value_and_grad(fun))
    product = jax.jit(lambda x, v: jax.jvp(lambda x: jax.grad(fun)(x, args), (x,), (v,))[1])
    matrix = jax.jit(jax.hessian(fun))

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = value_and_grad(x, args)
        return float(value), np.array(grad)

    derivatives: dict[str, Any] = {}
    if method in ("trust-ncg", "trust-krylov", "Newton-CG"):
        derivatives["hessp"] = lambda x, v: np.asarray(product(x, v))
    elif method == "trust-exact":
        derivatives["hess"] = lambda x: np.array(matrix(x, args))
    options = {"maxiter": MAX_STEPS, **({} if method == "Newton-CG" else {"gtol": GTOL})}

    def call() -> Any:
        with np.errstate(all="ignore"), failures_named():
            return scipy.optimize.minimize(objective, x0, jac=True, method=method, options=options, **derivatives)

    return call


@contextlib.contextmanager
def failures_named() -> Iterator[None]:
    """What SciPy raises, at a NaN for one, is the end of its solve and not of the benchmark."""
    try:
        yield
    except (ValueError, np.linalg.LinAlgError) as error:
        raise PeerError(f"{type(error).__name__}: {error}") from error


def clock(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def line(duel: Duel) -> str:
    """One problem."""
    return (
        f"  {duel.name:12} n {duel.n:3}  {1e3 * duel.ours:9.3f} ms in {duel.our_steps:4} steps  SciPy "
        f"{1e3 * duel.theirs:9.2f} ms in {duel.their_steps:4}  {duel.ratio:7.1f} times, fastest "
        f"{duel.ratio_of_fastest:.1f}  cold {duel.compilation:.2f} s"
        f"{'' if duel.solved else '  not solved by both'}"
    )


def summary(pair: str, duels: list[Duel], total: int) -> str:
    """The median ratio with its quartiles, over the problems that both solved, and the share that reaches the mark."""
    solved = [duel.ratio for duel in duels if duel.solved]
    if len(solved) < 2:
        return f"{pair:28} solved by both: {len(solved)} of {len(duels)}; no median"
    low, middle, high = np.quantile(solved, (0.25, 0.5, 0.75))
    fastest = statistics.median(duel.ratio_of_fastest for duel in duels if duel.solved)
    everywhere = statistics.median(duel.ratio for duel in duels)
    cold = statistics.median(duel.compilation for duel in duels)
    return (
        f"{pair:28} {middle:.0f} times as fast (quartiles {low:.0f} - {high:.0f}, least {min(solved):.1f}; "
        f"fastest turns {fastest:.0f}) on the {len(solved)} problems that both solved, "
        f"{np.mean(np.array(solved) >= WANTED):.0%} of them at least {WANTED} times; "
        f"{everywhere:.0f} on all {len(duels)} of {total} tried; cold {cold:.2f} s"
    )


if __name__ == "__main__":
    main()
