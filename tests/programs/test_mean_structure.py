"""``hessian`` finds the examples that a function sums over, takes the same path as ``mean_hessian``, and is right."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature
from curvature.programs import _traced
from curvature.programs._mean_structure import find_examples
from curvature.transforms._mean_hessian import find_structure
from tests.oracles import assert_close, assert_trees_close

NUM_EXAMPLES = 12


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"):
        yield


def data(dtype):
    keys = jax.random.split(jax.random.key(3), 3)
    x = jax.random.normal(keys[0], (NUM_EXAMPLES, 5), dtype)
    labels = jax.random.randint(keys[1], (NUM_EXAMPLES,), 0, 3)
    return x, labels, jax.random.normal(keys[2], (NUM_EXAMPLES,), dtype)


def parameters(dtype):
    keys = jax.random.split(jax.random.key(4), 4)
    shapes = {"a": (5, 4), "b": (4,), "c": (4, 3), "d": (3,)}
    return {name: jax.random.normal(key, shape, dtype) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}


def network(p, x, activation):
    return activation(x @ p["a"] + p["b"]) @ p["c"] + p["d"]


def cross_entropy(p, x, labels, t):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(network(p, x, jnp.tanh), labels))


def relu_with_penalty(p, x, labels, t):
    targets = jax.nn.one_hot(labels, 3, dtype=x.dtype)
    fit = jnp.mean(optax.softmax_cross_entropy(network(p, x, jax.nn.relu), targets))
    return fit + 0.1 * sum(jnp.sum(leaf**2) for leaf in p.values())


def sum_of_squares(p, x, labels, t):
    return jnp.sum((network(p, x, jax.nn.softplus)[:, 0] - t) ** 2)


def product_of_residuals(p, x, labels, t):
    residuals = network(p, x, jax.nn.gelu)[:, 0] - t
    return 0.5 * jnp.vdot(residuals, residuals)


def weighted(p, x, labels, t):
    return jnp.dot(t**2, jnp.logaddexp(jnp.zeros((), x.dtype), network(p, x, jax.nn.silu)[:, 1])) / 3


def examples_last(p, x, labels, t):
    hidden = jnp.tanh(p["a"].T @ x.T + p["b"][:, None])
    return jnp.mean(jnp.sum((p["c"].T @ hidden + p["d"][:, None]) ** 2, axis=0))


def normalized(p, x, labels, t):
    def layer_norm(z):
        return (z - z.mean(-1, keepdims=True)) / jnp.sqrt(z.var(-1, keepdims=True) + 1e-3)

    return jnp.mean(network(p, (x - x.mean(0)) / x.std(0), layer_norm) ** 2)


def several_sums(p, x, labels, t):
    first = jnp.mean(network(p, x, jnp.tanh)[:, 0])
    return first + 2 * jnp.sum(jax.nn.logsumexp(network(p, x, jnp.sin), -1)) - 3 * p["d"][0] ** 3


def through_vmap(p, x, labels, t):
    def loss(x, label):
        return optax.softmax_cross_entropy_with_integer_labels(network(p, x, jax.nn.relu), label)

    return jnp.mean(jax.vmap(loss)(x, labels))


def largest_output(p, x, labels, t):
    return jnp.mean(jnp.max(jnp.cumsum(network(p, x, jax.nn.elu), axis=1) ** 2, axis=-1))


def normalized_over_batch(p, x, labels, t):
    return jnp.mean(network(p, x, lambda z: z - z.mean(0)) ** 2)


def square_of_mean(p, x, labels, t):
    return jnp.mean(network(p, x, jnp.tanh)) ** 2


def mean_of_lowest(p, x, labels, t):
    return jnp.mean(jnp.sort(network(p, x, jnp.tanh), axis=0)[:3])


def running_sums(p, x, labels, t):
    return jnp.mean(jnp.cumsum(network(p, x, jnp.tanh), axis=0) ** 2)


def of_pairs(p, x, labels, t):
    out = network(p, x, jnp.tanh)
    return jnp.sum(jnp.tanh(out @ out.T))


def of_neighbors(p, x, labels, t):
    out = network(p, x, jnp.tanh)
    return jnp.mean((out - jnp.roll(out, 1, axis=0)) ** 2)


def through_smoother(p, x, labels, t):
    return jnp.sum((x @ x.T) @ network(p, x, jnp.tanh))


def scaled_by_parameter(p, x, labels, t):
    return jnp.exp(p["d"][0]) * jnp.mean(network(p, x, jnp.tanh) ** 2)


APART = [
    cross_entropy,
    relu_with_penalty,
    sum_of_squares,
    product_of_residuals,
    weighted,
    examples_last,
    normalized,
    several_sums,
    through_vmap,
    largest_output,
]
MIXED = [
    normalized_over_batch,
    square_of_mean,
    mean_of_lowest,
    running_sums,
    of_pairs,
    of_neighbors,
    scaled_by_parameter,
    through_smoother,
]


def name(f):
    return f.__name__


def matrix(blocks, p):
    return curvature.matrix_view(blocks, p).matrix


def program_of(f, p, args):
    return _traced.trace(lambda p: (f(p, *args), None), p)


@pytest.mark.thin
@pytest.mark.parametrize("f", APART, ids=name)
def test_sums_over_examples_are_found_and_right(f, dtype):
    p, args = parameters(dtype), data(dtype)
    examples, _ = find_structure(program_of(f, p, args))
    assert {len(leaf) for leaf in examples.batch} == {NUM_EXAMPLES}
    values = [examples.loss(p, *(leaf[b] for leaf in examples.batch)) for b in range(NUM_EXAMPLES)]
    assert_close(jnp.mean(jnp.stack(values)), f(p, *args), dtype)
    found, expected = (jax.jit(hessian(f))(p, *args) for hessian in (curvature.hessian, jax.hessian))
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, expected)
    assert_close(matrix(found, p), matrix(expected, p), dtype)


@pytest.mark.parametrize("f", MIXED, ids=name)
def test_functions_that_mix_examples_or_pay_for_each_are_left_alone(f):
    p, args = parameters(jnp.float32), data(jnp.float32)
    assert find_examples(program_of(f, p, args)) is None


def test_a_data_dependent_mixture_is_seen_by_a_perturbed_example():
    """What is found to be apart is: the loss of one example does not move with another one's data."""
    p, (x, labels, t) = parameters(jnp.float32), data(jnp.float32)
    for f in APART:
        if f is normalized:  # its data is centered before it is cut
            continue
        before, after = (find_examples(program_of(f, p, (moved, labels, t))) for moved in (x, x.at[0].add(1)))
        for b in (1, NUM_EXAMPLES - 1):
            values = [found.loss(p, *(leaf[b] for leaf in found.batch)) for found in (before, after)]
            np.testing.assert_array_equal(*values)


