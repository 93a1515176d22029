"""Finite differences: central differences with Richardson extrapolation (Ridders) and error estimates."""

from typing import NamedTuple

import numpy as np

STEPS = 2.0 ** -np.arange(3, 19)
"""The steps ``h``: halved from an eighth of the scale of ``x`` until rounding dominates in float64."""

_COLUMNS = 5  # Heuristic: further columns of the tableau only accumulate rounding


class Samples(NamedTuple):
    """Values of a function ``phi`` along a line: at ``h`` and at ``-h`` for each step along axis 0, and at 0."""

    plus: np.ndarray
    minus: np.ndarray
    center: np.ndarray


class Estimate(NamedTuple):
    """Arrays of one shape: the derivative, an estimate of its error, and its magnitude over the largest steps."""

    value: np.ndarray
    error: np.ndarray
    scale: np.ndarray


def first_derivative(samples: Samples, eps: float) -> Estimate:
    """``d/dt phi(t)`` at 0 from samples with the rounding unit ``eps``."""
    differences = (samples.plus - samples.minus) / (2 * _column(STEPS, samples.center))
    return _extrapolate(differences, samples, eps, order=1)


def second_derivative(samples: Samples, eps: float) -> Estimate:
    """``d^2/dt^2 phi(t)`` at 0 from samples with the rounding unit ``eps``."""
    differences = (samples.plus - 2 * samples.center + samples.minus) / _column(STEPS, samples.center) ** 2
    return _extrapolate(differences, samples, eps, order=2)


def _column(steps: np.ndarray, center: np.ndarray) -> np.ndarray:
    return steps.reshape(-1, *[1] * center.ndim)


def _extrapolate(differences: np.ndarray, samples: Samples, eps: float, order: int) -> Estimate:
    """Richardson's tableau for a series in h^2; for each entry the element with the smallest error estimate."""
    plus, minus, center = samples
    steps = _column(STEPS, center)
    sizes = np.maximum(np.maximum(np.abs(plus), np.abs(minus)), np.abs(center))
    roundings = eps * np.fmax.reduce(np.where(np.isfinite(sizes), sizes, 0.0)) * 2**order / steps**order
    column, values, errors = differences, [], []
    for j in range(1, _COLUMNS):
        better = column[1:] + (column[1:] - column[:-1]) / (4.0**j - 1)
        # Error estimate of an element: its distance from the two elements it is computed from, and from its neighbors
        # in the column. The neighbor with the smaller step may differ by its larger roundings.
        distance = np.maximum(np.abs(better - column[1:]), np.abs(better - column[:-1]))
        gaps = np.abs(better[1:] - better[:-1])
        distance[1:] = np.maximum(distance[1:], gaps)
        distance[:-1] = np.maximum(distance[:-1], gaps - 2 * roundings[j + 1 :])
        values.append(better)
        errors.append(distance + roundings[j:])
        column = better
    value, error = np.concatenate(values), np.concatenate(errors)
    error = np.where(np.isfinite(error), error, np.inf)
    best = np.argmin(error, axis=0)[None]
    change = np.maximum(np.abs(plus - center), np.abs(minus - center)) / steps**order
    scale = np.asarray(np.fmax.reduce(np.where(np.isfinite(change), change, 0.0)[:4]))
    value, error = (np.asarray(np.take_along_axis(array, best, 0)[0]) for array in (value, error))
    return Estimate(value, error, scale)


def has_kink(samples: Samples, eps: float) -> bool:
    """Whether one-sided derivatives differ in any entry: then ``phi(h) - 2 phi(0) + phi(-h)`` is O(h), not O(h^2)."""
    plus, minus, center = samples
    steps = _column(STEPS, center)
    bend = (plus - 2 * center + minus) / steps
    slope = np.maximum(np.abs(plus - center), np.abs(minus - center)) / steps
    sizes = np.maximum(np.maximum(np.abs(plus), np.abs(minus)), np.abs(center))
    known = np.abs(bend) > 1000 * eps * sizes / steps
    same = np.abs(bend[2:] - bend[:-2]) <= 0.05 * np.abs(bend[2:])  # for a smooth function it falls to a quarter
    sharp = same & known[2:] & (np.abs(bend[2:]) > 1e-8 * slope[2:])
    runs = sharp[2:] & sharp[1:-1] & sharp[:-2]
    last = known[4:]  # the kink must also show at the smallest steps at which the bend exceeds rounding
    final = np.flip(np.flip(last, 0).cumsum(0) == 1, 0) & last
    return bool(np.any(runs & final))
