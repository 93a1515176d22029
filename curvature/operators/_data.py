"""Operators that are a mean or sum over data: chunked in a compiled loop, sharded over devices, or in host batches."""

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Float

from curvature import _checks
from curvature._errors import caller, calling, describe, of_class
from curvature._sharding import vary_like, zeros
from curvature._trees import Subtree, select
from curvature._types import ChunkSize, Tree
from curvature.operators._base import LinearOperator, Product, scaled
from curvature.operators._interactions import check_reduction
from curvature.operators._pytrees import register_operator, replace, set_fields, static, structure_of
from curvature.transforms._chunks import vmap

Reduction = Literal["mean", "sum"]
"""Whether the loss of a batch is the mean or the sum over its examples, which decides how parts of the data combine."""


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """A re-iterable of batches, compared by identity because it is a static field of an operator."""

    iterable: Iterable[Any]
    progress: bool

    def visit(self) -> Iterable[Any]:
        """Yield the ``args`` of each batch in order, with a progress bar on request."""
        batches = self.iterable
        if self.progress:
            batches = _checks.import_extra("rich.progress", "examples").track(batches, caller(), transient=True)
        for batch in batches:
            args = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
            _checks.check_data(args)
            yield args


@register_operator
class DataOperator(LinearOperator):
    """A symmetric matrix, or a block of it, that is a mean or sum over the examples in ``args``.

    A subclass defines ``_objective`` and ``_linearize_whole``, which takes all of ``args`` at once. This class chunks,
    shards or iterates over the data and combines the products.
    """

    x: Tree
    args: tuple[Any, ...]
    reduction: Reduction = static()
    chunk_size: int | None = static()
    sharding: NamedSharding | None = static()
    batches: Batches | None = static()
    rows: str = static()
    columns: str = static()

    @of_class
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
        """Check the arguments and set the fields above; rows and columns select the whole matrix."""
        x = _checks.check_point("x", x)
        _checks.check_data(args)
        _checks.check_choice("reduction", reduction, Reduction)
        if chunk_size is not None and batches is None:
            _checks.check_count("chunk_size", chunk_size, least=1)
            _checks.check_examples("args", args)
            # Sharded data is chunked on each device; a slice of the global array would gather it on all of them.
            sharding = sharding or _sharding_of_examples(args)
        if sharding is not None:
            _check_sharding(sharding, args, batches)
        if batches is not None:
            _check_batches(batches, args, chunk_size)
            if progress:
                _checks.import_extra("rich.progress", "examples")
        if chunk_size is not None or sharding is not None:
            self._check_reduction(x, args, reduction)
        set_fields(self, x=x, args=args, reduction=reduction, chunk_size=chunk_size, rows="", columns="")
        set_fields(self, sharding=sharding, batches=None if batches is None else Batches(batches, progress))

    @abstractmethod
    def _linearize_whole(self) -> Product:
        """The linearized product that takes all of ``args`` at once."""

    @abstractmethod
    def _objective(self) -> tuple[str, tuple[Any, ...], Callable[..., Any]]:
        """``(name, functions, fun)``: the objective ``fun(x, *args) -> scalar`` and the user's functions in it."""

    @of_class
    def _check_reduction(self, x: Tree, args: tuple[Any, ...], reduction: Reduction) -> None:
        """Refuse an objective whose value for a batch is not the mean or sum that ``reduction`` states."""
        objective, functions, fun = self._objective()
        check_reduction((objective, reduction), functions, fun, x, args)

    def _on_part(self, args: tuple[Any, ...], first: Any) -> "DataOperator":
        """The operator for a part of the data; ``first`` is the index of its first example in all of the data."""
        return replace(self, args=args, chunk_size=None, sharding=None, batches=None)

    @property
    def is_symmetric(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rows == self.columns

    @property
    def T(self) -> LinearOperator:  # noqa: N802 - as of arrays
        return self if self.is_symmetric else replace(self, rows=self.columns, columns=self.rows)

    def block(self, rows: str, columns: str | None = None) -> "DataOperator":
        """The block of two sub-trees of ``x``; only these sub-trees are differentiated.

        Args:
            rows: the path of a leaf or sub-tree of ``x`` as ``jax.tree_util.keystr(path, simple=True, separator="/")``
                spells it, such as ``"layers/0/w"``; the empty path is all of ``x``.
            columns: the path for the columns; None takes the path of the rows, which is a diagonal block.
        """
        op = replace(self, rows=rows, columns=rows if columns is None else columns)
        op._parts()
        return op

    def _parts(self) -> tuple[Subtree, Subtree]:
        """The rows and the columns as sub-trees of ``x``."""
        with calling(f"{type(self).__name__}.block"):
            return select("rows", self.x, self.rows), select("columns", self.x, self.columns)

    def in_structure(self) -> Tree:
        return structure_of(self._parts()[1].take(self.x))

    def out_structure(self) -> Tree:
        return structure_of(self._parts()[0].take(self.x))

    def mv(self, v: Tree) -> Tree:
        v = self._checked(v)
        if self.batches is not None or self.chunk_size is not None:
            return self.linearize()(v)
        return self._apply_whole(v) if self.sharding is None else self._apply_sharded(v)

    def _apply_whole(self, v: Tree) -> Tree:
        """A single product that takes all of ``args`` at once; it does not need a linearization."""
        return self._linearize_whole()(v)

    def linearize(self) -> Product:
        """The map ``v -> A v`` from one evaluation; chunks and batches are evaluated again in every product."""
        if self.batches is not None:
            return lambda v: self._sum_over_batches(DataOperator.mv, operands=(v,))
        if self.chunk_size is not None:
            return self._apply_chunked if self.sharding is None else self._apply_sharded
        if self.sharding is None:
            return self._linearize_whole()
        # The product is linear in v, so its linearization at any tree is the product itself.
        return jax.linearize(self._apply_sharded, self._parts()[1].take(self.x))[1]

    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        """As for every operator; with ``batches``, the mean or sum of the matrices of the batches."""
        if self.batches is None:
            return super().as_matrix(chunk_size)
        return self._sum_over_batches(DataOperator.as_matrix, options=(chunk_size,))

    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """As for every operator; with ``batches``, the mean or sum of the diagonals of the batches."""
        if self.batches is None:
            return super().diagonal(chunk_size)
        return self._sum_over_batches(DataOperator.diagonal, options=(chunk_size,))

    def products(self, vectors: Tree) -> Tree:
        """The products with many vectors, stacked along the leading axis; with ``batches``, in one pass over them."""
        if self.batches is None:
            return vmap(self.linearize(), chunk_size="auto")(vectors)
        return self._sum_over_batches(DataOperator.products, operands=(vectors,))

    @of_class
    def _apply_chunked(self, v: Tree) -> Tree:
        """The mean or sum over chunks of ``chunk_size`` examples, and a smaller last chunk if one remains.

        ``sum_over_chunks`` does not apply: it gives examples weights, which an objective of a whole batch cannot take.
        """
        size = self.chunk_size or 1
        num_examples = _checks.check_examples("args", self.args)
        num_chunks, remainder = divmod(num_examples, size)

        def part(first: Any, length: int) -> Tree:
            args = jax.tree.map(
                lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, length) if jnp.ndim(leaf) else leaf, self.args
            )
            product = self._on_part(args, first)._apply_whole(v)
            return scaled(length / num_examples, product) if self.reduction == "mean" else product

        def add(total: Tree, first: Array) -> tuple[Tree, None]:
            return jax.tree.map(jnp.add, total, part(first, size)), None

        if not num_chunks:
            return part(0, remainder)
        firsts = jnp.arange(num_chunks, dtype=jnp.int32) * size
        nothing = jax.tree.map(lambda like: zeros(like.shape, like), jax.eval_shape(lambda i: part(i, size), firsts[0]))
        total = jax.lax.scan(add, nothing, firsts)[0]
        return jax.tree.map(jnp.add, total, part(num_chunks * size, remainder)) if remainder else total

    @of_class
    def _apply_sharded(self, v: Tree) -> Tree:
        """The mean or sum over devices, each of which has the same number of examples, with one all-reduce."""
        assert self.sharding is not None
        spec, axes = self.sharding.spec, _axes_of_examples(self.sharding)
        combine = jax.lax.pmean if self.reduction == "mean" else jax.lax.psum

        def on_device(shared: tuple[DataOperator, Tree], args: tuple[Any, ...]) -> Tree:
            # JAX would sum a derivative with respect to an unvarying value over the devices at every use of the value.
            op, v = vary_like(shared, args)
            first = jax.lax.axis_index(axes) * _checks.check_examples("args", args)
            part = replace(op._on_part(args, first), chunk_size=self.chunk_size)
            return combine(part.linearize()(v), axes)

        examples = jax.tree.map(lambda leaf: spec if jnp.ndim(leaf) else PartitionSpec(), self.args)
        return jax.shard_map(
            on_device,
            mesh=self.sharding.mesh,
            in_specs=(PartitionSpec(), examples),
            out_specs=PartitionSpec(),
            axis_names=set(axes),
        )((replace(self, args=()), v), self.args)

    @of_class
    def _sum_over_batches(self, method: Callable[..., Tree], operands: Any = (), options: Any = ()) -> Tree:
        """The mean or sum over batches of ``method(op, *operands, *options)``, one compiled call for each batch."""
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((self.x, operands))):
            raise TypeError(
                f"{caller()}: x or v is traced, but batches= are summed on the host, outside jit, vmap and grad; give "
                "the data as arrays with chunk_size=, pass op itself to a solver such as curvature.cg, or solve with "
                "SciPy on as_scipy(op)."
            )
        assert self.batches is not None
        total, num_examples = None, 0
        for args in self.batches.visit():
            batch_size = _checks.check_examples("batch", args)
            self._check_reduction(self.x, args, self.reduction)
            weight = jnp.asarray(batch_size if self.reduction == "mean" else 1, jnp.int32)
            op = self._on_part(args, jnp.asarray(num_examples, jnp.int32))
            term = _evaluate_weighted(op, weight, operands, method, options)
            total = term if total is None else jax.tree.map(jnp.add, total, term)
            num_examples += batch_size
        if not num_examples:
            raise ValueError(f"{caller()}: batches is empty, expected at least one batch.")
        return jax.tree.map(lambda leaf: leaf / num_examples, total) if self.reduction == "mean" else total


