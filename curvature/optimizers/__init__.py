"""Optax transformations of second order, and the compiled loop that drives them."""

from curvature.optimizers._adahessian import AdaHessianState, adahessian, scale_by_adahessian
from curvature.optimizers._kfac import KFACState, kfac
from curvature.optimizers._minimize import MinimizeStep, minimize
from curvature.optimizers._natural_gradient import NaturalGradientState, natural_gradient
from curvature.optimizers._newton import NewtonState, newton
from curvature.optimizers._sophia import SophiaState, scale_by_sophia, sophia
from curvature.optimizers._trust_region import TrustRegionState, trust_region

__all__ = [
    "AdaHessianState",
    "KFACState",
    "MinimizeStep",
    "NaturalGradientState",
    "NewtonState",
    "SophiaState",
    "TrustRegionState",
    "adahessian",
    "kfac",
    "minimize",
    "natural_gradient",
    "newton",
    "scale_by_adahessian",
    "scale_by_sophia",
    "sophia",
    "trust_region",
]
