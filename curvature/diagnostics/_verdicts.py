"""Verdicts of ``check_derivatives``: comparison of two sides of an identity, its tolerance, and a sentence."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from curvature.diagnostics import _differences
from curvature.diagnostics._differences import Estimate, Samples
from curvature.diagnostics._reports import DerivativeCheck, Verdict
from curvature.diagnostics._restriction import Direction, Line
from curvature.programs._pushforward import asymmetric_rule

_SAFETY = 20  # Heuristic: differences may be off by this multiple of their error estimate
_CANCELED = 64  # Heuristic: a derivative may be off by this number of roundings of f, or of the gradient
ROUGH = 1e-2  # Heuristic: a tolerance beyond this share of the scale makes a check inconclusive
_SEVERITY: tuple[Verdict, ...] = ("passed", "inconclusive", "wrong", "kink", "not finite")


def worst(name: str, directions: Sequence[Direction], checks: Sequence[DerivativeCheck]) -> DerivativeCheck:
    """The most severe of several checks, renamed; a failing coordinate direction comes before a random direction.

    A kink or a NaN is more severe than a wrong value: no derivative exists there to be wrong.
    """

    def weight(pair: tuple[Direction, DerivativeCheck]) -> tuple[int, bool, float]:
        direction, check = pair
        ratio = check.error / check.tolerance if check.tolerance else check.error
        return _SEVERITY.index(check.verdict), direction.is_coordinate and check.verdict != "passed", ratio

    return replace(max(zip(directions, checks, strict=True), key=weight)[1], name=name)


def blame_kink(check: DerivativeCheck, kinked: DerivativeCheck, what: str) -> DerivativeCheck:
    """``check``, with the verdict "kink" if it failed and ``kinked`` has found a kink, where no derivative exists."""
    if check.verdict not in ("wrong", "inconclusive") or kinked.verdict != "kink":
        return check
    return replace(check, verdict="kink", sentence=f"{check.sentence[:-1]}: {what} has a kink at x.")


def first_order(line: Line, direction: Direction, gradient: np.ndarray, values: Samples) -> DerivativeCheck:
    """``g'd`` against differences of f along ``d``."""
    label = direction.label
    name = f"d f / d {label}" if direction.is_coordinate else f"the derivative of f along {label}"
    estimate = _differences.first_derivative(values, line.eps)
    return _compare_form(line, direction, gradient, estimate, values, (name, line.unit(direction)))


def second_order(line: Line, direction: Direction, product: np.ndarray, gradients: Samples) -> DerivativeCheck:
    """``H d`` against differences of the gradient along ``d``, entry by entry."""
    estimate = _differences.first_derivative(gradients, line.eps)
    name_entry = functools.partial(_name_second, line, direction)
    return _compare(line, product, estimate, gradients, np.linalg.norm(product), name_entry)


def curvature(line: Line, direction: Direction, product: np.ndarray, values: Samples) -> DerivativeCheck:
    """``d'Hd`` against second differences of f along ``d``."""
    label = direction.label
    name = f"d^2 f / d {label}^2" if direction.is_coordinate else f"v'Hv for {label}"
    estimate = _differences.second_derivative(values, line.eps)
    return _compare_form(line, direction, product, estimate, values, (name, line.unit(direction) ** 2))


def _compare_form(
    line: Line,
    direction: Direction,
    covector: np.ndarray,
    estimate: Estimate,
    values: Samples,
    name_and_unit: tuple[str, float],
) -> DerivativeCheck:
    """Compare one number, a covector times the direction, with an estimate of a derivative of f."""
    floor = np.linalg.norm(covector) * np.linalg.norm(direction.vector)
    return _compare(line, np.asarray(covector @ direction.vector), estimate, values, floor, lambda _: name_and_unit)


