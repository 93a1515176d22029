"""The Hessian of a sum of squares in the singular vectors of the Jacobian, where rounding hides least of it."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from curvature._numerics import matmul, norm
from curvature._types import Matrix, Scalar, Vector
from curvature.linalg._subproblems import QuadraticModel, factor_model
from curvature.optimizers._residuals import LOST, Linearized, SecondOrder, rounding_of, where_positive

_SPREAD = 4  # heuristic: how far beyond one sample of the rounding of second derivatives their rounding may go


class Hessian(NamedTuple):
    """``B = diag(values^2) + second`` in the right singular vectors of ``J / scale``, and the gradient there.

    ``J'J`` and ``S = sum_i r_i H_i`` are never added where the one would round the other away: directions that ``J``
    does not see, or hardly, have their curvature from ``S`` alone.
    """

    scale: Vector
    vectors: Matrix  # a column for each direction
    values: Vector  # the singular values, descending; zero where they are lost in rounding
    coordinates: Vector  # U'r
    gradient: Vector
    second: Matrix
    noise: Vector  # by direction, what rounding may make of the diagonal of ``second``
    size: Scalar  # norm(r), beside which rounding makes the gradient of unit columns

    def to_variables(self, coordinates: Array) -> Array:
        """Coordinates along the directions, or columns of them, in the unscaled variables."""
        moved = matmul(self.vectors, coordinates)
        return moved / (self.scale if moved.ndim == 1 else self.scale[:, None])


class Newton(NamedTuple):
    """Newton's step where the Hessian is positive, and what it promises; an infinite decrement where it is not."""

    step: Vector
    predicted: Scalar  # the decrease of the value
    decrement: Scalar


def hessian_in(linear: Linearized, second: SecondOrder, scale: Vector) -> Hessian:
    """The Hessian in the variables ``scale * x``.

    Cost: about 30 n^3 FLOPs.
    """
    assert linear.factors is not None
    factors, n = linear.factors, scale.size
    rows = factors.values[:, None] * factors.vectors.T * (factors.columns / scale)[None]
    left, values, right = jnp.linalg.svd(rows, full_matrices=True)
    unseen = (0, n - values.size)  # where residuals are fewer than variables
    coordinates = jnp.pad(matmul(left.T, factors.coordinates), unseen)
    values = jnp.pad(jnp.where(values > LOST * n * jnp.finfo(values.dtype).eps * values[0], values, 0), unseen)
    noise = _in_directions(second.noise, scale, right)
    return Hessian(
        scale=scale,
        vectors=right.T,
        values=values,
        coordinates=jnp.where(values > 0, coordinates, 0),
        gradient=jnp.where(values > 0, values * coordinates, matmul(right, linear.grad / scale)),
        second=_in_directions(second.matrix, scale, right),
        noise=_SPREAD * jnp.linalg.norm(noise, axis=1),
        size=norm(linear.residual),
    )


def hessian_model(hessian: Hessian) -> QuadraticModel:
    """The quadratic model of the sum; along directions that are lost in rounding it is level.

    Cost: about 9 n^3 FLOPs.
    """
    curvature = hessian.values**2 + jnp.diagonal(hessian.second)
    known = (jnp.abs(curvature) > hessian.noise) | (hessian.values > 0)
    known |= jnp.abs(hessian.gradient) > _gradient_noise(hessian)
    matrix = jnp.where(known[:, None] & known[None], jnp.diag(hessian.values**2) + hessian.second, 0)
    model = factor_model(matrix, jnp.where(known, hessian.gradient, 0))
    return model._replace(vectors=matmul(hessian.vectors, model.vectors))


