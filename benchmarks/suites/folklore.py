"""What is said of automatic differentiation, put to the test: each saying with the rows that bear it out, or do not."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks import reading
from benchmarks.cases import Case, Choice, Contestant, Finding, Outcome, Plot, Race
from benchmarks.models import MODELS, Model, mlp
from benchmarks.peers import everyone, higher, jax_ways
from benchmarks.suites.modes import jacobians
from benchmarks.timing import digits

TITLE = "Folklore"
QUESTION = "Which of the things that everybody says are so?"
REASONS = {
    ("folklore/higher/scalar", "torch.compile"): (
        "nested jax.jvp compiles to the like of ours and takes as long: torch's compiler makes a faster loop of "
        "this elementwise function"
    ),
    ("folklore/order/hessian/convolutional", "torch.func"): (
        "jax.hessian takes longer still: torch's convolutions are faster here than XLA's"
    ),
}
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}

ORDERED = ("mlp", "transformer", "neural-ode", "logistic", "convolutional", "pinn")  # a quick run takes the first
SHAPES = ((8, 512), (64, 64), (512, 8))  # (outputs, inputs): wide, square, tall
VECTORIZED = (((10, 8, 4), 64), ((20, 32, 10), 256), ((32, 64, 10), 256))  # a quick run takes the first

# Function, points, and the orders that a quick run takes; a full one takes all up to MOST.
HIGHER: tuple[tuple[str, Callable[[int], Any], int, tuple[int, ...]], ...] = (
    ("scalar", higher.scalar, 1, (1, 5)),
    ("scalar", higher.scalar, 100_000, (5,)),
    ("network", higher.network, 256, (3,)),
)
MOST = 5
LIBRARIES = ("torch", "tensorflow", "autograd")
MAGNITUDES = 100  # "orders of magnitude", in the plural


def cases(choice: Choice) -> Iterator[Case]:
    """The order of a product, the order of a derivative, the shape of a Jacobian, and the vectorized Hessian."""
    for name in filter(choice.wants, ORDERED[:1] if choice.quick and not choice.models else ORDERED):
        for derivative in ("hvp",) if choice.quick and not choice.models else ("hvp", "hessian"):
            yield of_model(choice, f"order/{derivative}", MODELS[name](), derivative, ORDER_ROWS)
    for name, make, points, orders in HIGHER:
        for order in orders if choice.quick else range(1, MOST + 1):
            yield derivative_of_order(choice, name, make(points), points, order)
    for m, n in SHAPES:
        yield shape(choice, m, n)
    for sizes, examples in VECTORIZED[:1] if choice.quick else VECTORIZED:
        yield of_model(choice, "vectorized/hessian", mlp(sizes, examples), "hessian", VECTORIZED_ROWS)


ORDER_ROWS = (
    "curvature.hvp", "jax, forward over reverse", "jax, reverse over reverse", "torch.func, forward over reverse",
    "torch.func, reverse over reverse", "curvature.hessian", "jax.hessian", "jax.jacrev of jax.grad",
    "torch.func.hessian",
)  # fmt: skip
VECTORIZED_ROWS = (
    "curvature.hessian", "jax.hessian", "torch.func.hessian", "torch.autograd.functional.hessian",
    "torch.autograd.functional.hessian, vectorized",
)  # fmt: skip
SHAPE_ROWS = ("curvature.jacobian", "jax.jacfwd", "jax.jacrev", "torch.func.jacfwd", "torch.func.jacrev")


def of_model(choice: Choice, id: str, model: Model, derivative: str, names: Sequence[str]) -> Race:
    """A derivative of a model, by the ways of those names."""
    n = model.num_parameters
    everybody = partial(everyone.of_model, model, derivative, choice, compiled=False)
    return Race(
        f"folklore/{id}/{model.name}/n={n}",
        f"{derivative}, {model.title}, {n:,} parameters",
        model.name,
        partial(only, everybody, names),
        partial(jax_ways.reference, model, derivative),
        sizes={"n": n},
        **_common(choice),
    )


def derivative_of_order(choice: Choice, name: str, flat: Any, points: int, order: int) -> Race:
    """One derivative of a function of one variable at many points."""
    return Race(
        f"folklore/higher/{name}/points={points}/order={order}",
        f"derivative of order {order} of a {name} of one variable at {points:,} points",
        name,
        partial(higher.contestants, flat, order, choice, compiled=not choice.quick),
        partial(higher.reference, flat, order),
        sizes={"order": order, "points": points},
        **_common(choice),
    )


def shape(choice: Choice, m: int, n: int) -> Race:
    """A Jacobian of one shape."""
    flat = jacobians.function(m, n)
    return Race(
        f"folklore/shape/m={m}/n={n}",
        f"Jacobian of {m} outputs by {n} inputs",
        "jacobian",
        partial(only, partial(jacobians.contestants, flat, choice), SHAPE_ROWS),
        partial(jacobians.reference, flat),
        sizes={"m": m, "n": n},
        **_common(choice),
    )


def _common(choice: Choice) -> dict[str, Any]:
    return {"tolerance": TOLERANCE[choice.dtype], "budget": 0.1 if choice.quick else 0.5, "rounds": choice.rounds}


def only(make: Callable[[], Iterator[Contestant]], names: Sequence[str]) -> list[Contestant]:
    """The contestants of those names."""
    return [contestant for contestant in make() if contestant.name in names]


# ---- what the rows show ----------------------------------------------------------------------------------------------


def plots(outcomes: reading.Outcomes) -> list[Plot]:
    """Time by the order of the derivative."""
    found = []
    for name, _, points, _ in HIGHER:
        races = _higher(outcomes, name, points)
        title = f"Derivatives of a {name} of one variable at {points:,} points"
        lines = reading.curves(races, "order")
        found.append(Plot(f"higher-{name}-{points}", title, "order", "seconds", lines, x_log=False))
    return [plot for plot in found if plot.lines]


def findings(outcomes: reading.Outcomes) -> list[Finding]:
    """A verdict on each saying."""
    every = (order_finding, higher_finding, shape_finding, vectorized_finding)
    return [finding for make in every if (finding := make(outcomes)) is not None]


def order_finding(outcomes: reading.Outcomes) -> Finding | None:
    """Time, and temporary memory where XLA tells it."""
    races = reading.part(outcomes, "folklore/order/")
    pairs = {
        ("Hessian products in JAX", "hvp"): ("jax, reverse over reverse", "jax, forward over reverse"),
        ("Hessian products in torch.func", "hvp"): (
            "torch.func, reverse over reverse", "torch.func, forward over reverse",
        ),
        ("Hessians in JAX", "hessian"): ("jax.jacrev of jax.grad", "jax.hessian"),
        ("Hessians in torch.func", "hessian"): ("torch.func, reverse over reverse", "torch.func.hessian"),
    }  # fmt: skip
    sentences = []
    for (what, derivative), (slow, fast) in pairs.items():
        some = [race for id, race in races.items() if f"/{derivative}/" in id]
        ratios = [ratio for race in some if (ratio := reading.share(race, slow, fast)) is not None]
        wins = sum(ratio > 1 for ratio in ratios)
        if ratios:
            memory = [reading.share(race, slow, fast, "temporary_bytes") for race in some]
            spread = reading.spread(memory)
            beside = "" if spread == "not measured" else f" and {spread} its temporary memory"
            sentences.append(
                f"{what}: reverse over reverse takes {reading.spread(ratios)} the time of forward over "
                f"reverse{beside}; forward over reverse is faster in {wins} of {len(ratios)} cases."
            )
    return _finding("Forward over reverse is the fastest way to second derivatives", sentences, races)


def higher_finding(outcomes: reading.Outcomes) -> Finding | None:
    """The ratio by order, each library's fastest way against JAX's fastest compiled one."""
    sentences = []
    for name, _, points, _ in HIGHER:
        races = sorted(_higher(outcomes, name, points).values(), key=_order)
        for peer in LIBRARIES:
            ratios = {int(race.sizes["order"]): ratio for race in races if (ratio := _against_jax(race, peer))}
            if ratios:
                listed = ", ".join(f"{digits(ratio)} at order {order}" for order, ratio in ratios.items())
                far = [str(order) for order, ratio in ratios.items() if ratio >= MAGNITUDES]
                holds = f"holds at order {', '.join(far)}" if far else "does not hold"
                sentences.append(f"{name}, {points:,} points, {peer} over JAX: {listed}; it {holds}.")
        eager = [reading.share(race, "jax, nested jvp, not compiled", "jax, nested jvp") for race in races]
        if races:
            sentences.append(f"JAX itself, not compiled, takes {reading.spread(eager)} as long as compiled.")
    saying = (
        f"JAX computes higher derivatives orders of magnitude ({MAGNITUDES} times) faster than PyTorch or TensorFlow"
    )
    return _finding(saying, sentences, reading.part(outcomes, "folklore/higher/"))


def _order(race: Outcome) -> float:
    return race.sizes["order"]


def _against_jax(race: Outcome, peer: str) -> float | None:
    """The fastest way of a library over the fastest of JAX's."""
    theirs, jax = (reading.fastest(race, name) for name in (peer, "jax"))
    return None if theirs is None or jax is None else theirs.metrics["seconds"] / jax.metrics["seconds"]


