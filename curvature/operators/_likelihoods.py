"""The output matrix ``M`` of ``J' M J``: Hessians of losses, closed-form Fisher matrices, outer products of scores."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Float

from curvature._errors import caller
from curvature._types import Tree
from curvature.operators._base import Product
from curvature.transforms import _modes
from curvature.transforms._compositions import linearize_program, trace_objective
from curvature.transforms._jacobian import gradient_of

Loss = Callable[..., Any]

Likelihood = Literal["categorical", "bernoulli", "normal"]
"""The distribution of labels under the model; outputs are logits (last axis), logits, or means with unit variance."""


def loss_hessian(loss: Loss, outputs: Tree, args: tuple[Any, ...]) -> Product:
    """``t -> M t``, linearized, with ``M`` the Hessian of ``loss`` with respect to the outputs."""
    program = trace_objective("loss", loss, outputs, args)
    return linearize_program(program, _modes.choose_composition(program, "auto"))[2]


def loss_gradient(loss: Loss, outputs: Tree, args: tuple[Any, ...]) -> Tree:
    """The gradient of ``loss`` with respect to the outputs."""
    program = trace_objective("loss", loss, outputs, args)
    return gradient_of(program, outputs, "rev" if program.blocker("rev") is None else "fwd")[0]


def outer_products(scores: Tree, t: Tree) -> Tree:
    """``d_b (d_b . t_b)`` for each example b, with ``d`` the scores; examples lie along the leading axis."""
    pairs = zip(jax.tree.leaves(scores), jax.tree.leaves(t), strict=True)
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
        dots = sum(jnp.sum(d * leaf, axis=range(1, d.ndim)) for d, leaf in pairs)
    return jax.tree.map(lambda d: d * jnp.reshape(dots, (-1,) + (1,) * (d.ndim - 1)).astype(d.dtype), scores)


# ---- likelihoods in closed form -------------------------------------------------------------------------------------


class Family(NamedTuple):
    """A likelihood of independent labels in its natural parameters ``z``: a label for each entry or row of ``z``.

    Attributes:
        probe: a direction ``t`` at ``z = 0``.
        weight: from ``H t``, with ``H`` the Hessian of the loss at ``z = 0``, to the factor in the loss of the negative
            log likelihood of each label.
        information: ``z -> (t -> M t)`` with ``M`` the Fisher matrix of a label.
        draw: ``(key, z)`` to minus the score at a label drawn from the likelihood.
        outer: ``(s, t)`` to ``s (s . t)`` for each label.
    """

    probe: Callable[[Array], Array]
    weight: Callable[[Array], Array]
    information: Callable[[Array], Callable[[Array], Array]]
    draw: Callable[[Array, Array], Array]
    outer: Callable[[Array, Array], Array]


def _softmax_weight(column: Float[Array, "*rows V"]) -> Float[Array, "*rows 1"]:
    """At zero logits the Hessian of a softmax cross entropy is ``(I - 11'/V) / V`` for every label."""
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


def family_and_weights(likelihood: str, loss: Loss, outputs: Tree, args: tuple[Any, ...]) -> tuple[Family, Tree]:
    """The family of a likelihood, and the factors of the negative log likelihoods in the loss."""
    for path, leaf in tree_flatten_with_path(outputs)[0]:
        if likelihood == "categorical" and not leaf.ndim:
            raise ValueError(
                f"{caller()}: likelihood='categorical', but the output model(x){keystr(path)} is a scalar, expected "
                "logits along its last axis."
            )
    family = FAMILIES[likelihood]
    return family, label_weights(loss, outputs, args, family)


def label_weights(loss: Loss, outputs: Tree, args: tuple[Any, ...], family: Family) -> Tree:
    """The factors ``w_r`` of a loss ``sum_r w_r nll_r``, such as ``1/B``, from the Hessian at zero outputs."""
    product = loss_hessian(loss, jax.tree.map(jnp.zeros_like, outputs), args)
    return jax.tree.map(family.weight, product(jax.tree.map(family.probe, outputs)))


def information(family: Family, outputs: Tree, weights: Tree) -> Product:
    """``t -> M t`` with ``M`` the weighted sum of the Fisher matrices of the labels with respect to the outputs."""
    leaves, structure = jax.tree.flatten(outputs)
    products = [family.information(leaf) for leaf in leaves]

    def product(t: Tree) -> Tree:
        triples = zip(jax.tree.leaves(weights), products, jax.tree.leaves(t), strict=True)
        return structure.unflatten([weight * of_leaf(leaf) for weight, of_leaf, leaf in triples])

    return product


def sampled_information(family: Family, weights: Tree, draws: Tree) -> Product:
    """``information`` with means of outer products of ``draws``, (num_samples, *outputs), as the Fisher matrices."""

    def of_leaf(weight: Array, scores: Array, t: Array) -> Array:
        return weight * jnp.mean(jax.vmap(family.outer, in_axes=(0, None))(scores, t), axis=0)

    return lambda t: jax.tree.map(of_leaf, weights, draws, t)


def draw_scores(family: Family, key: Array, outputs: Tree, first: Array, num_samples: int) -> Tree:
    """Minus the scores at drawn labels, (num_samples, *outputs).

    The draw for an example depends only on ``key`` and on the index of the example, which for the first is ``first``:
    it does not depend on how the data is chunked.
    """

    def draw(key: Array, outputs: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(outputs)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten([family.draw(*pair) for pair in zip(keys, leaves, strict=True)])

    def draw_samples(index: Array, outputs: Tree) -> Tree:
        keys = jax.random.split(jax.random.fold_in(key, index), num_samples)
        return jax.vmap(draw, in_axes=(0, None))(keys, outputs)

    indices = first + jnp.arange(jax.tree.leaves(outputs)[0].shape[0], dtype=jnp.int32)
    return jax.vmap(draw_samples, out_axes=1)(indices, outputs)
