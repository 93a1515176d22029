"""How damping follows the quality of a quadratic model: pure functions that methods share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from curvature._types import Tree
from curvature.optimizers._protocol import Scalar, Vector, bind_extras, noise_of

_POOR, _GOOD = 0.25, 0.75
_DECAY = 19 / 20  # for each step since the last adaptation: Martens and Grosse (2015), section 6.5


def reduction_ratio(value: Scalar, after: Scalar, predicted: Scalar) -> Scalar:
    """What a step has gained by what its model promised; 1 where both are within rounding of the value."""
    noise = noise_of(value) + jnp.finfo(value.dtype).tiny
    return (value - after + noise) / (predicted + noise)


def predicted_decrease(grad: Vector, step: Vector, curved: Vector) -> Scalar:
    """What the quadratic model promises for a step, whose product with the curvature is ``curved``."""
    return -(jnp.vdot(grad, step, precision="highest") + jnp.vdot(step, curved, precision="highest") / 2)


def adapted(damping: Scalar, ratio: Scalar, steps: int) -> Scalar:
    """Less damping where the model is good, more where it is poor, after so many steps; NaN is poor."""
    change = _DECAY**steps
    lower = jnp.where(ratio > _GOOD, damping * change, damping)
    return jnp.where(ratio >= _POOR, lower, damping / change)


def adapt(
    setting: optax.ScalarOrSchedule,
    damping: Scalar,
    ratio: Scalar,
    count: Int[Array, ""],
    every: int | None,
    measure: Callable[[], Scalar],
) -> tuple[Scalar, Scalar]:
    """Damping and reduction ratio after step number ``count``: every so many steps measured anew, and else as before.

    Levenberg and Marquardt's rule as Martens and Grosse (arXiv:1503.05671, section 6.5) have it, but for the ratio,
    which is that of the model without its damping. A schedule is not adapted.
    """
    if every is None:
        return damping, ratio
    due = (count + 1) % every == 0
    ratio = jax.lax.cond(due, lambda: measure().astype(ratio.dtype), lambda: ratio)
    adapts = due & (not callable(setting))
    return jnp.where(adapts, adapted(damping, ratio, every), damping), ratio


def at_step(setting: optax.ScalarOrSchedule, count: Int[Array, ""], dtype: Any) -> Scalar:
    """A number, or what a schedule says at a step."""
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
