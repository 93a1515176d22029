"""Linear operators on pytrees: the base class, transposes, products, sums, multiples, matrices, damping."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from curvature import _checks
from curvature._errors import calling, of_class, public
from curvature._trees import num_entries, ravel
from curvature._types import ChunkSize, Tree
from curvature.operators._pytrees import register_operator, static, zeros
from curvature.transforms._blocks import side_by_side
from curvature.transforms._jacobian import map_basis

Product = Callable[[Tree], Tree]
"""A linear map from trees to trees."""


class LinearOperator(ABC):
    """A linear map ``A`` from trees of arrays to trees of arrays, applied to vectors and never formed.

    Operators are pytrees: they pass through ``jax.jit``, ``jax.vmap`` and ``jax.grad``, and a new point or new data of
    the same shapes never retraces. ``A @ v`` and ``A.mv(v)`` apply the operator to a tree, and ``A @ B`` composes.
    ``A.T``, ``A + B``, ``A - B``, ``-A``, ``2.0 * A`` and ``A + damping(1e-3)`` are operators too.

    A subclass defines ``mv`` and ``in_structure``; ``out_structure`` if it is not square, and ``linearize`` if products
    share work.
    """

    __array_ufunc__ = None  # NumPy then calls the reflected methods of the operator instead of broadcasting

    is_symmetric: bool = False
    """Whether ``A' = A``. It depends on the class or on its static fields, never on values."""

    @abstractmethod
    def mv(self, v: Tree) -> Tree:
        """The product ``A v``."""

    @abstractmethod
    def in_structure(self) -> Tree:
        """A tree of ``jax.ShapeDtypeStruct``, shaped like ``v``."""

    def out_structure(self) -> Tree:
        """A tree of ``jax.ShapeDtypeStruct``, shaped like ``A v``: by default like ``v``."""
        return self.in_structure()

    def linearize(self) -> Product:
        """The map ``v -> A v``; everything that does not depend on ``v`` is evaluated once.

        A solver calls it once per solve. Call it inside the ``jit`` that evaluates the products.
        """
        return self.mv

    @property
    def T(self) -> "LinearOperator":  # noqa: N802 - as of arrays
        """The transpose: ``<A v, w> = <v, A.T w>``."""
        return self if self.is_symmetric else TransposedOperator(self)

    @public
    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        """The dense m x n matrix, with rows and columns in the order of ``jax.flatten_util.ravel_pytree``.

        Cost: n products that share one linearization, ``chunk_size`` of them at once; see ``vmap``.
        """
        _checks.check_chunk_size(chunk_size)
        structure = self.in_structure()
        return matrix_of_products(map_basis(self.linearize(), structure, chunk_size), num_entries(structure)).T

    @public
    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """The diagonal ``A[i, i]`` of a square operator, shaped like ``v``.

        Cost: n products that share one linearization, ``chunk_size`` of them at once. No matrix is formed.
        """
        _checks.check_chunk_size(chunk_size)
        structure, product = self.in_structure(), self.linearize()
        _checks.check_structures("A v", self.out_structure(), "v", structure)
        vector, unravel = ravel(zeros(structure))

        def entry(basis: Tree) -> Float[Array, ""]:  # A[i, i] for the basis vector e_i
            pairs = zip(jax.tree.leaves(basis), jax.tree.leaves(product(basis)), strict=True)
            entries = [jnp.sum(jnp.where(one != 0, leaf, 0)).astype(vector.dtype) for one, leaf in pairs]
            return sum(entries[1:], entries[0])

        return unravel(map_basis(entry, structure, chunk_size))

    @of_class
    def _checked(self, v: Tree) -> Tree:
        return _checks.check_direction("v", v, "in_structure()", self.in_structure())

    def __call__(self, v: Tree) -> Tree:
        """``A @ v``: an operator can be passed wherever a function ``v -> A v`` is expected."""
        return self.mv(self._checked(v))

    @calling("A @ B")
    def __matmul__(self, other: Any) -> Any:
        if not isinstance(other, LinearOperator):
            return self(other)
        if isinstance(other, DampingOperator):
            return self * other.scale
        _checks.check_structures("B v", other.out_structure(), "what A takes", self.in_structure())
        return ProductOperator(self, other)

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        return _sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return _sum(self, -other) if isinstance(other, LinearOperator) else NotImplemented

    @calling("scale * A")
    def __mul__(self, scale: ArrayLike) -> "LinearOperator":
        _checks.check_scale(scale)
        return ScaledOperator(jnp.asarray(scale), self)

    def __rmul__(self, scale: ArrayLike) -> "LinearOperator":
        return self * scale

    @calling("A / scale")
    def __truediv__(self, scale: ArrayLike) -> "LinearOperator":
        _checks.check_scale(scale)
        return self * (1 / jnp.asarray(scale))

    def __neg__(self) -> "LinearOperator":
        return self * -1.0


