"""The slow obvious way, and comparisons that raise."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def flat(tree):
    """All entries of a tree as one float64 vector, in the order of its leaves."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


def dense_hessian(fun, x, *args):
    """The n x n Hessian of a function of a tree, by JAX on the vector of its entries."""
    vector, unravel = ravel_pytree(x)
    return np.asarray(jax.hessian(lambda v: fun(unravel(v), *args))(vector), np.float64)


def dense_blocks(blocks, x):
    """A tree like ``x`` of trees like ``x`` as one n x n matrix."""
    structure = jax.tree.structure(x)
    rows = []
    for leaf, row in zip(jax.tree.leaves(x), structure.flatten_up_to(blocks), strict=True):
        columns = [np.asarray(block, np.float64).reshape(leaf.size, -1) for block in structure.flatten_up_to(row)]
        rows.append(np.concatenate(columns, axis=1))
    return np.concatenate(rows)


def tolerance(dtype, roundings=64):
    """A relative tolerance of so many roundings."""
    return roundings * float(jnp.finfo(dtype).eps)


def assert_close(got, want, dtype=jnp.float64, roundings=64):
    """Arrays agree to so many roundings of the largest entry."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    scale = np.abs(want).max(initial=0) or 1.0
    error = np.abs(got - want).max(initial=0) / scale
    assert error <= tolerance(dtype, roundings), f"relative error {error:.2e}"


def assert_trees_close(got, want, dtype=jnp.float64, roundings=64):
    """Trees have the same structure, shapes and dtypes, and their leaves agree."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert one.dtype == other.dtype, (one.dtype, other.dtype)
        assert_close(one, other, dtype, roundings)


def exact_trust_region_step(matrix, gradient, radius):
    """The minimum of ``g's + s'Hs/2`` in a ball, by bisection on the multiplier in extended precision."""
    matrix, gradient = np.asarray(matrix, np.float64), np.asarray(gradient, np.float64)
    eigenvalues, vectors = np.linalg.eigh(matrix)
    coordinates, shifted = (vectors.T @ gradient).astype(np.longdouble), eigenvalues.astype(np.longdouble)
    if eigenvalues[0] > 0 and np.linalg.norm(coordinates / shifted) <= radius:
        return float(-(coordinates**2 / shifted).sum() / 2)
    low = max(np.longdouble(0), -shifted[0])
    high = low + np.linalg.norm(gradient) / radius + 1

    def step_at(multiplier):
        return -coordinates / (shifted + multiplier)

    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if (step_at(middle) ** 2).sum() > radius**2 else (low, middle)
    step = step_at(high)
    lowest = np.sqrt(max(radius**2 - (step[1:] ** 2).sum(), 0))  # differs from the entry only in the hard case
    step[0] = lowest if step[0] >= 0 else -lowest
    return float(coordinates @ step + (shifted * step) @ step / 2)
