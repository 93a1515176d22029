"""How damping follows the quality of a quadratic model: pure functions that methods share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from curvature._types import Scalar, Tree, Vector
from curvature.optimizers._method import bind_extras, noise_of

_POOR, _GOOD = 0.25, 0.75
_DECAY = 19 / 20  # for each step since the last adaptation: Martens and Grosse (2015), section 6.5
_GROWTH = 4.0  # after a refused step; ours


class Judgment(NamedTuple):
    """What has become of a step.

    Attributes:
        accepted: whether it is to be taken.
        damping: for the next step.
        ratio: the reduction ratio when it was last measured.
    """

    accepted: Bool[Array, ""]
    damping: Scalar
    ratio: Scalar


def reduction_ratio(value: Scalar, after: Scalar, predicted: Scalar) -> Scalar:
    """What a step has gained by what its model promised; 1 where both are within rounding of the value.

    Where the model promised nothing, or is not finite, it is NaN; but minus infinity where such a step raises the
    objective, or any step ends at NaN or infinity.
    """
    noise = noise_of(value) + jnp.finfo(value.dtype).tiny
    gain, promise = value - after + noise, predicted + noise
    failed = ~(gain > 0) & ((promise <= 0) | ~jnp.isfinite(after)) & jnp.isfinite(predicted)
    return jnp.where(failed, -jnp.inf, jnp.where(promise > 0, gain / promise, jnp.nan))


def predicted_decrease(grad: Vector, step: Vector, curved: Vector) -> Scalar:
    """What the quadratic model promises for a step, whose product with the curvature is ``curved``."""
    return -(jnp.vdot(grad, step, precision="highest") + jnp.vdot(step, curved, precision="highest") / 2)


def adapted(damping: Scalar, ratio: Scalar, steps: int, least: Scalar) -> Scalar:
    """Less damping where the model is good, more where it is poor, after so many steps; NaN tells nothing."""
    change = _DECAY**steps
    damping = jnp.where(ratio > _GOOD, jnp.maximum(damping * change, jnp.minimum(damping, least)), damping)
    return jnp.where(ratio <= 0, damping * _GROWTH, jnp.where(ratio < _POOR, damping / change, damping))


def judge(
    setting: optax.ScalarOrSchedule,
    damping: Scalar,
    ratio: Scalar,
    count: Int[Array, ""],
    every: int | None,
    measure: Callable[[], Scalar],
) -> Judgment:
    """Every so many steps measure the reduction ratio of one, refuse it if the objective rises, adapt the damping.

    Levenberg and Marquardt's rule as Martens and Grosse (arXiv:1503.05671, section 6.5) have it, but for the ratio,
    which is that of the model without its damping, and for what is refused. A schedule is followed, not adapted.
    """
    if every is None or not judges(setting, every):
        return Judgment(jnp.ones_like(count, bool), damping, ratio)
    due = (count + 1) % every == 0
    ratio = jax.lax.cond(due, lambda: measure().astype(ratio.dtype), lambda: ratio)
    least = jnp.finfo(damping.dtype).eps * at_step(setting, count, damping.dtype)
    return Judgment(
        accepted=~(due & (ratio <= 0)),
        damping=jnp.where(due, adapted(damping, ratio, every, least), damping),
        ratio=ratio,
    )


def judges(setting: optax.ScalarOrSchedule, every: int | None) -> bool:
    """Whether steps are judged at all."""
    return every is not None and not callable(setting)


def at_step(setting: optax.ScalarOrSchedule, count: Int[Array, ""], dtype: Any) -> Scalar:
    """A number, or what a schedule says at a step."""
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules mix counts and rates even where users are strict
        return jnp.asarray(setting(count) if callable(setting) else setting).astype(dtype)


def current(setting: optax.ScalarOrSchedule, damping: Scalar, count: Int[Array, ""]) -> Scalar:
    """The damping of a step: that of the state, or what the schedule says."""
    return at_step(setting, count, damping.dtype) if callable(setting) else damping


class TrialObjective(NamedTuple):
    """The objective by which a step is judged, and its value before the step where that is known."""

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
    """What an update was handed as ``value_fn=`` and ``value=``, or the loss of the model on the curvature's data."""
    if value_fn is None:
        return TrialObjective(lambda params: loss(model(params, *args), *args), None)
    return TrialObjective(bind_extras(value_fn, extra_args), value)
