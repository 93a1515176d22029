"""Residuals around a point: linearized once, weighted by a robust loss, and factored where that is small."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from curvature import _checks
from curvature._errors import caller
from curvature._numerics import dot, matmul, norm, rounding_level
from curvature._sharding import vary_like
from curvature._trees import num_entries, ravel, select
from curvature._types import Scalar, Tree, Vector
from curvature.linalg._subproblems import QuadraticModel
from curvature.operators._base import matrix_of_products
from curvature.operators._jacobian_operators import push_and_pull
from curvature.optimizers._method import noise_of
from curvature.optimizers._robust import Weighted, half_sum, weigh
from curvature.programs._traced import Program, trace
from curvature.transforms._hessian import linearize_grad
from curvature.transforms._jacobian import map_basis
from curvature.transforms._modes import choose_jacobian, pays_forward

Matrix = Float[Array, "m n"]
Product = Callable[[Array], Array]

LOST = 2  # heuristic: singular values, and gradients beside the residuals, of 2 n roundings are zero
_SAMPLES = 3  # random signs by which the norm of a second derivative is estimated: rarely too small by a factor of 10
_NUM_COEFFICIENTS = 2 + 2 * _SAMPLES
_PROBES = 8  # random rows by which the norms of columns are estimated where no column is formed


class Factors(NamedTuple):
    """``J = U diag(values) V' diag(columns)``, columns of norm one inside; what is lost in rounding is zero."""

    columns: Vector
    values: Float[Array, " k"]
    vectors: Float[Array, "n k"]
    coordinates: Float[Array, " k"]  # U' r
    left: Float[Array, "m k"]  # U

    def jacobian(self) -> Matrix:
        """``J`` without what is lost in rounding."""
        return matmul(self.left * self.values[None], self.vectors.T) * self.columns[None]

    def leave(self, vector: Array) -> Array:
        """What the range of ``J`` leaves of a vector."""
        left = jnp.where(self.values > 0, self.left, 0)
        for _ in range(2):  # the second time takes what rounding of the first has left
            vector = vector - matmul(left, matmul(left.T, vector))
        return vector

    def inverse_root(self) -> tuple[Float[Array, "n k"], Bool[Array, " n"]]:
        """A matrix ``B`` with ``B B'`` the pseudo-inverse of ``J'J``, and which variables ``J`` determines."""
        kept = (self.values > 0)[None]
        found = jnp.sum(jnp.where(kept, self.vectors, 0) ** 2, axis=1)  # 1 for a variable seen in full
        seen = (self.columns > 0) & (found > 1 - jnp.finfo(found.dtype).eps ** 0.5)
        scaled = jnp.where(kept, self.vectors / jnp.where(kept, self.values[None], 1), 0)
        return scaled / where_positive(self.columns)[:, None], seen


class SecondOrder(NamedTuple):
    """Sums ``sum_i c_i H_i`` of the Hessians of the residuals, for the coefficients that a convergence test needs.

    ``matrix`` is what the Hessian of the value has beside ``J'J``, with ``c = r``. It is small beside the terms that it
    sums where the residuals are orthogonal to their second derivatives, so that its rounding is measured: ``noise``
    has the rounding of ``r``, of random sign. ``bends`` have random signs, and ``leaving`` what the range of ``J``
    leaves of those: ``v'(sum_i c_i H_i)v`` samples the norm of the second derivative of the residuals along ``v``, and
    of its part that no step can make up for.
    """

    matrix: Float[Array, "n n"]
    noise: Float[Array, "n n"]
    bends: Float[Array, "k n n"]
    leaving: Float[Array, "k n n"]

    @classmethod
    def none(cls, x: Vector) -> "SecondOrder":
        """Zeros, where nothing is evaluated."""
        square = (x.size, x.size)
        zero, zeros = jnp.zeros_like(x, shape=square), jnp.zeros_like(x, shape=(_SAMPLES, *square))
        return cls(zero, zero, zeros, zeros)


