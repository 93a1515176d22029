"""What is sent back from the outputs of one example: columns whose outer products make up its output Hessian."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature import _checks
from curvature._sharding import vary_like
from curvature._trees import ravel
from curvature._types import Tree
from curvature.operators._data import Reduction
from curvature.operators._likelihoods import FAMILIES, Likelihood, label_weights, loss_gradient, loss_hessian
from curvature.transforms._jacobian import map_basis

Kind = Literal["exact", "sampled", "empirical"]


class OutputSide(NamedTuple):
    """How the output Hessian of one example is factored; see ``KroneckerOperator``."""

    kind: Kind
    likelihood: Likelihood | None
    num_samples: int
    reduction: Reduction

    def check(self, function: str, one: Tree) -> None:
        """Refuse outputs, as of a batch of one, that cannot be factored."""
        _checks.check_likelihood(function, self.likelihood, one)
        if self.kind == "exact" and self.likelihood is None:
            _checks.check_output_size(function, sum(leaf.size for leaf in jax.tree.leaves(one)))

    def of_batch(self, function: str, loss: Callable[[Tree], Array], rows: Tree) -> Any:
        """What the columns of each example are made from, along the leading axis: all that is asked of the loss.

        Args:
            function: the public name, for errors.
            loss: the loss of the whole batch as a function of the rows of its outputs, none of which it couples.
            rows: the outputs, of which row b is those of a batch of example b alone.
        """
        if self.kind == "empirical":
            scores = _flat(loss_gradient(function, loss, rows, ()))
            # The score of a mean holds 1/B and its square 1/B^2.
            return scores * math.sqrt(len(scores)) if self.reduction == "mean" else scores
        if self.likelihood is None:
            return _diagonal_blocks(function, loss, rows)
        (logits,) = jax.tree.leaves(rows)
        (weights,) = jax.tree.leaves(label_weights(function, loss, rows, (), FAMILIES[self.likelihood]))
        return _full(logits), _full(weights)

    def has_curvature(self, side: Any) -> Float[Array, " examples"]:
        """One for each example that the loss depends on, zero for one that a mask leaves out."""
        array = side[1] if isinstance(side, tuple) else side
        return jnp.any(array != 0, range(1, array.ndim)).astype(array.dtype)

    def columns(self, side: Any, key: Any) -> Float[Array, "columns outputs"]:
        """For one example vectors ``w_c`` with ``sum_c w_c w_c'`` its Hessian, or an estimate of it, as rows."""
        if self.kind == "empirical":
            return side[None]
        if self.likelihood is None:
            return _square_root(side)
        logits, weights = side
        if self.kind == "exact":
            return _exact(self.likelihood, logits, weights)
        # The draws of FisherOperator: a key for each sample, and of it one for each array of outputs.
        keys = jax.vmap(lambda key: jax.random.split(key, 1)[0])(jax.random.split(key, self.num_samples))
        scores = jax.vmap(lambda key: FAMILIES[str(self.likelihood)].draw(key, logits))(keys)
        return (jnp.sqrt(weights / self.num_samples)[None] * scores).reshape(self.num_samples, -1)


def _diagonal_blocks(
    function: str, loss: Callable[[Tree], Array], rows: Tree
) -> Float[Array, "examples outputs outputs"]:
    """``H_b``, the Hessian of the loss of the batch by the outputs of example b, for each of them.

    Where no two examples are coupled, a product with the same vector for every example is that of each block.
    """
    product = loss_hessian(function, loss, rows, ())

    def of_direction(t: Tree) -> Array:
        together = jax.tree.map(lambda leaf, row: jnp.broadcast_to(row, leaf.shape), rows, t)
        return _flat(product(vary_like(together, rows)))

    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:], leaf.dtype), rows)
    return jnp.moveaxis(map_basis(of_direction, zero, "auto"), 0, -1)


def _flat(rows: Tree) -> Float[Array, "examples outputs"]:
    """Each row of a tree as a vector."""
    return _full(jax.vmap(lambda row: ravel(row)[0])(rows))


def _full(array: Array) -> Array:
    """At least single precision, in which eigenvalues are computed."""
    return array.astype(jnp.float32) if jnp.finfo(array.dtype).bits < 32 else array


def _square_root(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Rows ``w_c`` with ``sum_c w_c w_c'`` the nearest positive semidefinite matrix."""
    eigenvalues, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return jnp.sqrt(jnp.maximum(eigenvalues, 0))[:, None] * vectors.T


def _exact(likelihood: Likelihood, logits: Array, weights: Array) -> Float[Array, "outputs outputs"]:
    """The closed form of a square root of the Hessian."""
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
