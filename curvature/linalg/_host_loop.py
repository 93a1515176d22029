"""``call_solver``: run a solver compiled, or as an interpreted loop on the host for an operator with ``batches``."""

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, Primitive, Var
from jax.interpreters import batching
from jaxtyping import Array, Float

from curvature._compile_cache import call_compiled, compiled_for, is_traced
from curvature._errors import caller
from curvature._trees import num_entries
from curvature._types import ChunkSize, Tree
from curvature.operators._base import LinearOperator
from curvature.operators._data import DataOperator, is_streamed
from curvature.operators._pytrees import register_operator, static
from curvature.programs._jaxprs import Environment, called_jaxpr, open_jaxpr, open_loop


def call_solver(program: Callable[..., Any], op: Any, *operands: Any, **how: Any) -> Any:
    """``program(op, *operands, **how)`` for a public function.

    Outside of transformations the program is compiled once for each structure of the operands. Inside a transformation
    it is traced like any function. With an operator that has ``batches`` it is traced once, and a loop on the host
    interprets the jaxpr; the equations between two passes over the batches are compiled together.
    """
    if not (isinstance(op, LinearOperator) or callable(op)):
        return program(op, *operands, **how)  # raises the error
    replaced, operators = replace_streamed((op, *operands))
    if operators and is_traced():
        raise TypeError(
            f"{caller()}: called inside jit, vmap, grad or another transformation with an operator that has batches=, "
            f"which are summed on the host; call {caller()} outside of it, or give the data as arrays with chunk_size=."
        )
    if operators:
        return _run_on_host(program, replaced, operators, how)
    return program(op, *operands, **how) if is_traced() else call_compiled(program, (op, *operands), how)


def _run_on_host(
    program: Callable[..., Any], operands: tuple[Any, ...], operators: list[DataOperator], how: dict[str, Any]
) -> Any:
    jitted, given, data = compiled_for(program, operands, how)
    try:
        traced = jitted.trace(given, *data)
    finally:
        given.content = None
    outs = _evaluate(traced.jaxpr.jaxpr, traced.jaxpr.consts, list(map(jnp.asarray, data)), operators)
    return jax.tree.structure(traced.out_info).unflatten(outs)


# ---- the placeholder of an operator with batches -------------------------------------------------------------------

Structure = tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]
"""A hashable tree of shapes and dtypes: the treedef and the leaves."""


@register_operator
class StreamedOperator(LinearOperator):
    """The placeholder of a ``DataOperator`` with ``batches`` while a solver is traced.

    A product is one equation ``streamed_product`` of the jaxpr, which names the operator by its ``number`` and which
    the loop on the host evaluates. Under ``jax.vmap`` the product with many vectors is one equation too, evaluated in
    one pass over the batches.
    """

    number: int = static()
    rows: Structure = static()
    columns: Structure = static()
    is_symmetric: bool = static()

    def mv(self, v: Tree) -> Tree:
        structure, out = self.rows
        leaves = jax.tree.leaves(self._checked(v))
        outs = streamed_p.bind(*leaves, number=self.number, what="mv", chunk_size=None, lanes=(), out=out)
        return structure.unflatten(outs)

    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        with jax.numpy_dtype_promotion("standard"):
            dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in self.rows[1]))
        shape = num_entries(self.out_structure()), num_entries(self.in_structure())
        out = (jax.ShapeDtypeStruct(shape, dtype),)
        return streamed_p.bind(number=self.number, what="as_matrix", chunk_size=chunk_size, lanes=(), out=out)[0]

    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        structure, out = self.rows
        outs = streamed_p.bind(number=self.number, what="diagonal", chunk_size=chunk_size, lanes=(), out=out)
        return structure.unflatten(outs)

    def in_structure(self) -> Tree:
        return self.columns[0].unflatten(self.columns[1])

    def out_structure(self) -> Tree:
        return self.rows[0].unflatten(self.rows[1])


