"""PyTorch: ``torch.func``, ``torch.autograd.functional``, and what ``torch.compile`` makes of them, as contestants."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.cases import Choice, Contestant, Task
from benchmarks.peers import operations
from benchmarks.peers.flat import Flat, Function, Library, Way

Torch = Any  # the module, which is imported when a contestant starts


def contestants(flat: Flat, derivative: str, choice: Choice, *, compiled: bool = True) -> Iterator[Contestant]:
    """Each way to a derivative, a key of ``WAYS``; ``compiled`` adds ``torch.compile``, which takes long to start."""
    yield from TORCH.contestants(flat, derivative, choice)
    if compiled and (name := COMPILED.get(derivative)):
        yield TORCH.contestant(f"torch.compile({name})", flat, WAYS[derivative][name], choice, compile)


def compile(torch: Torch, function: Function) -> Function:
    torch.compiler.reset()  # so that no earlier case counts against the limit of recompilations
    return torch.compile(function)


@functools.cache
def library(threads: int, device: str = "cpu") -> Torch:
    """The module, with its number of threads set, and without compiled code of earlier runs."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", module=r"torch\.")  # of its own parts, to each other
    if device == "gpu" and not torch.cuda.is_available():
        raise RuntimeError("this build of torch has no CUDA; install another in place of that of make peers")
    return torch


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


def reverse_over_reverse(torch: Torch, fun: Function) -> Function:
    return lambda x, v: torch.func.vjp(torch.func.grad(fun), x)[1](v)[0]


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
        "torch.func, reverse over reverse": reverse_over_reverse,
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
TORCH = Library(
    "torch",
    load=lambda choice: library(choice.threads, choice.device),
    array=lambda torch, values, choice: torch.tensor(
        values, dtype=getattr(torch, choice.dtype), device="cuda" if choice.device == "gpu" else "cpu"
    ),
    operations=operations.for_torch,
    ways=WAYS,
    read=lambda answer: answer.detach().cpu().numpy(),
    wait=lambda torch: torch.cuda.synchronize(),
)


def tensors(tree: Any, dtype: str) -> Any:
    """A dictionary or tuple of arrays; integers stay what they are."""
    torch = library(peers.num_cores())
    if isinstance(tree, Mapping):
        return {name: tensors(value, dtype) for name, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(tensors(value, dtype) for value in tree)
    return torch.as_tensor(tree, dtype=getattr(torch, dtype) if np.issubdtype(tree.dtype, np.floating) else torch.int64)


def without_graph(name: str, build: Callable[[Torch], Function], dtype: str, *args: Any) -> Contestant:
    """``build(torch)`` of trees of arrays; what ``torch.func`` does inside is not affected by the missing graph."""

    def make() -> Task:
        torch = library(peers.num_cores())
        function, found = build(torch), tensors(args, dtype)

        def run() -> Any:
            with torch.no_grad():
                return function(*found)

        return run

    return Contestant(name, "torch", make=make, only_cpu=True)
