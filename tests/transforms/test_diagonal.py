"""The exact diagonal of a Hessian, and what it costs."""

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from tests.oracles import assert_close, assert_trees_close, flat
from tests.scenarios import SCENARIOS, forward_only, make_mlp, mlp_loss, reverse_only

MODES = ["auto", "fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd"]


@pytest.mark.thin
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
@pytest.mark.parametrize("mode", MODES)
def test_the_diagonal_is_the_closed_form(scenario, mode, dtype):
    x, args = scenario.make(dtype)
    got = jax.jit(lambda x: curvature.hessian_diagonal(scenario.fun, x, *args, mode=mode))(x)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, x)
    assert all(leaf.dtype == dtype for leaf in jax.tree.leaves(got))
    assert_close(flat(got), np.diag(scenario.hessian(flat(x), *args)), dtype, roundings=200)


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_chunks_change_nothing(chunk_size):
    params, *data = make_mlp((3, 4, 2), 5, jnp.float64)
    got = jax.jit(lambda params: curvature.hessian_diagonal(mlp_loss, params, *data, chunk_size=chunk_size))(params)
    blocks = curvature.hessian(mlp_loss, blocks="diagonal")(params, *data)
    want = jax.tree.map(lambda leaf, block: jnp.diag(block.reshape(leaf.size, -1)).reshape(leaf.shape), params, blocks)
    assert_trees_close(got, want)


def test_functions_that_some_modes_cannot_differentiate():
    x = {"a": jnp.array([0.2, 0.4]), "b": jnp.array(0.7)}
    got = curvature.hessian_diagonal(lambda x: jnp.sum(reverse_only(x["a"])) * x["b"] ** 2, x)
    assert_trees_close(got, {"a": -jnp.sin(x["a"]) * x["b"] ** 2, "b": 2 * jnp.sum(jnp.sin(x["a"]))})
    got = curvature.hessian_diagonal(lambda x: jnp.sum(forward_only(x["a"])) * x["b"] ** 2, x)
    assert_trees_close(got, {"a": 6 * x["a"] * x["b"] ** 2, "b": 2 * jnp.sum(x["a"] ** 3)})


def test_the_diagonal_passes_through_vmap_and_grad():
    def cubic(x, scale):
        return scale * jnp.sum(x**3) * x[0]

    points = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3)))
    diagonals = jax.jit(jax.vmap(lambda x: curvature.hessian_diagonal(cubic, x, 2.0)))(points)
    oracle = lambda x: jnp.diag(jax.hessian(cubic)(x, 2.0))
    assert_close(diagonals, jax.vmap(oracle)(points))
    for outer in (jax.jacfwd, jax.jacrev):
        third = outer(lambda x: curvature.hessian_diagonal(cubic, x, 2.0, chunk_size=2))(points[0])
        assert_close(third, jax.jacfwd(oracle)(points[0]))


def test_leaves_of_different_precision_keep_their_own():
    x = {"half": jnp.ones(2, jnp.float32), "full": jnp.ones(3, jnp.float64)}

    def fun(x):
        return jnp.sum(x["half"] ** 3).astype(jnp.float64) * jnp.sum(x["full"] ** 2)

    want = {"half": jnp.full(2, 18, jnp.float32), "full": jnp.full(3, 4.0)}
    for mode in MODES:
        assert_trees_close(curvature.hessian_diagonal(fun, x, mode=mode), want, jnp.float32)


# ---- cost ---------------------------------------------------------------------------------------------------------


def largest_array(jaxpr):
    """The number of entries of the largest array that a program writes."""
    sizes = [0]
    for eqn in jaxpr.eqns:
        sizes += [v.aval.size for v in eqn.outvars]
        sizes += [largest_array(body) for body in jex.core.jaxprs_in_params(eqn.params)]
    return max(sizes)


@pytest.mark.slow
def test_twenty_thousand_parameters_take_one_chunk_of_memory():
    n, chunk = 20_000, 50
    x = jnp.zeros(n)
    program = lambda x: curvature.hessian_diagonal(lambda x: jnp.sum(jnp.sin(x) ** 2), x, chunk_size=chunk)
    assert largest_array(jax.make_jaxpr(program)(x).jaxpr) <= chunk * n
    compiled = jax.jit(program).lower(x).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 4 * chunk * n * x.dtype.itemsize
    assert_close(compiled(x), np.full(n, 2.0))


def test_f_is_called_once():
    calls = []

    def counted(x):
        calls.append(1)
        return jnp.sum(jnp.sin(x["a"]) * x["b"])

    for mode in MODES:
        calls.clear()
        curvature.hessian_diagonal(counted, {"a": jnp.arange(3.0), "b": jnp.asarray(2.0)}, mode=mode, chunk_size=2)
        assert len(calls) == 1
