"""Whether an operator is as symmetric as solvers assume."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PRNGKeyArray

from curvature import _checks
from curvature._numerics import dot, norm
from curvature._trees import ravel
from curvature._types import Scalar, Vector
from curvature.linalg._host_loop import call_solver
from curvature.linalg._linear_system import checked_product
from curvature.operators._base import LinearOperator, zeros
from curvature.transforms._chunks import vmap


def check_symmetry(
    op: LinearOperator, *, key: PRNGKeyArray, num_samples: int = 4, rtol: ArrayLike | None = None
) -> Bool[Array, ""]:
    """Whether ``<v, A w> = <A v, w>`` for random ``v`` and ``w``: no solver asks, and all take it for granted.

    The test is ``abs(<v, A w> - <A v, w>) <= rtol * (norm(A v) + norm(A w))`` for Gaussian ``v`` and ``w``: both sides
    are then of the same order for an operator without symmetry, whatever its size and scale.

    Args:
        op: the operator, which must be square. What it says of itself is not believed.
        key: the random key.
        num_samples: the number of pairs.
        rtol: the tolerance; ``None`` is the root of the rounding unit.

    Returns:
        A boolean array. An asymmetric operator passes with a probability of about ``rtol ** num_samples``; NaN fails.

    Raises:
        TypeError: when ``op`` is no operator.
        ValueError: when ``op`` is not square, or a number is out of range.

    Cost: two products for each pair; with ``batches=`` all together are one pass over the batches.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> from curvature.operators._base import MatrixOperator
        >>> op = MatrixOperator(jnp.array([[1.0, 2.0], [0.0, 1.0]]))
        >>> bool(curvature.check_symmetry(op, key=jax.random.key(0)))
        False
    """
    _checks.check_operator("check_symmetry", op)
    _checks.check_count("check_symmetry", "num_samples", num_samples, 1)
    if rtol is not None:
        _checks.check_nonnegative("check_symmetry", "rtol", rtol)
        rtol = jnp.asarray(rtol)
    return call_solver("check_symmetry", _check_symmetry, op, key, rtol, num_samples=num_samples)


def _check_symmetry(op: LinearOperator, key: PRNGKeyArray, rtol: Array | None, num_samples: int) -> Bool[Array, ""]:
    product, example = checked_product("check_symmetry", "op", op, zeros(op.in_structure()))
    flat, unravel = ravel(example)
    tolerance = jnp.sqrt(jnp.finfo(flat.dtype).eps) if rtol is None else jnp.asarray(rtol, flat.dtype)

    pairs = jax.random.normal(key, (2 * num_samples, flat.size), flat.dtype)
    images = vmap(lambda row: ravel(product(unravel(row)))[0])(pairs)
    v, w = jnp.split(pairs, 2)
    image_v, image_w = jnp.split(images, 2)
    return jnp.all(jax.vmap(_agree, (0, 0, 0, 0, None))(v, w, image_v, image_w, tolerance))


def _agree(v: Vector, w: Vector, image_v: Vector, image_w: Vector, tolerance: Scalar) -> Bool[Array, ""]:
    return jnp.abs(dot(v, image_w) - dot(w, image_v)) <= tolerance * (norm(image_v) + norm(image_w))
