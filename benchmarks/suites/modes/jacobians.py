"""Jacobians, tall, square and wide: where does reverse mode overtake forward?"""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks import reading
from benchmarks.cases import Case, Choice, Contestant, Finding, Plot, Race
from benchmarks.peers import everyone, operations
from benchmarks.peers.flat import Flat
from benchmarks.suites.modes.regret import regret

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
QUICK_RATIOS = (1 / 64, 1 / 4, 1, 4, 64)
RATIOS = (1 / 64, 1 / 16, 1 / 4, 1 / 2.25, 1, 2.25, 4, 16, 64)  # m/n, at the same m n
QUICK_ENTRIES, ENTRIES = 2**14, 2**16  # m n
GROWTH = (32, 64, 128, 512, 1024)  # of square ones, beside that of ENTRIES
WIDTH = 64
EXAMPLES = 16

BOTH = {
    "JAX": ("jax.jacfwd", "jax.jacrev"),
    "torch.func": ("torch.func.jacfwd", "torch.func.jacrev"),
}
"""The libraries that have both modes, and what they are called there."""


def function(m: int, n: int) -> Flat:
    """From n numbers to m: two layers of a network whose inputs are sums over examples, so that no entry is cheap."""
    rng = np.random.default_rng(0)
    into, out = rng.normal(size=(EXAMPLES, n, WIDTH)) / math.sqrt(n), rng.normal(size=(WIDTH, m)) / math.sqrt(WIDTH)

    def build(ops: operations.Operations) -> Callable[..., Any]:
        def fun(x: Any, into: Any, out: Any) -> Any:
            hidden = ops.tanh(ops.einsum("n,bnh->bh", x, into))
            return ops.sum(ops.tanh(ops.einsum("bh,hm->bm", hidden, out)), axis=0)

        return fun

    return Flat(build, rng.normal(size=n), (into, out))


def cases(choice: Choice) -> Iterator[Case]:
    """A race for each shape."""
    entries = QUICK_ENTRIES if choice.quick else ENTRIES
    for ratio in QUICK_RATIOS if choice.quick else RATIOS:
        m = round(math.sqrt(entries * ratio))
        yield race(choice, m, round(entries / m))
    for size in () if choice.quick else GROWTH:
        yield race(choice, size, size)


def race(choice: Choice, m: int, n: int) -> Race:
    """One shape."""
    flat = function(m, n)
    return Race(
        f"modes/jacobian/m={m}/n={n}",
        f"Jacobian of {m} outputs by {n} inputs",
        "jacobian",
        partial(contestants, flat, choice),
        partial(reference, flat),
        TOLERANCE[choice.dtype],
        {"m": m, "n": n, "m/n": m / n},
        budget=0.1 if choice.quick else 0.5,
        rounds=choice.rounds,
        claims=partial(regret, "Jacobian"),
    )


def contestants(flat: Flat, choice: Choice) -> Iterator[Contestant]:
    """Ours chooses; the others are told."""
    fun = flat.build(operations.for_jax())
    args = tuple(jnp.asarray(array, float) for array in (flat.x, *flat.data))
    yield Contestant("curvature.jacobian", "curvature", curvature.jacobian(fun), args)
    yield Contestant("jax.jacfwd", "jax", jax.jacfwd(fun), args)
    yield Contestant("jax.jacrev", "jax", jax.jacrev(fun), args)
    yield from everyone.others(flat, "jacobian", choice, compiled=False)


def reference(flat: Flat) -> np.ndarray:
    """In double precision, by whichever mode takes fewer passes."""
    with jax.enable_x64(True):
        fun = flat.build(operations.for_jax())
        args = tuple(jnp.asarray(array) for array in (flat.x, *flat.data))
        outputs, inputs = flat.data[1].shape[1], flat.x.size
        return np.asarray(jax.jit((jax.jacrev if outputs < inputs else jax.jacfwd)(fun))(*args))


def crossover(outcomes: reading.Outcomes, forward: str, reverse: str) -> float | None:
    """The m/n at which both take the same time: between the two shapes around it, straight in logarithms."""
    points = sorted(
        (math.log(outcome.sizes["m/n"]), math.log(ratio))
        for outcome in outcomes.values()
        if (ratio := reading.share(outcome, forward, reverse))
    )
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 >= 0 > y1:  # reverse was faster, forward is
            return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))
    return None


def of_ratios(outcomes: reading.Outcomes) -> dict[str, Any]:
    """The races in which only m/n differs: those of one m n."""
    found = reading.part(outcomes, "modes/jacobian/")
    entries = [race.sizes["m"] * race.sizes["n"] for race in found.values()]
    most = max(entries, key=entries.count, default=0)
    return {id: race for id, race in found.items() if abs(race.sizes["m"] * race.sizes["n"] / most - 1) < 0.01}


def plots(outcomes: reading.Outcomes) -> list[Plot]:
    """Time against m/n, and against n where m = n."""
    races = of_ratios(outcomes)
    square = {
        id: race for id, race in reading.part(outcomes, "modes/jacobian/").items() if race.sizes["m"] == race.sizes["n"]
    }
    found = {library: crossover(races, *modes) for library, modes in BOTH.items()}
    where = ", ".join(f"at m/n = {value:.2g} in {library}" for library, value in found.items() if value)
    title = f"Forward overtakes reverse {where}" if where else "Forward and reverse do not cross in this run"
    every = [
        Plot("jacobian-crossover", title, "outputs over inputs, m/n", "seconds", reading.curves(races, "m/n")),
        Plot("jacobian-square", "Square Jacobians", "inputs n = outputs m", "seconds", reading.curves(square, "n")),
    ]
    return [plot for plot in every if plot.lines]


def findings(outcomes: reading.Outcomes) -> list[Finding]:
    """The crossover of each library."""
    races = of_ratios(outcomes)
    if not races:
        return []
    sentences = []
    for library, (forward, reverse) in BOTH.items():
        ratio = crossover(races, forward, reverse)
        ends = [reading.share(race, forward, reverse) for race in sorted(races.values(), key=lambda r: r.sizes["m/n"])]
        where = "they do not cross" if ratio is None else f"they take the same time at m/n = {ratio:.2g}"
        sentences.append(
            f"In {library} forward takes {reading.times(ends[0])} as long as reverse at the widest shape and "
            f"{reading.times(ends[-1])} at the tallest; {where}."
        )
    question = "At which shape of a Jacobian does one mode overtake the other?"
    return [Finding(question, " ".join(sentences), list(races))]
