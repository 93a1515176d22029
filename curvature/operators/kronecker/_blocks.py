"""The diagonal blocks of a ``KroneckerOperator``, one per leaf: Kronecker factors, their eigenpairs, dense, diagonal.

In the canonical form of ``programs/_affine.py`` a leaf is an array ``V[g, i, o]`` with g: group, i: row (input),
o: column (output). A block of Kronecker factors maps ``V`` to ``sum_jp A[g, i, j] G[g, o, p] V[g, j, p]``.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from curvature._numerics import matmul
from curvature._types import Scalar
from curvature.operators._pytrees import register_operator, replace, static
from curvature.programs._affine import Axes
from curvature.programs._views import View

Canonical = Float[Array, "groups rows columns"]
Factor = Float[Array, "groups rows rows"] | Float[Array, "groups rows"]
"""A symmetric matrix for each group, or its diagonal if the matrix is diagonal."""


class Layout(NamedTuple):
    """The map between a leaf and its canonical form.

    Attributes:
        view: the linear map from the leaf to the array that is combined with the data.
        root: the shape of that array.
        order: the axes of that array in the order g, i, o.
        sizes: the sizes of g, i and o.
    """

    view: View
    root: tuple[int, ...]
    order: Axes
    sizes: tuple[int, int, int]

    def canonical(self, leaf: Array) -> Canonical:
        """The canonical form of a leaf."""
        return jnp.transpose(self.view.apply(leaf), self.order).reshape(self.sizes)

    def restored(self, array: Canonical) -> Array:
        """The leaf with this canonical form."""
        in_order = array.reshape([self.root[axis] for axis in self.order])
        return self.view.transpose(jnp.transpose(in_order, np.argsort(self.order).tolist()))


@register_operator
class KroneckerBlock:
    """The Kronecker product ``A x G`` for each group."""

    a: Factor
    g: Float[Array, "groups columns columns"]
    layout: Layout = static()

    def mv(self, v: Array) -> Array:
        """The product with a leaf."""
        return self.layout.restored(matmul(_apply_left(self.a, self.layout.canonical(v)), self.g))

    def trace(self) -> Scalar:
        """The sum of the diagonal."""
        return jnp.sum(jnp.sum(diagonal_of(self.a), 1) * jnp.sum(diagonal_of(self.g), 1))

    def diagonal(self) -> Array:
        """The diagonal, shaped like the leaf."""
        return self.layout.restored(diagonal_of(self.a)[:, :, None] * diagonal_of(self.g)[:, None, :])

    def eigen(self) -> "EigenBlock":
        """The same block by eigenpairs."""
        la, ua = (self.a, None) if self.a.ndim == 2 else eigenpairs(self.a)
        lg, ug = eigenpairs(self.g)
        return EigenBlock(la[:, :, None] * lg[:, None, :], ua, ug, self.layout)

    def logdet(self, damping: Scalar) -> Scalar:
        """``log det(A x G + damping I)``."""
        return self.eigen().logdet(damping)

    def inverse(self, damping: Scalar, exact: bool) -> "KroneckerBlock | DiagonalBlock":
        """``(A x G + damping I)^-1``, or the product of the inverses of damped factors if not ``exact``."""
        if exact:
            return self.eigen().inverse(damping, exact)
        mean_a, mean_g = jnp.mean(diagonal_of(self.a), 1), jnp.mean(diagonal_of(self.g), 1)
        nonzero = (mean_a > 0) & (mean_g > 0)  # a zero block has no pi; 1 serves
        pi = jnp.sqrt(jnp.where(nonzero, mean_a, 1)) / jnp.sqrt(jnp.where(nonzero, mean_g, 1))
        a = jnp.where(jnp.expand_dims(nonzero, range(1, self.a.ndim)), self.a, 0)
        g = jnp.where(nonzero[:, None, None], self.g, 0)
        root = jnp.sqrt(damping)  # Martens & Grosse (2015), section 6.3
        return KroneckerBlock(_inverse(a, root * pi), _inverse(g, root / pi), self.layout)


@register_operator
class DiagonalBlock:
    """A diagonal block, by its eigenvalues, shaped like the leaf."""

    eigenvalues: Array

    def mv(self, v: Array) -> Array:
        """The product with a leaf."""
        return self.eigenvalues * v

    def trace(self) -> Scalar:
        """The sum of the diagonal."""
        return jnp.sum(self.eigenvalues)

    def diagonal(self) -> Array:
        """The diagonal, shaped like the leaf."""
        return self.eigenvalues

    def logdet(self, damping: Scalar) -> Scalar:
        """``log det(block + damping I)``."""
        return jnp.sum(jnp.log(self.eigenvalues + damping))

    def inverse(self, damping: Scalar, exact: bool) -> "DiagonalBlock":
        """``(block + damping I)^-1``, exact for both values of ``exact``."""
        return replace(self, eigenvalues=1 / (self.eigenvalues + damping))


@register_operator
class EigenBlock(DiagonalBlock):
    """``(U_A x U_G) diag(eigenvalues) (U_A x U_G)'`` for each group; ``basis_a=None`` means ``U_A = I``.

    The eigenvalues are in canonical form.
    """

    basis_a: Float[Array, "groups rows rows"] | None
    basis_g: Float[Array, "groups columns columns"]
    layout: Layout = static()

    def mv(self, v: Array) -> Array:
        """The product with a leaf."""
        transposed = None if self.basis_a is None else self.basis_a.mT
        coordinates = matmul(_apply_left(transposed, self.layout.canonical(v)), self.basis_g)  # U_A' V U_G
        scaled = _apply_left(self.basis_a, self.eigenvalues * coordinates)
        return self.layout.restored(matmul(scaled, self.basis_g.mT))

    def diagonal(self) -> Array:
        """The diagonal, shaped like the leaf."""
        squares = None if self.basis_a is None else self.basis_a**2
        return self.layout.restored(matmul(_apply_left(squares, self.eigenvalues), (self.basis_g**2).mT))


@register_operator
class DenseBlock:
    """A dense block: the matrix over all entries of the leaf."""

    matrix: Float[Array, "n n"]
    shape: tuple[int, ...] = static()

    def mv(self, v: Array) -> Array:
        """The product with a leaf."""
        return matmul(self.matrix, v.reshape(-1)).reshape(self.shape)

    def trace(self) -> Scalar:
        """The sum of the diagonal."""
        return jnp.trace(self.matrix)

    def diagonal(self) -> Array:
        """The diagonal, shaped like the leaf."""
        return jnp.diagonal(self.matrix).reshape(self.shape)

    def logdet(self, damping: Scalar) -> Scalar:
        """``log det(block + damping I)``."""
        return jnp.sum(jnp.log(eigenpairs(self.matrix[None])[0] + damping))

    def inverse(self, damping: Scalar, exact: bool) -> "DenseBlock":
        """``(block + damping I)^-1``, exact for both values of ``exact``."""
        return DenseBlock(_inverse(self.matrix[None], damping[None])[0], self.shape)


Block = KroneckerBlock | DiagonalBlock | DenseBlock


def diagonal_of(factor: Factor) -> Float[Array, "groups rows"]:
    """The diagonal of a factor."""
    return factor if factor.ndim == 2 else jnp.diagonal(factor, axis1=1, axis2=2)


def eigenpairs(
    matrices: Float[Array, "groups n n"],
) -> tuple[Float[Array, "groups n"], Float[Array, "groups n n"]]:
    """The eigenvalues of positive semidefinite matrices, and their eigenvectors as columns."""
    eigenvalues, vectors = jnp.linalg.eigh(matrices)
    return jnp.maximum(eigenvalues, 0), vectors  # rounding can make zero eigenvalues slightly negative


def _inverse(factor: Factor, damping: Float[Array, "groups"]) -> Factor:
    """``(factor + damping I)^-1``."""
    if factor.ndim == 2:
        return 1 / (factor + damping[:, None])
    eigenvalues, vectors = eigenpairs(factor)
    return matmul(vectors / (eigenvalues + damping[:, None])[:, None, :], vectors.mT)


def _apply_left(factor: Factor | None, v: Canonical) -> Canonical:
    """``factor V``; None is the identity, and a factor of rank 2 holds diagonals."""
    if factor is None:
        return v
    return factor[:, :, None] * v if factor.ndim == 2 else matmul(factor, v)
