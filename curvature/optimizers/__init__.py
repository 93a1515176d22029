"""Optax transformations of second order, and the compiled loop that drives them."""

from curvature.optimizers._minimize import minimize
from curvature.optimizers._newton import newton
from curvature.optimizers._trust_region import trust_region

__all__ = ["minimize", "newton", "trust_region"]