class Linearized(NamedTuple):
    """Residuals around a point, in flat vectors of at least single precision, their rows weighted by the loss.

    ``factors`` has the Jacobian where it is formed, and ``second_order(tested)`` evaluates sums of second derivatives,
    those beyond ``matrix`` where they are ``tested`` (None: never), if ``residuals`` has any; ``push`` and ``pull`` are
    products with the Jacobian.
    """

    x: Vector
    out: Tree  # the residuals as they come
    value: Scalar
    noise: Scalar  # the change of the value that rounding alone can make
    residual: Float[Array, " m"]  # J' residual is the gradient
    grad: Vector
    columns: Vector  # the norms of the columns of J, estimated where J is not formed; those of zero columns are zero
    factors: Factors | None
    second_order: Callable[[Bool[Array, ""] | None], SecondOrder] | None
    push: Product
    pull: Product
    value_after: Callable[[Vector], Scalar]


def trace_residuals(residual_fn: Callable[[Tree], Any], x: Tree) -> Program:
    """The residuals traced at ``x``, once they are known to be arrays of floats."""
    program = trace(lambda x: (_checks.check_arrays("residuals", residual_fn(x)), None), x)
    _check_residuals(program.out)
    return program


def linearize_residuals(
    residual_fn: Callable[[Tree], Any], x: Tree, *, loss: str, scale: Scalar, dense: bool
) -> Linearized:
    """One evaluation of the residuals, and their derivative: a factored matrix, or products with it."""
    program = trace_residuals(residual_fn, x)
    point, unravel = ravel(x)
    out, push, pull, matrix = (_dense_map if dense else _linear_map)(program)
    scale = jnp.asarray(scale, point.dtype)
    weighted = weigh(flat(out, point.dtype), loss, scale)
    value, weights, residual = weighted.value, weighted.weights, weighted.residual
    factors = None if matrix is None else factor(weights[:, None] * matrix, residual)
    columns = _estimated_columns(pull, weights) if factors is None else factors.columns

    def value_at(x: Vector) -> Scalar:
        return half_sum(flat(program.fun(unravel(x))[0], point.dtype), loss, scale)

    return Linearized(
        x=point,
        out=out,
        value=value,
        noise=noise_of(value) + jnp.sqrt(2 * value) * rounding_of(columns, point),
        residual=residual,
        grad=pull(weights * residual),
        columns=columns,
        factors=factors,
        second_order=None if factors is None else _second_order(program, flat(out, point.dtype), weighted, factors),
        push=lambda v: weights * push(v),
        pull=lambda w: pull(weights * w),
        value_after=lambda step: value_at(point + step),
    )


def weighted_jacobian(residual_fn: Callable[[Tree], Any], x: Tree, *, loss: str, scale: Scalar) -> Matrix:
    """The Jacobian of the residuals with its rows weighted by the loss, as ``linearize_residuals`` factors it."""
    out, _, _, matrix = _dense_map(trace_residuals(residual_fn, x))
    return weigh(flat(out, matrix.dtype), loss, scale).weights[:, None] * matrix


