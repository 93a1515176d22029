"""PyTorch: ``torch.func``, ``torch.autograd.functional``, and what ``torch.compile`` makes of them, as contestants."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.cases import Choice, Contestant, Task
from benchmarks.models import Model
from benchmarks.peers import operations
from benchmarks.peers.flat import PRODUCTS, Flat

Torch = Any  # the module, which is imported when a contestant starts
Function = Callable[..., Any]
Way = Callable[[Torch, Function], Function]  # from ``fun(x)`` to a function of ``x`` and ``v``


def contestants(flat: Flat, derivative: str, choice: Choice, *, compiled: bool = True) -> Iterator[Contestant]:
    """Each way to a derivative, a key of ``WAYS``; ``compiled`` adds ``torch.compile``, which takes long to start."""
    pieces = PRODUCTS if derivative == "products" else 1
    for name, way in WAYS[derivative].items():
        yield Contestant(name, "torch", make=functools.partial(start, flat, way, choice), read=read, pieces=pieces)
    if compiled and derivative in COMPILED:
        name = COMPILED[derivative]
        make = functools.partial(start, flat, WAYS[derivative][name], choice, compiled=True)
        yield Contestant(f"torch.compile({name})", "torch", make=make, read=read, pieces=pieces)


def start(flat: Flat, way: Way, choice: Choice, *, compiled: bool = False) -> Task:
    """The call to be timed; compilation happens at its first call."""
    torch = library(choice.threads)
    device = "cuda" if choice.device == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this build of torch has no CUDA; install another in place of that of make peers")
    numbers = (flat.x, flat.v, *flat.data)
    x, v, *data = (torch.tensor(array, dtype=getattr(torch, choice.dtype), device=device) for array in numbers)
    function = flat.function(operations.for_torch(), "torch")
    derivative = way(torch, lambda x: function(x, *data))
    if compiled:
        torch.compiler.reset()  # so that no earlier case counts against the limit of recompilations
        derivative = torch.compile(derivative)

    def call() -> Any:
        answer = derivative(x, v)
        if device == "cuda":
            torch.cuda.synchronize()
        return answer

    return call


@functools.cache
def library(threads: int) -> Torch:
    """The module, with its number of threads set, and without compiled code of earlier runs."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", module=r"torch\.")  # of its own parts, to each other
    return torch


def read(answer: Any) -> np.ndarray:
    return answer.detach().cpu().numpy()


def backward(torch: Torch, fun: Function) -> Function:
    def gradient(x: Any, v: Any) -> Any:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(fun(x), x)[0]

    return gradient


def one_graph(torch: Torch, fun: Function) -> Function:
    """One graph of the gradient, and a pass back through it for each direction."""

    def products(x: Any, vs: Any) -> Any:
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(fun(x), x, create_graph=True)
        return torch.stack([torch.autograd.grad(gradient, x, v, retain_graph=True)[0] for v in vs])

    return products


def linearized(torch: Torch, fun: Function) -> Function:
    """One linearization of the gradient, and a call of it for each direction."""

    def products(x: Any, vs: Any) -> Any:
        _, push = torch.func.linearize(torch.func.grad(fun), x)
        return torch.stack([push(v) for v in vs])

    return products


def forward_over_reverse(torch: Torch, fun: Function) -> Function:
    return lambda x, v: torch.func.jvp(torch.func.grad(fun), (x,), (v,))[1]


def in_a_loop(torch: Torch, fun: Function) -> Function:
    product = forward_over_reverse(torch, fun)
    return lambda x, vs: torch.stack([product(x, v) for v in vs])


def func(name: str) -> Way:
    """A transformation of ``torch.func``, or two of them, one of the other."""

    def way(torch: Torch, fun: Function) -> Function:
        for part in name.split():
            fun = getattr(torch.func, part)(fun)
        return lambda x, v: fun(x)

    return way


def functional(name: str, **options: Any) -> Way:
    """A function of ``torch.autograd.functional`` with its options; a product takes the direction too."""

    def way(torch: Torch, fun: Function) -> Function:
        function = getattr(torch.autograd.functional, name)
        if name in ("hvp", "vhp"):
            return lambda x, v: function(fun, x, v)[1]
        return lambda x, v: function(fun, x, **options)

    return way


