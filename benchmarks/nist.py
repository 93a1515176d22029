"""Certified regressions: how many digits of NIST's parameters, standard deviations and sums of squares come out.

``python -m benchmarks.nist`` fits the 27 nonlinear regressions of NIST's Statistical Reference Datasets from both of
their starts, the first far and the second near, in double precision, and SciPy's MINPACK beside it. The digits are the
log relative error ``-log10(abs(found - certified) / abs(certified))`` of the worst entry, at most the 11 that are
certified. The data are in ``nist_strd.json``.
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Claim, Outcome, Row, Study
from benchmarks.least_squares import Residuals, Solve, ours, scipy_lm

CERTIFIED = 11  # digits
WANTED = 6  # digits of the parameters
STARTS = ("far", "near")
OURS, PEER = "levenberg-marquardt", "SciPy lm"
EXACT_DATA = "Lanczos1"  # whose sum of squares, 1e-25, is less than rounding leaves in double precision

Model = Callable[[Any, Any], Any]


class Dataset(NamedTuple):
    """One regression, as NIST certifies it; of "Nelson", ``y`` is the logarithm of the response."""

    name: str
    level: str
    model: Model
    x: np.ndarray
    y: np.ndarray
    starts: tuple[np.ndarray, np.ndarray]
    parameters: np.ndarray
    deviations: np.ndarray
    sum_of_squares: float


class Digits(NamedTuple):
    """Whether a fit claims success, after how many steps or evaluations, and the digits that agree."""

    success: bool
    steps: int
    parameters: float
    deviations: float
    sum_of_squares: float


def enso(b: Any, x: Any) -> Any:
    year, second, third = (2 * jnp.pi * x / period for period in (12, b[3], b[6]))
    yearly = b[0] + b[1] * jnp.cos(year) + b[2] * jnp.sin(year)
    return yearly + b[4] * jnp.cos(second) + b[5] * jnp.sin(second) + b[7] * jnp.cos(third) + b[8] * jnp.sin(third)


def gauss(b: Any, x: Any) -> Any:
    peaks = b[2] * jnp.exp(-(((x - b[3]) / b[4]) ** 2)) + b[5] * jnp.exp(-(((x - b[6]) / b[7]) ** 2))
    return b[0] * jnp.exp(-b[1] * x) + peaks


# The names of the datasets, one model for each line: ``(b, x) -> y``.
FORMULAS: dict[str, Model] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD Misra1a": lambda b, x: b[0] * (1 - jnp.exp(-b[1] * x)),
    "Chwirut1 Chwirut2": lambda b, x: jnp.exp(-b[0] * x) / (b[1] + b[2] * x),
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "Eckerle4": lambda b, x: b[0] / b[1] * jnp.exp(-(((x - b[2]) / b[1]) ** 2) / 2),
    "ENSO": enso,
    "Gauss1 Gauss2 Gauss3": gauss,
    "Hahn1 Thurber": lambda b, x: (
        (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (1 + x * (b[4] + x * (b[5] + x * b[6])))
    ),
    "Kirby2": lambda b, x: (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4])),
    "Lanczos1 Lanczos2 Lanczos3": lambda b, x: (
        b[0] * jnp.exp(-b[1] * x) + b[2] * jnp.exp(-b[3] * x) + b[4] * jnp.exp(-b[5] * x)
    ),
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * jnp.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4]),
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[0] * jnp.exp(-b[2] * x[1]),
    "Rat42": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + jnp.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - jnp.arctan(b[2] / (x - b[3])) / jnp.pi,
}
MODELS = {name: model for names, model in FORMULAS.items() for name in names.split()}
RESIDUALS = {model: (lambda b, x, y, model=model: model(b, x) - y) for model in FORMULAS.values()}


def load() -> dict[str, Dataset]:
    stored = json.loads(Path(__file__).with_name("nist_strd.json").read_text())["datasets"]
    found = {}
    for name, entry in sorted(stored.items(), key=lambda item: item[0].lower()):
        keys = ("x", "y", "start_1", "start_2", "parameters", "standard_deviations")
        x, y, far, near, parameters, deviations = (np.array(entry[key], float) for key in keys)
        y = np.log(y) if name == "Nelson" else y
        certified = (parameters, deviations, entry["sum_of_squares"])
        found[name] = Dataset(name, entry["level"], MODELS[name], x, y, (far, near), *certified)
    return found


def agreement(found: Any, certified: Any) -> float:
    """The least log relative error, from 0 to the digits that are certified."""
    error = np.max(np.abs((np.asarray(found) - certified) / certified))
    return float(np.clip(-np.log10(max(error, 1e-300)), 0, CERTIFIED)) if math.isfinite(error) else 0.0


def deviations_of_scipy(data: Dataset, found: Any) -> np.ndarray:
    """From the Jacobian at the end, whose columns are scaled before it is inverted."""
    scale = np.linalg.norm(found.jac, axis=0)
    inverse = np.linalg.pinv(found.jac / np.where(scale > 0, scale, 1))
    variance = 2 * found.cost / (data.y.size - data.parameters.size)
    return np.sqrt(variance) * np.linalg.norm(inverse, axis=1) / scale


SOLVERS: dict[str, Callable[[Residuals], Solve]] = {
    OURS: functools.cache(ours),
    "dogleg": functools.cache(functools.partial(ours, method="dogleg")),
    PEER: functools.cache(scipy_lm),
}


def fit(solver: str, data: Dataset, start: np.ndarray) -> Digits:
    found = SOLVERS[solver](RESIDUALS[data.model])(start, data.x, data.y)
    if found.result is None:
        return Digits(False, 0, 0.0, 0.0, 0.0)
    deviations = deviations_of_scipy(data, found.result) if solver == PEER else found.result.standard_errors()
    pairs = ((found.x, data.parameters), (deviations, data.deviations), (found.value, data.sum_of_squares))
    return Digits(found.success, found.steps, *(agreement(*pair) for pair in pairs))


Fits = dict[tuple[str, str], Digits]


def run(names: list[str], chosen: list[Dataset], report: Callable[[str], Any]) -> Outcome:
    """A row for each dataset and solver: steps and digits from the far start, then from the near one."""
    rows: list[Row] = []
    found: dict[str, Fits] = {name: {} for name in names}
    for name in names:
        for data in chosen:
            metrics: dict[str, Any] = {"level": data.level}
            for label, start in zip(STARTS, data.starts, strict=True):
                report(f"{data.name}, {name}")
                one = found[name][data.name, label] = fit(name, data, start)
                metrics |= {f"{label} steps": f"{one.steps}{'' if one.success else '!'}"}
                digits = {"b": one.parameters, "s.d.": one.deviations, "sum": one.sum_of_squares}
                metrics |= {f"{label} {what}": f"{value:.1f}" for what, value in digits.items()}
            rows.append(Row(f"{data.name}: {name}", "scipy" if name == PEER else "curvature", metrics=metrics))
    caption = "Digits of parameters, deviations and sum; ! is a fit that claims no success."
    return Outcome(rows=rows, claims=claims(found), caption=caption)


def claims(found: Mapping[str, Fits]) -> list[Claim]:
    solved = {name: [key for key, fit in rows.items() if fit.parameters >= WANTED] for name, rows in found.items()}
    said = []
    for name, rows in found.items():
        short = [" ".join(key) for key in rows if key not in solved[name]]
        text = f"{name}: {WANTED} digits of the parameters in {len(solved[name])} of {len(rows)} fits"
        said.append(Claim(f"{text} (not {', '.join(short)})" if short else text, not short))
    if OURS not in found:
        return said
    if PEER in found:
        as_many = len(solved[OURS]) >= len(solved[PEER])
        said.append(Claim(f"{OURS} solves at least as many as {PEER}", as_many))
    others = [fit for key, fit in found[OURS].items() if key in solved[OURS] and key[0] != EXACT_DATA]
    least = min((min(fit.deviations, fit.sum_of_squares) for fit in others), default=math.nan)
    text = f"{WANTED} digits of deviations and sums too, where parameters have them"
    said.append(Claim(f"{text} (least: {least:.1f}; but {EXACT_DATA})", least >= WANTED))
    false = [" ".join(key) for key, fit in found[OURS].items() if fit.success and fit.parameters < WANTED]
    return [*said, Claim(f"no success claimed elsewhere: {', '.join(false) or 'none'}", not false)]


def main() -> int:
    from benchmarks import session  # and with it the libraries of the report, which the tests of solvers do without

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", help="parts of names, instead of all")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    options = parser.parse_args()
    chosen = [d for d in load().values() if not options.datasets or any(part in d.name for part in options.datasets)]
    study = Study("nist", "NIST's certified regressions", "nist", lambda say: run(options.solvers, chosen, say))
    return session.alone([study])


if __name__ == "__main__":
    sys.exit(main())
