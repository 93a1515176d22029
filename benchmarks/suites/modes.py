"""Which mode: gradients, products and Hessians by every composition, in every library."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

import curvature
from benchmarks.cases import Case, Choice, Contestant, Race
from benchmarks.models import MODELS, Model
from benchmarks.peers import jax_ways

TITLE = "Modes"
QUESTION = "Forward or reverse, and in which order?"
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


def cases(choice: Choice) -> Iterator[Case]:
    """Every derivative of every model."""
    for make in MODELS.values():
        model = make()
        yield Race(
            f"modes/hvp/{model.name}/n={model.num_parameters}",
            f"Hessian-vector product, {model.title}, {model.num_parameters} parameters",
            model.name,
            partial(hvps, model),
            partial(jax_ways.reference, model, "hvp"),
            TOLERANCE[choice.dtype],
            {"n": model.num_parameters, "batch": len(model.batch[0])},
            budget=0.2 if choice.quick else 1.0,
        )


def hvps(model: Model) -> Iterator[Contestant]:
    """Each composition of two derivatives."""
    loss, x, batch = jax_ways.problem(model)
    v = jax.tree.map(lambda a, b: a.astype(b.dtype), jax_ways.direction(model), x)
    read = jax_ways.flat_vector(model)

    def fwd_over_rev(x: Any, v: Any, *batch: Any) -> Any:
        return jax.jvp(lambda x: jax.grad(loss)(x, *batch), (x,), (v,))[1]

    def rev_over_rev(x: Any, v: Any, *batch: Any) -> Any:
        return jax.vjp(lambda x: jax.grad(loss)(x, *batch), x)[1](v)[0]

    args = (x, v, *batch)
    yield Contestant("curvature.hvp", "curvature", lambda x, v, *b: curvature.hvp(loss, x, v, *b), args, read=read)
    yield Contestant("jax, forward over reverse", "jax", fwd_over_rev, args, read=read)
    yield Contestant("jax, reverse over reverse", "jax", rev_over_rev, args, read=read)
