"""Errors about what is sent back from the outputs of a model."""

from typing import Any

import jax

_MOST_OUTPUTS = 2048  # of one example, whose Hessian is factored


def check_sampling(function: str, kind: str, likelihood: str | None, key: Any) -> None:
    """Refuse to draw labels without a likelihood or a key."""
    if kind == "sampled" and likelihood is None:
        raise ValueError(
            f"{function}: kind='sampled' draws labels and needs likelihood='categorical', 'bernoulli' or 'normal'."
        )
    if kind == "sampled" and key is None:
        raise ValueError(f"{function}: kind='sampled' draws labels and needs key=jax.random.key(seed).")


def check_drawn_gradient(function: str, model: Any, loss: Any, likelihood: str | None) -> None:
    """Refuse the gradient at drawn labels without what it is drawn from."""
    if model is None or loss is None or likelihood is None:
        raise ValueError(
            f"{function}: estimator='gauss-newton-bartlett' draws labels and needs model=, loss= and "
            "likelihood='categorical', 'bernoulli' or 'normal'; estimator='hutchinson' needs none of them."
        )


def check_likelihood(function: str, likelihood: str | None, outputs: Any) -> None:
    """Refuse a likelihood for outputs that are not one array, or have not two classes."""
    leaves = jax.tree.leaves(outputs)
    if likelihood is not None and len(leaves) != 1:
        raise ValueError(
            f"{function}: likelihood={likelihood!r}, but the model returns {len(leaves)} arrays, expected one; "
            "leave likelihood out."
        )
    if likelihood == "categorical" and (not leaves[0].shape or leaves[0].shape[-1] < 2):
        raise ValueError(
            f"{function}: likelihood='categorical', but the model returns shape {leaves[0].shape} for one example, "
            "expected logits of at least two classes along the last axis."
        )


def check_output_size(function: str, size: int) -> None:
    """Refuse to factor the Hessian of very many outputs."""
    if size > _MOST_OUTPUTS:
        raise ValueError(
            f"{function}: one example has {size} outputs, expected at most {_MOST_OUTPUTS} to factor their Hessian; "
            "name the likelihood for its closed form, or take kind='sampled' or 'empirical'."
        )
