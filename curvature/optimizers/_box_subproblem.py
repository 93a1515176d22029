"""The subproblem of bounded methods: a quadratic model within a box and a trust region."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from curvature._numerics import dot, exponent_of, norm
from curvature._types import Matrix, Scalar, Vector
from curvature.linalg._cg import start_cg, truncated_cg
from curvature.linalg._subproblems import RegionStep, factor_model, solve_region
from curvature.optimizers._bounds import Mask, StepBox, downhill, is_free

_SUFFICIENT = 1e-2  # the share of what its slope promises that a step along a projected path must bring: TRON's mu_0
_MAX_FACES = 20  # how often a step may meet new bounds
_MAX_HALVINGS = 40  # along one projected path
_BOUNDARY = 0.9  # a step this share of the radius long is limited by it


class BoxModel(NamedTuple):
    """``q(s) = g's + s'Hs / 2`` over ``lower <= s <= upper``."""

    gradient: Vector
    product: Callable[[Vector], Vector]
    hessian: Matrix | None  # for the methods that form it
    steps: StepBox


class Reached(NamedTuple):
    """A step, and the model there."""

    step: Vector
    product: Vector  # H s
    value: Scalar  # q(s)


class Path(NamedTuple):
    """A descent direction, to be projected onto the box, and how it was found.

    The search takes at least the share ``least`` of it: what surely descends.
    """

    direction: Vector
    least: Scalar
    on_boundary: Bool[Array, ""]
    inner_steps: Int[Array, ""]


class _Search(NamedTuple):
    """A step along a projected path: its share, the point it reaches, and whether the decrease suffices."""

    share: Scalar
    reached: Reached
    sufficient: Bool[Array, ""]
    count: Int[Array, ""]


class _Descent(NamedTuple):
    reached: Reached
    on_boundary: Bool[Array, ""]
    done: Bool[Array, ""]
    count: Int[Array, ""]
    inner_steps: Int[Array, ""]


FaceSolver = Callable[[BoxModel, Scalar, Reached, Mask], Path]
"""``(model, radius, reached, free) -> path`` to the minimizer over the free variables, within the radius."""


def minimize_in_box(model: BoxModel, radius: Scalar, solve_face: FaceSolver) -> tuple[RegionStep, Int[Array, ""]]:
    """A step within box and region that is at least as good as the Cauchy step, by TRON.

    The Cauchy step, along the projected path of steepest descent, says which bounds hold. Then the model is minimized
    over the variables that are free, and the projected path to that minimizer is searched. While it meets new
    bounds inside the region, the variables still free move further. So the step can gain and lose many bounds at once,
    and becomes Newton's step on the face of the solution.

    The model is first scaled by powers of two to a radius and a gradient of order 1, so that no square leaves the range
    and a step that reaches a bound reaches it exactly.

    References: Lin and Moré (1999), sections 3 to 5, doi:10.1137/S1052623498345075.
    """
    length, size = jnp.frexp(radius)[1], exponent_of(downhill(model.steps, model.gradient))
    scaled = BoxModel(
        gradient=jnp.ldexp(model.gradient, -size),
        product=lambda step: jnp.ldexp(model.product(step), length - size),
        hessian=None if model.hessian is None else jnp.ldexp(model.hessian, length - size),
        steps=StepBox(*(jnp.ldexp(bound, -length) for bound in model.steps)),
    )
    radius = jnp.ldexp(radius, -length)
    last = _descend(scaled, radius, solve_face)
    on_boundary = last.on_boundary | (norm(last.reached.step) >= _BOUNDARY * radius)
    predicted = jnp.ldexp(jnp.ldexp(-last.reached.value, size), length)
    return RegionStep(jnp.ldexp(last.reached.step, length), predicted, on_boundary), last.inner_steps


def _descend(model: BoxModel, radius: Scalar, solve_face: FaceSolver) -> _Descent:
    """The Cauchy step, then face after face until one is minimized without meeting a new bound.

    One loop for both, because each mention of the model's product is one more copy of it to compile.
    """

    def running(descent: _Descent) -> Bool[Array, ""]:
        return ~descent.done & (descent.count < _MAX_FACES)

    def descend(descent: _Descent) -> _Descent:
        old, is_first = descent.reached, descent.count == 0
        free = is_free(model.steps, old.step)
        path = jax.lax.cond(is_first, lambda: _cauchy(model, radius), lambda: solve_face(model, radius, old, free))
        new = _search(model, old, path)
        better = (new.value < old.value) | jnp.isnan(new.value)
        met = jnp.any(free & ~is_free(model.steps, new.step))
        return _Descent(
            reached=jax.tree.map(lambda new, old: jnp.where(better, new, old), new, old),
            on_boundary=path.on_boundary,
            done=~(new.value < old.value) | path.on_boundary | ~(met | is_first),
            count=descent.count + 1,
            inner_steps=descent.inner_steps + path.inner_steps,
        )

    nowhere = jnp.zeros_like(model.gradient)
    no, none = jnp.zeros_like(radius, bool), jnp.zeros_like(radius, jnp.int32)
    origin = Reached(nowhere, nowhere, jnp.zeros_like(radius))
    return jax.lax.while_loop(running, descend, _Descent(origin, no, no, none, none))


def _cauchy(model: BoxModel, radius: Scalar) -> Path:
    """Steepest descent as far as the model falls along it, its bounds left aside, and no further than the radius."""
    direction = downhill(model.steps, model.gradient)
    length = norm(direction)
    length = jnp.where(length > 0, length, 1)
    curvature = dot(direction, model.product(direction))
    share = jnp.minimum(radius / length, jnp.where(curvature > 0, length**2 / jnp.abs(curvature), jnp.inf))
    no, none = jnp.zeros_like(share, bool), jnp.zeros_like(share, jnp.int32)
    return Path(-share * direction, jnp.zeros_like(share), no, none)


def _within(model: BoxModel, start: Reached, target: Vector, free: Mask) -> tuple[Vector, Scalar]:
    """The direction to a face's minimizer, and the share of it up to the first bound, where the model still falls."""
    direction = jnp.where(free, target - start.step, 0)
    to_bound = jnp.where(direction > 0, model.steps.upper, model.steps.lower) - start.step
    shares = jnp.where(direction != 0, to_bound / jnp.where(direction != 0, direction, 1), 1)
    return direction, jnp.minimum(jnp.min(shares) * (1 + 4 * jnp.finfo(to_bound.dtype).eps), 1)  # not short of it


