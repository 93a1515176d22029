"""What is said of automatic differentiation: derivatives of high order here, the other sayings from the rows of modes.

The functions act entry by entry on many values of one variable, so that the gradient of the sum holds the derivatives.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Case, Choice, Contestant, Finding, Outcome, Outcomes, Plot, Race
from benchmarks.peers import autograd_ways, operations, tensorflow_ways, torch_ways
from benchmarks.peers.flat import Flat, Function, Library
from benchmarks.peers.jax_ways import in_double, named, numbers
from benchmarks.reading import over, part, ratio_of_fastest, share, spread
from benchmarks.suites import modes
from benchmarks.timing import digits

TITLE = "Folklore"
QUESTION = "Which of the things that everybody says are so?"
MOST = 5
MAGNITUDES = 100  # "orders of magnitude", in the plural


def scalar(points: int) -> Flat:
    return Flat(lambda ops: lambda x: ops.exp(ops.sin(x)) * ops.tanh(x), np.linspace(-2, 2, points) + 0.3)


def network(points: int, width: int = 32) -> Flat:
    """A tanh network of one input, as of a PINN, whose points are a batch."""

    def build(ops: operations.Operations) -> Function:
        def fun(x: Any, w0: Any, b0: Any, w1: Any, w2: Any) -> Any:
            hidden = ops.tanh(ops.einsum("b,j->bj", x, w0) + b0)
            return ops.einsum("bj,j->b", ops.tanh(ops.einsum("bi,ij->bj", hidden, w1)), w2)

        return fun

    rng = np.random.default_rng(1)
    shapes = ((width,), (width,), (width, width), (width,))
    data = tuple(rng.normal(size=s) / np.sqrt(s[0] if s[1:] else 1) for s in shapes)
    return Flat(build, np.linspace(-2, 2, points), data)


# Function, points, and the orders that a quick run takes; a full one takes all up to MOST.
HIGHER: tuple[tuple[str, Callable[[int], Flat], int, tuple[int, ...]], ...] = (
    ("scalar", scalar, 1, (1, 5)),
    ("scalar", scalar, 100_000, (5,)),
    ("network", network, 256, (3,)),
)


def cases(choice: Choice) -> Iterator[Case]:
    for name, make, points, orders in HIGHER:
        for order in orders if choice.quick else range(1, MOST + 1):
            flat = make(points)
            plain = nest(forward, order, flat.build(operations.for_jax()))
            yield Race(
                f"folklore/higher/{name}/points={points}/order={order}",
                f"derivative of order {order} of a {name} of one variable at {points:,} points", name,
                partial(contestants, flat, order, choice), partial(in_double, plain, flat.x, *flat.data),
                choice.tolerance(), {"order": order, "points": points}, **choice.effort(),
            )  # fmt: skip


def nest(step: Callable[[Function], Function], order: int, fun: Function) -> Function:
    for _ in range(order):
        fun = step(fun)
    return fun


def forward(fun: Function) -> Function:
    return lambda x, *data: jax.jvp(lambda x: fun(x, *data), (x,), (jnp.ones_like(x),))[1]


def torch_graph(torch: Any, fun: Function) -> Function:
    def derivative(x: Any) -> Any:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(fun(x).sum(), x, create_graph=True)[0]

    return derivative


TORCH: dict[str, Function] = {
    "autograd.grad": torch_graph,
    "func.grad": lambda torch, fun: torch.func.grad(lambda x: fun(x).sum()),
    "func.jvp": lambda torch, fun: lambda x: torch.func.jvp(fun, (x,), (torch.ones_like(x),))[1],
}


def contestants(flat: Flat, order: int, choice: Choice) -> Iterator[Contestant]:
    """Ours and JAX's, compiled and not; then the others, nested as deep; a quick run compiles only what it must."""
    fun, args = flat.build(operations.for_jax()), numbers((flat.x, *flat.data))
    nested = nest(forward, order, fun)
    ways = {
        "curvature.directional_derivatives": lambda x, *data: curvature.directional_derivatives(
            fun, x, jnp.ones_like(x), *data, order=order
        )[-1],
        "jax, nested jvp": nested,
        "jax, nested grad": nest(lambda fun: jax.grad(lambda x, *data: jnp.sum(fun(x, *data))), order, fun),
    }
    yield from named(ways, args)
    eager = "jax, nested jvp, not compiled"
    yield Contestant(eager, "jax", make=lambda: lambda: jax.block_until_ready(nested(*args)))

    def other(library: Library, name: str, step: Function, compile: Any = None) -> Contestant:
        def way(module: Any, fun: Function) -> Function:
            derivative = nest(partial(step, module), order, fun)
            return lambda x, v: derivative(x)

        return library.contestant(name, flat, way, choice, compile)

    for name, step in TORCH.items():
        yield other(torch_ways.TORCH, f"torch, nested {name}", step)
    if not choice.quick:
        name = "torch.compile, nested func.jvp"
        yield other(torch_ways.TORCH, name, TORCH["func.jvp"], torch_ways.compile)
    for execution, compile in tensorflow_ways.EXECUTIONS.items():
        if execution == "XLA" or not choice.quick:
            name = f"tensorflow, nested GradientTape, {execution}"
            yield other(tensorflow_ways.TENSORFLOW, name, tensorflow_ways.gradient, compile)
    elementwise = "autograd, nested elementwise_grad"
    yield other(autograd_ways.AUTOGRAD, elementwise, lambda autograd, fun: autograd.elementwise_grad(fun))


def of_higher(outcomes: Outcomes, name: str, points: int) -> dict[str, Outcome]:
    return part(outcomes, f"folklore/higher/{name}/points={points}/")


def plots(outcomes: Outcomes) -> list[Plot]:
    found = []
    for name, _, points, _ in HIGHER:
        races, title = of_higher(outcomes, name, points), f"Derivatives of a {name} at {points:,} points"
        found += over(races, "order", f"higher-{name}-{points}", title, "order", x_log=False)
    return found


def findings(outcomes: Outcomes) -> list[Finding]:
    """A verdict on each saying of which a case ran; those of ``notes.toml`` need ratios only."""
    higher, shapes = list(higher_sentences(outcomes)), list(shape_sentences(modes.of_ratios(outcomes)))
    saying = (
        f"JAX computes higher derivatives orders of magnitude ({MAGNITUDES} times) faster than PyTorch or TensorFlow"
    )
    found = {saying: higher, "Forward mode for tall Jacobians, reverse for wide ones": shapes}
    return [Finding(f'"{saying}": is it so?', " ".join(said)) for saying, said in found.items() if said]


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
    """In how many of the shapes that are not square the saying holds."""
    for library, pair in modes.BOTH.items():
        found = [(race.sizes["m/n"], share(race, *pair)) for race in races.values()]
        said = [(ratio < 1) == (shape > 1) for shape, ratio in found if ratio and not 0.9 < shape < 1.1]
        if said:
            yield f"In {library} it holds in {sum(said)} of {len(said)} shapes."
