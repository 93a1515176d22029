"""All libraries at one derivative."""

from collections.abc import Iterator

from benchmarks.cases import Choice, Contestant
from benchmarks.models import Model
from benchmarks.peers import autograd_ways, flat, jax_ways, tensorflow_ways, torch_ways


def others(problem: flat.Flat, derivative: str, choice: Choice, *, compiled: bool) -> Iterator[Contestant]:
    """The libraries that JAX does not compile; ``compiled`` adds ``torch.compile``, which takes long to start.

    A quick run takes TensorFlow as XLA compiles it, and only so: eager execution and ``tf.function`` are left out.
    """
    quick = ("tf.function",) if derivative == "products" else ("XLA",)  # XLA takes half a minute to compile 32 passes
    yield from torch_ways.contestants(problem, derivative, choice, compiled=compiled)
    yield from tensorflow_ways.contestants(
        problem, derivative, choice, quick if choice.quick else tensorflow_ways.EXECUTIONS
    )
    yield from autograd_ways.contestants(problem, derivative, choice)


def of_model(model: Model, derivative: str, choice: Choice, *, compiled: bool = True) -> Iterator[Contestant]:
    """Ours, JAX, and all others, at a derivative of a model's loss with respect to its parameters."""
    yield from jax_ways.contestants(model, derivative)
    yield from others(flat.of_model(model, derivative), derivative, choice, compiled=compiled)
