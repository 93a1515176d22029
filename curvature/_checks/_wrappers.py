"""Errors of transformations inside optax's wrappers: chains, masks, injected hyperparameters."""

from typing import Any, NoReturn

from curvature._errors import caller

_MOST_PATHS = 5  # in one message


def refuse_changed_gradient() -> NoReturn:
    """Raise the error for ``updates`` that differ from ``grad=``."""
    raise ValueError(
        f"{caller()}: updates are other arrays than grad=, expected the gradient of the objective in both. What comes "
        f"before {caller()} in optax.chain (weight decay, clipping), or a wrapper around it (optax.MultiSteps, "
        f"optax.flatten), changes the updates and not the objective. Put {caller()} first in the chain and a penalty "
        "into the objective; or, where the updates are the gradient of the objective, leave out grad=."
    )


def masked_params(method: str, paths: list[str], failure: Exception) -> TypeError:
    """The error for a call that failed on parameters with masked leaves."""
    shown = ", ".join(f"params{path}" for path in paths[:_MOST_PATHS]) + (", ..." if len(paths) > _MOST_PATHS else "")
    return TypeError(
        f"{caller()}: {method}() has params with optax.MaskedNode instead of {shown}, as optax.masked and "
        f"optax.partition pass them, and fails on them: {type(failure).__name__}: {failure}. Leave out grad=, and pass "
        "functions that fill in the masked leaves; or call it on the tree of the other leaves alone."
    )


def check_shape(shape: Any) -> None:
    """Refuse what is no shape: ``optax.inject_hyperparams`` calls each function among hyperparameters with the step."""
    if not isinstance(shape, tuple):
        raise TypeError(
            f"{caller()}: spatial_axes was called with {shape!r}, expected the shape of a leaf; name it in the "
            "static_args of optax.inject_hyperparams, which takes other functions for schedules."
        )
