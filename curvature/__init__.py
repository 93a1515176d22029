"""Second-order derivatives, curvature and Newton methods for JAX."""

from curvature._types import CGInfo, MinimizeResult, Status
from curvature.linalg import cg
from curvature.optimizers import minimize, newton, trust_region
from curvature.transforms import (
    hessian,
    hvp,
    jacobian,
    linearize_grad,
    per_example_grad,
    per_example_hessian,
    vmap,
)

__all__ = [
    "CGInfo",
    "MinimizeResult",
    "Status",
    "cg",
    "hessian",
    "hvp",
    "jacobian",
    "linearize_grad",
    "minimize",
    "newton",
    "per_example_grad",
    "per_example_hessian",
    "trust_region",
    "vmap",
]
