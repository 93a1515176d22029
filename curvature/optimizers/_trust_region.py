"""Newton's method in a trust region, with the exact subproblem or Steihaug's conjugate gradients."""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, norm
from curvature._types import Scalar, Status, Tree, Vector
from curvature.linalg._cg import truncated_cg
from curvature.linalg._gltr import MAX_BASIS, krylov_model, solve_krylov_region
from curvature.linalg._subproblems import RegionStep, factor_model, solve_region
from curvature.optimizers._forcing import Inner, first_norm, inner_solve
from curvature.optimizers._method import (
    MAX_TRIALS,
    Local,
    SecondOrder,
    Unevaluated,
    choose,
    first_length,
    hides,
    resolved,
    second_order,
    shortest_radius,
    shrink_factor,
    trial_status,
    unevaluated,
)

Subproblem = Literal["exact", "gltr", "cg"]

ACCEPT = 1e-4  # N&W algorithm 4.1: the least ratio of actual to predicted reduction that is a step,
POOR, _GOOD = 0.25, 0.75  # below which the region shrinks, above which it grows
_GROWTH = 4.0
_DOUBLING = 2.0  # of a region within one update,
_LASTING = 1.25  # where the fall of the value grows by this with it, though the model is poor


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


class Trial(NamedTuple):
    """One trial: the step at a radius, the predicted and the actual reduction."""

    radius: Scalar
    step: Vector
    value: Scalar
    predicted: Scalar
    on_boundary: Bool[Array, ""]
    ratio: Scalar
    count: Int[Array, ""]
    inner_steps: Int[Array, ""]


class Solver(NamedTuple):
    """The subproblem at the current point, at any radius."""

    num_shared: Int[Array, ""]  # the products that all radii share
    solve: Callable[[Scalar], tuple[RegionStep, Int[Array, ""]]]  # and those that one takes


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
    if isinstance(initial_radius, jax.Array) or isinstance(max_inner_steps, jax.Array):  # arrays are no keys of a cache
        return _build(subproblem, initial_radius, max_inner_steps)
    return _build_once(subproblem, initial_radius, max_inner_steps)


def _build(subproblem: Subproblem, initial_radius: float | Array | None, max_inner_steps: int | None) -> SecondOrder:
    def init(x: Vector, params: Tree) -> TrustRegionState:
        radius = jnp.asarray(0 if initial_radius is None else initial_radius, x.dtype)
        zero = jnp.asarray(0, jnp.int32)
        return TrustRegionState(
            radius=radius,
            num_trials=zero,
            num_inner_steps=zero,
            grad_norm=jnp.asarray(0, x.dtype),
            status=jnp.asarray(Status.RUNNING, jnp.int32),
            stored=unevaluated(params),
        )

    def step(state: TrustRegionState, local: Local) -> tuple[Vector, TrustRegionState]:
        size = norm(local.grad)
        first = first_norm(state.grad_norm, size)
        spanned = subproblem == "gltr" and local.x.size <= MAX_BASIS and max_inner_steps is None
        d = jnp.ones_like(local.x)
        if spanned or subproblem == "exact":
            local, d = resolved(local)
        is_guess = state.radius == 0
        radius = jnp.where(is_guess, first_length(local, norm(local.grad)), state.radius)
        if spanned or subproblem == "exact":
            solver = _exact(local)
        else:
            solve_inexactly = _gltr if subproblem == "gltr" else steihaug
            solver = solve_inexactly(local, inner_solve(local, size, first, max_inner_steps), radius)
        last = search_radius(local, solver, radius, is_guess, grows=is_guess | (subproblem != "cg"))
        accepted = last.ratio >= ACCEPT
        return jnp.where(accepted, last.step / d, 0), state._replace(
            radius=jnp.where(accepted, next_radius(last), POOR * radius),
            num_trials=last.count,
            num_inner_steps=last.inner_steps,
            grad_norm=first,
            status=trial_status(accepted, last.value, last.predicted),
        )

    return second_order(init, step, dense=subproblem == "exact")


_build_once = functools.lru_cache(maxsize=64)(_build)  # so that equal settings find the compiled solve again


def _exact(local: Local) -> Solver:
    """The eigenvectors of the Hessian, once; then each radius takes O(n^2)."""
    model = factor_model(local.hessian(), local.grad)
    none = jnp.zeros_like(local.value, jnp.int32)
    return Solver(none, lambda radius: (solve_region(model, radius), none))


def _gltr(local: Local, inner: Inner, radius: Scalar) -> Solver:
    """A Krylov space, once; then each radius takes O(m n), unless the space has to grow beyond what is kept of it."""
    exponent = inner.exponent
    scaled = jnp.ldexp(radius, -exponent)
    krylov = krylov_model(local.hvp, inner.gradient, inner.tolerance, inner.limit, scaled)
    without_basis = steihaug(local, inner._replace(limit=jnp.where(krylov.too_small, inner.limit, 0)), radius)

    def solve(radius: Scalar) -> tuple[RegionStep, Int[Array, ""]]:
        step, predicted, on_boundary = solve_krylov_region(krylov, jnp.ldexp(radius, -exponent))
        predicted = jnp.ldexp(jnp.ldexp(predicted, exponent), exponent)
        known = RegionStep(jnp.ldexp(step, exponent), predicted, on_boundary)
        further, inner_steps = without_basis.solve(radius)
        return jax.tree.map(lambda a, b: jnp.where(krylov.too_small, a, b), further, known), inner_steps

    return Solver(krylov.num_steps, solve)


