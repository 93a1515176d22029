"""Blocks of a Hessian given as a tree of trees: conversion to one matrix with named rows, and selection by paths."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Float

from curvature import _checks
from curvature._errors import caller, of_class, public
from curvature._trees import Structure, Subtree, leaf_paths, select
from curvature._types import HessianBlocks, Tree


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MatrixView:
    """A Hessian as one matrix, with the names of its rows and columns; returned by ``matrix_view``.

    ``view[row_path, column_path]`` is the block of two leaves or sub-trees, as a matrix. Under ``vmap`` the matrix has
    leading axes of lanes.

    Attributes:
        matrix: the entries, in the order of ``jax.flatten_util.ravel_pytree(x)``.
        structure: the tree structure of ``x``.
        sizes: the number of entries of each leaf of ``x``.
    """

    matrix: Float[Array, "*lanes n n"]
    structure: Structure = field(metadata={"static": True})
    sizes: tuple[int, ...] = field(metadata={"static": True})

    @property
    def index(self) -> dict[str, slice]:
        """The rows (and columns) of each leaf of ``x``, by path."""
        starts = [0, *itertools.accumulate(self.sizes)]
        spans = [slice(start, stop) for start, stop in itertools.pairwise(starts)]
        return dict(zip(leaf_paths(self.structure.unflatten(self.sizes)), spans, strict=True))

    @of_class
    def __getitem__(self, paths: tuple[str, str]) -> Float[Array, "*lanes rows columns"]:
        """The block of two sub-trees, named by their paths, as a matrix."""
        _check_path_pair("paths", paths)
        rows, columns = (self._span(path) for path in paths)
        return self.matrix[..., rows, columns]

    def _span(self, path: str) -> slice:
        leaves = select("path", self.structure.unflatten(self.sizes), path).leaves
        return slice(sum(self.sizes[: leaves.start]), sum(self.sizes[: leaves.stop]))


@public
def matrix_view(blocks: Tree, x: Tree) -> MatrixView:
    """The Hessian ``blocks`` as one n x n matrix, whose rows and columns are named by the paths of leaves.

    ``matrix[i, j]`` is the entry of ``ravel_pytree(x)[0][i]`` and ``ravel_pytree(x)[0][j]``.

    Args:
        blocks: a tree like ``x`` of trees like ``x``, as ``hessian(f)(x)`` returns for a scalar function of ``x``.
        x: the point, or any tree of its structure and shapes.

    Returns:
        A ``MatrixView``: ``.matrix`` of shape (n, n), ``.index`` from the path of a leaf to its slice of rows, and
        ``view["layers/0", "layers/1/w"]`` for the block of two leaves or sub-trees. Paths are spelled as by
        ``jax.tree_util.keystr(path, simple=True, separator="/")``; the empty path is the whole tree. Blocks of
        different dtypes are promoted to their common dtype.

    Raises:
        ValueError: if ``blocks`` is not a tree like ``x`` of trees like ``x``; from the view for an unknown path.

    Cost: one copy of the n x n entries.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
        >>> view = curvature.matrix_view(curvature.hessian(lambda x: x["b"] * jnp.sum(x["a"] ** 2))(x), x)
        >>> view.matrix
        Array([[6., 0., 2.],
               [0., 6., 4.],
               [2., 4., 0.]], dtype=float32)
        >>> view.index
        {'a': slice(0, 2, None), 'b': slice(2, 3, None)}
        >>> view["a", "b"]
        Array([[2.],
               [4.]], dtype=float32)
    """
    x = _checks.check_point("x", x)
    sizes = tuple(leaf.size for leaf in jax.tree.leaves(x))
    return MatrixView(matrix_of("blocks", blocks, x), jax.tree.structure(x), sizes)


def matrix_of(name: str, blocks: Tree, x: Tree) -> Float[Array, "n n"]:
    """A tree like ``x`` of trees like ``x`` as one matrix."""
    rows = _check_hessian(name, blocks, x)
    with jax.numpy_dtype_promotion("standard"):  # blocks may differ in dtype even where users are strict
        dtype = jnp.result_type(*jax.tree.leaves(blocks))
    return jnp.concatenate([side_by_side(row, leaf.size, dtype) for row, leaf in rows])


def side_by_side(tree: Tree, num_rows: int, dtype: Any) -> Float[Array, "rows n"]:
    """The leaves, each with ``num_rows`` entries along its leading axes, as one matrix."""
    leaves = [jnp.asarray(leaf, dtype).reshape(num_rows, -1) for leaf in jax.tree.leaves(tree)]
    return jnp.concatenate(leaves, axis=1)


# ---- the blocks that are returned ------------------------------------------------------------------------------------


def selected(x: Tree, blocks: HessianBlocks) -> tuple[Subtree, Subtree]:
    """The rows and the columns that are returned, unless these are diagonal blocks."""
    rows, columns = (select("blocks", x, path) for path in blocks or ("", ""))
    return rows, columns


def leaf_pairs(x: Tree, blocks: HessianBlocks) -> list[tuple[int, int]]:
    """The numbers of the row leaf and the column leaf of each block that is returned, in the order of the result."""
    numbers = range(len(jax.tree.leaves(x)))
    if blocks == "diagonal":
        return [(i, i) for i in numbers]
    rows, columns = selected(x, blocks)
    return list(itertools.product(numbers[rows.leaves], numbers[columns.leaves]))


def tree_of_blocks(x: Tree, blocks: HessianBlocks, found: Sequence[Array]) -> Tree:
    """The result from its blocks, in the order of ``leaf_pairs``."""
    if blocks == "diagonal":
        return jax.tree.structure(x).unflatten(found)
    rows, columns = selected(x, blocks)
    return rows.structure.compose(columns.structure).unflatten(found)


def _check_hessian(name: str, blocks: Any, x: Tree) -> list[tuple[Tree, jax.Array]]:
    """The rows of a Hessian that is a tree like ``x`` of trees like ``x``, each paired with its leaf of ``x``."""
    structure = jax.tree.structure(x)
    paths = [keystr(path) for path, _ in tree_flatten_with_path(x)[0]]
    leaves = jax.tree.leaves(x)
    try:
        rows = structure.flatten_up_to(blocks)
        columns = [structure.flatten_up_to(row) for row in rows]
    except ValueError as error:
        raise ValueError(
            f"{caller()}: {name} is not a tree like x of trees like x, as curvature.hessian returns: {error}"
        ) from None
    for row_path, row_leaf, row in zip(paths, leaves, columns, strict=True):
        for path, leaf, block in zip(paths, leaves, row, strict=True):
            expected = row_leaf.shape + leaf.shape
            if jnp.shape(block) != expected:
                raise ValueError(
                    f"{caller()}: {name}{row_path}{path} has shape {jnp.shape(block)}, expected {expected}."
                )
    return list(zip(rows, leaves, strict=True))


def _check_path_pair(name: str, paths: Any) -> None:
    """Refuse anything but two paths."""
    if not (isinstance(paths, tuple | list) and len(paths) == 2 and all(isinstance(path, str) for path in paths)):
        raise ValueError(f"{caller()}: {name}={paths!r}, expected a pair of paths, such as ('layers/0', '').")