def _compare(
    line: Line,
    derivative: np.ndarray,
    estimate: Estimate,
    samples: Samples,
    norm: float | np.floating,
    name_entry: Callable[[int], tuple[str, float]],
) -> DerivativeCheck:
    """Compare derivatives with estimates; the worst entry gives the error, the tolerance and the sentence.

    ``name_entry`` returns the name and unit of an entry for the sentence.
    """
    kink, size = _differences.has_kink(samples, line.eps), np.abs(samples.center)
    derivative, value, error, scale, size = map(np.ravel, np.broadcast_arrays(derivative, *estimate, size))
    largest = np.maximum(np.abs(derivative), np.abs(value))
    allowed = _SAFETY * error + line.eps**0.375 * largest + line.eps**0.6 * norm + _CANCELED * line.eps * size
    difference = np.abs(derivative - value)
    scale = np.maximum(np.maximum(largest, scale), norm)
    ratio = np.where(np.isfinite(derivative), difference / np.where(allowed > 0, allowed, 1.0), np.inf)
    ratio = np.where(np.isnan(ratio), 0.0, ratio)
    i = int(np.argmax(ratio))
    rough = ~np.isfinite(value) | ((allowed > ROUGH * scale) & (allowed > 1e-6 * np.max(size)))
    what, unit = name_entry(i)
    sides = f"{what} is {derivative[i] / unit:.10g}, differences give {value[i] / unit:.10g} +- {error[i] / unit:.1e}"
    verdict: Verdict = "passed"
    sentence = ""
    if not np.isfinite(derivative).all():
        i = int(np.argmin(np.isfinite(derivative)))
        verdict, sentence = "not finite", f"{name_entry(i)[0]} is {derivative[i]}."
    elif kink:
        verdict, sentence = "kink", f"{sides}: its one-sided limits differ there, so the derivative does not exist."
    elif ratio[i] > 1:
        verdict, sentence = "wrong", f"{sides}."
    elif rough.any():
        i = int(np.argmax(rough))
        what = name_entry(i)[0]
        verdict, sentence = "inconclusive", f"{what}: f is too rough, or not finite, close to x for differences."
    scale_at = scale[i] if scale[i] > 0 else 1.0
    return DerivativeCheck("", verdict, float(difference[i] / scale_at), float(allowed[i] / scale_at), sentence)


def agreement(name: str, results: Mapping[str, np.ndarray], line: Line, size: float) -> DerivativeCheck:
    """Whether several modes agree on a derivative; ``size`` is the magnitude of the function that is differentiated."""
    bad = [mode for mode, result in results.items() if not np.isfinite(result).all()]
    if bad:
        good = [mode for mode in results if mode not in bad]
        sentence = f"{', '.join(bad)} gives NaN or infinity" + (f" where {', '.join(good)} does not." if good else ".")
        return _not_finite(name, line, sentence)
    differences = [
        (_relative(one - other, max(np.linalg.norm(one), np.linalg.norm(other)) + _floor(line, size)), first, second)
        for (first, one), (second, other) in itertools.combinations(results.items(), 2)
    ]
    error, first, second = max(differences, default=(0.0, "", ""))
    return _identity(name, line, error, f"{first} and {second} differ by {error:.1e} of the norm.")


def assembled(
    line: Line, direction: Direction, of_taps: np.ndarray, product: np.ndarray, size: float
) -> DerivativeCheck:
    """The assembled Hessian times a direction against ``H v`` by the composition that ``auto`` chooses for products."""
    check = agreement("", {"taps": of_taps, line.composition: product}, line, size)
    if check.verdict != "wrong":
        return check
    i = int(np.argmax(np.abs(of_taps - product)))
    what, unit = _name_second(line, direction, i)
    sentence = (
        f"{what} is {of_taps[i] / unit:.10g} in the assembled Hessian ('taps', which curvature.hessian returns) and "
        f"{product[i] / unit:.10g} by {line.composition}."
    )
    return replace(check, sentence=sentence)


