"""Sparse Hessians and Jacobians against dense oracles and closed forms."""

import inspect
import runpy
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental.sparse import BCOO
from jax.flatten_util import ravel_pytree

import curvature
from curvature._errors import calling
from curvature.transforms import _sparse
from curvature.transforms._sparse import asdex
from tests.oracles import assert_close, dense_hessian
from tests.scenarios import SCENARIOS, forward_only, reverse_only

ROSENBROCK = SCENARIOS[1]


def rosenbrock(x):
    return ROSENBROCK.fun(x)


def chain(n, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(0).normal(size=n), dtype)


def coupled(x, scale, shift):
    """Neighbors in a chain of three leaves; ``shift`` is an integer array."""
    flat = jnp.concatenate([x["a"].reshape(-1), x["b"][0][None], x["b"][1]])
    return scale * jnp.sum((flat[1:] - jnp.sin(flat[:-1])) ** 4) + jnp.sum(flat * shift.astype(flat.dtype))


def nested(dtype=jnp.float64):
    return {"a": chain(6, dtype).reshape(2, 3), "b": (jnp.asarray(0.3, dtype), chain(2, dtype))}


@pytest.mark.parametrize("mode", ["auto", "fwd_over_rev", "rev_over_rev", "rev_over_fwd"])
def test_the_hessian_is_the_closed_form(mode, dtype):
    x = chain(12, dtype)
    sparse = curvature.sparse_hessian(rosenbrock, jnp.zeros_like(x), mode=mode)
    got = jax.jit(sparse)(x)
    assert got.nse == 3 * 12 - 2
    assert got.dtype == dtype
    assert_close(got.todense(), ROSENBROCK.hessian(np.asarray(x, np.float64)), dtype, roundings=200)


@pytest.mark.slow
def test_trees_and_data_take_new_values_without_a_new_trace(dtype):
    traces = []

    def counted(x, *args):
        traces.append(1)
        return coupled(x, *args)

    x = nested(dtype)
    args = jnp.asarray(2.0, dtype), jnp.arange(9)
    sparse = jax.jit(curvature.sparse_hessian(counted, x, *args))
    for factor in (1, 2):
        point = jax.tree.map(lambda leaf, factor=factor: factor * leaf, x)
        data = factor * args[0], args[1] + factor
        assert_close(sparse(point, *data).todense(), dense_hessian(coupled, point, *data), dtype, roundings=200)
        if factor == 1:
            traced = len(traces)
    assert len(traces) == traced


