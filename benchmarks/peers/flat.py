"""What every library differentiates, a function of one flat vector, and how one that JAX does not compile starts."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.cases import Choice, Contestant, Task
from benchmarks.models import Model
from benchmarks.peers.operations import Array, Operations

PRODUCTS = 32  # Hessian products at one point, for ``products``

Function = Callable[..., Any]
Way = Callable[[Any, Function], Function]  # from a library and ``fun(x)`` to a function of ``x`` and ``v``


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


def of_model(model: Model, derivative: str = "gradient") -> Flat:
    """The loss of a model, by its parameters as one vector, with the directions that a derivative takes."""
    v = directions(model.num_parameters) if derivative == "products" else model.pack(model.direction())
    return Flat(model.flat_loss, model.pack(model.params()), model.batch, model.needs, v)


def directions(size: int) -> np.ndarray:
    """Random directions, ``PRODUCTS`` of them, as rows."""
    return np.random.default_rng(8).normal(size=(PRODUCTS, size))


@dataclass(frozen=True)
class Library:
    """A library that JAX does not compile.

    Attributes:
        name: its key in ``PACKAGES``.
        load: imports it for a choice of device and threads.
        array: ``array(library, values, choice)`` makes an array of it.
        operations: makes the operations that models are written in.
        ways: for each derivative, its ways to it by name.
        read: an answer as NumPy has it.
        wait: ``wait(library)`` returns when a GPU has done all that it was given.
    """

    name: str
    load: Callable[[Choice], Any]
    array: Callable[[Any, np.ndarray, Choice], Any]
    operations: Callable[[], Operations]
    ways: Mapping[str, Mapping[str, Way]]
    read: Function = np.asarray
    wait: Callable[[Any], None] = lambda library: None

    def contestants(self, flat: Flat, derivative: str, choice: Choice) -> Iterator[Contestant]:
        for name, way in self.ways[derivative].items():
            yield self.contestant(name, flat, way, choice)

    def contestant(self, name: str, flat: Flat, way: Way, choice: Choice, compile: Way | None = None) -> Contestant:
        """One way; ``compile(library, function)`` is what the library has for that, and does it at the first call."""
        pieces = len(flat.v) if flat.v.ndim == 2 else 1
        make = functools.partial(self.start, flat, way, choice, compile)
        return Contestant(name, self.name, make=make, read=self.read, pieces=pieces)

    def start(self, flat: Flat, way: Way, choice: Choice, compile: Way | None) -> Task:
        """The call to be timed; ``NotImplementedError`` if the library lacks an operation."""
        library, operations = self.load(choice), self.operations()
        if missing := [name for name in flat.needs if not hasattr(operations, name)]:
            raise NotImplementedError(f"{self.name} has no {', '.join(missing)}")
        x, v, *data = (self.array(library, values, choice) for values in (flat.x, flat.v, *flat.data))
        function = flat.build(operations)
        derivative = way(library, lambda x: function(x, *data))
        derivative = derivative if compile is None else compile(library, derivative)

        def call() -> Any:
            answer = derivative(x, v)
            if choice.device == "gpu":
                self.wait(library)
            return answer

        return call
