"""Derivatives from values alone: central differences, extrapolated, each with an estimate of its own error."""

from typing import NamedTuple

import numpy as np

STEPS = 2.0 ** -np.arange(3, 19)
"""The steps ``h``, halved each time: from an eighth of the scale of ``x`` to where roundings prevail in float64."""

_COLUMNS = 5  # of the tableau: more extrapolations only sum up roundings


class Estimate(NamedTuple):
    """Arrays of one shape: the derivative, what it may be off by, and the scale that it has over the largest step."""

    value: np.ndarray
    error: np.ndarray
    scale: np.ndarray


def first_derivative(plus: np.ndarray, minus: np.ndarray, center: np.ndarray, eps: float) -> Estimate:
    """``d/dt phi(t)`` at 0 from ``phi(h)``, ``phi(-h)`` along axis 0 and ``phi(0)``, whose roundings are ``eps``."""
    differences = (plus - minus) / (2 * _column(STEPS, center))
    return _extrapolate(differences, plus, minus, center, eps, order=1)


def second_derivative(plus: np.ndarray, minus: np.ndarray, center: np.ndarray, eps: float) -> Estimate:
    """``d^2/dt^2 phi(t)`` at 0, from the same."""
    differences = (plus - 2 * center + minus) / _column(STEPS, center) ** 2
    return _extrapolate(differences, plus, minus, center, eps, order=2)


def _column(steps: np.ndarray, center: np.ndarray) -> np.ndarray:
    return steps.reshape(-1, *[1] * center.ndim)


def _extrapolate(
    differences: np.ndarray, plus: np.ndarray, minus: np.ndarray, center: np.ndarray, eps: float, order: int
) -> Estimate:
    """Richardson's tableau of a series in h^2, halved each time; of each entry the one with the least error."""
    steps = _column(STEPS, center)
    sizes = np.maximum(np.maximum(np.abs(plus), np.abs(minus)), np.abs(center))
    roundings = eps * np.fmax.reduce(np.where(np.isfinite(sizes), sizes, 0.0)) * 2**order / steps**order
    column, values, errors = differences, [], []
    for j in range(1, _COLUMNS):
        better = column[1:] + (column[1:] - column[:-1]) / (4.0**j - 1)
        # An entry is trusted as far as it agrees with the two it is made of, and with its neighbors in the column,
        # of which the one with the smaller step has larger roundings.
        apart = np.maximum(np.abs(better - column[1:]), np.abs(better - column[:-1]))
        gaps = np.abs(better[1:] - better[:-1])
        apart[1:] = np.maximum(apart[1:], gaps)
        apart[:-1] = np.maximum(apart[:-1], gaps - 2 * roundings[j + 1 :])
        values.append(better)
        errors.append(apart + roundings[j:])
        column = better
    value, error = np.concatenate(values), np.concatenate(errors)
    error = np.where(np.isfinite(error), error, np.inf)
    best = np.argmin(error, axis=0)[None]
    change = np.maximum(np.abs(plus - center), np.abs(minus - center)) / steps**order
    scale = np.asarray(np.fmax.reduce(np.where(np.isfinite(change), change, 0.0)[:4]))
    value, error = (np.asarray(np.take_along_axis(array, best, 0)[0]) for array in (value, error))
    return Estimate(value, error, scale)


def has_kink(plus: np.ndarray, minus: np.ndarray, center: np.ndarray, eps: float) -> bool:
    """Whether one-sided derivatives differ in any entry: ``phi(h) - 2 phi(0) + phi(-h)`` shrinks as h, not as h^2."""
    steps = _column(STEPS, center)
    bend = (plus - 2 * center + minus) / steps
    slope = np.maximum(np.abs(plus - center), np.abs(minus - center)) / steps
    sizes = np.maximum(np.maximum(np.abs(plus), np.abs(minus)), np.abs(center))
    known = np.abs(bend) > 1000 * eps * sizes / steps
    same = np.abs(bend[2:] - bend[:-2]) <= 0.05 * np.abs(bend[2:])  # a smooth function's bend falls to a quarter
    sharp = same & known[2:] & (np.abs(bend[2:]) > 1e-8 * slope[2:])
    runs = sharp[2:] & sharp[1:-1] & sharp[:-2]
    last = known[4:]  # the smallest steps at which the bend is above the roundings must show it too
    final = np.flip(np.flip(last, 0).cumsum(0) == 1, 0) & last
    return bool(np.any(runs & final))
