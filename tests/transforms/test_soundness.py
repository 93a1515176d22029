"""Programs on which derivatives assembled from structure once were wrong, against plain JAX and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from tests.oracles import assert_close, dense_blocks

B = 5


@pytest.fixture(autouse=True)
def promotion():
    """Programs as people write them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def mean_of(loss):
    return lambda params, *batch: jnp.mean(jax.vmap(loss, (None,) + (0,) * len(batch))(params, *batch))


def rows_of(tree, count):
    """A tree whose leaves have a leading axis of examples as one row for each."""
    return np.concatenate([np.asarray(leaf).reshape(count, -1) for leaf in jax.tree.leaves(tree)], axis=1)


def assert_all_agree(loss, params, *batch, roundings=1e4):
    """Everything that is built on the structure of a loss, against ``jax.hessian`` and ``vmap(grad)``."""
    params, batch = jax.tree.map(jnp.asarray, (params, batch))
    count = len(batch[0])

    @jax.jit
    def plain(params, *batch):
        gradients = jax.vmap(jax.grad(loss), (None,) + (0,) * len(batch))
        return jax.hessian(mean_of(loss))(params, *batch), gradients(params, *batch)

    @jax.jit
    def assembled(bound, params, *batch):
        hessians = curvature.hessian(mean_of(loss))(params, *batch), curvature.mean_hessian(loss)(params, *batch)
        norms = curvature.per_example_grad_norm(loss)(params, *batch)
        clipped = curvature.clipped_grad(loss, bound)(params, *batch)
        return hessians, norms, clipped, curvature.per_example_grad_moments(loss)(params, *batch).second_moment

    want, gradients = plain(params, *batch)
    rows = rows_of(gradients, count)
    norms = np.linalg.norm(rows, axis=1)
    bound = float(np.median(norms)) or 1.0
    hessians, got_norms, (clipped, clipped_norms), second = assembled(bound, params, *batch)
    for got in hessians:
        assert_close(dense_blocks(got, params), dense_blocks(want, params), roundings=roundings)
    assert_close(got_norms, norms, roundings=roundings)
    assert_close(clipped_norms, norms, roundings=roundings)
    shares = np.minimum(1, bound / np.maximum(norms, 1e-300))
    assert_close(as_row(clipped), shares @ rows / count, roundings=roundings)
    assert_close(as_row(second), np.mean(rows**2, 0), roundings=roundings)


def as_row(tree):
    return rows_of(jax.tree.map(lambda leaf: leaf[None], tree), 1)[0]


def assert_kronecker_is_exact(model, x, *args):
    """For one example at one position the Kronecker blocks are the diagonal blocks of ``J'J``."""

    def loss(outputs, *args):
        return 0.5 * jnp.sum(outputs**2)

    x, args = jax.tree.map(jnp.asarray, (x, args))
    for approximation in ("kfac", "ekfac"):
        op = curvature.KroneckerOperator(model, loss, x, *args, reduction="sum", approximation=approximation)
        dense = np.asarray(curvature.GaussNewtonOperator(model, loss, x, *args).as_matrix())
        got, start = np.asarray(op.as_matrix()), 0
        for leaf in jax.tree.leaves(x):
            block = slice(start, start + leaf.size)
            assert_close(got[block, block], dense[block, block], roundings=1e4)
            start += leaf.size


# ---- a weight that is transposed, then reshaped --------------------------------------------------------------------


def test_a_transposed_and_raveled_weight_in_closed_form():
    W, X = jnp.arange(4.0).reshape(2, 2), jnp.array([[1.0, 2, 3, 4], [0, 0, 0, 0]])
    got = curvature.hessian(lambda W: jnp.mean((X @ W.T.reshape(4)) ** 2))(W)
    v = np.array([1.0, 3, 2, 4])
    np.testing.assert_allclose(np.asarray(got).reshape(4, 4), np.outer(v, v), rtol=1e-12)


