"""Levenberg-Marquardt adaptation of the damping by the reduction ratio, for KFAC and the natural gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from curvature._types import Scalar, Tree
from curvature.optimizers._method import bind_extras, noise_of

_POOR, _GOOD = 0.25, 0.75
_DECAY = 19 / 20  # for each step since the last adaptation: Martens and Grosse (2015), section 6.5
_GROWTH = 4.0  # Heuristic: the factor of the damping after a rejected step


class Decision(NamedTuple):
    """Whether a step is accepted, and the adapted damping.

    Attributes:
        accepted: whether the step is accepted.
        damping: the damping of the next step.
        ratio: the last reduction ratio that was measured.
    """

    accepted: Bool[Array, ""]
    damping: Scalar
    ratio: Scalar


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


def accept_step(
    setting: optax.ScalarOrSchedule,
    damping: Scalar,
    ratio: Scalar,
    count: Int[Array, ""],
    every: int | None,
    measure_ratio: Callable[[], Scalar],
) -> Decision:
    """Every ``every`` steps measure the reduction ratio, reject a step that raises the objective, adapt the damping.

    This is Levenberg and Marquardt's rule as in Martens and Grosse (arXiv:1503.05671, section 6.5), with two changes:
    the ratio is that of the model without its damping, and steps are rejected. A schedule is followed, not adapted.
    """
    if every is None or not is_adaptive(setting, every):
        return Decision(jnp.ones_like(count, bool), damping, ratio)
    due = (count + 1) % every == 0
    ratio = jax.lax.cond(due, lambda: measure_ratio().astype(ratio.dtype), lambda: ratio)
    least = jnp.finfo(damping.dtype).eps * at_step(setting, count, damping.dtype)
    return Decision(
        accepted=~(due & (ratio <= 0)),
        damping=jnp.where(due, adapt_damping(damping, ratio, every, least), damping),
        ratio=ratio,
    )


def is_adaptive(setting: optax.ScalarOrSchedule, every: int | None) -> bool:
    """Whether reduction ratios are measured: not for a schedule, nor for ``adapt_every=None``."""
    return every is not None and not callable(setting)


def at_step(setting: optax.ScalarOrSchedule, count: Int[Array, ""], dtype: Any) -> Scalar:
    """A number, or the value of a schedule at a step."""
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix counts and rates even where users are strict
        return jnp.asarray(setting(count) if callable(setting) else setting).astype(dtype)


def damping_at(setting: optax.ScalarOrSchedule, damping: Scalar, count: Int[Array, ""]) -> Scalar:
    """The damping of a step: the one in the state, or the value of the schedule."""
    return at_step(setting, count, damping.dtype) if callable(setting) else damping


class TrialObjective(NamedTuple):
    """The objective for reduction ratios, and its value before the step if known."""

    fun: Callable[[Tree], Any]
    value: Any

    def ratio(self, params: Tree, step: Tree, predicted: Scalar) -> Scalar:
        """The reduction ratio of a step from ``params``."""
        value = self.fun(params) if self.value is None else self.value
        after = self.fun(optax.apply_updates(params, step))
        value, after = (jnp.asarray(one).astype(predicted.dtype) for one in (value, after))
        return reduction_ratio(value, after, predicted)


def objective_of(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    args: tuple[Any, ...],
    value: Any,
    value_fn: Callable[..., Any] | None,
    extra_args: dict[str, Any],
) -> TrialObjective:
    """The ``value_fn=`` and ``value=`` of an update, or by default the loss of the model on the curvature's data."""
    if value_fn is None:
        return TrialObjective(lambda params: loss(model(params, *args), *args), None)
    return TrialObjective(bind_extras(value_fn, extra_args), value)
