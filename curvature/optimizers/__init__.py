"""Optax transformations of second order, and the compiled loop that drives them."""

from curvature.optimizers._lbfgsb import LBFGSBState, lbfgsb
from curvature.optimizers._minimize import MinimizeStep, minimize
from curvature.optimizers._newton import NewtonState, newton
from curvature.optimizers._projected_newton import projected_newton
from curvature.optimizers._scipy import scipy_minimize
from curvature.optimizers._trust_region import TrustRegionState, trust_region

__all__ = [
    "LBFGSBState",
    "MinimizeStep",
    "NewtonState",
    "TrustRegionState",
    "lbfgsb",
    "minimize",
    "newton",
    "projected_newton",
    "scipy_minimize",
    "trust_region",
]
