"""Conjugate gradients: the answer, the honest status, the trust region."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import Status
from curvature.linalg._cg import truncated_cg
from tests.oracles import assert_close, flat


def spd(n, condition, seed=0):
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return (q * np.geomspace(1, condition, n)) @ q.T


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e15])
def test_solution_is_the_dense_one_at_any_scale(dtype, scale):
    matrix = jnp.asarray(spd(6, 10.0) * scale, dtype)
    b = jnp.asarray(np.arange(1.0, 7.0), dtype)
    rtol = 1e-5 if dtype == jnp.float32 else 1e-12
    x, info = jax.jit(lambda b: curvature.cg(lambda v: matrix @ v, b, rtol=rtol))(b)
    assert info.status == Status.CONVERGED
    assert info.num_steps <= 12
    assert_close(matrix @ x, b, dtype, roundings=200)
    assert_close(x, np.linalg.solve(np.asarray(matrix, float), np.asarray(b, float)), dtype, roundings=2000)
    noise = 100 * jnp.finfo(dtype).eps * jnp.linalg.norm(b)
    np.testing.assert_allclose(info.residual_norm, jnp.linalg.norm(b - matrix @ x), atol=noise)


def test_right_hand_sides_are_trees():
    b = {"a": jnp.ones((2, 2)), "b": (jnp.asarray(3.0),)}
    x, info = curvature.cg(lambda v: jax.tree.map(lambda leaf: 2 * leaf, v), b)
    assert jax.tree.structure(x) == jax.tree.structure(b) == jax.tree.structure(info.direction)
    assert_close(flat(x), flat(b) / 2)


@pytest.mark.parametrize("diagonal", [[-1.0, 2.0, 3.0], [1.0, 2.0, -1e-3], [0.0, 0.0, 0.0]])
def test_an_indefinite_operator_is_reported_with_a_direction(diagonal):
    diagonal = jnp.array(diagonal)
    _, info = curvature.cg(lambda v: diagonal * v, jnp.array([1.0, 2.0, 3.0]))
    assert info.status == Status.NEGATIVE_CURVATURE
    p = info.direction
    assert p @ (diagonal * p) <= 0
    assert jnp.linalg.norm(p) > 0
    assert_close(info.min_curvature, p @ (diagonal * p) / (p @ p))


def test_zero_right_hand_side_takes_no_step():
    x, info = curvature.cg(lambda v: v, jnp.zeros(3))
    assert info.status == Status.CONVERGED
    assert info.num_steps == 0
    assert_close(x, jnp.zeros(3))


def test_one_by_one():
    x, info = curvature.cg(lambda v: 4 * v, jnp.asarray(2.0))
    assert info.status == Status.CONVERGED
    assert_close(x, 0.5)


def test_running_out_of_steps_is_no_success():
    matrix = jnp.asarray(spd(20, 1e4))
    x, info = curvature.cg(lambda v: matrix @ v, jnp.ones(20), rtol=1e-10, max_steps=3)
    assert info.status == Status.MAX_STEPS
    assert info.num_steps == 3
    assert_close(info.residual_norm, jnp.linalg.norm(jnp.ones(20) - matrix @ x))
    _, info = curvature.cg(lambda v: matrix @ v, jnp.ones(20), max_steps=0)
    assert info.status == Status.MAX_STEPS


def test_an_unreachable_tolerance_is_no_success():
    matrix = jnp.asarray(spd(20, 1e5), jnp.float32)
    _, info = curvature.cg(lambda v: matrix @ v, jnp.ones(20, jnp.float32), rtol=1e-12, max_steps=10_000)
    assert info.status == Status.STALLED
    assert info.num_steps < 2000


def test_nan_ends_the_solve_at_a_finite_point():
    x, info = curvature.cg(lambda v: jnp.where(v > 0.3, jnp.nan, v), jnp.array([1.0, 0.1]))
    assert info.status == Status.NONFINITE
    assert jnp.all(jnp.isfinite(x))
    _, info = curvature.cg(lambda v: v, jnp.array([jnp.nan]))
    assert info.status == Status.NONFINITE


def test_the_exact_inverse_as_preconditioner_takes_one_step():
    matrix = jnp.asarray(spd(8, 1e3))
    inverse = jnp.linalg.inv(matrix)
    b = jnp.arange(1.0, 9.0)
    x, info = curvature.cg(lambda v: matrix @ v, b, rtol=1e-10, preconditioner=lambda r: inverse @ r)
    assert info.status == Status.CONVERGED
    assert info.num_steps <= 2
    assert_close(x, jnp.linalg.solve(matrix, b), roundings=1e5)


def test_lanes_stop_by_themselves():
    diagonals = jnp.array([[1.0, 2.0], [1.0, -1.0], [0.0, 0.0]])
    _, info = jax.vmap(lambda d: curvature.cg(lambda v: d * v, jnp.ones(2)))(diagonals)
    assert info.status.tolist() == [Status.CONVERGED, Status.NEGATIVE_CURVATURE, Status.NEGATIVE_CURVATURE]


@pytest.mark.parametrize("eigenvalues", [[1.0, 2.0, 5.0], [-1.0, 2.0, 5.0]])
@pytest.mark.parametrize("radius", [1e-3, 0.3, 1e3])
def test_steihaug_descends_within_the_region(eigenvalues, radius):
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    matrix = jnp.asarray((q * np.array(eigenvalues)) @ q.T)
    b = jnp.array([0.6, 0.8, 0.0])
    state = truncated_cg(
        lambda v: matrix @ v, b, tolerance=jnp.asarray(1e-10), max_steps=jnp.asarray(10), radius=jnp.asarray(radius)
    )
    model = state.x @ matrix @ state.x / 2 - b @ state.x
    cauchy = min(radius, float(b @ b / jnp.maximum(b @ matrix @ b, 1e-300))) * b
    assert model <= cauchy @ matrix @ cauchy / 2 - b @ cauchy + 1e-14
    assert jnp.linalg.norm(state.x) <= radius * (1 + 1e-12)
    assert state.on_boundary == (radius < 1e3 or eigenvalues[0] < 0)
    if state.on_boundary:
        assert_close(jnp.linalg.norm(state.x), radius)
    np.testing.assert_allclose(state.r, b - matrix @ state.x, atol=1e-12 * jnp.max(jnp.abs(matrix @ state.x)))


def test_no_retrace_at_a_new_right_hand_side():
    traces = []

    @jax.jit
    def solve(b):
        traces.append(1)
        return curvature.cg(lambda v: 3 * v, b)[0]

    for k in range(3):
        solve(jnp.full(4, float(k + 1)))
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("scale", "size"), [(1e-30, 1e20), (1e30, 1e-20)], ids=["the solution overflows", "the solution underflows"]
)
def test_a_solution_out_of_range_is_no_success(scale, size):
    b = jnp.asarray(size * np.arange(1.0, 4.0), jnp.float32)
    scale = jnp.float32(scale)
    _, info = curvature.cg(lambda v: scale * v, b)
    assert info.status != Status.CONVERGED


def test_the_scale_of_the_preconditioner_and_a_huge_right_hand_side_do_no_harm():
    b = jnp.asarray(1e38 * np.array([1.0, 2.0, 3.0]), jnp.float32)
    x, info = curvature.cg(lambda v: 3 * v, b, preconditioner=lambda r: jnp.float32(1e-30) * r)
    assert info.status == Status.CONVERGED
    assert_close(x, b / 3, jnp.float32)
