"""Quasi-Newton methods with a dense matrix: BFGS, plain or self-scaled, and SR1 in a trust region."""

import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, matmul, norm
from curvature._types import Matrix, Scalar, Vector
from curvature.linalg._subproblems import factor_model, solve_region
from curvature.optimizers import _globalize
from curvature.optimizers._globalize import Attempt, guess_radius, search
from curvature.optimizers._line_search import Descent, Pair, descend, pair_of, shows_curvature
from curvature.optimizers._method import FirstOrder, Slope, Stored, choose, first_order

Update = Literal["bfgs", "ssbfgs", "ssbroyden"]

_POOR = 0.1  # N&W algorithm 6.2: the ratio below which the region is halved
_SKIP = 1e-8  # N&W (6.26)


class BFGSState(NamedTuple):
    """The state of ``bfgs``: plain arrays, ready for a checkpoint.

    Attributes:
        inverse_hessian: the approximation of the inverse Hessian, in the order of ``jax.flatten_util.ravel_pytree``.
        num_updates: the pairs of steps and gradient changes in it since it was last the identity.
        step_size: the share of the quasi-Newton step that the last update took.
        num_trials: the points that it evaluated.
        status: a ``Status``: running, or why the last update could not move.
        stored: value and gradient at the new point, for optax.
    """

    inverse_hessian: Float[Array, "n n"]
    num_updates: Int[Array, ""]
    step_size: Float[Array, ""]
    num_trials: Int[Array, ""]
    status: Int[Array, ""]
    stored: Stored


@public
def bfgs(update: Update = "ssbroyden") -> FirstOrder:
    """BFGS: an optax transformation for smooth objectives of up to a few thousand entries; gradients only.

    The direction is ``-H g``, with the approximation of the inverse Hessian updated by the step ``s`` and the change of
    the gradient ``y``::

        H+ = (H - H y y'H / y'Hy + phi v v') / tau + s s' / y's,    v = sqrt(y'Hy) (s / y's - H y / y'Hy)

    so that ``H+ y = s``. BFGS itself has ``phi = tau = 1``. The line search satisfies the strong Wolfe conditions, or,
    where rounding hides the value, decides by the slope. When it fails, H starts again from the identity. Nothing
    depends on the scale of the objective.

    Use it where ``optax.lbfgs()`` stands; ``optax.value_and_grad_from_state`` finds value and gradient in the state.

    Args:
        update: ``"bfgs"``; ``"ssbfgs"``, which divides by ``tau = min(1, y's / s'Bs)`` and so forgets curvature that is
            too large; or ``"ssbroyden"``, which chooses ``phi`` too, and is the default because it goes furthest on
            badly conditioned objectives, as ``python -m benchmarks.cutest`` shows.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``BFGSState``.

    Raises:
        ValueError: for an unknown update; from the transformation's ``update`` when an argument is missing.

    Cost: for each update one value and gradient at each trial, mostly one, and about 10 n^2 FLOPs; memory for n^2
        numbers.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> f = lambda x: jnp.sum(jnp.cosh(x - jnp.arange(3.0)))
        >>> x, solver = jnp.zeros(3), curvature.bfgs()
        >>> state = solver.init(x)
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = optax.value_and_grad_from_state(f)(x, state=state)
        ...     updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=f)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(12):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3) + 0.0
        Array([0., 1., 2.], dtype=float32)

    References: Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), algorithm 6.1; Al-Baali (1998),
        doi:10.1023/A:1018315205474; Urbán, Stefanou and Pons (2025), doi:10.1016/j.jcp.2024.113656.
    """
    _checks.check_choice("update", update, Update)
    return _build(update)


@functools.lru_cache(maxsize=64)
def _build(update: Update) -> FirstOrder:
    def start(x: Vector) -> dict[str, Array]:
        return {"inverse_hessian": jnp.eye(x.size, dtype=x.dtype)}

    return first_order(BFGSState, functools.partial(_step_bfgs, update), start=start)


def _step_bfgs(update: Update, state: BFGSState, local: Slope) -> tuple[Vector, Scalar, Vector, BFGSState]:
    found = descend(local, -matmul(state.inverse_hessian, local.grad), state.num_updates > 0)
    identity = jnp.eye(local.grad.size, dtype=local.grad.dtype)
    accepted = found.search.accepted
    H = jnp.where(found.fresh, identity, state.inverse_hessian)
    num_updates = jnp.where(found.fresh, 0, state.num_updates)
    learned, useful = _update_bfgs(update, H, num_updates, found)
    kept = choose(local.usable, (identity, jnp.zeros_like(num_updates)), (state.inverse_hessian, state.num_updates))
    inverse_hessian, num_updates = choose(accepted, (learned, num_updates + useful.astype(jnp.int32)), kept)
    state = state._replace(
        inverse_hessian=inverse_hessian,
        num_updates=num_updates,
        step_size=jnp.where(local.usable, found.search.trial.t, state.step_size),
        num_trials=found.search.count,
        status=found.status,
    )
    return found.step, found.value, found.grad, state


