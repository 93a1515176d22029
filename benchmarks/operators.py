"""Curvature operators: what a product costs, and what is found by products: ``python -m benchmarks.operators``.

Products with the Hessian, the Gauss-Newton and Fisher matrices and Kronecker factors on a perceptron, a convolutional
net and a transformer block, in gradients; the same on a transformer of eleven million parameters, with their memory;
the largest eigenvalues against SciPy's; the spectral density against the spectrum. Single precision but for SciPy.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse.linalg
from rich.console import Console

import curvature
from benchmarks import hessian
from benchmarks.hessian import num_parameters
from benchmarks.networks import Problem, convolutional, perceptron, transformer
from benchmarks.timing import Contestant, compare, console, plain_table, share, table

PROBLEMS: dict[str, Callable[[], Problem]] = {
    "perceptron": perceptron,
    "convolutional net": convolutional,
    "transformer block": partial(transformer, layers=1, width=128, words=256, examples=8),
}
PRODUCTS = 32  # in a row from one linearization, in a loop
UNROLLED = {"convolutional net": 4}  # so many without a loop: XLA runs convolutions in one slowly, jax-ml/jax#12868
IN_A_SOLVE = ", 1 in a row"
GRADIENT, FRESH, HESSIAN, GAUSS_NEWTON = "gradient", "hvp", "Hessian", "Gauss-Newton"

WANTED_LINEARIZED = 0.85  # of a fresh product
WANTED_GAUSS_NEWTON = 0.8  # of a Hessian product
WANTED_MEMORY = 2.5  # of the gradient's
WANTED_EIGENVALUES = 1e-4
WANTED_DISTANCE = 0.05  # half the absolute difference of two densities, integrated: 1 if they have nothing in common

Claim = tuple[bool, str]


# ---- what a product costs --------------------------------------------------------------------------------------------


def one_product(op: curvature.LinearOperator, v: Any) -> Any:
    """A single product, evaluated afresh."""
    return op.mv(v)


def products_in_a_row(op: curvature.LinearOperator, many_v: Any, *, unroll: bool) -> Any:
    """As in a solve: one linearization, then one product after the other."""
    product = op.linearize()
    return jax.lax.scan(lambda carry, v: (carry, product(v)), None, many_v, unroll=unroll)[1]


def operators(problem: Problem) -> dict[str, curvature.LinearOperator]:
    """The operators by name, at random parameters."""
    model, loss, params, batch = problem
    drawn = {"kind": "sampled", "likelihood": "categorical", "key": jax.random.key(7)}
    return {
        HESSIAN: curvature.HessianOperator(problem.objective, params, *batch),
        GAUSS_NEWTON: curvature.GaussNewtonOperator(model, loss, params, *batch),
        "Fisher, closed form": curvature.FisherOperator(model, loss, params, *batch, likelihood="categorical"),
        "Fisher, empirical": curvature.FisherOperator(model, loss, params, *batch, kind="empirical"),
        "KFAC": jax.jit(lambda params, *batch: curvature.KroneckerOperator(model, loss, params, *batch, **drawn))(
            params, *batch
        ),
    }


def bench_products(screen: Console, name: str, problem: Problem) -> list[Claim]:
    """Time the products of all operators against one gradient, and print the table."""
    params, batch = problem.params, problem.batch
    v = jax.tree.map(jnp.ones_like, params)
    count, in_a_row = UNROLLED.get(name, PRODUCTS), partial(products_in_a_row, unroll=name in UNROLLED)
    many_v = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (count, *leaf.shape)), v)
    title = f"Products, {name}, {num_parameters(params):,} parameters, {len(batch[0])} examples"
    contestants: dict[str, Contestant] = {
        GRADIENT: (jax.grad(problem.objective), (params, *batch)),
        FRESH: (partial(curvature.hvp, problem.objective), (params, v, *batch)),
    }
    with screen.status(f"{title}: factors") as status:
        for what, op in operators(problem).items():
            contestants[what] = (one_product, (op, v))
            if what in (HESSIAN, GAUSS_NEWTON):
                contestants[what + IN_A_SOLVE] = (in_a_row, (op, many_v))
        rows = compare(contestants, budget=0.6, rounds=3, report=lambda line: status.update(f"{title}: {line}"))
    rows = {what: share(row, count) if what.endswith(IN_A_SOLVE) else row for what, row in rows.items()}
    caption = f"In a row: {count} products from one linearization, divided by {count}. KFAC has its factors at hand."
    screen.print(table(title, rows.values(), rows[GRADIENT], caption))
    screen.print()
    return product_claims(name, {what: row.seconds for what, row in rows.items()})


def product_claims(name: str, seconds: dict[str, float]) -> list[Claim]:
    """What a product in a solve saves, and what Gauss-Newton saves."""
    ratio = seconds[HESSIAN + IN_A_SOLVE] / seconds[FRESH]
    claim = f"{name}: a Hessian product in a solve costs {ratio:.2f} of a fresh hvp"
    claims = [(ratio <= WANTED_LINEARIZED, f"{claim} (wanted: at most {WANTED_LINEARIZED})")]
    for suffix, where in (("", "afresh"), (IN_A_SOLVE, "in a solve")):
        ratio = seconds[GAUSS_NEWTON + suffix] / seconds[HESSIAN + suffix]
        claim = f"{name}: a Gauss-Newton product {where} costs {ratio:.2f} of a Hessian product"
        claims.append((ratio <= WANTED_GAUSS_NEWTON, f"{claim} (wanted: at most {WANTED_GAUSS_NEWTON})"))
    return claims


# ---- a network of millions of parameters -----------------------------------------------------------------------------


def bench_large(screen: Console) -> list[Claim]:
    """Products of a transformer of eleven million parameters, and their memory."""
    problem = transformer(layers=6, width=384, words=512, examples=4)
    params, batch = problem.params, problem.batch
    ops = operators_of_large(problem)
    title = f"Products, transformer, {num_parameters(params):,} parameters, {len(batch[0])} x 64 tokens"
    contestants: dict[str, Contestant] = {GRADIENT: (jax.grad(problem.objective), (params, *batch))}
    contestants |= {what: (one_product, (op, params)) for what, op in ops.items()}
    with screen.status(title) as status:
        rows = compare(contestants, budget=1.0, rounds=2, report=lambda line: status.update(f"{title}: {line}"))
    screen.print(table(title, rows.values(), rows[GRADIENT]))
    screen.print()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    temporary = {what: row.temporary_bytes or 0 for what, row in rows.items()}
    claims = []
    for what in ops:  # a product holds x, v and the answer, a gradient x and the answer
        peak = (3 * size + temporary[what]) / (2 * size + temporary[GRADIENT])
        claim = f"transformer: a {what} product holds {peak:.2f} times as much at once as a gradient"
        alone = f"{temporary[what] / temporary[GRADIENT]:.2f} times by temporaries alone"
        claims.append((peak <= WANTED_MEMORY, f"{claim}, {alone} (wanted: at most {WANTED_MEMORY})"))
    return claims


def operators_of_large(problem: Problem) -> dict[str, curvature.LinearOperator]:
    """The two operators whose memory is judged."""
    return {
        HESSIAN: curvature.HessianOperator(problem.objective, problem.params, *problem.batch),
        GAUSS_NEWTON: curvature.GaussNewtonOperator(problem.model, problem.loss, problem.params, *problem.batch),
    }


# ---- eigenvalues -----------------------------------------------------------------------------------------------------


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Counted(curvature.LinearOperator):
    """An operator that counts the products that are taken with it."""

    op: curvature.LinearOperator
    is_symmetric = True

    def mv(self, v: Any) -> Any:
        return self.linearize()(v)

    def linearize(self) -> Callable[[Any], Any]:
        product = self.op.linearize()

        def counted(v: Any) -> Any:
            jax.debug.callback(
                _count, jax.tree.leaves(v)[0].ravel()[0]
            )  # of the vector, so that vmap runs one for each
            return product(v)

        return counted

    def in_structure(self) -> Any:
        return self.op.in_structure()

    def out_structure(self) -> Any:
        return self.op.out_structure()


_products: list[None] = []


def _count(_: Any) -> None:
    _products.append(None)


def bench_eigenvalues(screen: Console) -> list[Claim]:
    """The ten largest eigenvalues of a Hessian, in single precision, against SciPy's in double precision."""
    with screen.status("Eigenvalues"):
        problem = perceptron((64, 200, 32, 10), examples=256)
        op = curvature.HessianOperator(problem.objective, problem.params, *problem.batch)
        find = jax.jit(partial(curvature.eigsh, k=10, which="LA"))
        jax.block_until_ready(find(op))
        start = time.perf_counter()
        pairs = jax.block_until_ready(find(op))
        seconds = time.perf_counter() - start
        _products.clear()
        jax.block_until_ready(find(Counted(op)))
        jax.effects_barrier()
        ours = len(_products)
        with jax.enable_x64(True):
            double = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (problem.params, problem.batch[0]))
            precise = curvature.HessianOperator(problem.objective, double[0], double[1], problem.batch[1])
            expected, theirs = scipy_eigenvalues(curvature.as_scipy(precise))
    found = np.asarray(pairs.eigenvalues, float)
    error = float(np.max(np.abs(found - expected)) / expected[0])
    what = f"Ten largest eigenvalues of a Hessian, {num_parameters(problem.params):,} parameters"
    screen.print(f"{what}: {found[0]:.4f} down to {found[-1]:.4f}; {int(pairs.converged.sum())} have converged;")
    screen.print(f"{ours} products in {seconds:.1f} s, float32; SciPy's eigsh takes {theirs} products, float64.\n")
    holds = error <= WANTED_EIGENVALUES and bool(pairs.converged.all())
    return [(holds, f"eigsh agrees with SciPy to {error:.0e} of the largest (wanted: {WANTED_EIGENVALUES:.0e})")]


