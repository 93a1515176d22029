"""The Laplacian of a network by its inputs, at many points at once, over growing dimension; and in a PINN's loss."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Case, Choice, Claim, Contestant, Outcome, Race
from benchmarks.peers import torch_ways
from benchmarks.reading import at_most

TITLE = "Laplacian"
QUESTION = "What does a sum of second derivatives cost, without the matrix that holds them?"
TOLERANCE = 2e-5  # of the largest Laplacian, in single precision
OURS, FOLX, TRACE, FLOOR = "curvature.laplacian", "folx", "jax, trace of hessian", "matrix products alone"
# Not slower than folx, with room for the clock; on the tanh network a third of the trace, which takes about twice the
# products, which are most of the time; and 1.3 times the products alone.
WANTED = {FOLX: 1 / 0.95, TRACE: 1 / 3.0, FLOOR: 1.3}
CAPTION = f"The row '{FLOOR}': the products of all directions with the square weight matrices, and nothing else."
TANH = "tanh"

Params = dict[str, Any]
Function = Callable[..., Any]


class Sizes(NamedTuple):
    """Of a network and of the set of points."""

    inputs: int = 64
    width: int = 256
    layers: int = 3
    points: int = 64


def dense(activation: Function) -> Function:
    """The network, written out layer by layer: of a module of array operations, a point and parameters."""

    def network(np: Any, x: Any, params: Params) -> Any:
        hidden = activation(np, x @ params["first"])
        for weights, bias in zip(params["hidden"], params["bias"], strict=True):
            hidden = activation(np, hidden @ weights + bias)
        return hidden @ params["last"]

    return network


def scanned(np: Any, x: Any, params: Params) -> Any:
    def layer(hidden: Any, weights: tuple[Any, Any]) -> tuple[Any, None]:
        return jnp.tanh(hidden @ weights[0] + weights[1]), None

    return jax.lax.scan(layer, jnp.tanh(x @ params["first"]), (params["hidden"], params["bias"]))[0] @ params["last"]


NETWORKS: dict[str, Function] = {
    TANH: dense(lambda np, x: np.tanh(x)),
    # The square of a relu network, whose own Laplacian is zero.
    "relu-squared": lambda np, x, params: dense(lambda _, x: jax.nn.relu(x))(np, x, params) ** 2,
    "softplus": dense(lambda _, x: jax.nn.softplus(x)),
    "gelu": dense(lambda _, x: jax.nn.gelu(x)),
    "tanh-in-a-scan": scanned,
}


def problem(sizes: Sizes) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    inputs, width, layers, points = sizes
    rng = np.random.default_rng(0)
    params = {
        "first": rng.normal(size=(inputs, width)) / np.sqrt(inputs),
        "hidden": rng.normal(size=(layers - 1, width, width)) / np.sqrt(width),
        "last": rng.normal(size=width) / np.sqrt(width),
        "bias": rng.normal(size=(layers - 1, width)) / 10,
    }
    return rng.normal(size=(points, inputs)), params


def cases(choice: Choice) -> Iterator[Case]:
    """Each network at 64 inputs; the tanh network over growing dimension; the gradient of a PINN's loss."""
    for name in (TANH, "relu-squared", "tanh-in-a-scan") if choice.quick else NETWORKS:
        sizes = Sizes(points=8) if choice.quick else Sizes()
        yield network_case(choice, name, sizes, "network", partial(claims, name))
    for inputs in (4, 16) if choice.quick else (2, 8, 32, 128, 256):
        sizes = Sizes(inputs, 64 if choice.quick else 128)
        yield network_case(choice, TANH, sizes, "dimension", lambda outcome: [])
    for inputs in () if choice.quick else (2, 5, 10):
        sizes = Sizes(inputs, 32, 3, 512)
        yield Race(
            f"laplacian/training/pinn/d={inputs}",
            f"Gradient of a PINN's loss, {inputs} inputs, {sizes.points} points, 3 layers of 32", "pinn",
            partial(pinn_contestants, sizes), partial(pinn_reference, sizes), choice.tolerance(),
            {"d": inputs, "points": sizes.points}, **choice.effort(full=1.0),
            caption="The loss is the mean square of the Laplacian plus a source; contestants get it differently.",
        )  # fmt: skip


def network_case(choice: Choice, name: str, sizes: Sizes, kind: str, claims: Function) -> Race:
    return Race(
        f"laplacian/{kind}/{name}/d={sizes.inputs}",
        f"Laplacian by {sizes.inputs} inputs at {sizes.points} points, {name.replace('-', ' ')}, "
        f"{sizes.layers} layers of {sizes.width}", name,
        partial(contestants, name, sizes, choice), partial(reference, name, sizes), choice.tolerance(TOLERANCE),
        {"d": sizes.inputs, "points": sizes.points}, claims=claims, caption=CAPTION, **choice.effort(0.25, 2.0),
    )  # fmt: skip


