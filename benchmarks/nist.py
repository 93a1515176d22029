"""Certified regressions: how many digits of NIST's parameters, standard deviations and sums of squares come out.

``python -m benchmarks.nist`` fits the 27 nonlinear regressions of NIST's Statistical Reference Datasets from both of
their starts, the first far and the second near, in double precision, and SciPy's MINPACK beside it. The digits are the
log relative error ``-log10(abs(found - certified) / abs(certified))`` of the worst entry, at most the 11 that are
certified. The data are in ``nist_strd.json``.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

import curvature
from benchmarks.least_squares import minpack
from benchmarks.timing import console, plain_table
from curvature import Status

CERTIFIED = 11  # digits
WANTED = 6  # digits of the parameters
STARTS = ("start 1", "start 2")
PEER = "SciPy lm"
EXACT_DATA = "Lanczos1"  # whose sum of squares, 1e-25, is less than rounding leaves in double precision

Model = Callable[[Any, Any], Any]


class Dataset(NamedTuple):
    """One regression, as NIST certifies it.

    Attributes:
        name: the name of the file at NIST.
        level: how difficult NIST holds it to be.
        model: ``(b, x) -> y``.
        x: the predictor, or the predictors as rows.
        y: the response; of "Nelson", its logarithm.
        starts: the far and the near one.
        parameters: the certified ones.
        deviations: the certified standard deviations of the parameters.
        sum_of_squares: the certified one of the residuals.
    """

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
    """What a fit found: whether it claims success, after how many steps or evaluations, and the digits that agree."""

    success: bool
    steps: int
    parameters: float
    deviations: float
    sum_of_squares: float


def saturation(b: Any, x: Any) -> Any:
    return b[0] * (1 - jnp.exp(-b[1] * x))


def misra1b(b: Any, x: Any) -> Any:
    return b[0] * (1 - (1 + b[1] * x / 2) ** -2)


def misra1c(b: Any, x: Any) -> Any:
    return b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5)


def misra1d(b: Any, x: Any) -> Any:
    return b[0] * b[1] * x / (1 + b[1] * x)


def bennett5(b: Any, x: Any) -> Any:
    return b[0] * (b[1] + x) ** (-1 / b[2])


def chwirut(b: Any, x: Any) -> Any:
    return jnp.exp(-b[0] * x) / (b[1] + b[2] * x)


def danwood(b: Any, x: Any) -> Any:
    return b[0] * x ** b[1]


def enso(b: Any, x: Any) -> Any:
    year, second, third = (2 * jnp.pi * x / period for period in (12, b[3], b[6]))
    yearly = b[0] + b[1] * jnp.cos(year) + b[2] * jnp.sin(year)
    return yearly + b[4] * jnp.cos(second) + b[5] * jnp.sin(second) + b[7] * jnp.cos(third) + b[8] * jnp.sin(third)


def eckerle4(b: Any, x: Any) -> Any:
    return b[0] / b[1] * jnp.exp(-(((x - b[2]) / b[1]) ** 2) / 2)


def gauss(b: Any, x: Any) -> Any:
    peaks = b[2] * jnp.exp(-(((x - b[3]) / b[4]) ** 2)) + b[5] * jnp.exp(-(((x - b[6]) / b[7]) ** 2))
    return b[0] * jnp.exp(-b[1] * x) + peaks


def cubic_ratio(b: Any, x: Any) -> Any:
    return (b[0] + x * (b[1] + x * (b[2] + x * b[3]))) / (1 + x * (b[4] + x * (b[5] + x * b[6])))


def kirby2(b: Any, x: Any) -> Any:
    return (b[0] + x * (b[1] + x * b[2])) / (1 + x * (b[3] + x * b[4]))


def lanczos(b: Any, x: Any) -> Any:
    return b[0] * jnp.exp(-b[1] * x) + b[2] * jnp.exp(-b[3] * x) + b[4] * jnp.exp(-b[5] * x)


def mgh09(b: Any, x: Any) -> Any:
    return b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3])


def mgh10(b: Any, x: Any) -> Any:
    return b[0] * jnp.exp(b[1] / (x + b[2]))


def mgh17(b: Any, x: Any) -> Any:
    return b[0] + b[1] * jnp.exp(-x * b[3]) + b[2] * jnp.exp(-x * b[4])


def nelson(b: Any, x: Any) -> Any:
    return b[0] - b[1] * x[0] * jnp.exp(-b[2] * x[1])


def rat42(b: Any, x: Any) -> Any:
    return b[0] / (1 + jnp.exp(b[1] - b[2] * x))


def rat43(b: Any, x: Any) -> Any:
    return b[0] / (1 + jnp.exp(b[1] - b[2] * x)) ** (1 / b[3])


def roszman1(b: Any, x: Any) -> Any:
    return b[0] - b[1] * x - jnp.arctan(b[2] / (x - b[3])) / jnp.pi


MODELS: dict[str, Model] = {
    "Bennett5": bennett5,
    "BoxBOD": saturation,
    "Chwirut1": chwirut,
    "Chwirut2": chwirut,
    "DanWood": danwood,
    "Eckerle4": eckerle4,
    "ENSO": enso,
    "Gauss1": gauss,
    "Gauss2": gauss,
    "Gauss3": gauss,
    "Hahn1": cubic_ratio,
    "Kirby2": kirby2,
    "Lanczos1": lanczos,
    "Lanczos2": lanczos,
    "Lanczos3": lanczos,
    "MGH09": mgh09,
    "MGH10": mgh10,
    "MGH17": mgh17,
    "Misra1a": saturation,
    "Misra1b": misra1b,
    "Misra1c": misra1c,
    "Misra1d": misra1d,
    "Nelson": nelson,
    "Rat42": rat42,
    "Rat43": rat43,
    "Roszman1": roszman1,
    "Thurber": cubic_ratio,
}


def residuals_of(model: Model) -> Callable[[Any, Any, Any], Any]:
    """The residuals of a model, for all of its datasets."""
    return lambda b, x, y: model(b, x) - y


RESIDUALS = {model: residuals_of(model) for model in MODELS.values()}
COMPILED = {model: (jax.jit(residuals), jax.jit(jax.jacfwd(residuals))) for model, residuals in RESIDUALS.items()}


def load() -> dict[str, Dataset]:
    """The datasets by name."""
    stored = json.loads(Path(__file__).with_name("nist_strd.json").read_text())["datasets"]
    return {name: _dataset(name, entry) for name, entry in stored.items()}


def _dataset(name: str, entry: Mapping[str, Any]) -> Dataset:
    y = np.array(entry["y"], float)
    return Dataset(
        name=name,
        level=entry["level"],
        model=MODELS[name],
        x=np.array(entry["x"], float),
        y=np.log(y) if name == "Nelson" else y,
        starts=(np.array(entry["start_1"], float), np.array(entry["start_2"], float)),
        parameters=np.array(entry["parameters"], float),
        deviations=np.array(entry["standard_deviations"], float),
        sum_of_squares=entry["sum_of_squares"],
    )


def agreement(found: Any, certified: Any) -> float:
    """The least log relative error, from 0 to the digits that are certified."""
    error = np.max(np.abs((np.asarray(found) - certified) / certified))
    if not math.isfinite(error):
        return 0.0
    return float(np.clip(-np.log10(max(error, 1e-300)), 0, CERTIFIED))


def ours(method: str) -> Callable[[Dataset, np.ndarray], Digits]:
    """curvature.least_squares with all its defaults."""

    def fit(data: Dataset, start: np.ndarray) -> Digits:
        found = curvature.least_squares(RESIDUALS[data.model], start, (data.x, data.y), method=method)
        return Digits(
            Status(int(found.status)) == Status.CONVERGED,
            int(found.num_steps),
            agreement(found.x, data.parameters),
            agreement(found.standard_errors(), data.deviations),
            agreement(2 * found.value, data.sum_of_squares),
        )

    return fit


def scipy_lm(data: Dataset, start: np.ndarray) -> Digits:
    """MINPACK on compiled residuals, with the standard deviations that its Jacobian gives."""
    found = minpack(*COMPILED[data.model], start, data.x, data.y)
    if found is None:
        return Digits(False, 0, 0.0, 0.0, 0.0)
    scale = np.linalg.norm(found.jac, axis=0)
    inverse = np.linalg.pinv(found.jac / np.where(scale > 0, scale, 1))
    variance = 2 * found.cost / (data.y.size - data.parameters.size)
    return Digits(
        bool(found.success),
        int(found.nfev),
        agreement(found.x, data.parameters),
        agreement(np.sqrt(variance) * np.linalg.norm(inverse, axis=1) / scale, data.deviations),
        agreement(2 * found.cost, data.sum_of_squares),
    )


SOLVERS: dict[str, Callable[[Dataset, np.ndarray], Digits]] = {
    "levenberg-marquardt": ours("levenberg-marquardt"),
    "dogleg": ours("dogleg"),
    PEER: scipy_lm,
}


def main() -> None:
    """Fit everything, print what agrees, and say what holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", help="parts of names, instead of all")
    parser.add_argument("--solvers", nargs="+", choices=SOLVERS, default=list(SOLVERS))
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    screen = console()
    chosen = [d for d in load().values() if not options.datasets or any(part in d.name for part in options.datasets)]
    found: dict[str, dict[tuple[str, str], Digits]] = {name: {} for name in options.solvers}
    with screen.status("") as status:
        for data in chosen:
            for name in options.solvers:
                for label, start in zip(STARTS, data.starts, strict=True):
                    status.update(f"{data.name}, {name}")
                    found[name][data.name, label] = SOLVERS[name](data, start)
    for name, rows in found.items():
        print_digits(screen, name, chosen, rows)
    screen.print("The claims, as measured in this run:")
    for line in verdicts(found):
        screen.print(line, soft_wrap=True)


