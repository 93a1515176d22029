"""MINRES: indefinite, singular and inconsistent systems."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import Status
from tests.linalg.operators import Diagonal, rotated
from tests.oracles import assert_close, flat

SIGNS = np.geomspace(1, 20, 9) * np.where(np.arange(9) % 2, -1, 1)


def rtol(dtype):
    return 1e-5 if dtype == jnp.float32 else 1e-11


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e12])
def test_an_indefinite_system_is_solved_at_any_scale(dtype, scale):
    op = rotated(SIGNS * scale, dtype)
    b = jnp.arange(1, 10).astype(dtype)
    x, info = jax.jit(lambda op, b: curvature.minres(op, b, rtol=rtol(dtype)))(op, b)
    assert info.status == Status.CONVERGED
    residual = np.linalg.norm(flat(b) - flat(op.matrix @ x))
    assert residual <= 2 * rtol(dtype) * np.linalg.norm(flat(b))
    assert -20.001 <= info.min_curvature / scale < 0
    p = info.direction
    assert_close(info.min_curvature, p @ (op.matrix @ p) / (p @ p), dtype, roundings=500)


def test_a_singular_consistent_system_is_solved(dtype):
    op = rotated(np.where(np.arange(9) % 3, SIGNS, 0), dtype)
    b = op.matrix @ jnp.ones(9, dtype)
    _, info = curvature.minres(op, b, rtol=rtol(dtype))
    assert info.status == Status.CONVERGED


def test_an_inconsistent_system_ends_at_a_least_squares_point(dtype):
    op = rotated(np.where(np.arange(9) % 3, SIGNS, 0), dtype)
    b = jnp.arange(1, 10).astype(dtype)
    x, info = curvature.minres(op, b, rtol=rtol(dtype))
    assert info.status == Status.STALLED
    matrix, b = np.asarray(op.matrix, float), flat(b)
    least = np.linalg.norm(b - matrix @ np.linalg.lstsq(matrix, b, rcond=1e-5)[0])
    np.testing.assert_allclose(np.linalg.norm(b - matrix @ flat(x)), least, rtol=1e-4)
    np.testing.assert_allclose(info.residual_norm, least, rtol=1e-4)


def test_the_zero_operator_and_a_zero_right_hand_side():
    x, info = curvature.minres(lambda v: 0 * v, jnp.ones(3))
    assert info.status == Status.STALLED
    assert_close(x, jnp.zeros(3))
    _, info = curvature.minres(lambda v: v, jnp.zeros(3))
    assert info.status == Status.CONVERGED
    assert info.num_steps == 0


def test_one_by_one():
    x, info = curvature.minres(lambda v: -4 * v, jnp.asarray(2.0))
    assert info.status == Status.CONVERGED
    assert_close(x, -0.5)


def test_nan_ends_the_solve_at_a_finite_point():
    x, info = curvature.minres(lambda v: jnp.where(v > 0.3, jnp.nan, v), jnp.array([1.0, 0.1]))
    assert info.status == Status.NONFINITE
    assert jnp.all(jnp.isfinite(x))


def test_running_out_of_steps_is_no_success():
    _, info = curvature.minres(rotated(SIGNS), jnp.ones(9), rtol=1e-10, max_steps=2)
    assert info.status == Status.MAX_STEPS
    assert info.num_steps == 2


def test_an_asymmetric_operator_is_no_success():
    matrix = jnp.asarray(np.triu(np.random.default_rng(0).normal(size=(9, 9))))
    _, info = curvature.minres(lambda v: matrix @ v, jnp.ones(9), rtol=1e-10)
    assert info.status != Status.CONVERGED


def test_a_preconditioner_and_nested_trees():
    entries = {"a": jnp.array([[1e3, -2.0, 5.0]]), "b": (jnp.asarray(-1e-2), jnp.array([7.0]))}
    inverse = curvature.diagonal_preconditioner(entries)
    b = jax.tree.map(jnp.ones_like, entries)
    x, info = curvature.minres(Diagonal(entries), b, rtol=1e-10, preconditioner=inverse)
    assert info.status == Status.CONVERGED
    assert info.num_steps <= 3
    assert_close(flat(x), 1 / flat(entries))
    _, info = curvature.minres(Diagonal(entries), b, preconditioner=lambda v: jax.tree.map(jnp.negative, v))
    assert info.status == Status.NONFINITE


def test_the_derivative_is_that_of_the_solution():
    op, b = rotated(SIGNS), jnp.arange(1.0, 10.0)
    ours = jax.grad(lambda op, b: jnp.sum(jnp.sin(curvature.minres(op, b, rtol=1e-12)[0])), (0, 1))(op, b)
    dense = jax.grad(lambda m, b: jnp.sum(jnp.sin(jnp.linalg.solve(m, b))), (0, 1))(op.matrix, b)
    assert_close(ours[0].matrix, dense[0], roundings=1e6)
    assert_close(ours[1], dense[1], roundings=1e6)
