"""The Laplacian of a network by its inputs, at many points at once, over growing dimension; and in a PINN's loss."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Case, Choice, Contestant, Race
from benchmarks.peers import torch_ways
from benchmarks.peers.flat import Function
from benchmarks.peers.jax_ways import in_double, numbers

TITLE = "Laplacian"
QUESTION = "What does a sum of second derivatives cost, without the matrix that holds them?"
TOLERANCE = 2e-5  # of the largest Laplacian, in single precision
FLOOR = "matrix products alone"
CAPTION = f"The row '{FLOOR}': the products of all directions with the square weight matrices, and nothing else."
TANH = "tanh"

Params = dict[str, Any]


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
    networks = (TANH, "relu-squared", "tanh-in-a-scan") if choice.quick else NETWORKS
    chosen = [("network", name, Sizes(points=8) if choice.quick else Sizes()) for name in networks]
    width, dimensions = (64, (4, 16)) if choice.quick else (128, (2, 8, 32, 128, 256))
    chosen += [("dimension", TANH, Sizes(inputs, width)) for inputs in dimensions]
    for kind, name, sizes in chosen:
        inputs, width, layers, points = sizes
        yield Race(
            f"laplacian/{kind}/{name}/d={inputs}",
            f"Laplacian by {inputs} inputs at {points} points, {name.replace('-', ' ')}, {layers} layers of {width}",
            name, partial(contestants, name, sizes, choice), partial(reference, name, sizes),
            choice.tolerance(TOLERANCE), {"d": inputs, "points": points}, caption=CAPTION, **choice.effort(0.25, 2.0),
        )  # fmt: skip
    for inputs in () if choice.quick else (2, 5, 10):
        sizes = Sizes(inputs, 32, 3, 512)
        gradient = jax.grad(partial(residual_loss, by_trace(jnp, jax)), argnums=1)
        yield Race(
            f"laplacian/training/pinn/d={inputs}",
            f"Gradient of a PINN's loss, {inputs} inputs, {sizes.points} points, 3 layers of 32", "pinn",
            partial(pinn_contestants, sizes), partial(in_double, gradient, *problem(sizes)), choice.tolerance(),
            {"d": inputs, "points": sizes.points}, **choice.effort(full=1.0),
            caption="The loss is the mean square of the Laplacian plus a source; contestants get it differently.",
        )  # fmt: skip


# Ways to the Laplacian of a function of a vector. Where a way is one for JAX and torch, ``np`` and ``func`` are the
# array operations and the transformations of the library.


def by_trace(np: Any, func: Any) -> Function:
    return lambda function: lambda x: np.trace(func.hessian(function)(x))


def by_directions(np: Any, func: Any, second: Function | None = None) -> Function:
    """The sum over directions of ``second(function, x, v)``, by default one ``jvp`` of another."""

    def along(function: Function, x: Any, v: Any) -> Any:
        return func.jvp(lambda x: func.jvp(function, (x,), (v,))[1], (x,), (v,))[1]

    def way(function: Function) -> Function:
        return lambda x: func.vmap(lambda v: (second or along)(function, x, v))(np.eye(len(x), dtype=x.dtype)).sum()

    return way


def by_jet(function: Function, x: jax.Array, v: jax.Array) -> jax.Array:
    from jax.experimental import jet

    return jet.jet(function, (x,), ([v, jnp.zeros_like(v)],))[1][1]


def by_folx(function: Function) -> Function:
    """The forward Laplacian of folx, which is imported when it is traced."""

    def laplacian(x: jax.Array) -> jax.Array:
        import folx

        return folx.forward_laplacian(function, 0)(x).laplacian

    return laplacian


WAYS: dict[str, tuple[str, Function]] = {
    "curvature.laplacian": ("curvature", curvature.laplacian),
    "folx": ("folx", by_folx),
    "jax, trace of hessian": ("jax", by_trace(jnp, jax)),
    "jax, jvp of jvp": ("jax", by_directions(jnp, jax)),
}


def contestants(name: str, sizes: Sizes, choice: Choice) -> Iterator[Contestant]:
    network, args = NETWORKS[name], numbers(problem(sizes))

    def over_points(np: Any, func: Any, way: Function) -> Function:
        return lambda points, params: func.vmap(way(lambda x: network(np, x, params)))(points)

    jet = {"jax.experimental.jet": ("jax", by_directions(jnp, jax, by_jet))} if name == TANH else {}
    for title, (peer, way) in (WAYS | jet).items():
        yield Contestant(title, peer, over_points(jnp, jax, way), args)
    in_torch = {"torch.func, trace of hessian": by_trace, "torch.func, jvp of jvp": by_directions}
    for title, way_in in in_torch.items() if name == TANH else ():

        def build(torch: Any, way_in: Function = way_in) -> Function:
            return over_points(torch, torch.func, way_in(torch, torch.func))

        yield torch_ways.without_graph(title, build, choice.dtype, *problem(sizes))
    yield Contestant(FLOOR, "jax", partial(matrix_products, sizes), args, floor=True)


def matrix_products(sizes: Sizes, points: jax.Array, params: Params) -> jax.Array:
    """What no way of pushing all first derivatives through the network can do without."""
    rows = jnp.ones((sizes.points * sizes.inputs, 1)) * params["last"]
    for weights in params["hidden"]:
        rows = rows @ weights
    return rows


def reference(name: str, sizes: Sizes) -> np.ndarray:
    """The trace of ``jax.hessian``, point by point."""

    def traces(points: Any, params: Params) -> Any:
        return jax.lax.map(by_trace(jnp, jax)(lambda x: NETWORKS[name](jnp, x, params)), points)

    return in_double(traces, *problem(sizes))


def residual_loss(way: Function, points: jax.Array, params: Params) -> jax.Array:
    """The mean square residual of ``Laplacian u = -sum sin x_i``."""
    laplacian = way(lambda x: NETWORKS[TANH](jnp, x, params))
    return jnp.mean((jax.vmap(laplacian)(points) + jnp.sum(jnp.sin(points), axis=-1)) ** 2)


def pinn_contestants(sizes: Sizes) -> Iterator[Contestant]:
    args, network = numbers(problem(sizes)), NETWORKS[TANH]
    for title, (peer, way) in WAYS.items():
        yield Contestant(title, peer, jax.grad(partial(residual_loss, way), argnums=1), args)
    mean = jax.grad(lambda x, p: jnp.mean(jax.vmap(lambda x: network(jnp, x, p))(x)), argnums=1)
    yield Contestant("one gradient of the network", "jax", mean, args, floor=True)
