"""Newton's method within bounds: a trust region whose steps are projected onto the box."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import matmul, norm
from curvature._types import Scalar, Status, Tree, Vector
from curvature.linalg._subproblems import RegionStep
from curvature.optimizers._bounds import Box, StepBox, around, box_of, flat, projected_gradient_norm, stay_inside
from curvature.optimizers._box_subproblem import (
    BoxModel,
    FaceSolver,
    by_eigenvectors,
    conjugate_gradients,
    minimize_in_box,
)
from curvature.optimizers._forcing import first_norm, forcing_term
from curvature.optimizers._method import (
    DenseSecondOrder,
    Local,
    SecondOrder,
    at_start,
    first_length,
    resolved,
    second_order_update,
    trial_status,
    unevaluated,
)
from curvature.optimizers._trust_region import (
    ACCEPT,
    POOR,
    Solver,
    TrustRegionState,
    next_radius,
    search_radius,
)
from curvature.optimizers._wrappers import is_placeholder, wrappable

FaceSubproblem = Literal["exact", "cg"]


@public
def projected_newton(lower: Tree = None, upper: Tree = None, *, subproblem: FaceSubproblem = "cg") -> SecondOrder:
    """Newton's method within ``lower <= x <= upper``: an optax transformation for smooth objectives, convex or not.

    A step minimizes the model ``f + g's + s'Hs / 2`` over the box and a trust region, by projection: the Cauchy step
    along the projected path of steepest descent says which bounds hold, and Newton's step on the variables that are
    free is searched along its own projected path, as long as it meets new bounds. Once the bounds that hold at the
    solution are found, these are Newton's steps on its face. Radius and acceptance are those of ``trust_region``.

    Every point it tries is in the box, which the objective never leaves. ``params`` must be in it to begin with. If
    there is no step, it is zero and ``state.status`` says why.

    Args:
        lower: the lower bounds: a tree like ``params`` or a prefix of one, where a number stands for all entries below
            it; ``None`` and minus infinity are no bound.
        upper: the upper bounds, likewise; equal bounds fix a variable.
        subproblem: ``"cg"`` minimizes on each face by conjugate gradients and never forms the Hessian; ``"exact"``
            forms it, and uses its eigenvectors on the face.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``TrustRegionState``. ``minimize(bounds=...)`` is
        the loop around it, whose program takes the bounds as operands.

    Raises:
        TypeError, ValueError: for an unknown subproblem; from ``init`` and ``update`` when the bounds do not match
            ``params`` or cross, or an argument is missing.

    Cost: for each update one linearization of the gradient and one value at each trial; at each trial two Hessian
        products, one more for each face and each point searched, and as many as there are conjugate gradient steps;
        or for ``"exact"`` n Hessian products in all, and about 9 n^3 FLOPs for each face and trial.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        >>> x, solver = jnp.array([-1.2, 1.0]), curvature.projected_newton(upper=jnp.array([0.5, jnp.inf]))
        >>> state = solver.init(x)
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = jax.value_and_grad(rosenbrock)(x)
        ...     updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=rosenbrock)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(20):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3)
        Array([0.5 , 0.25], dtype=float32)

    References: Lin and Moré, Newton's method for large bound-constrained optimization problems (1999), algorithms 3.1
        and 5.2, doi:10.1137/S1052623498345075; Conn, Gould and Toint, Trust-Region Methods (2000), chapter 12,
        doi:10.1137/1.9780898719857.
    """
    _checks.check_choice("subproblem", subproblem, FaceSubproblem)
    step = _step_exact if subproblem == "exact" else _step_by_cg

    def init_fn(params: Tree) -> Any:
        if not is_placeholder(params):
            box_of(lower, upper, "params", params)
        return at_start(_init, params)

    def update_fn(updates: Tree, state: Any, params: Tree | None = None, **extra_args: Any) -> tuple[Tree, Any]:
        params = _checks.require_extra("params", params)
        box = box_of(lower, upper, "params", params)
        in_box = functools.partial(step, flat(box))
        updates, state = second_order_update(in_box, updates, state, params, **extra_args)
        return stay_inside(box, params, updates), state

    kind = DenseSecondOrder if subproblem == "exact" else SecondOrder
    return kind(*wrappable(init_fn, update_fn))


def _init(x: Vector, params: Tree) -> TrustRegionState:
    zero = jnp.asarray(0, jnp.int32)
    return TrustRegionState(
        radius=jnp.asarray(0, x.dtype),
        num_trials=zero,
        num_inner_steps=zero,
        grad_norm=jnp.asarray(0, x.dtype),
        status=jnp.asarray(Status.RUNNING, jnp.int32),
        stored=unevaluated(params),
    )


def _step_exact(box: Box, state: TrustRegionState, local: Local) -> tuple[Vector, TrustRegionState]:
    scaled, d = resolved(local, by_powers_of_two=True)
    hessian = scaled.hessian()
    product = functools.partial(matmul, hessian)
    steps = StepBox(*(d * bound for bound in around(box, local.x)))
    model = BoxModel(scaled.grad, product, hessian, steps)

    def stay(step: Vector) -> Vector:
        return d * stay_inside(box, local.x, step / d)

    step, state = _step(stay, state, scaled, model, by_eigenvectors, state.grad_norm)
    return step / d, state


def _step_by_cg(box: Box, state: TrustRegionState, local: Local) -> tuple[Vector, TrustRegionState]:
    size = projected_gradient_norm(box, local.x, local.grad)
    first = first_norm(state.grad_norm, size)
    solve_face = conjugate_gradients(forcing_term(first, size), jnp.asarray(2 * local.x.size + 10, jnp.int32))
    model = BoxModel(local.grad, local.hvp, None, around(box, local.x))
    return _step(functools.partial(stay_inside, box, local.x), state, local, model, solve_face, first)


def _step(
    stay: Callable[[Vector], Vector],
    state: TrustRegionState,
    local: Local,
    model: BoxModel,
    solve_face: FaceSolver,
    first: Scalar,
) -> tuple[Vector, TrustRegionState]:
    """Search the radius whose step within the box is accepted."""

    def solver(radius: Scalar) -> tuple[RegionStep, Int[Array, ""]]:
        region, inner_steps = minimize_in_box(model, radius, solve_face)
        return region._replace(step=stay(region.step)), inner_steps

    is_guess = state.radius == 0
    radius = jnp.where(is_guess, first_length(local, norm(local.grad)), state.radius)
    last = search_radius(local, Solver(jnp.asarray(0, jnp.int32), solver), radius, is_guess, grows=is_guess)
    accepted = last.ratio >= ACCEPT
    return jnp.where(accepted, last.step, 0), state._replace(
        radius=jnp.where(accepted, next_radius(last), POOR * radius),
        num_trials=last.count,
        num_inner_steps=last.inner_steps,
        grad_norm=first,
        status=trial_status(accepted, last.value, last.predicted),
    )
