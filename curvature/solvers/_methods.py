"""The methods of ``minimize`` by name."""

import functools
from collections.abc import Callable

import optax

from curvature import _checks
from curvature._trees import num_entries
from curvature._types import Tree
from curvature.optimizers._bfgs import bfgs
from curvature.optimizers._cubic_newton import cubic_newton
from curvature.optimizers._lbfgs import lbfgs
from curvature.optimizers._method import DenseSecondOrder, WithStatus
from curvature.optimizers._newton import newton
from curvature.optimizers._newton_cg import newton_cg
from curvature.optimizers._sr1 import sr1
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
DENSE_ENTRIES = 100  # up to here "auto" forms the Hessian


@functools.cache
def _named(method: str) -> WithStatus:
    return METHODS[method]()


def resolve(method: Method, x0: Tree, hessian: Callable[..., Tree] | None) -> optax.GradientTransformation:
    """The transformation that a method names."""
    if isinstance(method, optax.GradientTransformation):
        transformation = method
    else:
        name = _checks.check_method(method, ("auto", *METHODS), "unknown")
        small = num_entries(x0) <= DENSE_ENTRIES
        automatic = "trust-exact" if hessian is not None or small else "trust-region"
        transformation = _named(automatic if name == "auto" else name)
    if hessian is not None:
        _checks.check_hessian_used(method, isinstance(transformation, DenseSecondOrder))
    return transformation
