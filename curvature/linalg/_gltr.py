"""The quadratic model of a trust region on a Krylov space: one tridiagonalization serves every radius."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvature._numerics import norm
from curvature._types import Scalar, Vector, VectorMap
from curvature.linalg._subproblems import QuadraticModel, RegionStep, factor_model, solve_region

MAX_BASIS = 100  # our own limit of memory and orthogonalization
_LOST = 100  # roundings, below which what orthogonalization leaves of a vector is noise


class KrylovModel(NamedTuple):
    """``q(s) = g's + s'Hs / 2`` for the ``s`` in the span of a basis."""

    basis: Float[Array, "m n"]  # orthonormal rows; unused ones are zero
    model: QuadraticModel  # of the tridiagonal matrix
    num_steps: Int[Array, ""]
    too_small: Bool[Array, ""]  # no more rows, and the minimizer is inside the region and not good enough


class _Walk(NamedTuple):
    """What conjugate gradients would know on the same space: CGT section 7.5.4, in Lanczos scalars."""

    pivot: Scalar  # of the L D L' of the tridiagonal matrix
    residual: Scalar
    pp: Scalar  # of the direction p and the iterate x: p'p, x'p, x'x
    xp: Scalar
    xx: Scalar
    outside: Bool[Array, ""]  # the curvature is not positive, or x has left the region; the rest means nothing then


class _Growth(NamedTuple):
    """Lanczos on its way."""

    basis: Float[Array, "m n"]
    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " m"]  # the coupling of a row with the one before
    rest: Vector
    size: Scalar  # a lower bound of the norm of H
    walk: _Walk
    step: Int[Array, ""]
    limit: Int[Array, ""]
    done: Bool[Array, ""]


def krylov_model(
    product: VectorMap, gradient: Vector, tolerance: Scalar, max_steps: Int[Array, ""], radius: Scalar
) -> KrylovModel:
    """Grow the Krylov space of the gradient until the model's minimizer over it is good enough; factor the model there.

    Where the curvature is positive and the minimizer inside the region, that is when the residual is at most
    ``tolerance``. Once the boundary or negative curvature is met, the space grows to twice its size and 8 more, for the
    minimizer on the boundary: Gould, Lucidi, Roma and Toint (1999), doi:10.1137/S1052623497322735. The entries of
    ``gradient`` are of order 1.

    A row is orthogonal to the two before it and to rounding no more, as in conjugate gradients: they need no more, and
    all else would cost many times the products.

    Cost: a product and about 5 n FLOPs a step; then one eigendecomposition of size m = min(n, 100); memory m n.
    """
    example = jnp.zeros_like(gradient)
    m = min(gradient.size, MAX_BASIS)
    rows = jnp.broadcast_to(example, (m, gradient.size))
    size = norm(gradient)
    zero, none = jnp.zeros_like(size), jnp.zeros_like(size, jnp.int32)
    start = _Growth(
        basis=rows,
        diagonal=rows[:, 0],
        off_diagonal=rows[:, 0],
        rest=gradient,
        size=zero,
        walk=_Walk(zero + 1, size, zero, zero, zero, zero > 0),
        step=none,
        limit=jnp.minimum(max_steps, m) + none,
        done=~(size > 0),
    )
    growth = jax.lax.while_loop(
        lambda growth: ~growth.done, lambda growth: _grow(growth, product, tolerance, radius), start
    )
    used = jnp.arange(m, dtype=jnp.int32) < growth.step
    padding = jnp.max(jnp.abs(growth.diagonal))  # decoupled, without a share of the gradient, and not the lowest
    off_diagonal = growth.off_diagonal[1:]
    T = jnp.diag(jnp.where(used, growth.diagonal, padding)) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1)
    model = factor_model(T, jnp.zeros_like(rows[:, 0]).at[0].set(size))
    full = (growth.step == m) & (m < max_steps)
    too_small = full & ~growth.walk.outside & (growth.walk.residual > tolerance)
    return KrylovModel(growth.basis, model, growth.step, too_small)


def solve_krylov_region(krylov: KrylovModel, radius: Scalar) -> RegionStep:
    """``solve_region`` on the span of the basis."""
    inner = solve_region(krylov.model, radius)
    return inner._replace(step=jnp.matmul(inner.step, krylov.basis, precision="highest"))


def _grow(growth: _Growth, product: VectorMap, tolerance: Scalar, radius: Scalar) -> _Growth:
    """One step of Lanczos, and of what conjugate gradients would make of it."""
    i, coupling = growth.step, norm(growth.rest)
    row = growth.rest / coupling
    image = product(row)
    alpha = jnp.vdot(row, image, precision="highest")
    basis = growth.basis.at[i].set(row)
    size = jnp.maximum(growth.size, norm(image))
    before = jnp.where(i > 0, coupling, 0)
    rest = image - alpha * row - before * basis[jnp.maximum(i - 1, 0)]
    beta = norm(rest)
    walk = _walk_on(growth.walk, alpha, before, beta, radius)

    step = i + 1
    leaves = walk.outside & ~growth.walk.outside
    limit = jnp.where(leaves, jnp.minimum(growth.limit, 2 * step + 8), growth.limit)
    exhausted = ~(beta > _LOST * jnp.finfo(rest.dtype).eps * size)
    solved = ~walk.outside & (walk.residual <= tolerance)
    return _Growth(
        basis=basis,
        diagonal=growth.diagonal.at[i].set(alpha),
        off_diagonal=growth.off_diagonal.at[i].set(before),
        rest=rest,
        size=size,
        walk=walk,
        step=step,
        limit=limit,
        done=exhausted | solved | (step >= limit),
    )


def _walk_on(walk: _Walk, alpha: Scalar, before: Scalar, beta: Scalar, radius: Scalar) -> _Walk:
    ratio = before / walk.pivot
    xp = ratio * (walk.xp + walk.residual / walk.pivot * walk.pp)
    pp = 1 + ratio**2 * walk.pp
    pivot = alpha - before * ratio
    length = walk.residual / pivot
    xx = walk.xx + 2 * length * xp + length**2 * pp
    outside = walk.outside | ~(pivot > 0) | ~(jnp.sqrt(xx) < radius)
    return _Walk(pivot, beta * jnp.abs(length), pp, xp, xx, outside)
