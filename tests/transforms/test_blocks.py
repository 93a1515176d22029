"""Blocks of a Hessian by path, the block diagonal, and the matrix view."""

import collections

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature._trees import leaf_paths, select
from tests.oracles import assert_close, assert_trees_close, dense_blocks
from tests.scenarios import SCENARIOS, forward_only, make_mlp, mlp_loss, reverse_only

MODES = ["fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd"]
Point = collections.namedtuple("Point", ["head", "layers"])


def make_point(dtype=jnp.float64):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return Point(head=leaf(), layers=[{"w": leaf(2, 3), "b": leaf(1)}, {"w": leaf(3), "b": None}])


def coupled(x):
    first, second = x.layers
    hidden = jnp.tanh(jnp.sum(first["w"], 0) * first["b"]) * second["w"]
    return jnp.sum(hidden**2) * jnp.sin(x.head) + x.head * jnp.sum(first["w"] ** 3)


PATHS = ["", "head", "layers", "layers/0", "layers/1", "layers/0/w", "layers/0/b", "layers/1/w"]


def at(tree, path):
    """The obvious way down a tree of our own making."""
    for key in path.split("/") if path else []:
        tree = getattr(tree, key) if hasattr(tree, key) else tree[int(key)] if key.isdigit() else tree[key]
    return tree


def test_paths_are_spelled_by_keystr():
    assert leaf_paths(make_point()) == ["head", "layers/0/b", "layers/0/w", "layers/1/w"]
    assert leaf_paths(jnp.ones(2)) == [""]


@pytest.mark.parametrize("path", PATHS)
def test_a_sub_tree_is_taken_and_put_back(path):
    x = make_point()
    part = select("blocks", x, path)
    assert_trees_close(part.take(x), at(x, path))
    doubled = part.put(x, jax.tree.map(lambda leaf: 2 * leaf, part.take(x)))
    assert_trees_close(part.take(doubled), jax.tree.map(lambda leaf: 2 * leaf, at(x, path)))
    changed = sum(one is not other for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(doubled), strict=True))
    assert changed == len(jax.tree.leaves(at(x, path)))


@pytest.mark.thin
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("paths", [("layers/0", "layers"), ("head", "layers/0/w"), ("", "layers/1/w")], ids=str)
def test_a_block_is_that_of_jax(mode, paths, dtype):
    x = make_point(dtype)
    rows, columns = paths
    whole = jax.jit(jax.hessian(coupled))(x)
    want = jax.tree.map(lambda leaf, row: at(row, columns), at(x, rows), at(whole, rows))
    got = jax.jit(curvature.hessian(coupled, mode=mode, blocks=paths, chunk_size=2))(x)
    assert_trees_close(got, want, dtype, roundings=200)


@pytest.mark.parametrize("mode", MODES)
def test_the_block_diagonal_is_that_of_jax(mode):
    x = make_point()
    whole = jax.jit(jax.hessian(coupled))(x)
    want = jax.tree.map_with_path(lambda path, leaf: _down(_down(whole, path), path), x)
    assert_trees_close(jax.jit(curvature.hessian(coupled, mode=mode, blocks="diagonal"))(x), want)


def _down(tree, path):
    for key in path:
        tree = getattr(tree, key.name) if hasattr(key, "name") else tree[getattr(key, "key", getattr(key, "idx", None))]
    return tree


def test_blocks_of_several_outputs_and_arguments_with_aux():
    def fun(a, scale, b):
        return {"s": jnp.sum(a**3) * b["c"] * scale, "v": (jnp.sin(b["c"]) * a,)}, scale

    args = jnp.array([1.0, 2.0]), 2.0, {"c": jnp.array(0.3)}
    whole, _ = jax.hessian(fun, (0, 2), has_aux=True)(*args)
    block, aux = curvature.hessian(fun, (0, 2), has_aux=True, blocks=("0", "1/c"))(*args)
    assert aux == 2.0
    want = {"s": whole["s"][0][1]["c"], "v": (whole["v"][0][0][1]["c"],)}
    assert_trees_close(block, want)
    diagonal, aux = curvature.hessian(fun, (0, 2), has_aux=True, blocks="diagonal")(*args)
    assert aux == 2.0
    assert_trees_close(diagonal["v"], ((whole["v"][0][0][0], {"c": whole["v"][0][1]["c"][1]["c"]}),))


def test_blocks_of_functions_that_some_modes_cannot_differentiate():
    x = {"a": jnp.array([0.2, 0.4]), "b": jnp.array(0.7)}
    for inner in (reverse_only, forward_only):
        fun = lambda x, inner=inner: jnp.sum(inner(x["a"]) * x["b"] ** 2)
        got = curvature.hessian(fun, blocks=("a", "b"))(x)
        slope = jnp.cos(x["a"]) if inner is reverse_only else 3 * x["a"] ** 2
        assert_close(got, 2 * x["b"] * slope)


