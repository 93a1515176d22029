"""The method of Levenberg and Marquardt as a trust region in scaled variables, and two cheaper subproblems."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, matmul, norm
from curvature._types import Scalar, Vector
from curvature.linalg._subproblems import QuadraticModel, RegionStep, solve_region
from curvature.optimizers import _residual_method
from curvature.optimizers._forcing import first_norm, inner_solve
from curvature.optimizers._globalize import GOOD, POOR, Trial
from curvature.optimizers._method import Local, Unevaluated, choose, reused
from curvature.optimizers._residual_hessian import hessian_in, hessian_model
from curvature.optimizers._residual_method import Curvature, Request, ResidualMethod
from curvature.optimizers._residuals import Linearized, region_model, where_positive
from curvature.optimizers._trust_region import RegionSolver, search_radius, steihaug

LeastSquaresSubproblem = Literal["exact", "dogleg", "cg"]

_SHORTER = 0.1  # heuristic: of a region that led to where derivatives are not finite, the share to try next
_FIRST_RADIUS = 100.0  # in norms of the scaled start, as in MINPACK


class LastStep(NamedTuple):
    """The last step of ``levenberg_marquardt``, and by how much it and its linear model changed the sum.

    Attributes:
        step: from the point before.
        slope: the gradient there times the step.
        change: of half the sum of squares.
        by_jacobian: the change that the linear model had foreseen.
        noise: the change that rounding alone could have made.
    """

    step: Float[Array, " n"]
    slope: Float[Array, ""]
    change: Float[Array, ""]
    by_jacobian: Float[Array, ""]
    noise: Float[Array, ""]


class LevenbergMarquardtState(NamedTuple):
    """The state of ``levenberg_marquardt``: plain arrays, ready for a checkpoint.

    Attributes:
        radius: the radius for the next step, in the scaled variables; 0 before the first.
        scale: by variable, the largest norm that its column of the Jacobian has had.
        second_order: whether the last step has shown the Hessian to be the better model.
        last: the last step, by which that is decided at the next point.
        decrement: the Newton decrement where the update started; infinite where the Hessian was not evaluated.
        num_trials: the points that the last update tried.
        num_inner_steps: the conjugate gradient steps of the last update; 0 where the Jacobian is formed.
        grad_norm: the norm of the first scaled gradient, by which the inner tolerance is measured.
        status: a ``Status``: running, or why the last update could not move.
        stored: nothing, for optax.
    """

    radius: Float[Array, ""]
    scale: Float[Array, " n"]
    second_order: Bool[Array, ""]
    last: LastStep
    decrement: Float[Array, ""]
    num_trials: Int[Array, ""]
    num_inner_steps: Int[Array, ""]
    grad_norm: Float[Array, ""]
    status: Int[Array, ""]
    stored: Unevaluated


@public
def levenberg_marquardt(
    subproblem: LeastSquaresSubproblem = "exact", *, initial_radius: float | Array | None = None
) -> ResidualMethod:
    """The method of Levenberg and Marquardt: an optax transformation for sums of squares ``norm(r)^2 / 2``.

    A step minimizes the linear model ``norm(J s + r)^2 / 2`` over ``norm(D s) <= radius``, which for a multiplier
    ``mu`` is the damped step ``-(J'J + mu D^2)^-1 J'r``; ``D`` has for each variable the largest norm that its column
    of ``J`` has had, so that the units of the variables change nothing. The region shrinks until the sum falls by a
    fair share of what the model promised, and follows the length of good steps. Changes below the rounding of the sum
    count as promised and delivered.

    ``"exact"`` replaces ``J'J`` by the whole Hessian ``J'J + sum_i r_i H_i`` for as long as that would have foreseen
    the last change of the sum better: Gauss-Newton is right where residuals are small, and slow or astray where they
    are large and curved. Where ``least_squares`` asks for the Newton decrement, because steps lead nowhere or ``J`` has
    lost rank, the step is Newton's if the Hessian is positive, cut at the radius; if not, ``"exact"`` minimizes the
    quadratic model with the whole Hessian.

    Use it where ``optax.lbfgs()`` stands: ``update(grad, state, params, value=, grad=, value_fn=, residual_fn=)``
    returns the step to an accepted point. ``residual_fn(params)`` returns the residuals, any tree of floating arrays;
    all else follows from them, so that the other arguments may be left out, and data goes to ``residual_fn`` by name.
    If no step is found, it is zero and ``state.status`` says why.

    Args:
        subproblem: ``"exact"`` forms ``J`` and solves the subproblem to rounding by a singular value decomposition,
            which never squares its condition. ``"dogleg"`` takes the path by the steepest descent to the Gauss-Newton
            step, from the same decomposition. ``"cg"`` never forms ``J``: conjugate gradients on ``J'J``, stopped at
            the boundary or at a residual that falls with the gradient; ``D`` is then estimated.
        initial_radius: the radius of the first step, in the scaled variables; ``None`` is ``100 norm(D x)``, or
            ``100 norm(r)`` at zero.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``LevenbergMarquardtState``. The same settings
        return the same object, so that the compiled ``least_squares`` is reused.

    Raises:
        ValueError: for an unknown subproblem or a radius out of range; from ``update`` when an argument is missing.

    Cost: for each update one linearization of the residuals, one evaluation at each trial, and about
        ``6 m n^2 + 40 n^3`` FLOPs for m residuals of n variables, with n Hessian products where the Hessian is the
        model; or for ``"cg"`` a JVP and a VJP for each step of
        conjugate gradients, and 8 VJPs for ``D``. No Jacobian is computed at a rejected point.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> rosenbrock = lambda x: jnp.array([10 * (x[1] - x[0] ** 2), 1 - x[0]])
        >>> x, solver = jnp.array([-1.2, 1.0]), curvature.levenberg_marquardt()
        >>> state = solver.init(x)
        >>> @jax.jit
        ... def step(x, state):
        ...     updates, state = solver.update(None, state, x, residual_fn=rosenbrock)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(20):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3)
        Array([1., 1.], dtype=float32)

    References: Moré, The Levenberg-Marquardt algorithm (1978), doi:10.1007/BFb0067700; Dennis, Gay and Welsch, An
        adaptive nonlinear least-squares algorithm (1981), section 4, doi:10.1145/355958.355965, on the choice between
        the models, here with exact second derivatives; Nocedal and Wright, Numerical
        Optimization, 2nd ed. (2006), section 10.3 and (4.16) for the dogleg.
    """
    _checks.check_choice("subproblem", subproblem, LeastSquaresSubproblem)
    if initial_radius is not None:
        _checks.check_positive("initial_radius", initial_radius)
    return _build(subproblem, initial_radius)


@reused
def _build(subproblem: LeastSquaresSubproblem, initial_radius: float | Array | None) -> ResidualMethod:
    def start(x: Vector) -> dict[str, Any]:
        zero = jnp.asarray(0, x.dtype)
        return {
            "radius": jnp.asarray(0 if initial_radius is None else initial_radius, x.dtype),
            "scale": jnp.zeros_like(x),
            "second_order": jnp.asarray(False),
            "last": LastStep(jnp.zeros_like(x), zero, zero, zero, zero),
            "decrement": jnp.asarray(jnp.inf, x.dtype),
        }

    def step(
        state: LevenbergMarquardtState, linear: Linearized, request: Request
    ) -> tuple[Vector, LevenbergMarquardtState]:
        largest = jnp.maximum(state.scale, jnp.where(jnp.isfinite(linear.columns), linear.columns, 0))
        scale = where_positive(largest)
        local = _residual_method.scaled_local(linear, scale)
        size = norm(local.grad)
        first = first_norm(state.grad_norm, size)
        size_of_x = norm(scale * linear.x)
        first_radius = _FIRST_RADIUS * jnp.where(size_of_x > 0, size_of_x, norm(linear.residual))
        radius = jnp.where(state.radius > 0, state.radius, first_radius)
        radius = jnp.where(request.shorter, _SHORTER * radius, radius)
        second_order = state.second_order
        if subproblem == "exact":
            second_order = jnp.where(request.shorter, second_order, _second_is_better(linear, state))
        curvature = _residual_method.curvature_if(second_order, request, linear)
        if subproblem == "cg":
            solve = steihaug(local, inner_solve(local, size, first, None))
        else:
            by_second = second_order | (request.decrement & (subproblem == "exact"))
            solve = _factored(linear, scale, subproblem, by_second, curvature)
        last = search_radius(local, solve, radius)
        return last.take_step(
            state,
            scale,
            accepted=_next_radius(last),
            rejected=POOR * radius,
            scale=largest,
            second_order=second_order,
            last=_last_step(linear, local, scale, last),
            decrement=_residual_method.decrement_of(curvature, size),
            num_inner_steps=last.inner_steps,
            grad_norm=first,
        )

    return _residual_method.residual_method(LevenbergMarquardtState, step, dense=subproblem != "cg", start=start)


def _next_radius(last: Trial) -> Scalar:
    """Twice the length of a good step, as Moré (1978) and MINPACK have it, and never left far beyond the steps."""
    length = norm(last.step)
    follow = (last.ratio >= GOOD) | ~last.on_boundary
    return jnp.where(last.ratio < POOR, POOR * length, jnp.where(follow, 2 * length, last.size))


def _last_step(linear: Linearized, local: Local, scale: Vector, last: Trial) -> LastStep:
    step = last.step / scale
    slope = dot(local.grad, last.step)
    return LastStep(step, slope, last.value - local.value, slope + norm(linear.push(step)) ** 2 / 2, local.noise)


def _second_is_better(linear: Linearized, state: LevenbergMarquardtState) -> Bool[Array, ""]:
    """Whether the Hessian would have foreseen the last change of the sum better than the Jacobian did.

    With the third derivative ``t`` along the step, a Hessian would have missed the change by ``t / 6`` to leading
    order, and the mean of the slopes at both ends misses it by ``-t / 12``. So twice the error of that mean stands for
    the error of a Hessian that was not evaluated. A change within rounding changes no opinion.
    """
    if linear.second_order is None or linear.residual.size < linear.x.size:
        return state.second_order
    last = state.last
    slopes = (last.slope + dot(linear.grad, last.step)) / 2
    decides = (jnp.abs(last.change) > last.noise) & jnp.isfinite(slopes)
    better = 2 * jnp.abs(last.change - slopes) < jnp.abs(last.change - last.by_jacobian)
    return jnp.where(decides, better, state.second_order)


def _factored(
    linear: Linearized, scale: Vector, subproblem: str, by_second: Bool[Array, ""], curvature: Curvature | None
) -> RegionSolver:
    """The subproblem in the eigenvectors of its matrix: each radius takes O(n^2)."""
    assert linear.factors is not None
    factors = linear.factors

    def by_jacobian() -> tuple[QuadraticModel, Scalar]:
        model, peak = region_model(factors, scale)
        unseen = (scale.size - model.eigenvalues.size, 0)  # where residuals are fewer than variables
        vectors = jnp.pad(model.vectors, ((0, 0), unseen))
        return QuadraticModel(jnp.pad(model.eigenvalues, unseen), vectors, jnp.pad(model.gradient, unseen)), peak

    def by_hessian() -> tuple[QuadraticModel, Scalar]:
        assert curvature is not None
        return hessian_model(hessian_in(linear, curvature.second, scale)), jnp.ones_like(linear.value)

    model, peak = by_jacobian() if curvature is None else jax.lax.cond(by_second, by_hessian, by_jacobian)

    def solve(radius: Scalar) -> tuple[RegionStep, int]:
        region = (_dogleg if subproblem == "dogleg" else solve_region)(model, radius)
        region = region._replace(predicted=peak * (peak * region.predicted))
        return region if curvature is None else _newton_within(curvature, scale, radius, region), 0

    return solve


def _newton_within(curvature: Curvature, scale: Vector, radius: Scalar, otherwise: RegionStep) -> RegionStep:
    """Newton's step where it is known, cut at the radius: it keeps what the eigenvectors of the whole matrix lose."""
    step = scale * curvature.newton.step
    length = norm(step)
    share = jnp.minimum(radius / where_positive(length), 1)
    newton = RegionStep(share * step, share * (2 - share) * curvature.newton.predicted, length > radius)
    return choose(curvature.helps(), newton, otherwise)


