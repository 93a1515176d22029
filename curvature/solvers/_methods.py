"""The methods of ``minimize`` by name."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from curvature import _checks
from curvature._trees import num_entries
from curvature._types import Tree
from curvature.optimizers._cubic_newton import cubic_newton
from curvature.optimizers._lbfgs import lbfgs
from curvature.optimizers._lbfgsb import lbfgsb
from curvature.optimizers._method import DenseSecondOrder, WithStatus
from curvature.optimizers._newton import newton
from curvature.optimizers._newton_cg import newton_cg
from curvature.optimizers._projected_newton import projected_newton
from curvature.optimizers._quasi_newton import bfgs, sr1
from curvature.optimizers._trust_region import trust_region

Method = str | optax.GradientTransformation

METHODS: dict[str, Callable[[], WithStatus]] = {
    "bfgs": bfgs,
    "l-bfgs": lbfgs,
    "sr1": sr1,
    "newton": newton,
    "newton-cg": newton_cg,
    "cubic-newton": cubic_newton,
    "trust-region": trust_region,
    "trust-exact": lambda: trust_region("exact"),
}
_DENSE_ENTRIES = 100  # up to here "auto" forms the Hessian


_BOUNDED: dict[str, Callable[[Tree, Tree], WithStatus]] = {
    "trust-region": projected_newton,
    "trust-exact": functools.partial(projected_newton, subproblem="exact"),
    "l-bfgs": lbfgsb,
}


@functools.cache
def _named(method: str) -> WithStatus:
    return METHODS[method]()


def resolve(method: Method, x0: Tree, hessian: Callable[..., Tree] | None) -> optax.GradientTransformation:
    """The transformation that a method names."""
    if isinstance(method, optax.GradientTransformation):
        transformation = method
    else:
        name = _checks.check_method(method, ("auto", *METHODS), "unknown")
        transformation = _named(_automatic(x0, hessian) if name == "auto" else name)
    if hessian is not None:
        _checks.check_hessian_used(method, isinstance(transformation, DenseSecondOrder))
    return transformation


def resolve_bounded(method: Any, x0: Tree, hessian: Callable[..., Tree] | None) -> Callable[[Tree, Tree], WithStatus]:
    """The transformation that a method with bounds names, from the bounds: operands of the compiled program."""
    name = _checks.check_method(method, ("auto", *_BOUNDED), "bounds")
    name = _automatic(x0, hessian) if name == "auto" else name
    if hessian is not None:
        _checks.check_hessian_used(name, name == "trust-exact")
    return _BOUNDED[name]


def _automatic(x0: Tree, hessian: Callable[..., Tree] | None) -> str:
    return "trust-exact" if hessian is not None or num_entries(x0) <= _DENSE_ENTRIES else "trust-region"
