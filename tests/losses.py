"""Losses of one example in which parameters meet the data in every way: ``LOSSES[name] = (loss, params, batch)``."""

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax

B = 4
_rng = np.random.default_rng(5)


def _normal(*shape):
    return _rng.normal(size=shape)


def _tokens(*shape, below):
    return _rng.integers(0, below, size=shape)


_cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


def mlp(params, x, y):
    """Two layers, whose second weight stands on the left."""
    hidden = jax.nn.relu(x @ params["in"]["w"] + params["in"]["b"])
    return jnp.sum((params["out"]["w"] @ hidden + params["out"]["b"] - y) ** 2)


_MLP = {"in": {"w": _normal(3, 5), "b": _normal(5)}, "out": {"w": _normal(2, 5), "b": _normal(2)}}
_PAIRS = _normal(B, 3), _normal(B, 2)


def penalized(params, x, y):
    """A penalty inside the loss, and an unused leaf."""
    return mlp(params, x, y) + 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def smooth(params, x, y):
    """Everything in one vector: tanh layers, a scale, a loss that is not quadratic."""
    hidden = jnp.tanh(x @ params["w"] * params["scale"] - params["b"])
    return _cross_entropy(jnp.tanh(hidden * params["gain"]) @ params["v"], y)


def normalized(params, x):
    """A layer norm between two layers."""
    hidden = x @ params["w"]
    hidden = (hidden - jnp.mean(hidden)) / jnp.sqrt(jnp.var(hidden) + 1e-3) * params["scale"] + params["b"]
    return jnp.sum(jnp.tanh(params["v"] @ jnp.tanh(hidden)) ** 2)


def attention(params, tokens):
    """A small transformer block over an embedding."""
    hidden = params["embed"][tokens] * params["scale"]
    weights = jax.nn.softmax((hidden @ params["q"]) @ (hidden @ params["k"]).T)
    return jnp.mean(_cross_entropy((hidden + weights @ (hidden @ params["v"])) @ params["out"], tokens))


def tied(params, tokens):
    """One matrix for embedding and output, transposed."""
    return jnp.mean(_cross_entropy(jnp.tanh(params["embed"][tokens] @ params["w"]) @ params["embed"].T, tokens))


def recurrent(params, xs):
    """One set of weights at every step of a scan."""

    def step(hidden, x):
        hidden = jnp.tanh(hidden @ params["w"] + x @ params["u"] + params["b"])
        return hidden, jnp.sum(hidden)

    hidden, sums = jax.lax.scan(step, jnp.zeros(3, xs.dtype), xs)
    return jnp.sum(hidden**2) + jnp.sum(sums) + params["offset"] * xs[0, 0]


def unrolled(params, xs):
    """The same weights three times, each time with one vector."""
    hidden = jnp.tanh(xs[0] @ params["u"] + params["b"])
    hidden = jnp.tanh(hidden @ params["w"] + xs[1] @ params["u"] + params["b"])
    return jnp.sum(jnp.tanh(hidden @ params["w"] + xs[2] @ params["u"] + params["b"]) ** 2)


def stacked(params, x):
    """Layers stacked along an axis and scanned over."""

    def layer(hidden, weights):
        w, b = weights
        return jnp.tanh(w.T @ hidden * params["scale"] + b), None

    return jnp.sum(jax.lax.scan(layer, x, (params["w"], params["b"]))[0] ** 3)


def convolutional(params, image):
    """Strides, dilation, uneven padding, and kernels in two orders of axes."""
    first = {"window_strides": (2, 2), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    hidden = jnp.tanh(
        jax.lax.conv_general_dilated(image[None], params["a"], **first) + params["bias"][None, None, None]
    )
    second = {"window_strides": (1, 1), "padding": ((1, 0), (2, 1)), "rhs_dilation": (2, 1)}
    numbers = ("NHWC", "OIHW", "NCHW")
    hidden = jax.lax.conv_general_dilated(hidden, params["b"], **second, dimension_numbers=numbers)
    depthwise = jax.lax.conv_general_dilated(
        hidden, params["c"], (1, 1), "VALID", dimension_numbers=("NCHW", "OIHW", "NCHW"), feature_group_count=3
    )
    return jnp.sum(jnp.tanh(depthwise)) + jnp.sum((hidden.reshape(-1) @ params["w"]) ** 2)


def weight_normalized(params, x):
    """Weights that are a function of the parameters."""
    w = params["v"] * (params["g"] / jnp.sqrt(jnp.sum(params["v"] ** 2, axis=0)))[None]
    return jnp.sum(jnp.tanh(x @ w + params["b"]) ** 2)


def odd(params, x):
    """Uses that no rule knows, a sum over axes, a scalar that goes with everything, an unused leaf."""
    powers = jnp.sum(jnp.abs(x) ** params["power"] + jnp.maximum(params["power"], x))
    return powers - jnp.sum(params["power"].reshape(2, 2)) + jnp.sum((x * params["scale"] + params["row"]) ** 2)


def rows(params, index, indices):
    """Lookups of one row and of several along the last axis, some of them out of range."""
    several = jnp.take(params["b"], indices, axis=1, mode="fill", fill_value=0.0)
    clipped = jnp.take(params["b"], indices, axis=1, mode="clip")
    return jnp.sum(params["a"][index] ** 3) + jnp.sum(several**2) + jnp.sum(clipped**3)


def branching(params, x):
    """A branch and a loop around the parameter."""
    branch = jax.lax.cond(x[0] > 0, lambda: x @ params @ x, lambda: jnp.sum(params) ** 2)
    return branch + jnp.sum(jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(params @ h), x))


