"""``torch.func``: the Laplacian as the trace of the Hessian, or by one ``jvp`` of ``jvp`` for each direction."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.cases import Contestant, Task
from benchmarks.peers import torch_ways

Formula = Callable[..., Any]  # of a module of array operations, a point and parameters


def contestants(formula: Formula, points: np.ndarray, params: Mapping[str, np.ndarray]) -> list[Contestant]:
    """Both ways, over all points at once, in single precision."""

    def maker(way: Callable[[Callable[[Any], Any], Any], Any]) -> Callable[[], Task]:
        def make() -> Task:
            torch = torch_ways.library(peers.num_cores())
            x, p = torch.as_tensor(points), {name: torch.as_tensor(value) for name, value in params.items()}

            def run() -> Any:
                with torch.no_grad():  # what torch.func does inside is not affected
                    return torch.func.vmap(lambda x: way(lambda x: formula(torch, x, p), x))(x)

            return run

        return make

    return [
        Contestant("torch.func, trace of hessian", "torch", make=maker(by_trace), only_cpu=True),
        Contestant("torch.func, jvp of jvp", "torch", make=maker(by_directions), only_cpu=True),
    ]


def by_trace(function: Callable[[Any], Any], x: Any) -> Any:
    """The trace of the whole Hessian."""
    import torch

    return torch.trace(torch.func.hessian(function)(x))


def by_directions(function: Callable[[Any], Any], x: Any) -> Any:
    """The sum over directions of the second derivative along each."""
    import torch

    def along(v: Any) -> Any:
        return torch.func.jvp(lambda x: torch.func.jvp(function, (x,), (v,))[1], (x,), (v,))[1]

    return torch.func.vmap(along)(torch.eye(len(x), dtype=x.dtype)).sum()
