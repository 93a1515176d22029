"""The Laplacian of a network by its inputs, at many points at once, over growing dimension; and in a PINN's loss."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Case, Choice, Claim, Contestant, Finding, Outcome, Plot, Race
from benchmarks.peers import torch_laplacian
from benchmarks.reading import at_most, comparison, curves, share

TITLE = "Laplacian"
QUESTION = "What does a sum of second derivatives cost, without the matrix that holds them?"
TOLERANCE = {"float32": 2e-5, "float64": 1e-9}  # of the largest Laplacian
WANTED_OF_FOLX = 1 / 0.95  # not slower, with room for the clock
WANTED_OF_TRACE = 1 / 3.0  # on the tanh network; the trace takes about twice the products, which are most of the time
WANTED_OF_FLOOR = 1.3  # times the matrix products alone

OURS, FOLX, TRACE, FLOOR = "curvature.laplacian", "folx", "jax, trace of hessian", "matrix products alone"
DIRECTIONS, JET = "jax, jvp of jvp", "jax.experimental.jet"
CAPTION = f"The row '{FLOOR}': the products of all directions with the square weight matrices, and nothing else."

Params = dict[str, Any]
Formula = Callable[[Any, Any, Params], Any]  # of a module of array operations, a point and parameters
Function = Callable[..., Any]


class Sizes(NamedTuple):
    """Of a network and of the set of points."""

    inputs: int = 64
    width: int = 256
    layers: int = 3
    points: int = 64


# ---- the networks ----------------------------------------------------------------------------------------------------


def dense(activation: Callable[[Any, Any], Any]) -> Formula:
    """The network, written out layer by layer."""

    def network(np: Any, x: Any, params: Params) -> Any:
        hidden = activation(np, x @ params["first"])
        for weights, bias in zip(params["hidden"], params["bias"], strict=True):
            hidden = activation(np, hidden @ weights + bias)
        return hidden @ params["last"]

    return network


def scanned(np: Any, x: Any, params: Params) -> Any:
    """The tanh network, with its hidden layers in a scan."""

    def layer(hidden: Any, weights: tuple[Any, Any]) -> tuple[Any, None]:
        return jnp.tanh(hidden @ weights[0] + weights[1]), None

    return jax.lax.scan(layer, jnp.tanh(x @ params["first"]), (params["hidden"], params["bias"]))[0] @ params["last"]


def squared_relu(np: Any, x: Any, params: Params) -> Any:
    """The square of a relu network, whose own Laplacian is zero."""
    return dense(lambda _, x: jax.nn.relu(x))(np, x, params) ** 2


TANH = "tanh"
NETWORKS: dict[str, Formula] = {
    TANH: dense(lambda np, x: np.tanh(x)),
    "relu-squared": squared_relu,
    "softplus": dense(lambda _, x: jax.nn.softplus(x)),
    "gelu": dense(lambda _, x: jax.nn.gelu(x)),
    "tanh-in-a-scan": scanned,
}
IN_TORCH = (TANH,)


def problem(sizes: Sizes) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Random points and parameters."""
    inputs, width, layers, points = sizes
    rng = np.random.default_rng(0)
    params = {
        "first": rng.normal(size=(inputs, width)) / np.sqrt(inputs),
        "hidden": rng.normal(size=(layers - 1, width, width)) / np.sqrt(width),
        "last": rng.normal(size=width) / np.sqrt(width),
        "bias": rng.normal(size=(layers - 1, width)) / 10,
    }
    return rng.normal(size=(points, inputs)), params


# ---- the cases -------------------------------------------------------------------------------------------------------


def cases(choice: Choice) -> Iterator[Case]:
    """Each network at 64 inputs; the tanh network over growing dimension; the gradient of a PINN's loss."""
    names = (TANH, "relu-squared", "tanh-in-a-scan") if choice.quick else tuple(NETWORKS)
    for name in names:
        sizes = Sizes(points=8) if choice.quick else Sizes()
        yield network_case(choice, name, sizes, "network", partial(network_claims, name))
    for inputs in (4, 16) if choice.quick else (2, 8, 32, 128, 256):
        yield network_case(choice, TANH, Sizes(inputs, 64 if choice.quick else 128), "dimension")
    for inputs in () if choice.quick else (2, 5, 10):
        yield pinn_case(choice, inputs)


