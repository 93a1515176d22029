"""Newton's method by truncated conjugate gradients and a line search that uses negative curvature."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, norm
from curvature._types import Status, Vector
from curvature.linalg._cg import truncated_cg
from curvature.optimizers._forcing import first_norm, inner_solve
from curvature.optimizers._globalize import first_length
from curvature.optimizers._line_search import search_values, with_gradients
from curvature.optimizers._method import Local, SecondOrder, Unevaluated, reused, second_order


class NewtonCGState(NamedTuple):
    """The state of ``newton_cg``: plain arrays, ready for a checkpoint.

    Attributes:
        step_size: the share of the direction that the last update took.
        length: the length of the last step, by which one along negative curvature is measured; 0 before the first.
        num_trials: the points that the last update tried.
        num_inner_steps: its conjugate gradient steps.
        grad_norm: the norm of the first gradient, by which the inner tolerance is measured.
        status: a ``Status``: running, or why the last update could not move.
        stored: nothing, for optax.
    """

    step_size: Float[Array, ""]
    length: Float[Array, ""]
    num_trials: Int[Array, ""]
    num_inner_steps: Int[Array, ""]
    grad_norm: Float[Array, ""]
    status: Int[Array, ""]
    stored: Unevaluated


@public
def newton_cg(*, max_inner_steps: int | None = None) -> SecondOrder:
    """Newton's method by conjugate gradients and a line search: an optax transformation that never forms the Hessian.

    The direction solves ``H d = -g`` to a residual that falls with the gradient. Where conjugate gradients meet a
    direction of negative curvature, the one of the lowest curvature seen is added, as long as the last step, and the
    line search continues while the value falls. Otherwise the step is cut from 1 until the value falls by
    ``1e-4`` of what the slope promises, give or take 10 roundings. Nothing depends on the scale of the objective.

    Use it where ``optax.lbfgs()`` stands: ``update(grad, state, params, value=, grad=, value_fn=)`` returns the step to
    an accepted point. If there is none, the step is zero and ``state.status`` says why. With ``hvp_fn=`` the products
    are those of another matrix, such as a Gauss-Newton matrix on another batch: Hessian-free training.

    Args:
        max_inner_steps: the most conjugate gradient steps of an update; ``None`` is 2 n + 10.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``NewtonCGState``.

    Raises:
        ValueError: when ``max_inner_steps`` is out of range; from ``update`` when an argument is missing.

    Cost: for each update one linearization of the gradient, a Hessian product for each conjugate gradient step and one
        value and gradient for each trial; memory for eight vectors.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> f = lambda x: jnp.sum(jnp.cosh(x - jnp.arange(3.0)))
        >>> x, solver = jnp.zeros(3), curvature.newton_cg()
        >>> state = solver.init(x)
        >>> @jax.jit
        ... def step(x, state):
        ...     value, grad = optax.value_and_grad_from_state(f)(x, state=state)
        ...     updates, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=f)
        ...     return optax.apply_updates(x, updates), state
        >>> for _ in range(8):
        ...     x, state = step(x, state)
        >>> jnp.round(x, 3) + 0.0
        Array([0., 1., 2.], dtype=float32)

    References: Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), algorithm 7.1; Martens (2010), Deep learning
        via Hessian-free optimization, ICML; for steps along negative curvature Royer, O'Neill and Wright (2020),
        doi:10.1007/s10107-019-01362-7.
    """
    if max_inner_steps is not None:
        _checks.check_count("max_inner_steps", max_inner_steps, least=1)
    return _build(max_inner_steps)


@reused
def _build(max_inner_steps: int | None) -> SecondOrder:
    return second_order(NewtonCGState, functools.partial(_step, max_inner_steps), dense=False)


def _step(max_inner_steps: int | None, state: NewtonCGState, local: Local) -> tuple[Vector, NewtonCGState]:
    size = norm(local.grad)
    first = first_norm(state.grad_norm, size)
    length = jnp.where(state.length > 0, state.length, first_length(local, size))
    direction, curves_down, num_inner_steps, is_finite = _direction(local, size, first, max_inner_steps, length)
    slope = dot(local.grad, direction)
    slope = jnp.where(is_finite, slope, jnp.nan)
    is_guess = curves_down & (state.length == 0)
    step, fields = search_values(with_gradients(local, is_guess), direction, slope, curves_down)
    fields["length"] = jnp.where(fields["status"] == Status.RUNNING, norm(step), length / 4)
    return step, state._replace(num_inner_steps=num_inner_steps, grad_norm=first, **fields)


def _direction(
    local: Local, size: Array, first: Array, max_inner_steps: int | None, length: Array
) -> tuple[Vector, Bool[Array, ""], Int[Array, ""], Bool[Array, ""]]:
    """The truncated Newton direction, whether it has a part of negative curvature, the products, and their health."""
    inner = inner_solve(local, size, first, max_inner_steps)
    b = -inner.gradient
    state = truncated_cg(local.hvp, b, tolerance=inner.tolerance, max_steps=inner.limit)
    curves_down = state.status == Status.NEGATIVE_CURVATURE
    down = state.direction / jnp.where(curves_down, norm(state.direction), 1)
    down = jnp.where(dot(down, b) < 0, -down, down)
    newton = jnp.ldexp(state.x, inner.exponent)
    direction = newton + jnp.where(curves_down, length, 0) * down
    return direction, curves_down, state.step, state.status != Status.NONFINITE