def _search(model: BoxModel, start: Reached, path: Path) -> Reached:
    """Halve the step ``P(start + share * direction)`` until it is far enough down, or the least."""
    slope = model.gradient + start.product

    def running(search: _Search) -> Bool[Array, ""]:
        longer = (search.count == 0) | (search.share > path.least)
        return ~search.sufficient & longer & (search.count < _MAX_HALVINGS)

    def attempt(search: _Search) -> _Search:
        share = jnp.where(search.count == 0, 1, jnp.maximum(search.share / 2, path.least))
        step = jnp.clip(start.step + share * path.direction, *model.steps)
        product = model.product(step)
        value = dot(model.gradient, step) + dot(step, product) / 2
        sufficient = value <= start.value + _SUFFICIENT * dot(slope, step - start.step)
        return _Search(share, Reached(step, product, value), sufficient | jnp.isnan(value), search.count + 1)

    one = jnp.ones_like(path.least)
    first = _Search(one, start, jnp.zeros_like(one, bool), jnp.zeros_like(one, jnp.int32))
    return jax.lax.while_loop(running, attempt, first).reached


def conjugate_gradients(forcing: Scalar, max_steps: Int[Array, ""]) -> FaceSolver:
    """Minimize over a face by conjugate gradients, to a residual of ``forcing`` times the gradient on the face."""

    def solve_face(model: BoxModel, radius: Scalar, reached: Reached, free: Mask) -> Path:
        residual = jnp.where(free, -(model.gradient + reached.product), 0)
        last = truncated_cg(
            lambda v: jnp.where(free, model.product(v), 0),
            residual,
            tolerance=forcing * jnp.linalg.norm(jnp.where(free, model.gradient, 0)),
            max_steps=max_steps,
            radius=radius,
            start=start_cg(residual, lambda r: r)._replace(x=reached.step),
        )
        return Path(*_within(model, reached, last.x, free), last.on_boundary, last.step)

    return solve_face


def by_eigenvectors(model: BoxModel, radius: Scalar, reached: Reached, free: Mask) -> Path:
    """Minimize over a face to rounding, by the eigenvectors of the Hessian of its free variables.

    The others keep a diagonal as large as the largest entry, so that the lowest eigenvalue is none of theirs.
    """
    assert model.hessian is not None
    fixed = jnp.where(free, 0, reached.step)
    gradient = jnp.where(free, model.gradient + model.product(fixed), 0)
    largest = jnp.max(jnp.abs(model.hessian))
    others = jnp.where(free, 0, jnp.where(largest > 0, largest, 1))
    matrix = jnp.where(free[:, None] & free[None], model.hessian, 0) + jnp.diag(others)
    length = norm(fixed)
    left = jnp.sqrt(jnp.maximum((radius - length) * (radius + length), 0))
    region = solve_region(factor_model(matrix, gradient), jnp.maximum(left, jnp.finfo(left.dtype).eps * radius))
    none = jnp.zeros_like(left, jnp.int32)
    return Path(*_within(model, reached, region.step, free), region.on_boundary, none)