def has_placeholder(tree: Tree) -> bool:
    """Whether a tree contains a ``StreamedOperator``."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, StreamedOperator))
    return any(isinstance(node, StreamedOperator) for node in nodes)


def replace_streamed(tree: Tree) -> tuple[Tree, list[DataOperator]]:
    """The tree with a placeholder for each operator with ``batches``, and these operators in order of ``number``."""
    nodes, structure = jax.tree.flatten(tree, is_leaf=is_streamed)
    operators: list[DataOperator] = []
    for i, node in enumerate(nodes):
        if is_streamed(node):
            number, rows, columns = len(operators), _hashable(node.out_structure()), _hashable(node.in_structure())
            nodes[i] = StreamedOperator(number, rows, columns, node.is_symmetric)
            operators.append(node)
    return structure.unflatten(nodes), operators


def _hashable(structure: Tree) -> Structure:
    leaves, treedef = jax.tree.flatten(structure)
    return treedef, tuple(leaves)


streamed_p = Primitive("streamed_product")
streamed_p.multiple_results = True


@streamed_p.def_abstract_eval
def _abstract(*_: Any, lanes: tuple[int, ...], out: tuple[jax.ShapeDtypeStruct, ...], **__: Any) -> list[Any]:
    return [ShapedArray((*lanes, *leaf.shape), leaf.dtype) for leaf in out]


def _batched(operands: Sequence[Array], axes: Sequence[Any], *, lanes: tuple[int, ...], **params: Any) -> Any:
    """The batching rule: the new axis of vectors comes before the existing ones."""
    size = next(x.shape[axis] for x, axis in zip(operands, axes, strict=True) if axis is not None)
    moved = [
        jnp.broadcast_to(x, (size, *x.shape)) if axis is None else jnp.moveaxis(x, axis, 0)
        for x, axis in zip(operands, axes, strict=True)
    ]
    outs = streamed_p.bind(*moved, lanes=(size, *lanes), **params)
    return outs, [0] * len(outs)


batching.primitive_batchers[streamed_p] = _batched


# ---- the loop on the host ------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """Several equations without a product, compiled together, or one equation that contains a product.

    Attributes:
        ins: the variables and literals that the piece reads.
        outs: the variables that the piece writes.
        run: from the values of ``ins``, and the operators, to the values of ``outs``.
    """

    ins: Sequence[Any]
    outs: Sequence[Any]
    run: Callable[[list[Any], Sequence[DataOperator]], Sequence[Any]]


# The pieces of each jaxpr that ran on the host; without this cache each call would compile them.
_PIECES: weakref.WeakKeyDictionary[Jaxpr, list[_Piece]] = weakref.WeakKeyDictionary()


def _evaluate(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], operators: Sequence[DataOperator]) -> list[Any]:
    """The outputs of a jaxpr in which some equations are products with these operators."""
    env = Environment()
    env.write(jaxpr.constvars, consts)
    env.write(jaxpr.invars, args)
    if jaxpr not in _PIECES:
        _PIECES[jaxpr] = _cut(jaxpr)
    for piece in _PIECES[jaxpr]:
        env.write(piece.outs, piece.run(env.read(piece.ins), operators))
    return env.read(jaxpr.outvars)


def _cut(jaxpr: Jaxpr) -> list[_Piece]:
    """The equations in order: each equation with a product alone, and all equations between two of these together."""
    pieces: list[_Piece] = []
    segment: list[Any] = []
    for i, eqn in enumerate(jaxpr.eqns):
        if not _contains_product(eqn):
            segment.append(eqn)
            continue
        pieces += _compiled_segment(jaxpr, segment, i)
        segment = []
        if eqn.primitive.name in _EVALUATIONS:
            run = partial(_EVALUATIONS[eqn.primitive.name], eqn)
        else:
            body = called_jaxpr(eqn)
            assert body is not None, f"a product inside {eqn.primitive.name}"
            assert not body.constvars
            run = partial(_evaluate, body, [])
        pieces.append(_Piece(eqn.invars, eqn.outvars, run))
    return pieces + _compiled_segment(jaxpr, segment, len(jaxpr.eqns))


def _compiled_segment(jaxpr: Jaxpr, eqns: list[Any], end: int) -> list[_Piece]:
    """The equations before number ``end`` as one compiled function; its outputs are what later equations read."""
    if not eqns:
        return []
    written = {v for eqn in eqns for v in eqn.outvars}
    ins = list(dict.fromkeys(v for eqn in eqns for v in eqn.invars if isinstance(v, Var) and v not in written))
    later = [v for eqn in jaxpr.eqns[end:] for v in eqn.invars] + list(jaxpr.outvars)
    outs = list(dict.fromkeys(v for v in later if isinstance(v, Var) and v in written))
    segment = jaxpr.replace(
        constvars=[],
        invars=ins,
        outvars=outs,
        eqns=eqns,
        effects=frozenset().union(*(eqn.effects for eqn in eqns)),
        debug_info=jaxpr.debug_info.with_unknown_names(),
    )
    compiled = jax.jit(jex.core.jaxpr_as_fun(ClosedJaxpr(segment, [])))
    return [_Piece(ins, outs, lambda values, _: compiled(*values))]


def _contains_product(eqn: Any) -> bool:
    """Whether an equation, or an equation in its bodies, is a product with an operator that has ``batches``."""
    if eqn.primitive is streamed_p:
        return True
    return any(_contains_product(inner) for body in jex.core.jaxprs_in_params(eqn.params) for inner in body.eqns)


def _evaluate_product(eqn: Any, leaves: list[Any], operators: Sequence[DataOperator]) -> list[Array]:
    """Evaluate one equation of ``streamed_p`` in one pass over the batches of its operator."""
    what, lanes, chunk_size = eqn.params["what"], eqn.params["lanes"], eqn.params["chunk_size"]
    op = operators[eqn.params["number"]]
    if what == "mv":
        treedef = jax.tree.structure(op.in_structure())
        if not lanes:
            return jax.tree.leaves(op.mv(treedef.unflatten(leaves)))
        vectors = treedef.unflatten([leaf.reshape(-1, *leaf.shape[len(lanes) :]) for leaf in leaves])
        return [leaf.reshape(*lanes, *leaf.shape[1:]) for leaf in jax.tree.leaves(op.products(vectors))]
    found = op.as_matrix(chunk_size) if what == "as_matrix" else op.diagonal(chunk_size)
    return jax.tree.leaves(found)


def _evaluate_closed(closed: Any, args: Sequence[Any], operators: Sequence[DataOperator]) -> list[Any]:
    return _evaluate(open_jaxpr(closed), getattr(closed, "consts", []), args, operators)


def _evaluate_while(eqn: Any, values: list[Any], operators: Sequence[DataOperator]) -> list[Any]:
    params = eqn.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    of_cond, of_body, carry = values[:first], values[first:second], values[second:]
    while _evaluate_closed(params["cond_jaxpr"], [*of_cond, *carry], operators)[0]:
        carry = _evaluate_closed(params["body_jaxpr"], [*of_body, *carry], operators)
    return carry


def _evaluate_scan(eqn: Any, values: list[Any], operators: Sequence[DataOperator]) -> list[Any]:
    loop = open_loop(eqn)
    consts, carry, slices = loop.split(values)
    order = -1 if eqn.params["reverse"] else 1
    stacked: list[list[Any]] = [[] for _ in range(len(eqn.outvars) - loop.num_carry)]
    for i in range(eqn.params["length"])[::order]:
        outs = _evaluate_closed(loop.body, [*consts, *carry, *(x[i] for x in slices)], operators)
        carry = outs[: loop.num_carry]
        for rows, out in zip(stacked, outs[loop.num_carry :], strict=True):
            rows.append(out)
    return [*carry, *(jnp.stack(rows[::order]) for rows in stacked)]


def _evaluate_cond(eqn: Any, values: list[Any], operators: Sequence[DataOperator]) -> list[Any]:
    return _evaluate_closed(eqn.params["branches"][int(values[0])], values[1:], operators)


_EVALUATIONS = {
    streamed_p.name: _evaluate_product,
    "while": _evaluate_while,
    "scan": _evaluate_scan,
    "cond": _evaluate_cond,
}
