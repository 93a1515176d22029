"""Trace and diagonal from random probes: within their standard errors, exact where they can be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.operators._base import LinearOperator, MatrixOperator
from curvature.operators._pytrees import register_operator, zeros
from tests.oracles import assert_close, flat, tolerance

KEY = jax.random.key(0)
KEYS = jax.random.split(KEY, 50)
N = 80
SPECTRA = {
    "flat": np.linspace(1.0, 2.0, N),
    "decaying": 0.8 ** np.arange(N),
    "of low rank": np.r_[np.arange(1.0, 6.0), np.zeros(N - 5)],
    "indefinite": np.linspace(-1.0, 2.0, N),
    "zero": np.zeros(N),
}


def with_spectrum(eigenvalues, seed=0):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(eigenvalues), len(eigenvalues))))
    return (q * np.asarray(eigenvalues)) @ q.T


@partial(jax.jit, static_argnames="method")
def traces(matrix, keys, method):
    op = MatrixOperator(matrix)
    return jax.vmap(lambda key: curvature.trace(op, key=key, num_samples=16, method=method))(keys)


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_traces_lie_within_four_standard_errors_on_fifty_seeds(dtype, method):
    rng = np.random.default_rng(1)
    cases = [*map(with_spectrum, SPECTRA.values()), rng.normal(size=(N, N)) + 3 * np.eye(N)]
    for matrix in cases:
        truth, noise = np.trace(matrix), tolerance(dtype) * np.abs(matrix).sum(0).max()
        plain = traces(jnp.asarray(matrix, dtype), KEYS, method)
        assert plain.value.dtype == dtype
        error = np.abs(np.asarray(plain.value, float) - truth)
        assert np.all(error <= 4 * np.asarray(plain.standard_error, float) + noise)
        for scale in [1e-20, 1e12]:
            scaled = traces(jnp.asarray(matrix * scale, dtype), KEYS, method)
            np.testing.assert_allclose(scaled.value / scale, plain.value, rtol=1e-4, atol=noise)
            np.testing.assert_allclose(scaled.standard_error / scale, plain.standard_error, rtol=1e-2, atol=noise)


def test_standard_errors_have_the_size_of_the_errors():
    matrix = with_spectrum(SPECTRA["flat"])
    for method in ["hutch++", "hutchinson"]:
        estimate = traces(jnp.asarray(matrix), KEYS, method)
        spread = np.sqrt(np.mean((estimate.value - np.trace(matrix)) ** 2))
        assert 0.7 < spread / np.sqrt(np.mean(estimate.standard_error**2)) < 1.4
    off_diagonal = matrix - np.diag(np.diag(matrix))
    np.testing.assert_allclose(np.mean(estimate.standard_error**2), 2 / 16 * np.sum(off_diagonal**2), rtol=0.3)


def test_deflation_pays_where_the_spectrum_decays():
    decaying, low_rank = (jnp.asarray(with_spectrum(SPECTRA[name])) for name in ["decaying", "of low rank"])
    deflated, plain = traces(decaying, KEYS, "hutch++"), traces(decaying, KEYS, "hutchinson")
    assert jnp.all(deflated.standard_error < 0.2 * plain.standard_error)
    assert jnp.all(traces(low_rank, KEYS, "hutch++").standard_error < 1e-12)


def test_equal_keys_give_equal_answers():
    matrix = jnp.asarray(with_spectrum(SPECTRA["flat"]))
    one, same, other = (traces(matrix, keys, "hutchinson").value for keys in [KEYS, KEYS, KEYS[::-1]])
    assert jnp.array_equal(one, same)
    assert jnp.array_equal(one, other[::-1])
    assert len(np.unique(one)) == len(KEYS)


def test_the_trace_is_exact_where_that_costs_no_more():
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5)))
    estimate = curvature.trace(MatrixOperator(matrix), key=KEY, num_samples=3, method="hutch++")
    assert_close(estimate.value, np.trace(matrix))
    assert estimate.standard_error == 0


@register_operator
class Counting(LinearOperator):
    """A symmetric operator on a nested tree that counts its linearizations and the traces of its product."""

    weights: dict
    is_symmetric = True
    calls = []  # noqa: RUF012

    def mv(self, v):
        raise AssertionError("each product linearizes anew")

    def linearize(self):
        self.calls.append("linearize")
        return lambda v: jax.tree.map(lambda w, leaf: w * jnp.sum(leaf) + leaf, self.weights, v)

    def in_structure(self):
        return jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), self.weights)

    out_structure = in_structure


WEIGHTS = {"a": jnp.full((2, 3), 2.0, jnp.float32), "b": (jnp.asarray(3.0, jnp.float32), jnp.ones(70, jnp.float32))}


def test_probes_share_one_linearization_of_a_nested_tree():
    Counting.calls.clear()
    op = Counting(WEIGHTS)
    whole = jax.jit(lambda: curvature.diagonal(op, key=KEY, num_samples=7, chunk_size=None))()
    assert len(Counting.calls) == 1
    chunked = jax.jit(lambda: curvature.diagonal(op, key=KEY, num_samples=7, chunk_size=3))()
    assert jax.tree.structure(whole.value) == jax.tree.structure(WEIGHTS) == jax.tree.structure(whole.standard_error)
    assert_close(flat(chunked.value), flat(whole.value), jnp.float32)
    assert_close(flat(chunked.standard_error), flat(whole.standard_error), jnp.float32)
    exact = curvature.diagonal(op)
    assert_close(flat(exact.value), flat(WEIGHTS) + 1, jnp.float32)
    assert_close(flat(exact.standard_error), flat(zeros(op.in_structure())))
    Counting.calls.clear()
    for method in ["hutch++", "hutchinson"]:
        estimate = jax.jit(lambda m=method: curvature.trace(op, key=KEY, num_samples=4, method=m, chunk_size=3))()
        assert abs(float(estimate.value) - flat(exact.value).sum()) <= 4 * float(estimate.standard_error) + 1e-3
    assert len(Counting.calls) == 2


def test_diagonals_lie_within_their_standard_errors(dtype):
    @jax.jit
    def diagonals(matrix):
        return jax.vmap(lambda key: curvature.diagonal(MatrixOperator(matrix), key=key, num_samples=40))(KEYS)

    matrix = np.random.default_rng(0).normal(size=(N, N)) + 5 * np.eye(N)
    plain = diagonals(jnp.asarray(matrix, dtype))
    error = np.abs(np.asarray(plain.value, float) - np.diag(matrix)) / np.asarray(plain.standard_error, float)
    assert error.shape == (50, N)
    assert np.mean(error > 4) < 1e-3  # 4,000 entries, of which a normal law puts 0.3 beyond 4
    assert error.max() < 6
    assert 0.9 < np.sqrt(np.mean(error**2)) < 1.15
    off_diagonal = matrix - np.diag(np.diag(matrix))
    np.testing.assert_allclose(np.mean(plain.standard_error**2, 0), np.sum(off_diagonal**2, 1) / 40, rtol=0.25)
    for scale in [1e-20, 1e12]:
        scaled = diagonals(jnp.asarray(matrix * scale, dtype))
        np.testing.assert_allclose(scaled.value / scale, plain.value, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(scaled.standard_error / scale, plain.standard_error, rtol=1e-3)
    diagonal_only = diagonals(jnp.diag(jnp.arange(1.0, N + 1, dtype=dtype)))
    assert not np.any(diagonal_only.standard_error)


@pytest.mark.parametrize("method", ["hutch++", "hutchinson"])
def test_the_derivative_of_a_trace_estimates_that_of_the_trace(method):
    direction = jnp.asarray(with_spectrum(SPECTRA["decaying"], seed=2))
    base = jnp.asarray(with_spectrum(SPECTRA["of low rank"]))

    def slope(key):
        def value(t):
            return curvature.trace(MatrixOperator(base + t * direction), key=key, num_samples=16, method=method).value

        return jax.grad(value)(0.0)

    slopes = jax.jit(jax.vmap(slope))(KEYS)
    assert abs(jnp.mean(slopes) - jnp.trace(direction)) <= 4 * jnp.std(slopes) / len(KEYS) ** 0.5


IDENTITY = MatrixOperator(jnp.eye(3), is_symmetric=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: curvature.trace(jnp.eye(3), key=KEY),
            TypeError,
            r"trace: op is an array .*, expected a curvature.LinearOp",
        ),
        (
            lambda: curvature.trace(MatrixOperator(jnp.ones((2, 3))), key=KEY),
            ValueError,
            r"trace: op gives v of shape \(3,\) the shape \(2,\), expected a square operator",
        ),
        (lambda: curvature.trace(IDENTITY, key=KEY, num_samples=1), ValueError, r"num_samples=1, expected .* >= 2"),
        (lambda: curvature.trace(IDENTITY, key=0), TypeError, r"trace: key is 0 of type int, expected a random key"),
        (lambda: curvature.trace(IDENTITY, key=KEYS), ValueError, r"key has shape \(50,\), expected one key"),
        (lambda: curvature.trace(IDENTITY, key=KEY, method="hutch"), ValueError, r"method='hutch' is unknown"),
        (
            lambda: jax.jit(lambda k: curvature.trace(IDENTITY, key=KEY, num_samples=k))(3),
            TypeError,
            r"num_samples is traced, expected a Python integer",
        ),
        (lambda: curvature.diagonal(IDENTITY, num_samples=4), ValueError, r"diagonal: num_samples= without key="),
        (
            lambda: curvature.logdet(MatrixOperator(jnp.eye(3)), key=KEY),
            ValueError,
            r"logdet: MatrixOperator is not known to be symmetric",
        ),
        (
            lambda: curvature.spectral_density(IDENTITY, key=KEY, grid=jnp.arange(3)),
            ValueError,
            r"spectral_density: grid is .*, expected a vector of floats",
        ),
        (lambda: curvature.spectral_density(IDENTITY, key=KEY, width=0.0), ValueError, r"width=0.0, expected .* > 0"),
    ],
)
@pytest.mark.filterwarnings("ignore::tests.typecheck.AnnotationWarning")
def test_bad_inputs_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
