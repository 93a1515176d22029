"""Sparse Hessians and Jacobians by coloring; asdex finds and colors the pattern (extra ``sparse``)."""

from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.sparse import BCOO
from jaxtyping import Array

from curvature import _checks, _trees
from curvature._errors import caller, describe, later, public
from curvature._trees import ravel
from curvature._types import JacobianMode, Objective, SparseHessianMode, Tree
from curvature.programs import _traced
from curvature.programs._legality import first_legal
from curvature.transforms._compositions import is_symmetric, linearize_program, trace_objective
from curvature.transforms._jacobian import with_aux

_asdex_error: ImportError | None = None
try:
    import asdex
except ImportError as error:  # not installed, or built for another version of JAX
    asdex: Any = None
    _asdex_error = error


@public
def sparse_hessian(
    f: Objective, x: Tree, *args: Any, pattern: Any = None, mode: SparseHessianMode = "auto"
) -> Callable[..., BCOO]:
    """Prepare the sparse Hessian ``H[i, j] = d^2 f / dx_i dx_j`` of a function whose pattern of zeros is fixed.

    The pattern is found and colored once, here. At every evaluation, columns of one color share one Hessian product.

    Args:
        f: the objective, ``f(x, *args) -> scalar``. Arrays that decide which entries of ``x`` meet, such as the edges
            of a mesh, should be closed over: the pattern must hold for all values of ``args``, so that an index in
            ``args`` makes it dense.
        x: a point, any tree of floating arrays; only its structure, shapes and dtypes matter.
        *args: data for ``f``, not differentiated; only shapes and dtypes matter.
        pattern: the entries that may differ from zero at any point, for all n = ``ravel_pytree(x)[0].size`` rows and
            columns: a BCOO or SciPy sparse matrix (a stored zero counts), an ``asdex.SparsityPattern``, or a dense
            array, whose nonzeros count. One triangle suffices. None finds the pattern from the jaxpr of ``f``, without
            derivatives; it may then have more entries than needed, never fewer.
        mode: the composition of modes; ``"auto"`` takes the first legal of forward over reverse, reverse over reverse,
            reverse over forward.

    Returns:
        A function ``(x, *args) -> BCOO`` of shape (n, n), in the order of ``ravel_pytree(x)``, with both triangles. It
        is compiled at its first call, and takes new values of ``x`` and ``args``, also under ``jit``. A pattern that
        misses an entry gives wrong numbers without an error: to check a pattern that you pass, compare ``H @ v`` with
        ``hvp(f, x, v)`` for a random ``v``.

    Raises:
        ImportError: if asdex is not installed, or does not support the installed JAX.
        NotImplementedError: if asdex cannot find the pattern, as for an operation that it has no rule for.
        TypeError, ValueError: as ``hvp``; for a pattern of another shape or kind; and, when the function is called, for
            a point that does not match ``x``.

    Cost: to prepare, one trace of the gradient, and time and memory in proportion to the entries of the pattern; for
        each evaluation one linearization of the gradient and one product of about 1.5 gradients for each color. asdex
        warns when there are as many colors as columns.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> chain = curvature.sparse_hessian(lambda x: jnp.sum((x[1:] - x[:-1]) ** 4), jnp.zeros(4))
        >>> chain(jnp.array([0.0, 1.0, 1.0, 2.0])).todense()
        Array([[ 12., -12.,   0.,   0.],
               [-12.,  12.,   0.,   0.],
               [  0.,   0.,  12., -12.],
               [  0.,   0., -12.,  12.]], dtype=float32)

    References: Coleman and More, Estimation of sparse Hessian matrices and graph coloring problems (1984),
        doi:10.1007/BF02612334; Gebremedhin, Manne and Pothen (2005), section 4, doi:10.1137/S0036144504444711.
    """
    _checks.check_extra("asdex", "sparse", _asdex_error)
    _checks.check_callable("f", f)
    _checks.check_choice("mode", mode, SparseHessianMode)
    x = _checks.check_point("x", x)
    program = trace_objective("f", f, x, args)
    chosen = first_legal(program.composition_blocker, get_args(SparseHessianMode)[1:], mode)
    vector, unravel = ravel(x)
    shape = (vector.size, vector.size)

    def fun(vector: Array, *args: Any) -> Array:
        return f(unravel(vector), *args)

    if pattern is None:
        pattern = _find_pattern(asdex.hessian_sparsity, fun, vector, args)
    rows, columns = _check_pattern(pattern, shape)
    sparsity = _make_sparsity(np.concatenate([rows, columns]), np.concatenate([columns, rows]), shape, vector)
    if is_symmetric(program):
        coloring = asdex.hessian_coloring_from_sparsity(sparsity, mode=chosen)
    else:  # one triangle does not determine the other
        coloring = asdex.jacobian_coloring_from_sparsity(sparsity, mode="fwd")
    colors = np.arange(max(coloring.num_colors, 1))  # without colors, one color that no column has
    seeds = jnp.asarray(np.asarray(coloring.colors)[:, None] == colors, vector.dtype)

    def products(seeds: Array, vector: Array, *args: Any) -> Array:
        hvp_fn = linearize_program(trace_objective("f", fun, vector, args), chosen)[2]
        return jax.vmap(hvp_fn, in_axes=1, out_axes=1)(seeds)  # colors innermost: XLA shares the rows among its threads

    return _compile_parts(products, seeds, _positions_of_entries(coloring, columns=True), coloring, x)


