"""Functions evaluated on a few made-up examples, on the host, while the program that uses them is traced.

A property of a function that no jaxpr shows, such as what a batch of one has to do with a whole batch, can be tried
out. Inside ``jit`` there are no values to try it on, so the values are made up: positive real numbers, of which there
are logarithms and roots, and bits for integers, which are in the range of most labels and indices. Real numbers above 1
come first, so that weights of a few examples are no less than a least total of 1; then those below 1, for functions
that are not finite there.
"""

import functools
import weakref
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
"""What a trial gives, in double precision."""

# Verdicts on functions of given shapes, dropped with the function: a cache and nothing else.
_VERDICTS: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()


def rows_of(tree: Tree, rows: int) -> Tree:
    """The structure of a tree of data with so many examples along the leading axis of every leaf but scalars."""

    def of_leaf(leaf: Any) -> jax.ShapeDtypeStruct:
        aval: Any = jax.typeof(leaf)
        shape = (rows, *aval.shape[1:]) if aval.ndim else ()
        return jax.ShapeDtypeStruct(shape, aval.dtype, weak_type=getattr(aval, "weak_type", False))

    return jax.tree.map(of_leaf, tree)


def point_of(tree: Tree) -> Tree:
    """The structure of a point, without the devices that it lies on."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def once(functions: tuple[Any, ...], structure: Tree, verdict: Callable[[], Any]) -> Any:
    """``verdict()``, found again for the same functions on data of the same shapes.

    Functions that cannot be looked up, such as those that hold arrays, are judged each time.
    """
    leaves, treedef = jax.tree.flatten(structure)
    shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
    try:
        key = tuple(map(weakref.ref, functions)), treedef, shapes
        known = _VERDICTS.setdefault(functions[0], {})
        if key in known:
            return known[key]
    except TypeError:  # not hashable, or not weakly referable
        return verdict()
    known[key] = verdict()
    return known[key]


def traced(fun: Callable[..., Any], *structures: Tree) -> ClosedJaxpr:
    """The jaxpr of a trial; products are exact, so that their size alone cannot change them."""
    with jax.default_matmul_precision("highest"):
        return jax.make_jaxpr(fun)(*structures)


def evaluated(closed: ClosedJaxpr, *structures: Tree) -> Values | None:
    """The outputs of a trial at made-up values; None where it has effects, such as sums over devices.

    The first structure is that of the parameters. Arrays of an outer trace that the function has closed over are made
    up too.
    """
    if closed.jaxpr.effects:
        return None
    values = _evaluated_from(1.0, closed, structures)
    if values is None or all(np.isfinite(value).all() for value in values):
        return values
    return _evaluated_from(0.25, closed, structures)


def _evaluated_from(least: float, closed: ClosedJaxpr, structures: tuple[Tree, ...]) -> Values | None:
    """The outputs at values from ``least`` to twice that."""
    rng = np.random.default_rng(0)
    made_up = functools.partial(_made_up, rng, least)
    consts = [made_up(jax.typeof(const)) if isinstance(const, Tracer) else const for const in closed.consts]
    operands = [made_up(leaf, is_parameter=True) for leaf in jax.tree.leaves(structures[0])]
    operands += [made_up(leaf) for leaf in jax.tree.leaves(structures[1:])]
    with jax.ensure_compile_time_eval():
        outs = jax.jit(jex.core.jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, consts)))(*operands)
        if any(isinstance(out, Tracer) for out in outs):  # in a shard_map without jit all values are those of a mesh
            return None
        return [np.asarray(out).astype(np.float64) for out in outs]


def rounding_of(closed: ClosedJaxpr) -> float:
    """The relative rounding of the least precise floating numbers among the inputs and outputs of a trial."""
    dtypes = [v.aval.dtype for v in (*closed.jaxpr.invars, *closed.jaxpr.outvars)]  # pyright: ignore
    return max((float(jnp.finfo(dtype).eps) for dtype in dtypes if jnp.issubdtype(dtype, jnp.inexact)), default=0.0)


def _made_up(rng: np.random.Generator, least: float, like: Any, is_parameter: bool = False) -> Any:
    """An array of one shape and dtype; examples differ, and the last one holds fewer ones than the others may.

    Parameters are at most 1, and matrices of them have entries of either sign, so that layers keep apart what differs
    between examples.
    """
    shape, dtype = like.shape, like.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return _made_up_keys(rng, like)
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


def _made_up_keys(rng: np.random.Generator, like: Any) -> Any:
    impl: list[Any] = []

    def words(keys: Any) -> Any:
        impl.append(jax.random.key_impl(keys))
        return jax.random.key_data(keys)

    data = jax.eval_shape(words, jax.ShapeDtypeStruct(like.shape, like.dtype))
    return jax.random.wrap_key_data(rng.integers(0, 2**16, data.shape).astype(data.dtype), impl=impl[0])