def scipy_eigenvalues(op: scipy.sparse.linalg.LinearOperator) -> tuple[np.ndarray, int]:
    """The ten largest, in falling order, by ARPACK, and the number of products."""
    taken = []

    def product(v: np.ndarray) -> np.ndarray:
        taken.append(None)
        return op.matvec(v)

    counted: Any = scipy.sparse.linalg.LinearOperator
    values = scipy.sparse.linalg.eigsh(
        counted(op.shape, matvec=product, dtype=op.dtype), k=10, which="LA", return_eigenvectors=False, tol=1e-6
    )
    return np.sort(values)[::-1], len(taken)


# ---- the spectral density --------------------------------------------------------------------------------------------


def bench_density(screen: Console) -> list[Claim]:
    """The estimated density of the eigenvalues of a Hessian against all of them."""
    with screen.status("Spectral density"):
        params, *data = hessian.problem((20, 48, 1))
        op = curvature.HessianOperator(hessian.loss, params, *data)
        found = jax.jit(partial(curvature.spectral_density, num_samples=32))(op, key=jax.random.key(3))
        eigenvalues = np.linalg.eigvalsh(np.asarray(jax.jit(lambda op: op.as_matrix())(op), float))
    grid, density, error = (np.asarray(array, float) for array in found[:3])
    width = np.ptp(np.asarray(found.ritz_values)) / found.ritz_values.shape[1]  # what it takes itself
    bells = np.exp(-0.5 * ((grid[:, None] - eigenvalues) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    exact = bells.mean(axis=1)
    integral = float(np.trapezoid(density, grid))
    distance = float(np.trapezoid(np.abs(density - exact), grid)) / 2
    within = float(np.mean(np.abs(density - exact) <= 4 * error + 1e-3 * exact.max()))
    show_histogram(screen, eigenvalues, found)
    name = f"spectral density, {len(eigenvalues):,} eigenvalues"
    return [
        (abs(integral - 1) <= 1e-3, f"{name}: it integrates to {integral:.4f}"),
        (distance <= WANTED_DISTANCE, f"{name}: {distance:.3f} of it lies elsewhere (wanted: {WANTED_DISTANCE})"),
        (within >= 0.99, f"{name}: {within:.1%} of the grid lies within 4 standard errors (wanted: 99%)"),
    ]


def show_histogram(screen: Console, eigenvalues: np.ndarray, found: curvature.SpectralDensity) -> None:
    """The share of the eigenvalues in each of eight parts of the spectrum, counted and by the weights of the probes."""
    margin = 1e-3 * np.ptp(eigenvalues)
    edges = np.linspace(eigenvalues[0] - margin, eigenvalues[-1] + margin, 9)
    counted = np.histogram(eigenvalues, edges)[0] / len(eigenvalues)
    probes = zip(np.asarray(found.ritz_values), np.asarray(found.weights), strict=True)
    estimates = np.array([np.histogram(values, edges, weights=weights)[0] for values, weights in probes])
    errors = estimates.std(axis=0, ddof=1) / np.sqrt(len(estimates))
    shown = plain_table("The share of the eigenvalues", ["from", "to", "counted", "estimated", "standard error"])
    for low, high, *shares in zip(edges[:-1], edges[1:], counted, estimates.mean(axis=0), errors, strict=True):
        shown.add_row(f"{low:.3f}", f"{high:.3f}", *(f"{100 * share:.2f}%" for share in shares))
    screen.print(shown)
    screen.print()


def claims(screen: Console) -> Iterator[Claim]:
    """Measure everything."""
    for name, make in PROBLEMS.items():
        yield from bench_products(screen, name, make())
    yield from bench_large(screen)
    yield from bench_eigenvalues(screen)
    yield from bench_density(screen)


def main() -> None:
    """Run it all."""
    screen = console()
    screen.print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; float32; medians.\n")
    measured = list(claims(screen))
    screen.print("The claims, as measured in this run (other work on the machine moves them):")
    for holds, claim in measured:
        screen.print(f"{'holds' if holds else 'FAILS'}  {claim}", soft_wrap=True)


if __name__ == "__main__":
    main()