def shape_finding(outcomes: reading.Outcomes) -> Finding | None:
    """Which mode is faster at each shape, and by how much."""
    races, sentences = reading.part(outcomes, "folklore/shape/"), []
    for library, (forward, reverse) in jacobians.BOTH.items():
        for race in races.values():
            ratio = reading.share(race, forward, reverse)
            if ratio is not None:
                m, n = int(race.sizes["m"]), int(race.sizes["n"])
                winner = "forward" if ratio < 1 else "reverse"
                expected = (
                    "" if m == n else (", as said" if (winner == "forward") == (m > n) else ", against the saying")
                )
                sentences.append(
                    f"{library}, {m} by {n}: {winner} is {digits(max(ratio, 1 / ratio))} times as fast{expected}."
                )
    return _finding("Forward mode for tall Jacobians, reverse for wide ones", sentences, races)


def vectorized_finding(outcomes: reading.Outcomes) -> Finding | None:
    """Functorch's Hessian against the loop."""
    races = reading.part(outcomes, "folklore/vectorized/")
    loop = "torch.autograd.functional.hessian"
    sentences = []
    for race in races.values():
        ratios = {
            name: ratio
            for name in ("torch.func.hessian", f"{loop}, vectorized", "jax.hessian", "curvature.hessian")
            if (ratio := reading.share(race, loop, name)) is not None
        }
        listed = ", ".join(f"{digits(ratio)} times that of {name}" for name, ratio in ratios.items())
        sentences.append(
            f"{int(race.sizes['n']):,} parameters: the loop takes {listed or 'a time that was not measured'}."
        )
    return _finding(
        "functorch's vectorized Hessian is faster than the loop of torch.autograd.functional", sentences, races
    )


def _higher(outcomes: reading.Outcomes, name: str, points: int) -> dict[str, Outcome]:
    return reading.part(outcomes, f"folklore/higher/{name}/points={points}/")


def _finding(saying: str, sentences: Sequence[str], races: reading.Outcomes) -> Finding | None:
    """The saying and what was measured; None where no case of it ran."""
    answer = " ".join(sentences) or "Not measured in this run."
    return Finding(f'"{saying}": is it so?', answer, list(races)) if races else None