def is_streamed(node: Any) -> bool:
    """Whether an operator sums over batches on the host."""
    return isinstance(node, DataOperator) and node.batches is not None


@partial(jax.jit, static_argnames=("method", "options"))
def _evaluate_weighted(
    op: DataOperator, weight: Array, operands: tuple[Any, ...], method: Callable[..., Tree], options: tuple[Any, ...]
) -> Tree:
    """One part of ``_sum_over_batches``, compiled once for all batches of the same shapes."""
    return scaled(weight, method(op, *operands, *options))


def _check_batches(batches: Any, args: tuple[Any, ...], chunk_size: Any) -> None:
    """Refuse batches that cannot be iterated over, or only once, and other data together with batches."""
    if args or chunk_size is not None:
        what = "chunk_size" if chunk_size is not None else f"{len(args)} args"
        raise ValueError(f"{caller()}: batches= and {what} were given; each batch holds all args of the function.")
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{caller()}: batches is {describe(batches)}, which can be iterated over only once, but every "
            "product goes over all batches; give a list or an object whose __iter__ returns a new iterator."
        )
    if not hasattr(batches, "__iter__"):
        came = describe(batches)
        raise TypeError(f"{caller()}: batches is {came}, expected an iterable of batches, such as a list.")


# ---- sharded examples ------------------------------------------------------------------------------------------------


