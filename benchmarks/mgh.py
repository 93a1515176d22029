"""The functions of Moré, Garbow and Hillstrom as residuals, with their starts and their published minima.

Each is written from its definition in the paper, and compared with sif2jax by ``benchmarks.least_squares`` where that
has it in the same size. Numbers in brackets are those of the paper; the data, starts and minima are in ``mgh.json``.

References: Moré, Garbow and Hillstrom, Testing unconstrained optimization software, ACM TOMS 7 (1981), section 3,
    doi:10.1145/355934.355936.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

Residuals = Callable[[Any], Any]
_FILE = json.loads(Path(__file__).with_suffix(".json").read_text())
DATA = {name: np.array(values, float) for name, values in _FILE["data"].items()}


class Problem(NamedTuple):
    """A sum of squares, its start, and the published values at its local minima, of which the first is the least.

    Attributes:
        name: the name in the paper, with n where it varies.
        residuals: ``x -> f_1 ... f_m``.
        start: the standard starting point.
        published: sums of squares at minimizers, those at infinity included, as printed.
        minima: the same to the digits on which MINPACK and optimistix agree in double precision.
        peer: the class in sif2jax of which this is the sum of squares; None where there is none.
    """

    name: str
    residuals: Residuals
    start: tuple[float, ...]
    published: tuple[float, ...]
    minima: tuple[float, ...]
    peer: str | None = None


def helical_valley(x: Any) -> Any:  # (7)
    angle = jnp.arctan(x[1] / x[0]) / (2 * jnp.pi) + jnp.where(x[0] < 0, 0.5, 0.0)
    return jnp.stack([10 * (x[2] - 10 * angle), 10 * (jnp.hypot(x[0], x[1]) - 1), x[2]])


def bard(x: Any) -> Any:  # (8)
    u = jnp.arange(1.0, 16.0)
    return jnp.asarray(DATA["bard"]) - (x[0] + u / ((16 - u) * x[1] + jnp.minimum(u, 16 - u) * x[2]))


def gaussian(x: Any) -> Any:  # (9)
    t = (8 - jnp.arange(1.0, 16.0)) / 2
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - jnp.asarray(DATA["gaussian"])


def meyer(x: Any) -> Any:  # (10)
    return x[0] * jnp.exp(x[1] / (45 + 5 * jnp.arange(1.0, 17.0) + x[2])) - jnp.asarray(DATA["meyer"])


def gulf(x: Any) -> Any:  # (11), m = 99; without the factor m i, a misprint that the paper's minimizer does not satisfy
    t = jnp.arange(1.0, 100.0) / 100
    return jnp.exp(-(jnp.abs(25 + (-50 * jnp.log(t)) ** (2 / 3) - x[1]) ** x[2]) / x[0]) - t


def box_3d(x: Any) -> Any:  # (12), m = 10
    t = jnp.arange(1.0, 11.0) / 10
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


def powell_singular(x: Any) -> Any:  # (13)
    return jnp.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def wood(x: Any) -> Any:  # (14)
    odd = [10 * (x[1] - x[0] ** 2), 1 - x[0], 90**0.5 * (x[3] - x[2] ** 2)]
    return jnp.stack([*odd, 1 - x[2], 10**0.5 * (x[1] + x[3] - 2), (x[1] - x[3]) / 10**0.5])


def kowalik_osborne(x: Any) -> Any:  # (15)
    u = jnp.asarray(DATA["kowalik_u"])
    return jnp.asarray(DATA["kowalik_y"]) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Any) -> Any:  # (16), m = 20
    t = jnp.arange(1.0, 21.0) / 5
    return (x[0] + t * x[1] - jnp.exp(t)) ** 2 + (x[2] + x[3] * jnp.sin(t) - jnp.cos(t)) ** 2


def osborne_1(x: Any) -> Any:  # (17)
    t = 10 * jnp.arange(33.0)
    return jnp.asarray(DATA["osborne_1"]) - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


def biggs_exp6(x: Any) -> Any:  # (18), m = 13
    t = jnp.arange(1.0, 14.0) / 10
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    return x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y


def osborne_2(x: Any) -> Any:  # (19)
    t = jnp.arange(65.0) / 10
    bells = [x[k] * jnp.exp(-((t - x[k + 7]) ** 2) * x[k + 4]) for k in (1, 2, 3)]
    return jnp.asarray(DATA["osborne_2"]) - (x[0] * jnp.exp(-t * x[4]) + sum(bells))


def watson(x: Any) -> Any:  # (20), m = 31
    t, j = np.arange(1, 30)[:, None] / 29, np.arange(len(x))
    powers, slopes = jnp.asarray(t**j), jnp.asarray(np.where(j > 0, j * t ** np.maximum(j - 1.0, 0), 0))
    return jnp.concatenate([slopes @ x - (powers @ x) ** 2 - 1, x[:1], (x[1] - x[0] ** 2 - 1)[None]])


def penalty_2(x: Any) -> Any:  # (24)
    n, root = len(x), 1e-5**0.5
    i = np.arange(2, n + 1)
    y = jnp.asarray(np.exp(i / 10) + np.exp((i - 1) / 10))
    first, last = (x[0] - 0.2)[None], (jnp.sum(jnp.arange(n, 0.0, -1.0) * x**2) - 1)[None]
    pairs = root * (jnp.exp(x[1:] / 10) + jnp.exp(x[:-1] / 10) - y)
    return jnp.concatenate([first, pairs, root * (jnp.exp(x[1:] / 10) - np.exp(-0.1)), last])


def variably_dimensioned(x: Any) -> Any:  # (25)
    moment = jnp.sum(jnp.arange(1.0, len(x) + 1) * (x - 1))
    return jnp.concatenate([x - 1, jnp.stack([moment, moment**2])])


def discrete_boundary_value(x: Any) -> Any:  # (28)
    h, padded = 1 / (len(x) + 1), jnp.pad(x, 1)
    t = h * jnp.arange(1.0, len(x) + 1)
    return 2 * x - padded[:-2] - padded[2:] + h**2 * (x + t + 1) ** 3 / 2


def discrete_integral_equation(x: Any) -> Any:  # (29)
    h = 1 / (len(x) + 1)
    t = h * np.arange(1.0, len(x) + 1)
    kernel = np.tril(np.outer(1 - t, t)) + np.triu(np.outer(t, 1 - t), 1)
    return x + h * (jnp.asarray(kernel) @ (x + jnp.asarray(t) + 1) ** 3) / 2


def broyden_tridiagonal(x: Any) -> Any:  # (30)
    padded = jnp.pad(x, 1)
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def broyden_banded(x: Any) -> Any:  # (31)
    i, j = np.indices((len(x), len(x)))
    band = ((j >= i - 5) & (j <= i + 1) & (j != i)).astype(float)
    return x * (2 + 5 * x**2) + 1 - jnp.asarray(band) @ (x * (1 + x))


def linear_rank_1_zeros(x: Any) -> Any:  # (34), m = 2 n: with zero columns and rows
    n, one = len(x), jnp.full(1, -1.0)
    inner = jnp.arange(1.0, 2 * n - 1) * jnp.sum(jnp.arange(2.0, n) * x[1:-1]) - 1
    return jnp.concatenate([one, inner, one])


def chebyquad(x: Any) -> Any:  # (35), m = n
    before, current, sums = jnp.ones_like(x), 2 * x - 1, []
    for i in range(1, len(x) + 1):
        sums.append(jnp.mean(current) - (0.0 if i % 2 else -1 / (i**2 - 1)))  # less the integral
        before, current = current, 2 * (2 * x - 1) * current - before
    return jnp.stack(sums)


RESIDUALS: dict[str, Residuals] = {
    "rosenbrock": lambda x: jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]]),  # (1)
    "freudenstein_roth": lambda x: jnp.stack(  # (2)
        [-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]]
    ),
    "powell_badly_scaled": lambda x: jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001]),
    "brown_badly_scaled": lambda x: jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2]),  # (4)
    "beale": lambda x: jnp.stack(  # (5)
        [y - x[0] * (1 - x[1] ** (i + 1)) for i, y in enumerate((1.5, 2.25, 2.625))]
    ),
    "jennrich_sampson": lambda x: (  # (6), m = 10
        2 + 2 * (i := jnp.arange(1.0, 11.0)) - (jnp.exp(i * x[0]) + jnp.exp(i * x[1]))
    ),
    "extended_rosenbrock": lambda x: jnp.concatenate([10 * (x[1::2] - x[::2] ** 2), 1 - x[::2]]),  # (21)
    "extended_powell": lambda x: jnp.concatenate([powell_singular(x[k : k + 4]) for k in range(0, len(x), 4)]),  # (22)
    "penalty_1": lambda x: jnp.concatenate([1e-5**0.5 * (x - 1), (jnp.sum(x**2) - 0.25)[None]]),  # (23)
    "trigonometric": lambda x: (  # (26)
        len(x) - jnp.sum(jnp.cos(x)) + jnp.arange(1.0, len(x) + 1) * (1 - jnp.cos(x)) - jnp.sin(x)
    ),
    "brown_almost_linear": lambda x: jnp.concatenate(  # (27)
        [x[:-1] + jnp.sum(x) - (len(x) + 1), (jnp.prod(x) - 1)[None]]
    ),
    "linear_full_rank": lambda x: jnp.concatenate([x, jnp.zeros_like(x)]) - jnp.sum(x) / len(x) - 1,  # (32), m = 2 n
    "linear_rank_1": lambda x: (  # (33), m = 2 n
        jnp.arange(1.0, 2 * len(x) + 1) * jnp.sum(jnp.arange(1.0, len(x) + 1) * x) - 1
    ),
}


def _problem(entry: dict[str, Any]) -> Problem:
    residuals = RESIDUALS.get(entry["residuals"]) or globals()[entry["residuals"]]
    return Problem(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()} | {"residuals": residuals})


PROBLEMS = [_problem(entry) for entry in _FILE["problems"]]
