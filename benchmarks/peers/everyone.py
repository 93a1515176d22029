"""All libraries at one derivative."""

from collections.abc import Iterator
from typing import Any

from benchmarks.cases import Choice, Contestant
from benchmarks.models import Model
from benchmarks.peers import autograd_ways, flat, jax_ways, tensorflow_ways, torch_ways


def others(problem: flat.Flat, derivative: str, choice: Choice, *, compiled: bool) -> Iterator[Contestant]:
    """The libraries that JAX does not compile; a quick run takes TensorFlow as XLA compiles it, and only so.

    Args:
        problem: what is differentiated.
        derivative: ``"gradient"``, ``"hvp"``, ``"products"``, ``"hessian"`` or ``"jacobian"``.
        choice: what the command line asked for.
        compiled: whether ``torch.compile``, which takes many seconds to start, is among them.
    """
    quick = ("tf.function",) if derivative == "products" else ("XLA",)  # XLA takes half a minute to compile 32 passes
    executions: dict[str, Any] = {"executions": quick} if choice.quick else {}
    yield from torch_ways.contestants(problem, derivative, choice, compiled=compiled)
    yield from tensorflow_ways.contestants(problem, derivative, choice, **executions)
    yield from autograd_ways.contestants(problem, derivative, choice)


def of_model(model: Model, derivative: str, choice: Choice, *, compiled: bool = True) -> Iterator[Contestant]:
    """Ours, JAX, and all others, at a derivative of a model's loss by its parameters."""
    yield from jax_ways.contestants(model, derivative)
    size = model.num_parameters
    v = flat.directions(size) if derivative == "products" else model.pack(jax_ways.direction(model))
    yield from others(flat.of_model(model, v), derivative, choice, compiled=compiled)
