"""The few array operations that a model is written in, for each library, so that one formula serves them all."""

import types
from collections.abc import Callable
from typing import Any

from benchmarks import peers

Array = Any
Operations = types.SimpleNamespace  # with the attributes that ``for_jax`` fills
Step = Callable[..., Array]


def for_jax() -> Operations:
    import jax
    import jax.numpy as jnp

    def repeat(step: Step, count: int, x: Array, *constants: Array) -> Array:
        return jax.lax.scan(lambda x, _: (step(x, *constants), None), x, None, length=count)[0]

    def convolve(stride: int) -> Callable[[Array, Array], Array]:
        how: Any = {
            "window_strides": (stride, stride),
            "padding": "SAME",
            "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
        }
        return lambda images, kernel: jax.lax.conv_general_dilated(images, kernel, **how)

    def second_derivative(function: Callable[[Array], Array], x: Array) -> Array:
        ones = jnp.ones_like(x)
        return jax.jvp(lambda x: jax.jvp(function, (x,), (ones,))[1], (x,), (ones,))[1]

    return Operations(
        tanh=jnp.tanh, exp=jnp.exp, sin=jnp.sin, sqrt=jnp.sqrt, einsum=jnp.einsum, reshape=jnp.reshape, sum=jnp.sum,
        mean=jnp.mean, concat=jnp.concatenate, logsumexp=jax.nn.logsumexp, softmax=jax.nn.softmax,
        convolve=convolve(2), filter=convolve(1), gelu=jax.nn.gelu,
        constant=lambda array, like: jnp.asarray(array, like.dtype), repeat=repeat, second_derivative=second_derivative,
    )  # fmt: skip


def for_torch() -> Operations:
    import torch

    def convolve(images: Array, kernel: Array) -> Array:
        # XLA pads "SAME" with stride 2 after the image only, by one row and column of zeros.
        padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2), (0, 1, 0, 1))
        return torch.nn.functional.conv2d(padded, kernel.permute(3, 2, 0, 1), stride=2).permute(0, 2, 3, 1)

    def filter(images: Array, kernel: Array) -> Array:
        channels = images.permute(0, 3, 1, 2), kernel.permute(3, 2, 0, 1)
        return torch.nn.functional.conv2d(*channels, padding="same").permute(0, 2, 3, 1)

    def second_derivative(function: Callable[[Array], Array], x: Array) -> Array:
        ones = torch.ones_like(x)
        return torch.func.jvp(lambda x: torch.func.jvp(function, (x,), (ones,))[1], (x,), (ones,))[1]

    return Operations(
        tanh=torch.tanh, exp=torch.exp, sin=torch.sin, sqrt=torch.sqrt, einsum=torch.einsum, reshape=torch.reshape,
        sum=_over_axes(torch.sum), mean=_over_axes(torch.mean), concat=torch.cat,
        logsumexp=lambda x, axis: torch.logsumexp(x, dim=axis), softmax=lambda x, axis: torch.softmax(x, dim=axis),
        convolve=convolve, filter=filter, gelu=lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        constant=lambda array, like: torch.as_tensor(array, dtype=like.dtype),
        repeat=_repeat, second_derivative=second_derivative,
    )  # fmt: skip


def for_tensorflow() -> Operations:
    tf: Any = peers.tensorflow()

    return Operations(
        tanh=tf.tanh, exp=tf.exp, sin=tf.sin, sqrt=tf.sqrt, einsum=tf.einsum, reshape=tf.reshape,
        sum=tf.reduce_sum, mean=tf.reduce_mean, concat=tf.concat, logsumexp=tf.reduce_logsumexp,
        softmax=tf.nn.softmax, convolve=lambda images, kernel: tf.nn.conv2d(images, kernel, 2, "SAME"),
        filter=lambda images, kernel: tf.nn.conv2d(images, kernel, 1, "SAME"),
        gelu=lambda x: tf.nn.gelu(x, approximate=True),
        constant=lambda array, like: tf.constant(array, like.dtype), repeat=_repeat,
    )  # fmt: skip


def for_autograd() -> Operations:
    """Those of HIPS ``autograd``, which has no convolution of images."""
    import autograd.numpy as anp
    from autograd.scipy.special import logsumexp

    def softmax(x: Array, axis: int) -> Array:
        return anp.exp(x - logsumexp(x, axis=axis, keepdims=True))

    return Operations(
        tanh=anp.tanh, exp=anp.exp, sin=anp.sin, sqrt=anp.sqrt, einsum=anp.einsum, reshape=anp.reshape, sum=anp.sum,
        mean=anp.mean, concat=anp.concatenate, logsumexp=logsumexp, softmax=softmax, repeat=_repeat,
    )  # fmt: skip


def _over_axes(reduce: Callable[..., Array]) -> Callable[..., Array]:
    """A reduction that names its axis as NumPy does."""
    return lambda x, axis=None: reduce(x) if axis is None else reduce(x, dim=axis)


def _repeat(step: Step, count: int, x: Array, *constants: Array) -> Array:
    """A loop of the host, where the library traces none."""
    for _ in range(count):
        x = step(x, *constants)
    return x
