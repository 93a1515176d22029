"""``check_symmetry``: a randomized test of the symmetry of an operator."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, PRNGKeyArray

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, norm
from curvature._types import Vector
from curvature.linalg._host_loop import call_solver
from curvature.linalg._linear_system import product_on_vectors
from curvature.operators._base import LinearOperator
from curvature.transforms._chunks import vmap


@public
def check_symmetry(
    op: LinearOperator, *, key: PRNGKeyArray, num_samples: int = 4, rtol: ArrayLike | None = None
) -> Bool[Array, ""]:
    """Whether ``<v, A w> = <A v, w>`` for random ``v`` and ``w``. All solvers assume symmetry, and none checks it.

    The test is ``abs(<v, A w> - <A v, w>) <= rtol * (norm(A v) + norm(A w))`` for Gaussian ``v`` and ``w``. For an
    asymmetric operator the left-hand side has the order of the sum of norms, for any size and scale of the operator.

    Args:
        op: the operator, which must be square. ``op.is_symmetric`` is ignored.
        key: the random key.
        num_samples: the number of pairs.
        rtol: the tolerance; ``None`` is the square root of the rounding unit.

    Returns:
        A boolean array. An asymmetric operator passes with a probability of about ``rtol ** num_samples``; NaN fails.

    Raises:
        TypeError: if ``op`` is not an operator.
        ValueError: if ``op`` is not square, or a number is out of range.

    Cost: two products per pair; with ``batches=`` all products share one pass over the batches.

    Example:
        >>> import jax, jax.numpy as jnp, curvature
        >>> from curvature.operators._base import MatrixOperator
        >>> op = MatrixOperator(jnp.array([[1.0, 2.0], [0.0, 1.0]]))
        >>> bool(curvature.check_symmetry(op, key=jax.random.key(0)))
        False
    """
    _checks.check_operator(op)
    _checks.check_count("num_samples", num_samples, 1)
    if rtol is not None:
        _checks.check_nonnegative("rtol", rtol)
        rtol = jnp.asarray(rtol)
    return call_solver(_check_symmetry, op, key, rtol, num_samples=num_samples)


def _check_symmetry(op: LinearOperator, key: PRNGKeyArray, rtol: Array | None, num_samples: int) -> Bool[Array, ""]:
    product, _, example = product_on_vectors(op)
    tolerance = jnp.sqrt(jnp.finfo(example.dtype).eps) if rtol is None else jnp.asarray(rtol, example.dtype)

    def agree(v: Vector, w: Vector, image_v: Vector, image_w: Vector) -> Bool[Array, ""]:
        return jnp.abs(dot(v, image_w) - dot(w, image_v)) <= tolerance * (norm(image_v) + norm(image_w))

    pairs = jax.random.normal(key, (2 * num_samples, example.size), example.dtype)
    images = vmap(product)(pairs)
    return jnp.all(jax.vmap(agree)(*jnp.split(pairs, 2), *jnp.split(images, 2)))