@register_operator
class TransposedOperator(LinearOperator):
    """``A'``, by ``jax.linear_transpose`` of ``v -> A v``."""

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
    """``A + B + ...``. Damping terms have no structure; they take the structure of the first other term."""

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

    @public
    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        """The sum of the matrices of the terms, each formed in its cheapest way; see ``LinearOperator``."""
        _checks.check_chunk_size(chunk_size)
        matrices = [term.as_matrix(chunk_size) for term in self.terms if not isinstance(term, DampingOperator)]
        total = sum(matrices[1:], matrices[0])
        for term in self.terms:
            if isinstance(term, DampingOperator):
                total = total + term.scale.astype(total.dtype) * jnp.eye(len(total), dtype=total.dtype)
        return total

    @public
    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """The sum of the diagonals of the terms, each computed in its cheapest way; see ``LinearOperator``."""
        _checks.check_chunk_size(chunk_size)
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

    @public
    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        """A multiple of the matrix of ``A``, formed in its cheapest way; see ``LinearOperator``."""
        _checks.check_chunk_size(chunk_size)
        return scaled(self.scale, self.operator.as_matrix(chunk_size))

    @public
    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """A multiple of the diagonal of ``A``, computed in its cheapest way; see ``LinearOperator``."""
        _checks.check_chunk_size(chunk_size)
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
    """``c I`` on trees of any structure; constructed by ``damping``."""

    scale: Array
    is_symmetric = True

    def mv(self, v: Tree) -> Tree:
        return scaled(self.scale, v)

    def in_structure(self) -> Tree:
        raise TypeError("damping: c I has no structure; add it to an operator, as in op + damping(1e-3).")

    def _checked(self, v: Tree) -> Tree:
        return v

    def __matmul__(self, other: Any) -> Any:
        return other * self.scale if isinstance(other, LinearOperator) else self(other)

    @calling("scale * damping")
    def __mul__(self, scale: ArrayLike) -> LinearOperator:
        _checks.check_scale(scale)
        return DampingOperator(self.scale * scale)


@register_operator
class MatrixOperator(LinearOperator):
    """A dense matrix as an operator on vectors."""

    matrix: Float[Array, "m n"]
    is_symmetric: bool = static(default=False)

    def mv(self, v: Float[Array, " n"]) -> Float[Array, " m"]:
        return jnp.matmul(self.matrix, v, precision="highest")

    @public
    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        _checks.check_chunk_size(chunk_size)
        return self.matrix

    @public
    def diagonal(self, chunk_size: ChunkSize = "auto") -> Float[Array, " n"]:
        _checks.check_chunk_size(chunk_size)
        _checks.check_structures("A v", self.out_structure(), "v", self.in_structure())
        return jnp.diagonal(self.matrix)

    def in_structure(self) -> Tree:
        return jax.ShapeDtypeStruct(self.matrix.shape[-1:], self.matrix.dtype)

    def out_structure(self) -> Tree:
        return jax.ShapeDtypeStruct(self.matrix.shape[-2:-1], self.matrix.dtype)

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as of arrays
        return self if self.is_symmetric else MatrixOperator(self.matrix.T)


@public
def damping(scale: ArrayLike) -> DampingOperator:
    """The operator ``c I``, which takes its structure from the operator that it is added to.

    Args:
        scale: the number ``c``; it may be traced.

    Returns:
        An operator without structure: it multiplies any tree, and ``op + damping(c)`` is ``A + c I``.

    Raises:
        TypeError: if ``scale`` is not one real number; later, if the structure of ``damping(c)`` alone is needed.
        ValueError: later, if ``damping(c)`` is added to an operator that is not square.

    Cost: one multiple of ``v`` per product.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> op = curvature.HessianOperator(lambda x: jnp.sum(x**3), jnp.array([1.0, 2.0])) + curvature.damping(0.5)
        >>> op @ jnp.array([1.0, 1.0])
        Array([ 6.5, 12.5], dtype=float32)
    """
    _checks.check_scale(scale)
    return DampingOperator(jnp.asarray(scale))


def _sum(left: LinearOperator, right: LinearOperator) -> LinearOperator:
    """``A + B``. Both have the same structures, or one is ``c I`` and the other is square."""
    if isinstance(left, DampingOperator) and isinstance(right, DampingOperator):
        return DampingOperator(left.scale + right.scale)
    if isinstance(left, DampingOperator) or isinstance(right, DampingOperator):
        square = right if isinstance(left, DampingOperator) else left
        with calling("A + damping"):
            _checks.check_structures("A v", square.out_structure(), "v", square.in_structure())
    else:
        with calling("A + B"):
            _checks.check_structures("what B takes", right.in_structure(), "what A takes", left.in_structure())
            _checks.check_structures("B v", right.out_structure(), "A v", left.out_structure())
    return SumOperator((left, right))


def scaled(scale: ArrayLike, tree: Tree) -> Tree:
    """``scale * tree``; each leaf keeps its dtype."""
    return jax.tree.map(lambda leaf: jnp.asarray(scale).astype(leaf.dtype) * leaf, tree)


def _total(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def matrix_of_products(products: Tree, size: int) -> Float[Array, "size m"]:
    """The matrix whose rows are the products stacked along the leading axis, in at least single precision."""
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
        dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(products))
    return side_by_side(products, size, dtype)
