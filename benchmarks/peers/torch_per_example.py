"""``torch.func`` on the loss of one example: everything per example, from ``vmap`` over ``grad``."""

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.cases import Contestant, Task
from benchmarks.models import Model
from benchmarks.peers import operations, torch_ways


def tensors(model: Model, dtype: str) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """The parameters by name and the batch; integers stay what they are."""
    torch = torch_ways.library(peers.num_cores())
    params = {name: torch.as_tensor(value, dtype=getattr(torch, dtype)) for name, value in model.params().items()}
    batch = tuple(
        torch.as_tensor(a, dtype=getattr(torch, dtype) if np.issubdtype(a.dtype, np.floating) else torch.int64)
        for a in model.batch
    )
    return params, batch


def contestant(name: str, model: Model, dtype: str, what: str, max_norm: float = 1.0) -> Contestant:
    """``what`` of every example by ``torch.func``, a key of the functions below."""

    def make() -> Task:
        import torch

        params, batch = tensors(model, dtype)
        call = functions(model, max_norm)[what]

        def run() -> Any:
            with torch.no_grad():  # what torch.func does inside is not affected
                return call(params, *batch)

        return run

    return Contestant(name, "torch", make=make, only_cpu=True)


def functions(model: Model, max_norm: float) -> dict[str, Callable[..., Any]]:
    """By what they give, functions of parameters and a batch."""
    import torch

    ops = operations.for_torch()

    def loss(p: Any, *example: Any) -> Any:
        return model.loss(ops, p, *(a[None] for a in example))

    def each(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.func.vmap(function, (None,) + (0,) * len(model.batch))

    gradients = each(torch.func.grad(loss))

    def norms(p: Any, *batch: Any) -> Any:
        return norms_of(gradients(p, *batch))

    def norms_of(formed: dict[str, Any]) -> Any:
        return torch.sqrt(sum((leaf.flatten(1) ** 2).sum(1) for leaf in formed.values()))

    def clipped(p: Any, *batch: Any) -> Any:
        formed = gradients(p, *batch)
        found = norms_of(formed)
        weights = torch.clamp(max_norm / found, max=1.0) / len(found)
        return {name: torch.tensordot(weights, leaf, 1) for name, leaf in formed.items()}, found

    def moments(p: Any, *batch: Any) -> Any:
        formed = gradients(p, *batch)
        mean = {name: leaf.mean(0) for name, leaf in formed.items()}
        second = {name: (leaf**2).mean(0) for name, leaf in formed.items()}
        return mean, second, {name: second[name] - mean[name] ** 2 for name in mean}

    hessians = each(torch.func.hessian(loss))
    return {
        "norms": norms, "clipped mean": clipped, "moments": moments, "gradients": gradients, "Hessians": hessians,
    }  # fmt: skip
