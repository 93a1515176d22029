"""The natural gradient: steps by the inverse of a damped Fisher or Gauss-Newton matrix that is never formed."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._trees import ravel
from curvature._types import Scalar, Tree
from curvature.linalg._solve import solve
from curvature.operators._base import damping as multiple_of_identity
from curvature.operators._curvature import FisherKind, FisherOperator
from curvature.operators._likelihoods import Likelihood
from curvature.optimizers._wrappers import gradient_for, wrappable
from curvature.training._damping import at_step, current, judge, judges, objective_of, predicted_decrease
from curvature.training._stochastic import Key, KeyData, keep_if_finite, key_data, key_of_step

NaturalSolver = Literal["cg", "woodbury"]

_NAME = "natural_gradient"


class NaturalGradientState(NamedTuple):
    """The state of ``natural_gradient``: plain arrays, ready for a checkpoint.

    Attributes:
        count: the updates so far, without those that a gradient that is not finite kept from being made.
        damping: the damping of the last update, or for the next one if it adapts.
        ratio: the reduction ratio when it was last measured; 1 before.
        num_inner_steps: the steps of the last linear solve.
        residual: its residual relative to the gradient.
        key: the words of the key, from which and ``count`` the labels of a step follow; None where none are drawn.
    """

    count: Int[Array, ""]
    damping: Float[Array, ""]
    ratio: Float[Array, ""]
    num_inner_steps: Int[Array, ""]
    residual: Float[Array, ""]
    key: KeyData | None


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

    ``F`` is a ``FisherOperator`` on the data that ``update`` is given as ``args=``, which may be another batch than
    that of the gradient ``g``. With ``kind="exact"`` it is the Gauss-Newton matrix, the solver is conjugate gradients,
    and the method is Hessian-free optimization.

    The damping follows the model's quality: every ``adapt_every`` steps the decrease of the objective is compared with
    that of the quadratic model ``g's + s'F s / 2``. Where their ratio is above 3/4 the damping falls by the factor
    ``(19/20)**adapt_every``, where it is below 1/4 it grows by as much, and where the objective rises the step is zero
    and the damping grows fourfold. The objective has to be on the batch of the gradient: hand it over as ``value_fn=``
    where that is not the batch of ``args``.

    Args:
        model: ``model(params, *args) -> outputs``.
        loss: ``loss(outputs, *args) -> scalar``.
        learning_rate: a number or an optax schedule; 1 is the full step.
        damping: the first damping, in the units of ``F``; an optax schedule is followed and not adapted.
        adapt_every: how many steps between adaptations; None takes every step and keeps the damping.
        kind: ``"exact"``, ``"sampled"`` or ``"empirical"``, as for ``FisherOperator``.
        likelihood: likewise; ``"sampled"`` needs it.
        solver: ``"cg"``, or ``"woodbury"`` for an exact solution where a batch has few outputs; it needs damping.
        rtol: the residual of the solve, relative to the norm of the gradient.
        max_inner_steps: the most steps of the solve, whose last iterate is taken; None is 10 for each parameter.
        key: the randomness of ``"sampled"``.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``NaturalGradientState``; its
        ``update(grad, state, params, *, args, value=, value_fn=)`` returns the step.

    Raises:
        TypeError: when a function is not callable, or the key is none.
        ValueError: for an unknown option, a number out of range, a missing key; from ``update`` without ``args=``.

    Cost: a linearization of the model, and for each step of the solve a JVP and a VJP of it; every ``adapt_every``
        steps one product and two evaluations of the objective more. For ``"woodbury"`` see ``solve``.

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
        _checks.check_callable(_NAME, option, function)
        _checks.check_hashable(_NAME, option, function)
    for option, value in {"learning_rate": learning_rate, "damping": damping}.items():
        _checks.check_schedule(_NAME, option, value)
    if adapt_every is not None:
        _checks.check_static_count(_NAME, "adapt_every", adapt_every, 1)
    _checks.check_choice(_NAME, "kind", kind, FisherKind)
    _checks.check_choice(_NAME, "solver", solver, NaturalSolver)
    _checks.check_nonnegative(_NAME, "rtol", rtol)
    if max_inner_steps is not None:
        _checks.check_static_count(_NAME, "max_inner_steps", max_inner_steps, 1)
    _checks.check_sampling(_NAME, kind, likelihood, key)
    sampling = key if kind == "sampled" else None
    if sampling is not None:
        _checks.check_key(_NAME, sampling)
    setting = _Setting(
        model, loss, learning_rate, damping, adapt_every, kind, likelihood, solver, rtol, max_inner_steps, sampling
    )
    functions = wrappable(_NAME, partial(_init, setting), partial(_update, setting))
    return optax.GradientTransformationExtraArgs(*functions)


class _Setting(NamedTuple):
    """The arguments of ``natural_gradient``; the key only where labels are drawn."""

    model: Callable[..., Any]
    loss: Callable[..., Any]
    learning_rate: optax.ScalarOrSchedule
    damping: optax.ScalarOrSchedule
    adapt_every: int | None
    kind: FisherKind
    likelihood: Likelihood | None
    solver: NaturalSolver
    rtol: float | Array
    max_inner_steps: int | None
    key: Key | None

    def fisher(self, state: NaturalGradientState, params: Tree, args: tuple[Any, ...]) -> FisherOperator:
        """The Fisher matrix at a step."""
        drawn = None if self.key is None or state.key is None else key_of_step(self.key, state.key, state.count)
        return FisherOperator(
            self.model, self.loss, params, *args, kind=self.kind, likelihood=self.likelihood, key=drawn
        )


def _init(setting: _Setting, params: Tree) -> Any:
    dtype = ravel(params)[0].dtype
    zero, one = jnp.asarray(0, jnp.int32), jnp.asarray(1, dtype)
    data = None if setting.key is None else key_data(_NAME, setting.key)
    return NaturalGradientState(zero, at_step(setting.damping, zero, dtype), one, zero, jnp.zeros_like(one), data)


def _update(
    setting: _Setting,
    updates: Tree,
    state: Any,
    params: Tree | None = None,
    *,
    args: Any = None,
    value: Any = None,
    grad: Any = None,
    value_fn: Callable[..., Any] | None = None,
    **extra_args: Any,
) -> tuple[Tree, Any]:
    params = _checks.check_point(_NAME, "params", _checks.require_extra(_NAME, "params", params))
    updates = _checks.check_direction(_NAME, "updates", updates, "params", params)
    batch = _checks.require_data(_NAME, args)
    if judges(setting.damping, setting.adapt_every):
        gradient_for(_NAME, updates, grad)  # steps of a gradient that was changed, judged by an objective that was not
    damping = current(setting.damping, state.damping, state.count)
    op = setting.fisher(state, params, batch)
    natural, info = solve(
        op + multiple_of_identity(damping),
        updates,
        method=setting.solver,
        rtol=setting.rtol,
        max_steps=setting.max_inner_steps,
    )
    grad, unravel = ravel(updates)
    vector = -at_step(setting.learning_rate, state.count, grad.dtype) * ravel(natural)[0]
    step, objective = unravel(vector), objective_of(setting.model, setting.loss, batch, value, value_fn, extra_args)

    def measure() -> Scalar:
        return objective.ratio(params, step, predicted_decrease(grad, vector, ravel(op @ step)[0]))

    found = judge(setting.damping, damping, state.ratio, state.count, setting.adapt_every, measure)
    size = jnp.linalg.norm(grad)
    residual = info.residual_norm.astype(size.dtype) / jnp.where(size > 0, size, 1)
    after = NaturalGradientState(state.count + 1, found.damping, found.ratio, info.num_steps, residual, state.key)
    taken = unravel(jnp.where(found.accepted, vector, 0))
    return keep_if_finite((grad, vector), taken, after, state)
