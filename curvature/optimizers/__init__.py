"""Optax transformations of second order, and the compiled loop that drives them."""

from curvature.optimizers._adahessian import AdaHessianState, adahessian, scale_by_adahessian
from curvature.optimizers._batched import minimize_batched
from curvature.optimizers._bfgs import BFGSState, bfgs
from curvature.optimizers._cubic_newton import CubicNewtonState, cubic_newton
from curvature.optimizers._curve_fit import curve_fit
from curvature.optimizers._gauss_newton import GaussNewtonState, gauss_newton
from curvature.optimizers._kfac import KFACState, kfac
from curvature.optimizers._lbfgs import LBFGSState, lbfgs
from curvature.optimizers._lbfgsb import LBFGSBState, lbfgsb
from curvature.optimizers._least_squares import LeastSquaresResult, least_squares
from curvature.optimizers._levenberg_marquardt import LevenbergMarquardtState, levenberg_marquardt
from curvature.optimizers._loop import MinimizeStep
from curvature.optimizers._minimize import minimize
from curvature.optimizers._natural_gradient import NaturalGradientState, natural_gradient
from curvature.optimizers._newton import NewtonState, newton
from curvature.optimizers._newton_cg import NewtonCGState, newton_cg
from curvature.optimizers._projected_newton import projected_newton
from curvature.optimizers._scipy import scipy_minimize
from curvature.optimizers._sophia import SophiaState, scale_by_sophia, sophia
from curvature.optimizers._sr1 import SR1State, sr1
from curvature.optimizers._trust_region import TrustRegionState, trust_region

__all__ = [
    "AdaHessianState",
    "BFGSState",
    "CubicNewtonState",
    "GaussNewtonState",
    "KFACState",
    "LBFGSBState",
    "LBFGSState",
    "LeastSquaresResult",
    "LevenbergMarquardtState",
    "MinimizeStep",
    "NaturalGradientState",
    "NewtonCGState",
    "NewtonState",
    "SR1State",
    "SophiaState",
    "TrustRegionState",
    "adahessian",
    "bfgs",
    "cubic_newton",
    "curve_fit",
    "gauss_newton",
    "kfac",
    "lbfgs",
    "lbfgsb",
    "least_squares",
    "levenberg_marquardt",
    "minimize",
    "minimize_batched",
    "natural_gradient",
    "newton",
    "newton_cg",
    "projected_newton",
    "scale_by_adahessian",
    "scale_by_sophia",
    "scipy_minimize",
    "sophia",
    "sr1",
    "trust_region",
]
