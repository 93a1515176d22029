"""The methods of ``minimize`` that keep to bounds."""

import functools
from collections.abc import Callable
from typing import Any

import optax

from curvature import _checks
from curvature._types import Tree
from curvature.optimizers._bounds import Box, project
from curvature.optimizers._lbfgsb import lbfgsb
from curvature.optimizers._method import WithStatus
from curvature.optimizers._projected_newton import projected_newton

Bounded = Callable[[Tree, Tree], WithStatus]
"""A transformation that still lacks its lower and its upper bounds, which are operands of the compiled program."""

Resolved = optax.GradientTransformation | Bounded

_METHODS: dict[str, Bounded] = {
    "trust-region": projected_newton,
    "trust-exact": functools.partial(projected_newton, subproblem="exact"),
    "l-bfgs": lbfgsb,
}


def resolve_bounded(method: Any, small: bool, has_hessian: bool) -> Bounded:
    """The method of that name; for "auto" the exact one if ``x`` is small or its Hessian is given."""
    method = _checks.check_method(method, ("auto", *_METHODS), "bounds")
    if method == "auto":
        method = "trust-exact" if has_hessian or small else "trust-region"
    if has_hessian:
        _checks.check_hessian_used(method, method == "trust-exact")
    return _METHODS[method]


def start_within(box: Box | None, method: Resolved, x0: Tree) -> tuple[optax.GradientTransformation, Tree]:
    """The transformation that keeps to the box, and where it starts."""
    if isinstance(method, optax.GradientTransformation):
        return method, x0
    assert box is not None
    return method(*box), project(box, x0)
