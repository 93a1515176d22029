"""Per-example gradients: their norms, their clipped mean, their moments: ``python -m benchmarks.per_example``.

A perceptron, a convolutional net and a transformer block, single precision. Each function is held against the same
thing made from ``jax.vmap(jax.grad(loss))``, which forms the gradient of every example, and against one gradient of the
mean loss, which is what plain training pays.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

import curvature
from benchmarks.hessian import num_parameters
from benchmarks.timing import Contestant, Row, compare, console, table

GRADIENT = "gradient"
PERCEPTRON, CONVOLUTIONAL, TRANSFORMER = "perceptron", "convolutional net", "transformer block"
NAMES = ("norms", "clipped mean", "moments")

TOLERANCE = 1e-4  # of the largest entry of each array that the functions return
WANTED_NORMS = 1.3  # gradients, on the perceptron
WANTED_CLIPPED = 3  # gradients, on the perceptron
WANTED_MEMORY = 1 / 3  # of the temporaries of vmap(grad), on the other two

cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels


class Problem(NamedTuple):
    """A loss of one example, its parameters and a batch."""

    loss: Callable[..., jax.Array]
    params: dict[str, jax.Array]
    batch: tuple[jax.Array, ...]


def normals(**shapes: tuple[int, ...]) -> dict[str, jax.Array]:
    """Random arrays, scaled by the square root of what they sum over: all axes but the last."""
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {
        name: jax.random.normal(key, shape) / np.sqrt(np.prod(shape[:-1]))
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


# ---- the networks ----------------------------------------------------------------------------------------------------


def perceptron() -> Problem:
    """784-256-10, batch 256."""

    def loss(p: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(jnp.tanh(image @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"], label)

    params = normals(w1=(784, 256), w2=(256, 10)) | {"b1": jnp.zeros(256), "b2": jnp.zeros(10)}
    return Problem(loss, params, (jax.random.normal(jax.random.key(1), (256, 784)), jnp.arange(256) % 10))


def convolutional() -> Problem:
    """Two convolutions of 3 x 3 with pooling and a linear layer, 128 images of 28 x 28."""

    def convolve(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        hidden = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=layout) + bias
        window = (1, 2, 2, 1)
        return jax.lax.reduce_window(jax.nn.relu(hidden), 0.0, jax.lax.add, window, window, "VALID") / 4

    def loss(p: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        hidden = convolve(convolve(image[None], p["k1"], p["b1"]), p["k2"], p["b2"])
        return cross_entropy(hidden.reshape(-1) @ p["w"] + p["b"], label)

    params = normals(k1=(3, 3, 1, 16), k2=(3, 3, 16, 32), w=(7 * 7 * 32, 10))
    params |= {"b1": jnp.zeros(16), "b2": jnp.zeros(32), "b": jnp.zeros(10)}
    return Problem(loss, params, (jax.random.normal(jax.random.key(1), (128, 28, 28, 1)), jnp.arange(128) % 10))


def transformer() -> Problem:
    """An embedding, one block of attention and a feed-forward network, and a head: 64 tokens, width 128, batch 64."""
    tokens, width, heads, words = 64, 128, 4, 256

    def normalize(x: jax.Array, scale: jax.Array) -> jax.Array:
        centered = x - x.mean(-1, keepdims=True)
        return centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5) * scale

    def loss(p: Any, text: jax.Array) -> jax.Array:
        x = p["words"][text] + p["positions"]
        y = normalize(x, p["scale1"])
        q, k, v = ((y @ p[name]).reshape(tokens, heads, -1) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("shd,thd->hst", q, k) / np.sqrt(width // heads))
        x = x + jnp.einsum("hst,thd->shd", weights, v).reshape(tokens, width) @ p["o"]
        x = x + jax.nn.gelu(normalize(x, p["scale2"]) @ p["up"] + p["bias1"]) @ p["down"] + p["bias2"]
        return jnp.mean(cross_entropy(x[:-1] @ p["head"], text[1:]))

    square = (width, width)
    params = normals(words=(words, width), positions=(tokens, width), q=square, k=square, v=square, o=square)
    params |= normals(up=(width, 4 * width), down=(4 * width, width), head=(width, words))
    params |= {"scale1": jnp.ones(width), "scale2": jnp.ones(width)}
    params |= {"bias1": jnp.zeros(4 * width), "bias2": jnp.zeros(width)}
    return Problem(loss, params, (jax.random.randint(jax.random.key(1), (64, tokens), 0, words),))


PROBLEMS = {PERCEPTRON: perceptron, CONVOLUTIONAL: convolutional, TRANSFORMER: transformer}


# ---- from the gradient of every example, and without -----------------------------------------------------------------


def by_hand(loss: Callable[..., jax.Array], max_norm: float) -> dict[str, Callable[..., Any]]:
    """The three functions, each from ``jax.vmap(jax.grad(loss))``."""

    def gradients(params: Any, *batch: Any) -> Any:
        return jax.vmap(jax.grad(loss), (None,) + (0,) * len(batch))(params, *batch)

    def norms_of(gradients: Any) -> jax.Array:
        return jnp.sqrt(sum(jnp.sum(leaf**2, axis=range(1, leaf.ndim)) for leaf in jax.tree.leaves(gradients)))

    def clipped(params: Any, *batch: Any) -> Any:
        formed = gradients(params, *batch)
        norms = norms_of(formed)
        weights = jnp.minimum(1, max_norm / norms) / len(norms)
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), formed), norms

    def moments(params: Any, *batch: Any) -> Any:
        formed = gradients(params, *batch)
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), formed)
        second = jax.tree.map(lambda leaf: jnp.mean(leaf**2, 0), formed)
        return mean, second, jax.tree.map(lambda first, second: second - first**2, mean, second)

    return dict(zip(NAMES, (lambda params, *batch: norms_of(gradients(params, *batch)), clipped, moments), strict=True))


def by_taps(loss: Callable[..., jax.Array], max_norm: float) -> dict[str, Callable[..., Any]]:
    """The three functions of ``curvature``."""
    functions = (
        curvature.per_example_grad_norm(loss),
        curvature.clipped_grad(loss, max_norm),
        curvature.per_example_grad_moments(loss),
    )
    return dict(zip(NAMES, functions, strict=True))


def check_agreement(found: Any, expected: Any, name: str) -> float:
    """The largest error of any array relative to its largest entry; raises beyond ``TOLERANCE``."""
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    error = max(float(jnp.max(jnp.abs(ours - theirs)) / jnp.max(jnp.abs(theirs))) for ours, theirs in pairs)
    if not error <= TOLERANCE:
        raise AssertionError(f"{name} differ from vmap(grad) by {error:.1e}, more than {TOLERANCE:.0e}")
    return error


def bench(screen: Console, name: str, problem: Problem) -> dict[str, Row]:
    """Check and time one network, and print the table."""
    loss, params, batch = problem
    args = (params, *batch)
    title = f"Per-example gradients, {name}, {num_parameters(params):,} parameters, {len(batch[0])} examples"

    def mean(params: Any, *batch: Any) -> jax.Array:
        return jnp.mean(jax.vmap(loss, (None,) + (0,) * len(batch))(params, *batch))

    with screen.status(f"{title}: checking") as status:
        max_norm = float(jnp.median(jax.jit(curvature.per_example_grad_norm(loss))(*args)))  # clips one half
        hand, ours = by_hand(loss, max_norm), by_taps(loss, max_norm)
        error = max(check_agreement(jax.jit(ours[name])(*args), jax.jit(hand[name])(*args), name) for name in NAMES)
        contestants: dict[str, Contestant] = {GRADIENT: (jax.grad(mean), args)}
        for what in NAMES:
            contestants |= {f"{what}, vmap(grad)": (hand[what], args), what: (ours[what], args)}
        rows = compare(contestants, budget=0.6, rounds=3, report=lambda line: status.update(f"{title}: {line}"))
    screen.print(table(title, rows.values(), rows[GRADIENT], f"All agree with vmap(grad) to {error:.0e}."))
    screen.print()
    return rows


def verdicts(results: dict[str, dict[str, Row]]) -> list[str]:
    """Each claim, with what was measured of it."""
    claims = []
    gradient = results[PERCEPTRON][GRADIENT].seconds
    for what, wanted in (("norms", WANTED_NORMS), ("clipped mean", WANTED_CLIPPED)):
        ratio = results[PERCEPTRON][what].seconds / gradient
        claims.append((ratio <= wanted, f"{PERCEPTRON}: {what} in {ratio:.2f} gradients (wanted: at most {wanted})"))
    for name in (CONVOLUTIONAL, TRANSFORMER):
        ours, theirs = results[name]["norms"], results[name]["norms, vmap(grad)"]
        speedup = theirs.seconds / ours.seconds
        claims.append((speedup >= 1, f"{name}: norms {speedup:.1f} times as fast as vmap(grad) (wanted: at least 1)"))
        mebibytes, limit = ((row.temporary_bytes or 0) / 2**20 for row in (ours, theirs))
        claim = f"{name}: norms take {mebibytes:.0f} MiB of temporaries, vmap(grad) {limit:.0f}"
        claims.append((mebibytes <= WANTED_MEMORY * limit, f"{claim} (wanted: at most a third)"))
    return [f"{'holds' if holds else 'FAILS'}  {claim}" for holds, claim in claims]


def main() -> None:
    """Run it all."""
    screen = console()
    screen.print(f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; float32; medians.\n")
    results = {name: bench(screen, name, make()) for name, make in PROBLEMS.items()}
    screen.print("The claims, as measured in this run (other work on the machine moves them):")
    for line in verdicts(results):
        screen.print(line, soft_wrap=True)


if __name__ == "__main__":
    main()
