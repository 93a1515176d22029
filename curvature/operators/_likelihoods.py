"""The matrix ``M`` in ``J' M J``: second derivatives of losses by the outputs, and outer products of scores."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature._types import Tree
from curvature.operators._base import Product
from curvature.transforms import _modes
from curvature.transforms._compositions import linearize_program, trace_objective
from curvature.transforms._jacobian import gradient_of

Loss = Callable[..., Any]

Likelihood = Literal["categorical", "bernoulli", "normal"]
"""A model's own distribution of labels, with outputs as logits (last axis), logits, means of unit variance."""


def loss_hessian(function: str, loss: Loss, outputs: Tree, args: tuple[Any, ...]) -> Product:
    """``t -> M t`` with ``M`` the Hessian of ``loss`` by the outputs, linearized."""
    program = trace_objective(function, "loss", loss, outputs, args)
    return linearize_program(program, _modes.choose_composition(function, program, "auto"))[2]


def loss_gradient(function: str, loss: Loss, outputs: Tree, args: tuple[Any, ...]) -> Tree:
    """The gradient of ``loss`` by the outputs."""
    program = trace_objective(function, "loss", loss, outputs, args)
    return gradient_of(program, outputs, "rev" if program.blocker("rev") is None else "fwd")[0]


def outer_products(scores: Tree, t: Tree) -> Tree:
    """``d_b (d_b . t_b)`` for each example, along the leading axis of every leaf."""
    pairs = zip(jax.tree.leaves(scores), jax.tree.leaves(t), strict=True)
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
        dots = sum(jnp.sum(d * leaf, axis=range(1, d.ndim)) for d, leaf in pairs)
    return jax.tree.map(lambda d: d * jnp.reshape(dots, (-1,) + (1,) * (d.ndim - 1)).astype(d.dtype), scores)


# ---- likelihoods in closed form -------------------------------------------------------------------------------------


class Family(NamedTuple):
    """A likelihood in its natural parameters ``z``, of independent labels: one for each entry or row of them.

    Attributes:
        probe: a direction at ``z = 0``; ``weight`` of the product of the loss's Hessian with it is the factor of the
            negative log likelihood of each label in the loss.
        information: ``z -> (t -> M t)`` with the Fisher matrix ``M`` of a label.
        draw: minus the score at labels drawn for ``z``.
        outer: ``s (s . t)`` for each label.
    """

    probe: Callable[[Array], Array]
    weight: Callable[[Array], Array]
    information: Callable[[Array], Callable[[Array], Array]]
    draw: Callable[[Array, Array], Array]
    outer: Callable[[Array, Array], Array]


def _softmax_weight(column: Float[Array, "*rows V"]) -> Float[Array, "*rows 1"]:
    """At zero logits the Hessian of a softmax cross entropy is ``(I - 11'/V) / V``, whatever the label."""
    classes = column.shape[-1]
    return column[..., :1] * (classes**2 / max(classes - 1, 1))


def _softmax_information(z: Array) -> Callable[[Array], Array]:
    p = jax.nn.softmax(z)
    return lambda t: p * (t - jnp.sum(p * t, axis=-1, keepdims=True))


def _softmax_draw(key: Array, z: Array) -> Array:
    return jax.nn.softmax(z) - jax.nn.one_hot(jax.random.categorical(key, z), z.shape[-1], dtype=z.dtype)


def _sigmoid_information(z: Array) -> Callable[[Array], Array]:
    variance = jax.nn.sigmoid(z) * jax.nn.sigmoid(-z)
    return lambda t: variance * t


def _sigmoid_draw(key: Array, z: Array) -> Array:
    p = jax.nn.sigmoid(z)
    return p - jax.random.bernoulli(key, p).astype(z.dtype)


FAMILIES = {
    "categorical": Family(
        probe=lambda z: jnp.zeros_like(z).at[..., 0].set(1),
        weight=_softmax_weight,
        information=_softmax_information,
        draw=_softmax_draw,
        outer=lambda s, t: s * jnp.sum(s * t, axis=-1, keepdims=True),
    ),
    "bernoulli": Family(
        probe=jnp.ones_like,
        weight=lambda column: 4 * column,
        information=_sigmoid_information,
        draw=_sigmoid_draw,
        outer=lambda s, t: s**2 * t,
    ),
    "normal": Family(
        probe=jnp.ones_like,
        weight=lambda column: column,
        information=lambda z: lambda t: t,
        draw=lambda key, z: jax.random.normal(key, z.shape, z.dtype),
        outer=lambda s, t: s**2 * t,
    ),
}


def label_weights(function: str, loss: Loss, outputs: Tree, args: tuple[Any, ...], family: Family) -> Tree:
    """The factors ``w_r`` of a loss ``sum_r w_r nll_r``, from its Hessian at zero outputs: a mean's, a mask's."""
    product = loss_hessian(function, loss, jax.tree.map(jnp.zeros_like, outputs), args)
    return jax.tree.map(family.weight, product(jax.tree.map(family.probe, outputs)))


def information(family: Family, outputs: Tree, weights: Tree) -> Product:
    """``t -> M t`` with ``M`` the weighted sum of the Fisher matrices of the labels by the outputs."""
    leaves, structure = jax.tree.flatten(outputs)
    products = [family.information(leaf) for leaf in leaves]

    def product(t: Tree) -> Tree:
        triples = zip(jax.tree.leaves(weights), products, jax.tree.leaves(t), strict=True)
        return structure.unflatten([weight * of_leaf(leaf) for weight, of_leaf, leaf in triples])

    return product


def sampled_information(family: Family, weights: Tree, draws: Tree) -> Product:
    """``information`` with the outer products of drawn scores, (num_samples, *outputs), for the Fisher matrices."""

    def of_leaf(weight: Array, scores: Array, t: Array) -> Array:
        return weight * jnp.mean(jax.vmap(family.outer, in_axes=(0, None))(scores, t), axis=0)

    return lambda t: jax.tree.map(of_leaf, weights, draws, t)


def draw_scores(family: Family, key: Array, outputs: Tree, first: Array, num_samples: int) -> Tree:
    """Minus the scores of drawn labels, (num_samples, *outputs); that of an example depends on its number alone."""

    def draw(key: Array, outputs: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(outputs)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten([family.draw(*pair) for pair in zip(keys, leaves, strict=True)])

    def draws(number: Array, outputs: Tree) -> Tree:
        keys = jax.random.split(jax.random.fold_in(key, number), num_samples)
        return jax.vmap(draw, in_axes=(0, None))(keys, outputs)

    numbers = first + jnp.arange(jax.tree.leaves(outputs)[0].shape[0], dtype=jnp.int32)
    return jax.vmap(draws, out_axes=1)(numbers, outputs)