def test_blocks_under_vmap_and_grad():
    x = make_point()
    points = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), x)
    block = curvature.hessian(coupled, blocks=("head", "layers/0/w"))
    each = [block(jax.tree.map(lambda leaf, i=i: leaf[i], points)) for i in range(2)]
    assert_close(jax.vmap(block)(points), jnp.stack(each))
    third = jax.jit(jax.grad(lambda x: jnp.sum(block(x))))(x)
    want = jax.jit(jax.grad(lambda x: jnp.sum(jax.jacfwd(jax.grad(coupled))(x).head.layers[0]["w"])))(x)
    assert_trees_close(third, want)


# ---- the matrix view ----------------------------------------------------------------------------------------------


def test_the_view_is_the_matrix_in_the_order_of_ravel_pytree(dtype):
    x = make_point(dtype)
    blocks = curvature.hessian(coupled)(x)
    view = jax.jit(curvature.matrix_view)(blocks, x)
    dense = dense_blocks(blocks, x)
    assert view.matrix.dtype == dtype
    assert_close(view.matrix, dense, dtype)
    spans = {"head": slice(0, 1), "layers/0/b": slice(1, 2), "layers/0/w": slice(2, 8), "layers/1/w": slice(8, 11)}
    assert view.index == spans
    for row, row_span in spans.items():
        for column, column_span in spans.items():
            assert_close(view[row, column], dense[row_span, column_span], dtype)
    assert_close(view["layers/0", "layers"], dense[1:8, 1:11], dtype)
    assert_close(view["", "head"], dense[:, :1], dtype)


@pytest.mark.slow
def test_the_view_passes_through_transforms_without_retracing():
    traces = []

    @jax.jit
    def shift(view):
        traces.append(1)
        return jax.tree.map(lambda matrix: matrix + 1, view)

    x = make_point()
    for scale in (1.0, 2.0):
        view = curvature.matrix_view(curvature.hessian(coupled)(jax.tree.map(lambda leaf, s=scale: s * leaf, x)), x)
        assert_close(shift(view)["head", ""], view.matrix[:1] + 1)
    assert len(traces) == 1
    points = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), x)
    views = jax.vmap(lambda x: curvature.matrix_view(curvature.hessian(coupled)(x), x))(points)
    assert views["layers/1", "head"].shape == (2, 3, 1)


def test_the_view_promotes_leaves_of_different_precision_and_takes_a_bare_array():
    x = {"full": jnp.ones(2), "half": jnp.ones(3, jnp.float32)}
    blocks = curvature.hessian(lambda x: jnp.sum(x["half"] ** 3).astype(jnp.float64) * jnp.sum(x["full"] ** 2))(x)
    assert curvature.matrix_view(blocks, x).matrix.dtype == jnp.float64
    scalar = curvature.matrix_view(jnp.asarray(2.0), 1.0)
    assert scalar.matrix.shape == (1, 1)
    assert scalar.index == {"": slice(0, 1)}


@pytest.mark.slow
def test_the_view_of_every_scenario_is_the_closed_form():
    for scenario in SCENARIOS:
        x, args = scenario.make(jnp.float64)
        view = curvature.matrix_view(curvature.hessian(scenario.fun)(x, *args), x)
        flat = jax.flatten_util.ravel_pytree(x)[0]
        assert_close(view.matrix, scenario.hessian(np.asarray(flat), *args), roundings=200)


# ---- cost ---------------------------------------------------------------------------------------------------------


def _sizes_and_products(jaxpr):
    """The largest number of entries of any array, and how many matrix products stand in the program."""
    largest, products = 0, 0
    for eqn in jaxpr.eqns:
        largest = max([largest, *(v.aval.size for v in eqn.outvars)])
        products += eqn.primitive.name == "dot_general"
        for body in jex.core.jaxprs_in_params(eqn.params):
            inner = _sizes_and_products(body)
            largest, products = max(largest, inner[0]), products + inner[1]
    return largest, products


def test_a_block_computes_only_what_it_needs():
    params, *data = make_mlp((5, 7, 6, 2), 11)

    def cost(blocks):
        fun = curvature.hessian(mlp_loss, blocks=blocks, chunk_size=None)
        compiled = jax.jit(fun).lower(params, *data).compile()
        return compiled.cost_analysis()["flops"], _sizes_and_products(jax.make_jaxpr(fun)(params, *data).jaxpr)[1]

    whole, whole_products = cost(None)
    last, last_products = cost(("2/w", "2/w"))
    assert last_products < whole_products / 2  # no product goes back through the layers before
    assert last < whole / 50
    assert cost(("0/b", "2/b"))[0] < whole / 20  # two directions instead of 109


def test_the_block_diagonal_never_holds_the_matrix():
    params, *data = make_mlp((5, 7, 6, 2), 1)
    n = sum(leaf.size for leaf in jax.tree.leaves(params))
    fun = curvature.hessian(mlp_loss, blocks="diagonal", chunk_size=4)
    assert _sizes_and_products(jax.make_jaxpr(fun)(params, *data).jaxpr)[0] < n * n / 4
