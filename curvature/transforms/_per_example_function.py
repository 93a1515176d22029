"""What the functions built on taps share: their batch opened, and a report of what becomes of each leaf."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from curvature import _checks
from curvature._sharding import entry, gathered, vary_like
from curvature._trees import leaf_paths
from curvature._types import Objective, Tree
from curvature.programs._taps import Taps, trace_taps


@dataclass(frozen=True)
class LeafReport:
    """How a function built on taps treats each leaf of the parameters.

    Attributes:
        function: the function.
        routes: from the path of a leaf to a sentence.
    """

    function: str
    routes: dict[str, str]

    def __str__(self) -> str:
        """A line for each leaf."""
        width = max(map(len, self.routes))
        return "\n".join(f"{path:{width}}  {route}" for path, route in self.routes.items())


@dataclass(frozen=True)
class PerExampleFunction:
    """A function of ``(params, *batch)`` that can tell how it treats each leaf of the parameters.

    Attributes:
        function: the function itself.
        report: from the same arguments to a ``LeafReport``; nothing is computed.
    """

    function: Callable[..., Any]
    report: Callable[..., LeafReport]

    def __call__(self, params: Tree, *batch: Any) -> Any:
        """The function's value."""
        return self.function(params, *batch)


def reporter(
    function: str, loss: Objective, routes: Callable[[Taps | None, Tree], list[str]]
) -> Callable[..., LeafReport]:
    """``PerExampleFunction.report``, from the taps of the loss and the parameters to a sentence for each leaf."""

    def report(params: Tree, *batch: Any) -> LeafReport:
        params, _, example = open_batch(function, params, batch)
        told = routes(trace_taps(function, loss, params, example), params)
        return LeafReport(function, dict(zip(leaf_paths(params), told, strict=True)))

    return report


def open_batch(
    function: str, params: Tree, batch: tuple[Any, ...], summed: bool = True
) -> tuple[Tree, tuple[Any, ...], tuple[Any, ...]]:
    """Parameters and batch, checked, and the first example.

    A batch that is sharded over an explicit mesh is gathered where its examples are ``summed``: the type of a product
    that contracts a sharded axis would have to be stated for each product. On a mesh of auto axes XLA does that.
    """
    params = _checks.check_point(function, "params", params)
    _checks.check_batch(function, batch)
    batch = jax.tree.map(jnp.asarray, batch)
    batch = jax.tree.map(gathered, batch) if summed else batch
    return vary_like(params, batch), batch, jax.tree.map(entry, batch)
