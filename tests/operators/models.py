"""Models of a batch with their losses, and the matrices of each by explicit sums over examples."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Compiles in half the time, for programs that run once."""

_rng = np.random.default_rng(11)


class Case(NamedTuple):
    """``loss`` is the mean over examples, ``sum_loss`` their sum; ``likelihood`` is what they come from."""

    model: Callable[..., Any]
    loss: Callable[..., Any]
    sum_loss: Callable[..., Any]
    params: Any
    args: tuple[Any, ...]
    likelihood: str

    def loss_of(self, reduction):
        return self.loss if reduction == "mean" else self.sum_loss


def _case(model, per_example, params, args, likelihood):
    """``per_example(outputs, *args)`` gives the losses of the examples, shape (B,)."""

    def loss(outputs, *args):
        return jnp.mean(per_example(outputs, *args))

    def sum_loss(outputs, *args):
        return jnp.sum(per_example(outputs, *args))

    return Case(model, loss, sum_loss, params, args, likelihood)


def _normal(*shape):
    return _rng.normal(size=shape)


def _labels(*shape, below):
    return _rng.integers(0, below, size=shape)


def _cross_entropy(logits, inputs, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)


def logistic(params, inputs, labels):
    return inputs @ params["w"] + params["b"]


def _sigmoid_loss(logits, inputs, labels):
    return optax.losses.sigmoid_binary_cross_entropy(logits, labels)


def mlp(params, inputs, labels):
    hidden = jnp.tanh(inputs @ params["in"]["w"] + params["in"]["b"][None])
    return hidden @ params["out"]["w"] + params["out"]["b"][None]


def attention(params, tokens, labels):
    """Logits of shape (B, T, V)."""
    hidden = params["embed"][tokens]
    weights = jax.nn.softmax(jnp.einsum("bti,ij,bsj->bts", hidden, params["qk"], hidden))
    return (hidden + jnp.einsum("bts,bsi,ij->btj", weights, hidden, params["v"])) @ params["out"]


def _sequence_loss(logits, tokens, labels):
    """The sum over tokens."""
    return jnp.sum(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels), axis=1)


def linear(params, data, scale):
    """Linear in a nested tree with scalars; its outputs are a tree too, and one argument is shared by all examples."""
    (w, b), c = params["pair"], params["nest"]["c"]
    return {"many": data["a"] @ w + b[None], "one": scale * (data["b"] * c + params["nest"]["d"][0])}


def _squared_loss(outputs, data, scale):
    return 0.5 * (jnp.sum((outputs["many"] - data["y"]) ** 2, axis=1) + (outputs["one"] - 1) ** 2)


class _Conv(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, images):
        hidden = flax.linen.tanh(flax.linen.Conv(2, (3, 3), strides=2)(images))
        return flax.linen.Dense(2)(hidden.reshape(images.shape[0], -1))


def conv(params, images, targets):
    """A convolution and a dense layer of flax."""
    return _Conv().apply(params, images)


def _regression_loss(outputs, images, targets):
    return jnp.sum(optax.losses.l2_loss(outputs, targets), axis=1)


_EQUINOX, _STATIC = equinox.partition(equinox.nn.MLP(3, 2, 4, 1, key=jax.random.key(1)), equinox.is_inexact_array)


def equinox_mlp(params, inputs, labels):
    """A multilayer perceptron of equinox."""
    return jax.vmap(equinox.combine(params, _STATIC))(inputs)


_IMAGES = _normal(5, 4, 5, 2)
_CONV = jax.tree.map(np.asarray, _Conv().init(jax.random.key(0), jnp.asarray(_IMAGES, jnp.float32)))

CASES = {
    "logistic": _case(
        logistic,
        _sigmoid_loss,
        {"w": _normal(3), "b": _normal()},
        (_normal(7, 3), _labels(7, below=2).astype(float)),
        "bernoulli",
    ),
    "mlp": _case(
        mlp,
        _cross_entropy,
        {"in": {"w": _normal(3, 5), "b": _normal(5)}, "out": {"w": _normal(5, 4), "b": _normal(4)}},
        (_normal(7, 3), _labels(7, below=4)),
        "categorical",
    ),
    "conv": _case(conv, _regression_loss, _CONV, (_IMAGES, _normal(5, 2)), "normal"),
    "attention": _case(
        attention,
        _sequence_loss,
        {"embed": _normal(6, 3), "qk": _normal(3, 3), "v": _normal(3, 3), "out": _normal(3, 6)},
        (_labels(5, 3, below=6), _labels(5, 3, below=6)),
        "categorical",
    ),
    "linear": _case(
        linear,
        _squared_loss,
        {"pair": (_normal(3, 2), _normal(2)), "nest": {"c": _normal(), "d": [_normal(), _normal(2)]}},
        ({"a": _normal(5, 3), "b": _normal(5), "y": _normal(5, 2)}, _normal()),
        "normal",
    ),
    "equinox": _case(equinox_mlp, _cross_entropy, _EQUINOX, (_normal(5, 3), _labels(5, below=2)), "categorical"),
}


def cast(tree, dtype):
    """The floating leaves in one dtype."""
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, dtype if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype), tree
    )


def case_of(name, dtype=jnp.float64):
    """A case with its parameters and data in one precision."""
    case = CASES[name]
    return case._replace(params=cast(case.params, dtype), args=cast(case.args, dtype))


class Oracle(NamedTuple):
    """Dense matrices, each summed over examples, and the number of these."""

    hessian: np.ndarray
    gauss_newton: np.ndarray
    outer_products: np.ndarray
    examples: int

    def of(self, matrix, reduction):
        return matrix / self.examples if reduction == "mean" else matrix


@functools.cache
def oracle(name):
    """The matrices of a case in double precision, one example after the other."""
    case = case_of(name)
    vector, unravel = ravel_pytree(case.params)

    @quick_jit
    def of_example(vector, args):
        def outputs_of(vector):
            return ravel_pytree(case.model(unravel(vector), *args))[0]

        outputs = case.model(case.params, *args)
        flat, unravel_outputs = ravel_pytree(outputs)

        def loss_of(flat):
            return case.sum_loss(unravel_outputs(flat), *args)

        jacobian = jax.jacobian(outputs_of)(vector)
        gradient, hessian = jax.jacobian(lambda v: loss_of(outputs_of(v)))(vector), jax.hessian(loss_of)(flat)
        whole = jax.hessian(lambda v: loss_of(outputs_of(v)))(vector)
        return whole, jacobian.T @ hessian @ jacobian, jnp.outer(gradient, gradient)

    examples = max(leaf.shape[0] for leaf in jax.tree.leaves(case.args) if leaf.ndim)
    parts = [
        of_example(vector, jax.tree.map(lambda leaf, b=b: leaf[b : b + 1] if leaf.ndim else leaf, case.args))
        for b in range(examples)
    ]
    return Oracle(*(np.sum(np.asarray(matrices), axis=0) for matrices in zip(*parts, strict=True)), examples)
