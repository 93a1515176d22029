"""Of ``operators``: what is found by products alone, extreme eigenvalues, the density of all of them, solutions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks import runner
from benchmarks.cases import Case, Choice, Claim, Contestant, Line, Outcome, Outcomes, Plot, Race, Row, Study, Task
from benchmarks.models import Model, mlp, tanh_network
from benchmarks.peers.flat import Function
from benchmarks.peers.jax_ways import InJax, in_double, named, numbers
from benchmarks.reading import part

WANTED_EIGENVALUES = 1e-4  # of the largest
WANTED_DISTANCE = 0.05  # half the absolute difference of two densities, integrated: 1 if they have nothing in common
WANTED_SOLUTION = 1e-3  # of its largest entry; residuals are asked to be 1e-5 of the right-hand side
RTOL = 1e-5
EIGENVALUES = 10
INDEFINITE = 1000  # variables
EIGSH, SCIPY, DENSE = "curvature.eigsh", "scipy, eigsh", "jax, eigvalsh of the dense Hessian"


def cases(choice: Choice) -> Iterator[Case]:
    network = mlp(*(((20, 24, 16, 10), 128) if choice.quick else ((64, 200, 32, 10), 256)))
    n = network.num_parameters
    yield Race(
        f"operators/eigenvalues/mlp/n={n}", f"Ten largest eigenvalues of a Hessian, {n:,} parameters", "mlp",
        partial(eigenvalue_contestants, network), partial(scipy_eigenvalues, network), WANTED_EIGENVALUES, {"n": n},
        budget=0.3 if choice.quick else 3.0, rounds=3, claims=partial(count_products, network),
        caption="The trusted answer is SciPy's, in double precision.",
    )  # fmt: skip
    if choice.quick:
        return
    title = "Spectral density of a Hessian, 1,008 parameters"
    yield Study("operators/density/mlp/n=1008", title, "mlp", density, {"n": 1008})
    small = mlp((30, 48, 10), 256)
    solves: dict[str, tuple[str, int, Callable[[], Any], Callable[[], Any]]] = {
        "definite": ("(Gauss-Newton + 0.01 I) x = gradient", small.num_parameters,
                     partial(definite_contestants, small), partial(definite_reference, small)),
        "indefinite": ("dense symmetric A x = b, eigenvalues in [-10, -1] and [1, 10]", INDEFINITE,
                       indefinite_contestants, lambda: np.linalg.solve(*indefinite())),
    }  # fmt: skip
    for name, (title, n, contestants, reference) in solves.items():
        yield Race(
            f"operators/solve-{name}/mlp/n={n}", f"Solve {title}, {n:,} variables", "mlp", contestants, reference,
            WANTED_SOLUTION, {"n": n}, budget=1.0,
            caption=f"Each iterates to {RTOL:.0e} in its own sense of it; curvature.solve chooses its method.",
        )  # fmt: skip


def hessian(model: Model) -> curvature.HessianOperator:
    made = InJax(model)
    return curvature.HessianOperator(made.loss, made.params, *made.batch)


def largest(op: Any) -> curvature.types.Eigenpairs:
    return curvature.eigsh(op, k=EIGENVALUES, which="LA")


def eigenvalue_contestants(model: Model) -> Iterator[Contestant]:
    """Ours, ARPACK on the same products, and all eigenvalues of the dense matrix where it fits."""
    op = hessian(model)

    def by_scipy() -> Task:
        operator = curvature.as_scipy(op)
        return lambda: arpack(operator)

    yield Contestant(EIGSH, "curvature", largest, (op,), read=lambda pairs: pairs.eigenvalues)
    yield Contestant(SCIPY, "scipy", make=by_scipy)
    if model.num_parameters < 4000:
        yield Contestant(DENSE, "jax", lambda op: jnp.linalg.eigvalsh(op.as_matrix())[: -EIGENVALUES - 1 : -1], (op,))


def arpack(operator: Any) -> np.ndarray:
    import scipy.sparse.linalg

    start = np.random.default_rng(0).normal(size=operator.shape[0]).astype(operator.dtype)
    options: dict[str, Any] = {"k": EIGENVALUES, "which": "LA", "return_eigenvectors": False, "tol": 1e-6, "v0": start}
    return np.sort(scipy.sparse.linalg.eigsh(operator, **options))[::-1]


def scipy_eigenvalues(model: Model) -> np.ndarray:
    with jax.enable_x64(True):
        return arpack(curvature.as_scipy(hessian(model)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counted(curvature.LinearOperator):
    """An operator that notes each product that is taken with it in ``products``."""

    op: curvature.LinearOperator
    is_symmetric = True
    products = []  # noqa: RUF012  # of the class: an operator is made again at each trace

    def mv(self, v: Any) -> Any:
        return self.linearize()(v)

    def linearize(self) -> Callable[[Any], Any]:
        product = self.op.linearize()

        def counted(v: Any) -> Any:
            # It takes an entry of the vector, so that vmap runs one callback for each.
            jax.debug.callback(self.products.append, jax.tree.leaves(v)[0].ravel()[0])
            return product(v)

        return counted

    def in_structure(self) -> Any:
        return self.op.in_structure()

    out_structure = in_structure


def count_products(model: Model, outcome: Outcome) -> list[Claim]:
    """Add to the rows how many products each takes; the claim is that all of ours have converged."""
    counted, counts = Counted(hessian(model)), {}
    Counted.products.clear()
    pairs = jax.block_until_ready(jax.jit(largest)(counted))
    jax.effects_barrier()
    counts[EIGSH] = len(Counted.products)
    Counted.products.clear()
    arpack(curvature.as_scipy(counted))
    jax.effects_barrier()
    counts[SCIPY] = len(Counted.products)
    for row in outcome.rows:
        row.metrics |= {"products": counts[row.name]} if row.name in counts else {}
    converged = int(pairs.converged.sum())
    return [Claim(f"{converged} of {EIGENVALUES} eigenpairs have converged", converged == EIGENVALUES)]


def density(report: Callable[[str], Any]) -> Outcome:
    """The estimated density of the eigenvalues of a Hessian against all of them."""
    op, key = hessian(tanh_network((20, 48, 1), 512)), jax.random.key(3)
    find = jax.jit(partial(curvature.spectral_density, num_samples=32)).lower(op, key=key).compile()
    dense = jax.jit(lambda op: jnp.linalg.eigvalsh(op.as_matrix())).lower(op).compile()
    report("timing")
    rows = {"curvature.spectral_density": Row("curvature.spectral_density", "curvature"), DENSE: Row(DENSE, "jax")}
    calls = dict(zip(rows, (lambda: find(op, key=key), lambda: dense(op)), strict=True))
    for name, timing in runner.measure(calls, budget=1.0, rounds=3).items():
        runner.record(rows[name], timing)
    runner.relate(rows.values())
    found = find(op, key=key)
    spectrum = np.linalg.eigvalsh(np.asarray(jax.jit(lambda op: op.as_matrix())(op), float))
    grid, estimate, error = (np.asarray(array, float) for array in found[:3])
    width = np.ptp(np.asarray(found.ritz_values)) / found.ritz_values.shape[1]  # the default of spectral_density
    exact = np.exp(-0.5 * ((grid[:, None] - spectrum) / width) ** 2).mean(axis=1) / (width * np.sqrt(2 * np.pi))
    series = {"grid": grid, "estimate": estimate, "error": error, "exact": exact}
    return Outcome(
        rows=list(rows.values()), claims=density_claims(**series),
        series={name: [array.tolist()] for name, array in series.items()},
        caption="The estimate takes products alone: 32 probes of 64 steps. At this size the dense matrix still fits.",
    )  # fmt: skip


def density_claims(grid: np.ndarray, estimate: np.ndarray, error: np.ndarray, exact: np.ndarray) -> list[Claim]:
    integral = float(np.trapezoid(estimate, grid))
    distance = float(np.trapezoid(np.abs(estimate - exact), grid)) / 2
    within = float(np.mean(np.abs(estimate - exact) <= 4 * error + 1e-3 * exact.max()))
    return [
        Claim(f"it integrates to {integral:.4f}", abs(integral - 1) <= 1e-3, correctness=True),
        Claim(f"{distance:.3f} of it lies elsewhere (wanted: {WANTED_DISTANCE})", distance <= WANTED_DISTANCE),
        Claim(f"{within:.1%} of the grid lies within 4 standard errors (wanted: 99%)", within >= 0.99),
    ]


def plots(outcomes: Outcomes) -> list[Plot]:
    found = []
    for outcome in part(outcomes, "operators/density/").values():
        if outcome.series:
            grid, estimate, exact = (outcome.series[name][0] for name in ("grid", "estimate", "exact"))
            lines = [Line("curvature.spectral_density", grid, estimate), Line("all eigenvalues", grid, exact, "dashed")]
            found.append(Plot("density", outcome.title, "eigenvalue", "density", lines, x_log=False, y_log=False))
    return found


def ours(*names: str, wrap: Function = lambda op: op) -> dict[str, Function]:
    """Solvers of ours by name; ``wrap`` makes an operator of their first argument."""
    return {
        f"curvature.{name}": lambda op, b, name=name: getattr(curvature, name)(wrap(op), b, rtol=RTOL)[0]
        for name in names
    }


def by_scipy(method: str, op: Any, b: Any) -> Contestant:
    """A solver of SciPy on our products; its answer is read as a tree like ``b``."""
    vector, unravel = jax.flatten_util.ravel_pytree(b)

    def make() -> Task:
        import scipy.sparse.linalg

        operator, right = curvature.as_scipy(op), np.asarray(vector)
        return lambda: getattr(scipy.sparse.linalg, method)(operator, right, rtol=RTOL)[0]

    return Contestant(f"scipy, {method}", "scipy", make=make, read=lambda x: unravel(jnp.asarray(x, vector.dtype)))


def system(made: InJax, params: Any, *batch: Any) -> tuple[Any, Any]:
    """The damped Gauss-Newton matrix and a gradient."""
    op = curvature.GaussNewtonOperator(made.outputs, made.of_outputs, params, *batch)
    return op + curvature.damping(0.01), jax.grad(made.loss)(params, *batch)


def definite_contestants(model: Model) -> Iterator[Contestant]:
    made = InJax(model)
    args = system(made, made.params, *made.batch)

    def by_lineax(op: Any, b: Any) -> Any:
        import lineax

        structure = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), b)
        operator = lineax.FunctionLinearOperator(op.linearize(), structure, lineax.positive_semidefinite_tag)
        return lineax.linear_solve(operator, b, lineax.CG(rtol=RTOL, atol=RTOL)).value

    def by_jax(op: Any, b: Any) -> Any:
        return jax.scipy.sparse.linalg.cg(op.linearize(), b, tol=RTOL)[0]

    peers = {"jax.scipy.sparse.linalg.cg": by_jax, "lineax.CG": by_lineax}
    yield from named(ours("cg", "solve", "minres") | peers, args)
    yield by_scipy("cg", *args)


def definite_reference(model: Model) -> Any:
    def solve(params: Any, *batch: Any) -> Any:
        op, b = system(InJax(model), params, *batch)
        vector, unravel = jax.flatten_util.ravel_pytree(b)
        return unravel(jnp.linalg.solve(op.as_matrix(), vector))

    return in_double(solve, model.params(), *model.batch)


def indefinite() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(INDEFINITE, INDEFINITE)))[0]
    values = np.linspace(1, 10, INDEFINITE) * np.where(np.arange(INDEFINITE) % 3, 1, -1)
    return (basis * values) @ basis.T, rng.normal(size=INDEFINITE)


def indefinite_contestants() -> Iterator[Contestant]:
    """MINRES of ours and SciPy, GMRES of those who have no MINRES, and a dense factorization."""
    matrix, b = numbers(indefinite())
    args = ((matrix + matrix.T) / 2, b)

    def by_lineax(matrix: Any, b: Any) -> Any:
        import lineax

        solver = lineax.GMRES(rtol=RTOL, atol=RTOL, restart=100, stagnation_iters=100)
        return lineax.linear_solve(lineax.MatrixLinearOperator(matrix), b, solver).value

    def by_jax(matrix: Any, b: Any) -> Any:
        return jax.scipy.sparse.linalg.gmres(lambda v: matrix @ v, b, tol=RTOL, restart=100)[0]

    peers = {
        "jax.scipy.sparse.linalg.gmres": by_jax, "lineax.GMRES": by_lineax, "jax, dense solve": jnp.linalg.solve,
    }  # fmt: skip
    yield from named(ours("minres", "solve", wrap=curvature.MatrixOperator) | peers, args)
    yield by_scipy("minres", curvature.MatrixOperator(args[0]), b)
