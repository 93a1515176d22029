"""Linear maps that are never formed, as pytrees."""

from curvature.operators._base import LinearOperator, MatrixOperator, damping
from curvature.operators._bridges import as_lineax, as_scipy
from curvature.operators._curvature import FisherOperator, GaussNewtonOperator, HessianOperator
from curvature.operators._jacobian_operators import JacobianOperator, NTKOperator
from curvature.operators._kronecker import KroneckerOperator

__all__ = [
    "FisherOperator",
    "GaussNewtonOperator",
    "HessianOperator",
    "JacobianOperator",
    "KroneckerOperator",
    "LinearOperator",
    "MatrixOperator",
    "NTKOperator",
    "as_lineax",
    "as_scipy",
    "damping",
]
