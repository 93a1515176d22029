"""Shared by the functions built on taps: the checked batch, and a report of the rule for each leaf."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from curvature import _checks
from curvature._errors import caller, later
from curvature._sharding import entry, gathered, vary_like
from curvature._trees import leaf_paths
from curvature._types import Objective, Tree
from curvature.programs._taps import Taps, trace_taps


@dataclass(frozen=True)
class LeafReport:
    """The rule by which a function built on taps treats each leaf of the parameters.

    Attributes:
        function: the name of the function.
        routes: from the path of a leaf to a sentence on its rule.
    """

    function: str
    routes: dict[str, str]

    def __str__(self) -> str:
        """One line for each leaf."""
        width = max(map(len, self.routes))
        return "\n".join(f"{path:{width}}  {route}" for path, route in self.routes.items())


@dataclass(frozen=True)
class PerExampleFunction:
    """A function of ``(params, *batch)`` that also reports how it treats each leaf of the parameters.

    Attributes:
        function: the function.
        report: from the same arguments to a ``LeafReport``; traces the loss and evaluates nothing.
    """

    function: Callable[..., Any]
    report: Callable[..., LeafReport]

    def __call__(self, params: Tree, *batch: Any) -> Any:
        """The function's value."""
        return self.function(params, *batch)


def reporter(loss: Objective, routes: Callable[[Taps | None, Tree], list[str]]) -> Callable[..., LeafReport]:
    """``PerExampleFunction.report``; ``routes`` makes a sentence for each leaf from the taps of the loss."""

    @later
    def report(params: Tree, *batch: Any) -> LeafReport:
        params, batch = open_batch(params, batch)
        sentences = routes(trace_taps(loss, params, first_example(batch)), params)
        return LeafReport(caller(), dict(zip(leaf_paths(params), sentences, strict=True)))

    return report


def open_batch(params: Tree, batch: tuple[Any, ...], summed: bool = True) -> tuple[Tree, tuple[Any, ...]]:
    """Parameters and batch, checked.

    A batch that is sharded over an explicit mesh is gathered if its examples are ``summed``: each product that
    contracts a sharded axis would otherwise have to state the sharding of its result. On auto axes XLA chooses it.
    """
    params = _checks.check_point("params", params)
    _checks.check_batch(batch)
    batch = jax.tree.map(jnp.asarray, batch)
    batch = jax.tree.map(gathered, batch) if summed else batch
    return vary_like(params, batch), batch


def first_example(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    """The first example of a batch, also where the examples are sharded."""
    return jax.tree.map(entry, batch)
