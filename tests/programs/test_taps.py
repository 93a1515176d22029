"""Norms, clipped sums, moments and mean Hessians from taps, against one gradient or Hessian for each example."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature
from curvature.transforms import _tap_hessian
from tests.losses import LOSSES, B, in_precision
from tests.oracles import assert_close, assert_trees_close, dense_blocks

names = pytest.mark.parametrize("name", LOSSES)


def gradients(loss, params, batch):
    """One gradient for each example, as rows."""
    trees = jax.jit(jax.vmap(jax.grad(loss), (None,) + (0,) * len(batch)))(params, *batch)
    return np.concatenate([np.asarray(leaf, np.float64).reshape(B, -1) for leaf in jax.tree.leaves(trees)], axis=1)


def mean_of(loss):
    return lambda params, *batch: jnp.mean(jax.vmap(loss, (None,) + (0,) * len(batch))(params, *batch))


def flat(tree):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


@pytest.mark.thin
@names
def test_norms_clipped_means_and_moments_are_those_of_the_gradients(name):
    loss, params, batch = in_precision(name, jnp.float64)
    rows = gradients(loss, params, batch)
    norms = np.linalg.norm(rows, axis=1)
    bound = float(np.median(norms))

    @jax.jit
    def all_three(params, *batch):
        clipped = curvature.clipped_grad(loss, bound)(params, *batch)
        moments = curvature.per_example_grad_moments(loss, chunk_size=3)(params, *batch)
        return curvature.per_example_grad_norm(loss, chunk_size=3)(params, *batch), clipped, moments

    got, (clipped, clipped_norms), moments = all_three(params, *batch)
    assert_close(got, norms, roundings=1e3)
    assert_close(clipped_norms, norms, roundings=1e3)
    assert jax.tree.structure(clipped) == jax.tree.structure(params)
    assert_close(flat(clipped), np.mean(rows * np.minimum(1, bound / norms)[:, None], 0), roundings=1e3)
    assert_close(flat(moments.mean), rows.mean(0), roundings=1e3)
    assert_close(flat(moments.second_moment), (rows**2).mean(0), roundings=1e3)
    assert_close(flat(moments.variance), rows.var(0), roundings=1e4)


@pytest.mark.thin
@names
def test_mean_hessian_is_the_hessian_of_the_mean(name):
    loss, params, batch = in_precision(name, jnp.float64)
    want = jax.jit(jax.hessian(mean_of(loss)))(params, *batch)
    got = jax.jit(curvature.mean_hessian(loss, chunk_size=3))(params, *batch)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    assert_close(dense_blocks(got, params), dense_blocks(want, params), roundings=1e3)


@pytest.mark.thin
@pytest.mark.parametrize("name", ["mlp", "smooth", "recurrent", "flax"])
def test_single_precision_stays_single_and_close(name):
    loss, params, batch = in_precision(name, jnp.float32)
    norms = jax.jit(curvature.per_example_grad_norm(loss))(params, *batch)
    assert norms.dtype == jnp.float32
    assert_close(norms, np.linalg.norm(gradients(loss, params, batch), axis=1), jnp.float32)
    got = jax.jit(curvature.mean_hessian(loss))(params, *batch)
    want = jax.jit(jax.hessian(mean_of(loss)))(params, *batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    assert_close(dense_blocks(got, params), dense_blocks(want, params), jnp.float32, roundings=1e3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_mean_hessian_of_softmax_regression_in_closed_form(dtype, monkeypatch):
    """``mean_b a a' (x) (diag(s) - s s')``, the products of inputs formed at once and seven at a time."""
    rng = np.random.default_rng(4)
    a, s = rng.normal(size=(9, 7)), rng.normal(size=(7, 5))
    w, inputs, label = jnp.asarray(s, dtype), jnp.asarray(a, dtype), jnp.arange(9) % 5

    def loss(w, a, label):
        return optax.losses.softmax_cross_entropy_with_integer_labels(a @ w, label)

    s = np.asarray(jax.nn.softmax(a @ s, axis=1))
    curved = np.einsum("bj,jl->bjl", s, np.eye(5)) - np.einsum("bj,bl->bjl", s, s)
    want = np.einsum("bi,bk,bjl->ijkl", a, a, curved) / 9
    hessian = curvature.mean_hessian(loss)
    got = hessian(w, inputs, label)
    assert got.dtype == dtype
    assert_close(got, want, dtype)
    np.testing.assert_array_equal(got, np.transpose(got, (2, 3, 0, 1)))  # symmetric to the last bit
    monkeypatch.setattr(_tap_hessian, "_FORMED_BYTES", 0)
    assert_close(hessian(w, inputs, label), want, dtype)


def test_half_precision_weights_add_up_in_single():
    loss, params, batch = in_precision("mlp", jnp.bfloat16)
    norms = curvature.per_example_grad_norm(loss)(params, *batch)
    assert norms.dtype == jnp.float32
    assert_close(norms, np.linalg.norm(gradients(loss, params, batch), axis=1), jnp.bfloat16)


@pytest.mark.parametrize(
    ("name", "path", "told"),
    [
        ("mlp", "in/w", "from inputs and cotangents, gradient not formed"),
        ("penalized", "in/w", "from inputs and cotangents, gradient not formed"),
        ("penalized", "unused", "gradient formed: what meets the data is a function of this leaf"),
        ("rematerialized", "out/w", "from inputs and cotangents, gradient not formed"),
        ("stacked", "w", "from inputs and cotangents, gradient not formed"),
        ("recurrent", "w", "gradient formed from inputs and cotangents at 4 positions"),
        ("tied", "embed", "gradient formed from inputs and cotangents at 6 positions"),
        ("convolutional", "a", "gradient formed from inputs and cotangents at 9 positions"),
        ("convolutional", "c", "gradient formed, by reverse mode through conv_general_dilated"),
        ("weight_normalized", "v", "gradient formed: what meets the data is a function"),
        ("odd", "power", "gradient formed, by reverse mode through pow, max"),
        ("odd", "unused", "unused: its gradient is zero"),
        ("rows", "a", "from inputs and cotangents, gradient not formed"),
        ("branching", "", "gradient formed, by reverse mode through cond"),
        ("flax", "params/Dense_0/kernel", "from inputs and cotangents, gradient not formed"),
        ("flax", "params/Conv_0/kernel", "gradient formed from inputs and cotangents at 6 positions"),
    ],
)
def test_the_report_says_what_becomes_of_a_leaf(name, path, told):
    loss, params, batch = in_precision(name, jnp.float64)
    report = curvature.per_example_grad_norm(loss).report(params, *batch)
    assert report.routes[path].startswith(told)
    assert f"{path}  " in f"{report}  "


def test_few_positions_take_gram_matrices():
    def loss(params, tokens):
        return jnp.sum(jnp.tanh(params["embed"][tokens] @ params["w"]) ** 2)

    params = {"embed": jnp.tile(jnp.arange(8.0) / 8, (30, 1)), "w": jnp.eye(8)}
    tokens = jnp.asarray([[1, 2], [3, 3]])
    norms = curvature.per_example_grad_norm(loss)
    assert "Gram" in norms.report(params, tokens).routes["embed"]
    assert "Gram" in norms.report(params, tokens).routes["w"]
    grads = jax.vmap(jax.grad(loss), (None, 0))(params, tokens)
    want = np.sqrt(sum(np.sum(np.asarray(g) ** 2, axis=(1, 2)) for g in jax.tree.leaves(grads)))
    assert_close(norms(params, tokens), want)


def test_no_gradient_of_a_weight_is_formed():
    """The promise that makes it cheap: nothing in the program has the entries of all per-example gradients."""
    loss, params, batch = in_precision("mlp", jnp.float64)
    entries = B * params["in"]["w"].size
    for function in (curvature.per_example_grad_norm(loss), curvature.clipped_grad(loss, 1.0)):
        jaxpr = jax.make_jaxpr(function)(params, *batch)
        assert not [v for eqn in jaxpr.eqns for v in eqn.outvars if v.aval.size >= entries]


@pytest.mark.parametrize(
    ("name", "path", "told"),
    [
        ("mlp", "in/w", "taps along 5 directions"),
        ("unrolled", "w", "taps along 8 directions"),
        ("penalized", "in/w", "taps along 5 directions"),
        ("recurrent", "offset", "linear in the loss"),
        ("recurrent", "w", "products with the whole Hessian along 9 directions"),
        ("odd", "unused", "unused: its blocks are zero"),
        ("flax", "params/LayerNorm_0/scale", "taps along 18 directions"),
        ("flax", "params/Dense_0/kernel", "taps along 2 directions"),
    ],
)
def test_the_report_of_mean_hessian(name, path, told):
    loss, params, batch = in_precision(name, jnp.float64)
    assert curvature.mean_hessian(loss).report(params, *batch).routes[path] == told


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smooth", "penalized", "convolutional"])
def test_blocks_of_the_mean_hessian(name):
    loss, params, batch = in_precision(name, jnp.float64)
    want = jax.jit(jax.hessian(mean_of(loss)))(params, *batch)
    first, *_, last = sorted(params)
    blocks = jax.jit(curvature.mean_hessian(loss, blocks=(last, first)))(params, *batch)
    part = jax.tree.map(lambda row: row[first], want[last], is_leaf=lambda row: isinstance(row, dict) and first in row)
    assert_trees_close(blocks, part, roundings=1e3)
    diagonal = jax.jit(curvature.mean_hessian(loss, blocks="diagonal"))(params, *batch)
    structure = jax.tree.structure(params)
    rows = [structure.flatten_up_to(row)[k] for k, row in enumerate(structure.flatten_up_to(want))]
    assert_trees_close(diagonal, structure.unflatten(rows), roundings=1e3)


@pytest.mark.slow
def test_mean_hessian_through_vmap_and_grad():
    loss, params, batch = in_precision("smooth", jnp.float64)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)
    got = jax.jit(jax.vmap(curvature.mean_hessian(loss), (0, None, None)))(several, *batch)
    want = jax.jit(jax.vmap(jax.hessian(mean_of(loss)), (0, None, None)))(several, *batch)
    assert_trees_close(got, want, roundings=1e3)

    def trace_of(hessian):
        return lambda params: jnp.trace(hessian(params, *batch)["b"]["b"])

    got = jax.jit(jax.grad(trace_of(curvature.mean_hessian(loss))))(params)
    want = jax.jit(jax.grad(trace_of(jax.hessian(mean_of(loss)))))(params)
    assert_trees_close(got, want, roundings=1e4)


def test_norms_through_grad():
    """Differentiable, as a penalty on the largest gradient needs."""
    loss, params, batch = in_precision("smooth", jnp.float64)

    def total(norms):
        return lambda params: jnp.sum(norms(params))

    def formed(params):
        grads = jax.vmap(jax.grad(loss), (None, 0, 0))(params, *batch)
        return jnp.sqrt(sum(jnp.sum(leaf.reshape(B, -1) ** 2, axis=1) for leaf in jax.tree.leaves(grads)))

    got = jax.jit(jax.grad(total(lambda params: curvature.per_example_grad_norm(loss)(params, *batch))))(params)
    assert_trees_close(got, jax.jit(jax.grad(total(formed)))(params), roundings=1e4)


def test_mean_hessian_takes_fewer_directions_and_less_memory():
    """The headline: against the Hessian of the mean, a tenth of the memory."""
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(20, 24))), "v": jnp.asarray(rng.normal(size=24))}
    x = jnp.asarray(rng.normal(size=(128, 20)))

    def loss(params, x):
        return jnp.tanh(x @ params["w"]) @ params["v"]

    def temporary_bytes(hessian):
        return jax.jit(hessian).lower(params, x).compile().memory_analysis().temp_size_in_bytes

    assert 10 * temporary_bytes(curvature.mean_hessian(loss)) < temporary_bytes(jax.hessian(mean_of(loss)))


def test_the_loss_is_called_a_fixed_number_of_times_and_never_retraced():
    calls = []

    def loss(w, x):
        calls.append(None)
        return jnp.tanh(w @ x)

    functions = curvature.mean_hessian(loss), curvature.per_example_grad_norm(loss), curvature.clipped_grad(loss, 1.0)
    for function in map(jax.jit, functions):
        calls.clear()
        function(jnp.ones(3), jnp.ones((4, 3)))
        assert 1 <= len(calls) <= 3
        once = len(calls)
        function(jnp.zeros(3), jnp.zeros((4, 3)))
        assert len(calls) == once


def test_what_has_no_taps_still_has_norms_and_a_hessian():
    def loss(w, x):  # forward mode only
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * (w @ x)), (0, w @ x))[1]

    def closed_form(w, x):
        return (w @ x) ** 3

    w, x = jnp.asarray([1.0, 2.0]), jnp.asarray([[1.0, 0.5], [0.2, 0.3], [1.0, -1.0]])
    assert_close(curvature.per_example_grad_norm(loss)(w, x), 3 * (x @ w) ** 2 * np.linalg.norm(np.asarray(x), axis=1))
    assert_close(curvature.clipped_grad(loss, 1e9)(w, x)[0], jax.grad(mean_of(closed_form))(w, x))
    assert_close(curvature.per_example_grad_moments(loss)(w, x).mean, jax.grad(mean_of(closed_form))(w, x))
    assert_close(curvature.mean_hessian(loss)(w, x), jax.hessian(mean_of(closed_form))(w, x))
    assert "no taps" in str(curvature.mean_hessian(loss).report(w, x))


def test_clipping_leaves_zero_gradients_alone_and_passes_nan_on():
    def loss(w, x):
        return w @ x

    x = jnp.asarray([[0.0, 0.0], [3.0, 4.0]])
    grad, norms = curvature.clipped_grad(loss, 1.0)(jnp.ones(2), x)
    assert_close(grad, [0.3, 0.4])
    assert_close(norms, [0.0, 5.0])
    grad, norms = curvature.clipped_grad(loss, 1.0)(jnp.ones(2), x.at[0, 0].set(jnp.nan))
    assert np.isnan(norms[0])
    assert np.isnan(grad[0])


def test_minimize_takes_the_mean_hessian():
    smooth, params, batch = in_precision("smooth", jnp.float64)

    def loss(params, *example):
        return smooth(params, *example) + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    solve = {"method": "trust-exact", "max_steps": 100}
    with_taps = curvature.minimize(mean_of(loss), params, batch, hessian=curvature.mean_hessian(loss), **solve)
    without = curvature.minimize(mean_of(loss), params, batch, **solve)
    assert with_taps.success
    assert_close(with_taps.value, without.value, roundings=1e4)
