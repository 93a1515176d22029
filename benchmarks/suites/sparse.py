"""Sparse Hessians and Jacobians whose closed form is known, over growing size, in double precision."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

import curvature
from benchmarks.cases import Case, Choice, Claim, Contestant, Finding, Outcome, Plot, Race, Task
from benchmarks.reading import at_most, comparison, curves, share

TITLE = "Sparse"
QUESTION = "What does a derivative with few entries cost, in gradients, and when is the dense one no longer an option?"
DTYPE = "float64"
TOLERANCE = 1e-13  # of the largest entry
WANTED_OVERHEAD = 1.1  # over asdex, or jax, called directly
WANTED_GRADIENTS = 6
DENSE_UP_TO = 1000

GRADIENT, FUNCTION = "one gradient", "one evaluation"
ALONE = "asdex, its products alone"
CAPTION = "Compile seconds hold the preparation as well: finding and coloring the pattern."

Sparse = scipy.sparse.csr_array
Vector = np.ndarray


@dataclass(frozen=True)
class Problem:
    """A function of a vector, whose derivative is known in closed form.

    Attributes:
        name: what ``--models`` selects by.
        function: of JAX; a scalar, whose Hessian is wanted, or a vector, whose Jacobian is.
        closed_form: the derivative at a point, every entry of the pattern stored.
        wanted: the claim about the cost at the largest size, in gradients; None for none.
    """

    name: str
    function: Callable[[jax.Array], jax.Array]
    closed_form: Callable[[Vector], Sparse]
    wanted: float | None = None


# ---- functions and their derivatives by hand -------------------------------------------------------------------------


def rosenbrock(x: jax.Array) -> jax.Array:
    """The chain of Rosenbrock's valleys."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def rosenbrock_hessian(x: Vector) -> Sparse:
    """Three diagonals."""
    diagonal = np.zeros(x.size)
    diagonal[:-1] += 1200 * x[:-1] ** 2 - 400 * x[1:] + 2
    diagonal[1:] += 200
    return scipy.sparse.diags_array([-400 * x[:-1], diagonal, -400 * x[:-1]], offsets=[-1, 0, 1]).tocsr()


def membrane(x: jax.Array) -> jax.Array:
    """Fourth powers of the slopes along the edges of a square grid."""
    grid = x.reshape(round(x.size**0.5), -1)
    return jnp.sum((grid[1:] - grid[:-1]) ** 4) + jnp.sum((grid[:, 1:] - grid[:, :-1]) ** 4)


def membrane_hessian(x: Vector) -> Sparse:
    """``D' diag(12 (D x)^2) D``, with a row of D for each edge."""
    side = round(x.size**0.5)
    steps = scipy.sparse.diags_array([-np.ones(side - 1), np.ones(side - 1)], offsets=[0, 1], shape=(side - 1, side))
    one = scipy.sparse.eye_array(side)
    edges = scipy.sparse.vstack([scipy.sparse.kron(steps, one), scipy.sparse.kron(one, steps)]).tocsr()
    return scipy.sparse.csr_array(edges.T @ scipy.sparse.diags_array(12 * (edges @ x) ** 2) @ edges)


def broyden(x: jax.Array) -> jax.Array:
    """Broyden's tridiagonal equations."""
    left, right = jnp.concatenate([jnp.zeros(1), x[:-1]]), jnp.concatenate([x[1:], jnp.zeros(1)])
    return (3 - 2 * x) * x - left - 2 * right + 1


def broyden_jacobian(x: Vector) -> Sparse:
    """Three diagonals."""
    ones = np.ones(x.size - 1)
    return scipy.sparse.diags_array([-ones, 3 - 4 * x, -2 * ones], offsets=[-1, 0, 1]).tocsr()


ROSENBROCK = Problem("rosenbrock", rosenbrock, rosenbrock_hessian, WANTED_GRADIENTS)
MEMBRANE = Problem("membrane", membrane, membrane_hessian)
BROYDEN = Problem("broyden", broyden, broyden_jacobian)


# ---- the cases -------------------------------------------------------------------------------------------------------


def cases(choice: Choice) -> Iterator[Case]:
    """A chain and a grid for Hessians, a band for Jacobians, each over growing size."""
    sizes = {"rosenbrock": (400, 10_000), "membrane": (400, 10_000), "broyden": (400, 10_000)}
    if not choice.quick:
        sizes = dict.fromkeys(sizes, (100, 900, 10_000, 99_856, 1_000_000))  # squares, for the grid
        sizes["rosenbrock"] = (100, 1000, 10_000, 100_000, 1_000_000)
    for problem in (ROSENBROCK, MEMBRANE, BROYDEN):
        for size in sizes[problem.name]:
            yield case(choice, problem, size)


def case(choice: Choice, problem: Problem, size: int) -> Race:
    """One derivative at one size."""
    order = "jacobian" if problem is BROYDEN else "hessian"
    return Race(
        f"sparse/{order}/{problem.name}/n={size}",
        f"Sparse {order.capitalize()}, {problem.name}, {size:,} variables",
        problem.name,
        partial(contestants, problem, size),
        lambda: canonical(problem.closed_form(point(size))),
        TOLERANCE,
        {"n": size},
        budget=0.3 if choice.quick else 1.5,
        rounds=5 if choice.quick else 15,
        claims=partial(claims, problem, size),
        caption=CAPTION,
    )


