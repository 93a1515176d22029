"""The scalar objectives: CUTEst by way of sif2jax, or the sums of squares of Moré, Garbow and Hillstrom."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from benchmarks import cutest, mgh, peers
from benchmarks.cases import Choice

Objective = Callable[[jax.Array, Any], jax.Array]  # of a flat vector, and of data
SOURCES = {
    "cutest": "CUTEst without constraints, n <= 50",
    "mgh": "Moré, Garbow and Hillstrom, sums of squares",
}
THINNED = 3  # with all of them an hour goes into compilation; ``--models cutest`` takes it
QUICK = ("rosenbrock", "wood")


@dataclass(frozen=True)
class Problem:
    """An objective before it is built: importing CUTEst takes a minute.

    Attributes:
        name: in its source.
        source: a key of ``SOURCES``.
        n: how many variables it has.
        best: the least value known.
        load: makes the objective, the start and the data, in the precision JAX is set to.
    """

    name: str
    source: str
    n: int
    best: float
    load: Callable[[], tuple[Objective, jax.Array, Any]]


def chosen(choice: Choice) -> list[Problem]:
    """A few of Moré, Garbow and Hillstrom for a quick run; else of CUTEst, or the former where that is absent."""
    if choice.quick:
        return [problem for problem in all_of_mgh() if problem.name in QUICK]
    if not peers.is_installed("sif2jax"):
        return all_of_mgh()
    return all_of_cutest() if "cutest" in choice.models else all_of_cutest()[::THINNED]


def all_of_mgh() -> list[Problem]:
    """The sums of squares; a value at a minimum that is not the least does not count as solved."""
    return [
        Problem(p.name, "mgh", len(p.start), min(p.minima), functools.partial(_load_squares, p)) for p in mgh.PROBLEMS
    ]


def all_of_cutest() -> list[Problem]:
    """Those with a known best value, without importing them."""
    known = json.loads(cutest.BEST.read_text())["problems"]
    return [
        Problem(name, "cutest", entry["n"], entry["best"], functools.partial(_load_cutest, name))
        for name, entry in sorted(known.items())
        if entry["best"] is not None
    ]


def _load_squares(problem: mgh.Problem) -> tuple[Objective, jax.Array, Any]:
    """The sum, without data."""

    def fun(x: jax.Array, _: Any) -> jax.Array:
        return jnp.sum(problem.residuals(x) ** 2)

    return fun, jnp.asarray(problem.start, float), None


def _load_cutest(name: str) -> tuple[Objective, jax.Array, Any]:
    """The objective of a flat vector."""
    import sif2jax

    problem = next(p for p in sif2jax.unconstrained_minimisation_problems if type(p).__name__ == name)
    x0, unravel = ravel_pytree(jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem.y0))

    def fun(x: jax.Array, args: Any) -> jax.Array:
        return problem.objective(unravel(x), args)

    return fun, x0, problem.args