def _second_order(
    program: Program, residual: Array, weighted: Weighted, factors: Factors
) -> Callable[[Bool[Array, ""] | None], SecondOrder] | None:
    """The Hessians of ``c'r(x)`` for fixed ``c``; None where ``residuals`` has none.

    With few variables they are contracted from the Hessians of all residuals; else they are formed one after the other.
    """
    if program.jaxpr is None or program.composition_blocker("fwd_over_fwd") is not None:
        return None
    point, unravel = ravel(program.x)
    n, m = point.size, residual.size
    shape = (_NUM_COEFFICIENTS, n, n)

    def residuals(x: Vector) -> Float[Array, " m"]:
        return flat(program.fun(unravel(x))[0], point.dtype)

    def contracted(coefficients: Float[Array, "k m"]) -> Float[Array, "k n n"]:
        each = jax.jacfwd(jax.jacfwd(residuals))(point)
        return jnp.reshape(matmul(coefficients, jnp.reshape(each, (m, n**2))), (-1, n, n))

    def hessian(coefficients: Float[Array, " m"]) -> Float[Array, "n n"]:
        rows = map_basis(linearize_grad(lambda x: dot(coefficients, residuals(x)), point)[2], point, None)
        return (rows + rows.T) / 2

    is_small = pays_forward(program)

    def evaluate(tested: Bool[Array, ""] | None) -> SecondOrder:
        if tested is None:
            coefficients = (weighted.slope * residual)[None]
        else:
            coefficients = _coefficients(residual, point, weighted, factors)
        if is_small:
            hessians = jnp.zeros(shape, point.dtype).at[: len(coefficients)].set(contracted(coefficients))
        elif tested is None:
            hessians = jnp.zeros(shape, point.dtype).at[0].set(hessian(coefficients[0]))
        else:
            hessians = jax.lax.fori_loop(
                0,
                jnp.where(tested, _NUM_COEFFICIENTS, 1),
                lambda i, hessians: hessians.at[i].set(hessian(coefficients[i])),
                vary_like(jnp.zeros(shape, point.dtype), coefficients),
            )
        matrix = hessians[0]
        if weighted.excess is not None:
            rows = factors.jacobian()
            excess = jnp.where(weighted.weights > 0, weighted.excess / where_positive(weighted.weights) ** 2, 0)
            matrix += matmul(rows.T, excess[:, None] * rows)
        return SecondOrder(matrix, hessians[1], hessians[2::2], hessians[3::2])

    return evaluate


def _coefficients(residual: Array, x: Vector, weighted: Weighted, factors: Factors) -> Float[Array, "k m"]:
    """Of ``SecondOrder``, in the order in which they are evaluated."""
    eps = jnp.finfo(x.dtype).eps
    signs = jax.random.rademacher(jax.random.key(0), (1 + _SAMPLES, residual.size), x.dtype)
    weights = weighted.weights
    rounding = jnp.abs(residual) + matmul(jnp.abs(factors.jacobian()), jnp.abs(x)) / where_positive(weights)
    rows = [weighted.slope * residual, weighted.slope * signs[0] * eps * rounding]
    for sign in signs[1:]:
        rows += [weights * sign, weights * factors.leave(sign)]
    return jnp.stack(rows)


def flat(tree: Tree, dtype: Any) -> Array:
    """All entries as one vector."""
    return ravel(tree)[0].astype(dtype)


def rounding_of(columns: Vector, x: Vector) -> Scalar:
    """How far rounding of ``x`` can move the residuals: ``eps sum_k norm(J_k) abs(x_k)``."""
    return jnp.finfo(x.dtype).eps * jnp.sum(columns * jnp.abs(x))


def _dense_map(program: Program) -> tuple[Tree, Product, Product, Matrix]:
    """The residuals, products with their Jacobian, and it, by forward or reverse mode."""
    dtype = ravel(program.x)[0].dtype

    def fun(x: Tree) -> Tree:
        return program.fun(x)[0]

    if choose_jacobian(program, "auto") == "fwd":
        out, push = jax.linearize(fun, program.x)
        matrix = matrix_of_products(map_basis(push, program.x, "auto"), num_entries(program.x)).T
    else:
        out, pull = jax.vjp(fun, program.x)
        matrix = matrix_of_products(map_basis(lambda w: pull(w)[0], out, "auto"), num_entries(out))
    matrix = matrix.astype(dtype)
    return out, lambda v: matmul(matrix, v), lambda w: matmul(matrix.T, w), matrix


def _linear_map(program: Program) -> tuple[Tree, Product, Product, None]:
    """The residuals and products with their Jacobian, which is never formed."""
    out, push, pull = push_and_pull("residuals", program, select("", program.x, ""))
    point, unravel = ravel(program.x)
    residual, restore = ravel(out)

    def push_flat(v: Array) -> Array:
        return flat(push(unravel(v)), point.dtype)

    def pull_flat(w: Array) -> Array:
        return flat(pull(restore(w.astype(residual.dtype))), point.dtype)

    return out, push_flat, pull_flat, None


