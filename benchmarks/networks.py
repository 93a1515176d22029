"""Networks that end in the logits of classes, taken apart where a curvature matrix wants them: outputs, then a loss.

Each is a ``benchmarks.models.Model`` as well, by one formula for every library. The layered ones tell what enters each
layer and what leaves it, from which Kronecker factors are made by hand.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.models import Model, Params, cross_entropy
from benchmarks.peers.operations import Array, Operations


@dataclass(frozen=True)
class Network:
    """A model whose loss is the cross entropy of its outputs.

    Attributes:
        model: the parameters, the batch of inputs and one-hot targets, and the loss of both.
        outputs: ``outputs(operations, params, inputs)``, the logits of a batch.
        layers: the layers in a row, of a network that is nothing else.
    """

    model: Model
    outputs: Callable[[Operations, Params, Array], Array]
    layers: "tuple[Layer, ...]" = ()


@dataclass(frozen=True)
class Layer:
    """``y = x w + b``, a filter of images where the weight has four axes; then tanh and a mean over 2 x 2."""

    weight: str
    bias: str
    tanh: bool
    pool: bool = False


def forward(
    ops: Operations, layers: Sequence[Layer], p: Params, x: Array, shifts: Sequence[Array] | None = None
) -> tuple[Array, list[Array]]:
    """The logits, and what entered each layer; ``shifts`` are added to what leaves it, before the tanh."""
    entered = []
    for number, layer in enumerate(layers):
        weight = p[layer.weight]
        x = x if len(weight.shape) == 4 else ops.reshape(x, (x.shape[0], -1))
        entered.append(x)
        x = (ops.filter(x, weight) if len(weight.shape) == 4 else x @ weight) + p[layer.bias]
        x = x if shifts is None else x + shifts[number]
        x = ops.tanh(x) if layer.tanh else x
        x = pooled(ops, x) if layer.pool else x
    return x, entered


def pooled(ops: Operations, images: Array) -> Array:
    """The means over squares of 2 x 2."""
    count, rows, columns, channels = images.shape
    return ops.mean(ops.mean(ops.reshape(images, (count, rows // 2, 2, columns // 2, 2, channels)), axis=4), axis=2)


def perceptron(sizes: tuple[int, ...] = (128, 256, 256, 10), examples: int = 512) -> Network:
    """A tanh network with biases."""
    shapes: dict[str, tuple[int, ...]] = {}
    for number, (rows, columns) in enumerate(itertools.pairwise(sizes)):
        shapes |= {f"w{number}": (rows, columns), f"b{number}": (columns,)}
    layers = tuple(Layer(f"w{number}", f"b{number}", number + 2 < len(sizes)) for number in range(len(sizes) - 1))
    inputs = np.random.default_rng(1).normal(size=(examples, sizes[0]))
    return _layered("mlp", f"MLP {'-'.join(map(str, sizes))}", shapes, layers, inputs)


def convolutional(channels: tuple[int, int] = (16, 32), side: int = 28, examples: int = 32) -> Network:
    """Two filters of 3 x 3, each with tanh and a mean over 2 x 2, and a linear layer."""
    first, second = channels
    shapes = {
        "k1": (3, 3, 1, first), "b1": (first,), "k2": (3, 3, first, second), "b2": (second,),
        "w": ((side // 4) ** 2 * second, 10), "b": (10,),
    }  # fmt: skip
    layers = (Layer("k1", "b1", True, True), Layer("k2", "b2", True, True), Layer("w", "b", False))
    inputs = np.random.default_rng(1).normal(size=(examples, side, side, 1))
    return _layered("convolutional", f"convolutional net {first}-{second}", shapes, layers, inputs)


def _layered(
    name: str, title: str, shapes: dict[str, tuple[int, ...]], layers: tuple[Layer, ...], inputs: np.ndarray
) -> Network:
    def outputs(ops: Operations, p: Params, x: Array) -> Array:
        return forward(ops, layers, p, x)[0]

    classes = shapes[layers[-1].bias][0]
    targets = np.eye(classes)[np.arange(len(inputs)) % classes]
    return _network(name, title, shapes, outputs, (inputs, targets), layers)


def transformer(
    layers: int = 1, width: int = 128, words: int = 256, examples: int = 8, tokens: int = 64, head: int = 64
) -> Network:
    """Embeddings, blocks of causal attention and a feed-forward network, and a head: foretells words."""
    past = np.where(np.tri(tokens, dtype=bool), 0.0, -1e9)

    def normalize(ops: Operations, x: Array, scale: Array) -> Array:
        x = x - ops.mean(x, axis=-1)[..., None]
        return x / ops.sqrt(ops.mean(x**2, axis=-1) + 1e-5)[..., None] * scale

    def block(ops: Operations, x: Array, p: Params, mask: Array) -> Array:
        y, split = normalize(ops, x, p["scale1"]), (x.shape[0], tokens, width // head, head)
        q, k, v = (ops.reshape(y @ p[name], split) for name in "qkv")
        weights = ops.softmax(ops.einsum("bshd,bthd->bhst", q, k) / math.sqrt(head) + mask, axis=-1)
        mixed = ops.reshape(ops.einsum("bhst,bthd->bshd", weights, v), (x.shape[0], tokens, width))
        x = x + mixed @ p["o"]
        return x + ops.gelu(normalize(ops, x, p["scale2"]) @ p["up"] + p["bias1"]) @ p["down"] + p["bias2"]

    def outputs(ops: Operations, p: Params, text: Array) -> Array:
        x = p["words"][text] + p["positions"]
        mask = ops.constant(past, x)
        for number in range(layers):
            x = block(ops, x, {name: p[f"{name}_{number}"] for name in of_block}, mask)
        return x @ p["head"]

    of_block: dict[str, tuple[int, ...]] = dict.fromkeys("qkvo", (width, width)) | {
        "up": (width, 4 * width), "down": (4 * width, width), "scale1": (width,), "scale2": (width,),
        "bias1": (4 * width,), "bias2": (width,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"words": (words, width), "positions": (tokens, width), "head": (width, words)}
    shapes |= {f"{name}_{number}": shape for number in range(layers) for name, shape in of_block.items()}
    text = np.random.default_rng(1).integers(0, words, (examples, tokens + 1))
    batch = (text[:, :-1], np.eye(words)[text[:, 1:]])
    return _network("transformer", f"transformer, {layers} x width {width}", shapes, outputs, batch, ())


def _network(
    name: str,
    title: str,
    shapes: dict[str, tuple[int, ...]],
    outputs: Callable[..., Any],
    batch: tuple[np.ndarray, np.ndarray],
    layers: tuple[Layer, ...],
) -> Network:
    def loss(ops: Operations, p: Params, x: Array, y: Array) -> Array:
        return cross_entropy(ops, outputs(ops, p, x), y)

    return Network(Model(name, title, shapes, loss, batch), outputs, layers)
