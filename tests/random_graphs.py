"""Random expression graphs: a second design of random programs, beside the layered networks of ``random_programs.py``.

Each node applies one operation to earlier values: parameters, data or results of other nodes. Shapes decide what may
follow. A graph is a list of nodes, so a failure prints as one line, and nothing in it resembles a network.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.against_jax import Case, over_examples

_SIZES = (1, 2, 2, 3, 3, 4, 6)
_MAX_ENTRIES = 96
_LIMIT = 4.0  # larger values are squashed

Values = list[jax.Array]


class Node(NamedTuple):
    """One operation, in words and as a function of all values before it."""

    text: str
    call: Callable[[Values], Any]


class Graph(NamedTuple):
    """The nodes of the loss of one example, those of a batch, and the case that compares them with JAX."""

    text: str
    case: Case


# ---- operations ------------------------------------------------------------------------------------------------------


@jax.custom_jvp
def _with_jvp(x):
    return jnp.sin(x) * x


@_with_jvp.defjvp
def _rule(primals, tangents):
    (x,), (t,) = primals, tangents
    return _with_jvp(x), t * (jnp.cos(x) * x + jnp.sin(x))


@jax.custom_vjp
def _with_vjp(x):
    return jnp.sin(x)


_with_vjp.defvjp(lambda x: (jnp.sin(x), x), lambda x, cotangent: (cotangent * jnp.cos(x),))


def _definite(a):
    return a.T @ a + jnp.eye(a.shape[1], dtype=a.dtype)


_UNARY = {
    "sin": jnp.sin, "tanh": jnp.tanh, "softplus": jax.nn.softplus, "square": jnp.square, "sigmoid": jax.nn.sigmoid,
    "gelu": jax.nn.gelu, "relu": jax.nn.relu, "elu": jax.nn.elu, "neg": jnp.negative, "abs": jnp.abs,
    "cube": lambda a: a**3, "root": lambda a: jnp.sqrt(1 + a * a), "bell": lambda a: jnp.exp(-a * a),
    "power": lambda a: (1 + a * a) ** 1.5, "clip": lambda a: jnp.clip(a, -0.5, 0.8),
    "unit": lambda a: a / jnp.sqrt(jnp.sum(a * a) + 0.1), "stopped": lambda a: jax.lax.stop_gradient(a) * a,
    "total": lambda a: jnp.sum(jnp.sin(a)), "ravel by columns": lambda a: a.ravel(order="F"),
    "custom_jvp": _with_jvp, "custom_vjp": _with_vjp,
}  # fmt: skip

_BINARY = {
    "add": jnp.add, "mul": jnp.multiply, "sub": jnp.subtract, "max": jnp.maximum, "logaddexp": jnp.logaddexp,
    "div": lambda a, b: a / (1.3 + b * b), "where": lambda a, b: jnp.where(a > b, a, jnp.sin(b)),
    "atan2": lambda a, b: jnp.arctan2(a, 1.2 + b * b), "hypot": lambda a, b: jnp.sqrt(a * a + b * b + 0.3),
    "scaled by a mean": lambda a, b: a * jnp.mean(b),
}  # fmt: skip

_OF_ONE_SHAPE = {
    "jit": lambda a, b: jax.jit(lambda u, v: u * jnp.tanh(v))(a, b),
    "checkpoint": lambda a, b: jax.checkpoint(lambda u, v: jnp.tanh(u) * v)(a, b),
    "scan of rows": lambda a, b: jax.lax.scan(lambda c, u: (jnp.tanh(c + u), c * u), b.sum(0) * 0.3, a)[1],
    "scan of weights": lambda a, b: jax.lax.scan(lambda c, _: (jnp.tanh(c * b), None), a, length=3)[0],
    "cond": lambda a, b: jax.lax.cond(a.sum() > 0, lambda u, v: u * v, lambda u, v: jnp.sin(u) + v, a, b),
    "map": lambda a, b: jax.lax.map(lambda pair: pair[0] * jnp.sin(pair[1]), (a, b)),
    "fori_loop": lambda a, b: jax.lax.fori_loop(0, 2, lambda _, c: jnp.sin(c) * b, a),
    "vmap": lambda a, b: jax.vmap(lambda u, v: jnp.tanh(u) * v.sum())(a, b),
    "associative_scan": lambda a, b: jax.lax.associative_scan(lambda u, v: u * v + 0.1 * v, a),
    "linearize": lambda a, b: jax.linearize(jnp.sin, a)[1](b),
    "grad": lambda a, b: jax.grad(lambda u: jnp.sum(jnp.sin(u) * b))(a),
}

_OF_AXIS = {
    "sum": jnp.sum, "mean": jnp.mean, "max": jnp.max, "prod": jnp.prod, "var": jnp.var, "flip": jnp.flip,
    "cumsum": jnp.cumsum, "sort": jnp.sort, "logsumexp": jax.nn.logsumexp, "softmax": jax.nn.softmax,
    "expand": jnp.expand_dims, "roll": lambda a, axis: jnp.roll(a, 1, axis),
    "repeat": lambda a, axis: a.repeat(2, axis), "center": lambda a, axis: a - a.mean(axis, keepdims=True),
    "every second": lambda a, axis: a.take(jnp.arange(0, a.shape[axis], 2), axis),
    "reversed take": lambda a, axis: a.take(jnp.arange(a.shape[axis])[::-1], axis),
    "pad": lambda a, axis: jnp.pad(a, [(int(k == axis), 0) for k in range(a.ndim)]),
}  # fmt: skip

_OF_MATRIX = {
    "gram": lambda a: a.T @ a, "tril": jnp.tril, "solve": lambda a: jnp.linalg.solve(_definite(a), a.T),
    "cholesky": lambda a: jnp.linalg.cholesky(_definite(a)), "inverse": lambda a: jnp.linalg.inv(_definite(a)),
    "fft": lambda a: jnp.abs(jnp.fft.fft(a)) ** 2 / 10, "logdet": lambda a: jnp.linalg.slogdet(_definite(a))[1] * a,
    "complex product": lambda a: jnp.real((1j * a) @ ((1 - 1j) * a.T)),
    "phases": lambda a: jnp.real(jnp.exp(1j * a).T @ jnp.exp(-1j * a)),
    "rows convolved": lambda a: jax.vmap(lambda row: jnp.convolve(row, a[0], mode="same"))(a),
    "kron": lambda a: jnp.kron(a[:2, :2], a[:2, :2]), "segments": lambda a: jax.ops.segment_sum(
        a, np.arange(len(a)) % 2, 2
    ),
}  # fmt: skip


# ---- drawing ---------------------------------------------------------------------------------------------------------


def _pick(rng: np.random.Generator, values: Values, fits: Callable[[Any], bool] = lambda _: True) -> int:
    """The index of a value that fits, late ones more often; LookupError if there is none."""
    found = [k for k, value in enumerate(values) if fits(value)]
    if not found:
        raise LookupError
    weights = np.array([3.0 if k >= len(values) - 3 else 1.0 for k in found])
    return int(rng.choice(found, p=weights / weights.sum()))


def _entry(rng: np.random.Generator, table: dict[str, Callable[..., Any]]) -> tuple[str, Callable[..., Any]]:
    name = str(rng.choice(list(table)))
    return name, table[name]


def _product(rng: np.random.Generator, values: Values) -> Node:
    """A product of two tensors over one axis of equal size, perhaps with a second axis in common, axes permuted."""
    i = _pick(rng, values, lambda a: a.ndim)
    a = values[i]
    pairs = [
        (j, p, q)
        for j, b in enumerate(values)
        for p in range(a.ndim)
        for q in range(b.ndim)
        if a.shape[p] == b.shape[q] and a.size * b.size <= 72 * a.shape[p] ** 2
    ]
    j, p, q = pairs[int(rng.integers(len(pairs)))]
    left, right = list("abcd"[: a.ndim]), list("efgh"[: values[j].ndim])
    right[q] = left[p]
    shared = [
        (k, m)
        for k in range(a.ndim)
        for m in range(values[j].ndim)
        if k != p and m != q and a.shape[k] == values[j].shape[m]
    ]
    if shared and rng.random() < 0.5:
        k, m = shared[int(rng.integers(len(shared)))]
        right[m] = left[k]
    kept = list(dict.fromkeys(letter for letter in left + right if letter != left[p]))
    rng.shuffle(kept)
    spec = f"{''.join(left)},{''.join(right)}->{''.join(kept)}"
    return Node(f"einsum {spec} ({i}, {j})", lambda v: jnp.einsum(spec, v[i], v[j]))


def _moved(rng: np.random.Generator, values: Values) -> Node:
    """The entries of a value in another order and shape."""
    i = _pick(rng, values, lambda a: a.ndim)
    a = values[i]
    axes = tuple(int(k) for k in rng.permutation(a.ndim))
    if rng.random() < 0.5:
        return Node(f"transpose {axes} ({i})", lambda v: v[i].transpose(axes))
    first = int(rng.choice([d for d in range(1, a.size + 1) if a.size % d == 0]))
    return Node(f"transpose {axes}, reshape ({first}, -1) ({i})", lambda v: v[i].transpose(axes).reshape(first, -1))


def _joined(rng: np.random.Generator, values: Values) -> Node:
    i = _pick(rng, values, lambda a: a.ndim)
    j = _pick(rng, values, lambda b: b.shape == values[i].shape)
    axis = int(rng.integers(values[i].ndim))
    name, join = _entry(rng, {"concatenate": jnp.concatenate, "stack": jnp.stack})
    return Node(f"{name} axis {axis} ({i}, {j})", lambda v: join([v[i], v[j]], axis=axis))


def _draw_node(rng: np.random.Generator, values: Values) -> Node:
    """A node that may or may not be legal."""
    kind = rng.choice(["unary", "binary", "binary", "product", "product", "moved", "moved", "joined", "axis", "axis",
                       "matrix", "one shape"])  # fmt: skip
    if kind in ("product", "moved", "joined"):
        return {"product": _product, "moved": _moved, "joined": _joined}[str(kind)](rng, values)
    if kind == "axis":
        i = _pick(rng, values, lambda a: a.ndim)
        (name, call), axis = _entry(rng, _OF_AXIS), int(rng.integers(values[i].ndim))
        return Node(f"{name} axis {axis} ({i})", lambda v: call(v[i], axis))
    if kind in ("unary", "matrix"):
        i = _pick(rng, values, lambda a: kind == "unary" or a.ndim == 2)
        name, call = _entry(rng, _UNARY if kind == "unary" else _OF_MATRIX)
        return Node(f"{name} ({i})", lambda v: call(v[i]))
    i = _pick(rng, values, lambda a: kind == "binary" or a.ndim)
    j = _pick(rng, values, lambda b: kind == "binary" or b.shape == values[i].shape)
    name, call = _entry(rng, _BINARY if kind == "binary" else _OF_ONE_SHAPE)
    return Node(f"{name} ({i}, {j})", lambda v: call(v[i], v[j]))


def _squashed(node: Node) -> Node:
    return Node(f"squashed {node.text}", lambda v: 2 * jnp.tanh(node.call(v) / _LIMIT))


def _draw_nodes(rng: np.random.Generator, values: Sequence[Any], count: int) -> tuple[list[Node], Values]:
    """Legal nodes after some values, and all values."""
    nodes, values = [], list(values)
    for _ in range(30 * count):
        if len(nodes) == count:
            break
        try:
            node = _draw_node(rng, values)
            value = node.call(values)
        except (LookupError, TypeError, ValueError):
            continue  # shapes that do not fit
        if not 0 < value.size <= _MAX_ENTRIES or value.ndim > 4 or not np.isfinite(value).all():
            continue
        if np.abs(value).max() > _LIMIT:
            node = _squashed(node)
            value = node.call(values)
        nodes.append(node)
        values.append(value)
    return nodes, values


def _run(nodes: Sequence[Node], values: Sequence[Any]) -> Values:
    values = list(values)
    for node in nodes:
        values.append(node.call(values))
    return values


def _loss_of(values: Values, reduction: str, both: bool) -> jax.Array:
    last = {"sum": jnp.sum, "squares": lambda a: jnp.sum(a * a), "mean": lambda a: jnp.mean(jnp.sin(a)),
            "first": lambda a: a.reshape(-1)[0]}[reduction](values[-1])  # fmt: skip
    return last + jnp.sum(jnp.tanh(values[-2])) if both else last


def draw_graph(seed: int) -> Graph:
    """The graph of a seed: the loss of one example, and a loss of the batch that may couple its examples."""
    rng = np.random.default_rng(seed)

    def array(*front: int) -> jax.Array:
        shape = (int(size) for size in rng.choice(_SIZES, rng.integers(0, 3)))
        return jnp.asarray(rng.normal(size=(*front, *shape)))

    size = int(rng.integers(1, 7))
    params = tuple(array() for _ in range(rng.integers(1, 4)))
    batch = tuple(array(size) for _ in range(rng.integers(1, 3)))
    nodes, _ = _draw_nodes(rng, [*params, *(leaf[0] for leaf in batch)], int(rng.integers(2, 9)))
    reduction, both = str(rng.choice(["sum", "squares", "mean", "first"])), bool(rng.integers(2))

    def per(p, *example):
        return _loss_of(_run(nodes, [*p, *example]), reduction, both)

    def outputs(p, *batch):
        return over_examples(lambda p, *example: _run(nodes, [*p, *example])[-1])(p, *batch)

    kind = str(rng.choice(["mean", "sum", "weighted mean", "graph of outputs", "graph of outputs", "graph of data"]))
    given = {"graph of outputs": lambda p, *b: [*p, outputs(p, *b)], "graph of data": lambda p, *b: [*p, *b]}.get(kind)
    after = _draw_nodes(rng, given(params, *batch), int(rng.integers(1, 7)))[0] if given else []
    weights = jnp.asarray(rng.random(size))
    penalty = 0.1 * bool(rng.random() < 0.3)

    def f(p, *batch):
        if given is not None:
            loss = _loss_of(_run(after, given(p, *batch)), reduction, both)
        else:
            losses = over_examples(per)(p, *batch)
            scale = weights / jnp.sum(weights) if kind == "weighted mean" else 1
            loss = jnp.mean(losses) if kind == "mean" else jnp.sum(scale * losses)
        return loss + penalty * sum(jnp.sum(leaf**4) for leaf in p)

    shapes = f"parameters {[leaf.shape for leaf in params]}, data {[leaf.shape for leaf in batch]}"
    steps = "; ".join([*(node.text for node in nodes), f"then {kind}", *(node.text for node in after)])
    return Graph(f"{shapes}: {steps}; {reduction}, {both=}, {penalty=}", Case(per, f, params, batch))
