"""A thousand variables: the gradient test is passed, and memory grows as the variables do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from benchmarks.large import METHODS, PROBLEMS, temporary_bytes
from curvature import Status

methods = pytest.mark.parametrize("method", METHODS)


@pytest.mark.slow
@methods
@pytest.mark.parametrize(
    "name", [name if name == "Rosenbrock" else pytest.param(name, marks=pytest.mark.slow) for name in PROBLEMS]
)
def test_a_thousand_variables_reach_the_tolerance(name, method):
    problem = PROBLEMS[name](1_000)
    gtol = np.sqrt(np.finfo(np.float64).eps)
    result = curvature.minimize(problem.fun, problem.x0, problem.args, method=method, gtol=gtol, max_steps=50_000)
    assert Status(int(result.status)) == Status.CONVERGED
    grad = jax.grad(problem.fun)(result.x, *problem.args)
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(grad))
    assert largest <= 1.01 * gtol
    if method == "trust-region":  # the condition takes conjugate gradients far beyond the basis that is kept
        assert result.num_steps < 60


@pytest.mark.slow
def test_a_long_solve_is_examined_at_its_end():
    problem = PROBLEMS["quadratic"](1_000)  # some 20,000 steps, of which every 64th is examined without success
    result = curvature.minimize(problem.fun, problem.x0, problem.args, method="l-bfgs", max_steps=50_000)
    assert Status(int(result.status)) == Status.CONVERGED


@pytest.mark.slow
@methods
def test_memory_is_linear_in_the_number_of_variables(method):
    small, large = (temporary_bytes(PROBLEMS["Rosenbrock"](n), method) for n in (1_000, 4_000))
    most = {"trust-region": 1_100, "l-bfgs": 500}[method]  # bytes a variable: a basis of 100, 20 pairs, and a few more
    assert (large - small) / 3_000 <= most
    assert large <= 4.1 * small
