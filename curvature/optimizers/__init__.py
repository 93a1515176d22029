"""Optax transformations of second order, and the compiled loop that drives them."""

from curvature.optimizers._batched import minimize_batched
from curvature.optimizers._minimize import MinimizeStep, minimize
from curvature.optimizers._newton import NewtonState, newton
from curvature.optimizers._trust_region import TrustRegionState, trust_region

__all__ = ["MinimizeStep", "NewtonState", "TrustRegionState", "minimize", "minimize_batched", "newton", "trust_region"]
