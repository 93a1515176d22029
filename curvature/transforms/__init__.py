"""From a function to a derivative of it; stateless."""

from curvature.transforms._hessian import hessian, hvp, linearize_grad
from curvature.transforms._jacobian import jacobian, vmap
from curvature.transforms._per_example import per_example_grad, per_example_hessian

__all__ = ["hessian", "hvp", "jacobian", "linearize_grad", "per_example_grad", "per_example_hessian", "vmap"]
