"""HIPS autograd, on NumPy: its ``grad``, ``hessian_vector_product``, ``hessian`` and ``jacobian`` as contestants."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.cases import Choice, Contestant, Task
from benchmarks.peers import operations
from benchmarks.peers.flat import PRODUCTS, Flat

Function = Callable[..., Any]
Way = Callable[[Any, Function], Function]  # from the module and ``fun(x)`` to a function of ``x`` and ``v``


def contestants(flat: Flat, derivative: str, choice: Choice) -> Iterator[Contestant]:
    pieces = PRODUCTS if derivative == "products" else 1
    for name, way in WAYS[derivative].items():
        yield Contestant(name, "autograd", make=functools.partial(start, flat, way, choice), pieces=pieces)


def start(flat: Flat, way: Way, choice: Choice) -> Task:
    """The call to be timed; NumPy's threads are those of its BLAS, which read the environment."""
    import autograd

    x, v, *data = (np.asarray(array, choice.dtype) for array in (flat.x, flat.v, *flat.data))
    function = flat.function(operations.for_autograd(), "autograd")
    derivative = way(autograd, lambda x: function(x, *data))
    return lambda: derivative(x, v)


def of_x(name: str) -> Way:
    return lambda autograd, fun: lambda x, v: getattr(autograd, name)(fun)(x)


def each_fresh(autograd: Any, fun: Function) -> Function:
    product = autograd.hessian_vector_product(fun)
    return lambda x, vs: np.stack([product(x, v) for v in vs])


def one_tape(autograd: Any, fun: Function) -> Function:
    """One tape of the gradient, and a pass back over it for each direction."""

    def products(x: Any, vs: Any) -> Any:
        pull, _ = autograd.make_vjp(autograd.grad(fun))(x)
        return np.stack([pull(v) for v in vs])

    return products


WAYS: dict[str, dict[str, Way]] = {
    "gradient": {"autograd.grad": of_x("grad")},
    "hvp": {"autograd.hessian_vector_product": lambda autograd, fun: autograd.hessian_vector_product(fun)},
    "products": {"autograd.make_vjp, one tape": one_tape, "autograd.hessian_vector_product": each_fresh},
    "hessian": {"autograd.hessian": of_x("hessian")},
    "jacobian": {"autograd.jacobian": of_x("jacobian")},
}
