"""Lanczos and the eigenvalues of large operators: identities, multiplicities, honest convergence."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.linalg import _eigsh
from curvature.operators._base import MatrixOperator
from tests.linalg.operators import Diagonal, rotated
from tests.oracles import assert_close, flat, tolerance

N = 120
SPECTRUM = np.concatenate([[-9.0, 6.0, 6.0, 6.0, 4.0], np.linspace(-3, 3, N - 5)])


@pytest.fixture(params=["dense", "restarted"])
def way(request, monkeypatch):
    if request.param == "restarted":
        monkeypatch.setattr(_eigsh, "_DENSE", 0)
        monkeypatch.setattr(_eigsh, "_LEAST_BASIS", 12)


@pytest.mark.thin
@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e12])
def test_multiple_eigenvalues_are_found_at_any_scale(dtype, scale):
    op = Diagonal({"a": jnp.asarray(SPECTRUM[:20] * scale, dtype), "b": jnp.asarray(SPECTRUM[20:] * scale, dtype)})
    pairs = jax.jit(lambda op: curvature.eigsh(op, 4, which="LA"))(op)
    assert bool(jnp.all(pairs.converged))
    np.testing.assert_allclose(pairs.eigenvalues / scale, [6, 6, 6, 4], rtol=1e-4)
    vectors = np.concatenate([np.asarray(pairs.eigenvectors[name], float) for name in "ab"], axis=1)
    assert_close(vectors @ vectors.T, np.eye(4), dtype, roundings=200)
    residuals = vectors * flat(op.entries) - np.asarray(pairs.eigenvalues, float)[:, None] * vectors
    assert np.all(np.linalg.norm(residuals, axis=1) <= 1.1e-4 * 9 * scale)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("which", "wanted"), [("SA", [-9, -3]), ("LM", [-9, 6]), ("LA", [6, 6])])
def test_which_eigenvalues(which, wanted):
    pairs = curvature.eigsh(Diagonal(jnp.asarray(SPECTRUM)), 2, which=which, rtol=1e-6)
    assert bool(jnp.all(pairs.converged))
    np.testing.assert_allclose(pairs.eigenvalues, wanted, rtol=1e-6)


@pytest.mark.usefixtures("way")
def test_identity_zero_and_nan():
    for entries, want in ((jnp.ones(N), 1.0), (jnp.zeros(N), 0.0)):
        pairs = curvature.eigsh(Diagonal(entries), 3)
        assert bool(jnp.all(pairs.converged))
        assert_close(pairs.eigenvalues, np.full(3, want), roundings=200)
    pairs = curvature.eigsh(Diagonal(jnp.ones(N).at[3].set(jnp.nan)), 3)
    assert not bool(jnp.any(pairs.converged))
    assert bool(jnp.all(jnp.isnan(pairs.eigenvalues)))


def test_one_by_one_all_of_them_and_too_many():
    pairs = curvature.eigsh(MatrixOperator(jnp.array([[-4.0]]), is_symmetric=True), 1)
    assert_close(pairs.eigenvalues, [-4.0])
    pairs = curvature.eigsh(rotated([1.0, -2.0, 3.0]), 3)
    assert_close(pairs.eigenvalues, [3.0, -2.0, 1.0])
    with pytest.raises(ValueError, match="eigsh: k=4, expected an integer from 1 to 3"):
        curvature.eigsh(rotated([1.0, -2.0, 3.0]), 4)


@pytest.mark.usefixtures("way")
def test_an_asymmetric_operator_is_not_converged():
    matrix = np.triu(np.random.default_rng(0).normal(size=(N, N)))
    pairs = curvature.eigsh(MatrixOperator(jnp.asarray(matrix)), 2, max_steps=5)
    assert not bool(jnp.any(pairs.converged))


@pytest.mark.usefixtures("way")
def test_lanes_and_keys():
    lanes = jnp.stack([jnp.asarray(SPECTRUM), -2 * jnp.asarray(SPECTRUM)])
    found = jax.vmap(lambda d: curvature.eigsh(Diagonal(d), 1, which="LM", key=jax.random.key(3)).eigenvalues)(lanes)
    np.testing.assert_allclose(found[:, 0], [-9, 18], rtol=1e-6)


@partial(jax.jit, static_argnames="num_steps")
def lanczos(op, num_steps):
    return curvature.lanczos(op, key=jax.random.key(0), num_steps=num_steps)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e12])
def test_lanczos_tridiagonalizes(dtype, scale):
    op = rotated(np.linspace(-2, 3, 15) * scale, dtype)
    found = lanczos(op, 9)
    assert_identities(found, op, dtype, scale)
    whole = lanczos(op, 15)
    assert_close(np.linalg.eigvalsh(tridiagonal(whole)), np.linspace(-2, 3, 15) * scale, dtype, roundings=500)


@pytest.mark.parametrize("eigenvalues", [np.ones(15), np.zeros(15), np.repeat([1.0, 5.0, 7.0], 5)])
def test_lanczos_goes_on_where_the_space_is_exhausted(dtype, eigenvalues):
    op = rotated(eigenvalues, dtype)
    found = lanczos(op, 15)
    assert_identities(found, op, dtype, 1.0)
    assert_close(np.sort(np.linalg.eigvalsh(tridiagonal(found))), eigenvalues, dtype, roundings=1000)


def tridiagonal(found):
    off = np.asarray(found.off_diagonal, float)
    return np.diag(np.asarray(found.diagonal, float)) + np.diag(off, 1) + np.diag(off, -1)


def assert_identities(found, op, dtype, scale):
    q, matrix = np.asarray(found.basis, float).T, np.asarray(op.matrix, float)
    assert_close(q.T @ q, np.eye(q.shape[1]), dtype, roundings=100)
    rest = matrix @ q - q @ tridiagonal(found)
    rest[:, -1] -= flat(found.residual)
    assert np.abs(rest).max() <= tolerance(dtype, 1000) * scale


@pytest.fixture(scope="module")
def wishart():
    """The lowest eigenvalues lie within 1e-4 of the largest, and closer together than that."""
    factor = np.random.default_rng(0).normal(size=(700, 700))
    return factor @ factor.T / 700


@pytest.mark.slow
@pytest.mark.parametrize(("which", "rtol"), [("SA", 1e-9), ("LA", 1e-9), ("LM", 1e-12)])
def test_clustered_eigenvalues_are_found_to_the_tolerance(wishart, which, rtol):
    pairs = curvature.eigsh(
        MatrixOperator(jnp.asarray(wishart), is_symmetric=True), 4, which=which, rtol=rtol, max_steps=1000
    )
    values = np.linalg.eigvalsh(wishart)
    assert bool(jnp.all(pairs.converged))
    assert float(jnp.max(pairs.residuals)) <= rtol * values[-1]
    want = values[:4] if which == "SA" else values[::-1][:4]
    np.testing.assert_allclose(pairs.eigenvalues, want, rtol=0, atol=1e-12)


def test_max_steps_bounds_the_restarts_and_no_fewer_are_made(wishart):
    op = MatrixOperator(jnp.asarray(wishart), is_symmetric=True)
    few, more = (curvature.eigsh(op, 4, which="SA", rtol=1e-9, max_steps=steps) for steps in (20, 60))
    assert not bool(jnp.any(few.converged))
    assert float(jnp.max(more.residuals)) < 0.1 * float(jnp.max(few.residuals))


@pytest.mark.slow
def test_single_precision_stops_at_its_rounding_level(wishart):
    op = MatrixOperator(jnp.asarray(wishart, jnp.float32), is_symmetric=True)
    pairs = curvature.eigsh(op, 4, which="SA", rtol=1e-12, max_steps=100_000)  # ends
    assert not bool(jnp.any(pairs.converged))
    np.testing.assert_allclose(pairs.eigenvalues, np.linalg.eigvalsh(wishart)[:4], rtol=0, atol=1e-5)
    assert bool(jnp.all(curvature.eigsh(op, 4, which="SA", rtol=1e-5, max_steps=1000).converged))
