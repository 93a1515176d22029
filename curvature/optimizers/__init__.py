"""Optax transformations of second order, and the compiled loop that drives them."""
