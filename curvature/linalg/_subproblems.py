"""Newton steps from a dense symmetric matrix that need not be positive definite."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from curvature._numerics import divide_or_zero, matmul, norm, rounding_level
from curvature._types import Matrix, Scalar, Vector

_MAX_SECULAR_STEPS = 50


def positive_definite_solve(matrix: Matrix, b: Vector) -> Vector:
    """``B^-1 b`` for a positive definite ``B`` that is ``matrix`` itself wherever Cholesky says it can be.

    Otherwise ``B`` replaces each eigenvalue of the scaled matrix by its absolute value, and those lost in rounding by
    the rounding level. So ``b' B^-1 b > 0`` always, and directions of negative curvature are followed, not fled.

    Cost: n^3 / 3 FLOPs when the matrix is positive definite, about 9 n^3 more when it is not.
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
    """The root of the diagonal, with which ``matrix / outer(s, s)`` has ones there: Jacobi scaling.

    It makes the step independent of the units of each variable, and single precision enough where those differ by many
    orders of magnitude. Where the diagonal is zero or lost in rounding the row's largest entry stands in.
    """
    magnitudes = jnp.abs(matrix)
    diagonal, largest = jnp.diagonal(magnitudes), jnp.max(magnitudes, axis=1)
    eps = jnp.finfo(matrix.dtype).eps
    chosen = jnp.where(diagonal > eps * largest, diagonal, largest)
    return jnp.sqrt(jnp.where(chosen > 0, chosen, 1))


class QuadraticModel(NamedTuple):
    """The model ``q(s) = g's + s'Hs / 2`` in the eigenvectors of ``H``: all that any radius needs."""

    eigenvalues: Vector
    vectors: Matrix
    gradient: Vector  # V'g


class RegionStep(NamedTuple):
    """A minimizer of the model within a radius, and what it promises."""

    step: Vector
    predicted: Scalar  # -q(step) >= 0
    on_boundary: Bool[Array, ""]


def factor_model(matrix: Matrix, gradient: Vector) -> QuadraticModel:
    """One eigendecomposition, about 9 n^3 FLOPs, from which ``solve_region`` takes O(n^2) for each radius."""
    eigenvalues, vectors = jnp.linalg.eigh(matrix, symmetrize_input=False)
    coordinates, magnitudes = matmul(vectors.T, gradient), jnp.abs(eigenvalues)
    noise = (magnitudes <= rounding_level(magnitudes)) & (jnp.abs(coordinates) <= rounding_level(coordinates))
    return QuadraticModel(eigenvalues, vectors, jnp.where(noise, 0, coordinates))


def solve_region(model: QuadraticModel, radius: Scalar) -> RegionStep:
    """Minimize ``g's + s'Hs / 2`` over ``norm(s) <= radius`` to rounding, the hard case included.

    With ``H = V diag(l) V'`` the minimizer is ``s = -V (V'g / (l + mu))`` for the ``mu >= max(0, -l_1)`` that puts it
    on the boundary, or ``mu = 0`` if that is inside. In the hard case, when no ``mu`` reaches the boundary because
    ``g`` is orthogonal to the lowest eigenvectors, a multiple of the lowest one is added.

    References: Conn, Gould and Toint, Trust-Region Methods (2000), section 7.3.1 and algorithm 7.3.1,
        doi:10.1137/1.9780898719857; Moré and Sorensen (1983), doi:10.1137/0904038.
    """
    eigenvalues, gradient = model.eigenvalues, model.gradient
    lowest = eigenvalues[0]
    gaps = eigenvalues - lowest  # the unknown is t = lowest + mu >= 0, so that l + mu = gaps + t has no cancellation
    floor = jnp.maximum(lowest, 0)
    share = gradient / radius  # all steps are measured in radii: their squares cannot overflow
    inside = jnp.all((gaps + floor > 0) | (share == 0)) & (norm(divide_or_zero(share, gaps + floor)) <= 1)
    t = jnp.where(inside, floor, _solve_secular(share, gaps, floor, inside))
    coordinates = -divide_or_zero(share, gaps + t)

    indefinite = lowest < -rounding_level(eigenvalues)
    rest = jnp.sqrt(jnp.maximum(1 - jnp.sum(coordinates[1:] ** 2), 0))  # differs from the entry in the hard case only
    along_lowest = jnp.where(share[0] > 0, -rest, rest)
    coordinates = radius * _with_lowest(coordinates, along_lowest, indefinite)
    predicted = -jnp.sum(coordinates * (gradient + eigenvalues * coordinates / 2))
    return RegionStep(matmul(model.vectors, coordinates), predicted, ~inside | indefinite)


