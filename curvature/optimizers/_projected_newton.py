"""Newton's method within bounds: a trust region whose steps are projected onto the box."""

import functools
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import matmul
from curvature._types import Scalar, Tree, Vector
from curvature.linalg._subproblems import RegionStep
from curvature.optimizers import _box_subproblem
from curvature.optimizers._bounds import StepBox, around, projected_gradient_norm, stay_inside
from curvature.optimizers._forcing import first_norm, forcing_term
from curvature.optimizers._globalize import POOR, guess_radius
from curvature.optimizers._method import Local, SecondOrder, resolved, second_order
from curvature.optimizers._trust_region import TrustRegionState, search_radius

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
    dense = subproblem == "exact"
    return second_order(TrustRegionState, _step_exact if dense else _step_by_cg, dense=dense, bounds=(lower, upper))


def _step_exact(state: TrustRegionState, local: Local) -> tuple[Vector, TrustRegionState]:
    assert local.box is not None
    box = local.box
    scaled, d = resolved(local, by_powers_of_two=True)
    hessian = scaled.hessian()
    product = functools.partial(matmul, hessian)
    steps = StepBox(*(d * bound for bound in around(box, local.x)))
    model = _box_subproblem.BoxModel(scaled.grad, product, hessian, steps)

    def stay(step: Vector) -> Vector:
        return d * stay_inside(box, local.x, step / d)

    return _step(stay, state, scaled, model, _box_subproblem.by_eigenvectors, state.grad_norm, d)


def _step_by_cg(state: TrustRegionState, local: Local) -> tuple[Vector, TrustRegionState]:
    assert local.box is not None
    box = local.box
    size = projected_gradient_norm(box, local.x, local.grad)
    first = first_norm(state.grad_norm, size)
    limit = jnp.asarray(2 * local.x.size + 10, jnp.int32)
    solve_face = _box_subproblem.conjugate_gradients(forcing_term(first, size), limit)
    model = _box_subproblem.BoxModel(local.grad, local.hvp, None, around(box, local.x))
    return _step(functools.partial(stay_inside, box, local.x), state, local, model, solve_face, first)


def _step(
    stay: Callable[[Vector], Vector],
    state: TrustRegionState,
    local: Local,
    model: _box_subproblem.BoxModel,
    solve_face: _box_subproblem.FaceSolver,
    first: Scalar,
    units: Vector | None = None,
) -> tuple[Vector, TrustRegionState]:
    """Search the radius whose step within the box is accepted; the problem is in variables ``units * x``."""

    def solve(radius: Scalar) -> tuple[RegionStep, Int[Array, ""]]:
        region, inner_steps = _box_subproblem.minimize_in_box(model, radius, solve_face)
        return region._replace(step=stay(region.step)), inner_steps

    radius, is_guess = guess_radius(local, state.radius)
    last = search_radius(local, solve, radius, is_guess, grows=is_guess)
    fields = {"num_inner_steps": last.inner_steps, "grad_norm": first}
    return last.take_step(state, units, accepted=last.next_radius(), rejected=POOR * radius, **fields)
