"""Sparse Hessians and Jacobians whose closed form is known, over growing size, in double precision."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

import curvature
from benchmarks.cases import Case, Choice, Contestant, Race, Task
from benchmarks.peers.jax_ways import named

TITLE = "Sparse"
QUESTION = "What does a derivative with few entries cost, in gradients, and when is the dense one no longer an option?"
DTYPE = "float64"
TOLERANCE = 1e-13  # of the largest entry
DENSE_UP_TO = 1000
CAPTION = "Compile seconds hold the preparation as well: finding and coloring the pattern."

Sparse = scipy.sparse.csr_array
Vector = np.ndarray


def rosenbrock(x: jax.Array) -> jax.Array:
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def rosenbrock_hessian(x: Vector) -> Sparse:
    diagonal = np.zeros(x.size)
    diagonal[:-1] += 1200 * x[:-1] ** 2 - 400 * x[1:] + 2
    diagonal[1:] += 200
    return scipy.sparse.diags_array([-400 * x[:-1], diagonal, -400 * x[:-1]], offsets=[-1, 0, 1]).tocsr()


def membrane(x: jax.Array) -> jax.Array:
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
    left, right = jnp.concatenate([jnp.zeros(1), x[:-1]]), jnp.concatenate([x[1:], jnp.zeros(1)])
    return (3 - 2 * x) * x - left - 2 * right + 1


def broyden_jacobian(x: Vector) -> Sparse:
    ones = np.ones(x.size - 1)
    return scipy.sparse.diags_array([-ones, 3 - 4 * x, -2 * ones], offsets=[-1, 0, 1]).tocsr()


# The derivative, the function, and its closed form, with every entry of the pattern stored.
PROBLEMS: dict[str, tuple[str, Callable[[jax.Array], jax.Array], Callable[[Vector], Sparse]]] = {
    "rosenbrock": ("hessian", rosenbrock, rosenbrock_hessian),
    "membrane": ("hessian", membrane, membrane_hessian),
    "broyden": ("jacobian", broyden, broyden_jacobian),
}


def cases(choice: Choice) -> Iterator[Case]:
    for name, (order, _, closed_form) in PROBLEMS.items():
        full = (100, 1000, 10_000, 100_000, 1_000_000)
        squares = (100, 900, 10_000, 99_856, 1_000_000)  # for the grid
        for n in (400, 10_000) if choice.quick else full if name == "rosenbrock" else squares:
            yield Race(
                f"sparse/{order}/{name}/n={n}", f"Sparse {order.capitalize()}, {name}, {n:,} variables", name,
                partial(contestants, name, n), lambda n=n, closed=closed_form: canonical(closed(point(n))), TOLERANCE,
                {"n": n}, budget=0.3 if choice.quick else 1.5, rounds=5 if choice.quick else 15, caption=CAPTION,
            )  # fmt: skip


def point(size: int) -> Vector:
    return np.random.default_rng(0).normal(size=size)


def contestants(name: str, size: int) -> Iterator[Contestant]:
    """Ours called directly and under ``jit``, asdex, the dense way where it fits, and a gradient."""
    x, (order, function, _) = jnp.asarray(point(size)), PROBLEMS[name]
    ours: Any = getattr(curvature, f"sparse_{order}")

    def prepared(prepare: Callable[[], Callable[..., Any]]) -> Callable[[], Task]:
        def make() -> Task:
            call = prepare()
            return lambda: jax.block_until_ready(call(x))

        return make

    def by_asdex(way: str) -> Callable[..., Any]:
        import asdex

        return jax.jit(getattr(asdex, way)(function, x))

    title = f"curvature.sparse_{order}"
    jitted = prepared(lambda: jax.jit(ours(function, x)))
    yield Contestant(f"{title}, under jit", "curvature", make=jitted, read=of_bcoo)
    yield Contestant(title, "curvature", make=prepared(lambda: ours(function, x)), read=of_bcoo)
    yield Contestant("asdex, under jit", "asdex", make=prepared(partial(by_asdex, order)), read=of_bcoo)
    if size <= DENSE_UP_TO:
        jax_way = jax.hessian if order == "hessian" else jax.jacfwd
        ways = {f"curvature.{order}, dense": getattr(curvature, order)(function), "jax, dense": jax_way(function)}
        yield from named(ways, (x,), canonical)
    alone = prepared(partial(by_asdex, f"compressed_{order}"))
    yield Contestant("asdex, its products alone", "asdex", make=alone, floor=True)
    floor, what = (jax.grad(function), "one gradient") if order == "hessian" else (function, "one evaluation")
    yield Contestant(what, "jax", floor, (x,), floor=True)


def canonical(matrix: Any) -> tuple[Vector, Vector, Vector]:
    """Rows, columns and values, row after row, entries of one place added up."""
    sorted_rows = scipy.sparse.csr_array(matrix)
    sorted_rows.sum_duplicates()
    entries = sorted_rows.tocoo()
    return entries.coords[0], entries.coords[1], entries.data


def of_bcoo(found: Any) -> tuple[Vector, Vector, Vector]:
    rows, columns = np.asarray(found.indices).T
    return canonical(scipy.sparse.coo_array((np.asarray(found.data), (rows, columns)), shape=found.shape))