def _dogleg(model: QuadraticModel, radius: Scalar) -> RegionStep:
    """The point at the radius on the path from zero by the Cauchy point to the Gauss-Newton point: N&W (4.16)."""
    share = model.gradient / radius  # steps are measured in radii: their squares cannot overflow
    curved = model.eigenvalues > 0
    newton = -jnp.where(curved, share / jnp.where(curved, model.eigenvalues, 1), 0)
    slope, bend = jnp.sum(share**2), jnp.sum(model.eigenvalues * share**2)
    cauchy = -jnp.where(bend > 0, slope / jnp.where(bend > 0, bend, 1), 0) * share
    inside = norm(newton) <= 1
    beyond = norm(cauchy) >= 1
    leg = newton - cauchy
    along, square = jnp.sum(cauchy * leg), jnp.sum(leg**2)
    gap = 1 - jnp.sum(cauchy**2)
    t = gap / (along + jnp.sqrt(jnp.maximum(along**2 + square * gap, 0)))  # of norm(cauchy + t leg) = 1
    unit = cauchy / where_positive(norm(cauchy))
    coordinates = radius * jnp.where(inside, newton, jnp.where(beyond, unit, cauchy + t * leg))
    predicted = -jnp.sum(coordinates * (model.gradient + model.eigenvalues * coordinates / 2))
    return RegionStep(matmul(model.vectors, coordinates), predicted, ~inside)
