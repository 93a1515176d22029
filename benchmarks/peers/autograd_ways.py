"""HIPS autograd, on NumPy: its ``grad``, ``hessian_vector_product``, ``hessian`` and ``jacobian`` as contestants."""

import importlib
from typing import Any

import numpy as np

from benchmarks.peers import operations
from benchmarks.peers.flat import Function, Library, Way


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
# NumPy's threads are those of its BLAS, which read the environment.
AUTOGRAD = Library(
    "autograd",
    load=lambda choice: importlib.import_module("autograd"),
    array=lambda autograd, values, choice: np.asarray(values, choice.dtype),
    operations=operations.for_autograd,
    ways=WAYS,
)
contestants = AUTOGRAD.contestants
