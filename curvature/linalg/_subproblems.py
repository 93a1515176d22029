"""Dense subproblems of Newton's method: modified Newton steps, trust-region and cubic subproblems."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from curvature._numerics import divide_or_zero, matmul, norm, rounding_level
from curvature._types import Matrix, Scalar, Vector, VectorMap

_MAX_SECULAR_STEPS = 50


def positive_definite_solve(matrix: Matrix, b: Vector) -> Vector:
    """``B^-1 b`` for a positive definite ``B``, which equals ``matrix`` if Cholesky's factorization succeeds.

    Otherwise ``B`` replaces each eigenvalue of the scaled matrix by its absolute value, and eigenvalues below the
    rounding level by that level. So ``b' B^-1 b > 0`` always: a Newton step moves away from saddle points along
    directions of negative curvature.

    Cost: n^3 / 3 FLOPs if the matrix is positive definite, about 9 n^3 more if it is not.
    """
    scale = scaling(matrix)
    scaled, rhs = matrix / jnp.outer(scale, scale), b / scale
    factor = jnp.linalg.cholesky(scaled, symmetrize_input=False)
    factored = jnp.all(jnp.isfinite(jnp.diagonal(factor)))  # cholesky reports failure as NaN everywhere

    def by_cholesky(operands: tuple[Matrix, Matrix, Vector]) -> Vector:
        factor, _, rhs = operands
        return jax.scipy.linalg.cho_solve((factor, True), rhs)

    def by_eigh(operands: tuple[Matrix, Matrix, Vector]) -> Vector:
        _, scaled, rhs = operands
        eigenvalues, vectors = jnp.linalg.eigh(scaled, symmetrize_input=False)
        floor = rounding_level(eigenvalues)
        magnitudes = jnp.maximum(jnp.abs(eigenvalues), jnp.where(floor > 0, floor, 1))
        return matmul(vectors, matmul(vectors.T, rhs) / magnitudes)

    return jax.lax.cond(factored, by_cholesky, by_eigh, (factor, scaled, rhs)) / scale


def scaling(matrix: Matrix) -> Vector:
    """Jacobi scaling: the square roots ``s`` of the diagonal, so that ``matrix / outer(s, s)`` has ones there.

    It makes the step independent of the units of each variable, so that single precision suffices if the units differ
    by many orders of magnitude. If a diagonal entry is zero or below rounding, the largest entry of its row replaces
    it.
    """
    magnitudes = jnp.abs(matrix)
    diagonal, largest = jnp.diagonal(magnitudes), jnp.max(magnitudes, axis=1)
    eps = jnp.finfo(matrix.dtype).eps
    chosen = jnp.where(diagonal > eps * largest, diagonal, largest)
    return jnp.sqrt(jnp.where(chosen > 0, chosen, 1))


def pseudo_inverse(eigenvalues: Vector, vectors: Matrix) -> VectorMap:
    """``b -> A^+ b`` from the eigenpairs of a symmetric ``A``; eigenvalues below the rounding level count as zero."""
    nonzero = jnp.abs(eigenvalues) > rounding_level(eigenvalues)

    def apply(b: Vector) -> Vector:
        coordinates = matmul(vectors.T, b) / jnp.where(nonzero, eigenvalues, 1)
        return matmul(vectors, jnp.where(nonzero, coordinates, 0))

    return apply


class QuadraticModel(NamedTuple):
    """The model ``q(s) = g's + s'Hs / 2`` in the eigenbasis of ``H``, which serves every radius and cubic weight."""

    eigenvalues: Vector
    vectors: Matrix
    gradient: Vector  # V'g


class RegionStep(NamedTuple):
    """A minimizer of the model within a radius, and the decrease that the model predicts."""

    step: Vector
    predicted: Scalar  # -q(step) >= 0
    on_boundary: Bool[Array, ""]


def factor_model(matrix: Matrix, gradient: Vector) -> QuadraticModel:
    """The eigendecomposition, about 9 n^3 FLOPs; then ``solve_region`` costs O(n^2) for each radius."""
    eigenvalues, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    coordinates, magnitudes = matmul(vectors.T, gradient), jnp.abs(eigenvalues)
    noise = (magnitudes <= rounding_level(magnitudes)) & (jnp.abs(coordinates) <= rounding_level(coordinates))
    return QuadraticModel(eigenvalues, vectors, jnp.where(noise, 0, coordinates))


def solve_region(model: QuadraticModel, radius: Scalar) -> RegionStep:
    """Minimize ``g's + s'Hs / 2`` over ``norm(s) <= radius`` to rounding, including the hard case.

    With ``H = V diag(l) V'`` the minimizer is ``s = -V (V'g / (l + mu))`` for the ``mu >= max(0, -l_1)`` that puts it
    on the boundary, or ``mu = 0`` if that ``s`` is inside. In the hard case no ``mu`` reaches the boundary because
    ``g`` is orthogonal to the lowest eigenvectors; then a multiple of the lowest eigenvector is added.

    References: Conn, Gould and Toint, Trust-Region Methods (2000), section 7.3.1 and algorithm 7.3.1,
        doi:10.1137/1.9780898719857; Moré and Sorensen (1983), doi:10.1137/0904038.
    """
    eigenvalues, gradient = model.eigenvalues, model.gradient
    lowest = eigenvalues[0]
    gaps = eigenvalues - lowest  # the unknown is t = lowest + mu >= 0, so that l + mu = gaps + t has no cancellation
    floor = jnp.maximum(lowest, 0)
    share = gradient / radius  # steps in units of the radius, so that their squares cannot overflow
    inside = jnp.all((gaps + floor > 0) | (share == 0)) & (norm(divide_or_zero(share, gaps + floor)) <= 1)
    t = jnp.where(inside, floor, _solve_secular(share, gaps, floor, inside))
    coordinates = -divide_or_zero(share, gaps + t)

    indefinite = lowest < -rounding_level(eigenvalues)
    missing = jnp.sqrt(jnp.maximum(1 - jnp.sum(coordinates[1:] ** 2), 0))  # abs(coordinates[0]) but in the hard case
    along_lowest = jnp.where(share[0] > 0, -missing, missing)
    coordinates = radius * _with_lowest(coordinates, along_lowest, indefinite)
    predicted = -jnp.sum(coordinates * (gradient + eigenvalues * coordinates / 2))
    return RegionStep(matmul(model.vectors, coordinates), predicted, ~inside | indefinite)


def _solve_secular(share: Vector, gaps: Vector, floor: Scalar, inside: Bool[Array, ""]) -> Scalar:
    """The ``t >= floor`` with ``norm(share / (gaps + t)) = 1``, by Newton's method on ``1 / norm``, from the left.

    If the step ends ``inside`` the region, there is no such ``t`` and the start is returned. From the left the iterates
    increase to the root and never pass it (CGT lemma 7.3.2), so only rounding needs a safeguard.
    """
    tolerance = jnp.finfo(share.dtype).eps ** 0.75

    def newton(t: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        step = divide_or_zero(share, gaps + t)
        excess = norm(step) - 1
        slope = jnp.sum(divide_or_zero(step**2, gaps + t))
        return t + jnp.sum(step**2) / slope * excess, excess > tolerance  # N&W (4.44)

    start = jnp.maximum(floor, _lowest_share(share, gaps))  # here the lowest coordinate alone reaches the boundary
    return _climb(newton, start, ~inside)


def _climb(
    newton: Callable[[Scalar], tuple[Scalar, Bool[Array, ""]]], start: Scalar, needed: Bool[Array, ""]
) -> Scalar:
    """Iterate ``newton(t) -> (next t, whether t is left of the root)`` from ``start`` until ``t`` is not left of it.

    The test reuses the norm of the step, so an iteration evaluates one norm. If not ``needed``, ``start`` is returned.
    """

    def step(carry: tuple[Scalar, Int[Array, ""], Bool[Array, ""]]) -> tuple[Scalar, Int[Array, ""], Bool[Array, ""]]:
        t, count, _ = carry
        following, left = newton(t)
        return jnp.where(left, following, t), count + 1, left & (count + 1 < _MAX_SECULAR_STEPS)

    return jax.lax.while_loop(lambda carry: carry[2], step, (start, jnp.zeros_like(start, jnp.int32), needed))[0]


def solve_cubic(model: QuadraticModel, weight: Scalar) -> RegionStep:
    """Minimize ``g's + s'Hs / 2 + weight norm(s)^3 / 3`` to rounding, including the hard case, for a ``weight > 0``.

    The minimizer solves the trust-region subproblem with the multiplier ``mu = weight norm(s)``. ``predicted`` excludes
    the cubic term; ``on_boundary`` is true if the cubic term changes the step.

    References: Cartis, Gould and Toint (2011), theorem 3.1 and section 6.1, doi:10.1007/s10107-009-0286-5.
    """
    eigenvalues, gradient = model.eigenvalues, model.gradient
    lowest = eigenvalues[0]
    base = eigenvalues - jnp.minimum(lowest, 0)  # the unknown is u >= 0, so that l + mu = base + u
    shift = jnp.maximum(-lowest, 0)  # and mu = shift + u, both without cancellation
    u = _solve_cubic_secular(gradient, base, shift, weight)
    coordinates, radius = -divide_or_zero(gradient, base + u), (shift + u) / weight

    squares = (coordinates / jnp.where(radius > 0, radius, 1)) ** 2
    hard = (lowest < -rounding_level(eigenvalues)) & (1 - jnp.sum(squares) > jnp.sqrt(jnp.finfo(radius.dtype).eps))
    missing = radius * jnp.sqrt(jnp.maximum(1 - jnp.sum(squares[1:]), 0))
    along_lowest = jnp.where(gradient[0] > 0, -missing, missing)
    coordinates = _with_lowest(coordinates, along_lowest, hard)
    predicted = -jnp.sum(coordinates * (gradient + eigenvalues * coordinates / 2))
    return RegionStep(matmul(model.vectors, coordinates), predicted, shift + u > rounding_level(eigenvalues))


def _solve_cubic_secular(gradient: Vector, base: Vector, shift: Scalar, weight: Scalar) -> Scalar:
    """The ``u >= 0`` with ``weight norm(gradient / (base + u)) = shift + u``, by Newton on ``1 / norm - weight / mu``.

    That function is concave and increasing, so from the left the iterates increase to the root and never pass it.
    """
    tolerance = jnp.finfo(gradient.dtype).eps ** 0.75

    def newton(u: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        step, mu = divide_or_zero(gradient, base + u), shift + u
        size = norm(step)
        pull = jnp.where(mu > 0, weight * size / jnp.where(mu > 0, mu, 1), 0)  # above 1 on the left
        slope = jnp.sum(divide_or_zero((step / size) ** 2, base + u))
        return u + (pull - 1) / (slope + pull / mu), pull - 1 > tolerance

    # Two lower bounds of the root: from the lowest coordinate alone, and with the highest curvature in all coordinates.
    lowest_share, largest = _lowest_share(gradient, base - base[0]), base[-1]
    from_lowest = _positive_root(base[0] + shift, weight * lowest_share)
    from_highest = _positive_root(largest + shift, weight * norm(gradient) - largest * shift)
    start = jnp.maximum(from_lowest, from_highest)
    return _climb(newton, start, jnp.ones_like(start, bool))


def _with_lowest(coordinates: Vector, lowest: Scalar, replaced: Bool[Array, ""]) -> Vector:
    """The coordinates with ``lowest`` along the lowest eigenvector if ``replaced``."""
    first = np.arange(coordinates.size) == 0  # ``at[0].set`` would launch a separate kernel
    return jnp.where(first & replaced, lowest, coordinates)


def _lowest_share(gradient: Vector, gaps: Vector) -> Scalar:
    """The largest coordinate of the gradient along the eigenvectors of the lowest eigenvalue."""
    return jnp.max(jnp.where(gaps == 0, jnp.abs(gradient), 0))


def _positive_root(b: Scalar, c: Scalar) -> Scalar:
    """The ``u >= 0`` with ``u^2 + b u = c``, without cancellation; 0 if ``c`` is not positive."""
    root = b + jnp.sqrt(b**2 + 4 * jnp.maximum(c, 0))
    return jnp.where((c > 0) & (root > 0), 2 * c / jnp.where(root > 0, root, 1), 0)
