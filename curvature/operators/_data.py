"""Operators that are sums over data: given whole, cut into slices in one compiled loop, or as batches on the host."""

import dataclasses
from abc import abstractmethod
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float

from curvature import _checks
from curvature._sharding import zeros
from curvature._trees import Subtree, select
from curvature._types import ChunkSize, Tree
from curvature.operators._base import (
    LinearOperator,
    Product,
    register_operator,
    replace,
    scaled,
    set_fields,
    static,
    structure_of,
)
from curvature.operators._devices import combine_over_devices, sharding_of_examples
from curvature.operators._interactions import check_reduction
from curvature.transforms._chunks import vmap

_rich_error: ImportError | None = None
try:
    import rich.progress
except ImportError as error:
    rich: Any = None
    _rich_error = error

Reduction = Literal["mean", "sum"]
"""Whether a loss of a batch is the mean over its examples or their sum; decides how parts of the data add up."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """A re-iterable of batches as part of the type of an operator, compared by identity."""

    iterable: Iterable[Any]
    progress: bool

    def visit(self, function: str) -> Iterable[Any]:
        """The batches in order, each as the args of the function, with a bar on request."""
        batches = rich.progress.track(self.iterable, function, transient=True) if self.progress else self.iterable
        for batch in batches:
            args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            _checks.check_data(function, args)
            yield args


@register_operator
class DataOperator(LinearOperator):
    """A symmetric matrix, or a block of it, that is a mean or a sum over the examples of ``args``.

    A subclass defines ``_whole``, the linearized product of all of ``args`` at once.
    """

    x: Tree
    args: tuple[Any, ...]
    reduction: Reduction = static()
    chunk_size: int | None = static()
    sharding: NamedSharding | None = static()
    batches: Batches | None = static()
    rows: str = static()
    columns: str = static()

    def _set_data(
        self,
        x: Tree,
        args: tuple[Any, ...],
        reduction: Reduction,
        chunk_size: int | None,
        sharding: NamedSharding | None,
        batches: Iterable[Any] | None,
        progress: bool,
    ) -> None:
        """Set the fields above once they are known to be right; the block is all of the matrix."""
        name = type(self).__name__
        x = _checks.check_point(name, "x", x)
        _checks.check_data(name, args)
        _checks.check_choice(name, "reduction", reduction, Reduction)
        if chunk_size is not None and batches is None:
            _checks.check_count(name, "chunk_size", chunk_size, least=1)
            _checks.check_examples(name, "args", args)
            sharding = sharding or sharding_of_examples(args)  # the slices of what lies on several devices
        if sharding is not None:
            _checks.check_sharding(name, sharding, args, batches)
        source = None
        if batches is not None:
            _checks.check_one_source(name, len(args), chunk_size)
            _checks.check_reiterable(name, batches)
            if progress:
                _checks.check_extra(name, "rich", "examples", _rich_error)
            source = Batches(batches, progress)
        if chunk_size is not None or sharding is not None:
            self._check_reduction(x, args, reduction)
        set_fields(self, x=x, args=args, reduction=reduction, chunk_size=chunk_size, batches=source)
        set_fields(self, sharding=sharding, rows="", columns="")

    @abstractmethod
    def _whole(self) -> Product:
        """The linearized product of all of ``args`` at once."""

    @abstractmethod
    def _objective(self) -> tuple[str, tuple[Any, ...], Callable[..., Any]]:
        """The function ``(x, *args) -> scalar`` that the matrix is of: its name, what it is made of, and itself."""

    def _check_reduction(self, x: Tree, args: tuple[Any, ...], reduction: Reduction) -> None:
        """Refuse data in parts whose values do not add up as the reduction says."""
        objective, functions, fun = self._objective()
        check_reduction(type(self).__name__, (objective, reduction), functions, fun, x, args)

    def _of(self, args: tuple[Any, ...], first: Any) -> "DataOperator":
        """The operator of a part of the data, whose first example is number ``first`` of all."""
        return replace(self, args=args, chunk_size=None, sharding=None, batches=None)

    @property
    def is_symmetric(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rows == self.columns

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as of arrays
        return self if self.is_symmetric else replace(self, rows=self.columns, columns=self.rows)

    def block(self, rows: str, columns: str | None = None) -> "DataOperator":
        """The block of two sub-trees of ``x``, of which only these are differentiated.

        Args:
            rows: the path of a leaf or sub-tree of ``x`` as ``jax.tree_util.keystr(path, simple=True, separator="/")``
                spells it, such as ``"layers/0/w"``; the empty path is all of ``x``.
            columns: that of the columns; None is that of the rows, a diagonal block.
        """
        op = replace(self, rows=rows, columns=rows if columns is None else columns)
        op._parts()
        return op

    def _parts(self) -> tuple[Subtree, Subtree]:
        """The rows and the columns as sub-trees of ``x``."""
        name = f"{type(self).__name__}.block"
        return select(name, "rows", self.x, self.rows), select(name, "columns", self.x, self.columns)

    def in_structure(self) -> Tree:
        return structure_of(self._parts()[1].take(self.x))

    def out_structure(self) -> Tree:
        return structure_of(self._parts()[0].take(self.x))

    def mv(self, v: Tree) -> Tree:
        v = self._checked(v)
        if self.batches is not None or self.chunk_size is not None:
            return self.linearize()(v)
        return self._once(v) if self.sharding is None else self._over_devices(v)

    def _once(self, v: Tree) -> Tree:
        """One product of all of ``args`` at once, for which nothing has to be kept."""
        return self._whole()(v)

    def linearize(self) -> Product:
        """The map ``v -> A v`` from one evaluation; data in parts is evaluated afresh by every product instead."""
        if self.batches is not None:
            return lambda v: self._over_batches(_product, v)
        if self.chunk_size is not None:
            return self._over_slices if self.sharding is None else self._over_devices
        if self.sharding is None:
            return self._whole()
        return jax.linearize(self._over_devices, self._parts()[1].take(self.x))[1]  # a linear map is so anywhere

    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        """As for every operator; that of batches is the sum of theirs."""
        whole = super().as_matrix
        return whole(chunk_size) if self.batches is None else self._over_batches(_matrix, None, chunk_size)

    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """As for every operator; that of batches is the sum of theirs."""
        whole = super().diagonal
        return whole(chunk_size) if self.batches is None else self._over_batches(_diagonal, None, chunk_size)

    def products(self, vectors: Tree) -> Tree:
        """The products with many vectors, along a leading axis, in one pass over the batches."""
        return self._over_batches(_products, vectors, "auto")

    def _over_slices(self, v: Tree) -> Tree:
        """The sum over slices of the data of one size, and a last one of what is left."""
        name, size = type(self).__name__, self.chunk_size or 1
        examples = _checks.check_examples(name, "args", self.args)
        slices, rest = divmod(examples, size)

        def part(first: Any, length: int) -> Tree:
            args = jax.tree.map(
                lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, length) if jnp.ndim(leaf) else leaf, self.args
            )
            product = self._of(args, first)._once(v)
            return scaled(length / examples, product) if self.reduction == "mean" else product

        def add(total: Tree, first: Array) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, total, part(first, size)), None

        if not slices:
            return part(0, rest)
        firsts = jnp.arange(slices, dtype=jnp.int32) * size
        nothing = jax.tree.map(lambda like: zeros(like.shape, like), jax.eval_shape(lambda i: part(i, size), firsts[0]))
        total = jax.lax.scan(add, nothing, firsts)[0]
        return jax.tree.map(jnp.add, total, part(slices * size, rest)) if rest else total

    def _over_devices(self, v: Tree) -> Tree:
        """The mean or sum over devices of the products of their own examples, which are equally many."""
        assert self.sharding is not None

        def of_device(shared: tuple[DataOperator, Tree], args: tuple[Any, ...], device: Array) -> Tree:
            (op, v), examples = shared, _checks.check_examples(type(self).__name__, "args", args)
            part = replace(op._of(args, device * examples), chunk_size=self.chunk_size)
            return part.linearize()(v)

        combine = jax.lax.pmean if self.reduction == "mean" else jax.lax.psum
        return combine_over_devices(of_device, combine, self.sharding, (replace(self, args=()), v), self.args)

    def _over_batches(self, what: Callable[..., Tree], v: Tree, chunk_size: ChunkSize = None) -> Tree:
        """The sum over batches of ``what(op of a batch, v, chunk_size)``, in order; each is one compiled call."""
        name = type(self).__name__
        _checks.check_untraced(name, (self.x, v))
        assert self.batches is not None
        total, examples, batches = None, 0, 0
        for args in self.batches.visit(name):
            size = _checks.check_examples(name, "batch", args)
            self._check_reduction(self.x, args, self.reduction)
            weight = jnp.asarray(size if self.reduction == "mean" else 1, jnp.int32)
            op = self._of(args, jnp.asarray(examples, jnp.int32))
            term = _weighted(op, weight, v, what, chunk_size)
            total = term if total is None else jax.tree.map(jnp.add, total, term)
            examples, batches = examples + size, batches + 1
        _checks.check_some_batch(name, batches)
        return jax.tree.map(lambda leaf: leaf / examples, total) if self.reduction == "mean" else total


@partial(jax.jit, static_argnames=("what", "chunk_size"))
def _weighted(op: DataOperator, weight: Array, v: Tree, what: Callable[..., Tree], chunk_size: ChunkSize) -> Tree:
    return scaled(weight, what(op, v, chunk_size))


def _product(op: LinearOperator, v: Tree, chunk_size: ChunkSize) -> Tree:
    return op.mv(v)


def _products(op: LinearOperator, vectors: Tree, chunk_size: ChunkSize) -> Tree:
    return vmap(op.linearize(), chunk_size=chunk_size)(vectors)


def _matrix(op: LinearOperator, v: None, chunk_size: ChunkSize) -> Array:
    return op.as_matrix(chunk_size)


def _diagonal(op: LinearOperator, v: None, chunk_size: ChunkSize) -> Tree:
    return op.diagonal(chunk_size)