def _name_second(line: Line, direction: Direction, i: int) -> tuple[str, float]:
    """The name of entry ``i`` of a product with the Hessian, and its unit."""
    entry = line.entry_name(i)
    if direction.is_coordinate:
        return f"d^2 f / d {entry} d {direction.label}", line.scales[i] * line.unit(direction)
    return f"the entry {entry} of H v for {direction.label}", line.scales[i]


def blame_rule(symmetric: DerivativeCheck, line: Line) -> DerivativeCheck:
    """The check of symmetry; if it failed, the sentence names the custom rule that may be wrong."""
    jaxpr = line.program.jaxpr
    rule = None if jaxpr is None or symmetric.verdict != "wrong" else asymmetric_rule(jaxpr.jaxpr)
    if rule is None:
        return symmetric
    sentence = (
        f"{symmetric.sentence} What reverse mode returns is the gradient of no function, and H v the derivative of it "
        f"along v. The rule that nothing proves to be a derivative is that of {rule}."
    )
    return replace(symmetric, sentence=sentence)


def symmetry(line: Line, directions: Sequence[Direction], products: np.ndarray, size: float) -> DerivativeCheck:
    """``u'Hv = v'Hu`` for all pairs of directions; ``size`` is the norm of the gradient."""
    if not np.isfinite(products).all():
        return _not_finite("H is symmetric", line, "H v has NaN or infinity.")
    vectors = np.stack([direction.vector for direction in directions])
    forms = vectors @ products.T
    reach = np.outer(np.linalg.norm(vectors, axis=1), np.linalg.norm(products, axis=1) + _floor(line, size))
    reach = np.maximum(reach, reach.T)
    ratio = np.abs(forms - forms.T) / np.where(reach > 0, reach, 1.0)
    i, j = (int(k) for k in np.unravel_index(np.argmax(ratio), ratio.shape))
    u, v = directions[i], directions[j]
    one, other = (form / (line.unit(u) * line.unit(v)) for form in (forms[i, j], forms[j, i]))
    sentence = f"with u: {u.label} and v: {v.label}, u'Hv is {one:.10g} and v'Hu is {other:.10g}."
    return _identity("H is symmetric", line, float(ratio[i, j]), sentence)


def linearity(line: Line, pair: np.ndarray, size: float) -> DerivativeCheck:
    """``H(2u - 3v) = 2Hu - 3Hv``; ``size`` is the norm of the gradient."""
    of_u, of_v = 2 * line.product(pair[0]), 3 * line.product(pair[1])
    of_sum = line.product(2 * pair[0] - 3 * pair[1])
    if not np.isfinite(np.concatenate([of_u, of_v, of_sum])).all():
        return _not_finite("H v is linear in v", line, "H v has NaN or infinity.")
    error = _relative(of_sum - (of_u - of_v), np.linalg.norm(of_u) + np.linalg.norm(of_v) + _floor(line, size))
    return _identity(
        "H v is linear in v", line, error, f"H(2u - 3v) differs from 2Hu - 3Hv by {error:.1e} of their norms."
    )


def _identity(name: str, line: Line, error: float, sentence: str) -> DerivativeCheck:
    """The check of an identity that holds to ``sqrt(eps)``; the sentence is for a failure."""
    tolerance = line.eps**0.5
    if error <= tolerance:
        return DerivativeCheck(name, "passed", error, tolerance)
    return DerivativeCheck(name, "wrong", error, tolerance, sentence)


def _not_finite(name: str, line: Line, sentence: str) -> DerivativeCheck:
    return DerivativeCheck(name, "not finite", np.inf, line.eps**0.5, sentence)


def _floor(line: Line, size: float) -> float:
    """A derivative below this norm is rounding: ``sqrt(eps)`` times it is ``_CANCELED`` roundings of ``size``."""
    return _CANCELED * line.eps**0.5 * size


def _relative(difference: np.ndarray, norm: float | np.floating) -> float:
    return float(np.linalg.norm(difference) / norm) if norm > 0 else float(np.linalg.norm(difference))