def newton(linear: Linearized, second: SecondOrder) -> Newton:
    """The step ``-B^-1 g`` and the decrement ``sqrt(g' B^-1 g)``, which is infinite unless ``B`` is positive.

    Half its square is the decrease that Newton's method expects, so that it compares with ``norm(r)`` in any units of
    the variables and of the residuals, as ``offset`` does, which it equals where the residuals are linear. But it
    needs no rank of ``J``: near the minimizer 0 of ``x^2 + 5`` any ``J = 2x`` spans the residuals, while
    ``g^2 / B = 10 x^2``. Where the sum rises to a plateau it curves down along some direction, and the decrement is
    infinite.

    The variables are scaled by ``sqrt(norm(J_k)^2 + abs(S_kk))``, and so are then the singular vectors of ``J``. A
    curvature counts as positive where it exceeds what rounding makes of it. Along directions in which curvature and
    gradient are both lost in rounding, ``J`` decides, whose singular values are known where their squares are not:
    ``offset`` is what they leave. And a curvature that may be negative, unseen, may be worth what ``_hidden_along``
    says.
    """
    scale = where_positive(jnp.sqrt(linear.columns**2 + jnp.abs(jnp.diagonal(second.matrix))))
    hessian = hessian_in(linear, second, scale)
    size = jnp.maximum(jnp.abs(jnp.diagonal(hessian.second)), hessian.noise)
    unit = where_positive(jnp.sqrt(hessian.values**2 + size))
    matrix = jnp.diag(hessian.values**2) + hessian.second
    eigenvalues, vectors = jnp.linalg.eigh(matrix / unit[:, None] / unit[None], symmetrize_input=False)
    eps = jnp.finfo(unit.dtype).eps
    noise = matmul(jnp.abs(vectors.T), jnp.sqrt(hessian.noise) / unit) ** 2 + unit.size * eps
    gradient = matmul(vectors.T, hessian.gradient / unit)
    positive, flat = eigenvalues > noise, jnp.abs(eigenvalues) <= noise
    lost = flat & (jnp.abs(gradient) <= matmul(jnp.abs(vectors.T), _gradient_noise(hessian) / unit))
    root = jnp.sqrt(jnp.where(positive, eigenvalues, 1))
    along = jnp.where(positive, gradient / root, 0)
    directions = jnp.where(flat, vectors, 0) / unit[:, None]
    left_over, step = _offset_along(hessian, directions)
    predicted = jnp.hypot(norm(along), left_over)
    decrement = jnp.hypot(predicted, _hidden_along(linear, hessian, second, directions, noise))
    convex = jnp.all(positive | lost) & jnp.isfinite(decrement)
    step = hessian.to_variables(step - matmul(vectors, along / root) / unit)
    return Newton(jnp.where(convex, step, 0), predicted**2 / 2, jnp.where(convex, decrement, jnp.inf))


def _gradient_noise(hessian: Hessian) -> Vector:
    eps = jnp.finfo(hessian.size.dtype).eps
    return jnp.full_like(hessian.gradient, LOST * hessian.gradient.size * eps * hessian.size)


def _offset_along(hessian: Hessian, directions: Matrix) -> tuple[Scalar, Vector]:
    """``offset`` with variables that move along these directions only, and the step that removes it."""
    images = hessian.values[:, None] * directions
    sizes = where_positive(jnp.linalg.norm(images, axis=0))  # directions of norm one where their images are
    left, values, right = jnp.linalg.svd(images / sizes[None], full_matrices=False)
    kept = values > LOST * values.size * jnp.finfo(values.dtype).eps * values[0]
    coordinates = jnp.where(kept, matmul(left.T, hessian.coordinates), 0)
    step = -matmul(right.T, coordinates / jnp.where(kept, values, 1))
    return norm(coordinates), matmul(directions, step / sizes)


def _hidden_along(
    linear: Linearized, hessian: Hessian, second: SecondOrder, directions: Matrix, noise: Vector
) -> Scalar:
    """What curvatures of ``-noise`` along these directions would let a step remove of the residuals.

    After a step ``t v``, made up for by the other directions as far as ``J`` goes, half the sum is
    ``-noise t^2 / 2 + norm(h)^2 t^4 / 8`` from where it was, with ``h`` what the range of ``J`` leaves of the second
    derivative of the residuals along ``v``. The least of that is ``-(noise / norm(h))^2 / 2``, and nothing where
    ``noise / norm(h)`` is no more than what rounding makes of the residuals. Where ``h`` is rounding too, as for
    parameters of which only the product shows, the direction is flat.
    """
    moved = hessian.to_variables(directions)
    bend, leaving = (
        jnp.sqrt(jnp.mean(jnp.einsum("kab,ai,bi->ki", sums, moved, moved, precision="highest") ** 2, axis=0))
        for sums in (second.bends, second.leaving)
    )
    curved = leaving > LOST * noise.size * jnp.finfo(noise.dtype).eps * bend
    hidden = jnp.where(curved, noise / jnp.where(curved, leaving, 1), 0)
    return norm(jnp.where(hidden > 2 * _SPREAD * rounding_of(linear.columns, linear.x), hidden, 0))


def _in_directions(matrix: Matrix, scale: Vector, right: Matrix) -> Matrix:
    return matmul(right, matmul(matrix / scale[:, None] / scale[None], right.T))
