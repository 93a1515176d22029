"""hvp, linearize_grad and hessian against closed forms, dense oracles and JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from tests.oracles import assert_close, assert_trees_close, dense_blocks, flat
from tests.scenarios import SCENARIOS, make_mlp, mlp_loss

MODES = ["auto", "fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd"]
scenarios = pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)


def direction_like(x, seed=3):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), x)


@pytest.mark.thin
@scenarios
@pytest.mark.parametrize("mode", MODES)
def test_hvp_is_the_closed_form(scenario, mode, dtype):
    x, args = scenario.make(dtype)
    v = direction_like(x)
    product = jax.jit(lambda x, v: curvature.hvp(scenario.fun, x, v, *args, mode=mode))(x, v)
    assert jax.tree.structure(product) == jax.tree.structure(x)
    assert_close(flat(product), scenario.hessian(flat(x), *args) @ flat(v), dtype, roundings=200)


@pytest.mark.thin
@scenarios
@pytest.mark.parametrize("mode", MODES)
def test_linearize_grad_is_the_closed_form(scenario, mode, dtype):
    x, args = scenario.make(dtype)
    v = direction_like(x)

    @jax.jit
    def everything(x, v):
        value, grad, hvp_fn = curvature.linearize_grad(scenario.fun, x, *args, mode=mode)
        return value, grad, hvp_fn(v)

    value, grad, product = everything(x, v)
    assert_close(value, scenario.fun(x, *args), dtype)
    assert_close(flat(grad), scenario.gradient(flat(x), *args), dtype, roundings=200)
    assert_close(flat(product), scenario.hessian(flat(x), *args) @ flat(v), dtype, roundings=200)


@pytest.mark.thin
@scenarios
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk_size", [None, 3, "auto"])
def test_hessian_is_the_closed_form_and_jaxs_tree(scenario, mode, chunk_size):
    x, args = scenario.make(jnp.float64)
    result = jax.jit(curvature.hessian(scenario.fun, mode=mode, chunk_size=chunk_size))(x, *args)
    assert_trees_close(result, jax.jit(jax.hessian(scenario.fun))(x, *args))
    assert_close(dense_blocks(result, x), scenario.hessian(flat(x), *args), roundings=200)


@scenarios
def test_hessian_in_single_precision(scenario):
    x, args = scenario.make(jnp.float32)
    result = jax.jit(curvature.hessian(scenario.fun))(x, *args)
    assert_trees_close(result, jax.jit(jax.hessian(scenario.fun))(x, *args), jnp.float32, roundings=200)


def two_arguments(a, data, b):
    out = {"first": jnp.sum(a["p"] ** 3) * b * data[:2], "second": (jnp.sin(b) * a["p"][0, 1],)}
    return out, {"kept": data + 1}


@pytest.mark.thin
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("argnums", [0, 2, (0, 2), (2, 0), -1])
def test_hessian_of_many_outputs_arguments_and_aux(mode, argnums):
    args = ({"p": jnp.arange(1.0, 7.0).reshape(2, 3)}, jnp.arange(4.0), jnp.asarray(0.4))
    got, aux = jax.jit(curvature.hessian(two_arguments, argnums, has_aux=True, mode=mode, chunk_size=2))(*args)
    want, want_aux = jax.jit(jax.hessian(two_arguments, argnums, has_aux=True))(*args)
    assert_trees_close(got, want)
    assert_trees_close(aux, want_aux)


def test_hessian_takes_keyword_arguments():
    x = jnp.array([1.0, 2.0])
    assert_close(curvature.hessian(lambda x, power: jnp.sum(x**power))(x, power=3), jnp.diag(6 * x))


def test_aux_comes_once_and_unbatched_from_linearize_grad():
    value, grad, hvp_fn, aux = curvature.linearize_grad(
        lambda x, y: (jnp.sum(x**2 * y), {"y": y}), jnp.arange(3.0), jnp.ones(3), has_aux=True
    )
    assert aux["y"].shape == (3,)
    assert_close(hvp_fn(jnp.ones(3)), 2 * jnp.ones(3))
    assert_close(grad, 2 * jnp.arange(3.0))
    assert_close(value, 5.0)


def test_a_branch_on_a_value_works_outside_jit_as_for_jax():
    def branching(x):
        return x**3 if x > 0 else x**2

    for point in (2.0, -2.0):
        assert_close(curvature.hessian(branching)(point), jax.hessian(branching)(point))
        assert_close(curvature.hvp(branching, point, 1.0), jax.hessian(branching)(point))


def test_products_are_linear_and_symmetric():
    scenario = SCENARIOS[0]
    x, args = scenario.make(jnp.float64)
    u, v = direction_like(x, 1), direction_like(x, 2)
    _, _, hvp_fn = curvature.linearize_grad(scenario.fun, x, *args)
    combined = hvp_fn(jax.tree.map(lambda a, b: 2 * a - 3 * b, u, v))
    assert_close(flat(combined), 2 * flat(hvp_fn(u)) - 3 * flat(hvp_fn(v)))
    assert_close(flat(u) @ flat(hvp_fn(v)), flat(v) @ flat(hvp_fn(u)))


def test_transforms_compose_with_jit_vmap_and_grad():
    def cubic(x, scale):
        return scale * jnp.sum(x**3)

    points, v = jnp.arange(6.0).reshape(2, 3), jnp.ones(3)
    products = jax.jit(jax.vmap(lambda x: curvature.hvp(cubic, x, v, 2.0)))(points)
    assert_close(products, 12 * points)
    third = jax.grad(lambda x: jnp.sum(curvature.hvp(cubic, x, v, 2.0)))(points[0])
    assert_close(third, jnp.full(3, 12.0))
    by_data = jax.grad(lambda scale: curvature.hessian(cubic)(points[1], scale)[0, 0])(2.0)
    assert_close(by_data, 6 * points[1, 0])
    blocks = jax.vmap(curvature.hessian(cubic), in_axes=(0, None))(points, 2.0)
    assert_close(blocks, jax.vmap(jax.hessian(cubic), in_axes=(0, None))(points, 2.0))


@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_hessian_differentiates_again_by_either_mode(outer):
    x = jnp.array([0.3, -0.2, 0.7])
    fun = lambda x: jnp.sum(jnp.sin(x)) * x[0]
    assert_close(jax.jit(outer(curvature.hessian(fun, chunk_size=2)))(x), jax.jit(outer(jax.hessian(fun)))(x))


def test_leaves_of_different_precision_keep_their_own():
    x = {"half": jnp.ones(2, jnp.float32), "full": jnp.ones(3, jnp.float64)}

    def fun(x):
        return jnp.sum(x["half"] ** 3).astype(jnp.float64) * jnp.sum(x["full"] ** 2)

    product = curvature.hvp(fun, x, x)
    assert {name: leaf.dtype for name, leaf in product.items()} == {"half": jnp.float32, "full": jnp.float64}
    got = jax.jit(curvature.hessian(fun))(x)
    with jax.numpy_dtype_promotion("standard"):  # which jax.hessian needs here
        assert_trees_close(got, jax.jit(jax.hessian(fun))(x), jnp.float32)


# ---- cost ---------------------------------------------------------------------------------------------------------


def test_f_is_called_once_for_each_transform():
    calls = []

    def counted(x):
        calls.append(1)
        return jnp.sum(jnp.sin(x) ** 2)

    x = jnp.arange(3.0)
    for transform in (
        lambda: curvature.hvp(counted, x, x),
        lambda: curvature.hessian(counted, chunk_size=2)(x),
        lambda: curvature.linearize_grad(counted, x),
        lambda: curvature.jacobian(counted)(x),
    ):
        calls.clear()
        transform()
        assert len(calls) == 1


def test_linearized_products_do_not_evaluate_f_again():
    evaluations = []

    def observed(x):
        jax.debug.callback(lambda: evaluations.append(1))
        return jnp.sum(jnp.sin(x) ** 2)

    @jax.jit
    def many_products(x):
        _, _, hvp_fn = curvature.linearize_grad(observed, x)
        return [hvp_fn(k * x) for k in (1.0, 2.0, 3.0)]

    jax.block_until_ready(many_products(jnp.arange(3.0)))
    jax.effects_barrier()
    assert len(evaluations) == 1


def test_hessian_memory_is_bounded_by_the_chunk():
    params, inputs, targets = make_mlp((14, 63, 1), 512)

    def temporary_bytes(fun):
        return jax.jit(fun).lower(params, inputs, targets).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(curvature.hessian(mlp_loss)) < temporary_bytes(jax.hessian(mlp_loss)) / 10


def test_data_is_an_operand_and_not_a_constant():
    data = jnp.arange(1000.0)
    compiled = jax.jit(lambda x, data: curvature.hvp(lambda x, d: jnp.sum(x * d) ** 2, x, x, data))
    jaxpr = compiled.trace(jnp.ones(1000), data).jaxpr
    assert not jaxpr.consts


def test_a_mutable_array_may_be_read():
    ref = jax.new_ref(jnp.arange(1.0, 4.0))
    matrix = curvature.hessian(lambda x: jnp.sum((x * ref[...]) ** 3))(jnp.arange(3.0))
    assert_close(matrix, np.diag([0.0, 6 * 8, 6 * 27 * 2]))
