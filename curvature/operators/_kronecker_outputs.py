"""What is sent back from the outputs of one example: columns whose outer products make up its output Hessian."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature import _checks
from curvature._types import Tree, ravel
from curvature.operators._outputs import FAMILIES, Likelihood, label_weights
from curvature.transforms._hessian import hessian

Kind = Literal["exact", "sampled", "empirical"]


class OutputSide(NamedTuple):
    """How the output Hessian of one example is factored; see ``KroneckerOperator``."""

    kind: Kind
    likelihood: Likelihood | None
    num_samples: int


def output_columns(
    function: str, side: OutputSide, loss: Callable[[Tree], Array], outputs: Tree, key: Any
) -> Float[Array, "columns outputs"]:
    """Vectors ``w_c`` with ``sum_c w_c w_c'`` the Hessian of the loss, or an estimate of it, as rows."""
    vector, unravel = ravel(outputs)

    def of_vector(vector: Array) -> Array:
        return loss(unravel(vector))

    if side.kind == "empirical":
        return jax.grad(of_vector)(vector)[None]
    if side.likelihood is None:
        _checks.check_output_size(function, vector.size)
        return _square_root(hessian(of_vector)(vector))
    family = FAMILIES[side.likelihood]
    (logits,) = jax.tree.leaves(outputs)
    (weights,) = jax.tree.leaves(label_weights(function, loss, outputs, (), family))
    if side.kind == "exact":
        return _exact(side.likelihood, logits, weights)
    # The draws of FisherOperator: a key for each sample, and of it one for each array of outputs.
    keys = jax.vmap(lambda key: jax.random.split(key, 1)[0])(jax.random.split(key, side.num_samples))
    scores = jax.vmap(lambda key: family.draw(key, logits))(keys)
    return (jnp.sqrt(weights / side.num_samples)[None] * scores).reshape(side.num_samples, -1)


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
