"""``curvlinops``: the same operators on the same networks, in torch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.cases import Contestant, Task
from benchmarks.networks import Network
from benchmarks.peers import jax_ways, operations, torch_ways

Arrays = Mapping[str, np.ndarray]
KRONECKER = ("expand", "reduce", "ekfac")


def contestant(network: Network, dtype: str, what: str, num_samples: int = 1) -> Contestant:
    """A product with one operator, whose factors, if it has any, are at hand.

    Args:
        network: one whose logits are a row for each example, or tokens; KFAC wants a layered one.
        dtype: of the parameters.
        what: ``"hessian"``, ``"gauss-newton"``, ``"fisher-empirical"``, ``"fisher-sampled"``, or one of ``KRONECKER``.
        num_samples: of the sampled Fisher matrix.
    """
    modular = what in KRONECKER

    def make() -> Task:
        torch = torch_ways.library(peers.num_cores())
        op = operator(network, dtype, what, num_samples)
        v = jax_ways.direction(network.model)
        leaves = leaves_for_module(network, v) if modular else list(v.values())
        vectors = [torch.as_tensor(leaf, dtype=getattr(torch, dtype)) for leaf in leaves]
        return lambda: op @ vectors

    def read(product: list[Any]) -> dict[str, np.ndarray]:
        leaves = [leaf.detach().numpy() for leaf in product]
        if modular:
            return leaves_of_module(network, leaves)
        return dict(zip(network.model.shapes, leaves, strict=True))

    return Contestant(f"curvlinops, {NAMES[what]}", "curvlinops", make=make, read=read, only_cpu=True)


NAMES = {
    "hessian": "HessianLinearOperator",
    "gauss-newton": "GGNLinearOperator",
    "fisher-empirical": "EFLinearOperator",
    "fisher-sampled": "FisherMCLinearOperator",
    "expand": "KFACLinearOperator",
    "reduce": "KFACLinearOperator",
    "ekfac": "EKFACLinearOperator",
}


def operator(network: Network, dtype: str, what: str, num_samples: int) -> Any:
    """The operator of the mean cross entropy over one batch."""
    import curvlinops
    import torch

    kind: Any = getattr(curvlinops, NAMES[what])
    model = network.model
    inputs, targets = model.batch
    labels = torch.as_tensor(targets.argmax(-1).reshape(-1))
    number = getattr(torch, dtype) if np.issubdtype(inputs.dtype, np.floating) else torch.int64
    options: dict[str, Any] = {"check_deterministic": False}
    if what in KRONECKER:
        module = as_module(network, getattr(torch, dtype))
        images = inputs.transpose(0, 3, 1, 2).copy() if inputs.ndim == 4 else inputs
        data = [(torch.as_tensor(images, dtype=number), labels)]
        options |= {"fisher_type": "type-2"} | ({} if what == "ekfac" else {"kfac_approx": what})
        return kind(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data, **options)
    if what == "fisher-sampled":
        options |= {"mc_samples": num_samples}
    module = as_formula(network, getattr(torch, dtype))
    data = [(torch.as_tensor(inputs, dtype=number), labels)]
    return kind(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data, **options)


def as_formula(network: Network, dtype: Any) -> Any:
    """A module that evaluates the formula of the network, and gives the rows of its logits."""
    import torch

    ops = operations.for_torch()

    class Formula(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, leaf in network.model.params().items():
                self.register_parameter(name, torch.nn.Parameter(torch.as_tensor(leaf, dtype=dtype)))

        def forward(self, x: Any) -> Any:
            logits = network.outputs(ops, {name: getattr(self, name) for name in network.model.shapes}, x)
            return logits.reshape(-1, logits.shape[-1])

    return Formula()


# ---- a layered network as a module, for KFAC -------------------------------------------------------------------------


def as_module(network: Network, dtype: Any) -> Any:
    """The network out of ``Linear``, ``Conv2d``, ``Tanh`` and ``AvgPool2d``, with its parameters."""
    import torch

    nn, shapes = torch.nn, network.model.shapes
    parts: list[Any] = []
    for number, layer in enumerate(network.layers):
        shape = shapes[layer.weight]
        if len(shape) == 4:
            parts.append(nn.Conv2d(shape[2], shape[3], 3, padding=1))
        else:
            parts += [nn.Flatten()] if number and len(shapes[network.layers[number - 1].weight]) == 4 else []
            parts.append(nn.Linear(*shape))
        parts += [nn.Tanh()] if layer.tanh else []
        parts += [nn.AvgPool2d(2)] if layer.pool else []
    module = nn.Sequential(*parts).to(dtype)
    leaves = leaves_for_module(network, network.model.params())
    for parameter, leaf in zip(module.parameters(), leaves, strict=True):
        parameter.data = torch.as_tensor(leaf, dtype=dtype)
    return module


def leaves_for_module(network: Network, tree: Arrays) -> list[np.ndarray]:
    """A tree like the parameters in the order and layout of the module."""
    found = []
    for layer in network.layers:
        weight = tree[layer.weight]
        side, channels = _image(network, layer.weight)
        if side:  # flattened with the channels last here, first in torch
            weight = weight.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(weight.shape)
        found += [weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T, tree[layer.bias]]
    return [np.ascontiguousarray(leaf) for leaf in found]


def leaves_of_module(network: Network, leaves: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The inverse of ``leaves_for_module``."""
    found: dict[str, np.ndarray] = {}
    for layer, weight, bias in zip(network.layers, leaves[::2], leaves[1::2], strict=True):
        weight = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        side, channels = _image(network, layer.weight)
        if side:
            weight = weight.reshape(channels, side, side, -1).transpose(1, 2, 0, 3).reshape(weight.shape)
        found |= {layer.weight: weight, layer.bias: bias}
    return found


def _image(network: Network, name: str) -> tuple[int, int]:
    """Side and channels of the image that a linear layer flattens; zeros where it flattens none."""
    names = [layer.weight for layer in network.layers]
    before = network.model.shapes[names[names.index(name) - 1]] if names.index(name) else ()
    if len(before) != 4 or len(network.model.shapes[name]) != 2:
        return 0, 0
    return round((network.model.shapes[name][0] / before[3]) ** 0.5), before[3]
