"""Trials: evaluation of a function on synthetic data, on the host, while the program that uses it is traced.

A trial tests a property that the jaxpr does not show, such as how a batch of one relates to a whole batch. Inside
``jit`` there are no values, so the data is synthetic. Real numbers are positive, so that logarithms and roots are
finite. Integers are 0 or 1, which are in the range of most labels and indices. A trial first draws real numbers from
[1, 2], so that the weights of a few examples exceed a total of 1 that a loss may clip at; if a value is not finite, it
draws from [0.25, 0.5] instead.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr

from curvature._types import Tree

Values = list[np.ndarray]
"""The outputs of a trial, in double precision."""


def with_num_examples(tree: Tree, num_examples: int) -> Tree:
    """The structure of the data with another number of examples along the leading axis of every leaf but scalars."""

    def of_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
        aval: Any = jax.typeof(leaf)
        shape = (num_examples, *aval.shape[1:]) if aval.ndim else ()
        return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))

    return jax.tree.map(of_leaf, tree)


def key_of(question: str, structure: Tree) -> Any:
    """The key under which the answer to a question about functions of this structure is cached."""
    leaves, treedef = jax.tree.flatten(structure)
    return question, treedef, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)


def trace_trial(fun: Callable[..., Any], *structures: Tree) -> ClosedJaxpr:
    """The jaxpr of a trial; matrix products have full precision, so that rounding does not depend on their size."""
    with jax.default_matmul_precision("highest"):
        return jax.make_jaxpr(fun)(*structures)


def evaluate_trial(closed: ClosedJaxpr, *structures: Tree) -> Values | None:
    """The outputs of a trial on synthetic values; None if it has effects, such as sums over devices.

    The first structure is that of the parameters. Tracers of an outer trace that the function has closed over get
    synthetic values too.
    """
    if closed.jaxpr.effects:
        return None
    values = _evaluate_from(1.0, closed, structures)
    if values is None or all(np.isfinite(value).all() for value in values):
        return values
    return _evaluate_from(0.25, closed, structures)


def _evaluate_from(least: float, closed: ClosedJaxpr, structures: tuple[Tree, ...]) -> Values | None:
    """The outputs for real numbers from ``least`` to ``2 * least``."""
    rng = np.random.default_rng(0)
    draw = functools.partial(_draw_array, rng, least)
    consts = [draw(jax.typeof(const)) if isinstance(const, Tracer) else const for const in closed.consts]
    operands = [draw(leaf, is_parameter=True) for leaf in jax.tree.leaves(structures[0])]
    operands += [draw(leaf) for leaf in jax.tree.leaves(structures[1:])]
    with jax.ensure_compile_time_eval():
        outs = jax.jit(jex.core.jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts)))(*operands)
        if any(isinstance(out, Tracer) for out in outs):  # inside a shard_map without jit there are no other values
            return None
        return [np.asarray(out).astype(np.float64) for out in outs]


def rounding_of(closed: ClosedJaxpr) -> float:
    """The largest rounding unit among the floating dtypes of the inputs and outputs of a trial."""
    dtypes = [v.aval.dtype for v in (*closed.jaxpr.invars, *closed.jaxpr.outvars)]  # pyright: ignore
    return max((float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)), default=0.0)


def _draw_array(rng: np.random.Generator, least: float, like: Any, is_parameter: bool = False) -> Any:
    """A synthetic array with the shape and dtype of ``like``.

    Examples differ. In integer data the first example is all ones; the last is 1 only in its first entry, or 0 if
    examples are scalars. Parameters are at most 1, and matrices of them have entries of both signs, so that the
    outputs of layers still differ between examples.
    """
    shape, dtype = like.shape, like.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return _draw_keys(rng, like)
    if jnp.issubdtype(dtype, jnp.inexact):
        values = rng.uniform(least, 2 * least, shape)
        if is_parameter and len(shape) > 1:
            values = (2 * values / least - 3) * np.sqrt(3 * min(shape[0], shape[-1]) / max(values.size, 1))
        elif is_parameter:
            values = values / (2 * least)
        return np.asarray(values, dtype)
    bits = rng.integers(0, 2, shape)
    if len(shape) > 1:
        columns = bits.reshape(shape[0], -1)
        columns[0], columns[-1], columns[:, :1] = 1, 0, 1
        return columns.reshape(shape).astype(dtype)
    return np.asarray(np.arange(bits.size).reshape(shape) < max(bits.size - 1, 1), dtype)


def _draw_keys(rng: np.random.Generator, like: Any) -> Any:
    """Random keys; abstract evaluation is the only way to the key implementation of a dtype."""
    impl: list[Any] = []

    def words(keys: Any) -> Any:
        impl.append(jax.random.key_impl(keys))
        return jax.random.key_data(keys)

    data = jax.eval_shape(words, jax.ShapeDtypeStruct(like.shape, like.dtype))
    return jax.random.wrap_key_data(rng.integers(0, 2**16, data.shape).astype(data.dtype), impl=impl[0])