def _update_bfgs(update: Update, H: Matrix, num_updates: Array, found: Descent) -> tuple[Matrix, Bool[Array, ""]]:
    """The approximation after a step that changed the gradient by ``y``, and whether that was of use."""
    step, y = found.pair.step, found.pair.change
    ys, yy = dot(y, step), dot(y, y)
    useful = shows_curvature(step, y)
    ys, yy = jnp.where(useful, ys, 1), jnp.where(useful & (yy > 0), yy, 1)
    H = jnp.where(num_updates == 0, ys / yy, 1) * H  # N&W (6.20)
    Hy = matmul(H, y)
    yHy = dot(y, Hy)
    yHy = jnp.where(yHy > 0, yHy, 1)
    phi, tau = _weights(update, found.expected / ys, yHy / ys, step.size)
    phi, tau = jnp.where(num_updates == 0, 1, phi), jnp.where(num_updates == 0, 1, tau)
    v = step / ys - Hy / yHy
    updated = (H - jnp.outer(Hy, Hy) / yHy + phi * yHy * jnp.outer(v, v)) / tau + jnp.outer(step, step) / ys
    return jnp.where(useful, updated, H), useful


def _weights(update: Update, b: Scalar, h: Scalar, n: int) -> tuple[Scalar, Scalar]:
    """``phi`` and ``tau`` of the family from ``b = s'Bs / y's`` and ``h = y'Hy / y's``.

    Urbán, Stefanou and Pons (2025), equations (18) to (26).
    """
    one = jnp.ones_like(b)
    shrink = jnp.minimum(1, 1 / jnp.where(b > 0, b, 1))
    if update == "bfgs":
        return one, one
    if update == "ssbfgs":
        return one, shrink
    a = jnp.maximum(h * b - 1, jnp.finfo(b.dtype).eps)
    rho = jnp.minimum(1, h * (1 - jnp.sqrt(a / (a + 1))))
    theta = jnp.maximum((rho - 1) / a, jnp.minimum(1 / rho, (1 - b) / b))
    sigma = 1 + a * theta
    root = sigma ** (-1 / max(n - 1, 1))
    positive = shrink * jnp.minimum(root, 1 / jnp.where(theta > 0, theta, 1))
    tau = jnp.where(theta > 0, positive, jnp.minimum(shrink * root, sigma))
    return (1 - theta) / sigma, tau


class SR1State(NamedTuple):
    """The state of ``sr1``: plain arrays, ready for a checkpoint.

    Attributes:
        hessian: the approximation of the Hessian, in the order of ``jax.flatten_util.ravel_pytree``.
        num_updates: the pairs of steps and gradient changes in it since it was last zero.
        radius: the radius for the next step; 0 where the first update is to guess it.
        num_trials: the points that the last update evaluated.
        status: a ``Status``: running, or why the last update could not move.
        stored: value and gradient at the new point, for optax.
    """

    hessian: Float[Array, "n n"]
    num_updates: Int[Array, ""]
    radius: Float[Array, ""]
    num_trials: Int[Array, ""]
    status: Int[Array, ""]
    stored: Stored


@functools.lru_cache(maxsize=64)
@public
def sr1() -> FirstOrder:
    """SR1 in a trust region: an optax transformation for smooth objectives, convex or not; gradients only.

    The approximation ``B`` of the Hessian need not be positive definite, and comes close to the Hessian itself: after a
    trial step ``s`` that changed the gradient by ``y``::

        B+ = B + r r' / r's,    r = y - B s

    unless ``abs(r's) <= 1e-8 norm(r) norm(s)``. Rejected trials teach it too, but not where the value rose by more than
    ten times what the model had it fall: B would not forget a curvature from so far off. The subproblem is solved to
    rounding, and the region shrinks until a trial is accepted. When none is, B starts again from zero. Nothing depends
    on the scale of the objective.

    Use it where ``optax.lbfgs()`` stands; ``optax.value_and_grad_from_state`` finds value and gradient in the state.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is an ``SR1State``.

    Raises:
        ValueError: from ``update`` when an argument is missing.

    Cost: for each trial one value and gradient, and about 9 n^3 FLOPs; memory for 3 n^2 numbers.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> f = lambda x: jnp.sum(jnp.cosh(x - jnp.arange(3.0)))
        >>> x, solver = jnp.zeros(3), curvature.sr1()
        >>> state = solver.init(x)
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = optax.value_and_grad_from_state(f)(x, state=state)
        ...     updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=f)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(14):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3) + 0.0
        Array([0., 1., 2.], dtype=float32)

    References: Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), algorithm 6.2; Conn, Gould and Toint (1991),
        doi:10.1007/BF01594934.
    """
    return first_order(SR1State, _step_sr1, start=lambda x: {"hessian": jnp.zeros((x.size, x.size), x.dtype)})


