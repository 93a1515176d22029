"""Minimizers of several libraries behind one interface, each driven in one compiled loop where it can be.

Those that are written in JAX are called under ``jax.jit``, so that no time goes into the checks and wrappers around a
solve. All stop by the gradient at ``GTOL``, SciPy's default, as far as they test one: in the largest entry
(``curvature``, ``optax``, SciPy's BFGS and L-BFGS-B) or in the Euclidean norm (SciPy's trust regions and ``jaxopt``).
SciPy's L-BFGS-B stops by the change of the value too, its Newton-CG by the length of the step alone, and
``optimistix`` by both of these.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.optimize

import curvature

GTOL = 1e-5
CHANGE = 1e-8  # the tolerance of optimistix, relative and absolute
MAX_STEPS = 1000

Objective = Callable[..., Any]


class Answer(NamedTuple):
    """Where a solver ended, whether it calls that a success, and its own counts; None where it does not count."""

    x: Any
    claims: Any
    steps: Any
    evaluations: Any = None


@dataclass(frozen=True)
class Solver:
    """A way to minimize.

    Attributes:
        run: ``run(fun, x0, args)`` minimizes ``fun(x, args)``, and is traced; of SciPy, it gives what is then called.
        second: whether it takes second derivatives.
        quick: whether it is in a quick run.
        counts: whether it says how often it evaluates.
    """

    name: str
    peer: str
    run: Callable[[Objective, Any, Any], Any]
    second: bool = False
    quick: bool = False
    counts: bool = True

    def build(self, fun: Objective, x0: jax.Array, args: Any) -> Callable[[], Answer]:
        """The call of a solve, which compiles when it is first made."""
        if self.peer == "scipy":
            return self.run(fun, np.asarray(x0), args)
        return compiled(partial(self.run, fun), x0, args)

    def count(self, fun: Objective, x0: jax.Array, args: Any) -> int:
        """At how many points the objective is evaluated or linearized, by a run that calls the host at each of them."""
        points: list[None] = []

        def counted(x: jax.Array, args: Any) -> Any:
            jax.debug.callback(lambda: points.append(None))
            return fun(x, args)

        self.build(counted, x0, args)()
        jax.effects_barrier()
        return len(points)


def compiled(run: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    jitted = jax.jit(run)
    return lambda: jax.block_until_ready(jitted(*args))


def largest(tree: Any) -> jax.Array:
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(tree)]))


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def ours(method: str, **options: Any) -> Solver:
    def run(fun: Objective, x0: Any, args: Any) -> Answer:
        result = curvature.minimize(fun, x0, (args,), method=method, gtol=GTOL, max_steps=MAX_STEPS)
        return Answer(result.x, result.success, result.num_steps)

    return Solver(f"curvature {method}", "curvature", run, counts=False, **options)


def scipy_solver(fun: Objective, method: str, gtol: float = GTOL) -> Callable[[np.ndarray, Any], Any]:
    """``solve(x0, args)`` by SciPy, with the jitted functions that its method takes and nothing else between them."""
    value_and_grad = jax.jit(jax.value_and_grad(fun))
    product = jax.jit(lambda x, v, args: jax.jvp(lambda x: jax.grad(fun)(x, args), (x,), (v,))[1])
    matrix = jax.jit(jax.hessian(fun))
    options = {"maxiter": MAX_STEPS, **({} if method == "Newton-CG" else {"gtol": gtol})}

    def solve(x0: np.ndarray, args: Any) -> Any:
        def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
            value, grad = value_and_grad(x, args)
            return float(value), np.array(grad)

        how: dict[str, Any] = {}
        if method in ("trust-ncg", "trust-krylov", "Newton-CG"):
            how["hessp"] = lambda x, v: np.asarray(product(x, v, args))
        elif method == "trust-exact":
            how["hess"] = lambda x: np.array(matrix(x, args))
        with np.errstate(all="ignore"):
            return scipy.optimize.minimize(objective, x0, jac=True, method=method, options=options, **how)

    return solve


def of_scipy(method: str, **options: Any) -> Solver:
    """A method of ``scipy.optimize.minimize`` on compiled functions."""

    def run(fun: Objective, x0: Any, args: Any) -> Callable[[], Answer]:
        solve = scipy_solver(fun, method)

        def call() -> Answer:
            result = solve(x0, args)
            hessians = result.nhev if method == "trust-exact" else 0  # of the others, products, which are not points
            return Answer(result.x, result.success, result.nit, result.nfev + hessians)

        return call

    return Solver(f"SciPy {method}", "scipy", run, **options)


def run_optax_lbfgs(fun: Objective, x0: Any, args: tuple[Any, ...], gtol: Any, most_steps: Any) -> Answer:
    """``optax.lbfgs`` as its manual drives it, to be compiled."""
    solver = optax.lbfgs()

    def objective(x: Any) -> jax.Array:
        return fun(x, *args)

    value_and_grad = optax.value_and_grad_from_state(objective)

    def unfinished(carry: Any) -> jax.Array:
        _, state, steps, _ = carry
        return (steps < most_steps) & ((steps == 0) | (largest(optax.tree.get(state, "grad")) > gtol))

    def step(carry: Any) -> Any:
        x, state, steps, evaluations = carry
        value, grad = value_and_grad(x, state=state)
        updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=objective)
        tried = optax.tree.get(state, "num_linesearch_steps")
        return optax.apply_updates(x, updates), state, steps + 1, evaluations + tried

    zero = jnp.asarray(0)
    x, state, steps, evaluations = jax.lax.while_loop(unfinished, step, (x0, solver.init(x0), zero, zero + 1))
    return Answer(x, largest(optax.tree.get(state, "grad")) <= gtol, steps, evaluations)


def of_optimistix(kind: str, **options: Any) -> Solver:
    """A minimizer by the name of its class; it evaluates once in each step, as its search does."""

    def run(fun: Objective, x0: Any, args: Any) -> Answer:
        import optimistix

        solver = getattr(optimistix, kind)(rtol=CHANGE, atol=CHANGE)
        found = optimistix.minimise(fun, solver, x0, args, max_steps=MAX_STEPS, throw=False)
        steps = found.stats["num_steps"]
        return Answer(found.value, found.result == optimistix.RESULTS.successful, steps, steps)

    return Solver(f"optimistix {kind}", "optimistix", run, **options)


def of_jaxopt(kind: str, **options: Any) -> Solver:
    """A minimizer by the name of its class, which counts its evaluations."""

    def run(fun: Objective, x0: Any, args: Any) -> Answer:
        import jaxopt

        x, state = getattr(jaxopt, kind)(fun, tol=GTOL, maxiter=MAX_STEPS).run(x0, args)
        return Answer(x, state.error <= GTOL, state.iter_num, state.num_fun_eval)

    return Solver(f"jaxopt {kind}", "jaxopt", run, **options)


SOLVERS = (
    ours("trust-exact", second=True, quick=True),
    ours("trust-region", second=True),
    ours("newton-cg", second=True),
    ours("cubic-newton", second=True),
    ours("bfgs", quick=True),
    ours("l-bfgs", quick=True),
    of_scipy("trust-exact", second=True, quick=True),
    of_scipy("trust-krylov", second=True),
    of_scipy("Newton-CG", second=True),
    of_scipy("BFGS", quick=True),
    of_scipy("L-BFGS-B", quick=True),
    Solver("optax.lbfgs", "optax", lambda f, x0, args: run_optax_lbfgs(f, x0, (args,), GTOL, MAX_STEPS), quick=True),
    of_optimistix("BFGS", quick=True),
    of_optimistix("LBFGS"),
    of_jaxopt("BFGS"),
    of_jaxopt("LBFGS", quick=True),
)
# Ours, and SciPy's method of the same name, or what it calls the same.
PAIRS = {
    "curvature trust-exact": "SciPy trust-exact",
    "curvature trust-region": "SciPy trust-krylov",
    "curvature newton-cg": "SciPy Newton-CG",
    "curvature bfgs": "SciPy BFGS",
    "curvature l-bfgs": "SciPy L-BFGS-B",
}
