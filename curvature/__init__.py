"""Second-order derivatives, curvature and Newton methods for JAX."""

from curvature._types import CGInfo, MinimizeResult, Status
from curvature.linalg import cg
from curvature.optimizers import MinimizeStep, NewtonState, TrustRegionState, minimize, newton, trust_region
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
    "MinimizeStep",
    "NewtonState",
    "Status",
    "TrustRegionState",
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