def _estimated_columns(pull: Product, weights: Array) -> Vector:
    """The norms of the columns of ``J`` from ``E (J'z)_j^2 = norm(J_j)^2`` over a few vectors of random signs.

    They scale the variables and decide nothing, so that a fixed key will do.
    """
    signs = jax.random.rademacher(jax.random.key(0), (_PROBES, weights.size), weights.dtype)
    samples = jax.vmap(lambda z: pull(weights * z))(signs)
    return _column_norms(samples) / _PROBES**0.5


def _column_norms(matrix: Matrix) -> Vector:
    """The Euclidean norms of the columns, safe from overflow and underflow of the squares."""
    exponents = jnp.frexp(jnp.max(jnp.abs(matrix), axis=0))[1]
    return jnp.ldexp(jnp.linalg.norm(jnp.ldexp(matrix, -exponents[None]), axis=0), exponents)


def factor(matrix: Matrix, residual: Array) -> Factors:
    """The singular value decomposition of ``J`` with its columns brought to norm one; ``J'J`` is never formed.

    Singular values below ``2 n`` roundings of the largest are zero, and so is what the residuals have there. That is
    what rounding of the entries makes of a zero, however many rows there are; a bound that grows with the rows takes
    what the residuals determine for undetermined, and ends on a plateau.

    Cost: about 6 m n^2 + 20 n^3 FLOPs for m >= n.
    """
    columns = _column_norms(matrix)
    left, values, right = jnp.linalg.svd(matrix / where_positive(columns)[None], full_matrices=False)
    kept = values > LOST * matrix.shape[1] * jnp.finfo(matrix.dtype).eps * values[0]
    coordinates = jnp.where(kept, matmul(left.T, residual), 0)
    return Factors(columns, jnp.where(kept, values, 0), right.T, coordinates, left)


def where_positive(norms: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Norms as divisors: 1 for those that are zero, along which nothing moves."""
    return jnp.where(norms > 0, norms, 1)


def region_model(factors: Factors, scale: Vector) -> tuple[QuadraticModel, Scalar]:
    """``norm(J q / scale + r)^2 / 2`` in the scaled variables ``q``, divided by the square of a peak, and the peak.

    Directions that ``factor`` has dropped have neither curvature nor slope, so no step goes along them.

    Cost: about 20 n^3 FLOPs.
    """
    rows = factors.values[:, None] * factors.vectors.T * (factors.columns / scale)[None]
    left, values, right = jnp.linalg.svd(rows, full_matrices=False)
    coordinates = matmul(left.T, factors.coordinates)
    noise = (values <= rounding_level(values)) & (jnp.abs(coordinates) <= rounding_level(coordinates))
    values, coordinates = jnp.where(noise, 0, values), jnp.where(noise, 0, coordinates)
    peak = where_positive(values[0])
    values, coordinates = values[::-1] / peak, coordinates[::-1] / peak
    return QuadraticModel(values**2, right[::-1].T, values * coordinates), peak


def offset(local: Linearized) -> Scalar:
    """``norm(P r)``: how much of the residuals the linear model can still remove.

    ``P`` projects on the range of ``J``; where that is not formed, on the image of the scaled gradient, which is the
    first direction of conjugate gradients.
    """
    if local.factors is not None:
        return norm(local.factors.coordinates)
    scale = where_positive(local.columns)
    gradient = local.grad / scale
    image = norm(local.push(gradient / scale))
    return norm(gradient) * (norm(gradient) / where_positive(image))


def _check_residuals(out: Any) -> None:
    """Refuse residuals that are one scalar, have no derivative, or have no entries."""
    _checks.check_floating_output("residuals", out)
    leaves = jax.tree.leaves(out)
    if len(leaves) == 1 and leaves[0].shape == ():
        raise TypeError(
            f"{caller()}: residuals returns a scalar, expected the residuals themselves, of shape (m,) or a tree of "
            "arrays, whose squares are summed here; curvature.minimize takes scalar objectives."
        )
    if not sum(leaf.size for leaf in leaves):
        raise TypeError(f"{caller()}: residuals returns no entries, expected at least one number.")
