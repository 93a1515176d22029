"""``jax`` itself, and ``curvature``: derivatives of a model with respect to its parameters, each as a contestant."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Contestant
from benchmarks.models import Model, cross_entropy
from benchmarks.peers import PACKAGES, operations
from benchmarks.peers.flat import PRODUCTS, Function, directions

MOST_PASSES = 1000  # through the function: a composition that takes more has lost already, and is left out


def numbers(tree: Any) -> Any:
    """A tree of arrays in the precision that JAX is set to; integers stay what they are."""

    def of_leaf(leaf: Any) -> jax.Array:
        return jnp.asarray(leaf, float if np.issubdtype(np.asarray(leaf).dtype, np.floating) else int)

    return jax.tree.map(of_leaf, tree)


def in_double(function: Function, *args: Any) -> Any:
    """A trusted answer: compiled and evaluated in double precision, at trees of arrays in double precision."""
    with jax.enable_x64(True):
        return jax.device_get(jax.jit(function)(*numbers(args)))


class InJax:
    """A model as JAX takes it, in the precision that JAX is set to.

    Attributes:
        loss: ``loss(params, *batch)``, the mean over the batch.
        outputs, of_outputs: of a classifier, ``outputs(params, *batch)`` and ``of_outputs(outputs, *batch)``.
        params, v, batch: where it is differentiated, a direction, and the data.
    """

    def __init__(self, model: Model):
        ops, outputs = operations.for_jax(), model.outputs
        self.loss: Function = lambda p, *batch: model.loss(ops, p, *batch)
        self.outputs: Function = lambda p, x, y: outputs(ops, p, x)
        self.of_outputs: Function = lambda z, x, y: cross_entropy(ops, z, y)
        self.params, self.v, self.batch = numbers((model.params(), model.direction(), model.batch))


def reference(model: Model, derivative: str, inner: Function = jax.grad, outer: Function = jax.jacfwd) -> np.ndarray:
    """The trusted answer, laid out flat, by one plain composition."""
    loss, x, v = model.flat_loss(operations.for_jax()), model.pack(model.params()), model.pack(model.direction())
    if derivative == "gradient":
        return in_double(inner(loss), x, *model.batch)
    if derivative == "hvp" and inner is jax.grad:
        return in_double(partial(forward_over_reverse, loss), x, v, *model.batch)
    hessian = in_double(outer(inner(loss)), x, *model.batch)
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
    yield from WAYS[derivative](model, InJax(model))


def gradients(model: Model, made: InJax) -> Iterator[Contestant]:
    """Forward and reverse; ours chooses as it does for any Jacobian."""
    ways = {"curvature.jacobian": curvature.jacobian, "jax.grad": jax.grad, "jax.jacfwd": jax.jacfwd}
    yield from named({name: way(made.loss) for name, way in ways.items()}, (made.params, *made.batch), model.pack)


def hvps(model: Model, made: InJax) -> Iterator[Contestant]:
    loss = made.loss

    def along(x: Any, v: Any, *batch: Any) -> Any:
        return jax.jvp(lambda x: loss(x, *batch), (x,), (v,))[1]

    ways = {
        "curvature.hvp": lambda x, v, *batch: curvature.hvp(loss, x, v, *batch),
        "jax, forward over reverse": partial(forward_over_reverse, loss),
        "jax, reverse over reverse": lambda x, v, *batch: jax.vjp(lambda x: jax.grad(loss)(x, *batch), x)[1](v)[0],
        "jax, reverse over forward": jax.grad(along),
    }
    if model.num_parameters <= MOST_PASSES:
        ways["jax, forward over forward"] = jax.jacfwd(along)
    yield from named(ways, (made.params, made.v, *made.batch), model.pack)


def products(model: Model, made: InJax) -> Iterator[Contestant]:
    loss, rows = made.loss, numbers(directions(model.num_parameters))
    vs = jax.vmap(lambda row: model.unpack(operations.for_jax(), row))(rows)

    def linearized(x: Any, vs: Any, *batch: Any) -> Any:
        return jax.lax.map(jax.linearize(lambda x: jax.grad(loss)(x, *batch), x)[1], vs)

    ways = {
        "curvature.linearize_grad": lambda x, vs, *b: jax.lax.map(curvature.linearize_grad(loss, x, *b)[2], vs),
        "curvature.hvp, each anew": lambda x, vs, *b: jax.lax.map(lambda v: curvature.hvp(loss, x, v, *b), vs),
        "jax.linearize": linearized,
        "jax, forward over reverse": lambda x, vs, *b: jax.lax.map(lambda v: forward_over_reverse(loss, x, v, *b), vs),
    }
    yield from named(ways, (made.params, vs, *made.batch), flat_rows(model), PRODUCTS)


def hessians(model: Model, made: InJax) -> Iterator[Contestant]:
    """Ours by default; where the loss is a mean, also by products alone and from taps; JAX's compositions."""
    loss = made.loss
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
    yield from named(ways, (made.params, *made.batch), flat_matrix(model))
    flat, way = numbers(model.pack(model.params())), jax.hessian(model.flat_loss(operations.for_jax()))
    yield Contestant("jax.hessian, flat vector", "jax", way, (flat, *made.batch))


WAYS = {"gradient": gradients, "hvp": hvps, "products": products, "hessian": hessians}


def of_one(loss: Function) -> Function:
    return lambda x, *example: loss(x, *(part[None] for part in example))


def forward_over_reverse(loss: Function, x: Any, v: Any, *batch: Any) -> Any:
    return jax.jvp(lambda x: jax.grad(loss)(x, *batch), (x,), (v,))[1]


def named(
    ways: dict[str, Function], args: tuple[Any, ...], read: Callable[[Any], Any] = lambda a: a, pieces: int = 1
) -> Iterator[Contestant]:
    """A contestant for each way, of the library that its name begins with, or else of JAX."""
    for name, way in ways.items():
        peer = next((peer for peer in PACKAGES if name.startswith(peer)), "jax")
        yield Contestant(name, peer, way, args, read=read, pieces=pieces)
