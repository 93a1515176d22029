"""Conversion of operators for other libraries: lineax and SciPy."""

from functools import partial
from typing import Any

import jax
import numpy as np
import scipy.sparse.linalg
from jaxtyping import Array, Float

from curvature import _checks
from curvature._errors import public
from curvature._trees import num_entries, ravel
from curvature.operators._base import LinearOperator
from curvature.operators._data import is_streamed
from curvature.operators._pytrees import zeros
from curvature.transforms._chunks import vmap


@public
def as_lineax(op: LinearOperator) -> Any:
    """The operator as a ``lineax.FunctionLinearOperator``, linearized, and tagged if it is known to be symmetric.

    Call it inside the ``jit`` that solves: the result holds the intermediates of one point.

    Args:
        op: any operator. It does not know whether it is positive semidefinite: add
            ``lineax.positive_semidefinite_tag`` where that holds.

    Returns:
        The ``lineax.FunctionLinearOperator`` on trees like ``v``.

    Raises:
        ImportError: if lineax is not installed, or fails to import with the installed JAX.
        TypeError: for an operator with ``batches``, or for ``damping(c)`` alone, which has no structure.

    Cost: one linearization; then one linearized product per product.

    Example:
        >>> import jax.numpy as jnp, curvature, lineax
        >>> op = curvature.HessianOperator(lambda x: jnp.sum(x**4), jnp.array([1.0, 2.0]))
        >>> lineax.linear_solve(curvature.as_lineax(op), jnp.array([12.0, 12.0])).value
        Array([1.  , 0.25], dtype=float32)
    """
    lineax = _checks.import_extra("lineax", "lineax")  # more than half a second
    tags: Any = lineax.symmetric_tag if op.is_symmetric else ()
    return lineax.FunctionLinearOperator(op.linearize(), op.in_structure(), tags)


@public
def as_scipy(op: LinearOperator) -> scipy.sparse.linalg.LinearOperator:
    """The operator as a ``scipy.sparse.linalg.LinearOperator`` on NumPy vectors.

    Entries are in the order of ``jax.flatten_util.ravel_pytree``.

    Args:
        op: any operator, also with ``batches``.

    Returns:
        The m x n ``scipy.sparse.linalg.LinearOperator``, with ``matvec``, ``rmatvec``, ``matmat`` and ``rmatmat``.

    Raises:
        TypeError: for ``damping(c)`` alone, which has no structure.

    Cost: each call evaluates the operator without a shared linearization; it compiles once for all points and data of
        the same shapes.

    Example:
        >>> import jax.numpy as jnp, curvature, scipy.sparse.linalg
        >>> op = curvature.HessianOperator(lambda x: jnp.sum(x**4), jnp.array([1.0, 2.0, 3.0]))
        >>> scipy.sparse.linalg.eigsh(curvature.as_scipy(op), k=1, return_eigenvectors=False)
        array([108.], dtype=float32)
    """
    in_structure, out_structure = op.in_structure(), op.out_structure()
    dtype = np.promote_types(*(ravel(zeros(structure))[0].dtype for structure in (in_structure, out_structure)))

    def product(op: LinearOperator, many: bool, array: np.ndarray) -> np.ndarray:
        array = np.asarray(array, dtype)  # SciPy may pass double precision
        if not any(map(is_streamed, jax.tree.leaves(op, is_leaf=is_streamed))):
            return np.asarray((_apply_to_columns if many else _apply_to_vector)(op, array))
        columns = [_apply(op, column) for column in (array.T if many else array.reshape(1, -1))]
        return np.stack(columns, axis=-1) if many else np.asarray(columns[0])

    transpose = op.T
    linear_operator: Any = scipy.sparse.linalg.LinearOperator  # type checkers know only the subclass's arguments
    return linear_operator(
        (num_entries(out_structure), num_entries(in_structure)),
        matvec=partial(product, op, False),
        rmatvec=partial(product, transpose, False),
        matmat=partial(product, op, True),
        rmatmat=partial(product, transpose, True),
        dtype=dtype,
    )


def _apply(op: LinearOperator, vector: Any) -> Float[Array, " m"]:
    return ravel(op(ravel(zeros(op.in_structure()))[1](vector.reshape(-1))))[0]


_apply_to_vector = jax.jit(_apply)


@jax.jit
def _apply_to_columns(op: LinearOperator, columns: Array | np.ndarray) -> Float[Array, "m k"]:
    return vmap(partial(_apply, op), in_axes=1, out_axes=1)(columns)
