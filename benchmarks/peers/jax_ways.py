"""``jax`` itself, and ``curvature``: derivatives of a model by its parameters, each as a contestant."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import Model
from benchmarks.peers import operations

Function = Callable[..., Any]


def problem(model: Model) -> tuple[Function, dict[str, jax.Array], tuple[jax.Array, ...]]:
    """The loss by parameters and batch, and the two, in the precision JAX is set to."""
    ops = operations.for_jax()
    params = {name: jnp.asarray(value, float) for name, value in model.params().items()}
    return lambda p, *batch: model.loss(ops, p, *batch), params, tuple(jnp.asarray(a, float) for a in model.batch)


def direction(model: Model) -> dict[str, np.ndarray]:
    """A fixed random direction among the parameters."""
    rng = np.random.default_rng(7)
    return {name: rng.normal(size=shape) for name, shape in model.shapes.items()}


def reference(model: Model, derivative: str) -> np.ndarray:
    """The trusted answer, laid out flat: JAX's plainest composition in double precision."""
    with jax.enable_x64(True):
        ops = operations.for_jax()
        loss = model.flat_loss(ops)
        flat, batch = jnp.asarray(model.pack(model.params())), tuple(jnp.asarray(a) for a in model.batch)
        gradient = jax.grad(loss)
        if derivative == "gradient":
            return np.asarray(jax.jit(gradient)(flat, *batch))
        if derivative == "hvp":
            v = jnp.asarray(model.pack(direction(model)))
            return np.asarray(
                jax.jit(lambda x, v, *b: jax.jvp(lambda x: gradient(x, *b), (x,), (v,))[1])(flat, v, *batch)
            )
        return np.asarray(jax.jit(jax.jacfwd(gradient))(flat, *batch))


def flat_vector(model: Model) -> Callable[[Any], np.ndarray]:
    """Reads a tree like the parameters as the flat vector."""
    return model.pack


def flat_matrix(model: Model) -> Callable[[Any], np.ndarray]:
    """Reads a Hessian, a tree of trees like the parameters, as a matrix."""
    sizes = {name: int(np.prod(shape)) for name, shape in model.shapes.items()}

    def read(blocks: Any) -> np.ndarray:
        return np.block([[np.reshape(blocks[a][b], (sizes[a], sizes[b])) for b in sizes] for a in sizes])

    return read
