"""Per-example derivatives against one example at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from tests.oracles import assert_close, assert_trees_close


def loss(params, example, label):
    return jnp.tanh(params["w"] @ example["x"] + params["b"]) * label


@pytest.fixture
def problem(dtype):
    rng = np.random.default_rng(4)
    params = {"w": jnp.asarray(rng.normal(size=3), dtype), "b": jnp.asarray(0.1, dtype)}
    return params, {"x": jnp.asarray(rng.normal(size=(5, 3)), dtype)}, jnp.asarray(rng.normal(size=5), dtype)


@pytest.mark.parametrize("chunk_size", [None, 2, "auto"])
def test_per_example_grad_is_the_closed_form(problem, dtype, chunk_size):
    params, example, labels = problem
    grads = jax.jit(curvature.per_example_grad(loss, chunk_size=chunk_size))(params, example, labels)
    slope = (1 - np.tanh(example["x"] @ params["w"] + params["b"]) ** 2) * labels
    assert_close(grads["b"], slope, dtype)
    assert_close(grads["w"], slope[:, None] * np.asarray(example["x"]), dtype)


def test_per_example_grads_average_to_the_gradient_of_the_mean(problem, dtype):
    params, *batch = problem
    grads = curvature.per_example_grad(loss)(params, *batch)
    mean = jax.grad(lambda p: jnp.mean(jax.vmap(loss, (None, 0, 0))(p, *batch)))(params)
    assert_trees_close(jax.tree.map(lambda g: jnp.mean(g, axis=0), grads), mean, dtype)


@pytest.mark.parametrize("mode", ["auto", "rev_over_rev", "fwd_over_fwd"])
def test_per_example_hessian_is_one_hessian_each(problem, dtype, mode):
    params, *batch = problem
    got = curvature.per_example_hessian(loss, mode=mode, chunk_size=2)(params, *batch)
    examples = [({"x": batch[0]["x"][i]}, batch[1][i]) for i in range(5)]
    want = [jax.hessian(loss)(params, *example) for example in examples]
    assert_trees_close(got, jax.tree.map(lambda *blocks: jnp.stack(blocks), *want), dtype)