def test_only_auto_takes_examples():
    p, args = parameters(jnp.float32), data(jnp.float32)
    auto = jax.make_jaxpr(curvature.hessian(cross_entropy))(p, *args)
    by_mode = jax.make_jaxpr(curvature.hessian(cross_entropy, mode="fwd_over_rev"))(p, *args)
    by_chunk = jax.make_jaxpr(curvature.hessian(cross_entropy, chunk_size=7))(p, *args)
    num_parameters = sum(leaf.size for leaf in p.values())
    assert f"[{num_parameters}," not in str(auto)  # no lane for each parameter
    assert f"[{num_parameters}," in str(by_mode)
    assert "7," in str(by_chunk)


@pytest.mark.slow
def test_blocks_vmap_and_derivatives_of_the_hessian():
    p, args = parameters(jnp.float64), data(jnp.float64)
    dense = jax.hessian(cross_entropy)(p, *args)
    block = curvature.hessian(cross_entropy, blocks=("c", "a"))(p, *args)
    assert_close(block, dense["c"]["a"])
    diagonal = curvature.hessian(cross_entropy, blocks="diagonal")(p, *args)
    assert_trees_close(diagonal, {key: dense[key][key] for key in p})

    lanes = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), p)
    batched = jax.vmap(curvature.hessian(cross_entropy), (0, None, None, None))(lanes, *args)
    assert_close(matrix(jax.tree.map(lambda leaf: leaf[0], batched), p), matrix(dense, p))

    def curvature_of(hessian, p):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(hessian(relu_with_penalty)(p, *args)))

    ours, theirs = (jax.grad(curvature_of, argnums=1)(hessian, p) for hessian in (curvature.hessian, jax.hessian))
    assert_trees_close(ours, theirs, roundings=1024)


def test_a_derivative_of_its_own_is_kept():
    """A ``custom_jvp`` is differentiated by its rule, twice; its rule may mix the examples only in vain."""

    @jax.custom_jvp
    def cube(z):
        return z**3

    @cube.defjvp
    def _(primals, tangents):
        return cube(*primals), 5 * cube(primals[0]) * tangents[0]

    def f(w, x):
        return jnp.sum(cube(x @ w))

    w, x = jnp.array([[1.0], [0.5], [2.0]]), jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    assert find_structure(program_of(f, w, (x,))) is not None
    assert_close(curvature.hessian(f)(w, x), jax.hessian(f)(w, x))

    @jax.custom_jvp
    def mixing(z):
        return z**2

    mixing.defjvp(lambda primals, tangents: (mixing(*primals), tangents[0] + jnp.sum(tangents[0])))
    assert find_examples(program_of(lambda w, x: jnp.sum(mixing(x @ w)), w, (x,))) is None


def test_a_rule_that_cannot_be_read_twice_is_evaluated_wide():
    """The second derivative of this rule takes a product of examples that is not followed, yet does not mix."""

    @jax.custom_jvp
    def outer(z):
        return jnp.sin(z)

    @jax.custom_jvp
    def inner(z):
        return jnp.cos(z)

    outer.defjvp(lambda primals, tangents: (outer(*primals), inner(primals[0]) * tangents[0]))
    identity = jnp.eye(2)
    inner.defjvp(lambda primals, tangents: (inner(*primals), identity @ (-jnp.sin(primals[0]) * tangents[0])))

    def f(w, x):
        return jnp.sum(outer(x @ w))

    w, x = jnp.array([[1.0], [0.5], [2.0]]), jnp.array([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]])
    assert_close(curvature.hessian(f)(w, x), jax.hessian(f)(w, x))


@pytest.mark.slow
def test_explain_says_so():
    p, args = parameters(jnp.float32), data(jnp.float32)
    report = curvature.explain(cross_entropy, p, *args)
    assert report.way("hessian").mode == "taps"
    assert "over 12 examples" in report.structure
    assert "along 7 directions" in report.structure
    assert curvature.explain(square_of_mean, p, *args).structure is None
