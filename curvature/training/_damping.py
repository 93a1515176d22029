"""The frame of KFAC and the natural gradient: damped steps, adapted by the reduction ratio as Levenberg-Marquardt."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from curvature import _checks
from curvature._numerics import dot
from curvature._trees import ravel
from curvature._types import Scalar, Tree, Vector
from curvature.optimizers._method import bind_extras, noise_of
from curvature.optimizers._wrappers import gradient_for, wrappable
from curvature.training._stochastic import Key, check_update, keep_if_finite, key_data

_POOR, _GOOD = 0.25, 0.75
_DECAY = 19 / 20  # for each step since the last adaptation: Martens and Grosse (2015), section 6.5
_GROWTH = 4.0  # Heuristic: the factor of the damping after a rejected step


def reduction_ratio(value: Scalar, after: Scalar, predicted: Scalar) -> Scalar:
    """The actual decrease over the predicted decrease; 1 if both are within rounding of the value.

    If the predicted decrease is not positive or not finite, the ratio is NaN; but minus infinity if that step raises
    the objective, or if the objective after any step is not finite.
    """
    noise = noise_of(value) + jnp.finfo(value.dtype).tiny
    actual, predicted_or_noise = value - after + noise, predicted + noise
    failed = ~(actual > 0) & ((predicted_or_noise <= 0) | ~jnp.isfinite(after)) & jnp.isfinite(predicted)
    ratio = jnp.where(predicted_or_noise > 0, actual / predicted_or_noise, jnp.nan)
    return jnp.where(failed, -jnp.inf, ratio)


def adapt_damping(damping: Scalar, ratio: Scalar, steps: int, least: Scalar) -> Scalar:
    """Decrease the damping if the ratio is good, increase it if poor; ``steps`` since the last time. NaN keeps it."""
    change = _DECAY**steps
    damping = jnp.where(ratio > _GOOD, jnp.maximum(damping * change, jnp.minimum(damping, least)), damping)
    return jnp.where(ratio <= 0, damping * _GROWTH, jnp.where(ratio < _POOR, damping / change, damping))


def at_step(setting: optax.ScalarOrSchedule, count: Int[Array, ""], dtype: Any) -> Scalar:
    """A number, or the value of a schedule at a step."""
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix counts and rates even where users are strict
        return jnp.asarray(setting(count) if callable(setting) else setting).astype(dtype)


class Proposal(NamedTuple):
    """A step before it is accepted.

    Attributes:
        vector: the step, flat.
        square: ``s' F s`` of the undamped quadratic model for a flat step ``s``.
        fields: the fields of the next state between ``ratio`` and ``key``, from the step that is taken.
        checked: the arrays that must be finite, beside the gradient and the step.
    """

    vector: Vector
    square: Callable[[Vector], Scalar]
    fields: Callable[[Tree], tuple[Any, ...]]
    checked: Tree = ()


class DampedMethod(NamedTuple):
    """The settings that the methods with an adaptive damping share; ``key`` is None unless labels are drawn."""

    model: Callable[..., Any]
    loss: Callable[..., Any]
    damping: optax.ScalarOrSchedule
    adapt_every: int | None
    key: Key | None

    def transformation(
        self,
        state_of: Callable[..., Any],
        start: Callable[[Tree, Scalar], tuple[Any, ...]],
        propose: Callable[[Tree, Any, Tree, tuple[Any, ...], Scalar], Proposal],
    ) -> optax.GradientTransformationExtraArgs:
        """An optax transformation whose states are ``state_of(count, damping, ratio, *fields, key)``.

        ``start(params, damping)`` returns the first fields, and ``propose(updates, state, params, batch, damping)`` a
        step with the next ones.
        """

        def init(params: Tree) -> Any:
            zero, dtype = jnp.asarray(0, jnp.int32), ravel(params)[0].dtype
            damping = at_step(self.damping, zero, dtype)
            data = None if self.key is None else key_data(self.key)
            return state_of(zero, damping, jnp.asarray(1, dtype), *start(params, damping), data)

        def update(updates: Tree, state: Any, params: Tree | None = None, **extras: Any) -> tuple[Tree, Any]:
            args, grad, value, value_fn = (extras.pop(name, None) for name in ("args", "grad", "value", "value_fn"))
            updates, params = check_update(updates, params)
            batch = _checks.require_data(args)
            if self.is_adaptive:
                gradient_for(updates, grad)  # the ratio would be wrong for a gradient that is not the objective's
            damping = state.damping
            if callable(self.damping):
                damping = at_step(self.damping, state.count, damping.dtype)
            # 1. The step of the damped model.
            vector, square, fields, checked = propose(updates, state, params, batch, damping)
            flat, unravel = ravel(updates)

            def measure_ratio() -> Scalar:
                fun = None if value_fn is None else bind_extras(value_fn, extras)
                predicted = -(dot(flat, vector) + square(vector) / 2)
                return self.ratio(params, unravel(vector), predicted, batch, value, fun)

            # 2. Accept or reject the step and adapt the damping.
            accepted, *adapted = self.adapt(state, damping, measure_ratio)
            step = unravel(jnp.where(accepted, vector, 0))
            after = state_of(state.count + 1, *adapted, *fields(step), state.key)
            return keep_if_finite((flat, vector, checked), step, after, state)

        return optax.GradientTransformationExtraArgs(*wrappable(init, update))

    @property
    def is_adaptive(self) -> bool:
        """Whether reduction ratios are measured: not for a schedule, nor for ``adapt_every=None``."""
        return self.adapt_every is not None and not callable(self.damping)

    def adapt(self, state: Any, damping: Scalar, measure_ratio: Callable[[], Scalar]) -> tuple[Any, Scalar, Scalar]:
        """Whether the step is accepted, the damping of the next step, and the last ratio that was measured.

        Every ``adapt_every`` steps the reduction ratio is measured, a step that raises the objective is rejected, and
        the damping is adapted. This is Levenberg and Marquardt's rule as in Martens and Grosse (arXiv:1503.05671,
        section 6.5), with two changes: the ratio is that of the model without its damping, and steps are rejected. A
        schedule is followed, not adapted.
        """
        ratio, every = state.ratio, self.adapt_every
        if every is None or not self.is_adaptive:
            return jnp.ones_like(state.count, bool), damping, ratio
        due = (state.count + 1) % every == 0
        ratio = jax.lax.cond(due, lambda: measure_ratio().astype(ratio.dtype), lambda: ratio)
        least = jnp.finfo(damping.dtype).eps * at_step(self.damping, state.count, damping.dtype)
        return ~(due & (ratio <= 0)), jnp.where(due, adapt_damping(damping, ratio, every, least), damping), ratio

    def ratio(
        self, params: Tree, step: Tree, predicted: Scalar, batch: tuple[Any, ...], value: Any, fun: Callable | None
    ) -> Scalar:
        """The reduction ratio of a step for ``fun``, or by default for the loss of the model on the batch."""
        if fun is None:
            fun, value = lambda params: self.loss(self.model(params, *batch), *batch), None
        values = fun(params) if value is None else value, fun(optax.apply_updates(params, step))
        value, after = (jnp.asarray(one).astype(predicted.dtype) for one in values)
        return reduction_ratio(value, after, predicted)
