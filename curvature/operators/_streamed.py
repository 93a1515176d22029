"""``StreamedOperator``: the placeholder of an operator with ``batches`` while a solver is traced."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import batching
from jaxtyping import Array, Float

from curvature._trees import num_entries
from curvature._types import ChunkSize, Tree
from curvature.operators._base import LinearOperator, register_operator, static
from curvature.operators._data import DataOperator

Structure = tuple[Any, tuple[jax.ShapeDtypeStruct, ...]]
"""A hashable tree of shapes and dtypes: the treedef and the leaves."""


@register_operator
class StreamedOperator(LinearOperator):
    """The placeholder of a ``DataOperator`` with ``batches`` while a solver is traced.

    A product is one equation ``streamed_product`` of the jaxpr, which names the operator by its ``number`` and which
    ``linalg/_host_loop.py`` evaluates on the host. Under ``jax.vmap`` the product with many vectors is one equation
    too, evaluated in one pass over the batches.
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


def is_streamed(node: Any) -> bool:
    """Whether an operator sums over batches on the host."""
    return isinstance(node, DataOperator) and node.batches is not None


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


def evaluate_streamed(op: DataOperator, leaves: Sequence[Array], params: dict[str, Any]) -> list[Array]:
    """Evaluate one equation of ``streamed_p`` with these ``params``, in one pass over the batches of ``op``."""
    what, lanes = params["what"], params["lanes"]
    if what == "mv":
        treedef = jax.tree.structure(op.in_structure())
        if not lanes:
            return jax.tree.leaves(op.mv(treedef.unflatten(leaves)))
        vectors = treedef.unflatten([leaf.reshape(-1, *leaf.shape[len(lanes) :]) for leaf in leaves])
        return [leaf.reshape(*lanes, *leaf.shape[1:]) for leaf in jax.tree.leaves(op.products(vectors))]
    found = op.as_matrix(params["chunk_size"]) if what == "as_matrix" else op.diagonal(params["chunk_size"])
    return jax.tree.leaves(found)


streamed_p = Primitive("streamed_product")
streamed_p.multiple_results = True


@streamed_p.def_abstract_eval
def _abstract(*_: Any, lanes: tuple[int, ...], out: tuple[jax.ShapeDtypeStruct, ...], **__: Any) -> list[Any]:
    return [jax.core.ShapedArray((*lanes, *leaf.shape), leaf.dtype) for leaf in out]


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
