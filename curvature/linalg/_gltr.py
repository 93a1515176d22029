"""GLTR: the trust-region subproblem on a Krylov space; one tridiagonalization serves every radius."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvature._numerics import dot, matmul, norm
from curvature._types import Scalar, Vector, VectorMap
from curvature.linalg._subproblems import QuadraticModel, RegionStep, factor_model, solve_region

MAX_BASIS = 100  # Heuristic: limits the memory of the basis and the loss of orthogonality
_LOST = 100  # Heuristic: after orthogonalization, a vector below this number of roundings is noise


class KrylovModel(NamedTuple):
    """``q(s) = g's + s'Hs / 2`` for the ``s`` in the span of a basis."""

    basis: Float[Array, "m n"]  # orthonormal rows; unused ones are zero
    model: QuadraticModel  # with the tridiagonal matrix
    num_steps: Int[Array, ""]
    too_small: Bool[Array, ""]  # the basis is full, and the minimizer is inside the region with too large a residual


class _CGScalars(NamedTuple):
    """The scalars of conjugate gradients on the same space, from the Lanczos coefficients: CGT section 7.5.4."""

    pivot: Scalar  # the last pivot of L D L' = T, the tridiagonal matrix
    residual: Scalar  # norm(r)
    pp: Scalar  # p'p with p the direction of CG
    xp: Scalar  # x'p with x the iterate of CG
    xx: Scalar  # x'x
    outside: Bool[Array, ""]  # the curvature is not positive, or x is outside; the other scalars are then invalid


class _LanczosState(NamedTuple):
    """The state of the Lanczos iteration."""

    basis: Float[Array, "m n"]
    diagonal: Float[Array, " m"]
    off_diagonal: Float[Array, " m"]  # the coupling of each row with the row before it
    residual: Vector  # the next row, before normalization
    size: Scalar  # a lower bound of the norm of H
    cg: _CGScalars
    step: Int[Array, ""]
    limit: Int[Array, ""]
    done: Bool[Array, ""]


def krylov_model(
    product: VectorMap, gradient: Vector, tolerance: Scalar, max_steps: Int[Array, ""], radius: Scalar
) -> KrylovModel:
    """Extend the Krylov space of the gradient until it holds an accurate minimizer, and factor the model on it.

    While the curvature is positive and the minimizer inside the region, the space is extended until the residual is at
    most ``tolerance``. Once the boundary or negative curvature is met at size k, it is extended to ``2 k + 8``, for the
    minimizer on the boundary: Gould, Lucidi, Roma and Toint (1999), doi:10.1137/S1052623497322735. The entries of
    ``gradient`` must be of order 1.

    Rows are not reorthogonalized: as in conjugate gradients, a row is only orthogonal to the two rows before it.
    Reorthogonalization would cost many times the products.

    Cost: one product and about 5 n FLOPs per step; then one eigendecomposition of size m = min(n, 100); memory m n.
    """
    example = jnp.zeros_like(gradient)
    m = min(gradient.size, MAX_BASIS)
    rows = jnp.broadcast_to(example, (m, gradient.size))
    size = norm(gradient)
    zero, no_steps = jnp.zeros_like(size), jnp.zeros_like(size, jnp.int32)
    start = _LanczosState(
        basis=rows,
        diagonal=rows[:, 0],
        off_diagonal=rows[:, 0],
        residual=gradient,
        size=zero,
        cg=_CGScalars(zero + 1, size, zero, zero, zero, zero > 0),
        step=no_steps,
        limit=jnp.minimum(max_steps, m) + no_steps,
        done=~(size > 0),
    )
    state = jax.lax.while_loop(
        lambda state: ~state.done, lambda state: _lanczos_step(state, product, tolerance, radius), start
    )
    used = jnp.arange(m, dtype=jnp.int32) < state.step
    # Unused rows are decoupled and have no share of the gradient; this value keeps them from being the lowest.
    padding = jnp.max(jnp.abs(state.diagonal))
    off_diagonal = state.off_diagonal[1:]
    T = jnp.diag(jnp.where(used, state.diagonal, padding)) + jnp.diag(off_diagonal, 1) + jnp.diag(off_diagonal, -1)
    model = factor_model(T, jnp.zeros_like(rows[:, 0]).at[0].set(size))
    full = (state.step == m) & (m < max_steps)
    too_small = full & ~state.cg.outside & (state.cg.residual > tolerance)
    return KrylovModel(state.basis, model, state.step, too_small)


def solve_krylov_region(krylov: KrylovModel, radius: Scalar) -> RegionStep:
    """``solve_region`` on the span of the basis."""
    inner = solve_region(krylov.model, radius)
    return inner._replace(step=matmul(inner.step, krylov.basis))


def _lanczos_step(state: _LanczosState, product: VectorMap, tolerance: Scalar, radius: Scalar) -> _LanczosState:
    # 1. The next row and coefficients of the tridiagonal matrix.
    i, coupling = state.step, norm(state.residual)
    row = state.residual / coupling
    image = product(row)
    alpha = dot(row, image)
    basis = state.basis.at[i].set(row)
    size = jnp.maximum(state.size, norm(image))
    previous = jnp.where(i > 0, coupling, 0)
    residual = image - alpha * row - previous * basis[jnp.maximum(i - 1, 0)]
    beta = norm(residual)
    # 2. The iterate that conjugate gradients would have.
    cg = _cg_step(state.cg, alpha, previous, beta, radius)
    # 3. Stop at a small residual, at the end of the space, or at the limit.
    step = i + 1
    leaves = cg.outside & ~state.cg.outside
    limit = jnp.where(leaves, jnp.minimum(state.limit, 2 * step + 8), state.limit)
    exhausted = ~(beta > _LOST * jnp.finfo(residual.dtype).eps * size)
    solved = ~cg.outside & (cg.residual <= tolerance)
    return _LanczosState(
        basis=basis,
        diagonal=state.diagonal.at[i].set(alpha),
        off_diagonal=state.off_diagonal.at[i].set(previous),
        residual=residual,
        size=size,
        cg=cg,
        step=step,
        limit=limit,
        done=exhausted | solved | (step >= limit),
    )


def _cg_step(cg: _CGScalars, alpha: Scalar, previous: Scalar, beta: Scalar, radius: Scalar) -> _CGScalars:
    ratio = previous / cg.pivot
    xp = ratio * (cg.xp + cg.residual / cg.pivot * cg.pp)
    pp = 1 + ratio**2 * cg.pp
    pivot = alpha - previous * ratio
    length = cg.residual / pivot
    xx = cg.xx + 2 * length * xp + length**2 * pp
    outside = cg.outside | ~(pivot > 0) | ~(jnp.sqrt(xx) < radius)
    return _CGScalars(pivot, beta * jnp.abs(length), pp, xp, xx, outside)