def by_folx(function: Function) -> Function:
    """The forward Laplacian of folx, which is imported when it is traced."""

    def laplacian(x: jax.Array) -> jax.Array:
        import folx

        return folx.forward_laplacian(function, 0)(x).laplacian

    return laplacian


def over_directions(along: Function) -> Function:
    """The sum over directions of ``along(function, x, v)``."""
    return lambda function: (
        lambda x: jnp.sum(jax.vmap(partial(along, function), (None, 0))(x, jnp.eye(x.size, dtype=x.dtype)))
    )


def by_jvp(function: Function, x: jax.Array, v: jax.Array) -> jax.Array:
    return jax.jvp(lambda x: jax.jvp(function, (x,), (v,))[1], (x,), (v,))[1]


def by_jet(function: Function, x: jax.Array, v: jax.Array) -> jax.Array:
    from jax.experimental import jet

    return jet.jet(function, (x,), ([v, jnp.zeros_like(v)],))[1][1]


WAYS: dict[str, tuple[str, Function]] = {
    OURS: ("curvature", curvature.laplacian),
    FOLX: ("folx", by_folx),
    TRACE: ("jax", lambda function: lambda x: jnp.trace(jax.hessian(function)(x))),
    "jax, jvp of jvp": ("jax", over_directions(by_jvp)),
}


def contestants(name: str, sizes: Sizes, choice: Choice) -> Iterator[Contestant]:
    points, params = problem(sizes)
    args = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), (points, params))
    network = NETWORKS[name]
    ways = WAYS | ({"jax.experimental.jet": ("jax", over_directions(by_jet))} if name == TANH else {})

    def over_points(way: Function) -> Function:
        return lambda points, params: jax.vmap(way(lambda x: network(jnp, x, params)))(points)

    for title, (peer, way) in ways.items():
        yield Contestant(title, peer, over_points(way), args)
    if name == TANH:
        yield from torch_ways.laplacians(network, *jax.tree.map(lambda a: a.astype(choice.dtype), (points, params)))
    yield Contestant(FLOOR, "jax", partial(matrix_products, sizes), args, floor=True)


def matrix_products(sizes: Sizes, points: jax.Array, params: Params) -> jax.Array:
    """What no way of pushing all first derivatives through the network can do without."""
    rows = jnp.ones((sizes.points * sizes.inputs, 1)) * params["last"]
    for weights in params["hidden"]:
        rows = rows @ weights
    return rows


def reference(name: str, sizes: Sizes) -> np.ndarray:
    """The trace of ``jax.hessian`` in double precision."""
    with jax.enable_x64(True):
        points, params = jax.tree.map(jnp.asarray, problem(sizes))
        trace = WAYS[TRACE][1](lambda x: NETWORKS[name](jnp, x, params))
        return np.asarray(jax.jit(lambda points: jax.lax.map(trace, points))(points))


def residual_loss(way: Function, points: jax.Array, params: Params) -> jax.Array:
    """The mean square residual of ``Laplacian u = -sum sin x_i``."""
    laplacian = way(lambda x: NETWORKS[TANH](jnp, x, params))
    return jnp.mean((jax.vmap(laplacian)(points) + jnp.sum(jnp.sin(points), axis=-1)) ** 2)


def pinn_contestants(sizes: Sizes) -> Iterator[Contestant]:
    args = jax.tree.map(lambda leaf: jnp.asarray(leaf, float), problem(sizes))
    for title, (peer, way) in WAYS.items():
        yield Contestant(title, peer, jax.grad(partial(residual_loss, way), argnums=1), args)
    network = NETWORKS[TANH]
    mean = jax.grad(lambda x, p: jnp.mean(jax.vmap(lambda x: network(jnp, x, p))(x)), argnums=1)
    yield Contestant("one gradient of the network", "jax", mean, args, floor=True)


def pinn_reference(sizes: Sizes) -> Any:
    """In double precision, over the trace of ``jax.hessian``."""
    with jax.enable_x64(True):
        args = jax.tree.map(jnp.asarray, problem(sizes))
        return jax.device_get(jax.jit(jax.grad(partial(residual_loss, WAYS[TRACE][1]), argnums=1))(*args))


def claims(name: str, outcome: Outcome) -> list[Claim]:
    """Not slower than folx; on the tanh network, well ahead of the trace and near the products alone."""
    chosen = WANTED if name == TANH else {FOLX: WANTED[FOLX]}
    return [claim for of, wanted in chosen.items() for claim in at_most(outcome, OURS, of, wanted)]