WAYS: dict[str, dict[str, Way]] = {
    "gradient": {
        "torch.autograd.grad": backward,
        "torch.func.grad": func("grad"),
        "torch.func.jacfwd": func("jacfwd"),
    },
    "hvp": {
        "torch.func, forward over reverse": forward_over_reverse,
        "torch.func, reverse over reverse": lambda torch, fun: (
            lambda x, v: torch.func.vjp(torch.func.grad(fun), x)[1](v)[0]
        ),
        "torch.autograd.functional.hvp": functional("hvp"),
        "torch.autograd.functional.vhp": functional("vhp"),
    },
    "products": {
        "torch.func.linearize": linearized,
        "torch.autograd.grad, one graph": one_graph,
        "torch.func, forward over reverse": in_a_loop,
    },
    "hessian": {
        "torch.func.hessian": func("hessian"),
        "torch.func, reverse over reverse": func("jacrev jacrev"),
        "torch.autograd.functional.hessian": functional("hessian"),
        "torch.autograd.functional.hessian, vectorized": functional("hessian", vectorize=True),
    },
    "jacobian": {
        "torch.func.jacfwd": func("jacfwd"),
        "torch.func.jacrev": func("jacrev"),
        "torch.autograd.functional.jacobian": functional("jacobian"),
        "torch.autograd.functional.jacobian, vectorized": functional("jacobian", vectorize=True),
    },
}

# Derivative -> the way that ``torch.compile`` compiles as well.
COMPILED = {
    "gradient": "torch.func.grad",
    "hvp": "torch.func, forward over reverse",
    "hessian": "torch.func.hessian",
}


def tensors(tree: Any, dtype: str) -> Any:
    """A dictionary or tuple of arrays; integers stay what they are."""
    torch = library(peers.num_cores())
    if isinstance(tree, Mapping):
        return {name: tensors(value, dtype) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(tensors(value, dtype) for value in tree)
    return torch.as_tensor(tree, dtype=getattr(torch, dtype) if np.issubdtype(tree.dtype, np.floating) else torch.int64)


def without_graph(call: Callable[[], Any]) -> Task:
    """What ``torch.func`` does inside is not affected."""
    import torch

    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def per_example(name: str, model: Model, dtype: str, what: str, max_norm: float = 1.0) -> Contestant:
    """``what`` of every example, a key of what ``per_example_functions`` returns."""

    def make() -> Task:
        params, batch = tensors(model.params(), dtype), tensors(model.batch, dtype)
        function = per_example_functions(model, max_norm)[what]
        return without_graph(lambda: function(params, *batch))

    return Contestant(name, "torch", make=make, only_cpu=True)


def per_example_functions(model: Model, max_norm: float) -> dict[str, Function]:
    import torch

    ops = operations.for_torch()

    def loss(p: Any, *example: Any) -> Any:
        return model.loss(ops, p, *(a[None] for a in example))

    def each(function: Function) -> Function:
        return torch.func.vmap(function, (None,) + (0,) * len(model.batch))

    gradients = each(torch.func.grad(loss))

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

    return {
        "norms": lambda p, *batch: norms_of(gradients(p, *batch)), "clipped mean": clipped, "moments": moments,
        "gradients": gradients, "Hessians": each(torch.func.hessian(loss)),
    }  # fmt: skip


def laplacians(formula: Callable[..., Any], points: np.ndarray, params: Mapping[str, np.ndarray]) -> list[Contestant]:
    """The trace of the Hessian, and one ``jvp`` of ``jvp`` for each direction, over all points at once.

    ``formula`` is a function of a module of array operations, a point and parameters.
    """

    def by_trace(torch: Torch, function: Function, x: Any) -> Any:
        return torch.trace(torch.func.hessian(function)(x))

    def by_directions(torch: Torch, function: Function, x: Any) -> Any:
        def along(v: Any) -> Any:
            return torch.func.jvp(lambda x: torch.func.jvp(function, (x,), (v,))[1], (x,), (v,))[1]

        return torch.func.vmap(along)(torch.eye(len(x), dtype=x.dtype)).sum()

    def make(way: Function) -> Task:
        torch = library(peers.num_cores())
        x, p = torch.as_tensor(points), {name: torch.as_tensor(value) for name, value in params.items()}
        return without_graph(lambda: torch.func.vmap(lambda x: way(torch, lambda x: formula(torch, x, p), x))(x))

    ways = {"torch.func, trace of hessian": by_trace, "torch.func, jvp of jvp": by_directions}
    return [Contestant(n, "torch", make=functools.partial(make, way), only_cpu=True) for n, way in ways.items()]
