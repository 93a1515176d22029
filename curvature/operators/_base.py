"""Linear maps that are never formed, as pytrees."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from curvature import _checks
from curvature._trees import num_entries, ravel
from curvature._types import ChunkSize, Tree
from curvature.operators._pytrees import register_operator, static, zeros
from curvature.operators._pytrees import replace as replace
from curvature.operators._pytrees import set_fields as set_fields
from curvature.operators._pytrees import structure_of as structure_of
from curvature.transforms._blocks import side_by_side
from curvature.transforms._jacobian import map_basis

Product = Callable[[Tree], Tree]
"""A linear map of trees."""


class LinearOperator(ABC):
    """A linear map ``A`` of trees of arrays, known by its products.

    Operators are pytrees: they pass through ``jax.jit``, ``jax.vmap`` and ``jax.grad``, and a new point or new data of
    the same shapes never retraces. ``A @ v`` and ``A.mv(v)`` are the product with a tree, ``A @ B`` the composition;
    ``A.T``, ``A + B``, ``A - B``, ``-A``, ``2.0 * A`` and ``A + damping(1e-3)`` are operators again.

    A subclass defines ``mv``, ``in_structure`` and ``out_structure``, and ``linearize`` where products share work.
    """

    __array_ufunc__ = None  # NumPy's arrays and scalars leave arithmetic with an operator to it

    is_symmetric: bool = False
    """Whether ``A' = A``; a fact of the class or of its static fields, never of values."""

    @abstractmethod
    def mv(self, v: Tree) -> Tree:
        """The product ``A v``."""

    @abstractmethod
    def in_structure(self) -> Tree:
        """A tree of ``jax.ShapeDtypeStruct``, shaped like ``v``."""

    @abstractmethod
    def out_structure(self) -> Tree:
        """A tree of ``jax.ShapeDtypeStruct``, shaped like ``A v``."""

    def linearize(self) -> Product:
        """The map ``v -> A v`` with what does not depend on ``v`` evaluated once.

        Solvers ask for it once for each solve. Call it inside the ``jit`` that takes the products.
        """
        return self.mv

    @property
    def T(self) -> "LinearOperator":  # noqa: N802 - as of arrays
        """The transpose: ``<A v, w> = <v, A.T w>``."""
        return self if self.is_symmetric else TransposedOperator(self)

    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        """The dense m x n matrix; rows and columns in the order of ``jax.flatten_util.ravel_pytree``.

        Cost: n products that share one linearization, ``chunk_size`` of them at once; see ``vmap``.
        """
        _checks.check_chunk_size("as_matrix", chunk_size)
        structure = self.in_structure()
        return matrix_of_products(map_basis(self.linearize(), structure, chunk_size), num_entries(structure)).T

    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """The diagonal ``A[i, i]`` of a square operator, shaped like ``v``.

        Cost: n products that share one linearization, ``chunk_size`` of them at once. No matrix is formed.
        """
        _checks.check_chunk_size("diagonal", chunk_size)
        structure, product = self.in_structure(), self.linearize()
        _checks.check_structures("diagonal", "A v", self.out_structure(), "v", structure)
        vector, unravel = ravel(zeros(structure))
        return unravel(map_basis(lambda basis: _entry(basis, product(basis), vector.dtype), structure, chunk_size))

    def _checked(self, v: Tree) -> Tree:
        return _checks.check_direction(type(self).__name__, "v", v, "in_structure()", self.in_structure())

    def __call__(self, v: Tree) -> Tree:
        """``A @ v``, so that an operator can stand wherever a product ``v -> A v`` is asked for."""
        return self.mv(self._checked(v))

    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, LinearOperator):
            return self(other)
        if isinstance(other, DampingOperator):
            return self * other.scale
        _checks.check_structures("A @ B", "B v", other.out_structure(), "what A takes", self.in_structure())
        return ProductOperator(self, other)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        return _sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return _sum(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, scale: ArrayLike) -> "LinearOperator":
        _checks.check_scale("scale * A", scale)
        return ScaledOperator(jnp.asarray(scale), self)

    def __rmul__(self, scale: ArrayLike) -> "LinearOperator":
        return self * scale

    def __truediv__(self, scale: ArrayLike) -> "LinearOperator":
        _checks.check_scale("A / scale", scale)
        return self * (1 / jnp.asarray(scale))

    def __neg__(self) -> "LinearOperator":
        return self * -1.0