def _sharding_of_examples(args: Any) -> NamedSharding | None:
    """The sharding of the leading axis of ``args``, or None; a tracer has one only on a mesh with explicit axes."""
    for leaf in jax.tree.leaves(args):
        sharding = getattr(leaf, "sharding", None) or jax.typeof(leaf).sharding
        if isinstance(sharding, NamedSharding) and sharding.spec and isinstance(sharding.spec[0], str | tuple):
            return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0]))
    return None


def _axes_of_examples(sharding: NamedSharding) -> tuple[str, ...]:
    """The axes of the mesh that shard the examples."""
    axes = sharding.spec[0]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _check_sharding(sharding: Any, args: Any, batches: Any) -> None:
    """Refuse a sharding along other axes than that of examples, or with unequal numbers of examples per device."""
    if not isinstance(sharding, NamedSharding):
        raise TypeError(
            f"{caller()}: sharding is {describe(sharding)}, expected None or a jax.sharding.NamedSharding, "
            'such as NamedSharding(mesh, PartitionSpec("data")).'
        )
    if batches is not None:
        raise ValueError(
            f"{caller()}: batches= and sharding= were given; place each batch with jax.device_put instead, "
            "and the compiler shares its product out."
        )
    spec = sharding.spec
    if not spec or not isinstance(spec[0], str | tuple) or any(axis is not None for axis in spec[1:]):
        raise ValueError(
            f"{caller()}: sharding has spec {spec}, expected the axes of the mesh along examples alone, such as "
            'PartitionSpec("data").'
        )
    parts = math.prod(sharding.mesh.shape[axis] for axis in _axes_of_examples(sharding))
    for path, leaf in tree_flatten_with_path(args)[0]:
        if jnp.ndim(leaf) and jnp.shape(leaf)[0] % parts:
            raise ValueError(
                f"{caller()}: args{keystr(path)} has {jnp.shape(leaf)[0]} examples, expected a multiple of {parts} to "
                f"share them out evenly over the devices of {spec}; leave some out or add examples of weight zero."
            )