def steihaug(local: Local, inner: Inner, radius: Scalar) -> Solver:
    """Conjugate gradients, from zero at each radius."""
    exponent, unit = inner.exponent, -inner.gradient

    def solve(radius: Scalar) -> tuple[RegionStep, Int[Array, ""]]:
        scaled = jnp.ldexp(radius, -exponent)
        state = truncated_cg(local.hvp, unit, tolerance=inner.tolerance, max_steps=inner.limit, radius=scaled)
        predicted = dot(state.x, state.r + unit) / 2  # H x = unit - r
        predicted = jnp.ldexp(jnp.ldexp(predicted, exponent), exponent)
        predicted = jnp.where(state.status == Status.NONFINITE, jnp.nan, predicted)
        return RegionStep(jnp.ldexp(state.x, exponent), predicted, state.on_boundary), state.step

    return Solver(jnp.zeros_like(exponent), solve)


class _Search(NamedTuple):
    """The last radius tried, or the one before where that was accepted and the last is no better."""

    trial: Trial
    done: Bool[Array, ""]


def search_radius(
    local: Local,
    solver: Solver,
    radius: Scalar,
    is_guess: Bool[Array, ""] | bool = False,
    *,
    grows: Bool[Array, ""] | bool = False,
) -> Trial:
    """Shrink the region until the model's step is accepted; only the value is evaluated at each trial.

    Where the radius ``is_guess``, the region also shrinks while the fall is not what the model foresees, to a factor.

    Where the first step is accepted and ends on the boundary, a region that ``grows`` is doubled for as long as that
    lowers the value, as the model foresees or else by a quarter as much again: the internal doubling of Dennis and
    Schnabel (1996), algorithm A6.4.5, doi:10.1137/1.9781611971200. It pays where another radius costs little beside
    another Hessian. It need not follow the model, which is poor wherever the curvature is that of ripples on a slope;
    but a fall that levels off ends on a plateau.
    """
    noise = local.noise + jnp.finfo(local.noise.dtype).tiny

    def attempt(search: _Search) -> _Search:
        last = search.trial
        growing = is_fair(last)
        slope = dot(local.grad, last.step)
        shrunk = norm(last.step) * shrink_factor(local.value, slope, last.value)
        radius = jnp.where(last.count == 0, last.radius, jnp.where(growing, _DOUBLING * last.radius, shrunk))
        radius = jnp.maximum(radius, shortest)
        (step, predicted, on_boundary), inner_steps = solver.solve(radius)
        value = local.value_after(step)
        ratio = (local.value - value + noise) / (jnp.maximum(predicted, 0) + noise)
        ratio = jnp.where(jnp.isfinite(value), ratio, -jnp.inf).astype(radius.dtype)
        ratio = jnp.where(hides(local, step, value), 1, ratio)
        inner_steps += last.inner_steps
        trial = Trial(radius, step, value, predicted, on_boundary, ratio, last.count + 1, inner_steps)
        return _judge(trial, last, local, is_fair, grows)

    least, most = jnp.where(is_guess, POOR, ACCEPT), jnp.where(is_guess, 1 / POOR, jnp.inf)

    def is_fair(trial: Trial) -> Bool[Array, ""]:
        return (trial.ratio >= least) & (trial.ratio <= most)

    shortest = shortest_radius(local)
    zero, none = jnp.zeros_like(local.grad[0]), jnp.zeros_like(local.grad[0], jnp.int32)
    start = Trial(
        radius=radius + zero,
        step=jnp.zeros_like(local.grad),
        value=local.value,
        predicted=zero,
        on_boundary=jnp.zeros_like(zero, bool),
        ratio=jnp.full_like(zero, -jnp.inf),
        count=none,
        inner_steps=none + solver.num_shared,
    )
    search = _Search(start, jnp.zeros_like(zero, bool))
    return jax.lax.while_loop(lambda search: ~search.done, attempt, search).trial


def _judge(
    trial: Trial,
    last: Trial,
    local: Local,
    is_fair: Callable[[Trial], Bool[Array, ""]],
    grows: Bool[Array, ""] | bool,
) -> _Search:
    """Keep the trial, or the step accepted before it; stop unless another radius is worth an evaluation."""
    good, found = trial.ratio > _GOOD, is_fair(last)
    falls_on = local.value - trial.value >= _LASTING * (local.value - last.value)
    improves = is_fair(trial) & (~found | ((trial.value < last.value - local.noise) & (good | falls_on)))
    kept = last._replace(
        on_boundary=last.on_boundary & good,  # a larger region that was not good is not grown into
        count=trial.count,
        inner_steps=trial.inner_steps,
    )
    kept = choose(found & ~improves, kept, trial)

    promising = trial.on_boundary & (trial.radius < jnp.finfo(trial.radius.dtype).max / 64)
    goes_on = improves & promising & (found | (trial.count == 1)) & grows
    hopeless = jnp.isnan(trial.predicted) | (trial.value == -jnp.inf)
    done = ((found | improves) & ~goes_on) | hopeless | (trial.count >= MAX_TRIALS)
    return _Search(kept, done)


def next_radius(last: Trial) -> Scalar:
    length = norm(last.step)
    grown = jnp.where((last.ratio > _GOOD) & last.on_boundary, _GROWTH * last.radius, last.radius)
    grown = jnp.minimum(grown, jnp.finfo(grown.dtype).max / 8)
    return jnp.where(last.ratio < POOR, POOR * length, grown)