PATTERNS = {
    "dense": lambda mask: mask,
    "upper": np.triu,
    "jax": lambda mask: BCOO.fromdense(jnp.asarray(mask, float)),
    "padded": lambda mask: BCOO.fromdense(jnp.asarray(mask, float), nse=40),
    "scipy": scipy.sparse.csr_array,
    "scipy-matrix": scipy.sparse.coo_matrix,
    "another": lambda mask: asdex.SparsityPattern.from_dense(mask),
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_a_pattern_may_be_given_in_any_form(kind):
    x = chain(8)
    mask = np.abs(np.subtract.outer(np.arange(8), np.arange(8))) <= 1
    got = curvature.sparse_hessian(rosenbrock, x, pattern=PATTERNS[kind](mask))(x)
    assert got.nse == mask.sum()
    assert_close(got.todense(), ROSENBROCK.hessian(np.asarray(x)), roundings=200)


def test_a_product_shows_that_a_pattern_misses_entries():
    """As the docstring says how to find out."""
    x, v = chain(8), chain(8)[::-1]
    for width, agrees in ((1, True), (0, False)):
        mask = np.abs(np.subtract.outer(np.arange(8), np.arange(8))) <= width
        product = curvature.sparse_hessian(rosenbrock, x, pattern=mask)(x) @ v
        assert np.allclose(product, curvature.hvp(rosenbrock, x, v)) == agrees


def stencil(x, scale):
    flat = jnp.concatenate([x["a"].reshape(-1), x["b"][0][None], x["b"][1]])
    return {"inner": scale * flat[1:-1] ** 2 - flat[:-2], "last": (jnp.sin(flat[-1]),)}


@pytest.mark.parametrize("mode", ["auto", "fwd", "rev"])
def test_the_jacobian_is_that_of_jax(mode, dtype):
    x, scale = nested(dtype), jnp.asarray(1.5, dtype)
    vector, unravel = ravel_pytree(x)
    want = jax.jacobian(lambda vector: ravel_pytree(stencil(unravel(vector), scale))[0])(vector)
    got = jax.jit(curvature.sparse_jacobian(stencil, x, scale / 2, mode=mode))(x, scale)
    assert got.shape == (8, 9)
    assert got.nse == 15
    assert_close(got.todense(), want, dtype)
    given = curvature.sparse_jacobian(stencil, x, scale, mode=mode, pattern=want != 0)(x, scale)
    assert_close(given.todense(), want, dtype)


# Each of the data k; at k = 0, where the patterns are found, other entries meet than at k = 2.
OF_AN_INTEGER = {
    "index": lambda x, k: x[k] ** 3 * x[0],
    "shift": lambda x, k: jnp.sum(jnp.roll(x, k) * x**2),
    "slice": lambda x, k: jnp.sum(jax.lax.dynamic_slice(x, (k,), (2,)) ** 3) * x[1],
    "factor": lambda x, k: jnp.sum(k.astype(x.dtype) * x[1:] * x[:-1]),
    "mask": lambda x, k: jnp.sum(jnp.where(jnp.arange(6) == k, x**2 * x[0], x)),
    "sums": lambda x, k: jnp.sum(jnp.cumsum(jnp.where(jnp.arange(6) < k, x, 0)) ** 2),
}


@pytest.mark.thin
@pytest.mark.filterwarnings("ignore:Coloring used")
@pytest.mark.parametrize("kind", [int, np.int32, np.asarray, jnp.asarray])
@pytest.mark.parametrize("name", OF_AN_INTEGER)
def test_a_pattern_holds_for_all_values_of_the_data(name, kind):
    def fun(x, k):
        return OF_AN_INTEGER[name](x, jnp.asarray(k))

    x = chain(6)
    want = jax.hessian(fun)(x, 2)
    with jax.numpy_dtype_promotion("standard"):
        assert_close(curvature.sparse_hessian(fun, x, kind(0))(x, kind(2)).todense(), want)
        assert_close(curvature.sparse_jacobian(jax.grad(fun), x, kind(0))(x, kind(2)).todense(), want)


@pytest.mark.filterwarnings("ignore:Coloring used")
@pytest.mark.parametrize("kind", ["spectrum", "least"])
def test_a_function_without_a_known_pattern_needs_one(kind):
    def fun(x):
        return jnp.sum(jnp.abs(jnp.fft.fft(x**2)) ** 2) if kind == "spectrum" else x[jnp.argsort(x)[0]] ** 3

    x = chain(4)
    for name, f in {"sparse_hessian": fun, "sparse_jacobian": jax.grad(fun)}.items():
        with pytest.raises(NotImplementedError, match=rf"{name}: asdex cannot find the pattern .*; pass pattern="):
            getattr(curvature, name)(f, x)
        got = getattr(curvature, name)(f, x, pattern=np.ones((4, 4)))
        assert_close(got(x).todense(), jax.hessian(fun)(x))


def test_functions_that_some_modes_cannot_differentiate():
    x = chain(5)
    mask = np.eye(5, dtype=bool)
    sparse = curvature.sparse_hessian(lambda x: jnp.sum(reverse_only(x)), x, pattern=mask)
    assert_close(sparse(x).todense(), np.diag(-np.sin(x)))
    sparse = curvature.sparse_jacobian(forward_only, x, pattern=mask)
    assert_close(sparse(x).todense(), np.diag(3 * np.asarray(x) ** 2))


def test_results_pass_through_vmap_and_grad():
    x = chain(6)
    sparse = curvature.sparse_hessian(rosenbrock, x)
    points = jnp.stack([x, 2 * x])
    data = jax.vmap(lambda x: sparse(x).data)(points)
    assert_close(data, jnp.stack([sparse(point).data for point in points]))
    third = jax.grad(lambda x: jnp.sum(sparse(x).data ** 2))(x)
    assert_close(third, jax.grad(lambda x: jnp.sum(jax.hessian(rosenbrock)(x) ** 2))(x), roundings=500)


def test_a_function_without_curvature_has_an_empty_hessian():
    x = chain(4)
    got = curvature.sparse_hessian(jnp.sum, x)(x)
    assert got.nse == 0
    assert_close(got.todense(), np.zeros((4, 4)))


def test_the_number_of_products_does_not_grow_with_the_size():
    def lanes(n):
        x = chain(n)
        compiled = jax.make_jaxpr(curvature.sparse_hessian(rosenbrock, x))(x).jaxpr.eqns[0]
        shapes = [v.aval.shape for eqn in compiled.params["jaxpr"].jaxpr.eqns for v in eqn.outvars]
        return max(min(shape) for shape in shapes if len(shape) == 2 and max(shape) >= n - 1)

    assert lanes(20) == lanes(200) <= 3


def prepare_functions():
    """The module as a process finds it that imports it now."""
    module = runpy.run_path(inspect.getsourcefile(inspect.unwrap(curvature.sparse_hessian)))
    return [module["sparse_hessian"], module["sparse_jacobian"]]


def test_without_asdex_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "asdex", None)
    for prepare in prepare_functions():
        with pytest.raises(ModuleNotFoundError, match=r"needs asdex.*; pip install 'curvature-jax\[sparse\]'"):
            prepare(rosenbrock, chain(3))


def test_an_asdex_made_for_another_jax_does_not_stop_the_import(monkeypatch, tmp_path):
    (tmp_path / "asdex.py").write_text("from jax import what_is_gone")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "asdex", raising=False)
    for prepare in prepare_functions():
        with pytest.raises(ImportError, match=r"asdex, whose import fails: cannot import name 'what_is_gone'"):
            prepare(rosenbrock, chain(3))


def test_more_entries_than_an_index_can_count_are_refused():
    expected = pytest.raises(ValueError, match=r"sparse_hessian: 3 products of 1,000,000,000 entries.*split x")
    with calling("sparse_hessian"), expected:
        _sparse._check_index_range((3, 10**9))
