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


def check_axis_of_examples(function: str, whole: tuple[int, ...], alone: tuple[int, ...], size: int) -> int:
    """The one axis by which the outputs of a batch of ``size`` differ from those of a batch of one."""
    for axis, length in enumerate(whole):
        if length == size and (*whole[:axis], 1, *whole[axis + 1 :]) == alone:
            return axis
    raise ValueError(
        f"{function}: the model returns shape {whole} for {size} examples and {alone} for one, expected shapes that "
        f"differ in one axis of {size} examples; broadcast what all examples share along such an axis."
    )


def no_batch_of_one(function: str, error: Exception) -> ValueError:
    """The error for a model that takes the whole batch, but no example alone."""
    return ValueError(
        f"{function}: the model fails on a batch of one example ({type(error).__name__}: {error}), expected one that "
        "takes batches of any size; reshape by inputs.shape[0], not by a fixed number of examples."
    )


def model_mixes(function: str, where: Any) -> ValueError:
    """The error for a model whose outputs for one example depend on others."""
    named = "" if where is None else f", at the earliest by {where}"
    return ValueError(
        f"{function}: the model mixes the examples of a batch{named}: its outputs for an example alone are not those "
        "in the batch, expected outputs that depend on the data of their own example. Normalize in evaluation mode, "
        "with statistics that are parameters or constants; draw random numbers from a key for each example; or take "
        "GaussNewtonOperator, which never cuts the batch."
    )


def loss_mixes(function: str, where: Any) -> ValueError:
    """The error for a loss that couples the outputs of different examples."""
    named = "" if where is None else f", at the earliest by {where}"
    return ValueError(
        f"{function}: the loss mixes the outputs of different examples{named}, expected a weighted sum of one loss "
        "for each example; take GaussNewtonOperator, which never cuts the batch."
    )


def wrong_reduction(function: str, name: str, reduction: str, found: str) -> ValueError:
    """The error for data in parts whose values do not add up as the user says."""
    if found != "neither":
        return ValueError(
            f"{function}: reduction={reduction!r}, but {name} of a batch is the {found} of its values for the "
            f"examples, not their {reduction}; pass reduction={found!r}."
        )
    return ValueError(
        f"{function}: reduction={reduction!r}, but {name} of a batch is neither the mean nor the sum of its values "
        "for the examples, so that parts of the data do not add up: a mean over a mask divides by the weights of its "
        "part, batch statistics are those of its part. Take the data whole (chunk_size=None), or a sum divided by the "
        "total weight, passed as a scalar in args, with reduction='sum'."
    )