class _SR1Learned(NamedTuple):
    """What the trials have taught: the matrix, the gradient at the last one, and the radius if that is poor."""

    hessian: Matrix
    num_updates: Int[Array, ""]
    grad: Vector
    shrunk: Scalar


def _step_sr1(state: SR1State, local: Slope) -> tuple[Vector, Scalar, Vector, SR1State]:
    shortest = _globalize.shortest_radius(local)

    def attempt(radius: Scalar, learned: _SR1Learned) -> Attempt:
        region = solve_region(factor_model(learned.hessian, local.grad), jnp.maximum(radius, shortest))
        step, length = region.step, norm(region.step)
        value, grad = local.value_and_grad_after(step)
        hessian, useful = _update_sr1(learned.hessian, learned.num_updates, pair_of(step, grad - local.grad))

        def learn(ratio: Scalar) -> _SR1Learned:
            near = ratio > -_globalize.FAR
            used = useful & near
            share = jnp.where(near, 0.5, _globalize.shrink_factor(local.value, dot(local.grad, step), value))
            return _SR1Learned(
                hessian=jnp.where(used, hessian, learned.hessian),
                num_updates=learned.num_updates + used.astype(jnp.int32),
                grad=grad,
                shrunk=share * jnp.minimum(length, radius),
            )

        usable = jnp.isfinite(value) & jnp.all(jnp.isfinite(grad))
        return Attempt(region._replace(on_boundary=length > 0.8 * radius), value, usable, learn=learn)

    radius, is_guess = guess_radius(local, state.radius)
    before = _SR1Learned(state.hessian, state.num_updates, local.grad, radius)
    last = search(local, attempt, radius, lambda last: last.learned.shrunk, learned=before, is_guess=is_guess)
    accepted, learned = last.accepted, last.learned
    grown = jnp.where((last.ratio > _globalize.GOOD) & last.on_boundary, 2 * last.size, last.size)
    grown = jnp.minimum(grown, jnp.finfo(grown.dtype).max / 8)
    following = jnp.where(last.ratio < _POOR, learned.shrunk, grown)
    state = state._replace(
        hessian=jnp.where(accepted, learned.hessian, jnp.where(local.usable, 0, state.hessian)),
        num_updates=jnp.where(accepted, learned.num_updates, jnp.where(local.usable, 0, state.num_updates)),
        radius=jnp.where(accepted, following, jnp.where(local.usable, _globalize.POOR * radius, state.radius)),
        num_trials=last.count,
        status=_globalize.search_status(accepted, learned.num_updates > 0, last.value, last.predicted),
    )
    value, grad = choose(accepted, (last.value, learned.grad), (local.value, local.grad))
    return jnp.where(accepted, last.step, 0), value, grad, state


def _update_sr1(B: Matrix, num_updates: Int[Array, ""], pair: Pair) -> tuple[Matrix, Bool[Array, ""]]:
    """``B+``; before the first pair B is the multiple of the identity that its curvature suggests."""
    step, change = pair.step, pair.change
    sy = dot(step, change)
    yy = dot(change, change)
    scale = jnp.where(sy > 0, yy / jnp.where(sy > 0, sy, 1), 0)  # N&W (6.20)
    B = jnp.where(num_updates == 0, scale * jnp.eye(step.size, dtype=step.dtype), B)
    r = change - matmul(B, step)
    rs = dot(r, step)
    useful = (jnp.abs(rs) > _SKIP * norm(r) * norm(step)) & jnp.any(step != 0)
    updated = B + jnp.outer(r, r) / jnp.where(useful, rs, 1)
    useful = useful & jnp.all(jnp.isfinite(updated))
    return jnp.where(useful, updated, B), useful | (num_updates == 0) & (sy != 0)
