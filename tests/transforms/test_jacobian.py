"""jacobian and vmap against JAX's own, whatever the shapes, axes and chunks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from tests.oracles import assert_close, assert_trees_close


def tall(x, scale):
    return {"many": jnp.outer(x["a"], jnp.arange(1.0, 5.0)) * scale, "one": jnp.sum(x["a"]) * x["b"]}


def wide(x, scale):
    return jnp.sum(x["a"] ** 2) * x["b"] * scale


@pytest.fixture
def x():
    return {"a": jnp.array([0.5, -1.0]), "b": jnp.asarray(0.7)}


@pytest.mark.parametrize("fun", [tall, wide])
@pytest.mark.parametrize("mode", ["auto", "fwd", "rev"])
@pytest.mark.parametrize("chunk_size", [None, 2, "auto"])
def test_jacobian_equals_jaxs(fun, mode, chunk_size, x):
    got = jax.jit(curvature.jacobian(fun, mode=mode, chunk_size=chunk_size))(x, 2.0)
    assert_trees_close(got, jax.jacobian(fun)(x, 2.0))


def test_jacobian_by_several_arguments_with_aux(x):
    def fun(x, scale):
        return tall(x, scale), x["a"] + 1

    got, aux = curvature.jacobian(fun, (1, 0), has_aux=True)(x, 2.0)
    want, want_aux = jax.jacrev(fun, (1, 0), has_aux=True)(x, 2.0)
    assert_trees_close(got, want)
    assert_trees_close(aux, want_aux)


def test_auto_picks_forward_for_tall_and_reverse_for_wide():
    def program(fun, x):
        return str(jax.make_jaxpr(curvature.jacobian(fun, chunk_size=None))(x))

    matrix = jnp.ones((100, 3))
    square = "f64[100,100]"  # the cotangents of a tall Jacobian, the tangents of a wide one
    assert square not in program(lambda x: jnp.tanh(matrix @ x), jnp.ones(3))
    assert square not in program(lambda x: jnp.tanh(matrix.T @ x), jnp.ones(100))
    assert square in str(jax.make_jaxpr(jax.jacrev(lambda x: jnp.tanh(matrix @ x)))(jnp.ones(3)))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="tangents are moved about on a CPU only")
@pytest.mark.parametrize(
    ("outputs", "inputs", "mode"), [(16, 16, "rev"), (24, 16, "fwd"), (23, 16, "rev"), (8, 8, "fwd")]
)
def test_on_a_cpu_forward_takes_half_as_many_outputs_again(outputs, inputs, mode):
    def program(fun, mode):
        return str(jax.make_jaxpr(curvature.jacobian(fun, mode=mode))(jnp.ones(inputs)))

    def layer(x):
        return jnp.tanh(jnp.ones((outputs, inputs)) @ x)

    def chain(x):  # without products of matrices nothing is moved
        return jnp.resize(x, outputs) ** 2 - jnp.roll(jnp.resize(x, outputs), 1)

    assert program(layer, "auto") == program(layer, mode)
    assert program(chain, "auto") == program(chain, "fwd")


@pytest.mark.parametrize("lanes", [1, 6, 7])
@pytest.mark.parametrize("chunk_size", [None, 1, 3, 100, "auto"])
@pytest.mark.parametrize(
    ("in_axes", "out_axes"), [((0, None), 0), ((1, None), -1), ((-1, {"k": None}), (0, None)), ([0, None], 1)]
)
def test_vmap_equals_jaxs(lanes, chunk_size, in_axes, out_axes):
    axis = in_axes[0]
    xs = jnp.moveaxis(jnp.arange(lanes * 3.0).reshape(lanes, 3), 0, axis)
    data = {"k": jnp.array([2.0, 3.0, 4.0])}

    def fun(x, data):
        product = jnp.outer(x, data["k"])
        return (product, data["k"]) if isinstance(out_axes, tuple) else product

    got = curvature.vmap(fun, in_axes, out_axes, chunk_size=chunk_size)(xs, data)
    assert_trees_close(got, jax.vmap(fun, tuple(in_axes), out_axes)(xs, data))


def test_vmap_maps_keyword_arguments_and_integers():
    table = jnp.arange(10.0)
    got = curvature.vmap(lambda i, scale: table[i] * scale, chunk_size=2)(jnp.arange(5), scale=jnp.arange(5.0))
    assert_close(got, jnp.arange(5.0) ** 2)


def test_a_ragged_chunk_compiles_one_program_and_is_differentiable():
    traces = []

    def lane(x):
        traces.append(1)
        return jnp.sin(x) * x

    xs = jnp.arange(7.0)
    mapped = jax.jit(jax.grad(lambda xs: jnp.sum(curvature.vmap(lane, chunk_size=3)(xs))))
    assert_close(mapped(xs), jnp.cos(xs) * xs + jnp.sin(xs))
    assert len(traces) == 1


def test_vmap_memory_is_bounded_by_the_chunk():
    def lane(x):
        return jnp.sum(jnp.sin(jnp.outer(x, x) + x[None, :]) @ x)

    xs = jnp.ones((512, 200))

    def temporary_bytes(chunk_size):
        mapped = jax.jit(curvature.vmap(lane, chunk_size=chunk_size))
        return mapped.lower(xs).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes("auto") < temporary_bytes(None) / 8


def test_chunks_divide_the_lanes_where_they_can_and_copy_no_result():
    xs = jax.ShapeDtypeStruct((64, 480), jnp.float64)  # what ten lanes write would fill a chunk
    mapped = jax.jit(curvature.vmap(lambda x: jnp.sin(jnp.outer(x, x))))
    memory = mapped.lower(xs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < memory.output_size_in_bytes / 4


def test_none_leaves_pass_through_chunks():
    x = {"a": jnp.arange(1.0, 8.0), "b": None}
    fun = lambda x: jnp.sum(x["a"] ** 3)
    assert_trees_close(curvature.hessian(fun, chunk_size=2)(x), jax.hessian(fun)(x))
    assert_trees_close(curvature.jacobian(fun, mode="rev", chunk_size=2)(x), jax.grad(fun)(x))
    data = {"w": jnp.asarray(3.0), "n": None}
    got = curvature.vmap(lambda a, b: (a * b["w"], None), (0, None), chunk_size=2)(jnp.arange(5.0), data)
    assert_trees_close(got, (3 * jnp.arange(5.0), None))


def test_zero_sizes_are_as_in_jax():
    empty, full = jnp.zeros((0,)), jnp.ones(3)
    assert curvature.jacobian(lambda x: jnp.outer(full, x))(empty).shape == (3, 0, 0)
    assert curvature.jacobian(lambda x: x[:0])(full).shape == (0, 3)
    assert curvature.vmap(jnp.sin)(empty).shape == (0,)
    assert curvature.vmap(lambda x: jnp.zeros((0,)) * x, chunk_size=2)(jnp.arange(5.0)).shape == (5, 0)


def test_argnums_may_be_numpy_integers():
    assert_close(curvature.hessian(lambda x: jnp.sum(x**3), np.int64(0))(jnp.ones(2)), 6 * jnp.eye(2))


CONSTANTS = {
    "a float": lambda x: 3.0,
    "a NumPy scalar": lambda x: np.float64(3),
    "a NumPy array": lambda x: np.ones(2),
    "among others": lambda x: [x[0] ** 2, 3.0],
    "by a branch": lambda x: 3.0 if x[0] > 0 else x[0],
}


@pytest.mark.parametrize("mode", ["auto", "fwd", "rev"])
@pytest.mark.parametrize("name", CONSTANTS)
def test_of_plain_numbers_the_derivatives_are_zeros_as_for_jax(name, mode):
    fun, x = CONSTANTS[name], jnp.array([1.0, 2.0])
    got, want = curvature.jacobian(fun, mode=mode)(x), jax.jacobian(fun)(x)
    assert_trees_close(got, want)
    assert_trees_close(curvature.hessian(fun)(x), jax.hessian(fun)(x))


def test_the_other_derivatives_of_a_plain_number_are_zeros_too():
    number, x = (lambda x, *_: 3.0), jnp.array([1.0, 2.0])
    value, grad, hvp_fn = curvature.linearize_grad(number, x)
    found = [grad, hvp_fn(x), curvature.hvp(number, x, x), curvature.hessian_diagonal(number, x)]
    found += [*curvature.directional_derivatives(number, x, x, order=2), curvature.laplacian(number)(x)]
    found += [curvature.per_example_grad(number)(x, x), curvature.per_example_hessian(number)(x, x)]
    assert value == 3.0
    assert all(isinstance(array, jax.Array) and not array.any() for array in [value - 3.0, *found])
