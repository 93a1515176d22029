"""scipy_minimize: each of SciPy's methods gets the derivatives that it takes, compiled once, and trees come back."""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize

import curvature
from curvature.solvers._scipy import ScipyMethod
from tests.oracles import assert_close
from tests.scenarios import SCENARIOS, forward_only


def bowl(x, shift):
    """Least at ``a = shift, b = -1``."""
    return jnp.sum(jnp.cosh(x["a"] - shift)) + (x["b"] + 1) ** 2


X0 = {"a": np.zeros((2, 1)), "b": np.asarray(1.0)}
SHIFT = np.array([[0.5], [-0.25]])


@pytest.mark.parametrize("method", [None, *get_args(ScipyMethod)])
def test_every_method_of_scipy_runs_on_trees(method):
    loose = method in ("Nelder-Mead", "Powell", "COBYLA", "COBYQA", "SLSQP")  # these test values
    result = curvature.scipy_minimize(bowl, X0, SHIFT, method=method, tol=1e-6)
    assert result.success, result.message
    np.testing.assert_allclose(result.x["a"], SHIFT, atol=3e-3 if loose else 1e-5)
    np.testing.assert_allclose(result.x["b"], -1.0, atol=3e-3 if loose else 1e-5)
    assert result.x["a"].dtype == jnp.float64
    assert isinstance(result.x_flat, np.ndarray)
    assert result.x_flat.shape == (3,)


def test_the_iterations_are_those_of_scipy_with_derivatives_by_hand():
    fun, start = scipy.optimize.rosen, np.array([-1.2, 1.0, 0.7])
    ours = lambda x: jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
    hands = {"jac": scipy.optimize.rosen_der, "hess": scipy.optimize.rosen_hess}
    for method in ("BFGS", "trust-exact", "trust-ncg"):
        taken = hands if method != "BFGS" else {"jac": hands["jac"]}
        want = scipy.optimize.minimize(fun, start, method=method, **taken)
        got = curvature.scipy_minimize(ours, start, method=method)
        assert got.nit == want.nit
        assert_close(got.x, want.x, roundings=1e6)


def test_one_compilation_for_all_points_and_data():
    traces = []

    def traced(x, shift):
        traces.append(1)
        return jnp.sum((x - shift) ** 4) + jnp.sum((x - shift) ** 2)

    curvature.scipy_minimize(traced, np.zeros(3), jnp.ones(3), method="trust-exact")
    count = len(traces)
    result = curvature.scipy_minimize(traced, np.ones(3), 2 * jnp.ones(3), method="trust-exact", tol=1e-10)
    assert len(traces) == count
    assert_close(result.x, np.full(3, 2.0), roundings=1e9)


@pytest.mark.parametrize("method", ["L-BFGS-B", "TNC", "SLSQP", "trust-constr", "Nelder-Mead", None])
def test_bounds_are_trees(method):
    bounds = ({"a": -np.inf, "b": -0.5}, {"a": np.array([[0.25], [np.inf]]), "b": None})
    result = curvature.scipy_minimize(bowl, X0, SHIFT, method=method, bounds=bounds, tol=1e-8)
    np.testing.assert_allclose(result.x_flat, [0.25, -0.25, -0.5], atol=1e-3)


def test_single_precision_goes_through_scipy_widened():
    x0 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), X0)
    result = curvature.scipy_minimize(bowl, x0, SHIFT.astype(np.float32), method="L-BFGS-B", tol=1e-4)
    assert result.success
    assert result.x["a"].dtype == jnp.float32
    assert result.x_flat.dtype == result.jac.dtype == np.float64
    np.testing.assert_allclose(result.x["a"], SHIFT, atol=1e-2)


def test_callbacks_are_told_trees_and_can_stop():
    told = []

    def by_position(x):
        told.append(x)

    def by_name(intermediate_result):
        told.append(intermediate_result.x)
        if len(told) == 3:
            raise StopIteration

    result = curvature.scipy_minimize(bowl, X0, SHIFT, method="BFGS", callback=by_position)
    assert len(told) == result.nit
    assert jax.tree.structure(told[0]) == jax.tree.structure(X0)
    told.clear()
    result = curvature.scipy_minimize(bowl, X0, SHIFT, method="CG", callback=by_name, options={"gtol": 1e-12})
    assert len(told) == 3
    assert not result.success


def test_an_objective_without_reverse_mode():
    result = curvature.scipy_minimize(
        lambda x: jnp.sum(forward_only(x) ** 2 + (x - 1) ** 2), np.array([0.5, -0.8]), method="BFGS"
    )
    assert np.max(np.abs(result.jac)) <= 1e-5


def test_what_cannot_be_looked_up_is_compiled_each_time():
    class Unhashable:
        __hash__ = None

        def __call__(self, x):
            return jnp.sum((x - 1) ** 2)

    assert_close(curvature.scipy_minimize(Unhashable(), np.zeros(2)).x, np.ones(2), roundings=1e9)


def test_a_scenario_with_nested_leaves():
    x0, args = SCENARIOS[2].make(jnp.float64)
    result = curvature.scipy_minimize(SCENARIOS[2].fun, x0, args, method="trust-ncg", tol=1e-9)
    ours = curvature.minimize(SCENARIOS[2].fun, x0, args)
    np.testing.assert_allclose(result.fun, ours.value, rtol=1e-9)
    assert jax.tree.structure(result.x) == jax.tree.structure(x0)
