"""Eager calls of solvers: one compilation for each structure of the operator, and no function kept alive."""

import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import _compile_cache
from curvature.operators._base import MatrixOperator
from tests.linalg.operators import counted
from tests.oracles import assert_close

KEY = jax.random.key(0)
B = np.array([1.0, -2.0, 0.5])
DATA = np.random.default_rng(0).normal(size=(4, 3))


def quartic(x, data):
    return jnp.sum((data @ x) ** 2) + jnp.sum(x**4) / 4


SOLVERS = {
    "cg": lambda op, b, k: curvature.cg(op, b, rtol=10.0**-k, max_steps=20 + k)[0],
    "minres": lambda op, b, k: curvature.minres(op, b, rtol=10.0**-k, max_steps=20 + k)[0],
    "solve": lambda op, b, k: curvature.solve(op, b, rtol=10.0**-k)[0],
    "eigsh": lambda op, b, k: curvature.eigsh(op, 2, rtol=10.0**-k, max_steps=20 + k).eigenvalues,
    "lanczos": lambda op, b, k: curvature.lanczos(op, key=jax.random.key(k), num_steps=2).diagonal,
    "trace": lambda op, b, k: curvature.trace(op, key=jax.random.key(k), num_samples=3).value,
    "diagonal": lambda op, b, k: curvature.diagonal(op).value,
    "logdet": lambda op, b, k: curvature.logdet(op, key=jax.random.key(k)).value,
    "spectral_density": lambda op, b, k: curvature.spectral_density(op, key=jax.random.key(k), width=0.1 + k).weights,
    "check_symmetry": lambda op, b, k: curvature.check_symmetry(op, key=jax.random.key(k)),
    "diagonal_preconditioner": lambda op, b, k: curvature.diagonal_preconditioner(op) @ b,
    "nystrom_preconditioner": lambda op, b, k: (
        curvature.nystrom_preconditioner(op, rank=2, key=jax.random.key(k), damping=0.1 * k) @ b
    ),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", SOLVERS)
def test_a_function_is_traced_once_for_all_points_data_and_numbers(name):
    f, calls = counted(quartic)
    solver = SOLVERS[name]
    results = []
    for k in range(6, 9):
        op = curvature.HessianOperator(f, k * B, k * DATA) + curvature.damping(0.1 * k)
        results.append(solver(op, k * B, k))
        if k == 6:
            first = len(calls)
    assert len(calls) == first
    k = 8
    want = jax.jit(lambda op: solver(op, k * B, k))(
        curvature.HessianOperator(quartic, k * B, k * DATA) + curvature.damping(0.8)
    )
    np.testing.assert_allclose(results[-1], want, rtol=1e-6)


def test_functions_and_preconditioners_are_traced_once():
    f, calls = counted(lambda v: jnp.array([1.0, 2.0, 4.0]) * v)
    inverse, inverse_calls = counted(lambda v: v / 2)
    for k in range(3):
        x, _ = curvature.cg(f, k * B, preconditioner=inverse)
        assert_close(x, k * B / jnp.array([1.0, 2.0, 4.0]), roundings=1e10)
        if k == 0:
            first = len(calls), len(inverse_calls)
    assert (len(calls), len(inverse_calls)) == first


def test_other_structures_and_options_have_programs_of_their_own():
    f, calls = counted(quartic)
    op = curvature.HessianOperator(f, B, DATA)
    assert_close(curvature.eigsh(op, 1, which="SA").eigenvalues, jnp.linalg.eigvalsh(op.as_matrix())[:1])
    assert_close(curvature.eigsh(op, 1, which="LA").eigenvalues, jnp.linalg.eigvalsh(op.as_matrix())[2:])
    assert curvature.eigsh(op, 2).eigenvalues.shape == (2,)
    other = curvature.HessianOperator(lambda x, data: 2 * quartic(x, data), B, DATA)
    assert_close(curvature.diagonal(other).value, 2 * curvature.diagonal(op).value)
    single = curvature.HessianOperator(f, B.astype(np.float32), DATA.astype(np.float32))
    assert curvature.diagonal(single).value.dtype == jnp.float32
    assert calls


def test_no_function_is_kept_alive():
    def solve(k):
        f = lambda x, data: k * quartic(x, data)
        op = curvature.GaussNewtonOperator(lambda w, d: d @ w, lambda z, d: k * jnp.sum(z**2), B, DATA)
        curvature.cg(op + curvature.damping(1.0), B, preconditioner=lambda r: r / k)
        curvature.diagonal(curvature.HessianOperator(f, B, DATA))
        return weakref.ref(f), weakref.ref(op.model), weakref.ref(op.loss)

    gc.collect()
    before = len(_compile_cache._RESULTS)
    references = solve(2.0)
    gc.collect()
    assert [reference() for reference in references] == [None] * 3
    assert len(_compile_cache._RESULTS) == before


class Scaled:
    """A callable object with a method that is a product."""

    def __init__(self, scale):
        self.scale = scale

    def product(self, v):
        return self.scale * v


SCALE = np.array(1.0)


def test_a_function_whose_closure_or_globals_changed_is_compiled_again(monkeypatch):
    scale, matrix = 2.0, jnp.eye(3)

    def shared(v):
        return SCALE * v

    def product(v):
        return scale * (matrix @ shared(v))

    assert_close(curvature.cg(product, B)[0], B / 2)
    scale = 4.0
    assert_close(curvature.cg(product, B)[0], B / 4)
    matrix = 2 * jnp.eye(3)
    assert_close(curvature.cg(product, B)[0], B / 8)
    monkeypatch.setitem(globals(), "SCALE", np.array(4.0))
    assert_close(curvature.cg(product, B)[0], B / 32)


def test_bound_methods_are_never_taken_for_one_another():
    scaled = Scaled(2.0)
    for scale in (2.0, 4.0):
        scaled.scale = scale
        assert_close(curvature.cg(scaled.product, B)[0], B / scale)


def test_data_whose_values_are_needed_to_trace_is_taken_as_it_is():
    def masked(x, mask):
        return jnp.sum(x[mask] ** 2)  # a boolean index needs the values of the mask

    op = curvature.HessianOperator(masked, B, jnp.array([True, False, True])) + curvature.damping(1.0)
    assert_close(curvature.diagonal(op).value, [3.0, 1.0, 3.0])
    assert_close(curvature.cg(op, B)[0], B / jnp.array([3.0, 1.0, 3.0]), roundings=1e10)


def test_numbers_in_the_data_keep_their_meaning():
    op = lambda power: curvature.HessianOperator(lambda x, p: jnp.sum(x**p), B, power)
    assert_close(curvature.diagonal(op(2)).value, [2.0, 2.0, 2.0])
    assert_close(curvature.diagonal(op(3)).value, 6 * B)


def test_errors_come_before_any_compilation():
    with pytest.raises(ValueError, match=r"cg: rtol=-1, expected a number >= 0"):
        curvature.cg(lambda v: v, B, rtol=-1)
    with pytest.raises(ValueError, match=r"eigsh: max_steps=-1, expected an integer >= 0"):
        curvature.eigsh(MatrixOperator(jnp.eye(2), is_symmetric=True), 1, max_steps=-1)
    with pytest.raises(TypeError, match=r"trace: key is an array of shape"):
        curvature.trace(MatrixOperator(jnp.eye(2)), key=jnp.ones(3))


def test_transformations_are_as_before():
    matrix = jnp.diag(jnp.array([1.0, 2.0, 4.0]))
    solve = lambda m, b: curvature.cg(MatrixOperator(m, is_symmetric=True), b, rtol=1e-12)[0]
    want = B / jnp.diagonal(matrix)
    assert_close(solve(matrix, B), want, roundings=1e3)
    assert_close(jax.vmap(solve, (None, 0))(matrix, jnp.asarray(np.stack([B, 2 * B])))[1], 2 * want, roundings=1e3)
    jacobian = jax.jacobian(solve, argnums=1)(matrix, jnp.asarray(B))
    assert_close(jacobian, jnp.linalg.inv(matrix), roundings=1e3)
    by_matrix = jax.jvp(lambda m: solve(m, B), (matrix,), (jnp.eye(3),))[1]
    assert_close(by_matrix, -want / jnp.diagonal(matrix), roundings=1e3)


def test_cleared_caches_compile_again():
    traces = []

    def fun(x):
        traces.append(x)
        return jnp.sum((x - 1) ** 2)

    def traces_of(call):
        before = len(traces)
        call()
        return len(traces) - before

    calls = [
        lambda: curvature.minimize(fun, jnp.zeros(2)),
        lambda: curvature.cg(curvature.HessianOperator(fun, jnp.zeros(2)), jnp.ones(2)),
        lambda: curvature.scipy_minimize(fun, jnp.zeros(2)),
    ]
    for call in calls:
        call()
    assert traces_of(calls[0]) == 0
    assert traces_of(calls[2]) == 0
    curvature.clear_caches()
    assert all(traces_of(call) > 0 for call in calls)


def test_a_function_that_lives_on_remembers_no_result_of_one_that_died():
    def lasting(x):
        return x

    counts = []
    for _ in range(3):
        fleeting = lambda x: x
        assert _compile_cache.cached((fleeting, lasting), "key", lambda: 1) == 1
        del fleeting
        gc.collect()
        counts.append(weakref.getweakrefcount(lasting))
    assert counts[0] == counts[2]


def test_the_result_unused_for_longest_is_dropped(monkeypatch):
    monkeypatch.setattr(_compile_cache, "_MAX_RESULTS", 2)
    curvature.clear_caches()

    def function(x):
        return x

    made = []

    def ask(key):
        return _compile_cache.cached((function,), key, lambda: made.append(key))

    for key in ["a", "b", "a", "c", "a", "b"]:
        ask(key)
    assert made == ["a", "b", "c", "b"]
