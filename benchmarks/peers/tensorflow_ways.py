"""TensorFlow: ``GradientTape``, ``ForwardAccumulator`` and ``tf.function``, with XLA and without, as contestants."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import peers
from benchmarks.cases import Choice, Contestant
from benchmarks.peers import operations
from benchmarks.peers.flat import PRODUCTS, Flat, Function, Library, Way

TensorFlow = Any  # the module, which is imported when a contestant starts

EXECUTIONS: dict[str, Way] = {
    "eager": lambda tf, function: function,
    "tf.function": lambda tf, function: tf.function(function),
    "XLA": lambda tf, function: tf.function(function, jit_compile=True),
}


def contestants(
    flat: Flat, derivative: str, choice: Choice, executions: Iterable[str] = EXECUTIONS
) -> Iterator[Contestant]:
    """Each way to a derivative, a key of ``WAYS``, executed in each way, keys of ``EXECUTIONS``."""
    for name, way in WAYS[derivative].items():
        for execution in executions:
            yield TENSORFLOW.contestant(f"{name}, {execution}", flat, way, choice, EXECUTIONS[execution])


@functools.cache
def library(threads: int, device: str) -> TensorFlow:
    """The module, with its number of threads set; without a GPU where the run is one of the CPU."""
    tf: Any = peers.tensorflow()
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    if device == "cpu":
        tf.config.set_visible_devices([], "GPU")
    elif not tf.config.list_physical_devices("GPU"):
        raise RuntimeError("this build of TensorFlow sees no GPU; install tensorflow[and-cuda] in its place")
    return tf


def by_one_tape(derivative: str, tf: TensorFlow, fun: Function) -> Function:
    """A tape around the function, and its ``gradient``, or its ``jacobian``: reverse mode, vectorized."""

    def by_tape(x: Any, v: Any = None) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            value = fun(x)
        return getattr(tape, derivative)(value, x)

    return by_tape


gradient = functools.partial(by_one_tape, "gradient")
jacobian = functools.partial(by_one_tape, "jacobian")


def forward_over_reverse(tf: TensorFlow, fun: Function) -> Function:
    gradient_of = gradient(tf, fun)

    def product(x: Any, v: Any) -> Any:
        with tf.autodiff.ForwardAccumulator(x, v) as accumulator:
            found = gradient_of(x)
        return accumulator.jvp(found)

    return product


def reverse_over_reverse(tf: TensorFlow, fun: Function, *, many: bool = False) -> Function:
    """A tape around a tape, and a pass back over it for the direction, or for each of many."""
    gradient_of = gradient(tf, fun)

    def product(x: Any, v: Any) -> Any:
        with tf.GradientTape(persistent=many) as tape:
            tape.watch(x)
            found = gradient_of(x)
        if not many:
            return tape.gradient(found, x, output_gradients=v)
        return tf.stack([tape.gradient(found, x, output_gradients=v[i]) for i in range(PRODUCTS)])

    return product


WAYS: dict[str, dict[str, Way]] = {
    "gradient": {"GradientTape": gradient},
    "hvp": {
        "ForwardAccumulator over GradientTape": forward_over_reverse,
        "GradientTape over GradientTape": reverse_over_reverse,
    },
    "products": {"GradientTape, one tape": functools.partial(reverse_over_reverse, many=True)},
    "hessian": {"tape.jacobian of GradientTape": lambda tf, fun: jacobian(tf, gradient(tf, fun))},
    "jacobian": {"tape.jacobian": jacobian},
}
TENSORFLOW = Library(
    "tensorflow",
    load=lambda choice: library(choice.threads, choice.device),
    array=lambda tf, values, choice: tf.constant(values, choice.dtype),
    operations=operations.for_tensorflow,
    ways=WAYS,
    wait=lambda tf: tf.test.experimental.sync_devices(),
)
