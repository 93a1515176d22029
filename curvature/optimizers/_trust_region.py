"""Newton's method in a trust region, with the exact subproblem or Steihaug's conjugate gradients."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, norm
from curvature._types import Scalar, Status, Vector
from curvature.linalg._cg import truncated_cg
from curvature.linalg._gltr import MAX_BASIS, krylov_model, solve_krylov_region
from curvature.linalg._subproblems import RegionStep, factor_model, solve_region
from curvature.optimizers._forcing import Inner, first_norm, inner_solve
from curvature.optimizers._globalize import POOR, Attempt, Flag, Trial, guess_radius, search
from curvature.optimizers._method import Local, SecondOrder, Unevaluated, resolved, reused, second_order

Subproblem = Literal["exact", "gltr", "cg"]
RegionSolver = Callable[[Scalar], tuple[RegionStep, Any]]
"""The subproblem at the current point: from a radius its solution, and how many products that took."""


class TrustRegionState(NamedTuple):
    """The state of ``trust_region``: plain arrays, ready for a checkpoint.

    Attributes:
        radius: the radius for the next step; 0 where the first update is to guess it.
        num_trials: the points that the last update tried.
        num_inner_steps: the conjugate gradient steps of the last update; 0 for the exact subproblem.
        grad_norm: the norm of the first gradient, by which the inner tolerance is measured.
        status: a ``Status``: running, or why the last update could not move.
        stored: nothing, for optax.
    """

    radius: Float[Array, ""]
    num_trials: Int[Array, ""]
    num_inner_steps: Int[Array, ""]
    grad_norm: Float[Array, ""]
    status: Int[Array, ""]
    stored: Unevaluated


@public
def trust_region(
    subproblem: Subproblem = "gltr",
    *,
    initial_radius: float | Array | None = None,
    max_inner_steps: int | None = None,
) -> SecondOrder:
    """Newton's method in a trust region: an optax transformation for smooth objectives, convex or not.

    A step minimizes the model ``f + g's + s'Hs / 2`` over ``norm(s) <= radius``; the region shrinks until the value
    falls by a fair share of what the model promised, and grows where the model is good. Where another radius takes no
    product it is doubled at once, for as long as that lowers the value, as the model foresees or else by a quarter as
    much again. Changes of the value below 10 roundings of it count as promised and delivered, so that single precision
    ends by its gradient and not in noise. Nothing depends on the scale of the objective.

    Use it where ``optax.lbfgs()`` stands: ``update(grad, state, params, value=, grad=, value_fn=)`` returns the step to
    an accepted point. If there is none, the step is zero and ``state.status`` says why.

    Args:
        subproblem: ``"cg"`` never forms the Hessian: conjugate gradients stopped at the boundary, on negative curvature
            (which they follow to the boundary), or at a residual that falls with the gradient. ``"gltr"`` keeps a
            basis of the Krylov space, of up to 100 vectors, and minimizes over that on the boundary too, at any radius
            without further products: the default, here and in ``minimize``. Where 100 vectors do not reach that
            residual inside the region, conjugate gradients continue without them; and up to 100 variables, where they
            would span the whole space, it is ``"exact"``, unless ``max_inner_steps`` asks for less. ``"exact"`` forms
            the Hessian, of products that are taken together, and solves the subproblem to rounding by one
            eigendecomposition, the hard case included; variables that curve less than the square root of the rounding
            unit beside the largest are scaled up to that, so that rounding does not hide them.
        initial_radius: the radius of the first step, in the units of ``params``; ``None`` guesses
            ``norm(params) / 100``, or ``abs(value) / norm(grad) / 100`` at 0, and takes a step that falls as the model
            foresees, to a factor of 4, so that a guess that is too long does not end on a plateau.
        max_inner_steps: the most conjugate gradient steps at one radius; ``None`` is 2 n + 10.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``TrustRegionState``. The same settings return the
        same object, so that the compiled ``minimize`` is reused.

    Raises:
        ValueError: for an unknown subproblem or a number out of range; from ``update`` when an argument is missing.

    Cost: for each update one linearization of the gradient, one value at each trial, and at each trial as many Hessian
        products as there are conjugate gradient steps; or for ``"exact"`` n Hessian products and about 9 n^3 FLOPs in
        all, and memory for 3 n^2 numbers. ``"gltr"`` adds memory for up to 100 vectors. No Hessian is computed at a
        rejected point.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> rosenbrock = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        >>> x, solver = jnp.array([-1.2, 1.0]), curvature.trust_region("exact")
        >>> state = solver.init(x)
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = jax.value_and_grad(rosenbrock)(x)
        ...     updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=rosenbrock)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(25):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3)
        Array([1., 1.], dtype=float32)

    References: Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), algorithms 4.1 and 7.2; Conn, Gould and
        Toint, Trust-Region Methods (2000), sections 7.3 and 17.4.2, doi:10.1137/1.9780898719857.
    """
    _checks.check_choice("subproblem", subproblem, Subproblem)
    if initial_radius is not None:
        _checks.check_positive("initial_radius", initial_radius)
    if max_inner_steps is not None:
        _checks.check_count("max_inner_steps", max_inner_steps, least=1)
    return _build(subproblem, initial_radius, max_inner_steps)


@reused
def _build(subproblem: Subproblem, initial_radius: float | Array | None, max_inner_steps: int | None) -> SecondOrder:
    def start(x: Vector) -> dict[str, Array]:
        return {} if initial_radius is None else {"radius": jnp.asarray(initial_radius, x.dtype)}

    def step(state: TrustRegionState, local: Local) -> tuple[Vector, TrustRegionState]:
        size = norm(local.grad)
        first = first_norm(state.grad_norm, size)
        spanned = subproblem == "gltr" and local.x.size <= MAX_BASIS and max_inner_steps is None
        num_shared, d = 0, jnp.ones_like(local.x)
        if spanned or subproblem == "exact":
            local, d = resolved(local)
        radius, is_guess = guess_radius(local, state.radius)
        if spanned or subproblem == "exact":
            solve = _exact(local)
        else:
            inner = inner_solve(local, size, first, max_inner_steps)
            solve = steihaug(local, inner)
            if subproblem == "gltr":
                solve, num_shared = _gltr(local, inner, radius)
        grows = is_guess | (subproblem != "cg")
        last = search_radius(local, solve, radius, is_guess, grows=grows, num_shared=num_shared)
        fields = {"num_inner_steps": last.inner_steps, "grad_norm": first}
        return last.take_step(state, d, accepted=last.next_radius(), rejected=POOR * radius, **fields)

    return second_order(TrustRegionState, step, dense=subproblem == "exact", start=start)


def _exact(local: Local) -> RegionSolver:
    """The eigenvectors of the Hessian, once; then each radius takes O(n^2)."""
    model = factor_model(local.hessian(), local.grad)
    return lambda radius: (solve_region(model, radius), 0)


def _gltr(local: Local, inner: Inner, radius: Scalar) -> tuple[RegionSolver, Any]:
    """A Krylov space, once, and its products; then each radius takes O(m n), unless the space has to grow further."""
    exponent = inner.exponent
    scaled = jnp.ldexp(radius, -exponent)
    krylov = krylov_model(local.hvp, inner.gradient, inner.tolerance, inner.limit, scaled)
    without_basis = steihaug(local, inner._replace(limit=jnp.where(krylov.too_small, inner.limit, 0)))

    def solve(radius: Scalar) -> tuple[RegionStep, Int[Array, ""]]:
        step, predicted, on_boundary = solve_krylov_region(krylov, jnp.ldexp(radius, -exponent))
        predicted = jnp.ldexp(jnp.ldexp(predicted, exponent), exponent)
        known = RegionStep(jnp.ldexp(step, exponent), predicted, on_boundary)
        further, inner_steps = without_basis(radius)
        return jax.tree.map(lambda a, b: jnp.where(krylov.too_small, a, b), further, known), inner_steps

    return solve, krylov.num_steps


def steihaug(local: Local, inner: Inner) -> RegionSolver:
    """Conjugate gradients, from zero at each radius."""
    exponent, unit = inner.exponent, -inner.gradient

    def solve(radius: Scalar) -> tuple[RegionStep, Int[Array, ""]]:
        scaled = jnp.ldexp(radius, -exponent)
        state = truncated_cg(local.hvp, unit, tolerance=inner.tolerance, max_steps=inner.limit, radius=scaled)
        predicted = dot(state.x, state.r + unit) / 2  # H x = unit - r
        predicted = jnp.ldexp(jnp.ldexp(predicted, exponent), exponent)
        predicted = jnp.where(state.status == Status.NONFINITE, jnp.nan, predicted)
        return RegionStep(jnp.ldexp(state.x, exponent), predicted, state.on_boundary), state.step

    return solve


def search_radius(
    local: Local,
    solve: RegionSolver,
    radius: Scalar,
    is_guess: Flag = False,
    *,
    grows: Flag = False,
    num_shared: Any = 0,
) -> Trial:
    """Shrink the region until the model's step is accepted; only the value is evaluated at each trial.

    ``num_shared`` are the products that all radii share.
    """

    def attempt(radius: Scalar, _: None) -> Attempt:
        region, inner_steps = solve(radius)
        value = local.value_after(region.step)
        return Attempt(region, value, jnp.isfinite(value), inner_steps)

    return search(local, attempt, radius, is_guess=is_guess, grows=grows, inner_steps=num_shared)