VIEWS = {
    "ravel of the transpose": ((2, 3), lambda w: w.T.reshape(6)),
    "ravel in Fortran order": ((2, 3), lambda w: w.ravel(order="F")),
    "reshape in Fortran order": ((4, 3), lambda w: w.reshape((6, 2), order="F")),
    "merged heads": ((3, 2, 2), lambda w: w.transpose(1, 0, 2).reshape(2, 6)),
    "OIHW kernel as a matrix": ((2, 3, 1, 2), lambda w: w.transpose(2, 3, 1, 0).reshape(6, 2)),
    "swapped axes, then a ravel": ((2, 3, 2), lambda w: jnp.swapaxes(w, 0, 2).reshape(12)),
    "a transpose between two reshapes": ((12,), lambda w: w.reshape(3, 4).T.reshape(6, 2)),
    "another dtype in between": ((2, 3), lambda w: w.T.astype(jnp.float32).reshape(6).astype(jnp.float64)),
    "reversed": ((6,), lambda w: w[::-1].reshape(3, 2)),
    "transposed to its own shape": ((2, 2), lambda w: w.T.reshape(w.shape)),
    "a new axis, then a ravel": ((2, 3), lambda w: w.T[:, None].reshape(6)),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", VIEWS)
def test_views_of_a_weight(name):
    shape, view = VIEWS[name]
    w = normal(*shape)
    viewed = jax.eval_shape(view, w)
    inputs = normal(B, viewed.shape[0], seed=1)
    roundings = 1e13 if "dtype" in name else 1e4  # the weight is rounded to single precision there

    def two_layers(params, x):
        hidden = jnp.tanh(x @ view(params["w"])).reshape(-1)
        return jnp.sum(jnp.sin(hidden @ params["out"]) ** 2)

    def penalized(w, x):
        return jnp.sum(jnp.tanh(x @ view(w))) ** 2 + jnp.sum(w**2)

    width = viewed.size // viewed.shape[0]
    assert_all_agree(two_layers, {"w": w, "out": normal(width, 2, seed=2)}, inputs, roundings=roundings)
    if name in ("ravel of the transpose", "merged heads", "transposed to its own shape"):
        assert_all_agree(penalized, w, inputs, roundings=roundings)
    if roundings == 1e4:
        assert_kronecker_is_exact(lambda w, x: (x @ view(w)).reshape(len(x), -1), w, inputs[:1])


def test_a_penalty_beside_a_reshaped_weight():
    loss = lambda w, x: jnp.sum(x @ w.reshape(2, 2)) ** 2 + jnp.sum(w**2)
    assert_all_agree(loss, np.ones(4), np.ones((1, 2)))
    assert_all_agree(lambda w, x: jnp.sum((x @ w.T.reshape(w.shape)) ** 2) + jnp.sum(w**2), normal(2, 2), normal(B, 2))


# ---- parameters that multiply the loss -----------------------------------------------------------------------------


def test_a_scale_of_the_loss_in_closed_form():
    loss = lambda p, x: p["s"] * jnp.sin(p["w"] * x)
    got = curvature.mean_hessian(loss)({"s": jnp.asarray(1.0), "w": jnp.asarray(0.5)}, jnp.ones(1))
    np.testing.assert_allclose(got["s"]["w"], np.cos(0.5), rtol=1e-12)
    np.testing.assert_allclose(got["w"]["s"], np.cos(0.5), rtol=1e-12)
    np.testing.assert_allclose(got["w"]["w"], -np.sin(0.5), rtol=1e-12)


SCALED = {
    "a scale": lambda p, inner: p["s"] * inner,
    "learned uncertainty": lambda p, inner: jnp.exp(-p["s"]) * inner + p["s"],
    "a square": lambda p, inner: p["s"] ** 2 * inner,
    "a difference": lambda p, inner: (1 - p["s"]) * inner,
    "a quotient": lambda p, inner: inner / p["s"],
    "a sum of parameters": lambda p, inner: jnp.sum(p["w"]) * inner,
    "two scales": lambda p, inner: p["s"] * (p["s"] * inner + 1),
    "a scale of shape (1,)": lambda p, inner: jnp.sum(p["s"].reshape(1) * inner.reshape(1)),
    "a constant and a scale": lambda p, inner: -(p["s"] * inner) + 3.0,
}


@pytest.mark.thin
@pytest.mark.parametrize("name", SCALED)
def test_parameters_that_multiply_the_loss(name):
    loss = lambda p, x: SCALED[name](p, jnp.sum(jnp.tanh(x @ p["w"]) ** 2))
    assert_all_agree(loss, {"s": 0.7, "w": normal(3, 2)}, normal(B, 3, seed=1))


# ---- complex arithmetic --------------------------------------------------------------------------------------------


def test_complex_constants_in_closed_form():
    A = jnp.array([[1j, 1.0], [1.0, 1j]])
    np.testing.assert_allclose(curvature.hessian(lambda q: jnp.mean(jnp.abs(A @ q) ** 2))(jnp.ones(2)), 2 * np.eye(2))
    norms = curvature.per_example_grad_norm(lambda q, a: jnp.abs(a @ q) ** 2)(jnp.array([1.0, 2.0]), A)
    np.testing.assert_allclose(norms, [np.sqrt(20), np.sqrt(20)], rtol=1e-12)


COMPLEX = {
    "complex data": (lambda p, a: jnp.abs(a @ p["u"]) ** 2, ["u"]),
    "exp before complex data": (lambda p, a: jnp.abs(a @ jnp.exp(p["u"])) ** 2, ["u"]),
    "a complex weight of two real leaves": (lambda p, a: jnp.abs(a @ (p["u"] + 1j * p["v"])) ** 2, ["u", "v"]),
    "a complex weight, and layers before": (
        lambda p, a: jnp.abs(jnp.tanh(a.real @ p["m"]) @ jax.lax.complex(p["u"], p["v"])) ** 2,
        ["m", "u", "v"],
    ),
    "a Fourier transform": (lambda p, a: jnp.sum(jnp.abs(jnp.fft.fft(jnp.tanh(a.real * p["u"]))) ** 2), ["u"]),
    "a real phase": (lambda p, a: jnp.abs(jnp.sum(a * jnp.exp(1j * p["u"]))) ** 2, ["u"]),
    "a conjugate": (lambda p, a: jnp.real(jnp.vdot(a * p["u"], jnp.conj(a) * p["v"])), ["u", "v"]),
    "complex inside a scan": (
        lambda p, a: jnp.abs(jax.lax.scan(lambda c, x: (c * (1j + jnp.sum(x * p["u"])), None), 1j + 0, a[:, None])[0]),
        ["u"],
    ),
    "inside an entrywise step": (lambda p, a: jnp.sum(jnp.abs(a * p["u"])), ["u"]),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", COMPLEX)
def test_complex_arithmetic_on_real_parameters(name):
    loss, leaves = COMPLEX[name]
    shapes = {"u": (3,), "v": (3,), "m": (3, 3)}
    params = {leaf: normal(*shapes[leaf], seed=k) for k, leaf in enumerate(leaves)}
    batch = normal(B, 3, seed=7) + 1j * normal(B, 3, seed=8)
    assert_all_agree(loss, params, batch)


def test_clipping_holds_through_complex_arithmetic():
    a = normal(B, 3, seed=7) + 1j * normal(B, 3, seed=8)
    loss = lambda q, a: 20 * jnp.abs(a @ q) ** 2
    for example in jnp.asarray(a)[:, None]:
        clipped, _ = curvature.clipped_grad(loss, 1.0)(jnp.ones(3), example)
        assert np.linalg.norm(clipped) <= 1 + 1e-12


# ---- groups with one row and several columns -----------------------------------------------------------------------

GROUPS = {
    "a vector for each group": ("g,go->go", (3,), (3, 2)),
    "one row for each group": ("ei,eih->eh", (3, 1), (3, 1, 4)),
    "groups behind": ("g,og->og", (3,), (2, 3)),
    "one row and one column": ("ei,eih->eh", (3, 1), (3, 1, 1)),
    "several rows": ("ei,eih->eh", (3, 2), (3, 2, 4)),
}


@pytest.mark.thin
@pytest.mark.parametrize("name", GROUPS)
def test_groups_of_rows_and_columns(name):
    formula, data, weight = GROUPS[name]

    def loss(p, x):
        hidden = jnp.tanh(jnp.einsum(formula, x * p["scale"], p["w"]))
        return jnp.sum(jnp.sin(jnp.sum(hidden, 0) @ p["out"]) ** 2) + jnp.sum(hidden**2)

    out = jax.eval_shape(lambda a, w: jnp.einsum(formula, a, w), np.ones(data), np.ones(weight)).shape
    params = {"w": normal(*weight), "scale": normal(*data, seed=4), "out": normal(out[1], 2, seed=5)}
    assert_all_agree(loss, params, normal(B, *data, seed=1))


# ---- parameters that leave a scan by its outputs -------------------------------------------------------------------

SCANS = {
    "a constant of the scan, stacked": lambda w, x: jnp.sum(
        x * jax.lax.scan(lambda c, xs: (c + xs * w[0], w), 0.0, x)[1] ** 2
    ),
    "a function of the constant, stacked": lambda w, x: jnp.sum(
        x[:, None] * jax.lax.scan(lambda c, xs: (c + xs * w[0], jnp.sin(w)), 0.0, x)[1] ** 2
    ),
    "a slice, stacked": lambda w, x: jnp.sum(
        (x * jax.lax.scan(lambda c, s: (c + s[0] * s[1], s[1]), 0.0, (x, w))[1]) ** 2
    ),
    "a carry that becomes a parameter": lambda w, x: (
        jax.lax.scan(lambda c, xs: ((xs * w[0], w[1]), c[1] * xs), (0.0, 1.0), x)[1].sum() ** 2
    ),
}


@pytest.mark.parametrize("name", SCANS)
def test_parameters_that_pass_through_a_scan(name):
    assert_all_agree(SCANS[name], normal(3), normal(B, 3, seed=1))


# ---- losses without parameters or data -----------------------------------------------------------------------------


def test_a_constant_loss_has_zero_derivatives():
    w, x = jnp.ones(2), jnp.ones((3, 2))
    for loss in (lambda w, x: jnp.asarray(3.0), lambda w, x: jnp.sum(x), lambda w, x: jnp.sum(w**0 * 2.0)):
        assert not curvature.per_example_grad_norm(loss)(w, x).any()
        assert not curvature.mean_hessian(loss)(w, x).any()
        assert not curvature.clipped_grad(loss, 1.0)(w, x)[0].any()
        assert not curvature.per_example_grad_moments(loss)(w, x).second_moment.any()
        assert not curvature.hessian(mean_of(loss))(w, x).any()


def test_a_reduction_by_a_function_of_two_arguments_is_no_call():
    loss = lambda w, x: jnp.sum(
        jax.lax.reduce(jnp.asarray([2.0, 3.0]), 0.5, lambda a, b: a * b + b, (0,)) * (x @ w) ** 2
    )
    assert_all_agree(loss, normal(3), normal(B, 3, seed=1))


# ---- custom rules that are no derivatives --------------------------------------------------------------------------


@jax.custom_vjp
def clipped_on_the_way_back(x):
    return x


clipped_on_the_way_back.defvjp(lambda x: (x, x), lambda x, d: (jnp.clip(d, -0.3, 0.3) * (1 + x**2),))


RULES = {
    "on parameters alone": lambda p, x: jnp.sum(jnp.sin(x @ clipped_on_the_way_back(p["w"])) ** 2),
    "on parameters and data in a branch": lambda p, x: jnp.sum(
        jax.lax.cond(x[0] > 0, lambda w, x: clipped_on_the_way_back(x @ w), lambda w, x: x @ w, p["w"], x) ** 2
    ),
    "on a function of them": lambda p, x: 3 * jnp.sum(clipped_on_the_way_back(x @ p["w"]) ** 2),
}


@pytest.mark.parametrize("name", RULES)
def test_cotangents_are_clipped_one_example_at_a_time(name):
    assert_all_agree(RULES[name], {"w": 2 * normal(3, 2)}, 2 * normal(B, 3, seed=1))


@jax.custom_jvp
def rotated(x):
    return x


@rotated.defjvp
def _(primals, tangents):
    (x,), (v,) = primals, tangents
    return x, v * jnp.roll(x, 1)  # the Jacobian diag(roll(x)) is that of no function


@pytest.mark.parametrize("rule", [clipped_on_the_way_back, rotated])
def test_the_hessian_is_the_jacobian_of_the_gradient_that_jax_computes(rule):
    loss = lambda p, x: jnp.sum(jnp.sin(rule(jnp.tanh(x @ p["w"])) @ p["out"]) ** 2)
    assert_all_agree(loss, {"w": normal(3, 4), "out": normal(4, 2, seed=2)}, normal(B, 3, seed=1))


# ---- leaves of several precisions ----------------------------------------------------------------------------------


def test_functions_of_parameters_of_two_precisions():
    def loss(p, x):
        h = jnp.tanh(x @ jnp.exp(p["single"].astype(x.dtype)).T.reshape(3, 4))
        return jnp.sum(jnp.sin(h @ (p["double"] ** 2)) ** 2)

    params = {"single": np.float32(0.3 * normal(4, 3)), "double": normal(4, 2, seed=2)}
    assert_all_agree(loss, params, normal(B, 3, seed=1), roundings=1e10)


def test_a_hessian_is_finite_where_that_of_jax_is():
    data, w = jnp.asarray(normal(B, 3)), jnp.asarray([0.0, 1.0, 2.0, 0.5])
    f = lambda w: jnp.mean(jnp.sum(data * jnp.sqrt(w)[1:], 1) ** 2)
    want = np.asarray(jax.hessian(f)(w))
    assert np.isfinite(want).any()
    assert not np.isfinite(want).all()
    np.testing.assert_allclose(curvature.hessian(f)(w), want, rtol=1e-10)


def test_a_parameter_that_pads():
    loss = lambda p, x: jnp.sum(jnp.sin(jax.lax.pad(jnp.tanh(x * p["w"]), p["edge"], [(1, 2, 0)]) * p["scale"]) ** 2)
    params = {"w": normal(3), "edge": np.float64(0.3), "scale": normal(6, seed=2)}
    assert_all_agree(loss, params, normal(B, 3, seed=1))
