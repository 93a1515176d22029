"""Stochastic second-order optimizers as optax transformations: KFAC, natural gradient, Sophia, AdaHessian."""