def point(size: int) -> Vector:
    """A random point."""
    return np.random.default_rng(0).normal(size=size)


def contestants(problem: Problem, size: int) -> Iterator[Contestant]:
    """Ours called as it is and under ``jit``, asdex, the dense way where it fits, and a gradient."""
    x, order = jnp.asarray(point(size)), "Jacobian" if problem is BROYDEN else "Hessian"
    ours: Any = curvature.sparse_jacobian if problem is BROYDEN else curvature.sparse_hessian
    function = problem.function
    name = f"curvature.sparse_{order.lower()}"

    def prepared(prepare: Callable[[], Callable[..., Any]]) -> Callable[[], Task]:
        def make() -> Task:
            call = prepare()
            return lambda: jax.block_until_ready(call(x))

        return make

    def by_asdex() -> Callable[..., Any]:
        import asdex

        return jax.jit((asdex.jacobian if problem is BROYDEN else asdex.hessian)(function, x))

    def products_of_asdex() -> Callable[..., Any]:
        import asdex

        return jax.jit((asdex.compressed_jacobian if problem is BROYDEN else asdex.compressed_hessian)(function, x))

    yield Contestant(f"{name}, under jit", "curvature", make=prepared(lambda: jax.jit(ours(function, x))), read=of_bcoo)
    yield Contestant(name, "curvature", make=prepared(lambda: ours(function, x)), read=of_bcoo)
    yield Contestant("asdex, under jit", "asdex", make=prepared(by_asdex), read=of_bcoo)
    if size <= DENSE_UP_TO:
        places = partial(of_dense, problem, size)
        dense = {
            f"curvature.{order.lower()}, dense": getattr(curvature, order.lower()),
            "jax, dense": jax.jacfwd if problem is BROYDEN else jax.hessian,
        }
        for title, way in dense.items():
            yield Contestant(title, title.split(",")[0].split(".")[0], way(function), (x,), read=places)
    yield Contestant(ALONE, "asdex", make=prepared(products_of_asdex), floor=True)
    floor = function if problem is BROYDEN else jax.grad(function)
    yield Contestant(FUNCTION if problem is BROYDEN else GRADIENT, "jax", floor, (x,), floor=True)


# ---- one layout for everybody ----------------------------------------------------------------------------------------


def canonical(matrix: Any) -> tuple[Vector, Vector, Vector]:
    """Rows, columns and values, row after row, entries of one place added up."""
    sorted_rows = scipy.sparse.csr_array(matrix)
    sorted_rows.sum_duplicates()
    entries = sorted_rows.tocoo()
    return entries.coords[0], entries.coords[1], entries.data


def of_bcoo(found: Any) -> tuple[Vector, Vector, Vector]:
    """The entries of a ``BCOO``."""
    rows, columns = np.asarray(found.indices).T
    return canonical(scipy.sparse.coo_array((np.asarray(found.data), (rows, columns)), shape=found.shape))


def of_dense(problem: Problem, size: int, found: Any) -> tuple[Vector, Vector, Vector]:
    """A dense matrix, read at the places of the closed form; an entry elsewhere makes it a wrong answer."""
    dense, (rows, columns, _) = np.asarray(found), canonical(problem.closed_form(point(size)))
    elsewhere = dense.copy()
    elsewhere[rows, columns] = 0
    return (rows, columns, dense[rows, columns]) if not elsewhere.any() else (*np.nonzero(dense), dense[dense != 0])


# ---- what is claimed, drawn and concluded ----------------------------------------------------------------------------


def claims(problem: Problem, size: int, outcome: Outcome) -> list[Claim]:
    """Neither the dense way nor what we put around asdex takes a tenth more; an evaluation costs a few gradients."""
    order = "jacobian" if problem is BROYDEN else "hessian"
    ours = f"curvature.sparse_{order}"
    found = at_most(outcome, f"{ours}, under jit", "asdex, under jit", WANTED_OVERHEAD) if size >= 100_000 else []
    if problem.wanted is not None and size == 100_000:
        found += at_most(outcome, ours, GRADIENT, problem.wanted)
    return found + at_most(outcome, f"curvature.{order}, dense", "jax, dense", WANTED_OVERHEAD)


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """Time over the number of variables."""
    drawn = {"hessian/rosenbrock": "Hessian of a chain", "hessian/membrane": "Hessian of a grid",
             "jacobian/broyden": "Jacobian of a band"}  # fmt: skip
    return [
        Plot(prefix.replace("/", "-"), f"Time of the {what}", "variables", "time [ms]", lines)
        for prefix, what in drawn.items()
        if (lines := curves(outcomes, "n", prefix=f"sparse/{prefix}/", scale=1e3))
    ]


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """The cost in gradients, and against the others."""
    costs = [
        f"{outcome.title}: {cost:.1f}."
        for outcome in outcomes.values()
        if (cost := share(outcome, "curvature.sparse_hessian, under jit", GRADIENT))
    ]
    return [
        Finding("How many gradients does a sparse Hessian cost?", " ".join(costs) or "Not measured.", list(outcomes)),
        Finding(
            "And against asdex alone, and the dense matrix?",
            " ".join(map(comparison, outcomes.values())) or "Not measured.",
            list(outcomes),
        ),
    ]
