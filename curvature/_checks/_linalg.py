"""Input checks of linear algebra: operators, their factors, grids."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from curvature._checks._describe import describe
from curvature._errors import caller


def check_operator(op: Any) -> None:
    """Refuse anything but an operator, such as a function ``v -> A v``."""
    if not (hasattr(op, "linearize") and hasattr(op, "in_structure")):
        raise TypeError(
            f"{caller()}: op is {describe(op)}, expected a curvature.LinearOperator, which knows its structure."
        )


def check_square_operator(op: Any, *, symmetric: bool = False) -> None:
    """Refuse an operator that is not square or acts on no entries; with ``symmetric`` also one not known to be it."""
    check_operator(op)
    takes, gives = op.in_structure(), op.out_structure()
    if jax.tree.structure(takes) != jax.tree.structure(gives):
        raise ValueError(
            f"{caller()}: op takes {jax.tree.structure(takes)} and gives {jax.tree.structure(gives)}, "
            "expected a square operator, such as op.T @ op."
        )
    for (path, leaf), out in zip(tree_flatten_with_path(takes)[0], jax.tree.leaves(gives), strict=True):
        if leaf.shape != out.shape:
            raise ValueError(
                f"{caller()}: op gives v{keystr(path)} of shape {leaf.shape} the shape {out.shape}, "
                "expected a square operator, such as op.T @ op."
            )
    if not sum(leaf.size for leaf in jax.tree.leaves(takes)):
        raise ValueError(f"{caller()}: op acts on trees without entries, expected at least one number.")
    if symmetric and not op.is_symmetric:
        raise ValueError(
            f"{caller()}: {type(op).__name__} is not known to be symmetric, expected op.is_symmetric; "
            "say so where it is made, as in MatrixOperator(matrix, is_symmetric=True)."
        )


def check_whole(whole: bool) -> None:
    """Refuse to factor an operator whose data is chunked or in batches, or a block of an operator."""
    if not whole:
        raise ValueError(
            f"{caller()}.factors: the data comes in slices or batches, or the operator is a block, expected whole data "
            "and all of x; use another method, such as 'cg'."
        )


def no_damping() -> TypeError:
    """The error for an operator without the multiple of the identity that the method needs."""
    return TypeError(
        f"{caller()}: method='woodbury' needs A = J' M J + c I, but op has no damping; add it, as in "
        "op + damping(1e-3)."
    )


def no_factors(op: Any) -> TypeError:
    """The error for an operator that is not of the form ``J' M J + c I``."""
    return TypeError(
        f"{caller()}: method='woodbury' needs one term with factors() -> (J, M), as a Gauss-Newton operator, plus "
        f"damping; op is {type(op).__name__}. Use another method, such as 'cg'."
    )


def no_streaming_inside() -> TypeError:
    """The error for a traced solver whose operator sums over batches on the host."""
    return TypeError(
        f"{caller()}: called inside jit, vmap, grad or another transformation with an operator that has batches=, "
        f"which are summed on the host; call {caller()} outside of it, or give the data as arrays with chunk_size=."
    )


def check_grid(grid: Any) -> None:
    """Refuse a grid that is not a vector of real numbers."""
    dtype = getattr(grid, "dtype", None)
    if dtype is None or jnp.ndim(grid) != 1 or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{caller()}: grid is {describe(grid)}, expected a vector of floats such as jnp.linspace.")


def samples_without_key() -> ValueError:
    """The error for ``num_samples=`` without ``key=``."""
    return ValueError(
        f"{caller()}: num_samples= without key=; give a key to estimate, or neither for the exact answer."
    )
