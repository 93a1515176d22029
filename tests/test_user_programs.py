"""Models and losses as users write them, in functions of arrays alone, against the derivatives of JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, nn

from tests.against_jax import Case, examples_taken_apart, failures_of, over_examples

B = 4
PROGRAMS = {}


class Below(NamedTuple):
    """Integers below ``size``."""

    size: int
    shape: tuple[int, ...] = ()


def program(data, **shapes):
    """A loss of one example: the shapes of its parameters and of its data."""

    def register(fun):
        PROGRAMS[fun.__name__] = fun, shapes, data
        return fun

    return register


def values(name):
    """The parameters and the batch of a program."""
    _, shapes, data = PROGRAMS[name]
    rng = np.random.default_rng(sum(map(ord, name)))

    def draw(shape):
        if isinstance(shape, Below):
            return jnp.asarray(rng.integers(0, shape.size, (B, *shape.shape)))
        return jnp.asarray(0.7 * rng.normal(size=(B, *shape)))

    p = {key: jnp.asarray(0.7 * rng.normal(size=shape)) for key, shape in shapes.items()}
    return p, tuple(map(draw, data))


def turned(x):
    """Rotary position embedding."""
    angle = jnp.arange(x.shape[-2])[:, None] * 100.0 ** (-jnp.arange(0, x.shape[-1], 2) / x.shape[-1])
    even, odd = x[..., ::2], x[..., 1::2]
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([even * c - odd * s, even * s + odd * c], -1).reshape(x.shape)


def normalized(x):
    return x * lax.rsqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-6)


@program([(3, 4), (3,)], q=(4, 2, 2), k=(4, 1, 2), v=(4, 1, 2), o=(2, 2, 4), g=(4,))
def grouped_queries_with_rotary_embedding(p, x, y):
    h = normalized(x) * p["g"]
    q, k, v = (jnp.einsum("td,dhk->htk", h, p[name]) for name in "qkv")
    k, v = jnp.repeat(turned(k), 2, 0), jnp.repeat(v, 2, 0)
    scores = jnp.where(jnp.tril(jnp.ones((3, 3), bool)), jnp.einsum("htk,hsk->hts", turned(q), k), -jnp.inf)
    out = jnp.einsum("hts,hsk->thk", nn.softmax(scores, -1), v)
    return jnp.mean((x + jnp.einsum("thk,hkd->td", out, p["o"]))[:, 0] * y) ** 2


@program([(3, 4)], qkv=(4, 12), o=(4, 4))
def one_matrix_for_queries_keys_values(p, x):
    q, k, v = (a.reshape(3, 2, 2).transpose(1, 0, 2) for a in jnp.split(x @ p["qkv"], 3, -1))
    out = nn.softmax(q @ k.swapaxes(1, 2), -1) @ v
    return jnp.sum((out.transpose(1, 0, 2).reshape(3, 4) @ p["o"]) ** 2)


@program([(5, 5, 2)], k=(2, 2, 2, 3), t=(2, 2, 3, 2))
def dilated_and_transposed_convolutions(p, x):
    orders = ("NHWC", "HWIO", "NHWC")
    padding = ((1, 0), (0, 1))
    z = lax.conv_general_dilated(x[None], p["k"], (2, 1), padding, rhs_dilation=(2, 2), dimension_numbers=orders)
    return jnp.sum(lax.conv_transpose(nn.softplus(z), p["t"], (2, 2), "SAME", dimension_numbers=orders) ** 2)


@program([(4, 4, 2)], k=(2, 2, 1, 2), w=(2, 3))
def depthwise_separable_convolution(p, x):
    orders = ("NHWC", "HWIO", "NHWC")
    z = lax.conv_general_dilated(x[None], p["k"], (1, 1), "VALID", dimension_numbers=orders, feature_group_count=2)
    return jnp.mean(jnp.tanh(z) @ p["w"]) ** 2


@program([Below(5, (4,))], e=(5, 3), w=(3, 3))
def language_model_with_tied_embeddings(p, tokens):
    h = p["e"][tokens[:-1]] * np.sqrt(3)
    h = h + jnp.tanh(normalized(h) @ p["w"])
    return -jnp.mean(jnp.take_along_axis(nn.log_softmax(h @ p["e"].T), tokens[1:, None], 1))


@program([(3,)], gate=(3, 4), a=(4, 3, 2), b=(4, 2, 3))
def experts_by_top_k(p, x):
    scores, chosen = lax.top_k(x @ p["gate"], 2)
    h = nn.gelu(jnp.einsum("kdh,d->kh", p["a"][chosen], x))
    return jnp.sum((nn.softmax(scores) @ jnp.einsum("kh,khd->kd", h, p["b"][chosen]) - x) ** 2)


@program([(4, 2), ()], i=(2, 9), h=(3, 9), b=(9,), o=(3,))
def gated_recurrent_unit(p, x, y):
    def step(h, u):
        (zi, ri, ni), (zh, rh, nh) = jnp.split(u @ p["i"] + p["b"], 3), jnp.split(h @ p["h"], 3)
        z = nn.sigmoid(zi + zh)
        h = (1 - z) * jnp.tanh(ni + nn.sigmoid(ri + rh) * nh) + z * h
        return h, h @ p["o"]

    out = lax.scan(step, jnp.zeros(3), x)[1]
    return (out[-1] - y) ** 2 + 0.1 * jnp.mean(out**2)


@program([(4, 2)], re=(3, 2, 2), im=(3, 2, 2), w=(2, 2))
def fourier_layer(p, x):
    modes = jnp.einsum("fi,fij->fj", jnp.fft.rfft(x, axis=0), p["re"] + 1j * p["im"])
    return jnp.mean(nn.gelu(jnp.fft.irfft(modes, n=4, axis=0) + x @ p["w"]) ** 2)


@program([()], w=(1, 4), b=(4,), v=(4,))
def oscillator_by_sines(p, t):
    def u(t):
        return jnp.sin(3 * t * p["w"][0] + p["b"]) @ p["v"]

    du = jax.grad(u)
    return (jax.grad(du)(t) + 0.1 * du(t) + jnp.sin(u(t))) ** 2 + (u(0.0) - 1) ** 2


@program([(3,)], w=(3, 3), b=(3,))
def fixed_point_by_custom_root(p, x):
    def residual(z):
        return z - jnp.tanh(0.3 * z @ p["w"] + x + p["b"])

    def iterate(f, z):
        return lax.fori_loop(0, 60, lambda _, z: z - f(z), z)

    def solve(g, y):
        return jnp.linalg.solve(jax.jacobian(g)(y), y)

    return jnp.sum(lax.custom_root(residual, jnp.zeros(3), iterate, solve) ** 2)


@program([(5, 3)], w=(3, 3))
def alignments_in_log_space(p, x):
    scores = nn.log_softmax(x @ p["w"])

    def step(a, s):
        moved = jnp.concatenate([jnp.full(1, -1e5), a[:-1]])
        return jnp.logaddexp(a, moved) + s, None

    return -nn.logsumexp(lax.scan(step, jnp.full(3, -1e5).at[0].set(scores[0, 0]), scores[1:])[0][1:])


@program([(3,), (3,), (3,)], w=(3, 2))
def triplet(p, anchor, near, far):
    def embed(x):
        z = jnp.tanh(x @ p["w"])
        return z / jnp.linalg.norm(z)

    gap = jnp.sum((embed(anchor) - embed(near)) ** 2) - jnp.sum((embed(anchor) - embed(far)) ** 2)
    return nn.relu(gap + 0.5)


@program([(3,), Below(2), ()], s=(2,), w=(3, 2))
def two_tasks_with_penalty_on_all(p, x, k, y):
    z = jnp.tanh(x @ p["w"])
    tasks = jnp.stack([nn.logsumexp(z) - z[k], (z.sum() - y) ** 2])
    return jnp.sum(jnp.exp(-p["s"]) * tasks + p["s"]) + 0.01 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(p))


@program([(4, 2), (4,)], length=(2,), scale=(), noise=())
def marginal_likelihood_of_a_process(p, x, y):
    apart = (x[:, None] - x[None]) / jnp.exp(p["length"])
    near = jnp.exp(p["scale"] - 0.5 * jnp.sum(apart**2, -1)) + jnp.exp(p["noise"]) * jnp.eye(4)
    lower = jnp.linalg.cholesky(near)
    return 0.5 * y @ jax.scipy.linalg.cho_solve((lower, True), y) + jnp.sum(jnp.log(jnp.diag(lower)))


@program([(2, 3)], w=(2, 3, 3), d=(3, 3))
def ellipsis_and_repeated_letters(p, x):
    own = jnp.einsum("...i,ii,...i->...", x, p["d"], x)
    return jnp.sum(jnp.einsum("...i,ij...->...j", x, p["w"].transpose(1, 2, 0)) ** 2) + own.sum() ** 2


@program([(4, 3), Below(4, (5, 2))], w=(3, 2), v=(2,))
def messages_on_a_graph(p, x, edges):
    h = jnp.tanh(x @ p["w"])
    total = jax.ops.segment_sum(h[edges[:, 0]], edges[:, 1], 4)
    most = jax.ops.segment_max(h[edges[:, 0]], edges[:, 1], 4)
    return jnp.mean(((total + jnp.where(jnp.isfinite(most), most, 0)) @ p["v"]) ** 2)


@program([(3,), ()], p=(17,))
def one_vector_in_column_major_parts(p, x, y):
    p = p["p"]
    w, b, v = p[:6].reshape((3, 2), order="F"), lax.dynamic_slice(p, (6,), (2,)), p[8:12].reshape(2, 2).T
    head = p[-5:][::2]
    return (jnp.tanh(jnp.tanh(x @ w + b) @ v) @ head[:2] * head[2] - y) ** 2


@program([(3,)], w=(3, 4), book=(5, 4))
def vector_quantization(p, x):
    z = x @ p["w"]
    q = p["book"][jnp.argmin(jnp.sum((z - p["book"]) ** 2, -1))]
    stop = lax.stop_gradient
    return jnp.sum((z + stop(q - z)) ** 2) + jnp.sum((stop(z) - q) ** 2) + 0.25 * jnp.sum((z - stop(q)) ** 2)


@program([(3,), (3,)], w=(3, 2))
def loss_after_a_step_of_training(p, x, other):
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w) ** 2)
    return loss(p["w"] - 0.1 * jax.grad(loss)(p["w"], x), other)


@program([(3,)], w=(4, 1, 2, 2))
def pools_of_windows(p, x):
    z = lax.conv_general_dilated(jnp.outer(x, x)[None, None], p["w"], (1, 1), "SAME")
    most = lax.reduce_window(z, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
    return jnp.sum(most**2) + jnp.sum(jnp.tanh(lax.reduce_window(z, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 1, 1), "SAME")))


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_derivatives_are_those_of_jax(name):
    one, losses = PROGRAMS[name][0], over_examples(PROGRAMS[name][0])
    case = Case(one, lambda p, *batch: jnp.mean(losses(p, *batch)), *values(name))
    with examples_taken_apart(True):
        assert failures_of(case, 1e-8, len(name)) == {}
