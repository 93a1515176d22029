"""History and progress report of a running solve: a record of its steps, and a bar on the screen."""

import functools
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Float, Int

from curvature._types import History

_PAUSE = 500  # milliseconds between two looks at a loop, next to which the one or two of a callback are little
_GROWTH = 9  # the next look is at most so many times the steps taken so far away
_WIDTH = 20  # of the bar


class Report(NamedTuple):
    """When the loop last reported, and when it will next; carried by the loop, so that the host keeps no state."""

    next_step: Int[Array, ""]
    step: Int[Array, ""]
    milliseconds: Int[Array, ""]
    start_norm: Float[Array, ""]


class Watch(NamedTuple):
    """What a loop carries to report its progress; None for a report that was not requested."""

    history: History | None = None
    report: Report | None = None


def start_watch(like: Float[Array, ""], history_length: int, progress: bool) -> Watch:
    """The empty record before the first step; ``like`` has the dtype of the objective."""
    zero, empty = jnp.asarray(0, jnp.int32), jnp.full(history_length, jnp.nan, like.dtype)
    return Watch(
        history=History(empty, empty) if history_length else None,
        report=Report(zero, zero, zero, jnp.zeros_like(like)) if progress else None,
    )


def observe(
    watch: Watch, step: Int[Array, ""], value: Float[Array, ""], grad_norm: Float[Array, ""], tolerance: Any
) -> Watch:
    """Record this point, and say it if it is time to."""
    history, report = watch
    if history is not None:
        history = History(history.value.at[step].set(value), history.grad_norm.at[step].set(grad_norm))
    if report is not None:
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), report)
        report = jax.lax.cond(
            step >= report.next_step,
            lambda report: Report(*io_callback(_speak, shapes, report, step, value, grad_norm, tolerance)),
            lambda report: report,
            report,
        )
    return Watch(history, report)


def close(watch: Watch, step: Any, value: Any, grad_norm: Any, tolerance: Any) -> None:
    """The last line, when the loop has ended."""
    if watch.report is not None:
        write_last = functools.partial(_write, end="\n")
        jax.debug.callback(write_last, step, value, grad_norm, watch.report.start_norm, tolerance)


def _speak(report: Report, step: Any, value: Any, grad_norm: Any, tolerance: Any) -> tuple[np.generic, ...]:
    """Write the line, and decide at which step to do so again: the next ``Report``."""
    start_norm = report.start_norm.dtype.type(grad_norm if step == 0 else report.start_norm)
    _write(step, value, grad_norm, start_norm, tolerance)
    now = time.monotonic_ns() // 10**6 % 2**31
    rate = int(step - report.step) / max(now - int(report.milliseconds), 1)
    stride = min(max(rate * _PAUSE, 1), _GROWTH * (int(step) + 1))
    return np.int32(step + int(stride)), np.int32(step), np.int32(now), start_norm


def _write(step: Any, value: Any, grad_norm: Any, start_norm: Any, tolerance: Any, end: str = "") -> None:
    text = _line(int(step), float(value), float(grad_norm), float(start_norm), float(tolerance))
    sys.stderr.write(f"\r{text}{end}")
    sys.stderr.flush()


def _line(step: int, value: float, grad_norm: float, start_norm: float, tolerance: float) -> str:
    """How far the gradient has come from where it was to the tolerance, in orders of magnitude."""
    share = 0.0
    if grad_norm <= tolerance:
        share = 1.0
    elif 0 < tolerance < start_norm < math.inf and grad_norm < math.inf:
        share = min(max(math.log(start_norm / grad_norm) / math.log(start_norm / tolerance), 0.0), 1.0)
    bar = "#" * round(_WIDTH * share)
    goal = f" of {tolerance:.1e}" if tolerance > 0 else ""  # without one the solve ends by rounding
    return f"[{bar:-<{_WIDTH}}] step {step:6}  value {value:13.6e}  max|grad| {grad_norm:.1e}{goal}"
