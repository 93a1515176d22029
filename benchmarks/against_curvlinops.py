"""The same products as curvlinops on the same networks: ``python -m benchmarks.against_curvlinops``.

A perceptron and a small convolutional net with the same weights, single precision. Correctness only: nothing is timed.
Without torch and curvlinops (``pip install torch curvlinops-for-pytorch``) it says that they are absent.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvature

try:
    import curvlinops
    import torch
except ModuleNotFoundError as error:
    absent = error.name
else:
    absent = None

TOLERANCE = 1e-5  # of the largest entry of a product
BATCH, CLASSES = 7, 3

Arrays = list[np.ndarray]


class Network(NamedTuple):
    """One network in both frameworks, its parameters in the layout of torch, and its inputs."""

    model: Callable[..., jax.Array]
    in_torch: Callable[[], Any]
    shapes: list[tuple[int, ...]]
    inputs: np.ndarray


def perceptron(params: list[jax.Array], x: jax.Array, _: jax.Array) -> jax.Array:
    """6-5-4-3, tanh."""
    (w1, b1), (w2, b2), (w3, b3) = zip(params[::2], params[1::2], strict=True)
    return jnp.tanh(jnp.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3


def convolutional(params: list[jax.Array], image: jax.Array, _: jax.Array) -> jax.Array:
    """Two convolutions and a dense layer."""
    first, first_bias, second, second_bias, w, b = params
    numbers = ("NCHW", "OIHW", "NCHW")
    hidden = jax.lax.conv_general_dilated(image, first, (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
    hidden = jnp.tanh(hidden + first_bias[None, :, None, None])
    hidden = jax.lax.conv_general_dilated(hidden, second, (1, 1), "VALID", dimension_numbers=numbers)
    hidden = jnp.tanh(hidden + second_bias[None, :, None, None])
    return hidden.reshape(len(hidden), -1) @ w.T + b


def networks(rng: np.random.Generator) -> dict[str, Network]:
    """The networks by name."""

    def torch_perceptron() -> Any:
        nn = torch.nn
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, CLASSES))

    def torch_convolutional() -> Any:
        nn = torch.nn
        convolutions = nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 2), nn.Tanh()
        return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(24, CLASSES))

    dense = [(5, 6), (5,), (4, 5), (4,), (CLASSES, 4), (CLASSES,)]
    kernels = [(3, 2, 3, 3), (3,), (4, 3, 2, 2), (4,), (CLASSES, 24), (CLASSES,)]
    return {
        "perceptron": Network(perceptron, torch_perceptron, dense, rng.normal(size=(BATCH, 6))),
        "convolutional net": Network(convolutional, torch_convolutional, kernels, rng.normal(size=(BATCH, 2, 6, 8))),
    }


def cross_entropy(outputs: jax.Array, _: jax.Array, labels: jax.Array) -> jax.Array:
    """The mean over examples."""
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(outputs, labels))


def products(network: Network, rng: np.random.Generator) -> Iterator[tuple[str, Arrays, Arrays]]:
    """For each operator its name, our product and theirs with one random vector."""
    params, v = ([rng.normal(size=shape).astype(np.float32) / 2 for shape in network.shapes] for _ in range(2))
    inputs, labels = network.inputs.astype(np.float32), rng.integers(0, CLASSES, BATCH)
    module = network.in_torch()
    for parameter, value in zip(module.parameters(), params, strict=True):
        parameter.data = torch.from_numpy(value)
    data = [(torch.from_numpy(inputs), torch.from_numpy(labels))]
    theirs = module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data
    ours = (
        network.model,
        cross_entropy,
        [jnp.asarray(leaf) for leaf in params],
        jnp.asarray(inputs),
        jnp.asarray(labels),
    )

    def of_batch(params: list[jax.Array], inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return cross_entropy(network.model(params, inputs, labels), inputs, labels)

    pairs = {
        "Hessian": (curvature.HessianOperator(of_batch, *ours[2:]), curvlinops.HessianLinearOperator(*theirs)),
        "Gauss-Newton": (curvature.GaussNewtonOperator(*ours), curvlinops.GGNLinearOperator(*theirs)),
        "Fisher, exact": (
            curvature.FisherOperator(*ours, likelihood="categorical"),
            curvlinops.GGNLinearOperator(*theirs),
        ),
        "Fisher, empirical": (
            curvature.FisherOperator(*ours, kind="empirical"),
            curvlinops.EFLinearOperator(*theirs),
        ),
    }
    for name, (op, other) in pairs.items():
        yield name, *_apply(op, other, v)
    for sharing in ("expand", "reduce"):
        op = curvature.KroneckerOperator(*ours, sharing=sharing)
        other = curvlinops.KFACLinearOperator(*theirs, fisher_type="type-2", kfac_approx=sharing)
        yield f"KFAC, {sharing}", *_apply(op, other, v)
    op = curvature.KroneckerOperator(*ours, approximation="ekfac")
    other = curvlinops.EKFACLinearOperator(*theirs, fisher_type="type-2")
    yield "EKFAC, expand", *_apply(op, other, v)


def _apply(ours: Any, theirs: Any, v: Arrays) -> tuple[Arrays, Arrays]:
    got = ours @ [jnp.asarray(leaf) for leaf in v]
    want = theirs @ [torch.from_numpy(leaf) for leaf in v]
    return [np.asarray(leaf) for leaf in got], [leaf.detach().numpy() for leaf in want]


def main() -> None:
    """One line for each network and operator."""
    if absent is not None:
        print(f"Operators against curvlinops: not compared, for {absent} is absent.")
        return
    rng = np.random.default_rng(0)
    for name, network in networks(rng).items():
        for operator, got, want in products(network, rng):
            size = max(np.abs(leaf).max() for leaf in want)
            error = max(np.abs(a - b).max() for a, b in zip(got, want, strict=True)) / size
            claim = f"{name}: {operator} agrees with curvlinops to {error:.1e} (wanted: {TOLERANCE:.0e})"
            print(f"{'holds' if error <= TOLERANCE else 'FAILS'}  {claim}")


if __name__ == "__main__":
    main()