def _solve_secular(share: Vector, gaps: Vector, floor: Scalar, inside: Bool[Array, ""]) -> Scalar:
    """The ``t >= floor`` with ``norm(share / (gaps + t)) = 1``, by Newton on ``1 / norm``, from the left.

    Where the step is known to end ``inside``, there is none and nothing is done.

    From the left the iterates increase to the root and never pass it, CGT lemma 7.3.2, so no safeguard is needed but
    for rounding.
    """
    tolerance = jnp.finfo(share.dtype).eps ** 0.75

    def newton(t: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        step = divide_or_zero(share, gaps + t)
        excess = norm(step) - 1
        slope = jnp.sum(divide_or_zero(step**2, gaps + t))
        return t + jnp.sum(step**2) / slope * excess, excess > tolerance  # N&W (4.44)

    start = jnp.maximum(floor, _lowest_share(share, gaps))  # a lowest coordinate alone reaches the boundary there
    return _climb(newton, start, ~inside)


def _climb(
    newton: Callable[[Scalar], tuple[Scalar, Bool[Array, ""]]], start: Scalar, needed: Bool[Array, ""]
) -> Scalar:
    """Iterate ``newton(t) -> (next t, whether t is still left of the root)`` from ``start`` to the first not left.

    The norm that ends the iteration is the one that its step is made of, so an iterate takes one. What is not
    ``needed`` is left at the start.
    """

    def step(carry: tuple[Scalar, Int[Array, ""], Bool[Array, ""]]) -> tuple[Scalar, Int[Array, ""], Bool[Array, ""]]:
        t, count, _ = carry
        following, left = newton(t)
        return jnp.where(left, following, t), count + 1, left & (count + 1 < _MAX_SECULAR_STEPS)

    return jax.lax.while_loop(lambda carry: carry[2], step, (start, jnp.zeros_like(start, jnp.int32), needed))[0]


def solve_cubic(model: QuadraticModel, weight: Scalar) -> RegionStep:
    """Minimize ``g's + s'Hs / 2 + weight norm(s)^3 / 3`` to rounding, the hard case included, for a ``weight > 0``.

    The minimizer is that of a trust region whose multiplier is ``mu = weight norm(s)``. ``predicted`` leaves the cubic
    term out; ``on_boundary`` says that the weight matters.

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
    rest = radius * jnp.sqrt(jnp.maximum(1 - jnp.sum(squares[1:]), 0))
    along_lowest = jnp.where(gradient[0] > 0, -rest, rest)
    coordinates = _with_lowest(coordinates, along_lowest, hard)
    predicted = -jnp.sum(coordinates * (gradient + eigenvalues * coordinates / 2))
    return RegionStep(matmul(model.vectors, coordinates), predicted, shift + u > rounding_level(eigenvalues))


def _solve_cubic_secular(gradient: Vector, base: Vector, shift: Scalar, weight: Scalar) -> Scalar:
    """The ``u >= 0`` with ``weight norm(gradient / (base + u)) = shift + u``, by Newton on ``1 / norm - weight / mu``.

    That is concave and increasing, so from the left the iterates increase to the root and never pass it.
    """
    tolerance = jnp.finfo(gradient.dtype).eps ** 0.75

    def newton(u: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
        step, mu = divide_or_zero(gradient, base + u), shift + u
        size = norm(step)
        pull = jnp.where(mu > 0, weight * size / jnp.where(mu > 0, mu, 1), 0)  # above 1 on the left
        slope = jnp.sum(divide_or_zero((step / size) ** 2, base + u))
        return u + (pull - 1) / (slope + pull / mu), pull - 1 > tolerance

    lowest_share = _lowest_share(gradient, base - base[0])
    alone = _positive_root(base[0] + shift, weight * lowest_share)  # were a lowest coordinate all there is,
    largest = base[-1]
    together = _positive_root(largest + shift, weight * norm(gradient) - largest * shift)  # or the highest curvature
    start = jnp.maximum(alone, together)
    return _climb(newton, start, jnp.ones_like(start, bool))


def _with_lowest(coordinates: Vector, lowest: Scalar, replaced: Bool[Array, ""]) -> Vector:
    """The coordinates with another one along the lowest eigenvector where it is ``replaced``."""
    first = np.arange(coordinates.size) == 0  # ``at[0].set`` would be a kernel of its own
    return jnp.where(first & replaced, lowest, coordinates)


def _lowest_share(gradient: Vector, gaps: Vector) -> Scalar:
    """The largest part of the gradient along an eigenvector of the lowest eigenvalue, of which there may be several."""
    return jnp.max(jnp.where(gaps == 0, jnp.abs(gradient), 0))


def _positive_root(b: Scalar, c: Scalar) -> Scalar:
    """The ``u >= 0`` with ``u^2 + b u = c``, without cancellation; 0 where ``c`` is not positive."""
    root = b + jnp.sqrt(b**2 + 4 * jnp.maximum(c, 0))
    return jnp.where((c > 0) & (root > 0), 2 * c / jnp.where(root > 0, root, 1), 0)