class _Flax(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, image):
        hidden = flax.linen.tanh(flax.linen.Conv(3, (3, 3), strides=2)(image[None]))[0]
        hidden = flax.linen.LayerNorm()(hidden.reshape(-1))
        return flax.linen.Dense(2)(flax.linen.tanh(flax.linen.Dense(4)(hidden)))


_IMAGES = _normal(B, 4, 5, 2)
_FLAX = jax.tree.map(np.asarray, _Flax().init(jax.random.key(0), jnp.asarray(_IMAGES[0], jnp.float32)))
_EQUINOX, _STATIC = equinox.partition(equinox.nn.MLP(3, 2, 4, 2, key=jax.random.key(1)), equinox.is_inexact_array)


def flax_model(params, image, label):
    """A convolution, a layer norm and two dense layers of flax."""
    with jax.numpy_dtype_promotion("standard"):  # flax promotes in its norms
        return _cross_entropy(_Flax().apply(params, image), label)


def equinox_model(params, x, label):
    """A multilayer perceptron of equinox."""
    return _cross_entropy(equinox.combine(params, _STATIC)(x), label)


_LABELS = _tokens(B, below=2)
LOSSES = {
    "mlp": (mlp, _MLP, _PAIRS),
    "rematerialized": (jax.checkpoint(jax.jit(mlp)), _MLP, _PAIRS),
    "penalized": (penalized, {**_MLP, "unused": _normal(2)}, _PAIRS),
    "smooth": (
        smooth,
        {"w": _normal(3, 4), "scale": _normal(4), "b": _normal(4), "gain": _normal(4), "v": _normal(4, 2)},
        (_normal(B, 3), _LABELS),
    ),
    "normalized": (
        normalized,
        {"w": _normal(3, 5), "scale": _normal(5), "b": _normal(5), "v": _normal(2, 5)},
        (_normal(B, 3),),
    ),
    "attention": (
        attention,
        {"embed": _normal(7, 4), "scale": _normal(1, 4), "q": _normal(4, 3), "k": _normal(4, 3), "v": _normal(4, 4)}
        | {"out": _normal(4, 7)},
        (_tokens(B, 3, below=7),),
    ),
    "tied": (tied, {"embed": _normal(6, 4), "w": _normal(4, 4)}, (_tokens(B, 3, below=6),)),
    "recurrent": (
        recurrent,
        {"w": _normal(3, 3), "u": _normal(2, 3), "b": _normal(3), "offset": _normal()},
        (_normal(B, 4, 2),),
    ),
    "unrolled": (unrolled, {"w": _normal(4, 4), "u": _normal(2, 4), "b": _normal(4)}, (_normal(B, 3, 2),)),
    "stacked": (stacked, {"w": _normal(2, 3, 3), "b": _normal(2, 3), "scale": _normal(3)}, (_normal(B, 3),)),
    "convolutional": (
        convolutional,
        {"a": _normal(3, 3, 2, 2), "bias": _normal(2), "b": _normal(3, 2, 2, 3), "c": _normal(3, 1, 2, 2)}
        | {"w": _normal(24, 2)},
        (_normal(B, 6, 5, 2),),
    ),
    "weight_normalized": (
        weight_normalized,
        {"v": _normal(3, 2), "g": _normal(2), "b": _normal(2)},
        (_normal(B, 3),),
    ),
    "odd": (
        odd,
        {"power": np.abs(_normal(4)) + 2, "scale": _normal(), "row": _normal(4), "unused": _normal(2)},
        (_normal(B, 4),),
    ),
    "rows": (rows, {"a": _normal(5, 2), "b": _normal(2, 6)}, (_tokens(B, below=5), _tokens(B, 3, below=8))),
    "branching": (branching, _normal(3, 3), (_normal(B, 3),)),
    "flax": (flax_model, _FLAX, (_IMAGES, _LABELS)),
    "equinox": (equinox_model, jax.tree.map(np.asarray, _EQUINOX), (_normal(B, 3), _LABELS)),
}


def in_precision(name, dtype):
    """A loss with its parameters and batch in a precision."""

    def cast(leaf):
        return jnp.asarray(leaf, dtype if np.issubdtype(leaf.dtype, np.floating) else None)

    loss, params, batch = LOSSES[name]
    return loss, jax.tree.map(cast, params), jax.tree.map(cast, batch)
