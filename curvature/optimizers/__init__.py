"""Optax transformations of second order, and the compiled loops that drive them."""

from curvature.optimizers._curve_fit import curve_fit
from curvature.optimizers._fit import LeastSquaresResult
from curvature.optimizers._gauss_newton import GaussNewtonState, gauss_newton
from curvature.optimizers._least_squares import least_squares
from curvature.optimizers._levenberg_marquardt import LevenbergMarquardtState, levenberg_marquardt
from curvature.optimizers._minimize import MinimizeStep, minimize
from curvature.optimizers._newton import NewtonState, newton
from curvature.optimizers._trust_region import TrustRegionState, trust_region

__all__ = [
    "GaussNewtonState",
    "LeastSquaresResult",
    "LevenbergMarquardtState",
    "MinimizeStep",
    "NewtonState",
    "TrustRegionState",
    "curve_fit",
    "gauss_newton",
    "least_squares",
    "levenberg_marquardt",
    "minimize",
    "newton",
    "trust_region",
]
