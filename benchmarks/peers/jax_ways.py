"""``jax`` itself, and ``curvature``: derivatives of a model with respect to its parameters, each as a contestant."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Contestant
from benchmarks.models import Model
from benchmarks.peers import operations
from benchmarks.peers.flat import PRODUCTS, directions

Function = Callable[..., Any]

MOST_PASSES = 1000  # through the function: a composition that takes more has lost already, and is left out


def problem(model: Model) -> tuple[Function, dict[str, jax.Array], tuple[jax.Array, ...]]:
    ops = operations.for_jax()
    params = {name: jnp.asarray(value, float) for name, value in model.params().items()}
    return lambda p, *batch: model.loss(ops, p, *batch), params, tuple(jnp.asarray(a, float) for a in model.batch)


def reference(model: Model, derivative: str, inner: Function = jax.grad, outer: Function = jax.jacfwd) -> np.ndarray:
    """The trusted answer, laid out flat, in double precision, by one plain composition."""
    with jax.enable_x64(True):
        loss = model.flat_loss(operations.for_jax())
        x, batch = jnp.asarray(model.pack(model.params())), tuple(jnp.asarray(a) for a in model.batch)
        gradient, v = inner(loss), jnp.asarray(model.pack(model.direction()))
        if derivative == "gradient":
            return np.asarray(jax.jit(gradient)(x, *batch))
        if derivative == "hvp" and inner is jax.grad:
            return np.asarray(jax.jit(lambda x, *b: jax.jvp(lambda x: gradient(x, *b), (x,), (v,))[1])(x, *batch))
        hessian = np.asarray(jax.jit(outer(gradient))(x, *batch))
        if derivative == "hessian":
            return hessian
        return hessian @ v if derivative == "hvp" else directions(model.num_parameters) @ hessian


def flat_rows(model: Model) -> Callable[[Any], np.ndarray]:
    return lambda tree: np.concatenate([np.reshape(tree[a], (len(tree[a]), -1)) for a in model.shapes], axis=1)


def flat_matrix(model: Model) -> Callable[[Any], np.ndarray]:
    sizes = {name: int(np.prod(shape)) for name, shape in model.shapes.items()}
    return lambda blocks: np.block([[np.reshape(blocks[a][b], (sizes[a], sizes[b])) for b in sizes] for a in sizes])


def contestants(model: Model, derivative: str) -> Iterator[Contestant]:
    """Ours, then every composition of JAX's own transformations, for a derivative that ``WAYS`` knows."""
    yield from WAYS[derivative](model, *problem(model))


def gradients(model: Model, loss: Function, x: Any, batch: tuple[Any, ...]) -> Iterator[Contestant]:
    """Forward and reverse; ours chooses as it does for any Jacobian."""
    ways = {
        "curvature.jacobian": curvature.jacobian(loss),
        "jax.grad": jax.grad(loss),
        "jax.jacfwd": jax.jacfwd(loss),
    }
    yield from named(ways, (x, *batch), model.pack)


def hvps(model: Model, loss: Function, x: Any, batch: tuple[Any, ...]) -> Iterator[Contestant]:
    v = {name: jnp.asarray(value, float) for name, value in model.direction().items()}

    def along(x: Any, v: Any, *batch: Any) -> Any:
        return jax.jvp(lambda x: loss(x, *batch), (x,), (v,))[1]

    ways = {
        "curvature.hvp": lambda x, v, *batch: curvature.hvp(loss, x, v, *batch),
        "jax, forward over reverse": lambda x, v, *batch: forward_over_reverse(loss, x, v, *batch),
        "jax, reverse over reverse": lambda x, v, *batch: jax.vjp(lambda x: jax.grad(loss)(x, *batch), x)[1](v)[0],
        "jax, reverse over forward": jax.grad(along),
    }
    if model.num_parameters <= MOST_PASSES:
        ways["jax, forward over forward"] = jax.jacfwd(along)
    yield from named(ways, (x, v, *batch), model.pack)


def products(model: Model, loss: Function, x: Any, batch: tuple[Any, ...]) -> Iterator[Contestant]:
    rows = jnp.asarray(directions(model.num_parameters), float)
    vs = jax.vmap(lambda row: model.unpack(operations.for_jax(), row))(rows)

    def linearized(x: Any, vs: Any, *batch: Any) -> Any:
        return jax.lax.map(jax.linearize(lambda x: jax.grad(loss)(x, *batch), x)[1], vs)

    ways = {
        "curvature.linearize_grad": lambda x, vs, *b: jax.lax.map(curvature.linearize_grad(loss, x, *b)[2], vs),
        "curvature.hvp, each anew": lambda x, vs, *b: jax.lax.map(lambda v: curvature.hvp(loss, x, v, *b), vs),
        "jax.linearize": linearized,
        "jax, forward over reverse": lambda x, vs, *b: jax.lax.map(lambda v: forward_over_reverse(loss, x, v, *b), vs),
    }
    yield from named(ways, (x, vs, *batch), flat_rows(model), PRODUCTS)


def hessians(model: Model, loss: Function, x: Any, batch: tuple[Any, ...]) -> Iterator[Contestant]:
    """Ours by default; where the loss is a mean, also by products alone and from taps; JAX's compositions."""
    ways = {"curvature.hessian": curvature.hessian(loss)}
    if model.is_mean:
        by_products: Any = "rev_over_rev"  # what "auto" takes where it finds no examples
        ways |= {
            "curvature.hessian, by products": curvature.hessian(loss, mode=by_products),
            "curvature.hessian, all at once": curvature.hessian(loss, mode=by_products, chunk_size=None),
            "curvature.hessian, chunks of 64": curvature.hessian(loss, mode=by_products, chunk_size=64),
            "curvature.mean_hessian": curvature.mean_hessian(of_one(loss)),
        }
    ways |= {"jax.hessian": jax.hessian(loss), "jax.jacrev of jax.grad": jax.jacrev(jax.grad(loss))}
    yield from named(ways, (x, *batch), flat_matrix(model))
    flat = jnp.asarray(model.pack(model.params()), float)
    way = jax.hessian(model.flat_loss(operations.for_jax()))
    yield Contestant("jax.hessian, flat vector", "jax", way, (flat, *batch))


WAYS = {"gradient": gradients, "hvp": hvps, "products": products, "hessian": hessians}


def of_one(loss: Function) -> Function:
    return lambda x, *example: loss(x, *(part[None] for part in example))


def forward_over_reverse(loss: Function, x: Any, v: Any, *batch: Any) -> Any:
    return jax.jvp(lambda x: jax.grad(loss)(x, *batch), (x,), (v,))[1]


def named(
    ways: dict[str, Function], args: tuple[Any, ...], read: Callable[[Any], Any] = lambda a: a, pieces: int = 1
) -> Iterator[Contestant]:
    for name, way in ways.items():
        peer = "curvature" if name.startswith("curvature") else "jax"
        yield Contestant(name, peer, way, args, read=read, pieces=pieces)
