"""A classifier of handwritten digits trained with differential privacy: clipped gradients, Gaussian noise, optax.

Run it with ``python -m examples.private_digits``. It needs scikit-learn and rich and takes about half a minute on two
cores.

Each step takes the gradients of all training images, cuts each to a norm of at most ``MAX_NORM``, adds Gaussian noise
to their sum and hands the mean to optax: Abadi et al. (arXiv:1607.00133, algorithm 1) with the whole training set as
the lot. Nothing is sampled, so that the guarantee needs no amplification by sampling and follows from Bun and
Steinke (arXiv:1605.02065).
"""

import functools
import math
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import curvature
from benchmarks import timing
from examples import costs

STEPS = 100
MAX_NORM = 1.0
NOISE_MULTIPLIERS = (8.0, 25.0)  # the noise on the sum of clipped gradients, in units of MAX_NORM
DELTA = 1e-5  # well below one over the number of images
OPTIMIZER = optax.adam(2e-2)

Params = dict[str, jax.Array]


class Data(NamedTuple):
    """Images with their labels."""

    images: jax.Array
    labels: jax.Array


# ---- the problem -------------------------------------------------------------------------------------------------


def load() -> tuple[Data, Data]:
    """The images that come with scikit-learn: 1,437 to train with and 360 to test with."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16  # 16 is known beforehand: it says nothing of anybody
    parts = train_test_split(images, labels, test_size=360, random_state=0, stratify=labels)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
    return Data(train_images, train_labels), Data(test_images, test_labels)


def start() -> Params:
    """Sixteen kernels of 3 x 3, and a linear layer on what is left after pooling."""
    a, b = jax.random.split(jax.random.key(0))
    return {
        "kernel": jax.random.normal(a, (3, 3, 1, 16)) / 3,
        "offset": jnp.zeros(16),
        "weights": jax.random.normal(b, (256, 10)) / 16,
        "bias": jnp.zeros(10),
    }


def logits(params: Params, image: jax.Array) -> jax.Array:
    """The score of each class for one image."""
    layout = ("NHWC", "HWIO", "NHWC")
    hidden = jax.lax.conv_general_dilated(image[None], params["kernel"], (1, 1), "SAME", dimension_numbers=layout)
    hidden = jnp.tanh(hidden + params["offset"]).reshape(4, 2, 4, 2, 16).mean((1, 3))
    return hidden.reshape(-1) @ params["weights"] + params["bias"]


def loss(params: Params, image: jax.Array, label: jax.Array) -> jax.Array:
    """The cross entropy of one image."""
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, image), label)


def accuracy(params: Params, data: Data) -> float:
    """The share of images that are read right."""
    scores = jax.vmap(logits, (None, 0))(params, data.images)
    return float(jnp.mean(jnp.argmax(scores, axis=1) == data.labels))


# ---- training ----------------------------------------------------------------------------------------------------


def mean_grad(params: Params, *data: jax.Array) -> Params:
    """The gradient that plain training takes."""
    return jax.grad(lambda params: jnp.mean(jax.vmap(loss, (None, 0, 0))(params, *data)))(params)


def private_grad(params: Params, key: jax.Array, noise_multiplier: jax.Array, *data: jax.Array) -> Params:
    """The mean of clipped gradients, with noise of ``noise_multiplier * MAX_NORM`` on their sum."""
    grad, _ = curvature.clipped_grad(loss, MAX_NORM)(params, *data)
    flat, unravel = ravel_pytree(grad)
    scale = noise_multiplier * MAX_NORM / len(data[0])  # of the mean: the number of images is public
    return unravel(flat + scale * jax.random.normal(key, flat.shape, flat.dtype))


@functools.partial(jax.jit, static_argnames="clip")
def step(
    params: Params, state: optax.OptState, key: jax.Array, noise_multiplier: jax.Array, data: Data, *, clip: bool
) -> tuple[Any, optax.OptState]:
    """A step of Adam on the private gradient, or on the plain one; Adam sees nothing else of the data."""
    grad = private_grad(params, key, noise_multiplier, *data) if clip else mean_grad(params, *data)
    updates, state = OPTIMIZER.update(grad, state)
    return optax.apply_updates(params, updates), state


def train(data: Data, noise_multiplier: float, *, steps: int, clip: bool) -> Params:
    """The parameters after so many steps."""
    params = start()
    state, noise = OPTIMIZER.init(params), jnp.asarray(noise_multiplier)
    for key in jax.random.split(jax.random.key(1), steps):
        params, state = step(params, state, key, noise, data, clip=clip)
    return params


def epsilon(steps: int, noise_multiplier: float, delta: float = DELTA) -> float:
    """The privacy loss of all steps together, by zero-concentrated differential privacy.

    Adding or removing one image moves the sum of clipped gradients by at most ``MAX_NORM``, so a step is
    ``1 / (2 noise_multiplier**2)``-zCDP; steps add up, also where each depends on those before; and rho-zCDP implies
    ``(rho + 2 sqrt(rho log(1 / delta)), delta)``-DP: Bun and Steinke (arXiv:1605.02065), propositions 1.6 and 1.3 and
    lemma 2.3.
    """
    rho = steps / (2 * noise_multiplier**2)
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


# ---- what is shown -----------------------------------------------------------------------------------------------


def show_routes(screen: Console, data: Data) -> None:
    """What becomes of each leaf."""
    screen.print("curvature.clipped_grad(loss, max_norm).report(params, images, labels)", style="bold")
    screen.print(f"{curvature.clipped_grad(loss, MAX_NORM).report(start(), *data)}\n", soft_wrap=True)


def clipped_by_hand(params: Params, *data: jax.Array) -> Params:
    """The mean of clipped gradients from the gradient of every image."""

    def clipped(image: jax.Array, label: jax.Array) -> Params:
        grad = jax.grad(loss)(params, image, label)
        shrink = jnp.minimum(1, MAX_NORM / optax.tree.norm(grad))
        return jax.tree.map(lambda leaf: shrink * leaf, grad)

    return jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0), jax.vmap(clipped)(*data))


def show_costs(screen: Console, data: Data) -> None:
    """Time the three gradients of a step against each other, and print the table."""
    args, plain, ours = (start(), *data), "plain gradient", "clipped_grad"
    rows = costs.compare(
        {
            plain: (mean_grad, args),
            ours: (curvature.clipped_grad(loss, MAX_NORM), args),
            "clipped, vmap(grad)": (clipped_by_hand, args),
        },
        budget=0.6,
        rounds=3,
    )
    caption = f"Clipping costs {rows[ours].seconds / rows[plain].seconds:.1f} plain gradients."
    screen.print(costs.table("The gradient of a step", rows.values(), rows[plain], caption))
    screen.print()


def show_training(screen: Console, train_data: Data, test_data: Data, steps: int) -> dict[str, float]:
    """Train without privacy, with clipping alone, and with noise; print and return the accuracies in testing."""
    runs = {"without privacy": (False, 0.0), "clipping, no noise": (True, 0.0)}
    runs |= {f"noise multiplier {noise:g}": (True, noise) for noise in NOISE_MULTIPLIERS}
    screen.print(f"{steps} steps of Adam on all {len(train_data.labels):,} images", style="bold")
    screen.print("                       training   testing   epsilon")
    found = {}
    for name, (clip, noise) in runs.items():
        params = train(train_data, noise, steps=steps, clip=clip)
        found[name] = accuracy(params, test_data)
        spent = f"{epsilon(steps, noise):7.2f}" if noise else "   none"
        screen.print(f"{name:22} {accuracy(params, train_data):8.1%}  {found[name]:8.1%}   {spent}")
    screen.print()
    return found


def show_guarantee(screen: Console, steps: int) -> None:
    """What is promised, by which argument, and what is not."""
    noise = NOISE_MULTIPLIERS[-1]
    screen.print("What is promised", style="bold")
    screen.print(
        f"The weights of a run are (epsilon, delta)-differentially private, delta = {DELTA:g}, between training sets "
        "that differ by one image added or removed; the number by which the sum is divided is public and stays. "
        f"Clipping bounds what an image adds to the sum by {MAX_NORM:g}. That makes {steps} steps rho-zCDP with rho = "
        f"{steps} / (2 multiplier^2), and epsilon = rho + 2 sqrt(rho log(1 / delta)): {epsilon(steps, noise):.2f} for "
        f"{noise:g}. Nothing is sampled and no amplification by sampling is claimed. A tighter accountant would find a "
        "smaller epsilon for the same noise. Against one image replaced by another the same epsilon takes twice the "
        "multiplier.\n"
    )
    screen.print("What is not", style="bold")
    screen.print(
        "Clipping alone promises nothing. The accuracies in training are printed without noise, steps, learning rate "
        "and clipping norm were chosen with these very images in sight, and all runs together spend more than each. "
        "The seed of the noise stands in this file, and the noise is rounded: for real secrets draw the seed from the "
        "system's entropy, keep it, and mind that the proof is about exact Gaussian noise.\n"
    )


def main(steps: int = STEPS) -> dict[str, float]:
    """Run it all; returns the accuracy in testing of each way to train."""
    screen, began = timing.console(), time.perf_counter()
    train_data, test_data = load()
    count = sum(leaf.size for leaf in jax.tree.leaves(start()))
    screen.print("Handwritten digits, learned with differential privacy", style="bold")
    screen.print(f"{len(train_data.labels):,} images of 8 x 8 pixels, {count:,} parameters, single precision.\n")
    show_routes(screen, train_data)
    show_costs(screen, train_data)
    found = show_training(screen, train_data, test_data, steps)
    show_guarantee(screen, steps)
    screen.print(f"Done in {time.perf_counter() - began:.0f} s.")
    return found


if __name__ == "__main__":
    main()
