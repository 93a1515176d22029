"""Hand-written programs that a shortcut may get wrong: ``PER_EXAMPLE[name]`` and ``OF_BATCH[name]``.

Each is a function of parameters ``p`` and data ``x``, ``y``, ``k``: of one example, or of a batch whose examples it
couples or only seems to couple. By default ``x`` is a vector of three numbers, ``y`` a number, ``k`` 0, 1 or 2.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

B = 4


class Nasty(NamedTuple):
    """A program, with the shapes of its parameters and of its data ``x``."""

    fun: Callable[..., Any]
    shapes: dict[str, Any]
    x: tuple[int, ...]
    size: int

    def values(self, dtype: Any = jnp.float64) -> tuple[Any, tuple[Any, ...]]:
        """Parameters and batch."""
        rng = np.random.default_rng(sum(map(ord, self.fun.__name__)))
        p = jax.tree.map(
            lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
            self.shapes,
            is_leaf=lambda shape: isinstance(shape, tuple) and all(isinstance(n, int) for n in shape),
        )
        x = jnp.asarray(rng.normal(size=(self.size, *self.x)), dtype)
        return p, (x, jnp.asarray(rng.normal(size=self.size), dtype), jnp.asarray(np.arange(self.size) % 3))


PER_EXAMPLE: dict[str, Nasty] = {}
OF_BATCH: dict[str, Nasty] = {}


def per_example(*, x: tuple[int, ...] = (3,), **shapes: Any) -> Callable[[Any], Any]:
    """A loss of one example, whose ``x`` has this shape."""

    def register(fun: Any) -> Any:
        PER_EXAMPLE[fun.__name__] = Nasty(fun, shapes, x, B)
        return fun

    return register


def of_batch(*, x: tuple[int, ...] = (3,), size: int = B, **shapes: Any) -> Callable[[Any], Any]:
    """A loss of a batch."""

    def register(fun: Any) -> Any:
        OF_BATCH[fun.__name__] = Nasty(fun, shapes, x, size)
        return fun

    return register


def cross_entropy(scores: Any, k: Any) -> Any:
    return optax.losses.softmax_cross_entropy_with_integer_labels(scores, k)


# ---- weights by moved, merged and regrouped axes --------------------------------------------------------------------


@per_example(w=(2, 3), v=(2, 2))
def transposed_then_reshaped(p, x, y, k):
    return jnp.sum(jnp.tanh(x @ p["w"].T.reshape(3, 2)) @ p["v"].T.reshape(2, 2)) ** 2


@per_example(w=(3, 3))
def transposed_to_its_own_shape(p, x, y, k):
    return jnp.sum(x @ p["w"].T.reshape(p["w"].shape)) ** 2 + jnp.sum(p["w"] ** 2)


@per_example(w=(2, 3))
def column_major(p, x, y, k):
    return (jnp.sum(jnp.sin(x @ p["w"].reshape((3, 2), order="F"))) - y) ** 2


@per_example(w=(2, 3))
def ravel_column_major(p, x, y, k):
    return (jnp.tanh(x @ jnp.ravel(p["w"], order="F").reshape(3, 2)) @ p["w"][:, 0] - y) ** 2


@per_example(q=(3, 2, 2), o=(2, 2, 3), x=(2, 3))
def merged_heads(p, x, y, k):
    """Heads in the middle of one weight, in front of the other."""
    q = x @ p["q"].transpose(0, 2, 1).reshape(3, 4)
    out = jnp.tanh(q) @ p["o"].transpose(1, 0, 2).reshape(4, 3)
    return jnp.sum((out - x) ** 2)


@per_example(q=(2, 3, 2), x=(2, 3))
def heads_by_transpose(p, x, y, k):
    """``w.transpose(1, 0, 2).reshape(d, -1)``."""
    return jnp.sum(jnp.tanh(x @ p["q"].transpose(1, 0, 2).reshape(3, -1)) ** 2) * y


@per_example(w=(2, 1, 2, 2), x=(3, 3))
def kernel_in_the_order_of_torch(p, x, y, k):
    """An OIHW kernel made a matrix for patches."""
    patches = jnp.stack([x[i : i + 2, j : j + 2].reshape(-1) for i in range(2) for j in range(2)])
    return jnp.sum(jnp.tanh(patches @ p["w"].reshape(2, -1).T) ** 2)


@per_example(w=(2, 1, 2, 2), x=(3, 3))
def kernel_turned_to_matrix(p, x, y, k):
    patches = jnp.stack([x[i : i + 2, j : j + 2].reshape(-1) for i in range(2) for j in range(2)])
    return jnp.sum(jnp.tanh(patches @ p["w"].transpose(2, 3, 1, 0).reshape(4, 2)) ** 2)


@per_example(w=(6,))
def flat_transposed(p, x, y, k):
    return jnp.sum(jnp.sin(p["w"].reshape(2, 3) @ x)) ** 2 + y * p["w"][0]


@per_example(w=(1, 3, 2))
def axes_of_one(p, x, y, k):
    return jnp.sum(jnp.tanh(x[None] @ p["w"].swapaxes(0, 1).reshape(1, 3, 2)[0])) ** 2


@per_example(w=(3, 1), b=(1, 1), s=(1,))
def ones_everywhere(p, x, y, k):
    return jnp.sum((x[None, :, None] * p["s"] * p["w"] + p["b"]) ** 2)


@per_example(x=(1,), w=(1, 1), b=(1,), v=(1,))
def all_sizes_one(p, x, y, k):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) * p["v"] - y) ** 2


@per_example(w=(2, 3))
def rolled_reversed_rotated(p, x, y, k):
    return jnp.sum(jnp.sin(jnp.rot90(jnp.roll(p["w"], 1, 0)[::-1]).T @ x)) ** 2


@per_example(w=(2, 3))
def cast_between(p, x, y, k):
    """Through a wider type, and back."""
    wide = p["w"].T.astype(jnp.float64).reshape(2, 3).astype(p["w"].dtype)
    return jnp.sum(jnp.tanh(wide @ x)) ** 2


@per_example(w=(3, 2), x=(3,))
def einsum_out_of_order(p, x, y, k):
    return jnp.sum(jnp.sin(jnp.einsum("ij,l,i->lj", p["w"], x, x)) ** 2)


@per_example(w=(2, 3, 2))
def einsum_three_axes(p, x, y, k):
    return jnp.sum(jnp.tanh(jnp.einsum("aij,i->ja", p["w"], x)) @ jnp.array([1.0, 2.0], x.dtype)) ** 2


@per_example(a=(3, 2), b=(2, 2))
def einsum_of_two_weights(p, x, y, k):
    return jnp.sum(jnp.einsum("i,ij,jk->k", x, p["a"], p["b"]) ** 2)


@per_example(w=(3, 3))
def diagonal_of_einsum(p, x, y, k):
    return jnp.sum(jnp.sin(jnp.einsum("i,ii->i", x, p["w"]))) ** 2


@per_example(w=(3, 2))
def one_row_per_group(p, x, y, k):
    return jnp.sum(jnp.tanh(jnp.einsum("g,go->go", x, p["w"])) ** 2)


@per_example(w=(3, 1, 2), v=(3, 2, 2))
def ensemble(p, x, y, k):
    hidden = jnp.tanh(jnp.einsum("ei,eih->eh", x[:, None], p["w"]))
    return jnp.sum(jnp.einsum("eh,eho->eo", hidden, p["v"]) ** 2)


# ---- one weight in several places -----------------------------------------------------------------------------------


@per_example(w=(3, 3))
def from_both_sides(p, x, y, k):
    return jnp.sum(jnp.tanh(x @ p["w"]) * (p["w"] @ x))


@per_example(w=(3, 2))
def tied_autoencoder(p, x, y, k):
    return jnp.sum((jnp.tanh(x @ p["w"]) @ p["w"].T - x) ** 2)


@per_example(w=(3, 2))
def siamese(p, x, y, k):
    def embed(x):
        return jnp.tanh(x @ p["w"])

    return jnp.sum((embed(x) - embed(x[::-1])) ** 2) * y


@per_example(e=(4, 2), w=(2, 2))
def tied_embedding(p, x, y, k):
    tokens = (x > 0).astype(int) + k
    return jnp.mean(cross_entropy(jnp.tanh(p["e"][tokens] @ p["w"]) @ p["e"].T, tokens))


@per_example(w=(3, 3))
def power_of_a_weight(p, x, y, k):
    return jnp.sum(jnp.sin(x @ jnp.linalg.matrix_power(p["w"], 3)))


@per_example(w=(3, 3))
def symmetric_part(p, x, y, k):
    return (x @ (p["w"] + p["w"].T) @ x - y) ** 2


@per_example(w=(3, 3), b=(3,))
def unrolled_with_one_weight(p, x, y, k):
    h = x
    for _ in range(3):
        h = jnp.tanh(h @ p["w"] + p["b"]) + 0.5 * h
    return jnp.sum(h**2)


@per_example(w=(5, 2))
def parts_of_one_leaf(p, x, y, k):
    """Weight, bias and head are slices of one array."""
    return jnp.sum(jnp.tanh(x @ p["w"][:3] + p["w"][3]) * p["w"][4]) ** 2


@per_example(w=(11,))
def all_from_one_vector(p, x, y, k):
    weight, bias, head = jnp.split(p["w"], [6, 8])
    return (jnp.tanh(x @ weight.reshape(3, 2) + bias) @ head[:2] - y) ** 2 * head[2]


# ---- functions of parameters ----------------------------------------------------------------------------------------


@per_example(d=(3,), w=(3, 2))
def diagonal_matrix(p, x, y, k):
    return jnp.sum(jnp.sin(x @ jnp.diag(p["d"]) @ p["w"])) ** 2


@per_example(v=(6,))
def triangle_by_indices(p, x, y, k):
    rows, columns = np.tril_indices(3)
    lower = jnp.zeros((3, 3), x.dtype).at[rows, columns].set(p["v"])
    return jnp.sum((lower @ x) ** 2) - jnp.sum(jnp.log(jnp.abs(jnp.diagonal(lower))))


@per_example(v=(3, 3), m=(3,))
def gaussian_by_cholesky(p, x, y, k):
    lower = jnp.tril(p["v"], -1) + jnp.diag(jax.nn.softplus(jnp.diagonal(p["v"])))
    return 0.5 * jnp.sum((lower.T @ (x - p["m"])) ** 2) - jnp.sum(jnp.log(jnp.diagonal(lower)))


@per_example(a=(3, 1), b=(1, 2))
def low_rank_adapter(p, x, y, k):
    frozen = jnp.arange(6.0, dtype=x.dtype).reshape(3, 2) / 6
    return jnp.sum(jnp.tanh(x @ (frozen + p["a"] @ p["b"]))) ** 2


@per_example(a=(3, 1), b=(1, 2))
def low_rank_in_turn(p, x, y, k):
    return jnp.sum(jnp.tanh(x @ p["a"] @ p["b"])) ** 2


@per_example(w=(3, 2), g=(2,))
def weight_norm(p, x, y, k):
    return jnp.sum(jnp.tanh(x @ (p["g"] * p["w"] / jnp.linalg.norm(p["w"], axis=0)))) ** 2


@per_example(w=(3, 2))
def weight_standardization(p, x, y, k):
    w = (p["w"] - p["w"].mean(0)) / jnp.sqrt(p["w"].var(0) + 1e-3)
    return jnp.sum(jnp.tanh(x @ w)) ** 2


@per_example(w=(3, 2))
def spectral_norm(p, x, y, k):
    def step(_, u):
        u = p["w"].T @ (p["w"] @ u)
        return u / jnp.linalg.norm(u)

    u = jax.lax.fori_loop(0, 3, step, jnp.ones(2, x.dtype))
    return jnp.sum(jnp.tanh(x @ (p["w"] / jnp.linalg.norm(p["w"] @ u)))) ** 2


@per_example(w=(3,))
def rotation(p, x, y, k):
    """The exponential of a skew matrix."""
    rows, columns = np.triu_indices(3, 1)
    skew = jnp.zeros((3, 3), x.dtype).at[rows, columns].set(p["w"])
    return jnp.sum((jax.scipy.linalg.expm(skew - skew.T) @ x - jnp.ones(3, x.dtype)) ** 2)


@per_example(w=(3, 3))
def cayley(p, x, y, k):
    skew, eye = p["w"] - p["w"].T, jnp.eye(3, dtype=x.dtype)
    return jnp.sum(jnp.sin(jnp.linalg.solve(eye + skew, (eye - skew) @ x)))


@per_example(t=())
def rotation_by_an_angle(p, x, y, k):
    c, s = jnp.cos(p["t"]), jnp.sin(p["t"])
    return jnp.sum((jnp.array([[c, -s], [s, c]]) @ x[:2] - x[1:]) ** 2)


@per_example(v=(3,))
def householder(p, x, y, k):
    return jnp.sum(jnp.tanh(x - 2 * p["v"] * (p["v"] @ x) / (p["v"] @ p["v"])) ** 2)


@per_example(a=(1, 2), b=(3, 1))
def kronecker_weight(p, x, y, k):
    return jnp.sum(jnp.sin(x @ jnp.kron(p["a"], p["b"]))) ** 2


@per_example(c=(3,))
def circulant(p, x, y, k):
    places = (np.arange(3)[:, None] - np.arange(3)) % 3
    return jnp.sum(jnp.tanh(p["c"][places] @ x) ** 2)


@per_example(c=(5,))
def toeplitz(p, x, y, k):
    places = np.arange(3)[:, None] - np.arange(3) + 2
    return jnp.sum(jnp.tanh(p["c"][places] @ x)) ** 2


@per_example(w=(2, 2))
def tiled_and_repeated(p, x, y, k):
    return jnp.sum(jnp.sin(x @ jnp.repeat(jnp.tile(p["w"], (2, 1))[:3], 2, axis=1))) ** 2


@per_example(w=(3, 4))
def monotone(p, x, y, k):
    """Increasing by construction: exponentials, summed up."""
    return (jnp.sum(jax.nn.sigmoid(x @ jnp.cumsum(jnp.exp(p["w"]), axis=1))) - y) ** 2


@per_example(w=(3, 3))
def log_determinant(p, x, y, k):
    return 0.5 * jnp.sum((p["w"] @ x) ** 2) - jnp.linalg.slogdet(p["w"])[1]


@per_example(w=(3, 3))
def eigenvalues(p, x, y, k):
    return jnp.sum(jnp.sin(jnp.linalg.eigvalsh(p["w"] + p["w"].T)) * x)


@per_example(w=(3, 2), logit=(3,))
def soft_mask(p, x, y, k):
    return jnp.sum(jnp.tanh((x * jax.nn.sigmoid(p["logit"])) @ p["w"])) ** 2 + jnp.sum(jax.nn.sigmoid(p["logit"]))


@per_example(w=(3, 2))
def pruned(p, x, y, k):
    """A mask made of the weight."""
    return jnp.sum(jnp.tanh(x @ jnp.where(jnp.abs(p["w"]) > 0.5, p["w"], 0))) ** 2


@per_example(w=(3, 2))
def quantized(p, x, y, k):
    """Straight through a rounding."""
    w = p["w"] + jax.lax.stop_gradient(jnp.round(4 * p["w"]) / 4 - p["w"])
    return jnp.sum(jnp.tanh(x @ w)) ** 2


@per_example(w=(3, 2))
def half_stopped(p, x, y, k):
    return jnp.sum(jnp.tanh(x @ p["w"]) * (x @ jax.lax.stop_gradient(p["w"])))


# ---- equations of parameters with several outputs, of which some meet the data directly -----------------------------


@per_example(w=(3, 3))
def last_carry_of_weights(p, x, y, k):
    """The stacked outputs of the scan are dropped."""
    carry, _ = jax.lax.scan(lambda c, w: (jnp.tanh(c + w), c * w), p["w"][0], p["w"])
    return jnp.sum(jnp.sin(carry * x))


@per_example(w=(3, 3))
def carry_and_squared_outputs(p, x, y, k):
    carry, rows = jax.lax.scan(lambda c, w: (jnp.tanh(c + w), c * w), p["w"][0], p["w"])
    return jnp.sum(jnp.sin(carry * x)) + jnp.sum(jnp.sin(rows**2 @ x))


@per_example(w=(3, 3))
def eigenvalues_and_squared_vectors(p, x, y, k):
    values, vectors = jnp.linalg.eigh(p["w"] + p["w"].T)
    return jnp.sum(jnp.sin(values * x)) + jnp.sum(jnp.tanh(vectors**2 @ x))


@per_example(w=(3, 3))
def two_outputs_of_a_branch(p, x, y, k):
    w = p["w"]
    a, b = jax.lax.cond(w[0, 0] > 0, lambda: (w**2, w[0]), lambda: (jnp.sin(w), w[1]))
    return jnp.sum(jnp.tanh(a @ x) ** 2) + jnp.sum(jnp.sin(b**2 * x))


# ---- scalars of the parameters --------------------------------------------------------------------------------------


@per_example(s=(), w=())
def scale_of_the_loss(p, x, y, k):
    return p["s"] * jnp.sin(p["w"] * x[0])


@per_example(s=(2,), w=(3,))
def learned_uncertainties(p, x, y, k):
    """Two tasks."""
    a, b = (x @ p["w"] - y) ** 2, jnp.logaddexp(0.0, -x @ p["w"])
    return jnp.exp(-p["s"][0]) * a + p["s"][0] + jnp.exp(-p["s"][1]) * b + p["s"][1]


@per_example(w=(3, 3), t=())
def temperature(p, x, y, k):
    return cross_entropy(x @ p["w"] / jax.nn.softplus(p["t"]), k)


@per_example(w=(3,), nu=(), scale=())
def robust_likelihood(p, x, y, k):
    nu, scale = jnp.exp(p["nu"]), jnp.exp(p["scale"])
    z = (x @ p["w"] - y) / scale
    lgamma = jax.scipy.special.gammaln
    norm = lgamma((nu + 1) / 2) - lgamma(nu / 2) - 0.5 * jnp.log(nu * math.pi) - p["scale"]
    return (nu + 1) / 2 * jnp.log1p(z**2 / nu) - norm


@per_example(w=(3,), c=(3,))
def ordinal(p, x, y, k):
    cuts = jnp.cumsum(jnp.concatenate([p["c"][:1], jnp.exp(p["c"][1:])]))
    below = jnp.concatenate([jax.nn.sigmoid(cuts - x @ p["w"]), jnp.ones(1, x.dtype)])
    return -jnp.log(jnp.diff(below, prepend=0)[k + 1])


@per_example(w=(3,), a=())
def gain_of_all(p, x, y, k):
    """A norm of the weights times the loss."""
    return jnp.linalg.norm(p["w"]) * jnp.cos(x @ p["w"]) + p["a"] * y


@per_example(w=(3, 3), a=())
def rezero(p, x, y, k):
    return jnp.sum((x + p["a"] * jnp.tanh(x @ p["w"])) ** 2)


@per_example(w=(3,), b=())
def scalar_bias_twice(p, x, y, k):
    return jnp.tanh(x @ p["w"] + p["b"]) ** 2 + p["b"] * y


@per_example(a=(), b=(), c=())
def scalars_only(p, x, y, k):
    return jnp.sum((p["a"] * jnp.exp(-p["b"] * x**2) + p["c"]) ** 2)


@per_example(c=(4,))
def polynomial(p, x, y, k):
    return (jnp.polyval(p["c"], y) - x[0]) ** 2


@per_example(c=(3,))
def powers(p, x, y, k):
    return jnp.sum((1 + x**2) ** p["c"])


@per_example(w=(4,))
def interpolated(p, x, y, k):
    return jnp.sum(jnp.interp(x, jnp.linspace(-2.0, 2.0, 4), p["w"].astype(jnp.float64))) ** 2


@per_example(w=(3, 2), u=(2,))
def penalties(p, x, y, k):
    """Lasso, groups, logarithms."""
    grouped = jnp.sum(jnp.linalg.norm(p["w"], axis=1)) + jnp.sum(jnp.abs(p["u"]))
    return jnp.sum(jnp.tanh(x @ p["w"]) * p["u"]) ** 2 + 0.1 * grouped + jnp.log(1 + jnp.sum(p["w"] ** 2))


@per_example(w=(3,), unused=(2,), only_penalized=(2, 2))
def unused_leaves(p, x, y, k):
    return (x @ p["w"] - y) ** 2 + jnp.sum(jnp.cos(p["only_penalized"]))


@per_example(w=(3,), nothing=(0, 3))
def empty_leaf(p, x, y, k):
    return (x @ p["w"] - y) ** 2 + jnp.sum(p["nothing"] @ x)


@per_example(w=(3, 2))
def no_data(p, x, y, k):
    return jnp.sum(jnp.sin(p["w"]) ** 2)


@per_example(w=(3,))
def linear_in_all(p, x, y, k):
    return x @ p["w"] + jnp.sum(p["w"])


@per_example(w=[(3, 2), ((2,), {"a": ()})])
def nested(p, x, y, k):
    (weight, (bias, more)) = p["w"]
    return more["a"] * jnp.sum(jnp.tanh(x @ weight + bias)) ** 2


# ---- complex numbers ------------------------------------------------------------------------------------------------


@per_example(q=(3,))
def complex_products(p, x, y, k):
    return jnp.abs((x + 1j * x[::-1]) @ p["q"]) ** 2


@per_example(q=(2,), x=(2,))
def complex_matrix(p, x, y, k):
    matrix = jnp.array([[1j, 1.0], [1.0, 1j]])
    return jnp.sum(jnp.abs(matrix @ (p["q"] * x)) ** 2)


@per_example(q=(3,))
def exponential_before_complex(p, x, y, k):
    return jnp.abs(jnp.sum(jnp.exp(p["q"]) * (x + 1j))) ** 2


@per_example(a=(3, 2), b=(3, 2))
def complex_rbm(p, x, y, k):
    """The logarithm of the amplitude of a quantum state."""
    spins = jnp.sign(x)
    angle = spins @ (p["a"] + 1j * p["b"])
    return jnp.real(jnp.sum(jnp.log(jnp.cosh(angle))))


@per_example(a=(2,), b=(2,))
def fourier_layer(p, x, y, k):
    filtered = jnp.fft.irfft(jnp.fft.rfft(x) * jax.lax.complex(p["a"], p["b"]), n=3)
    return jnp.sum(jnp.tanh(filtered) ** 2)


@per_example(w=(2, 3))
def parts_as_one_complex(p, x, y, k):
    return jnp.abs(jnp.sum(x * jax.lax.complex(p["w"][0], p["w"][1])) - 1j) ** 2


@per_example(t=(3,))
def phases(p, x, y, k):
    return jnp.real(jnp.sum(jnp.exp(1j * p["t"] * x)) * (1 - 1j)) ** 2


@per_example(w=(3,))
def imaginary_part(p, x, y, k):
    return jnp.imag((x @ p["w"] * (1 + 2j)) ** 2) + jnp.real(jnp.conj(1j * (x @ p["w"])) * 1j)


@per_example(w=(3,))
def complex_roundtrip(p, x, y, k):
    return jnp.sum(jnp.tanh(x * p["w"].astype(complex).real.astype(p["w"].dtype)) ** 2)


# ---- layers ---------------------------------------------------------------------------------------------------------


def _conv(x, w, **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x[None], w, (1, 1), "SAME", dimension_numbers=numbers, **options)[0]


@per_example(x=(3, 3, 2), w=(2, 2, 1, 4))
def grouped_convolution(p, x, y, k):
    return jnp.sum(jnp.tanh(_conv(x, p["w"], feature_group_count=2)) ** 2)


@per_example(x=(3, 3, 2), w=(2, 2, 1, 2), v=(2, 2))
def depthwise_then_pointwise(p, x, y, k):
    return jnp.sum(jnp.tanh(_conv(x, p["w"], feature_group_count=2)) @ p["v"]) ** 2


@per_example(x=(2, 2, 1), w=(2, 2, 1, 2))
def transposed_convolution(p, x, y, k):
    return jnp.sum(jnp.sin(jax.lax.conv_transpose(x[None], p["w"], (2, 2), "SAME")))


@per_example(x=(4, 3, 1), w=(2, 2, 1, 2))
def dilated_convolution(p, x, y, k):
    return jnp.sum(jnp.tanh(_conv(x, p["w"], rhs_dilation=(2, 1))) ** 2)


@per_example(x=(3, 3, 1), w=(2, 1, 2, 2))
def convolution_with_turned_kernel(p, x, y, k):
    """OIHW in store."""
    return jnp.sum(jnp.tanh(_conv(x, p["w"].transpose(2, 3, 1, 0))) ** 2)


@per_example(x=(3, 3, 1), w=(2, 2, 1, 2))
def pooled(p, x, y, k):
    h = _conv(x, p["w"])
    h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (2, 2, 1), (1, 1, 1), "VALID")
    return jnp.sum(h**2)


@per_example(x=(2, 3), w=(3, 3), s=(3,), b=(3,))
def norms_of_features(p, x, y, k):
    h = jnp.tanh(x @ p["w"])
    h = (h - h.mean(-1, keepdims=True)) / jnp.sqrt(h.var(-1, keepdims=True) + 1e-3) * p["s"] + p["b"]
    return jnp.sum((h / jnp.sqrt(jnp.mean(h**2, -1, keepdims=True) + 1e-3)) ** 3)


@per_example(x=(3, 2), q=(2, 2), k=(2, 2), v=(2, 2))
def causal_attention(p, x, y, k):
    scores = (x @ p["q"]) @ (x @ p["k"]).T
    weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((3, 3))) > 0, scores, -1e9))
    return jnp.sum((weights @ (x @ p["v"])) ** 2)


@per_example(x=(2, 3), qkv=(3, 3, 2, 1), out=(2, 1, 3))
def attention_of_one_projection(p, x, y, k):
    q, key, v = jnp.einsum("td,dchn->cthn", x, p["qkv"])
    weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, key))
    return jnp.sum(jnp.einsum("hts,shn,hnd->td", weights, v, p["out"]) ** 2)


@per_example(e=(3, 2), place=(5, 2), w=(2, 2))
def positions_by_slice(p, x, y, k):
    h = p["e"][(x > 0).astype(int)] + p["place"][:3]
    return jnp.sum(jnp.tanh(h @ p["w"])) ** 2


@per_example(x=(3, 2), w=(2, 2), u=(2, 2), b=(8,), wx=(2, 8), wh=(2, 8))
def lstm(p, x, y, k):
    def step(carry, x):
        h, c = carry
        i, f, g, o = jnp.split(x @ p["wx"] + h @ p["wh"] + p["b"], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    _, hs = jax.lax.scan(step, (jnp.zeros(2, x.dtype),) * 2, x)
    return jnp.sum(jnp.sin(hs @ p["w"] @ p["u"]))


@per_example(x=(3, 2), a=(2,), b=(2, 2), start=(2,))
def state_space(p, x, y, k):
    """A learned start, run backwards."""

    def step(h, x):
        h = jax.nn.sigmoid(p["a"]) * h + x @ p["b"]
        return h, jnp.sum(h**2)

    return jnp.sum(jax.lax.scan(step, p["start"], x, reverse=True)[1])


@per_example(x=(4, 2), a=(2,), b=(2,))
def associative_scan(p, x, y, k):
    decay = jnp.broadcast_to(jax.nn.sigmoid(p["a"]), x.shape)
    pairs = jax.lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (decay, x * p["b"]))
    return jnp.sum(jnp.tanh(pairs[1]) ** 2)


@per_example(w=(2, 3, 3), b=(2, 3))
def scan_over_layers(p, x, y, k):
    return jnp.sum(jax.lax.scan(lambda h, wb: (jnp.tanh(h @ wb[0] + wb[1]), None), x, (p["w"], p["b"]))[0] ** 2)


@per_example(w=(2, 3, 3))
def remat_in_scan_in_remat(p, x, y, k):
    @jax.checkpoint
    def run(h):
        return jax.lax.scan(lambda h, w: (jax.checkpoint(lambda h, w: jnp.sin(h @ w))(h, w), None), h, p["w"])[0]

    return jnp.sum(run(x) ** 2)


@per_example(w=(2, 3), v=(3, 3))
def nested_scans(p, x, y, k):
    def outer(h, w):
        return jax.lax.scan(lambda h, a: (jnp.tanh(h @ p["v"]) * w + a, None), h, x)[0], None

    return jnp.sum(jax.lax.scan(outer, x, p["w"])[0] ** 2)


@per_example(w=(3, 3), dt=())
def neural_ode(p, x, y, k):
    def rk(h, _):
        def slope(h):
            return jnp.tanh(p["w"] @ h)

        mid = h + 0.5 * p["dt"] * slope(h)
        return h + p["dt"] * slope(mid), None

    return jnp.sum(jax.lax.scan(rk, x, None, length=2)[0] ** 2)


@per_example(w=(3, 2), v=(2,))
def derivative_in_the_loss(p, x, y, k):
    """A physics-informed network: a Laplacian by the data."""

    def u(x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    return (jnp.trace(jax.hessian(u)(x)) + u(x) - y) ** 2


@per_example(w=(3, 2), v=(2,))
def step_in_the_loss(p, x, y, k):
    """Meta-learning: a gradient step by the parameters themselves."""

    def inner(v):
        return (jnp.tanh(x @ p["w"]) @ v - y) ** 2

    return jnp.sin(inner(p["v"] - 0.1 * jax.grad(inner)(p["v"])))


@per_example(gate=(3, 2), experts=(2, 3, 2))
def mixture_of_experts(p, x, y, k):
    gates = jax.nn.softmax(x @ p["gate"])
    return jnp.sum(jnp.einsum("e,eo->o", gates, jnp.tanh(jnp.einsum("i,eio->eo", x, p["experts"]))) ** 2)


@per_example(gate=(3, 2), experts=(2, 3, 2))
def best_expert(p, x, y, k):
    gates = jax.nn.softmax(x @ p["gate"])
    best = jnp.argmax(gates)
    return jnp.sum(gates[best] * (x @ p["experts"][best])) ** 2


@per_example(h=(3, 6), e=(3,))
def hypernetwork(p, x, y, k):
    weight = jnp.tanh(p["e"] @ p["h"]).reshape(3, 2)
    return jnp.sum(jnp.sin(x @ weight)) ** 2


@per_example(h=(1, 6))
def weights_made_of_data(p, x, y, k):
    return jnp.sum(jnp.sin(x @ jnp.tanh(y * p["h"]).reshape(3, 2))) ** 2


@per_example(m=(3, 2), logit=(2,), logscale=(2,))
def mixture_density(p, x, y, k):
    z = (y - x @ p["m"]) * jnp.exp(-p["logscale"])
    return -jax.nn.logsumexp(jax.nn.log_softmax(p["logit"]) - 0.5 * z**2 - p["logscale"])


@per_example(c=(2, 3), width=(), a=(2,))
def radial_basis(p, x, y, k):
    near = jnp.exp(-jnp.sum((x - p["c"]) ** 2, -1) * jnp.exp(p["width"]))
    return (near @ p["a"] - y) ** 2


@per_example(v=(3, 2), w=(3,))
def factorization_machine(p, x, y, k):
    pairs = jnp.sum((x @ p["v"]) ** 2 - x**2 @ p["v"] ** 2)
    return (x @ p["w"] + 0.5 * pairs - y) ** 2


@per_example(start=(3,), move=(3, 3), emit=(3, 2))
def hidden_markov(p, x, y, k):
    emit = jax.nn.log_softmax(p["emit"])

    def step(alpha, seen):
        alpha = jax.nn.logsumexp(alpha[:, None] + jax.nn.log_softmax(p["move"]), axis=0) + emit[:, seen]
        return alpha, None

    seen = (x > 0).astype(int)
    return -jax.nn.logsumexp(jax.lax.scan(step, jax.nn.log_softmax(p["start"]), seen)[0])


@per_example(q=(), r=(), a=())
def kalman_filter(p, x, y, k):
    q, r = jnp.exp(p["q"]), jnp.exp(p["r"])

    def step(carry, seen):
        mean, var = carry
        mean, var = p["a"] * mean, p["a"] ** 2 * var + q
        s = var + r
        gain = var / s
        cost = 0.5 * jnp.log(s) + 0.5 * (seen - mean) ** 2 / s
        return (mean + gain * (seen - mean), (1 - gain) * var), cost

    zero = jnp.zeros((), x.dtype)
    return jnp.sum(jax.lax.scan(step, (zero, zero + 1), x)[1])


@per_example(e=(4, 3), r=(2, 3))
def lookups_by_two_indices(p, x, y, k):
    return jnp.sum(p["e"][k] * p["r"][k % 2] * p["e"][k + 1]) ** 2 + p["e"][k, 1] * y


@per_example(e=(3, 2))
def bag_of_words(p, x, y, k):
    words = (x > 0).astype(int) + k % 2
    return jnp.sum(jnp.tanh(jax.ops.segment_sum(p["e"][words], words, num_segments=3))) ** 2


@per_example(w=(5,))
def dynamic_window(p, x, y, k):
    return jnp.sum(jnp.sin(jax.lax.dynamic_slice(p["w"], (k,), (3,)) * x)) ** 2


@per_example(w=(3,), b=())
def scattered_into(p, x, y, k):
    return jnp.sum(jnp.tanh(x.at[k].add(p["b"]).at[0].set(p["w"][1]) * p["w"])) ** 2


@per_example(w=(3, 2), v=(3, 2))
def branches_of_parameters(p, x, y, k):
    h = jax.lax.cond(k > 0, lambda: x @ p["w"], lambda: jnp.sin(x @ p["v"]))
    h = jax.lax.switch(k, [lambda h: h, lambda h: h**2, lambda h: p["v"][0] * h], h)
    return jnp.sum(h**2)


@per_example(w=(3, 2))
def branch_on_a_parameter(p, x, y, k):
    return jax.lax.cond(p["w"][0, 0] > 0, lambda h: jnp.sum(h**2), lambda h: jnp.sum(jnp.sin(h)), x @ p["w"])


@per_example(w=(3, 2))
def vmap_over_parameters(p, x, y, k):
    return jnp.sum(jax.vmap(lambda w: jnp.tanh(x @ w) ** 2, in_axes=1)(p["w"])) * y


@per_example(w=(3, 2), s=(3,))
def vmap_over_data(p, x, y, k):
    return jnp.sum(jax.vmap(lambda a, s: jnp.sin(a * p["w"][0] * s))(x, p["s"])) ** 2


@per_example(w=(3, 2))
def dropout(p, x, y, k):
    kept = jax.random.bernoulli(jax.random.key(k), 0.5, (2,))
    return jnp.sum(jnp.where(kept, jnp.tanh(x @ p["w"]), 0) * 2) ** 2


@per_example(w=(3, 3))
def focal_and_smoothed(p, x, y, k):
    logs = jax.nn.log_softmax(x @ p["w"])
    smooth = 0.9 * jax.nn.one_hot(k, 3, dtype=x.dtype) + 0.1 / 3
    return -jnp.sum(smooth * logs) - (1 - jnp.exp(logs[k])) ** 2 * logs[k]


@per_example(w=(3, 3))
def sorted_scores(p, x, y, k):
    scores = jnp.sort(x @ p["w"])
    return scores[-1] ** 2 - scores[0] * jax.lax.top_k(scores, 2)[0][1] + jnp.median(scores)


@per_example(w=(3, 2), x=(3,))
def padded_and_masked(p, x, y, k):
    mask = jnp.arange(3) <= k
    return jnp.sum(jnp.where(mask[:, None], jnp.tanh(x[:, None] * p["w"]), 0)) ** 2 / jnp.sum(mask)


@per_example(shift=(3,), scale=(3,), w=(1, 2))
def normalizing_flow(p, x, y, k):
    z = (x - p["shift"]) * jnp.exp(-p["scale"])
    s, t = jnp.tanh(z[:1] @ p["w"])
    z = z.at[1].set(z[1] * jnp.exp(s) + t)
    return 0.5 * jnp.sum(z**2) + jnp.sum(p["scale"]) - s


@per_example(w=(3,))
def forward_only(p, x, y, k):
    """A loop whose length is found on the way: no reverse mode."""
    return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] * (p["w"] @ x)), (0, p["w"] @ x))[1]


@per_example(w=(3, 2), b=(2,))
def double_where(p, x, y, k):
    """Zero in, zero out, with a finite slope."""
    z = jnp.where(k > 0, x, 0) @ p["w"]
    safe = jnp.where(z == 0, 1, z)
    return jnp.sum(jnp.where(z == 0, 1, jnp.sin(safe) / safe) * p["b"]) ** 2


# ---- of a batch -----------------------------------------------------------------------------------------------------


@of_batch(w=(3, 2), v=(2,))
def batch_norm(p, x, y, k):
    h = x @ p["w"]
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-3)
    return jnp.mean((jnp.tanh(h) @ p["v"] - y) ** 2)


@of_batch(w=(2, 2), x=(4,))
def turned_weight_batched(p, x, y, k):
    return jnp.mean((x @ p["w"].T.reshape(4)) ** 2)


@of_batch(w=(3, 2))
def whitened(p, x, y, k):
    h = jnp.tanh(x @ p["w"])
    h = h - h.mean(0)
    return jnp.linalg.slogdet(h.T @ h / len(h) + jnp.eye(2, dtype=h.dtype))[1]


@of_batch(w=(3, 2))
def decorrelated(p, x, y, k):
    h = x @ p["w"]
    c = jnp.corrcoef(jnp.tanh(h).T)
    return jnp.sum((c - jnp.eye(2, dtype=c.dtype)) ** 2)


@of_batch(w=(3, 2))
def contrastive(p, x, y, k):
    a, b = jnp.tanh(x @ p["w"]), jnp.tanh(x[:, ::-1] @ p["w"])
    return jnp.mean(cross_entropy(a @ b.T, jnp.arange(len(x))))


@of_batch(w=(3, 2))
def pairs_of_examples(p, x, y, k):
    h = x @ p["w"]
    return jnp.mean(jnp.sum((h[:, None] - h[None]) ** 2, -1) * jnp.cos(y[:, None] - y))


@of_batch(w=(3,))
def ranking(p, x, y, k):
    s = x @ p["w"]
    return jnp.mean(jnp.where(y[:, None] > y, jax.nn.softplus(s[None] - s[:, None]), 0))


@of_batch(w=(3,))
def proportional_hazards(p, x, y, k):
    """Cox: each example against those that live longer."""
    risk = (x @ p["w"])[jnp.argsort(-y)]
    return -jnp.mean(risk - jax.lax.cumlogsumexp(risk))


@of_batch(scale=(), width=(), noise=())
def gaussian_process(p, x, y, k):
    near = jnp.exp(p["scale"] - jnp.sum((x[:, None] - x[None]) ** 2, -1) * jnp.exp(p["width"]))
    lower = jnp.linalg.cholesky(near + jnp.exp(p["noise"]) * jnp.eye(len(x), dtype=x.dtype))
    z = jax.scipy.linalg.solve_triangular(lower, y, lower=True)
    return 0.5 * z @ z + jnp.sum(jnp.log(jnp.diagonal(lower)))


@of_batch(w=(3, 2))
def variable_projection(p, x, y, k):
    h = jnp.tanh(x @ p["w"])
    head = jnp.linalg.solve(h.T @ h + 0.1 * jnp.eye(2, dtype=h.dtype), h.T @ y)
    return jnp.mean((h @ head - y) ** 2)


@of_batch(w=(3, 4), size=4)
def as_many_outputs_as_examples(p, x, y, k):
    """The sum over outputs looks like one over examples."""
    h = jnp.tanh(x @ p["w"])
    return jnp.mean(jnp.sum(h * y, axis=1) ** 2) + jnp.sum(jnp.mean(h, axis=0) ** 2)


@of_batch(w=(4, 4), x=(4,), size=4)
def square_batch(p, x, y, k):
    return jnp.mean(jnp.tanh(x @ p["w"]).T * x)


@of_batch(w=(4, 4), x=(4,), size=4)
def examples_in_columns(p, x, y, k):
    """Examples lie along the second axis of ``x``."""
    return jnp.mean(jnp.sum(jnp.tanh(p["w"] @ x) ** 2, axis=0) * y)


@of_batch(w=(4, 4), x=(4,), size=4)
def parameters_per_example(p, x, y, k):
    """As many rows of the weight as examples."""
    return jnp.mean(jnp.sum(jnp.sin(x * p["w"]), axis=1) ** 2)


@of_batch(z=(4, 2), w=(2, 3))
def latent_per_example(p, x, y, k):
    """Matrix factorization: a parameter for each example."""
    return jnp.mean((p["z"] @ p["w"] - x) ** 2)


@of_batch(e=(3, 2), w=(3, 2))
def rows_by_label(p, x, y, k):
    return jnp.mean(jnp.sum(p["e"][k] * jnp.tanh(x @ p["w"]), -1) ** 2)


@of_batch(w=(3, 2), c=(3, 2))
def centers_of_groups(p, x, y, k):
    h = x @ p["w"]
    centers = jax.ops.segment_sum(h, k, 3) / jnp.maximum(jax.ops.segment_sum(jnp.ones_like(y), k, 3), 1)[:, None]
    return jnp.mean((h - centers[k]) ** 2 * p["c"][k])


@of_batch(w=(3, 2), s=())
def scale_of_the_mean(p, x, y, k):
    return jnp.exp(p["s"]) * jnp.mean(jnp.tanh(x @ p["w"]) ** 2) + p["s"] ** 2


@of_batch(w=(3, 2))
def penalty_after_the_mean(p, x, y, k):
    return jnp.mean(jnp.tanh(x @ p["w"]) ** 2) + 0.1 * jnp.linalg.norm(p["w"])


@of_batch(w=(3,))
def masked_mean(p, x, y, k):
    losses = jnp.logaddexp(0.0, -x @ p["w"] * jnp.sign(y))
    return jnp.sum((k > 0) * losses) / jnp.sum(k > 0)


@of_batch(w=(3,))
def weights_of_the_model(p, x, y, k):
    """Self-paced: the weights are a softmax of the losses."""
    losses = (x @ p["w"] - y) ** 2
    return jnp.sum(jax.nn.softmax(-losses) * losses)


@of_batch(w=(3,))
def weights_held_fixed(p, x, y, k):
    losses = (x @ p["w"] - y) ** 2
    return jnp.sum(jax.lax.stop_gradient(jax.nn.softmax(-losses)) * losses)


@of_batch(w=(3,))
def variance_of_losses(p, x, y, k):
    losses = (x @ p["w"] - y) ** 2
    return jnp.mean(losses) + jnp.var(losses)


@of_batch(w=(3,))
def trimmed(p, x, y, k):
    return jnp.mean(jnp.sort((x @ p["w"] - y) ** 2)[:-1])


@of_batch(w=(3, 2))
def mixed_up(p, x, y, k):
    """Data of two examples, mixed before the model sees it: the examples stay apart."""
    mixed = 0.3 * x + 0.7 * jnp.roll(x, 1, axis=0)
    return jnp.mean((jnp.sum(jnp.tanh(mixed @ p["w"]), -1) - y) ** 2)


@of_batch(w=(3, 2))
def time_series(p, x, y, k):
    """The batch is a sequence."""

    def step(h, x):
        h = jnp.tanh(h + x @ p["w"])
        return h, jnp.sum(h**2)

    return jnp.mean(jax.lax.scan(step, jnp.zeros(2, x.dtype), x)[1])


@of_batch(w=(3, 2), a=(2, 2))
def graph_convolution(p, x, y, k):
    near = jnp.exp(-jnp.abs(y[:, None] - y))
    return jnp.mean((near @ jnp.tanh(near @ x @ p["w"]) @ p["a"]) ** 2)


@of_batch(w=(3, 2))
def reshaped_over_the_batch(p, x, y, k):
    return jnp.mean(jnp.tanh(x @ p["w"]).reshape(2, -1).sum(0) ** 2)


@of_batch(w=(3, 2))
def spectrum_of_the_batch(p, x, y, k):
    return jnp.mean(jnp.abs(jnp.fft.fft(jnp.tanh(x @ p["w"]), axis=0)) ** 2)


@of_batch(w=(3, 2))
def a_share_of_the_batch(p, x, y, k):
    losses = jnp.sum(jnp.tanh(x @ p["w"]), -1)
    return jnp.mean(losses) * jnp.mean(losses**2)


@of_batch(w=(3, 2))
def sum_over_loop(p, x, y, k):
    def add(b, total):
        return total + jnp.sum(jnp.tanh(x[b] @ p["w"])) ** 2

    return jax.lax.fori_loop(0, len(x), add, jnp.zeros((), x.dtype)) / len(x)


@of_batch(w=(3, 2))
def last_of_running_sum(p, x, y, k):
    return jnp.cumsum(jnp.sum(jnp.tanh(x @ p["w"]) ** 2, -1))[-1] / len(x)


@of_batch(w=(3, 2))
def accumulated(p, x, y, k):
    """Two micro-batches."""

    def loss(x):
        return jnp.mean(jnp.sum(jnp.tanh(x @ p["w"]) ** 2, -1))

    return jnp.mean(jax.lax.map(loss, x.reshape(2, 2, 3)))


@of_batch(w=(3,), size=1)
def batch_of_one(p, x, y, k):
    return jnp.mean((x @ p["w"] - y) ** 2)


@of_batch(w=(3, 3), x=(3,), size=3)
def everything_three(p, x, y, k):
    h = jnp.tanh(x @ p["w"] @ x.T)
    return jnp.mean(h * h.T) + jnp.trace(p["w"] @ x)
