"""KFAC and EKFAC against factors from explicit loops, and against exact blocks where they must be those."""

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg
from jax.flatten_util import ravel_pytree

from curvature import FisherOperator, KroneckerOperator
from curvature.operators._pytrees import replace
from curvature.operators.kronecker._blocks import EigenBlock
from tests.losses import B, in_precision
from tests.oracles import assert_close, flat

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels
rng = np.random.default_rng(3)


def normal(*shape):
    return rng.normal(size=shape)


def cast(tree, dtype=jnp.float64):
    """NumPy arrays, made before double precision is available, as JAX arrays."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype if np.issubdtype(leaf.dtype, np.floating) else None), tree)


# ---- the slow obvious way ------------------------------------------------------------------------------------------


class Tap:
    """Records the inputs of layers, and shifts their outputs."""

    def __init__(self, shifts):
        self.inputs, self.outputs, self.shifts = {}, {}, shifts

    def __call__(self, name, a, z):
        """``z = a W`` of a layer: both are made (positions, features)."""
        self.inputs[name] = a.reshape(-1, a.shape[-1])
        self.outputs[name] = z.shape
        return z + self.shifts[name] if name in self.shifts else z


def sliced(args, b):
    return jax.tree.map(lambda leaf: leaf[b : b + 1] if jnp.ndim(leaf) else leaf, args)


def backward_columns(model, loss, params, args):
    """For each example its inputs by layer, and for each column of a root of its Hessian the cotangents by layer."""

    @jax.jit
    def of_example(params, *example):
        tap = Tap({})
        outputs = model(tap, params, *example)
        hessian = jax.hessian(lambda o: loss(o.reshape(outputs.shape), *example))(outputs.ravel())
        eigenvalues, vectors = jnp.linalg.eigh(hessian)
        zero = {name: jnp.zeros(shape) for name, shape in tap.outputs.items()}
        _, pull = jax.vjp(lambda shifts: model(Tap(shifts), params, *example).ravel(), zero)
        return tap.inputs, [pull(w)[0] for w in (vectors * jnp.sqrt(jnp.maximum(eigenvalues, 0))[None]).T]

    for b in range(B):
        inputs, columns = of_example(params, *sliced(args, b))
        layers = [{name: np.asarray(d).reshape(-1, d.shape[-1]) for name, d in column.items()} for column in columns]
        yield {name: np.asarray(a) for name, a in inputs.items()}, layers


def factors_by_loops(model, loss, params, args, sharing):
    """``A``, of the inputs, and ``G`` of each layer, for the mean over examples."""
    known = list(backward_columns(model, loss, params, args))
    factors = {}
    for name in known[0][0]:
        a_total, g_total = 0, 0
        for inputs, columns in known:
            a = inputs[name]
            a = a.mean(0, keepdims=True) if sharing == "reduce" else a
            a_total = a_total + sum(np.outer(row, row) for row in a) / len(a) / len(known)
            for column in columns:
                d = column[name]
                d = d.sum(0, keepdims=True) if sharing == "reduce" else d
                g_total = g_total + sum(np.outer(row, row) for row in d)
        factors[name] = a_total, g_total / len(known)
    return factors


def exact_matrix(model, loss, params, args, reduction="mean"):
    """The Gauss-Newton matrix as a sum over examples."""
    vector, unravel = ravel_pytree(params)

    @jax.jit
    def of_example(vector, *example):
        outputs = model(unravel(vector), *example)
        jacobian = jax.jacobian(lambda v: model(unravel(v), *example).ravel())(vector)
        return jacobian.T @ jax.hessian(lambda o: loss(o.reshape(outputs.shape), *example))(outputs.ravel()) @ jacobian

    size = len(jax.tree.leaves(args)[0])
    total = sum(np.asarray(of_example(vector, *sliced(args, b))) for b in range(size))
    return total / (size if reduction == "mean" else 1)


def diagonal_blocks(matrix, tree):
    """The blocks of the leaves."""
    ends = np.cumsum([leaf.size for leaf in jax.tree.leaves(tree)])
    return [
        matrix[end - leaf.size : end, end - leaf.size : end]
        for end, leaf in zip(ends, jax.tree.leaves(tree), strict=True)
    ]


# ---- models, of which the first argument records ------------------------------------------------------------------


def no_tap(name, a, z):
    return z


def recording_mlp(tap, params, x, y):
    """The layers of equinox, whose weights stand on the left."""
    for k, layer in enumerate(params.layers):
        x = tap(str(k), x, x @ layer.weight.T + layer.bias[None])
        x = jnp.tanh(x) if k + 1 < len(params.layers) else x
    return x


def equinox_mlp(params, x, y):
    return jax.vmap(equinox.combine(params, STATIC))(x)


def recording_cnn(tap, params, image, label):
    """A convolution and a dense layer, with the names of flax."""
    conv, dense = params["params"]["Conv_0"], params["params"]["Dense_0"]
    padded = jnp.pad(image, [(0, 0), (0, 1), (1, 1), (0, 0)])  # "SAME" for stride 2 and a 3 x 3 kernel on 4 x 5
    patches = jnp.stack(
        [
            jnp.stack([padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].reshape(len(image), -1) for j in range(3)], 1)
            for i in range(2)
        ],
        1,
    )
    kernel = conv["kernel"].reshape(-1, conv["kernel"].shape[-1])
    hidden = jnp.tanh(tap("conv", patches, patches @ kernel + conv["bias"][None, None, None]))
    hidden = hidden.reshape(len(image), -1)
    return tap("dense", hidden, hidden @ dense["kernel"] + dense["bias"][None])


class FlaxCNN(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, image):
        hidden = flax.linen.tanh(flax.linen.Conv(2, (3, 3), strides=2, param_dtype=image.dtype)(image))
        return flax.linen.Dense(3, param_dtype=image.dtype)(hidden.reshape(len(image), -1))


def flax_cnn(params, image, label):
    return FlaxCNN().apply(params, image)


def recording_attention(tap, params, tokens, labels):
    """An embedding, a norm and an attention head; every token has a label."""
    one_hot = jax.nn.one_hot(tokens, len(params["embed"]), dtype=params["embed"].dtype)
    hidden = tap("embed", one_hot, params["embed"][tokens])
    normed = hidden / jnp.sqrt(jnp.mean(hidden**2, -1, keepdims=True) + 1e-3) * params["scale"][None, None]
    q, k, v = (tap(name, normed, normed @ params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bsh,bth->bst", q, k))
    mixed = hidden + weights @ v
    return tap("out", mixed, mixed @ params["out"])


def mean_cross_entropy(outputs, data, labels):
    return jnp.mean(cross_entropy(outputs, labels))


def squared(outputs, data, targets):
    return jnp.mean(jnp.sum((outputs - targets) ** 2, -1))


MLP, STATIC = equinox.partition(equinox.nn.MLP(3, 2, 4, 2, jnp.tanh, key=jax.random.key(1)), equinox.is_inexact_array)
CNN = {
    "params": {
        "Conv_0": {"kernel": normal(3, 3, 2, 2), "bias": normal(2)},
        "Dense_0": {"kernel": normal(12, 3), "bias": normal(3)},
    }
}
ATTENTION = {"embed": normal(6, 4), "scale": normal(4), "q": normal(4, 3), "k": normal(4, 3), "v": normal(4, 4)}
ATTENTION |= {"out": normal(4, 3)}
IMAGES, LABELS = normal(B, 4, 5, 2), rng.integers(0, 3, B)
TOKENS, TOKEN_LABELS = rng.integers(0, 6, (B, 5)), rng.integers(0, 3, (B, 5))


def own_attention(params, tokens, labels):
    return recording_attention(no_tap, params, tokens, labels)


CASES = {
    "equinox_mlp": (
        recording_mlp,
        equinox_mlp,
        squared,
        jax.tree.map(np.asarray, MLP),
        (normal(B, 3), normal(B, 2)),
        lambda f: [block for k in "012" for block in (np.kron(f[k][1], f[k][0]), f[k][1])],
    ),
    "flax_cnn": (
        recording_cnn,
        flax_cnn,
        mean_cross_entropy,
        CNN,
        (IMAGES, LABELS),
        lambda f: [f["conv"][1], np.kron(*f["conv"]), f["dense"][1], np.kron(*f["dense"])],
    ),
}


@pytest.mark.thin
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
@pytest.mark.parametrize("name", CASES)
def test_factors_are_those_of_explicit_loops(name, sharing):
    recording, model, loss, params, args, blocks = CASES[name]
    params, args = cast(params), cast(args)

    def total_loss(outputs, *args):
        return len(outputs) * loss(outputs, *args)

    @jax.jit
    def matrices(*data):
        mean = KroneckerOperator(model, loss, *data, sharing=sharing)
        total = KroneckerOperator(model, total_loss, *data, sharing=sharing, reduction="sum")
        return mean.as_matrix(), total.as_matrix()

    want = scipy.linalg.block_diag(*blocks(factors_by_loops(recording, loss, params, args, sharing)))
    mean, total = matrices(params, *args)
    assert_close(mean, want, roundings=1e3)
    assert_close(total, B * want, roundings=1e3)


@pytest.mark.slow
@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_attention_has_factors_a_diagonal_one_for_the_embedding_and_an_exact_block_for_the_scale(sharing):
    params, args = cast(ATTENTION), cast((TOKENS, TOKEN_LABELS))
    factors = factors_by_loops(recording_attention, mean_cross_entropy, params, args, sharing)
    expanded = factors_by_loops(recording_attention, mean_cross_entropy, params, args, "expand")
    op = jax.jit(lambda *data: KroneckerOperator(own_attention, mean_cross_entropy, *data, sharing=sharing))(
        params, *args
    )
    exact = exact_matrix(own_attention, mean_cross_entropy, params, args)
    want = {name: np.kron(*factors[name]) for name in ["k", "out", "q", "v"]}
    assert_close(expanded["embed"][0], np.diag(np.bincount(TOKENS.ravel(), minlength=6) / TOKENS.size))
    want["embed"] = np.kron(*expanded["embed"])
    want["scale"] = diagonal_blocks(exact, params)[sorted(ATTENTION).index("scale")]
    assert_close(op.as_matrix(), scipy.linalg.block_diag(*(want[name] for name in sorted(want))), roundings=1e4)
    over = ("expanded over" if sharing == "expand" else "reduced from") + " 5 positions"
    assert str(op.report).splitlines() == [
        "embed  Kronecker factors 6 x 6 (diagonal) and 4 x 4, expanded over 5 positions",
        f"k      Kronecker factors 4 x 4 and 3 x 3, {over}",
        f"out    Kronecker factors 4 x 4 and 3 x 3, {over}",
        f"q      Kronecker factors 4 x 4 and 3 x 3, {over}",
        "scale  exact block of 4 entries: it scales, entry by entry",
        f"v      Kronecker factors 4 x 4 and 4 x 4, {over}",
    ]


# ---- where it is exact ---------------------------------------------------------------------------------------------


def deep_linear(params, x, y):
    for w in params["layers"]:
        x = x @ w
    return x + params["b"][None]


@pytest.mark.thin
@pytest.mark.parametrize(("approximation", "reduction"), [("kfac", "mean"), ("ekfac", "sum")])
def test_a_deep_linear_network_under_squared_loss_has_its_exact_blocks(approximation, reduction, dtype):
    params = cast({"layers": (normal(3, 5), normal(5, 4), normal(4, 2)), "b": normal(2)}, dtype)
    args = cast((normal(7, 3), normal(7, 2)), dtype)

    def loss(outputs, x, y):
        return (jnp.mean if reduction == "mean" else jnp.sum)(jnp.sum((outputs - y) ** 2, -1))

    @jax.jit
    def operator(params, *args):
        return KroneckerOperator(
            deep_linear, loss, params, *args, approximation=approximation, reduction=reduction, chunk_size=3
        )

    op = operator(params, *args)
    exact = exact_matrix(deep_linear, loss, cast(params), cast(args), reduction)
    want = scipy.linalg.block_diag(*diagonal_blocks(exact, params))
    got = op.as_matrix()
    assert got.dtype == dtype
    assert_close(got, want, dtype, roundings=100)
    v = jax.tree.map(lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), params)
    product = op @ v
    assert jax.tree.map(lambda leaf: leaf.dtype, product) == jax.tree.map(lambda leaf: leaf.dtype, params)
    assert_close(flat(product), want @ flat(v), dtype, roundings=100)


@pytest.mark.slow
@pytest.mark.parametrize("approximation", ["kfac", "ekfac"])
def test_a_single_example_has_its_exact_blocks(approximation):
    _, model, loss, params, args, _ = CASES["equinox_mlp"]
    params, args = cast(params), sliced(cast(args), 0)
    op = KroneckerOperator(model, loss, params, *args, approximation=approximation)
    exact = exact_matrix(model, loss, params, args)
    assert_close(op.as_matrix(), scipy.linalg.block_diag(*diagonal_blocks(exact, params)), roundings=1e3)


# ---- every way in which parameters meet the data -------------------------------------------------------------------


def half_square(outputs, *args):
    """Its Hessian is one, so that the Gauss-Newton matrix is the sum of outer products of gradients."""
    return jnp.sum(outputs**2) / 2


def gradients_by_leaf(loss, params, batch):
    trees = jax.jit(jax.vmap(jax.grad(loss), (None,) + (0,) * len(batch)))(params, *batch)
    return [np.asarray(leaf).reshape(B, -1) for leaf in jax.tree.leaves(trees)]


@pytest.mark.thin
@pytest.mark.parametrize(
    "name", ["smooth", "tied", "recurrent", "stacked", "convolutional", "odd", "rows", "branching"]
)
def test_ekfac_has_the_exact_diagonal_in_its_basis_and_other_leaves_their_exact_blocks(name):
    loss, params, batch = in_precision(name, jnp.float64)

    def model(params, *batch):
        return jax.vmap(loss, (None,) + (0,) * len(batch))(params, *batch)

    @jax.jit
    def operator(params, *batch):
        return KroneckerOperator(
            model, half_square, params, *batch, approximation="ekfac", chunk_size=3, reduction="sum"
        )

    op = operator(params, *batch)
    for block, rows, route in zip(
        op.blocks, gradients_by_leaf(loss, params, batch), op.report.routes.values(), strict=True
    ):
        exact = rows.T @ rows
        assert_close(block.trace(), np.trace(exact), roundings=1e3)
        if isinstance(block, EigenBlock):
            assert route.startswith("Kronecker factors")
            weights = jnp.asarray(rng.normal(size=block.eigenvalues.shape))
            weighted = replace(block, eigenvalues=weights)
            columns = [
                np.asarray(weighted.mv(row.reshape(block.layout.view.shape))).ravel() for row in jnp.asarray(exact)
            ]
            assert_close(np.trace(columns), jnp.sum(weights * block.eigenvalues), roundings=1e4)
        else:
            assert route.startswith(("exact block", "zero"))
            columns = [np.asarray(block.mv(e.reshape(block.diagonal().shape))).ravel() for e in jnp.eye(len(exact))]
            assert_close(np.stack(columns), exact, roundings=1e3)


@pytest.mark.slow
def test_a_scan_and_the_same_steps_written_out_have_the_same_factors():
    params = cast({"w": normal(3, 3), "u": normal(2, 3), "b": normal(3)})
    xs = cast(normal(B, 4, 2))

    def step(params, hidden, x):
        return jnp.tanh(hidden @ params["w"] + x @ params["u"] + params["b"][None])

    def scanned(params, xs):
        start = jnp.tile(xs[:, 0, :1], (1, 3))
        return jax.lax.scan(lambda h, x: (step(params, h, x), None), start, jnp.swapaxes(xs, 0, 1))[0]

    def unrolled(params, xs):
        hidden = jnp.tile(xs[:, 0, :1], (1, 3))
        for t in range(4):
            hidden = step(params, hidden, xs[:, t])
        return hidden

    one, other = (
        jax.jit(lambda *data, model=model: KroneckerOperator(model, half_square, *data, reduction="sum"))(params, xs)
        for model in (scanned, unrolled)
    )
    assert_close(one.as_matrix(), other.as_matrix(), roundings=1e3)
    assert one.report.routes["u"] == "Kronecker factors 2 x 2 and 3 x 3, expanded over 4 positions"
    assert other.report.routes["u"] == "Kronecker factors 2 x 2 and 3 x 3, expanded over 4 positions of 4 uses"


@pytest.mark.slow
def test_what_follows_no_rule_says_so():
    params = cast({"large": normal(600), "norm": normal(3, 2), "unused": normal(2), "w": normal(3, 3)})
    x = cast(normal(B, 3))

    def model(params, x):
        scaled = jnp.tile(x, (1, 200)) * params["large"][None]
        unit = params["norm"] / jnp.sqrt(jnp.sum(params["norm"] ** 2))
        return {"a": jnp.sum(scaled, 1), "b": x @ unit, "c": jnp.tanh(x @ params["w"]) @ params["w"].T}

    def loss(outputs, x):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(outputs)) / 2

    op = jax.jit(lambda *data: KroneckerOperator(model, loss, *data, reduction="sum"))(params, x)
    assert str(op.report).splitlines() == [
        "large   exact diagonal of 600 entries: it scales, entry by entry",
        "norm    exact block of 6 entries: what meets the data is a function of this leaf, not the leaf itself",
        "unused  zero: the outputs do not depend on it",
        "w       exact block of 9 entries: its uses have no layout in common",
    ]
    vector, unravel = ravel_pytree(params)
    jacobian = jax.jacobian(lambda v: jax.vmap(lambda x: ravel_pytree(model(unravel(v), x[None]))[0])(x))(vector)
    rows = np.asarray(jacobian).reshape(-1, vector.size)
    large, norm, unused, w = diagonal_blocks(rows.T @ rows, params)
    want = [np.diag(np.diag(large)), norm, unused, w]
    for block, exact in zip(op.blocks, want, strict=True):
        basis = jnp.eye(len(exact))[:20]
        got = [np.asarray(block.mv(e.reshape(block.diagonal().shape))).ravel() for e in basis]
        assert_close(np.stack(got), exact[:20], roundings=1e3)


@pytest.mark.slow
def test_a_model_without_reverse_mode_has_exact_blocks():
    def model(w, x):
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * (x @ w)), (0, x @ w))[1]

    w, x = cast(normal(2)), cast(normal(B, 2))
    op = KroneckerOperator(model, half_square, w, x, reduction="sum")
    jacobian = 3 * np.asarray(x @ w)[:, None] ** 2 * np.asarray(x)
    assert_close(op.as_matrix(), jacobian.T @ jacobian)
    assert op.report.routes == {"": "exact block of 2 entries: the model has no taps"}


# ---- the operator ----------------------------------------------------------------------------------------------------


def attention_operator(params, tokens, labels, **options):
    return KroneckerOperator(own_attention, mean_cross_entropy, params, tokens, labels, **options)


@pytest.mark.slow
@pytest.mark.parametrize("approximation", ["kfac", "ekfac"])
def test_all_that_the_operator_offers_is_that_of_its_matrix(approximation):
    params, damping = cast(ATTENTION), 0.1

    @jax.jit
    def everything(*data):
        op = attention_operator(*data, approximation=approximation)
        v = jax.tree.map(
            lambda leaf: jnp.cos(jnp.arange(leaf.size, dtype=leaf.dtype)).reshape(leaf.shape), op.in_structure()
        )
        inverse = op.inverse(damping)
        answers = op @ v, op.diagonal(), op.trace(), op.logdet(damping), inverse @ v, inverse.diagonal()
        return op.as_matrix(), v, answers, inverse.as_matrix(), op.logdet()

    matrix, v, answers, inverse, singular = everything(params, *cast((TOKENS, TOKEN_LABELS)))
    matrix = np.asarray(matrix)
    product, diagonal, trace, logdet, solution, inverse_diagonal = answers
    damped = matrix + damping * np.eye(len(matrix))
    assert_close(matrix, matrix.T)
    assert_close(flat(product), matrix @ flat(v), roundings=1e3)
    assert jax.tree.structure(product) == jax.tree.structure(params)
    assert_close(flat(diagonal), np.diag(matrix), roundings=1e3)
    assert_close(trace, np.trace(matrix), roundings=1e3)
    assert_close(logdet, np.linalg.slogdet(damped)[1], roundings=1e3)
    assert_close(flat(solution), np.linalg.solve(damped, flat(v)), roundings=1e4)
    assert_close(inverse, np.linalg.inv(damped), roundings=1e4)
    assert_close(flat(inverse_diagonal), np.diag(np.linalg.inv(damped)), roundings=1e4)
    assert singular < -100  # singular: what is left of its zero eigenvalues is rounding


def linear(w, x, y):
    return x @ w


def linear_operator(w, x, y, loss=squared, **options):
    return KroneckerOperator(linear, loss, w, x, y, **options)


LINEAR = normal(3, 2), normal(5, 3), normal(5, 2)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_the_inverse_of_damped_factors_balances_their_scales(scale):
    w, x, y = cast(LINEAR)
    x = x * scale
    a, g = np.asarray(x.T @ x) / 5, 2 * np.eye(2)
    damping = 1e-2 * scale**2
    pi = np.sqrt(np.trace(a) / 3 / (np.trace(g) / 2))
    want = np.kron(
        np.linalg.inv(a + pi * np.sqrt(damping) * np.eye(3)), np.linalg.inv(g + np.sqrt(damping) / pi * np.eye(2))
    )
    inverse = linear_operator(w, x, y).inverse(damping, exact=False)
    assert_close(inverse.as_matrix(), want, roundings=1e3)


def test_a_leaf_without_curvature_has_a_finite_inverse():
    w, x, y = cast(LINEAR)
    op = linear_operator(w, jnp.zeros_like(x), y)
    for exact in (True, False):
        assert_close(op.inverse(0.5, exact=exact).as_matrix(), 2 * np.eye(6))


@pytest.mark.slow
@pytest.mark.parametrize("approximation", ["kfac", "ekfac"])
def test_chunks_add_up_to_the_whole_batch(approximation):
    params, data = cast(ATTENTION), cast((TOKENS[:3], TOKEN_LABELS[:3]))
    options = {"approximation": approximation, "kind": "sampled", "likelihood": "categorical", "key": jax.random.key(7)}
    whole, parts = (
        jax.jit(lambda *data, size=size: attention_operator(*data, chunk_size=size, **options))(params, *data)
        for size in (None, 2)
    )
    assert_close(parts.as_matrix(), whole.as_matrix(), roundings=1e4)


@pytest.mark.slow
def test_a_new_point_or_batch_never_retraces_and_operators_pass_through_transforms():
    traced = []

    @jax.jit
    def build(*data):
        traced.append("build")
        return linear_operator(*data)

    @jax.jit
    def use(op, v):
        traced.append("use")
        return op.inverse(1.0) @ (op @ v)

    w, x, y = cast(LINEAR)
    for scale in (1.0, 2.0):
        op = build(scale * w, scale * x, y)
        got = use(op, w)
        matrix = np.asarray(op.as_matrix())
        assert_close(got.ravel(), np.linalg.solve(matrix + np.eye(6), matrix @ np.asarray(w).ravel()), roundings=1e3)
    assert traced == ["build", "use"]
    assert_close(jax.grad(lambda v: jnp.vdot(v, op @ v) / 2)(w), op @ w)
    traces = jax.vmap(lambda x: linear_operator(w, x, y).trace())(jnp.stack([x, 2 * x]))
    assert_close(traces[1], 4 * traces[0])
    both = jax.vmap(lambda x: linear_operator(w, x, y))(jnp.stack([x, 2 * x]))
    assert_close(jax.vmap(lambda op: op @ w)(both)[1], op @ w)


# ---- what is sent back -----------------------------------------------------------------------------------------------


def weighted_cross_entropy(outputs, x, y):
    return jnp.sum(optax.losses.softmax_cross_entropy(outputs, jax.nn.softmax(y)) * jnp.abs(y[..., 0])) / 3


def sigmoid_cross_entropy(outputs, x, y):
    return jnp.mean(jnp.sum(optax.losses.sigmoid_binary_cross_entropy(outputs, jax.nn.sigmoid(y)), -1)) / 7


LIKELIHOODS = {"categorical": weighted_cross_entropy, "bernoulli": sigmoid_cross_entropy, "normal": squared}


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_closed_forms_and_sampled_labels_have_the_curvature_of_the_loss(likelihood):
    w, x, y = cast(LINEAR)
    loss = LIKELIHOODS[likelihood]

    @jax.jit
    def matrices(*data):
        sampled = {"likelihood": likelihood, "kind": "sampled", "key": jax.random.key(0), "num_samples": 4096}
        reduction = "sum" if likelihood == "categorical" else "mean"
        ops = [
            linear_operator(*data, loss, reduction=reduction, **options)
            for options in ({}, {"likelihood": likelihood}, sampled)
        ]
        return [op.as_matrix() for op in ops]

    general, closed, sampled = matrices(w, x, y)
    assert_close(closed, general, roundings=1e3)
    assert np.abs(sampled - general).max() < 0.08 * np.abs(general).max()  # 4 standard errors of the entries


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sampled", "empirical"])
def test_exact_blocks_are_those_of_the_fisher_operator_with_the_same_draws(kind):
    w, x, y = cast(LINEAR)

    def model(scales, x, y):
        return jnp.tanh(x * scales[None])

    def loss(outputs, x, y):
        return jnp.mean(cross_entropy(outputs, (y[:, 0] > 0).astype(jnp.int32)))

    options = {"kind": kind, "likelihood": "categorical", "key": jax.random.key(5)}
    options |= {"num_samples": 3} if kind == "sampled" else {}
    got = KroneckerOperator(model, loss, w[:, 0], x, y, **options).as_matrix()
    want = FisherOperator(model, loss, w[:, 0], x, y, **options).as_matrix()
    assert_close(got, want, roundings=1e3)


# ---- bad inputs ------------------------------------------------------------------------------------------------------

wrong_arguments = pytest.mark.filterwarnings("ignore::tests.typecheck.AnnotationWarning")


@wrong_arguments
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"approximation": "diagonal"}, "approximation='diagonal' is unknown, expected one of 'kfac', 'ekfac'"),
        ({"sharing": "both"}, "sharing='both' is unknown"),
        ({"kind": "mc"}, "kind='mc' is unknown"),
        ({"likelihood": "poisson"}, "likelihood='poisson' is unknown"),
        ({"reduction": "none"}, "reduction='none' is unknown"),
        ({"kind": "sampled", "likelihood": "normal"}, "needs key="),
        ({"kind": "sampled", "key": 0}, "needs likelihood="),
        ({"num_samples": 0}, "num_samples=0, expected an integer >= 1"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear_operator(*cast(LINEAR), **options)


@wrong_arguments
def test_bad_models_and_data_are_refused():
    w, x, y = cast(LINEAR)
    with pytest.raises(ValueError, match="4 examples along its leading axis, expected 5"):
        linear_operator(w, x, y[:4])
    with pytest.raises(TypeError, match="loss returns shape"):
        linear_operator(w, x, y, lambda o, x, y: o[0])
    with pytest.raises(TypeError, match="has dtype int"):
        KroneckerOperator(lambda w, x: jnp.argmax(x @ w, 1), half_square, w, x)
    with pytest.raises(ValueError, match="one example has 3000 outputs, expected at most 2048"):
        KroneckerOperator(lambda w, x: jnp.tile(x @ w, (1, 1500)), half_square, w, x)
    with pytest.raises(ValueError, match="returns 2 arrays, expected one"):
        KroneckerOperator(lambda w, x: (x @ w, x @ w), lambda o, x: jnp.sum(o[0]), w, x, likelihood="normal")
    with pytest.raises(ValueError, match="at least two classes"):
        KroneckerOperator(lambda w, x: x @ w[:, :1], half_square, w, x, likelihood="categorical")
    with pytest.raises(ValueError, match=r"damping=-1\.0, expected a number >= 0"):
        linear_operator(w, x, y).inverse(-1.0)
