"""``curvlinops``: the same operators on the same networks, in torch."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.cases import Contestant, Task
from benchmarks.models import Model
from benchmarks.peers import operations, torch_ways

Arrays = Mapping[str, np.ndarray]
KRONECKER = ("expand", "reduce", "ekfac")
NAMES = {
    "hessian": "HessianLinearOperator",
    "gauss-newton": "GGNLinearOperator",
    "fisher-empirical": "EFLinearOperator",
    "fisher-sampled": "FisherMCLinearOperator",
    "expand": "KFACLinearOperator",
    "reduce": "KFACLinearOperator",
    "ekfac": "EKFACLinearOperator",
}


def contestant(model: Model, dtype: str, what: str, num_samples: int = 1) -> Contestant:
    """A product with one operator, a key of ``NAMES``, whose factors, if it has any, are made beforehand.

    The logits of the model are a row for each example, or token; KFAC wants a layered model.
    """
    modular = what in KRONECKER

    def make() -> Task:
        torch = torch_ways.library(peers.num_cores())
        op = operator(model, dtype, what, num_samples)
        v = model.direction()
        leaves = leaves_for_module(model, v) if modular else list(v.values())
        vectors = [torch.as_tensor(leaf, dtype=getattr(torch, dtype)) for leaf in leaves]
        return lambda: op @ vectors

    def read(product: list[Any]) -> dict[str, np.ndarray]:
        leaves = [leaf.detach().numpy() for leaf in product]
        return leaves_of_module(model, leaves) if modular else dict(zip(model.shapes, leaves, strict=True))

    return Contestant(f"curvlinops, {NAMES[what]}", "curvlinops", make=make, read=read, only_cpu=True)


def operator(model: Model, dtype: str, what: str, num_samples: int) -> Any:
    import curvlinops
    import torch

    inputs, targets = model.batch
    labels = torch.as_tensor(targets.argmax(-1).reshape(-1))
    options: dict[str, Any] = {"check_deterministic": False}
    if what in KRONECKER:
        module = as_module(model, getattr(torch, dtype))
        inputs = inputs.transpose(0, 3, 1, 2).copy() if inputs.ndim == 4 else inputs
        options |= {"fisher_type": "type-2"} | ({} if what == "ekfac" else {"kfac_approx": what})
    else:
        module = as_formula(model, getattr(torch, dtype))
        options |= {"mc_samples": num_samples} if what == "fisher-sampled" else {}
    data = [(torch_ways.tensors(inputs, dtype), labels)]
    kind: Any = getattr(curvlinops, NAMES[what])
    return kind(module, torch.nn.CrossEntropyLoss(), list(module.parameters()), data, **options)


def as_formula(model: Model, dtype: Any) -> Any:
    """A module that evaluates the formula of the model, and gives the rows of its logits."""
    import torch

    ops, outputs = operations.for_torch(), model.outputs
    assert outputs is not None

    class Formula(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, leaf in model.params().items():
                self.register_parameter(name, torch.nn.Parameter(torch.as_tensor(leaf, dtype=dtype)))

        def forward(self, x: Any) -> Any:
            logits = outputs(ops, {name: getattr(self, name) for name in model.shapes}, x)
            return logits.reshape(-1, logits.shape[-1])

    return Formula()


def as_module(model: Model, dtype: Any) -> Any:
    """The network out of ``Linear``, ``Conv2d``, ``Tanh`` and ``AvgPool2d``, with its parameters."""
    import torch

    nn, parts = torch.nn, []
    for layer in model.layers:
        shape = model.shapes[layer.weight]
        if len(shape) == 4:
            parts.append(nn.Conv2d(shape[2], shape[3], 3, padding=1))
        else:
            parts += [nn.Flatten()] if _image(model, layer.weight)[0] else []
            parts.append(nn.Linear(*shape))
        parts += [nn.Tanh()] if layer.tanh else []
        parts += [nn.AvgPool2d(2)] if layer.pool else []
    module = nn.Sequential(*parts).to(dtype)
    for parameter, leaf in zip(module.parameters(), leaves_for_module(model, model.params()), strict=True):
        parameter.data = torch.as_tensor(leaf, dtype=dtype)
    return module


def leaves_for_module(model: Model, tree: Arrays) -> list[np.ndarray]:
    found = []
    for layer in model.layers:
        weight = tree[layer.weight]
        side, channels = _image(model, layer.weight)
        if side:  # flattened with the channels last here, first in torch
            weight = weight.reshape(side, side, channels, -1).transpose(2, 0, 1, 3).reshape(weight.shape)
        found += [weight.transpose(3, 2, 0, 1) if weight.ndim == 4 else weight.T, tree[layer.bias]]
    return [np.ascontiguousarray(leaf) for leaf in found]


def leaves_of_module(model: Model, leaves: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The reverse: where each entry is laid out is found by laying out their numbers."""
    numbers = {name: np.arange(math.prod(shape)).reshape(shape) for name, shape in model.shapes.items()}
    names = [name for layer in model.layers for name in (layer.weight, layer.bias)]
    found = {name: np.empty(model.shapes[name]) for name in names}
    for name, places, leaf in zip(names, leaves_for_module(model, numbers), leaves, strict=True):
        found[name].flat[places.ravel()] = leaf.ravel()
    return found


def _image(model: Model, name: str) -> tuple[int, int]:
    """Side and channels of the image that a linear layer flattens; zeros where it flattens none."""
    names = [layer.weight for layer in model.layers]
    before = model.shapes[names[names.index(name) - 1]] if names.index(name) else ()
    if len(before) != 4 or len(model.shapes[name]) != 2:
        return 0, 0
    return round((model.shapes[name][0] / before[3]) ** 0.5), before[3]
