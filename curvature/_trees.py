"""Trees of arrays: flattening to a vector, sizes, and sub-trees named by their paths."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Float

from curvature._errors import caller
from curvature._types import Tree

_MOST_PATHS = 40  # in one message


def num_entries(tree: Tree) -> int:
    """The number of entries of all leaves together; a plain number is one entry."""
    return sum(map(np.size, jax.tree.leaves(tree)))


def ravel(tree: Tree) -> tuple[Float[Array, " n"], Callable[[Array], Tree]]:
    """The tree as one vector of at least single precision, and the inverse map, which restores each leaf's dtype."""
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
        flat, unravel = ravel_pytree(tree)
        dtype = jnp.promote_types(flat.dtype, jnp.float32)
    return flat.astype(dtype), lambda vector: unravel(vector.astype(flat.dtype))


Structure = Any  # a PyTreeDef, which type checkers do not accept as a type


@dataclass(frozen=True)
class Subtree:
    """A node of a tree: the positions of its leaves among the leaves of the tree, and the structure of the node."""

    leaves: slice
    structure: Structure

    def take(self, tree: Tree) -> Tree:
        """The sub-tree of ``tree`` at this node."""
        return self.structure.unflatten(jax.tree.leaves(tree)[self.leaves])

    def put(self, tree: Tree, part: Tree) -> Tree:
        """``tree`` with the sub-tree at this node replaced by ``part``."""
        leaves, structure = jax.tree.flatten(tree)
        leaves[self.leaves] = jax.tree.leaves(part)
        return structure.unflatten(leaves)


def leaf_paths(tree: Tree) -> list[str]:
    """The path of each leaf, such as "layers/0/w"; the path is empty if the tree is a leaf."""
    return [_path_of(keys) for keys, _ in tree_flatten_with_path(tree)[0]]


def leaf_subtrees(tree: Tree) -> list[Subtree]:
    """Each leaf as a sub-tree."""
    leaf = jax.tree.structure(0)
    return [Subtree(slice(i, i + 1), leaf) for i in range(len(jax.tree.leaves(tree)))]


def select(name: str, tree: Tree, path: str) -> Subtree:
    """The sub-tree at ``path``, possibly a leaf; the empty path is the whole tree. Errors name the option ``name``."""
    nodes = list(_nodes(jax.tree.structure(tree), [keys for keys, _ in tree_flatten_with_path(tree)[0]]))
    found = [node for spelled, node in nodes if spelled == path]
    if len(found) > 1:
        raise ValueError(
            f"{caller()}: {name}={path!r} names {len(found)} sub-trees, expected one; rename a key that contains '/'."
        )
    if not found:
        paths = leaf_paths(tree)
        more = f" and {len(paths) - _MOST_PATHS} more" if len(paths) > _MOST_PATHS else ""
        raise ValueError(
            f"{caller()}: {name}={path!r} is no path of x, expected one of {paths[:_MOST_PATHS]}{more}, "
            "a prefix of them up to a '/', or '' for all of x."
        )
    return found[0]


def _nodes(node: Structure, keys: Sequence[Any], start: int = 0, depth: int = 0) -> Iterator[tuple[str, Subtree]]:
    """Every node that holds leaves, the root first, with its path; ``keys`` are the keys of each leaf of the tree."""
    if not node.num_leaves:
        return
    yield _path_of(keys[start][:depth]), Subtree(slice(start, start + node.num_leaves), node)
    for child in node.children():
        yield from _nodes(child, keys, start, depth + 1)
        start += child.num_leaves


def _path_of(keys: Any) -> str:
    return keystr(keys, simple=True, separator="/")
