"""Log-determinants and spectral densities by Lanczos quadrature, degenerate spectra among them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.operators._base import MatrixOperator
from tests.linalg.test_trace import WEIGHTS, Counting, with_spectrum
from tests.oracles import assert_close, tolerance

KEY = jax.random.key(1)
KEYS = jax.random.split(KEY, 50)
N = 260
EXTRA = (np.arange(61, N),) * 2


def symmetric(matrix):
    return MatrixOperator(matrix, is_symmetric=True)


@jax.jit
def logdets(matrix):
    """By quadrature: its 32 times 8 products are fewer than the columns."""
    op = symmetric(matrix)
    return jax.vmap(lambda key: curvature.logdet(op, key=key, num_samples=32, num_steps=8))(KEYS)


@pytest.mark.slow
def test_logdets_lie_within_four_standard_errors_on_fifty_seeds(dtype):
    for condition, scale in [(1.0, 1.0), (10.0, 1e-20), (10.0, 1e12), (1e3, 1.0)]:
        eigenvalues = np.geomspace(1.0, condition, N)
        truth = np.sum(np.log(eigenvalues)) + N * np.log(scale)
        estimate = logdets(jnp.asarray(with_spectrum(eigenvalues) * scale, dtype))
        error = np.abs(np.asarray(estimate.value, float) - truth)
        noise = tolerance(dtype) * N * (1 + abs(np.log(scale)))
        assert np.all(error <= 4 * np.asarray(estimate.standard_error, float) + noise)


@jax.jit
def dense_logdet(matrix):
    return curvature.logdet(symmetric(matrix), key=KEY)


@pytest.mark.parametrize("lowest", [[-1.0], [0.0], [0.0] * 60, [-1e-3] * 3, [np.nan]])
def test_logdet_of_what_is_not_positive_definite_is_nan(lowest):
    """Of the eigenvalues all are seen; of the Ritz values those that stand out."""
    eigenvalues = np.r_[lowest, np.linspace(1.0, 2.0, 60)]
    matrix = jnp.asarray(with_spectrum(eigenvalues) if np.isfinite(lowest[0]) else np.full((61, 61), np.nan))
    assert np.isnan(dense_logdet(matrix).value)
    if lowest in ([-1.0], [np.nan]):
        estimate = logdets(jnp.pad(matrix, ((0, N - 61),) * 2, constant_values=0.0).at[EXTRA].set(1.0))
        assert np.all(np.isnan(estimate.value))
        assert np.all(np.isnan(estimate.standard_error))


def test_logdet_of_small_operators_is_exact(dtype):
    matrix = jnp.asarray(with_spectrum([1.0, 2.0, 5.0]), dtype)
    estimate = curvature.logdet(symmetric(matrix), key=KEY)
    assert_close(estimate.value, np.log(10.0), dtype)
    assert estimate.standard_error == 0


def test_the_derivative_of_logdet_is_the_trace_of_the_relative_change():
    base = jnp.asarray(with_spectrum(np.geomspace(1.0, 10.0, N)))
    change = jnp.asarray(with_spectrum(np.linspace(0.0, 1.0, N), seed=1))

    def slope(key):
        def value(t):
            return curvature.logdet(symmetric(base + t * change), key=key, num_samples=32, num_steps=8).value

        return jax.grad(value)(0.0)

    slopes = jax.jit(jax.vmap(slope))(KEYS)
    truth = jnp.trace(jnp.linalg.solve(base, change))
    assert abs(jnp.mean(slopes) - truth) <= 4 * jnp.std(slopes) / len(KEYS) ** 0.5


def smoothed(eigenvalues, grid, width):
    """The oracle: the mean of Gaussians at the eigenvalues."""
    z = (np.asarray(grid, float)[:, None] - eigenvalues) / float(width)
    return np.mean(np.exp(-(z**2) / 2), 1) / (float(width) * np.sqrt(2 * np.pi))


def test_the_density_matches_a_dense_histogram_of_a_thousand_eigenvalues():
    rng = np.random.default_rng(0)
    eigenvalues = np.r_[rng.uniform(-1, 0, 400), 0.3 * rng.normal(size=590) + 2, np.linspace(4, 5, 10)]
    op = symmetric(jnp.asarray(with_spectrum(eigenvalues), jnp.float32))
    spectrum = jax.jit(lambda op: curvature.spectral_density(op, key=KEY, num_steps=100))(op)
    assert spectrum.ritz_values.shape == spectrum.weights.shape == (16, 100)
    np.testing.assert_allclose(jnp.trapezoid(spectrum.density, spectrum.grid), 1, rtol=1e-5)
    np.testing.assert_allclose(jnp.sum(spectrum.weights, 1), 1, rtol=1e-5)
    edges = np.linspace(-1.75, 5.75, 16)
    histogram = np.histogram(eigenvalues, edges)[0] / 1000
    grid, density = np.asarray(spectrum.grid, float), np.asarray(spectrum.density, float)
    fine = np.linspace(edges[:-1], edges[1:], 101)
    shares = np.trapezoid(np.interp(fine, grid, density), fine, axis=0)
    assert np.abs(shares - histogram).sum() < 0.1  # the width moves a few eigenvalues over the edges
    width = (np.ptp(spectrum.ritz_values)) / 100
    truth = smoothed(eigenvalues, grid, width)
    error = np.asarray(spectrum.standard_error, float) + 1e-3 * truth.max()
    assert np.all(np.abs(density - truth) <= 4 * error)


@pytest.mark.slow
def test_densities_lie_within_four_standard_errors_on_fifty_seeds(dtype):
    eigenvalues = np.r_[np.zeros(40), np.linspace(0.0, 1.0, 80)]
    grid, width = jnp.asarray([-0.1, 0.0, 0.2, 0.5, 0.9], dtype), 0.1

    def densities(key, scale):
        op = symmetric(scale * jnp.asarray(with_spectrum(eigenvalues), dtype))
        return curvature.spectral_density(
            op, key=key, num_samples=32, num_steps=40, grid=scale * grid, width=scale * width
        )

    run = jax.jit(jax.vmap(densities, (0, None)))
    truth = smoothed(eigenvalues, grid, width)
    for scale in [1.0, 1e-20, 1e12]:
        spectra = run(KEYS, jnp.asarray(scale, dtype))
        error = np.abs(np.asarray(spectra.density, float) * scale - truth)
        assert np.all(error <= 4 * np.asarray(spectra.standard_error, float) * scale + 1e-4)


@jax.jit
def spectrum_of(matrix):
    return curvature.spectral_density(symmetric(matrix), key=KEY, num_samples=8, num_steps=30)


@pytest.mark.parametrize(
    ("matrix", "level"),
    [(np.eye(60), 1.0), (np.zeros((60, 60)), 0.0), (-3e-20 * np.eye(60), -3e-20), (np.full((1, 1), 5.0), 5.0)],
    ids=["identity", "zero", "minus identity", "1 x 1"],
)
def test_one_eigenvalue_gives_one_peak(dtype, matrix, level):
    spectrum = spectrum_of(jnp.asarray(matrix, dtype))
    np.testing.assert_allclose(spectrum.ritz_values, level, rtol=tolerance(dtype))
    np.testing.assert_allclose(jnp.sum(spectrum.weights, 1), 1, rtol=tolerance(dtype))
    np.testing.assert_allclose(jnp.trapezoid(spectrum.density, spectrum.grid), 1, rtol=1e-3)
    assert np.all(np.isfinite(spectrum.density))


def test_lanczos_beyond_the_distinct_eigenvalues_finds_no_others():
    levels = np.array([1.0, 2.0, 4.0])
    matrix = with_spectrum(np.repeat(levels, 20))
    spectrum = spectrum_of(jnp.asarray(matrix))
    nodes, weights = np.asarray(spectrum.ritz_values), np.asarray(spectrum.weights)
    nearest = np.argmin(np.abs(nodes[..., None] - levels), axis=-1)
    assert_close(nodes, levels[nearest], roundings=1000)
    assert_close(np.sum(weights, axis=1), np.ones(8))
    shares = np.mean([[weights[i, nearest[i] == level].sum() for level in range(3)] for i in range(8)], axis=0)
    np.testing.assert_allclose(shares, 1 / 3, atol=0.1)


def test_all_steps_give_every_eigenvalue_once():
    eigenvalues = np.linspace(1.0, 2.0, 12)
    spectrum = spectrum_of(jnp.asarray(with_spectrum(eigenvalues)))
    assert_close(spectrum.ritz_values, np.tile(eigenvalues, (8, 1)), roundings=1e5)


@pytest.mark.parametrize("function", [curvature.spectral_density, curvature.logdet])
def test_probes_share_one_linearization(function):
    Counting.calls.clear()
    op = Counting(WEIGHTS)

    def run(chunk_size):
        return jax.jit(lambda: function(op, key=KEY, num_samples=3, num_steps=4, chunk_size=chunk_size))()

    whole, chunked = run(None), run(2)
    assert len(Counting.calls) == 2
    assert_close(chunked[0], whole[0], jnp.float32, roundings=1e3)
