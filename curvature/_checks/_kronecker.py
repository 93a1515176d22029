"""Input checks of likelihoods and of per-example curvature: sampling, output size, mixed examples, reductions."""

from typing import Any, Literal

import jax

from curvature._errors import caller

_MOST_OUTPUTS = 2048  # Heuristic: the eigendecomposition of a matrix of this size, per example, is still affordable


def check_sampling(kind: str, likelihood: str | None, key: Any) -> None:
    """Refuse to draw labels without a likelihood or a key."""
    if kind == "sampled" and likelihood is None:
        raise ValueError(
            f"{caller()}: kind='sampled' draws labels and needs likelihood='categorical', 'bernoulli' or 'normal'."
        )
    if kind == "sampled" and key is None:
        raise ValueError(f"{caller()}: kind='sampled' draws labels and needs key=jax.random.key(seed).")


def check_drawn_gradient(model: Any, loss: Any, likelihood: str | None) -> None:
    """Refuse to draw labels for a gradient without a model, a loss and a likelihood."""
    if model is None or loss is None or likelihood is None:
        raise ValueError(
            f"{caller()}: estimator='gauss-newton-bartlett' draws labels and needs model=, loss= and "
            "likelihood='categorical', 'bernoulli' or 'normal'; estimator='hutchinson' needs none of them."
        )


def check_likelihood(likelihood: str | None, outputs: Any) -> None:
    """Refuse a likelihood for outputs that are not one array, or have fewer than two classes."""
    leaves = jax.tree.leaves(outputs)
    if likelihood is not None and len(leaves) != 1:
        raise ValueError(
            f"{caller()}: likelihood={likelihood!r}, but the model returns {len(leaves)} arrays, expected one; "
            "leave likelihood out."
        )
    if likelihood == "categorical" and (not leaves[0].shape or leaves[0].shape[-1] < 2):
        raise ValueError(
            f"{caller()}: likelihood='categorical', but the model returns shape {leaves[0].shape} for one example, "
            "expected logits of at least two classes along the last axis."
        )


def check_output_size(size: int) -> None:
    """Refuse to factor the Hessian of a loss with respect to more outputs than ``_MOST_OUTPUTS``."""
    if size > _MOST_OUTPUTS:
        raise ValueError(
            f"{caller()}: one example has {size} outputs, expected at most {_MOST_OUTPUTS} to factor their Hessian; "
            "name the likelihood for its closed form, or take kind='sampled' or 'empirical'."
        )


def check_axis_of_examples(whole: tuple[int, ...], alone: tuple[int, ...], size: int) -> int:
    """The axis of examples: the only axis in which outputs of a batch of ``size`` and of a batch of one differ."""
    for axis, length in enumerate(whole):
        if length == size and (*whole[:axis], 1, *whole[axis + 1 :]) == alone:
            return axis
    raise ValueError(
        f"{caller()}: the model returns shape {whole} for {size} examples and {alone} for one, expected shapes that "
        f"differ in one axis of {size} examples; broadcast what all examples share along such an axis."
    )


def no_batch_of_one(error: Exception) -> ValueError:
    """The error for a model that accepts the whole batch but not a batch of one."""
    return ValueError(
        f"{caller()}: the model fails on a batch of one example ({type(error).__name__}: {error}), expected one that "
        "takes batches of any size; reshape by inputs.shape[0], not by a fixed number of examples."
    )


def examples_mixed(what: Literal["model", "loss"], where: Any) -> ValueError:
    """The error for a model or a loss that mixes examples; ``where`` is the equation that does, None if unknown."""
    return ValueError(f"{caller()}: " + _MIXED[what].format("" if where is None else f", at the earliest by {where}"))


_MIXED = {
    "model": "the model mixes the examples of a batch{}: its outputs for an example alone differ from its outputs in "
    "the batch, expected outputs that depend on the data of one example only. Normalize in evaluation mode, "
    "with statistics that are parameters or constants; draw random numbers from a key for each example; or take "
    "GaussNewtonOperator, which never cuts the batch.",
    "loss": "the loss mixes the outputs of different examples{}, expected a weighted sum of one loss "
    "for each example; take GaussNewtonOperator, which never cuts the batch.",
}


def wrong_reduction(name: str, reduction: str, found: str) -> ValueError:
    """The error for a function of a batch that is not the mean or sum over examples that ``reduction`` states."""
    if found != "neither":
        return ValueError(
            f"{caller()}: reduction={reduction!r}, but {name} of a batch is the {found} of its values for the "
            f"examples, not their {reduction}; pass reduction={found!r}."
        )
    return ValueError(
        f"{caller()}: reduction={reduction!r}, but {name} of a batch is neither the mean nor the sum of its values "
        "for the examples, so that parts of the data do not add up: a mean over a mask divides by the weights of its "
        "part, and batch statistics depend on the part. Take the data whole (chunk_size=None), or a sum divided by the "
        "total weight, passed as a scalar in args, with reduction='sum'."
    )
