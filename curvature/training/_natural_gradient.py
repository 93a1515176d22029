"""Natural gradient descent with a matrix-free Fisher or Gauss-Newton matrix; Hessian-free optimization."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot
from curvature._trees import ravel
from curvature._types import Scalar, Tree
from curvature.linalg._solve import solve
from curvature.operators._base import damping as multiple_of_identity
from curvature.operators._curvature import FisherKind, FisherOperator
from curvature.operators._likelihoods import Likelihood
from curvature.training._damping import DampedMethod, Proposal, at_step
from curvature.training._stochastic import Key, KeyData, key_of_step, sampling_key

NaturalSolver = Literal["cg", "woodbury"]


class NaturalGradientState(NamedTuple):
    """The state of ``natural_gradient``: plain arrays, ready for a checkpoint.

    Attributes:
        count: the number of updates, not counting updates skipped because a gradient was not finite.
        damping: the damping of the last update, or of the next update if it adapts.
        ratio: the last reduction ratio that was measured; 1 before the first.
        num_inner_steps: the number of steps of the last linear solve.
        residual: the residual of the last linear solve, relative to the gradient.
        key: the words of the key; ``key`` and ``count`` determine the labels of a step. None if none are drawn.
    """

    count: Int[Array, ""]
    damping: Float[Array, ""]
    ratio: Float[Array, ""]
    num_inner_steps: Int[Array, ""]
    residual: Float[Array, ""]
    key: KeyData | None


@public
def natural_gradient(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    *,
    learning_rate: optax.ScalarOrSchedule = 1.0,
    damping: optax.ScalarOrSchedule = 1e-2,
    adapt_every: int | None = 1,
    kind: FisherKind = "exact",
    likelihood: Likelihood | None = None,
    solver: NaturalSolver = "cg",
    rtol: float | Array = 1e-2,
    max_inner_steps: int | None = 50,
    key: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps ``-learning_rate (F + damping I)^-1 g`` with the Fisher matrix ``F`` of a model: an optax transformation.

    ``F`` is a ``FisherOperator`` on the data that is passed to ``update`` as ``args=``, possibly another batch than
    that of the gradient ``g``. With ``kind="exact"`` and ``solver="cg"`` the method is Hessian-free optimization.

    Every ``adapt_every`` steps the decrease of the objective is compared with that of the quadratic model
    ``g's + s'F s / 2``. If the ratio is above 3/4, the damping is multiplied by ``(19/20)**adapt_every``; if it is
    below 1/4, the damping is divided by that factor; if the objective rises, the step is zero and the damping is
    multiplied by 4. The objective must be evaluated on the batch of the gradient: pass it as ``value_fn=`` if that is
    not the batch in ``args``.

    Args:
        model: ``model(params, *args) -> outputs``.
        loss: ``loss(outputs, *args) -> scalar``.
        learning_rate: a number or an optax schedule; 1 is the full step.
        damping: the initial damping, in the units of ``F``; an optax schedule is followed and not adapted.
        adapt_every: the number of steps between adaptations; None accepts every step and keeps the damping.
        kind: ``"exact"``, ``"sampled"`` or ``"empirical"``; see ``FisherOperator``.
        likelihood: see ``FisherOperator``; ``"sampled"`` requires it.
        solver: ``"cg"``, or ``"woodbury"`` for an exact solution if a batch has few outputs; it requires damping.
        rtol: the tolerance of the residual of the solve, relative to the norm of the gradient.
        max_inner_steps: the largest number of steps of the solve; None is 10 for each parameter.
        key: the random key for ``"sampled"``.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``NaturalGradientState``; its
        ``update(grad, state, params, *, args, value=, value_fn=)`` returns the step.

    Raises:
        TypeError: if a function is not callable, or ``key`` is not a random key.
        ValueError: for an unknown option, a number out of range, a missing key; from ``update`` without ``args=``.

    Cost: one linearization of the model, and a JVP and a VJP per step of the solve; every ``adapt_every`` steps one
        more product and two evaluations of the objective. For ``"woodbury"`` see ``solve``.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> model = lambda w, a, y: a @ w
        >>> loss = lambda z, a, y: 0.5 * jnp.mean((z - y) ** 2)
        >>> a, w = jnp.array([[1.0, 0.0], [1.0, 10.0], [1.0, 20.0]]), jnp.zeros(2)
        >>> batch = a, a @ jnp.array([3.0, -1.0])
        >>> solver = curvature.natural_gradient(model, loss, damping=0.0, rtol=1e-6)
        >>> grad = jax.grad(lambda w: loss(model(w, *batch), *batch))(w)
        >>> step, state = solver.update(grad, solver.init(w), w, args=batch)
        >>> bool(jnp.allclose(w + step, jnp.array([3.0, -1.0]), atol=1e-3))  # one step solves a linear model
        True

    References: Amari (1998), doi:10.1162/089976698300017746; Martens, Deep learning via Hessian-free optimization
        (2010); Martens, arXiv:1412.1193; Martens and Grosse, arXiv:1503.05671, section 6.5, for the damping.
    """
    for option, function in {"model": model, "loss": loss}.items():
        _checks.check_static_function(option, function)
    for option, value in {"learning_rate": learning_rate, "damping": damping}.items():
        _checks.check_schedule(option, value)
    if adapt_every is not None:
        _checks.check_static_count("adapt_every", adapt_every, 1)
    _checks.check_choice("kind", kind, FisherKind)
    _checks.check_choice("solver", solver, NaturalSolver)
    _checks.check_nonnegative("rtol", rtol)
    if max_inner_steps is not None:
        _checks.check_static_count("max_inner_steps", max_inner_steps, 1)
    key = sampling_key(kind, likelihood, key)

    def start(params: Tree, damping: Scalar) -> tuple[Array, Array]:
        return jnp.asarray(0, jnp.int32), jnp.zeros_like(damping)

    def propose(updates: Tree, state: Any, params: Tree, batch: tuple[Any, ...], damping: Scalar) -> Proposal:
        drawn = key_of_step(key, state.key, state.count)
        op = FisherOperator(model, loss, params, *batch, kind=kind, likelihood=likelihood, key=drawn)
        damped = op + multiple_of_identity(damping)
        natural, info = solve(damped, updates, method=solver, rtol=rtol, max_steps=max_inner_steps)
        grad, unravel = ravel(updates)
        grad_norm = jnp.linalg.norm(grad)
        residual = info.residual_norm.astype(grad_norm.dtype) / jnp.where(grad_norm > 0, grad_norm, 1)
        return Proposal(
            vector=-at_step(learning_rate, state.count, grad.dtype) * ravel(natural)[0],
            square=lambda step: dot(step, ravel(op @ unravel(step))[0]),
            fields=lambda step: (info.num_steps, residual),
        )

    return DampedMethod(model, loss, damping, adapt_every, key).transformation(NaturalGradientState, start, propose)