@register_operator
class TransposedOperator(LinearOperator):
    """``A'``, by the transposition of ``v -> A v``."""

    operator: LinearOperator

    def mv(self, v: Tree) -> Tree:
        return self.linearize()(v)

    def linearize(self) -> Product:
        transposed = jax.linear_transpose(self.operator.linearize(), self.operator.in_structure())
        return lambda v: transposed(v)[0]

    def in_structure(self) -> Tree:
        return self.operator.out_structure()

    def out_structure(self) -> Tree:
        return self.operator.in_structure()

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as of arrays
        return self.operator


@register_operator
class ProductOperator(LinearOperator):
    """``A B``, never formed."""

    left: LinearOperator
    right: LinearOperator

    def mv(self, v: Tree) -> Tree:
        return self.left.mv(self.right.mv(v))

    def linearize(self) -> Product:
        left, right = self.left.linearize(), self.right.linearize()
        return lambda v: left(right(v))

    def in_structure(self) -> Tree:
        return self.right.in_structure()

    def out_structure(self) -> Tree:
        return self.left.out_structure()

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as of arrays
        return self.right.T @ self.left.T


@register_operator
class SumOperator(LinearOperator):
    """``A + B + ...``; the terms that have no structure of their own take that of the first that has."""

    terms: tuple[LinearOperator, ...]

    def mv(self, v: Tree) -> Tree:
        return _total([term.mv(v) for term in self.terms])

    def linearize(self) -> Product:
        products = [term.linearize() for term in self.terms]
        return lambda v: _total([product(v) for product in products])

    def in_structure(self) -> Tree:
        return self._structured().in_structure()

    def out_structure(self) -> Tree:
        return self._structured().out_structure()

    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        """As for every operator; the sum of the matrices of the terms, each formed in its cheapest way."""
        _checks.check_chunk_size("as_matrix", chunk_size)
        matrices = [term.as_matrix(chunk_size) for term in self.terms if not isinstance(term, DampingOperator)]
        total = sum(matrices[1:], matrices[0])
        for term in self.terms:
            if isinstance(term, DampingOperator):
                total = total + term.scale.astype(total.dtype) * jnp.eye(len(total), dtype=total.dtype)
        return total

    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """As for every operator; the sum of the diagonals of the terms, each computed in its cheapest way."""
        _checks.check_chunk_size("diagonal", chunk_size)
        ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), self.in_structure())
        return _total(
            [term.mv(ones) if isinstance(term, DampingOperator) else term.diagonal(chunk_size) for term in self.terms]
        )

    def _structured(self) -> LinearOperator:
        return next(term for term in self.terms if not isinstance(term, DampingOperator))

    @property
    def is_symmetric(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(term.is_symmetric for term in self.terms)

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as of arrays
        return self if self.is_symmetric else SumOperator(tuple(term.T for term in self.terms))


@register_operator
class ScaledOperator(LinearOperator):
    """``c A``."""

    scale: Array
    operator: LinearOperator

    def mv(self, v: Tree) -> Tree:
        return scaled(self.scale, self.operator.mv(v))

    def linearize(self) -> Product:
        product = self.operator.linearize()
        return lambda v: scaled(self.scale, product(v))

    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        """As for every operator; a multiple of the matrix of the operator, formed in its cheapest way."""
        _checks.check_chunk_size("as_matrix", chunk_size)
        return scaled(self.scale, self.operator.as_matrix(chunk_size))

    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """As for every operator; a multiple of the diagonal of the operator, computed in its cheapest way."""
        _checks.check_chunk_size("diagonal", chunk_size)
        return scaled(self.scale, self.operator.diagonal(chunk_size))

    def in_structure(self) -> Tree:
        return self.operator.in_structure()

    def out_structure(self) -> Tree:
        return self.operator.out_structure()

    @property
    def is_symmetric(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.operator.is_symmetric

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as of arrays
        return self if self.is_symmetric else ScaledOperator(self.scale, self.operator.T)


@register_operator
class DampingOperator(LinearOperator):
    """``c I`` on any tree; made by ``damping``."""

    scale: Array
    is_symmetric = True

    def mv(self, v: Tree) -> Tree:
        return scaled(self.scale, v)

    def in_structure(self) -> Tree:
        raise _checks.no_structure()

    def out_structure(self) -> Tree:
        raise _checks.no_structure()

    def _checked(self, v: Tree) -> Tree:
        return v

    def __matmul__(self, other: Any) -> Any:
        return other * self.scale if isinstance(other, LinearOperator) else self(other)

    def __mul__(self, scale: ArrayLike) -> LinearOperator:
        _checks.check_scale("scale * damping", scale)
        return DampingOperator(self.scale * scale)


@register_operator
class MatrixOperator(LinearOperator):
    """A dense matrix on vectors."""

    matrix: Float[Array, "m n"]
    is_symmetric: bool = static(default=False)

    def mv(self, v: Float[Array, " n"]) -> Float[Array, " m"]:
        return jnp.matmul(self.matrix, v, precision="highest")

    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        return self.matrix

    def diagonal(self, chunk_size: ChunkSize = "auto") -> Float[Array, " n"]:
        _checks.check_structures("diagonal", "A v", self.out_structure(), "v", self.in_structure())
        return jnp.diagonal(self.matrix)

    def in_structure(self) -> Tree:
        return jax.ShapeDtypeStruct(self.matrix.shape[-1:], self.matrix.dtype)

    def out_structure(self) -> Tree:
        return jax.ShapeDtypeStruct(self.matrix.shape[-2:-1], self.matrix.dtype)

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as of arrays
        return self if self.is_symmetric else MatrixOperator(self.matrix.T)


def damping(scale: ArrayLike) -> DampingOperator:
    """The operator ``c I``, which takes its structure from the operator that it is added to.

    Args:
        scale: the number ``c``; it may be traced.

    Returns:
        An operator without structure: it multiplies any tree, and ``op + damping(c)`` is ``A + c I``.

    Raises:
        TypeError: when ``scale`` is not one real number; later, when the operator alone is asked for a structure.
        ValueError: later, when it is added to an operator that is not square.

    Cost: one multiple of ``v`` for each product.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> op = curvature.HessianOperator(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0])) + curvature.damping(0.5)
        >>> op @ jnp.array([1.0, 1.0])
        Array([ 6.5, 12.5], dtype=float32)
    """
    _checks.check_scale("damping", scale)
    return DampingOperator(jnp.asarray(scale))


def _sum(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """``A + B``, of equal structures, or square where one of them is a multiple of the identity."""
    if isinstance(left, DampingOperator) and isinstance(right, DampingOperator):
        return DampingOperator(left.scale + right.scale)
    if isinstance(left, DampingOperator) or isinstance(right, DampingOperator):
        square = right if isinstance(left, DampingOperator) else left
        _checks.check_structures("A + damping", "A v", square.out_structure(), "v", square.in_structure())
    else:
        _checks.check_structures("A + B", "what B takes", right.in_structure(), "what A takes", left.in_structure())
        _checks.check_structures("A + B", "B v", right.out_structure(), "A v", left.out_structure())
    return SumOperator((left, right))


def scaled(scale: ArrayLike, tree: Tree) -> Tree:
    """A multiple of a tree, each leaf in its own dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(scale).astype(leaf.dtype) * leaf, tree)


def _total(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def matrix_of_products(products: Tree, size: int) -> Float[Array, "size m"]:
    """Products stacked along a leading axis as the rows of a matrix of at least single precision."""
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(products))
    return side_by_side(products, size, dtype)


def _entry(basis: Tree, column: Tree, dtype: Any) -> Float[Array, ""]:
    """The entry of a column where the vector of the standard basis is one."""
    pairs = zip(jax.tree.leaves(basis), jax.tree.leaves(column), strict=True)
    entries = [jnp.sum(jnp.where(one != 0, leaf, 0)).astype(dtype) for one, leaf in pairs]
    return sum(entries[1:], entries[0])
