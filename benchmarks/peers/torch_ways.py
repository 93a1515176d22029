"""PyTorch: ``torch.func``, ``torch.autograd.functional``, and what ``torch.compile`` makes of them, as contestants."""

import functools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.cases import Choice, Contestant, Task
from benchmarks.peers import operations
from benchmarks.peers.flat import PRODUCTS, Flat

Torch = Any  # the module, which is imported when a contestant starts
Function = Callable[..., Any]
ModeCost = Callable[[Torch, Function], Function]  # from ``fun(x)`` to a function of ``x`` and ``v``


def contestants(flat: Flat, derivative: str, choice: Choice, *, compiled: bool = True) -> Iterator[Contestant]:
    """Each way to a derivative.

    Args:
        flat: what is differentiated.
        derivative: a key of ``WAYS``.
        choice: what the command line asked for.
        compiled: whether ``torch.compile``, which takes many seconds to start, is among them.
    """
    pieces = PRODUCTS if derivative == "products" else 1
    for name, way in WAYS[derivative].items():
        yield Contestant(name, "torch", make=functools.partial(start, flat, way, choice), read=read, pieces=pieces)
    if compiled and derivative in COMPILED:
        name = COMPILED[derivative]
        make = functools.partial(start, flat, WAYS[derivative][name], choice, compiled=True)
        yield Contestant(f"torch.compile({name})", "torch", make=make, read=read, pieces=pieces)


def start(flat: Flat, way: ModeCost, choice: Choice, *, compiled: bool = False) -> Task:
    """The call to be timed; compilation happens at its first call."""
    torch = library(choice.threads)
    device = "cuda" if choice.device == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("this build of torch has no CUDA; install another in place of that of make peers")

    def tensor(array: np.ndarray) -> Any:
        return torch.tensor(array, dtype=getattr(torch, choice.dtype), device=device)

    function, data = flat.function(operations.for_torch(), "torch"), tuple(map(tensor, flat.data))
    derivative = way(torch, lambda x: function(x, *data))
    if compiled:
        torch.compiler.reset()  # so that no earlier case counts against the limit of recompilations
        derivative = torch.compile(derivative)
    x, v = tensor(flat.x), tensor(flat.v)

    def call() -> Any:
        answer = derivative(x, v)
        if device == "cuda":
            torch.cuda.synchronize()
        return answer

    return call


@functools.cache
def library(threads: int) -> Torch:
    """The module, told how many cores it may use, and to compile anew whatever it has compiled in earlier runs."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore", module=r"torch\.")  # of its own parts, to each other
    return torch


def read(answer: Any) -> np.ndarray:
    """An answer as an array."""
    return answer.detach().cpu().numpy()


# ---- the ways --------------------------------------------------------------------------------------------------------


def backward(torch: Torch, fun: Function) -> Function:
    """The gradient as every training loop takes it."""

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
    """The derivative of the gradient along ``v``."""
    return lambda x, v: torch.func.jvp(torch.func.grad(fun), (x,), (v,))[1]


def reverse_over_reverse(torch: Torch, fun: Function) -> Function:
    """The gradient pulled back."""
    return lambda x, v: torch.func.vjp(torch.func.grad(fun), x)[1](v)[0]


def in_a_loop(way: ModeCost) -> ModeCost:
    """The products one after the other, each from the beginning."""

    def loop(torch: Torch, fun: Function) -> Function:
        product = way(torch, fun)
        return lambda x, vs: torch.stack([product(x, v) for v in vs])

    return loop


def functional(name: str, **options: Any) -> ModeCost:
    """A function of ``torch.autograd.functional`` with its options."""

    def way(torch: Torch, fun: Function) -> Function:
        return lambda x, v: getattr(torch.autograd.functional, name)(fun, x, **options)

    return way


WAYS: dict[str, dict[str, ModeCost]] = {
    "gradient": {
        "torch.autograd.grad": backward,
        "torch.func.grad": lambda torch, fun: lambda x, v: torch.func.grad(fun)(x),
        "torch.func.jacfwd": lambda torch, fun: lambda x, v: torch.func.jacfwd(fun)(x),
    },
    "hvp": {
        "torch.func, forward over reverse": forward_over_reverse,
        "torch.func, reverse over reverse": reverse_over_reverse,
        "torch.autograd.functional.hvp": lambda torch, fun: lambda x, v: torch.autograd.functional.hvp(fun, x, v)[1],
        "torch.autograd.functional.vhp": lambda torch, fun: lambda x, v: torch.autograd.functional.vhp(fun, x, v)[1],
    },
    "products": {
        "torch.func.linearize": linearized,
        "torch.autograd.grad, one graph": one_graph,
        "torch.func, forward over reverse": in_a_loop(forward_over_reverse),
    },
    "hessian": {
        "torch.func.hessian": lambda torch, fun: lambda x, v: torch.func.hessian(fun)(x),
        "torch.func, reverse over reverse": lambda torch, fun: (
            lambda x, v: torch.func.jacrev(torch.func.jacrev(fun))(x)
        ),
        "torch.autograd.functional.hessian": functional("hessian"),
        "torch.autograd.functional.hessian, vectorized": functional("hessian", vectorize=True),
    },
    "jacobian": {
        "torch.func.jacfwd": lambda torch, fun: lambda x, v: torch.func.jacfwd(fun)(x),
        "torch.func.jacrev": lambda torch, fun: lambda x, v: torch.func.jacrev(fun)(x),
        "torch.autograd.functional.jacobian": functional("jacobian"),
        "torch.autograd.functional.jacobian, vectorized": functional("jacobian", vectorize=True),
    },
}

COMPILED = {
    "gradient": "torch.func.grad",
    "hvp": "torch.func, forward over reverse",
    "hessian": "torch.func.hessian",
}
"""Derivative -> the way that ``torch.compile`` is given as well."""
