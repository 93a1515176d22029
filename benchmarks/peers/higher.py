"""Derivatives of orders 1 to 5 of a function of one variable, at many points, by every library."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Choice, Contestant, Task
from benchmarks.peers import autograd_ways, operations, tensorflow_ways, torch_ways
from benchmarks.peers.flat import Flat

Function = Callable[..., Any]


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


def nest(step: Callable[[Function], Function], order: int, fun: Function) -> Function:
    for _ in range(order):
        fun = step(fun)
    return fun


def contestants(flat: Flat, order: int, choice: Choice, *, compiled: bool) -> Iterator[Contestant]:
    """Ours and JAX's, compiled and not; then the others, nested as deep.

    The function acts entry by entry, so that the gradient of its sum holds its derivatives; ``compiled`` adds
    ``torch.compile``, which takes many seconds to start.
    """
    fun, args = flat.build(operations.for_jax()), tuple(jnp.asarray(a, float) for a in (flat.x, *flat.data))
    yield Contestant("curvature.directional_derivatives", "curvature", partial(_ours, fun, order), args)
    yield Contestant("jax, nested jvp", "jax", nest(_forward, order, fun), args)
    yield Contestant("jax, nested grad", "jax", nest(_reverse, order, fun), args)
    yield Contestant("jax, nested jvp, not compiled", "jax", make=partial(_eager, nest(_forward, order, fun), args))
    steps = {"autograd.grad": _torch_graph, "func.grad": _torch_reverse, "func.jvp": _torch_forward}
    for name, step in steps.items():
        make = partial(torch_ways.start, flat, partial(_nested, step, order), choice)
        yield Contestant(f"torch, nested {name}", "torch", make=make, read=torch_ways.read)
    if compiled:
        make = partial(torch_ways.start, flat, partial(_nested, _torch_forward, order), choice, compiled=True)
        yield Contestant("torch.compile, nested func.jvp", "torch", make=make, read=torch_ways.read)
    for execution in ("XLA",) if choice.quick else tensorflow_ways.EXECUTIONS:
        make = partial(
            tensorflow_ways.start, flat, partial(_nested, tensorflow_ways.gradient, order), choice, execution
        )
        yield Contestant(f"tensorflow, nested GradientTape, {execution}", "tensorflow", make=make)
    make = partial(autograd_ways.start, flat, partial(_nested, _elementwise, order), choice)
    yield Contestant("autograd, nested elementwise_grad", "autograd", make=make)


def reference(flat: Flat, order: int) -> np.ndarray:
    """Nested forward derivatives in double precision."""
    with jax.enable_x64(True):
        args = tuple(map(jnp.asarray, (flat.x, *flat.data)))
        return np.asarray(jax.jit(nest(_forward, order, flat.build(operations.for_jax())))(*args))


def _nested(step: Callable[[Any, Function], Function], order: int, library: Any, fun: Function) -> Function:
    """A way of a peer: ``step`` within the library, as deep as the order."""
    derivative = nest(partial(step, library), order, fun)
    return lambda x, v: derivative(x)


def _ours(fun: Function, order: int, x: jax.Array, *data: jax.Array) -> jax.Array:
    return curvature.directional_derivatives(fun, x, jnp.ones_like(x), *data, order=order)[-1]


def _forward(fun: Function) -> Function:
    return lambda x, *data: jax.jvp(lambda x: fun(x, *data), (x,), (jnp.ones_like(x),))[1]


def _reverse(fun: Function) -> Function:
    return jax.grad(lambda x, *data: jnp.sum(fun(x, *data)))


def _eager(fun: Function, args: tuple[Any, ...]) -> Task:
    return lambda: jax.block_until_ready(fun(*args))


def _torch_graph(torch: Any, fun: Function) -> Function:
    def derivative(x: Any) -> Any:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(fun(x).sum(), x, create_graph=True)[0]

    return derivative


def _torch_reverse(torch: Any, fun: Function) -> Function:
    return torch.func.grad(lambda x: fun(x).sum())


def _torch_forward(torch: Any, fun: Function) -> Function:
    return lambda x: torch.func.jvp(fun, (x,), (torch.ones_like(x),))[1]


def _elementwise(autograd: Any, fun: Function) -> Function:
    return autograd.elementwise_grad(fun)
