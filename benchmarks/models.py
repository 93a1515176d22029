"""The models that are measured, each one formula for every library.

A model's loss takes the operations of a library, parameters by name, and a batch; it is the mean over the examples of
the batch. Every library differentiates the very same formula at the same numbers.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.peers.operations import Array, Operations

Params = Mapping[str, Array]


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
    """

    name: str
    title: str
    shapes: Mapping[str, tuple[int, ...]]
    loss: Callable[..., Array]
    batch: tuple[np.ndarray, ...]
    needs: tuple[str, ...] = ()
    is_mean: bool = True

    @property
    def num_parameters(self) -> int:
        """The length of the flat vector of parameters."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def params(self) -> dict[str, np.ndarray]:
        """Random parameters, scaled by the square root of what they sum over: all axes but the last."""
        rng = np.random.default_rng(0)
        return {
            name: rng.normal(size=shape) / math.sqrt(math.prod(shape[:-1]) or 1) for name, shape in self.shapes.items()
        }

    def unpack(self, ops: Operations, flat: Array) -> dict[str, Array]:
        """The parameters by name, from a flat vector, in any library."""
        params, start = {}, 0
        for name, shape in self.shapes.items():
            params[name] = ops.reshape(flat[start : start + math.prod(shape)], shape)
            start += math.prod(shape)
        return params

    def pack(self, params: Params) -> np.ndarray:
        """The flat vector, in the order of ``shapes``."""
        return np.concatenate([np.ravel(params[name]) for name in self.shapes])

    def flat_loss(self, ops: Operations) -> Callable[..., Array]:
        """The loss of a flat vector of parameters and a batch."""
        return lambda flat, *batch: self.loss(ops, self.unpack(ops, flat), *batch)


def cross_entropy(ops: Operations, logits: Array, targets: Array) -> Array:
    """The mean over all but the last axis; the targets are one-hot."""
    return ops.mean(ops.logsumexp(logits, axis=-1) - ops.sum(logits * targets, axis=-1))


def logistic(inputs: int = 200, examples: int = 1000) -> Model:
    """Logistic regression with a ridge."""

    def loss(ops: Operations, p: Params, x: Array, y: Array) -> Array:
        z = ops.einsum("bi,i->b", x, p["w"])
        # log(1 + exp(-yz)), where a logsumexp of two keeps what overflows apart
        both = ops.einsum("kb->bk", ops.reshape(ops.concat([0 * z, -y * z], 0), (2, -1)))
        return ops.mean(ops.logsumexp(both, axis=-1)) + 0.005 * ops.sum(p["w"] ** 2)

    rng = np.random.default_rng(1)
    x = rng.normal(size=(examples, inputs))
    y = np.sign(x[:, 0] + rng.normal(size=examples))
    return Model("logistic", f"logistic regression, {inputs} inputs", {"w": (inputs,)}, loss, (x, y))


def mlp(sizes: tuple[int, ...] = (20, 32, 10), examples: int = 256) -> Model:
    """A tanh network with biases that classifies."""
    layers = list(itertools.pairwise(sizes))

    def loss(ops: Operations, p: Params, x: Array, y: Array) -> Array:
        for i in range(len(layers)):
            x = ops.einsum("bi,ij->bj", x, p[f"w{i}"]) + p[f"b{i}"]
            x = ops.tanh(x) if i + 1 < len(layers) else x
        return cross_entropy(ops, x, y)

    shapes: dict[str, tuple[int, ...]] = {}
    for i, (rows, columns) in enumerate(layers):
        shapes |= {f"w{i}": (rows, columns), f"b{i}": (columns,)}
    rng = np.random.default_rng(1)
    targets = np.eye(sizes[-1])[np.arange(examples) % sizes[-1]]
    title = f"MLP {'-'.join(map(str, sizes))}"
    return Model("mlp", title, shapes, loss, (rng.normal(size=(examples, sizes[0])), targets))


def convolutional(channels: tuple[int, int] = (6, 8), side: int = 12, examples: int = 32) -> Model:
    """Two convolutions of 3 x 3 with stride 2, a mean over what is left of the image, a linear layer."""
    first, second = channels

    def loss(ops: Operations, p: Params, x: Array, y: Array) -> Array:
        hidden = ops.tanh(ops.convolve(ops.tanh(ops.convolve(x, p["k1"])), p["k2"]))
        return cross_entropy(ops, ops.einsum("bhwc,cj->bj", hidden, p["w"]) * (16 / side**2), y)

    shapes = {"k1": (3, 3, 1, first), "k2": (3, 3, first, second), "w": (second, 10)}
    rng = np.random.default_rng(1)
    batch = (rng.normal(size=(examples, side, side, 1)), np.eye(10)[np.arange(examples) % 10])
    return Model("convolutional", f"convolutional net {first}-{second}", shapes, loss, batch, ("convolve",))


def transformer(width: int = 16, tokens: int = 16, examples: int = 8, heads: int = 2) -> Model:
    """One block of attention with a feed-forward network, which foretells the vector that follows."""

    def normalize(ops: Operations, x: Array) -> Array:
        x = x - ops.mean(x, axis=-1)[..., None]
        return x / ops.sqrt(ops.mean(x**2, axis=-1) + 1e-5)[..., None]

    def loss(ops: Operations, p: Params, x: Array) -> Array:
        y = normalize(ops, x)
        q, k, v = (ops.reshape(y @ p[name], (-1, tokens, heads, width // heads)) for name in "qkv")
        weights = ops.softmax(ops.einsum("bshd,bthd->bhst", q, k) / math.sqrt(width / heads), axis=-1)
        mixed = ops.reshape(ops.einsum("bhst,bthd->bshd", weights, v), (-1, tokens, width))
        z = x + mixed @ p["o"]
        z = z + ops.tanh(normalize(ops, z) @ p["up"]) @ p["down"]
        return ops.mean((z[:, :-1] - x[:, 1:]) ** 2)

    shapes = dict.fromkeys("qkvo", (width, width)) | {"up": (width, 2 * width), "down": (2 * width, width)}
    batch = (np.random.default_rng(1).normal(size=(examples, tokens, width)),)
    return Model("transformer", f"transformer block of width {width}", shapes, loss, batch)


def neural_ode(width: int = 16, steps: int = 30, trajectories: int = 32) -> Model:
    """Euler steps of a small network, in the loop of the library where it has one."""

    def loss(ops: Operations, p: Params, x: Array) -> Array:
        def step(y: Array, w1: Array, w2: Array) -> Array:
            return y + 0.05 * ops.tanh(y @ w1) @ w2

        end = ops.repeat(step, steps, x, p["w1"], p["w2"])
        return ops.mean((end - 1.0) ** 2)

    shapes = {"w1": (6, width), "w2": (width, 6)}
    batch = (np.random.default_rng(1).normal(size=(trajectories, 6)),)
    return Model("neural-ode", f"neural ODE, {steps} Euler steps", shapes, loss, batch)


def pinn(width: int = 16, points: int = 128) -> Model:
    """The residual of u'' = -sin(x) for a tanh network u of one input: a loss that holds second derivatives already."""

    def loss(ops: Operations, p: Params, x: Array) -> Array:
        def u(x: Array) -> Array:
            hidden = ops.tanh(ops.einsum("b,j->bj", x, p["w0"]) + p["b0"])
            return ops.einsum("bj,j->b", ops.tanh(hidden @ p["w1"] + p["b1"]), p["w2"])

        return ops.mean((ops.second_derivative(u, x) + ops.sin(x)) ** 2)

    shapes = {"w0": (width,), "b0": (width,), "w1": (width, width), "b1": (width,), "w2": (width,)}
    batch = (np.linspace(-3, 3, points),)
    return Model("pinn", f"PINN of width {width}", shapes, loss, batch, ("second_derivative",))


MODELS: dict[str, Callable[[], Model]] = {
    "logistic": logistic,
    "mlp": mlp,
    "convolutional": convolutional,
    "transformer": transformer,
    "neural-ode": neural_ode,
    "pinn": pinn,
}
