"""What every library differentiates: a function of one flat vector, and where."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from benchmarks.models import Model
from benchmarks.peers.operations import Array, Operations

PRODUCTS = 32  # Hessian products at one point, for ``products``


@dataclass(frozen=True)
class Flat:
    """A function of a flat vector, written in the operations of any library, and the numbers it takes.

    Attributes:
        build: makes the function ``fun(x, *data)`` from the operations of a library.
        x: where it is differentiated, in double precision.
        data: its further arguments, in double precision.
        needs: the operations it uses that not every library has.
        v: the direction of ``hvp``; the ``PRODUCTS`` directions of ``products``, as rows.
    """

    build: Callable[[Operations], Callable[..., Array]]
    x: np.ndarray
    data: tuple[np.ndarray, ...] = ()
    needs: tuple[str, ...] = ()
    v: np.ndarray = field(default_factory=lambda: np.zeros(()))

    def function(self, ops: Operations, library: str) -> Callable[..., Array]:
        """The function in a library; ``NotImplementedError`` if that lacks an operation."""
        if missing := [name for name in self.needs if not hasattr(ops, name)]:
            raise NotImplementedError(f"{library} has no {', '.join(missing)}")
        return self.build(ops)


def of_model(model: Model, derivative: str = "gradient") -> Flat:
    """The loss of a model, by its parameters as one vector, with the directions that a derivative takes."""
    size = model.num_parameters
    v = directions(size) if derivative == "products" else model.pack(model.direction())
    return Flat(model.flat_loss, model.pack(model.params()), model.batch, model.needs, v)


def directions(size: int) -> np.ndarray:
    """Random directions, ``PRODUCTS`` of them, as rows."""
    return np.random.default_rng(8).normal(size=(PRODUCTS, size))