def print_digits(
    screen: Console, solver: str, chosen: Iterable[Dataset], rows: Mapping[tuple[str, str], Digits]
) -> None:
    """A line for each dataset: steps and digits from the far start, then from the near one."""
    columns = ["", "level"]
    for label in ("far", "near"):
        columns += [f"{label}\nsteps", f"{label}\nb", f"{label}\ns.d.", f"{label}\nsum"]
    table = plain_table(solver, columns, "Digits of parameters, deviations and sum; ! is a fit that claims no success.")
    for data in chosen:
        cells = []
        for label in STARTS:
            fit = rows[data.name, label]
            cells.append(f"{fit.steps}{'' if fit.success else '!'}")
            cells += [f"{digits:.1f}" for digits in (fit.parameters, fit.deviations, fit.sum_of_squares)]
        table.add_row(data.name, data.level, *cells)
    screen.print(table)


def verdicts(found: Mapping[str, Mapping[tuple[str, str], Digits]]) -> list[str]:
    """Each claim, with what was measured of it and the fits that fall short."""
    solved = {name: [key for key, fit in rows.items() if fit.parameters >= WANTED] for name, rows in found.items()}
    lines = []
    for name, rows in found.items():
        short = [" ".join(key) for key in rows if key not in solved[name]]
        text = f"{name}: {WANTED} digits of the parameters in {len(solved[name])} of {len(rows)} fits"
        lines.append(_claim(not short, f"{text} (not {', '.join(short)})" if short else text))
    ours = "levenberg-marquardt"
    if ours not in found:
        return lines
    if PEER in found:
        lines.append(_claim(len(solved[ours]) >= len(solved[PEER]), f"{ours} solves at least as many as {PEER}"))
    others = [fit for key, fit in found[ours].items() if key in solved[ours] and key[0] != EXACT_DATA]
    least = min((min(fit.deviations, fit.sum_of_squares) for fit in others), default=math.nan)
    text = (
        f"{WANTED} digits of deviations and sums too, where parameters have them (least: {least:.1f}; but {EXACT_DATA})"
    )
    lines.append(_claim(least >= WANTED, text))
    false = [" ".join(key) for key, fit in found[ours].items() if fit.success and fit.parameters < WANTED]
    lines.append(_claim(not false, f"no success claimed elsewhere: {', '.join(false) or 'none'}"))
    return lines


def _claim(holds: bool, text: str) -> str:
    return f"{'holds' if holds else 'FAILS'}  {text}"


if __name__ == "__main__":
    main()