def network_case(
    choice: Choice, name: str, sizes: Sizes, kind: str, claims: Callable[[Outcome], list[Claim]] = lambda outcome: []
) -> Race:
    """The Laplacian of one network at all points."""
    return Race(
        f"laplacian/{kind}/{name}/d={sizes.inputs}",
        f"Laplacian by {sizes.inputs} inputs at {sizes.points} points, {name.replace('-', ' ')}, "
        f"{sizes.layers} layers of {sizes.width}",
        name,
        partial(contestants, name, sizes, choice),
        partial(reference, name, sizes),
        TOLERANCE[choice.dtype],
        {"d": sizes.inputs, "points": sizes.points},
        budget=0.25 if choice.quick else 2.0,
        rounds=choice.rounds,
        claims=claims,
        caption=CAPTION,
    )


def ways() -> dict[str, tuple[str, Function]]:
    """By name: the library, and what makes a Laplacian of a function of a vector."""
    return {
        OURS: ("curvature", curvature.laplacian),
        FOLX: ("folx", by_folx),
        TRACE: ("jax", lambda function: lambda x: jnp.trace(jax.hessian(function)(x))),
        DIRECTIONS: ("jax", by_directions),
    }


def by_folx(function: Function) -> Function:
    """The forward Laplacian of folx, which is imported when it is traced."""

    def laplacian(x: jax.Array) -> jax.Array:
        import folx

        return folx.forward_laplacian(function, 0)(x).laplacian

    return laplacian


def by_directions(function: Function) -> Function:
    """The sum over directions of a ``jvp`` of a ``jvp``."""

    def along(x: jax.Array, v: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: jax.jvp(function, (x,), (v,))[1], (x,), (v,))[1]

    return lambda x: jnp.sum(jax.vmap(along, (None, 0))(x, jnp.eye(x.size, dtype=x.dtype)))


def by_jet(function: Function) -> Function:
    """The sum over directions of the second Taylor coefficient, one series for each."""
    from jax.experimental import jet

    def along(x: jax.Array, v: jax.Array) -> jax.Array:
        return jet.jet(function, (x,), ([v, jnp.zeros_like(v)],))[1][1]

    return lambda x: jnp.sum(jax.vmap(along, (None, 0))(x, jnp.eye(x.size, dtype=x.dtype)))


def contestants(name: str, sizes: Sizes, choice: Choice) -> Iterator[Contestant]:
    """Every way for one network, and the floor."""
    points, params = problem(sizes)
    args = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), (points, params))
    network = NETWORKS[name]

    def over_points(way: Function) -> Function:
        return lambda points, params: jax.vmap(way(lambda x: network(jnp, x, params)))(points)

    for title, (peer, way) in ways().items():
        yield Contestant(title, peer, over_points(way), args)
    if name in IN_TORCH:
        yield Contestant(JET, "jax", over_points(by_jet), args)
        single = jax.tree.map(lambda leaf: leaf.astype(choice.dtype), (points, params))
        yield from torch_laplacian.contestants(network, *single)
    yield Contestant(FLOOR, "jax", partial(matrix_products, sizes), args, floor=True)


def matrix_products(sizes: Sizes, points: jax.Array, params: Params) -> jax.Array:
    """What no way of pushing all first derivatives through the network can do without."""
    rows = jnp.ones((sizes.points * sizes.inputs, 1)) * params["last"]
    for weights in params["hidden"]:
        rows = rows @ weights
    return rows


def reference(name: str, sizes: Sizes) -> np.ndarray:
    """The trace of ``jax.hessian`` in double precision, which nobody doubts."""
    with jax.enable_x64(True):
        points, params = jax.tree.map(jnp.asarray, problem(sizes))
        trace = ways()[TRACE][1](lambda x: NETWORKS[name](jnp, x, params))
        return np.asarray(jax.jit(lambda points: jax.lax.map(trace, points))(points))


