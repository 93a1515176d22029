"""What is said of automatic differentiation, put to the test: each saying with the rows that confirm or refute it."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from benchmarks.cases import Case, Choice, Contestant, Finding, Outcome, Outcomes, Plot, Race
from benchmarks.models import MODELS, Model, mlp
from benchmarks.peers import everyone, higher, jax_ways
from benchmarks.reading import MISSING, over, part, ratio_of_fastest, share, shares, spread
from benchmarks.suites import modes
from benchmarks.timing import digits

TITLE = "Folklore"
QUESTION = "Which of the things that everybody says are so?"

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
MAGNITUDES = 100  # "orders of magnitude", in the plural

ORDER_ROWS = (
    "curvature.hvp", "jax, forward over reverse", "jax, reverse over reverse", "torch.func, forward over reverse",
    "torch.func, reverse over reverse", "curvature.hessian", "jax.hessian", "jax.jacrev of jax.grad",
    "torch.func.hessian",
)  # fmt: skip
LOOP = "torch.autograd.functional.hessian"
VECTORIZED_ROWS = ("curvature.hessian", "jax.hessian", "torch.func.hessian", LOOP, f"{LOOP}, vectorized")
SHAPE_ROWS = ("curvature.jacobian", "jax.jacfwd", "jax.jacrev", "torch.func.jacfwd", "torch.func.jacrev")


def cases(choice: Choice) -> Iterator[Case]:
    """The order of a product, the order of a derivative, the shape of a Jacobian, and the vectorized Hessian."""
    few = choice.quick and not choice.models
    for name in filter(choice.wants, ORDERED[:1] if few else ORDERED):
        for derivative in ("hvp",) if few else ("hvp", "hessian"):
            yield of_model(choice, f"order/{derivative}", MODELS[name](), derivative, ORDER_ROWS)
    for name, make, points, orders in HIGHER:
        for order in orders if choice.quick else range(1, MOST + 1):
            flat = make(points)
            yield Race(
                f"folklore/higher/{name}/points={points}/order={order}",
                f"derivative of order {order} of a {name} of one variable at {points:,} points", name,
                partial(higher.contestants, flat, order, choice, compiled=not choice.quick),
                partial(higher.reference, flat, order), choice.tolerance(), {"order": order, "points": points},
                **choice.effort(),
            )  # fmt: skip
    for m, n in SHAPES:
        ways = partial(only, partial(modes.jacobian_ways, modes.function(m, n), choice), SHAPE_ROWS)
        yield modes.jacobian_race(choice, "folklore/shape", m, n, contestants=ways, claims=lambda outcome: [])
    for sizes, examples in VECTORIZED[:1] if choice.quick else VECTORIZED:
        yield of_model(choice, "vectorized/hessian", mlp(sizes, examples), "hessian", VECTORIZED_ROWS)


def of_model(choice: Choice, id: str, model: Model, derivative: str, names: Sequence[str]) -> Race:
    n, everybody = model.num_parameters, partial(everyone.of_model, model, derivative, choice, compiled=False)
    return Race(
        f"folklore/{id}/{model.name}/n={n}", f"{derivative}, {model.title}, {n:,} parameters", model.name,
        partial(only, everybody, names), partial(jax_ways.reference, model, derivative), choice.tolerance(), {"n": n},
        **choice.effort(),
    )  # fmt: skip


def only(make: Callable[[], Iterator[Contestant]], names: Sequence[str]) -> list[Contestant]:
    return [contestant for contestant in make() if contestant.name in names]


def plots(outcomes: Outcomes) -> list[Plot]:
    found = []
    for name, _, points, _ in HIGHER:
        title = f"Derivatives of a {name} of one variable at {points:,} points"
        found += over(
            of_higher(outcomes, name, points), "order", f"higher-{name}-{points}", title, "order", x_log=False
        )
    return found


def of_higher(outcomes: Outcomes, name: str, points: int) -> dict[str, Outcome]:
    return part(outcomes, f"folklore/higher/{name}/points={points}/")


def findings(outcomes: Outcomes) -> list[Finding]:
    sayings = {
        "order": ("Forward over reverse is the fastest way to second derivatives", order_sentences),
        "higher": (f"JAX computes higher derivatives orders of magnitude ({MAGNITUDES} times) faster than PyTorch or "
                   "TensorFlow", higher_sentences),
        "shape": ("Forward mode for tall Jacobians, reverse for wide ones", shape_sentences),
        "vectorized": ("functorch's vectorized Hessian is faster than the loop of torch.autograd.functional",
                       vectorized_sentences),
    }  # fmt: skip
    return [
        Finding(f'"{saying}": is it so?', " ".join(sentences(races)) or MISSING)
        for kind, (saying, sentences) in sayings.items()
        if (races := part(outcomes, f"folklore/{kind}/"))
    ]


def order_sentences(races: Outcomes) -> Iterator[str]:
    pairs = {
        ("Hessian products in JAX", "hvp"): ("jax, reverse over reverse", "jax, forward over reverse"),
        ("Hessian products in torch.func", "hvp"): ("torch.func, reverse over reverse",
                                                    "torch.func, forward over reverse"),
        ("Hessians in JAX", "hessian"): ("jax.jacrev of jax.grad", "jax.hessian"),
        ("Hessians in torch.func", "hessian"): ("torch.func, reverse over reverse", "torch.func.hessian"),
    }  # fmt: skip
    for (what, derivative), (slow, fast) in pairs.items():
        some = part(races, f"folklore/order/{derivative}/")
        if found := shares(some, slow, fast):
            memory = shares(some, slow, fast, "temporary_bytes")
            beside = f" and {spread(memory)} its temporary memory" if memory else ""
            yield (
                f"{what}: reverse over reverse takes {spread(found)} the time of forward over reverse{beside}; "
                f"forward over reverse is faster in {sum(ratio > 1 for ratio in found)} of {len(found)} cases."
            )


def higher_sentences(outcomes: Outcomes) -> Iterator[str]:
    """The ratio by order, each library's fastest way against JAX's fastest compiled one."""
    for name, _, points, _ in HIGHER:
        races = sorted(of_higher(outcomes, name, points).values(), key=lambda race: race.sizes["order"])
        for peer in ("torch", "tensorflow", "autograd"):
            found = {int(race.sizes["order"]): r for race in races if (r := ratio_of_fastest(race, peer, "jax"))}
            if found:
                listed = ", ".join(f"{digits(ratio)} at order {order}" for order, ratio in found.items())
                far = [str(order) for order, ratio in found.items() if ratio >= MAGNITUDES]
                holds = f"holds at order {', '.join(far)}" if far else "does not hold"
                yield f"{name}, {points:,} points, {peer} over JAX: {listed}; it {holds}."
        if races:
            eager = [share(race, "jax, nested jvp, not compiled", "jax, nested jvp") for race in races]
            yield f"JAX itself, not compiled, takes {spread(eager)} as long as compiled."


def shape_sentences(races: Outcomes) -> Iterator[str]:
    for library, pair in modes.BOTH.items():
        for race in races.values():
            if ratio := share(race, *pair):
                m, n = int(race.sizes["m"]), int(race.sizes["n"])
                winner, factor = ("forward" if ratio < 1 else "reverse"), digits(max(ratio, 1 / ratio))
                said = "" if m == n else ", as said" if (ratio < 1) == (m > n) else ", against the saying"
                yield f"{library}, {m} by {n}: {winner} is {factor} times as fast{said}."


def vectorized_sentences(races: Outcomes) -> Iterator[str]:
    for race in races.values():
        found = {name: r for name in VECTORIZED_ROWS if name != LOOP and (r := share(race, LOOP, name))}
        listed = ", ".join(f"{digits(ratio)} times that of {name}" for name, ratio in found.items())
        yield f"{int(race.sizes['n']):,} parameters: the loop takes {listed or 'a time that was not measured'}."
