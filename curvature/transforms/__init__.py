"""From a function to a derivative of it; stateless."""

from curvature.transforms._blocks import MatrixView, matrix_view
from curvature.transforms._clipped import clipped_grad, per_example_grad_norm
from curvature.transforms._diagonal import hessian_diagonal
from curvature.transforms._hessian import hessian, hvp, linearize_grad
from curvature.transforms._jacobian import jacobian, vmap
from curvature.transforms._laplacian import directional_derivatives, laplacian
from curvature.transforms._mean_hessian import mean_hessian
from curvature.transforms._moments import GradMoments, per_example_grad_moments
from curvature.transforms._per_example import per_example_grad, per_example_hessian
from curvature.transforms._sparse import sparse_hessian, sparse_jacobian
from curvature.transforms._tapped import Tapped, TapReport

__all__ = [
    "GradMoments",
    "MatrixView",
    "TapReport",
    "Tapped",
    "clipped_grad",
    "directional_derivatives",
    "hessian",
    "hessian_diagonal",
    "hvp",
    "jacobian",
    "laplacian",
    "linearize_grad",
    "matrix_view",
    "mean_hessian",
    "per_example_grad",
    "per_example_grad_moments",
    "per_example_grad_norm",
    "per_example_hessian",
    "sparse_hessian",
    "sparse_jacobian",
    "vmap",
]
