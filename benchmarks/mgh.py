"""The functions of Moré, Garbow and Hillstrom as residuals, with their starts and their published minima.

Each is written from its definition in the paper, and held against sif2jax by ``benchmarks.least_squares`` where that
has it in the same size.

References: Moré, Garbow and Hillstrom, Testing unconstrained optimization software, ACM TOMS 7 (1981), section 3,
    doi:10.1145/355934.355936.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

Residuals = Callable[[Any], Any]


@dataclass(frozen=True)
class Problem:
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


def rosenbrock(x: Any) -> Any:
    """(1)."""
    return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_roth(x: Any) -> Any:
    """(2)."""
    return jnp.stack([-13 + x[0] + ((5 - x[1]) * x[1] - 2) * x[1], -29 + x[0] + ((x[1] + 1) * x[1] - 14) * x[1]])


def powell_badly_scaled(x: Any) -> Any:
    """(3)."""
    return jnp.stack([1e4 * x[0] * x[1] - 1, jnp.exp(-x[0]) + jnp.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x: Any) -> Any:
    """(4)."""
    return jnp.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: Any) -> Any:
    """(5)."""
    return jnp.stack([y - x[0] * (1 - x[1] ** (i + 1)) for i, y in enumerate((1.5, 2.25, 2.625))])


def jennrich_sampson(x: Any) -> Any:
    """(6), m = 10."""
    i = jnp.arange(1.0, 11.0)
    return 2 + 2 * i - (jnp.exp(i * x[0]) + jnp.exp(i * x[1]))


def helical_valley(x: Any) -> Any:
    """(7)."""
    angle = jnp.arctan(x[1] / x[0]) / (2 * jnp.pi) + jnp.where(x[0] < 0, 0.5, 0.0)
    return jnp.stack([10 * (x[2] - 10 * angle), 10 * (jnp.hypot(x[0], x[1]) - 1), x[2]])


BARD = (0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39)


def bard(x: Any) -> Any:
    """(8)."""
    u = jnp.arange(1.0, 16.0)
    v = 16 - u
    return jnp.array(BARD) - (x[0] + u / (v * x[1] + jnp.minimum(u, v) * x[2]))


GAUSSIAN = (0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521)


def gaussian(x: Any) -> Any:
    """(9)."""
    t = (8 - jnp.arange(1.0, 16.0)) / 2
    return x[0] * jnp.exp(-x[1] * (t - x[2]) ** 2 / 2) - jnp.array([*GAUSSIAN, 0.3989, *GAUSSIAN[::-1]])


MEYER = (34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872)


def meyer(x: Any) -> Any:
    """(10)."""
    t = 45 + 5 * jnp.arange(1.0, 17.0)
    return x[0] * jnp.exp(x[1] / (t + x[2])) - jnp.array([float(y) for y in MEYER])


def gulf(x: Any) -> Any:
    """(11), m = 99; without the factor m i, a misprint of the paper that its own minimizer does not satisfy."""
    t = jnp.arange(1.0, 100.0) / 100
    y = 25 + (-50 * jnp.log(t)) ** (2 / 3)
    return jnp.exp(-(jnp.abs(y - x[1]) ** x[2]) / x[0]) - t


def box_3d(x: Any) -> Any:
    """(12), m = 10."""
    t = jnp.arange(1.0, 11.0) / 10
    return jnp.exp(-t * x[0]) - jnp.exp(-t * x[1]) - x[2] * (jnp.exp(-t) - jnp.exp(-10 * t))


def powell_singular(x: Any) -> Any:
    """(13)."""
    return jnp.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def wood(x: Any) -> Any:
    """(14)."""
    return jnp.stack(
        [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            90**0.5 * (x[3] - x[2] ** 2),
            1 - x[2],
            10**0.5 * (x[1] + x[3] - 2),
            (x[1] - x[3]) / 10**0.5,
        ]
    )


KOWALIK_Y = (0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246)
KOWALIK_U = (4.0, 2.0, 1.0, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625)


def kowalik_osborne(x: Any) -> Any:
    """(15)."""
    u = jnp.array(KOWALIK_U)
    return jnp.array(KOWALIK_Y) - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_dennis(x: Any) -> Any:
    """(16), m = 20."""
    t = jnp.arange(1.0, 21.0) / 5
    return (x[0] + t * x[1] - jnp.exp(t)) ** 2 + (x[2] + x[3] * jnp.sin(t) - jnp.cos(t)) ** 2


# fmt: off
OSBORNE_1 = (
    0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603,
    0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411,
    0.406,
)
OSBORNE_2 = (
    1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606,
    0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423,
    0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
    0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098,
    0.054,
)
# fmt: on


def osborne_1(x: Any) -> Any:
    """(17)."""
    t = 10 * jnp.arange(33.0)
    return jnp.array(OSBORNE_1) - (x[0] + x[1] * jnp.exp(-t * x[3]) + x[2] * jnp.exp(-t * x[4]))


def biggs_exp6(x: Any) -> Any:
    """(18), m = 13."""
    t = jnp.arange(1.0, 14.0) / 10
    y = jnp.exp(-t) - 5 * jnp.exp(-10 * t) + 3 * jnp.exp(-4 * t)
    return x[2] * jnp.exp(-t * x[0]) - x[3] * jnp.exp(-t * x[1]) + x[5] * jnp.exp(-t * x[4]) - y


def osborne_2(x: Any) -> Any:
    """(19)."""
    t = jnp.arange(65.0) / 10
    bells = [x[k] * jnp.exp(-((t - x[k + 7]) ** 2) * x[k + 4]) for k in (1, 2, 3)]
    return jnp.array(OSBORNE_2) - (x[0] * jnp.exp(-t * x[4]) + sum(bells))


def watson(x: Any) -> Any:
    """(20), m = 31."""
    t = np.arange(1, 30)[:, None] / 29
    j = np.arange(len(x))
    powers, derivatives = t**j, np.where(j > 0, j * t ** np.maximum(j - 1.0, 0), 0)
    return jnp.concatenate(
        [jnp.asarray(derivatives) @ x - (jnp.asarray(powers) @ x) ** 2 - 1, x[:1], (x[1] - x[0] ** 2 - 1)[None]]
    )


def extended_rosenbrock(x: Any) -> Any:
    """(21)."""
    odd, even = x[::2], x[1::2]
    return jnp.concatenate([10 * (even - odd**2), 1 - odd])


def extended_powell(x: Any) -> Any:
    """(22)."""
    return jnp.concatenate([powell_singular(x[k : k + 4]) for k in range(0, len(x), 4)])


def penalty_1(x: Any) -> Any:
    """(23)."""
    return jnp.concatenate([1e-5**0.5 * (x - 1), (jnp.sum(x**2) - 0.25)[None]])


def penalty_2(x: Any) -> Any:
    """(24)."""
    n = len(x)
    i = np.arange(2, n + 1)
    y = jnp.asarray(np.exp(i / 10) + np.exp((i - 1) / 10))
    return jnp.concatenate(
        [
            (x[0] - 0.2)[None],
            1e-5**0.5 * (jnp.exp(x[1:] / 10) + jnp.exp(x[:-1] / 10) - y),
            1e-5**0.5 * (jnp.exp(x[1:] / 10) - np.exp(-0.1)),
            (jnp.sum(jnp.arange(n, 0.0, -1.0) * x**2) - 1)[None],
        ]
    )


def variably_dimensioned(x: Any) -> Any:
    """(25)."""
    moment = jnp.sum(jnp.arange(1.0, len(x) + 1) * (x - 1))
    return jnp.concatenate([x - 1, jnp.stack([moment, moment**2])])


def trigonometric(x: Any) -> Any:
    """(26)."""
    n = len(x)
    i = jnp.arange(1.0, n + 1)
    return n - jnp.sum(jnp.cos(x)) + i * (1 - jnp.cos(x)) - jnp.sin(x)


def brown_almost_linear(x: Any) -> Any:
    """(27)."""
    return jnp.concatenate([x[:-1] + jnp.sum(x) - (len(x) + 1), (jnp.prod(x) - 1)[None]])


def discrete_boundary_value(x: Any) -> Any:
    """(28)."""
    n = len(x)
    h = 1 / (n + 1)
    t = h * jnp.arange(1.0, n + 1)
    padded = jnp.pad(x, 1)
    return 2 * x - padded[:-2] - padded[2:] + h**2 * (x + t + 1) ** 3 / 2


def discrete_integral_equation(x: Any) -> Any:
    """(29)."""
    n = len(x)
    h = 1 / (n + 1)
    t = h * np.arange(1.0, n + 1)
    lower = np.tril(np.outer(1 - t, t))
    upper = np.triu(np.outer(t, 1 - t), 1)
    return x + h * (jnp.asarray(lower + upper) @ (x + jnp.asarray(t) + 1) ** 3) / 2


def broyden_tridiagonal(x: Any) -> Any:
    """(30)."""
    padded = jnp.pad(x, 1)
    return (3 - 2 * x) * x - padded[:-2] - 2 * padded[2:] + 1


def broyden_banded(x: Any) -> Any:
    """(31)."""
    n = len(x)
    i, j = np.indices((n, n))
    band = ((j >= i - 5) & (j <= i + 1) & (j != i)).astype(float)
    return x * (2 + 5 * x**2) + 1 - jnp.asarray(band) @ (x * (1 + x))


def linear_full_rank(x: Any) -> Any:
    """(32), m = 2 n."""
    n = len(x)
    tail = jnp.full(n, -2 * jnp.sum(x) / (2 * n) - 1)
    return jnp.concatenate([x - 2 * jnp.sum(x) / (2 * n) - 1, tail])


def linear_rank_1(x: Any) -> Any:
    """(33), m = 2 n."""
    n = len(x)
    return jnp.arange(1.0, 2 * n + 1) * jnp.sum(jnp.arange(1.0, n + 1) * x) - 1


def linear_rank_1_zeros(x: Any) -> Any:
    """(34), m = 2 n: with zero columns and rows."""
    n = len(x)
    m = 2 * n
    inner = jnp.arange(1.0, m - 1) * jnp.sum(jnp.arange(2.0, n) * x[1:-1]) - 1
    return jnp.concatenate([jnp.full(1, -1.0), inner, jnp.full(1, -1.0)])


def chebyquad(x: Any) -> Any:
    """(35), m = n."""
    n = len(x)
    before, current = jnp.ones_like(x), 2 * x - 1
    sums = []
    for i in range(1, n + 1):
        integral = 0.0 if i % 2 else -1 / (i**2 - 1)
        sums.append(jnp.mean(current) - integral)
        before, current = current, 2 * (2 * x - 1) * current - before
    return jnp.stack(sums)


def _steps(n: int) -> tuple[float, ...]:
    """The start of (28) and (29): t_j (t_j - 1)."""
    return tuple(j / (n + 1) * (j / (n + 1) - 1) for j in range(1, n + 1))


def _equal(n: int, value: float) -> tuple[float, ...]:
    return (value,) * n


PROBLEMS = [
    Problem("rosenbrock", rosenbrock, (-1.2, 1.0), (0.0,), (0.0,), "ROSENBR"),
    Problem(
        "freudenstein-roth",
        freudenstein_roth,
        (0.5, -2.0),
        (0.0, 48.9842),
        (
            0.0,
            48.984253679,
        ),
        "FREURONE",
    ),
    Problem("powell badly scaled", powell_badly_scaled, (0.0, 1.0), (0.0,), (0.0,), "POWELLBS"),
    Problem("brown badly scaled", brown_badly_scaled, (1.0, 1.0), (0.0,), (0.0,), "BROWNBS"),
    Problem("beale", beale, (1.0, 1.0), (0.0,), (0.0,), "BEALE"),
    Problem("jennrich-sampson", jennrich_sampson, (0.3, 0.4), (124.362,), (124.36218236,), "JENSMP"),
    Problem("helical valley", helical_valley, (-1.0, 0.0, 0.0), (0.0,), (0.0,), "HELIX"),
    Problem(
        "bard",
        bard,
        (1.0, 1.0, 1.0),
        (8.21487e-3, 17.4286),
        (
            0.0082148773066,
            17.428693333,
        ),
        "BARD",
    ),
    Problem("gaussian", gaussian, (0.4, 1.0, 0.0), (1.12793e-8,), (1.1279327696e-08,), "GAUSSIAN"),
    Problem("meyer", meyer, (0.02, 4000.0, 250.0), (87.9458,), (87.945855171,), "MEYER3NE"),
    Problem("gulf", gulf, (5.0, 2.5, 0.15), (0.0,), (0.0,), "GULFNE"),
    Problem("box 3d", box_3d, (0.0, 10.0, 20.0), (0.0,), (0.0,), "BOX3"),
    Problem("powell singular", powell_singular, (3.0, -1.0, 0.0, 1.0), (0.0,), (0.0,), "POWELLSE"),
    Problem("wood", wood, (-3.0, -1.0, -3.0, -1.0), (0.0,), (0.0,), "WOODS"),
    Problem(
        "kowalik-osborne",
        kowalik_osborne,
        (0.25, 0.39, 0.415, 0.39),
        (3.07505e-4, 1.02734e-3),
        (
            0.00030750560385,
            0.0010273430487,
        ),
        "KOWOSBNE",
    ),
    Problem("brown-dennis", brown_dennis, (25.0, 5.0, -5.0, -1.0), (85822.2,), (85822.201626,), "BROWNDEN"),
    Problem("osborne 1", osborne_1, (0.5, 1.5, -1.0, 0.01, 0.02), (5.46489e-5,), (5.4648946975e-05,), "OSBORNEA"),
    Problem(
        "biggs exp6",
        biggs_exp6,
        (1.0, 2.0, 1.0, 1.0, 1.0, 1.0),
        (0.0, 5.65565e-3),
        (
            0.0,
            0.0056556499255,
        ),
        "BIGGS6",
    ),
    Problem(
        "osborne 2",
        osborne_2,
        (1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5),
        (4.01377e-2,),
        (0.040137736294,),
        "OSBORNE2",
    ),
    Problem("watson 6", watson, _equal(6, 0.0), (2.28767e-3,), (0.0022876700536,)),
    Problem("watson 9", watson, _equal(9, 0.0), (1.39976e-6,), (1.3997601381e-06,)),
    Problem("watson 12", watson, _equal(12, 0.0), (4.72238e-10,), (4.7223811027e-10,), "WATSON"),
    Problem("extended rosenbrock", extended_rosenbrock, (-1.2, 1.0) * 5, (0.0,), (0.0,)),
    Problem("extended powell", extended_powell, (3.0, -1.0, 0.0, 1.0) * 3, (0.0,), (0.0,)),
    Problem("penalty 1, 4", penalty_1, (1.0, 2.0, 3.0, 4.0), (2.24997e-5,), (2.2499775009e-05,)),
    Problem(
        "penalty 1, 10",
        penalty_1,
        tuple(float(i) for i in range(1, 11)),
        (7.08765e-5,),
        (7.0876514671e-05,),
        "PENALTY1",
    ),
    Problem("penalty 2, 4", penalty_2, _equal(4, 0.5), (9.37629e-6,), (9.3762930074e-06,)),
    Problem("penalty 2, 10", penalty_2, _equal(10, 0.5), (2.93660e-4,), (0.00029366053746,), "PENALTY2"),
    Problem(
        "variably dimensioned",
        variably_dimensioned,
        tuple(1 - i / 10 for i in range(1, 11)),
        (0.0,),
        (0.0,),
        "VARDIMNE",
    ),
    Problem(
        "trigonometric",
        trigonometric,
        _equal(10, 0.1),
        (0.0, 2.79506e-5),
        (
            0.0,
            2.7950561219e-05,
        ),
        "TRIGON1NE",
    ),
    Problem(
        "brown almost linear",
        brown_almost_linear,
        _equal(10, 0.5),
        (0.0, 1.0),
        (
            0.0,
            1.0,
        ),
        "BROWNALE",
    ),
    Problem("discrete boundary value", discrete_boundary_value, _steps(10), (0.0,), (0.0,), "MOREBVNE"),
    Problem("discrete integral equation", discrete_integral_equation, _steps(10), (0.0,), (0.0,), "INTEQNE"),
    Problem("broyden tridiagonal", broyden_tridiagonal, _equal(10, -1.0), (0.0,), (0.0,), "BROYDN3D"),
    Problem("broyden banded", broyden_banded, _equal(10, -1.0), (0.0,), (0.0,), "BROYDNBD"),
    Problem("linear, full rank", linear_full_rank, _equal(5, 1.0), (5.0,), (5.0,), "ARGLALE"),
    Problem("linear, rank 1", linear_rank_1, _equal(5, 1.0), (10 * 9 / (2 * 21),), (2.1428571429,), "ARGLBLE"),
    Problem("linear, rank 1, zeros", linear_rank_1_zeros, _equal(5, 1.0), (124 / 34,), (3.6470588235,), "ARGLCLE"),
    Problem("chebyquad 7", chebyquad, tuple(i / 8 for i in range(1, 8)), (0.0,), (0.0,)),
    Problem("chebyquad 8", chebyquad, tuple(i / 9 for i in range(1, 9)), (3.51687e-3,), (0.0035168737257,)),
    Problem("chebyquad 9", chebyquad, tuple(i / 10 for i in range(1, 10)), (0.0,), (0.0,)),
    Problem(
        "chebyquad 10", chebyquad, tuple(i / 11 for i in range(1, 11)), (6.50395e-3,), (0.0065039548009,), "CHEBYQADNE"
    ),
]
