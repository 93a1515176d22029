"""Compiled drivers around the optimizers: minimize, least_squares, curve_fit, minimize_batched, scipy_minimize."""