@public
def sparse_jacobian(
    f: Callable[..., Any], x: Tree, *args: Any, pattern: Any = None, mode: JacobianMode = "auto"
) -> Callable[..., BCOO]:
    """Prepare the sparse Jacobian ``J[o, i] = d f_o / d x_i`` of a function whose pattern of zeros is fixed.

    The pattern is found and colored once, here. At every evaluation, columns (or rows) of one color share one JVP (or
    VJP).

    Args:
        f: a function ``f(x, *args)`` whose outputs are floating arrays. Arrays that decide which entries of ``x`` an
            output depends on should be closed over; see ``sparse_hessian``.
        x: a point, any tree of floating arrays; only its structure, shapes and dtypes matter.
        *args: data for ``f``, not differentiated; only shapes and dtypes matter.
        pattern: the entries that may differ from zero at any point, as for ``sparse_hessian``: a row for each of the m
            entries of the output, a column for each of the n entries of ``x``. None finds it from the jaxpr of ``f``.
        mode: ``"fwd"`` colors columns, ``"rev"`` rows; ``"auto"`` takes the legal mode that needs fewer colors.

    Returns:
        A function ``(x, *args) -> BCOO`` of shape (m, n), rows and columns in the order of ``ravel_pytree``. It is
        compiled at its first call, and takes new values of ``x`` and ``args``, also under ``jit``. A pattern that
        misses an entry gives wrong numbers without an error: to check a pattern that you pass, compare ``J @ v`` with
        ``jax.jvp`` for a random ``v``.

    Raises:
        ImportError: if asdex is not installed, or does not support the installed JAX.
        NotImplementedError: as ``sparse_hessian``.
        TypeError, ValueError: as ``jacobian``; for a pattern of another shape or kind; and, when the function is
            called, for a point that does not match ``x``.

    Cost: to prepare, one trace of ``f``, and time and memory in proportion to the entries of the pattern; for each
        evaluation one linearization of ``f`` and one JVP or VJP for each color. asdex warns when there are as many
        colors as columns (or rows).

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> slopes = curvature.sparse_jacobian(lambda x: x[1:] ** 2 - x[:-1], jnp.zeros(3))
        >>> slopes(jnp.array([1.0, 2.0, 3.0])).todense()
        Array([[-1.,  4.,  0.],
               [ 0., -1.,  6.]], dtype=float32)

    References: Curtis, Powell and Reid, On the estimation of sparse Jacobian matrices (1974),
        doi:10.1093/imamat/13.1.117; Gebremedhin, Manne and Pothen (2005), section 3, doi:10.1137/S0036144504444711.
    """
    _checks.check_extra("asdex", "sparse", _asdex_error)
    _checks.check_callable("f", f)
    _checks.check_choice("mode", mode, JacobianMode)
    x = _checks.check_point("x", x)
    program = _traced.trace(lambda x: with_aux(f(x, *args), False), x)
    _checks.check_floating_output("f", program.out)
    chosen = first_legal(program.blocker, mode=mode)
    any_mode = mode == "auto" and program.blocker("fwd") is None and program.blocker("rev") is None
    vector, unravel = ravel(x)

    def fun(vector: Array, *args: Any) -> Array:
        return ravel(f(unravel(vector), *args))[0]

    if pattern is None:
        pattern = _find_pattern(asdex.jacobian_sparsity, fun, vector, args)
    shape = (_trees.num_entries(program.out), vector.size)
    sparsity = _make_sparsity(*_check_pattern(pattern, shape), shape, vector)
    coloring = asdex.jacobian_coloring_from_sparsity(sparsity, mode=None if any_mode else chosen)

    def products(_: None, vector: Array, *args: Any) -> Array:
        return asdex.compressed_jacobian_from_coloring(lambda vector: fun(vector, *args), coloring)(vector)

    return _compile_parts(products, None, _positions_of_entries(coloring, columns=False), coloring, x)


