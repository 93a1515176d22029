"""Factorizations ``H_b = sum_c w_bc w_bc'`` of the output Hessian of each example, for ``KroneckerOperator``."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature._errors import caller
from curvature._sharding import place_like, vary_like
from curvature._trees import num_entries, ravel
from curvature._types import Tree
from curvature.operators._data import Reduction
from curvature.operators._likelihoods import FAMILIES, Likelihood, label_weights, loss_gradient, loss_hessian
from curvature.transforms._jacobian import map_basis

Kind = Literal["exact", "sampled", "empirical"]

_MOST_OUTPUTS = 2048  # Heuristic: the eigendecomposition of a matrix of this size, per example, is still affordable


class OutputSide(NamedTuple):
    """The options that determine how the output Hessian is factored; see ``KroneckerOperator``."""

    kind: Kind
    likelihood: Likelihood | None
    num_samples: int
    reduction: Reduction

    def check(self, one: Tree) -> None:
        """Refuse outputs of a batch of one whose Hessian cannot be factored."""
        leaves = jax.tree.leaves(one)
        if self.likelihood is not None and len(leaves) != 1:
            raise ValueError(
                f"{caller()}: likelihood={self.likelihood!r}, but the model returns {len(leaves)} arrays, expected "
                "one; leave likelihood out."
            )
        if self.likelihood == "categorical" and (not leaves[0].shape or leaves[0].shape[-1] < 2):
            raise ValueError(
                f"{caller()}: likelihood='categorical', but the model returns shape {leaves[0].shape} for one example, "
                "expected logits of at least two classes along the last axis."
            )
        size = num_entries(one)
        if self.kind == "exact" and self.likelihood is None and size > _MOST_OUTPUTS:
            raise ValueError(
                f"{caller()}: one example has {size} outputs, expected at most {_MOST_OUTPUTS} to factor their "
                "Hessian; name the likelihood for its closed form, or take kind='sampled' or 'empirical'."
            )

    def of_batch(self, loss: Callable[[Tree], Array], rows: Tree) -> Any:
        """The arrays from which ``columns`` are formed, with examples along the leading axis; evaluates the loss.

        Args:
            loss: the loss of the whole batch as a function of the rows of its outputs; it does not couple rows.
            rows: the outputs; row b is the output of a batch of example b alone.
        """
        if self.kind == "empirical":
            scores = _ravel_rows(loss_gradient(loss, rows, ()))
            # The score of a mean has the factor 1/B and its square 1/B^2.
            return scores * math.sqrt(len(scores)) if self.reduction == "mean" else scores
        if self.likelihood is None:
            return _diagonal_blocks(loss, rows)
        (logits,) = jax.tree.leaves(rows)
        (weights,) = jax.tree.leaves(label_weights(loss, rows, (), FAMILIES[self.likelihood]))
        return _at_least_single(logits), _at_least_single(weights)

    def has_curvature(self, side: Any) -> Float[Array, " examples"]:
        """1 for each example that the loss depends on, 0 for an example that a mask excludes."""
        array = side[1] if isinstance(side, tuple) else side
        return jnp.any(array != 0, range(1, array.ndim)).astype(array.dtype)

    def columns(self, side: Any, key: Any) -> Float[Array, "columns outputs"]:
        """For one example the vectors ``w_c``, as rows: ``sum_c w_c w_c'`` is its Hessian or an estimate of it."""
        if self.kind == "empirical":
            return side[None]
        if self.likelihood is None:  # the nearest positive semidefinite matrix is sum_c w_c w_c'
            eigenvalues, vectors = jnp.linalg.eigh((side + side.T) / 2)
            return jnp.sqrt(jnp.maximum(eigenvalues, 0))[:, None] * vectors.T
        logits, weights = side
        if self.kind == "exact":
            return _closed_form_root(self.likelihood, logits, weights)
        # The same draws as FisherOperator: a key for each sample, split for each array of outputs.
        keys = jax.vmap(lambda key: jax.random.split(key, 1)[0])(jax.random.split(key, self.num_samples))
        scores = jax.vmap(lambda key: FAMILIES[str(self.likelihood)].draw(key, logits))(keys)
        return (jnp.sqrt(weights / self.num_samples)[None] * scores).reshape(self.num_samples, -1)


def _diagonal_blocks(loss: Callable[[Tree], Array], rows: Tree) -> Float[Array, "examples outputs outputs"]:
    """``H_b``, the Hessian of the loss of the batch with respect to the outputs of example b, for each b.

    The loss couples no two examples, so the product with a vector repeated for all examples holds ``H_b t`` of all b.
    """
    product = loss_hessian(loss, rows, ())

    def of_direction(t: Tree) -> Array:
        repeated = jax.tree.map(lambda leaf, row: place_like(jnp.broadcast_to(row, leaf.shape), leaf), rows, t)
        return _ravel_rows(product(vary_like(repeated, rows)))

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), rows)
    return jnp.moveaxis(map_basis(of_direction, zero, "auto"), 0, -1)


def _ravel_rows(rows: Tree) -> Float[Array, "examples outputs"]:
    """Each row of a tree as a vector."""
    return _at_least_single(jax.vmap(lambda row: ravel(row)[0])(rows))


def _at_least_single(array: Array) -> Array:
    """The array in at least single precision, as ``eigh`` requires."""
    return array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < 32 else array


def _closed_form_root(likelihood: Likelihood, logits: Array, weights: Array) -> Float[Array, "outputs outputs"]:
    """The closed form of a square root of the Hessian: rows ``w_c`` with ``sum_c w_c w_c' = H``."""
    if likelihood != "categorical":
        p = jax.nn.sigmoid(logits)
        curvature = weights * p * (1 - p) if likelihood == "bernoulli" else weights
        return jnp.diag(jnp.sqrt(curvature).reshape(-1))
    p = jax.nn.softmax(logits).reshape(-1, logits.shape[-1])
    positions, classes = p.shape
    # diag(p) - p p' = sum_c r_c r_c' with r_c = sqrt(p_c) (e_c - p)
    root = jnp.sqrt(weights.reshape(-1, 1) * p)[:, :, None] * (jnp.eye(classes, dtype=p.dtype)[None] - p[:, None, :])
    rows = root[:, :, None, :] * jnp.eye(positions, dtype=p.dtype)[:, None, :, None]
    return rows.reshape(logits.size, logits.size)