# ---- a loss that holds a Laplacian -----------------------------------------------------------------------------------


def pinn_case(choice: Choice, inputs: int) -> Race:
    """The gradient by its parameters of the residual of Poisson's equation."""
    sizes = Sizes(inputs, 32, 3, 512)
    return Race(
        f"laplacian/training/pinn/d={inputs}",
        f"Gradient of a PINN's loss, {inputs} inputs, {sizes.points} points, 3 layers of 32",
        "pinn",
        partial(pinn_contestants, sizes),
        partial(pinn_reference, sizes),
        1e-4 if choice.dtype == "float32" else TOLERANCE["float64"],
        {"d": inputs, "points": sizes.points},
        budget=1.0,
        rounds=choice.rounds,
        caption="The loss is the mean square of the Laplacian plus a source; contestants differ in how they get it.",
    )


def residual_loss(way: Function, points: jax.Array, params: Params) -> jax.Array:
    """The mean square residual of ``Laplacian u = -sum sin x_i``."""
    laplacian = way(lambda x: NETWORKS[TANH](jnp, x, params))
    return jnp.mean((jax.vmap(laplacian)(points) + jnp.sum(jnp.sin(points), axis=-1)) ** 2)


def pinn_contestants(sizes: Sizes) -> Iterator[Contestant]:
    """Reverse mode over each Laplacian."""
    args = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem(sizes))
    for title, (peer, way) in ways().items():
        yield Contestant(title, peer, jax.grad(partial(residual_loss, way), argnums=1), args)
    yield Contestant(
        "one gradient of the network", "jax",
        jax.grad(lambda x, p: jnp.mean(jax.vmap(lambda x: NETWORKS[TANH](jnp, x, p))(x)), argnums=1), args, floor=True,
    )  # fmt: skip


def pinn_reference(sizes: Sizes) -> Any:
    """The same in double precision, over the trace of ``jax.hessian``."""
    with jax.enable_x64(True):
        args = jax.tree.map(jnp.asarray, problem(sizes))
        return jax.device_get(jax.jit(jax.grad(partial(residual_loss, ways()[TRACE][1]), argnums=1))(*args))


# ---- what is claimed, drawn and concluded ----------------------------------------------------------------------------


def network_claims(name: str, outcome: Outcome) -> list[Claim]:
    """Not slower than folx; on the tanh network, well ahead of the trace and near the products alone."""
    claims = at_most(outcome, OURS, FOLX, WANTED_OF_FOLX)
    if name == TANH:
        claims += at_most(outcome, OURS, TRACE, WANTED_OF_TRACE)
        claims += at_most(outcome, OURS, FLOOR, WANTED_OF_FLOOR)
    return claims


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """Time and temporary memory over the dimension."""
    prefix = f"laplacian/dimension/{TANH}/"
    drawn = [
        ("time", "Time of the Laplacian of a tanh network", "seconds", 1e3, "time [ms]"),
        ("memory", "Temporary memory of the same", "temporary_bytes", 2**-20, "temporaries [MiB]"),
    ]
    return [
        Plot(f"dimension-{name}", title, "number of inputs", label, lines)
        for name, title, metric, scale, label in drawn
        if (lines := curves(outcomes, "d", metric, prefix=prefix, scale=scale))
    ]


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """Against the trace, against folx, and in training."""
    questions: dict[str, Callable[[str], bool]] = {
        "Which way to the Laplacian of a network is the fastest?": lambda id: "/training/" not in id,
        "Does that last when the Laplacian is in a loss that is differentiated?": lambda id: "/training/" in id,
    }
    found = []
    for question, belongs in questions.items():
        chosen = {id: outcome for id, outcome in outcomes.items() if belongs(id)}
        answer = " ".join(map(comparison, chosen.values())) or "Not measured in this run."
        found.append(Finding(question, answer, list(chosen)))
    floors = [cost for outcome in outcomes.values() if (cost := share(outcome, OURS, FLOOR))]
    if floors:
        answer = f"Between {min(floors):.2f} and {max(floors):.2f} times the matrix products that cannot be avoided."
        found.append(Finding("How much room is left?", answer, list(outcomes)))
    return found