def _find_pattern(find: Callable[..., Any], fun: Callable[..., Array], vector: Array, args: tuple[Any, ...]) -> Any:
    """The pattern that asdex finds for all values of the data.

    asdex evaluates what depends on plain numbers and NumPy arrays alone: all data is passed as JAX arrays.
    """
    data = jax.tree.map(jnp.asarray, args)
    try:
        return find(fun, vector, *data)
    except Exception as error:  # of any type, for a primitive or an operand that asdex does not know
        raise NotImplementedError(
            f"{caller()}: asdex cannot find the pattern of f ({error}); pass pattern=, a dense array of ones if "
            "nothing is known of it."
        ) from error


def _make_sparsity(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int], vector: Array) -> Any:
    """The pattern as asdex takes it: each entry once, row after row, for a function of one vector."""
    entries = np.unique(rows.astype(np.int64) * shape[1] + columns)
    avals = (jax.ShapeDtypeStruct(vector.shape, vector.dtype),)
    return asdex.SparsityPattern.from_coo(entries // shape[1], entries % shape[1], shape, input_avals=avals)


def _compile_parts(
    products: Callable[..., Array], seeds: Array | None, where: Array, coloring: Any, like: Tree
) -> Callable[..., BCOO]:
    """The function of the point and the data, from the products of all colors and the positions of the entries.

    It is compiled in two parts, products and gather. In one program XLA would recompute each product for each entry,
    which on a CPU takes longer than writing and reading the products. The seeds are an operand: of a constant, XLA
    would store every multiple and slice that the products take of it.
    """
    like = jax.tree.map(jax.typeof, like)
    pattern = coloring.sparsity.to_bcoo()
    form = jax.tree.structure(
        BCOO((pattern.data, pattern.indices), shape=pattern.shape, indices_sorted=True, unique_indices=True)
    )
    indices = pattern.indices  # passed to the result without a copy or a check

    @jax.jit
    def compressed(seeds: Array | None, x: Tree, *args: Any) -> Array:
        return products(seeds, ravel(x)[0], *args)

    @jax.jit
    def entries(products: Array, where: Array) -> Array:
        return products.reshape(-1).at[where].get(mode="promise_in_bounds", wrap_negative_indices=False)

    @later
    def evaluate(x: Tree, *args: Any) -> BCOO:
        x = _checks.check_direction("x", x, "the prepared x", like)
        _checks.check_data(args)
        return form.unflatten([entries(compressed(seeds, x, *args), where), indices])

    return evaluate


def _positions_of_entries(coloring: Any, columns: bool) -> Array:
    """The position of each entry of the pattern in the flat products, which have a row, or a column, for each color."""
    if coloring.sparsity.nnz == 0:
        return jnp.zeros(0, np.int32)
    shape = coloring.num_colors, coloring.sparsity.shape[coloring.mode == "rev"]
    _check_index_range(shape)
    numbers = np.arange(shape[0] * shape[1], dtype=np.int32)
    numbers = numbers.reshape(shape[::-1]).T if columns else numbers.reshape(shape)
    return asdex.decompress_data(jnp.asarray(numbers), coloring)


def _check_pattern(pattern: Any, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The row and column indices of a sparsity pattern from JAX, SciPy or asdex, or of a dense array."""
    if isinstance(pattern, Tracer) or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(pattern)):
        raise TypeError(f"{caller()}: pattern is traced, expected a known pattern; prepare outside jit.")
    if not hasattr(pattern, "shape"):
        raise TypeError(f"{caller()}: pattern is {describe(pattern)}, expected a sparse matrix or a boolean array.")
    if tuple(pattern.shape) != shape:
        raise ValueError(
            f"{caller()}: pattern has shape {tuple(pattern.shape)}, expected {shape}: a row for each entry of the "
            "output (of x for a Hessian), a column for each entry of x."
        )
    if isinstance(pattern, BCOO):
        indices = np.asarray(pattern.indices)
        rows, columns = indices[(indices < np.asarray(shape)).all(axis=1)].T  # padding lies outside
        return rows, columns
    if hasattr(pattern, "tocoo"):
        pattern = pattern.tocoo()
        return pattern.row, pattern.col
    if hasattr(pattern, "rows") and hasattr(pattern, "cols"):
        return np.asarray(pattern.rows), np.asarray(pattern.cols)
    rows, columns = np.nonzero(np.asarray(pattern))
    return rows, columns


def _check_index_range(shape: tuple[int, int]) -> None:
    """Refuse compressed products with more entries than a 32-bit index can count."""
    if shape[0] * shape[1] > np.iinfo(np.int32).max:
        raise ValueError(
            f"{caller()}: {shape[0]:,} products of {shape[1]:,} entries are more than 2^31 - 1 together; "
            "split x and prepare each part."
        )
