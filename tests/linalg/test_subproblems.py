"""Positive definite solves and the exact trust-region subproblem, the hard case included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvature._numerics import norm
from curvature.linalg._subproblems import factor_model, positive_definite_solve, solve_region
from tests.oracles import assert_close, exact_trust_region_step


def symmetric(eigenvalues, seed=0, dtype=jnp.float64):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(len(eigenvalues),) * 2))
    return jnp.asarray((q * np.asarray(eigenvalues)) @ q.T, dtype), q


def test_a_definite_matrix_is_solved_as_it_is(dtype):
    matrix, _ = symmetric([0.5, 1.0, 4.0, 9.0], dtype=dtype)
    b = jnp.asarray([1.0, -2.0, 0.5, 3.0], dtype)
    assert_close(matrix @ positive_definite_solve(matrix, b), b, dtype, roundings=200)


@pytest.mark.parametrize("eigenvalues", [[-2.0, 1.0, 3.0], [-3.0, -2.0, -1.0], [0.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
def test_any_matrix_gives_a_direction_of_descent(eigenvalues, dtype):
    matrix, _ = symmetric(eigenvalues, dtype=dtype)
    b = jnp.asarray([1.0, -2.0, 0.5], dtype)
    step = jax.jit(positive_definite_solve)(matrix, b)
    assert jnp.all(jnp.isfinite(step))
    assert b @ step > 0


def test_the_solve_does_not_depend_on_the_units_of_the_variables():
    matrix, _ = symmetric([-2.0, 1.0, 3.0])
    b = jnp.array([1.0, -2.0, 0.5])
    units = jnp.array([1e-6, 1.0, 1e4])
    scaled = positive_definite_solve(matrix * jnp.outer(units, units), units * b)
    assert_close(units * scaled, positive_definite_solve(matrix, b), roundings=1e4)


@pytest.mark.parametrize("radius", [1e-4, 0.1, 1.0, 30.0, 1e6])
@pytest.mark.parametrize(
    "eigenvalues", [[1.0, 2.0, 5.0, 7.0], [-4.0, -4.0, 1.0, 2.0], [0.0, 1.0, 2.0, 3.0], [-1e-4, 1.0, 1e2, 1e4]]
)
def test_region_step_reaches_the_exact_minimum(eigenvalues, radius):
    matrix, _ = symmetric(eigenvalues)
    gradient = jnp.array([1.0, -0.3, 0.2, 0.7])
    step, predicted, on_boundary = jax.jit(solve_region)(factor_model(matrix, gradient), radius)
    assert jnp.linalg.norm(step) <= radius * (1 + 1e-6)
    best = exact_trust_region_step(matrix, gradient, radius)
    model = float(gradient @ step + step @ matrix @ step / 2)
    np.testing.assert_allclose(model, best, rtol=1e-6)
    np.testing.assert_allclose(-predicted, best, rtol=1e-6)
    if on_boundary:
        np.testing.assert_allclose(jnp.linalg.norm(step), radius, rtol=1e-6)


@pytest.mark.parametrize("lowest", [[-2.0], [-2.0, -2.0]])
def test_the_hard_case(lowest, dtype):
    eigenvalues = np.array([*lowest, 1.0, 3.0])
    matrix, q = symmetric(eigenvalues, dtype=dtype)
    gradient = q[:, len(lowest) :] @ np.arange(1.0, eigenvalues.size - len(lowest) + 1)  # orthogonal to the lowest
    radius = 10.0
    step, predicted, on_boundary = solve_region(
        factor_model(matrix, jnp.asarray(gradient, dtype)), jnp.asarray(radius, dtype)
    )
    assert bool(on_boundary)
    np.testing.assert_allclose(jnp.linalg.norm(step), radius, rtol=1e-3)
    np.testing.assert_allclose(-predicted, exact_trust_region_step(matrix, gradient, radius), rtol=1e-4)


def test_a_saddle_with_zero_gradient_is_left_along_negative_curvature():
    step, predicted, _ = solve_region(factor_model(jnp.diag(jnp.array([1.0, -3.0])), jnp.zeros(2)), jnp.asarray(0.5))
    assert_close(jnp.abs(step), jnp.array([0.0, 0.5]))
    assert_close(predicted, 0.5 * 3 * 0.25)


def test_a_singular_model_takes_the_shortest_step():
    model = factor_model(jnp.diag(jnp.array([0.0, 2.0])), jnp.array([0.0, 1.0]))
    step, _, on_boundary = solve_region(model, jnp.asarray(1e6))
    assert_close(step, jnp.array([0.0, -0.5]))
    assert not on_boundary


def test_one_by_one_and_zero():
    step, predicted, _ = solve_region(factor_model(jnp.array([[2.0]]), jnp.array([4.0])), jnp.asarray(10.0))
    assert_close(step, [-2.0])
    assert_close(predicted, 4.0)
    step, predicted, _ = solve_region(factor_model(jnp.zeros((2, 2)), jnp.zeros(2)), jnp.asarray(1.0))
    assert_close(step, jnp.zeros(2))
    assert_close(predicted, 0.0)


def test_the_norm_is_safe_over_the_whole_range(dtype):
    limits = jnp.finfo(dtype)
    sizes = jnp.asarray([limits.tiny, limits.tiny / limits.eps, 1, limits.max / 8], dtype)
    got = jax.vmap(lambda size: norm(size * jnp.asarray([3.0, 0, -4.0], dtype)))(sizes)
    assert_close(got / sizes, jnp.full(4, 5.0), dtype)
    ends = jax.jit(jax.vmap(norm))(jnp.asarray([[0, 0], [1, jnp.inf], [1, jnp.nan]], dtype))
    np.testing.assert_array_equal(ends, [0, jnp.inf, jnp.nan])


@pytest.mark.parametrize("scale", [1e-12, 0.5, 1e12])
def test_the_norm_of_a_scaled_vector_is_safe(scale, dtype):
    """XLA merges the two divisors into one, which must neither vanish nor overflow."""
    scale = jnp.asarray(scale, dtype)
    ends = jax.jit(lambda v, scale: jax.vmap(norm)(v / scale))(jnp.asarray([[0, 0], [1, jnp.inf]], dtype), scale)
    np.testing.assert_array_equal(ends, [0, jnp.inf])
