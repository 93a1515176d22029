"""The models that are measured, each one formula for every library.

A model's loss takes the operations of a library, parameters by name, and a batch; it is the mean over the examples of
the batch. Every library differentiates the very same formula at the same numbers. A model that ends in the logits of
classes also says what its outputs are, and a layered one what its layers are, for curvature matrices.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from benchmarks.peers.operations import Array, Operations

Params = Mapping[str, Array]


@dataclass(frozen=True)
class Layer:
    """``y = x w + b``, a filter of images where the weight has four axes; then tanh and a mean over 2 x 2.

    The bias is empty where there is none.
    """

    weight: str
    bias: str
    tanh: bool
    pool: bool = False


@dataclass(frozen=True)
class Model:
    """A loss, with parameters and a batch of numbers.

    Attributes:
        name: what ``--models`` selects by.
        title: with its sizes, for the head of a table.
        shapes: of the parameters, by name, in the order of a flat vector of them.
        loss: ``loss(operations, params, *batch)``, the mean over the batch.
        batch: arrays in double precision; the leading axis is the example.
        needs: the operations that not every library has.
        is_mean: whether the loss is the mean of those of batches of one; ``False`` for what has no examples.
        outputs: ``outputs(operations, params, inputs)``, the logits of which the loss is the cross entropy.
        layers: of a network that is a row of layers.
    """

    name: str
    title: str
    shapes: Mapping[str, tuple[int, ...]]
    loss: Callable[..., Array]
    batch: tuple[np.ndarray, ...]
    needs: tuple[str, ...] = ()
    is_mean: bool = True
    outputs: Callable[[Operations, Params, Array], Array] | None = None
    layers: tuple[Layer, ...] = ()

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes.values())

    def params(self) -> dict[str, np.ndarray]:
        """Random parameters, scaled by the square root of what they sum over: all axes but the last."""
        rng = np.random.default_rng(0)
        return {n: rng.normal(size=s) / math.sqrt(math.prod(s[:-1]) or 1) for n, s in self.shapes.items()}

    def direction(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(7)
        return {name: rng.normal(size=shape) for name, shape in self.shapes.items()}

    def unpack(self, ops: Operations, flat: Array) -> dict[str, Array]:
        params, start = {}, 0
        for name, shape in self.shapes.items():
            params[name] = ops.reshape(flat[start : start + math.prod(shape)], shape)
            start += math.prod(shape)
        return params

    def pack(self, params: Params) -> np.ndarray:
        return np.concatenate([np.ravel(params[name]) for name in self.shapes])

    def flat_loss(self, ops: Operations) -> Callable[..., Array]:
        return lambda flat, *batch: self.loss(ops, self.unpack(ops, flat), *batch)


def cross_entropy(ops: Operations, logits: Array, targets: Array) -> Array:
    """The mean over all but the last axis; the targets are one-hot."""
    return ops.mean(ops.logsumexp(logits, axis=-1) - ops.sum(logits * targets, axis=-1))


def classifier(name: str, title: str, shapes: Mapping[str, tuple[int, ...]], outputs, batch, layers=()) -> Model:
    def loss(ops: Operations, p: Params, x: Array, y: Array) -> Array:
        return cross_entropy(ops, outputs(ops, p, x), y)

    return Model(name, title, shapes, loss, batch, outputs=outputs, layers=tuple(layers))


def one_hot(examples: int, classes: int) -> np.ndarray:
    return np.eye(classes)[np.arange(examples) % classes]


def logistic(inputs: int = 200, examples: int = 1000) -> Model:
    def loss(ops: Operations, p: Params, x: Array, y: Array) -> Array:
        z = ops.einsum("bi,i->b", x, p["w"])
        # log(1 + exp(-yz)), where a logsumexp of two does not overflow
        both = ops.einsum("kb->bk", ops.reshape(ops.concat([0 * z, -y * z], 0), (2, -1)))
        return ops.mean(ops.logsumexp(both, axis=-1)) + 0.005 * ops.sum(p["w"] ** 2)

    rng = np.random.default_rng(1)
    x = rng.normal(size=(examples, inputs))
    y = np.sign(x[:, 0] + rng.normal(size=examples))
    return Model("logistic", f"logistic regression, {inputs} inputs", {"w": (inputs,)}, loss, (x, y))


def layered(ops: Operations, layers: Sequence[Layer], p: Params, x: Array, shifts=None) -> tuple[Array, list[Array]]:
    """The logits, and what entered each layer; ``shifts`` are added to what leaves it, before the tanh."""
    entered = []
    for number, layer in enumerate(layers):
        weight = p[layer.weight]
        x = ops.reshape(x, (x.shape[0], -1)) if len(weight.shape) < len(x.shape) else x
        entered.append(x)
        x = ops.filter(x, weight) if len(weight.shape) == 4 else x @ weight
        x = x + p[layer.bias] if layer.bias else x
        x = x if shifts is None else x + shifts[number]
        x = ops.tanh(x) if layer.tanh else x
        if layer.pool:  # the means over squares of 2 x 2
            count, rows, columns, channels = x.shape
            x = ops.reshape(x, (count, rows // 2, 2, columns // 2, 2, channels))
            x = ops.mean(ops.mean(x, axis=4), axis=2)
    return x, entered


def of_layers(layers: Sequence[Layer], ops: Operations, p: Params, x: Array) -> Array:
    return layered(ops, layers, p, x)[0]


def mlp(
    sizes: tuple[int, ...] = (20, 32, 10),
    examples: int = 256,
    *,
    title: str = "MLP",
    classifies: bool = True,
    bias: bool = True,
) -> Model:
    """A tanh network that classifies, or that fits values by squares."""
    shapes: dict[str, tuple[int, ...]] = {}
    for i, pair in enumerate(itertools.pairwise(sizes)):
        shapes |= {f"w{i}": pair} | ({f"b{i}": pair[1:]} if bias else {})
    layers = [Layer(f"w{i}", f"b{i}" if bias else "", i + 2 < len(sizes)) for i in range(len(sizes) - 1)]
    rng, outputs, title = np.random.default_rng(1), partial(of_layers, layers), f"{title} {'-'.join(map(str, sizes))}"
    inputs, values = rng.normal(size=(examples, sizes[0])), rng.normal(size=(examples, sizes[-1]))
    if classifies:
        return classifier("mlp", title, shapes, outputs, (inputs, one_hot(examples, sizes[-1])), layers)

    def loss(ops: Operations, p: Params, x: Array, y: Array) -> Array:
        return ops.mean(ops.sum((outputs(ops, p, x) - y) ** 2, axis=-1))

    return Model("mlp", title, shapes, loss, (inputs, values))


tanh_network = partial(mlp, title="tanh network", classifies=False, bias=False)


def convolutional(channels: tuple[int, int] = (6, 8), side: int = 12, examples: int = 32) -> Model:
    """Two convolutions of 3 x 3 with stride 2, a mean over what is left of the image, a linear layer."""
    first, second = channels

    def loss(ops: Operations, p: Params, x: Array, y: Array) -> Array:
        hidden = ops.tanh(ops.convolve(ops.tanh(ops.convolve(x, p["k1"])), p["k2"]))
        return cross_entropy(ops, ops.einsum("bhwc,cj->bj", hidden, p["w"]) * (16 / side**2), y)

    shapes = {"k1": (3, 3, 1, first), "k2": (3, 3, first, second), "w": (second, 10)}
    batch = np.random.default_rng(1).normal(size=(examples, side, side, 1)), one_hot(examples, 10)
    return Model("convolutional", f"convolutional net {first}-{second}", shapes, loss, batch, ("convolve",))


def pooling(channels: tuple[int, int] = (16, 32), side: int = 28, examples: int = 32) -> Model:
    """Two filters of 3 x 3, each with tanh and a mean over 2 x 2, and a linear layer."""
    first, second = channels
    shapes = {
        "k1": (3, 3, 1, first), "b1": (first,), "k2": (3, 3, first, second), "b2": (second,),
        "w": ((side // 4) ** 2 * second, 10), "b": (10,),
    }  # fmt: skip
    layers = (Layer("k1", "b1", True, True), Layer("k2", "b2", True, True), Layer("w", "b", False))
    batch = np.random.default_rng(1).normal(size=(examples, side, side, 1)), one_hot(examples, 10)
    title = f"convolutional net {first}-{second}"
    return classifier("convolutional", title, shapes, partial(of_layers, layers), batch, layers)


def attention(ops: Operations, q: Array, k: Array, v: Array, mask: Array | float = 0.0) -> Array:
    """Softmax attention of ``(examples, tokens, heads, width)``, the heads side by side."""
    weights = ops.softmax(ops.einsum("bshd,bthd->bhst", q, k) / math.sqrt(q.shape[-1]) + mask, axis=-1)
    return ops.reshape(ops.einsum("bhst,bthd->bshd", weights, v), (-1, q.shape[1], q.shape[2] * q.shape[3]))


def normalize(ops: Operations, x: Array) -> Array:
    x = x - ops.mean(x, axis=-1)[..., None]
    return x / ops.sqrt(ops.mean(x**2, axis=-1) + 1e-5)[..., None]


def transformer(width: int = 16, tokens: int = 16, examples: int = 8, heads: int = 2) -> Model:
    """One block of attention with a feed-forward network, which predicts the vector that follows."""

    def loss(ops: Operations, p: Params, x: Array) -> Array:
        y = normalize(ops, x)
        q, k, v = (ops.reshape(y @ p[name], (-1, tokens, heads, width // heads)) for name in "qkv")
        z = x + attention(ops, q, k, v) @ p["o"]
        z = z + ops.tanh(normalize(ops, z) @ p["up"]) @ p["down"]
        return ops.mean((z[:, :-1] - x[:, 1:]) ** 2)

    shapes = dict.fromkeys("qkvo", (width, width)) | {"up": (width, 2 * width), "down": (2 * width, width)}
    batch = (np.random.default_rng(1).normal(size=(examples, tokens, width)),)
    return Model("transformer", f"transformer block of width {width}", shapes, loss, batch)


def language_model(
    layers: int = 1, width: int = 128, words: int = 256, examples: int = 8, tokens: int = 64, head: int = 64
) -> Model:
    """Embeddings, blocks of causal attention and a feed-forward network, and a head that predicts words."""
    past = np.where(np.tri(tokens, dtype=bool), 0.0, -1e9)

    def block(ops: Operations, x: Array, p: Params, mask: Array) -> Array:
        y, split = normalize(ops, x) * p["scale1"], (x.shape[0], tokens, width // head, head)
        x = x + attention(ops, *(ops.reshape(y @ p[name], split) for name in "qkv"), mask) @ p["o"]
        y = normalize(ops, x) * p["scale2"]
        return x + ops.gelu(y @ p["up"] + p["bias1"]) @ p["down"] + p["bias2"]

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
    return classifier("transformer", f"transformer, {layers} x width {width}", shapes, outputs, batch)


def neural_ode(width: int = 16, steps: int = 30, trajectories: int = 32) -> Model:
    """Euler steps of a small network, in the loop of the library where it has one."""

    def loss(ops: Operations, p: Params, x: Array) -> Array:
        def step(y: Array, w1: Array, w2: Array) -> Array:
            return y + 0.05 * ops.tanh(y @ w1) @ w2

        return ops.mean((ops.repeat(step, steps, x, p["w1"], p["w2"]) - 1.0) ** 2)

    batch = (np.random.default_rng(1).normal(size=(trajectories, 6)),)
    return Model("neural-ode", f"neural ODE, {steps} Euler steps", {"w1": (6, width), "w2": (width, 6)}, loss, batch)


def pinn(width: int = 16, points: int = 128) -> Model:
    """The residual of u'' = -sin(x) for a tanh network u of one input: a loss that holds second derivatives already."""

    def loss(ops: Operations, p: Params, x: Array) -> Array:
        def u(x: Array) -> Array:
            hidden = ops.tanh(ops.einsum("b,j->bj", x, p["w0"]) + p["b0"])
            return ops.einsum("bj,j->b", ops.tanh(hidden @ p["w1"] + p["b1"]), p["w2"])

        return ops.mean((ops.second_derivative(u, x) + ops.sin(x)) ** 2)

    shapes = {"w0": (width,), "b0": (width,), "w1": (width, width), "b1": (width,), "w2": (width,)}
    return Model("pinn", f"PINN of width {width}", shapes, loss, (np.linspace(-3, 3, points),), ("second_derivative",))


MODELS: dict[str, Callable[[], Model]] = {
    "logistic": logistic,
    "mlp": mlp,
    "convolutional": convolutional,
    "transformer": transformer,
    "neural-ode": neural_ode,
    "pinn": pinn,
}
