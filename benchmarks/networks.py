"""Networks to measure operators on, each as a model of a batch and a loss of its outputs."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Tree = Any


class Problem(NamedTuple):
    """``model(params, *batch) -> logits`` and ``loss(logits, *batch) -> scalar``, with parameters and a batch."""

    model: Callable[..., jax.Array]
    loss: Callable[..., jax.Array]
    params: Tree
    batch: tuple[jax.Array, jax.Array]

    def objective(self, params: Tree, *batch: jax.Array) -> jax.Array:
        """The loss of the model."""
        return self.loss(self.model(params, *batch), *batch)


def cross_entropy(logits: jax.Array, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over examples, and over tokens where there are any."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def normals(seed: int, **shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Random arrays, scaled by the square root of what they sum over: all axes but the last."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def perceptron(sizes: tuple[int, ...] = (128, 256, 256, 10), examples: int = 512) -> Problem:
    """A tanh network with biases."""
    layers = [
        normals(seed, weights=shape) | {"bias": jnp.zeros(shape[1])}
        for seed, shape in enumerate(itertools.pairwise(sizes))
    ]

    def model(params: Tree, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        for layer in params[:-1]:
            inputs = jnp.tanh(inputs @ layer["weights"] + layer["bias"])
        return inputs @ params[-1]["weights"] + params[-1]["bias"]

    inputs = jax.random.normal(jax.random.key(99), (examples, sizes[0]))
    return Problem(model, cross_entropy, layers, (inputs, jnp.arange(examples) % sizes[-1]))


def convolutional() -> Problem:
    """Two convolutions of 3 x 3, each with tanh and a mean over 2 x 2, and a linear layer; 32 images of 28 x 28."""

    def convolve(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        hidden = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout) + bias
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(jnp.tanh(hidden), 0.0, jax.lax.add, window, window, "VALID") / 4

    def model(p: Tree, images: jax.Array, labels: jax.Array) -> jax.Array:
        hidden = convolve(convolve(images, p["k1"], p["b1"]), p["k2"], p["b2"])
        return hidden.reshape(len(hidden), -1) @ p["w"] + p["b"]

    params = normals(0, k1=(3, 3, 1, 16), k2=(3, 3, 16, 32), w=(7 * 7 * 32, 10))
    params |= {"b1": jnp.zeros(16), "b2": jnp.zeros(32), "b": jnp.zeros(10)}
    images = jax.random.normal(jax.random.key(99), (32, 28, 28, 1))
    return Problem(model, cross_entropy, params, (images, jnp.arange(32) % 10))


def transformer(layers: int, width: int, words: int, examples: int, tokens: int = 64) -> Problem:
    """Embeddings, blocks of attention with heads of 64 and a feed-forward network, and a head: foretells words."""

    def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
        centered = x - x.mean(-1, keepdims=True)
        return centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5) * scale

    def block(x: jax.Array, p: dict[str, jax.Array]) -> jax.Array:
        y = normalize(x, p["scale1"])
        q, k, v = ((y @ p[name]).reshape(*x.shape[:2], -1, 64) for name in "qkv")
        scores = jnp.einsum("bshd,bthd->bhst", q, k) / 8
        weights = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -1e9))
        x = x + jnp.einsum("bhst,bthd->bshd", weights, v).reshape(x.shape) @ p["o"]
        return x + jax.nn.gelu(normalize(x, p["scale2"]) @ p["up"] + p["bias1"]) @ p["down"] + p["bias2"]

    def model(p: Tree, text: jax.Array, following: jax.Array) -> jax.Array:
        x = p["words"][text] + p["positions"]
        for layer in p["blocks"]:
            x = block(x, layer)
        return x @ p["head"]

    def make_block(seed: int) -> dict[str, jax.Array]:
        matrices = normals(
            seed, **dict.fromkeys("qkvo", (width, width)), up=(width, 4 * width), down=(4 * width, width)
        )
        scales = {"scale1": jnp.ones(width), "scale2": jnp.ones(width)}
        return matrices | scales | {"bias1": jnp.zeros(4 * width), "bias2": jnp.zeros(width)}

    params: Tree = normals(99, words=(words, width), positions=(tokens, width), head=(width, words))
    params["blocks"] = [make_block(seed) for seed in range(layers)]
    text = jax.random.randint(jax.random.key(98), (examples, tokens + 1), 0, words)
    return Problem(model, cross_entropy, params, (text[:, :-1], text[:, 1:]))
