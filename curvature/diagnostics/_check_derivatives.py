"""``check_derivatives``: finite differences, agreement of modes, symmetry, linearity, NaN."""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray

from curvature import _checks, _trees
from curvature._errors import caller, public
from curvature._types import HessianMode, Objective, Tree
from curvature.diagnostics import _verdicts
from curvature.diagnostics._differences import Samples
from curvature.diagnostics._reports import DerivativeCheck, DerivativeReport
from curvature.diagnostics._restriction import Direction, Line, scales_of
from curvature.programs import _traced
from curvature.transforms._blocks import matrix_view
from curvature.transforms._hessian import hessian, hvp
from curvature.transforms._jacobian import gradient_of, with_aux
from curvature.transforms._mean_hessian import find_structure

_COMPOSITIONS = get_args(HessianMode)[1:]
_MOST_COORDINATES = 32  # up to this number of entries, each coordinate is a direction
_MOST_LEAVES = 16  # up to this number of leaves, each leaf has a random direction
_MOST_ASSEMBLED = 4096  # up to this number of rows, 128 MiB, the assembled Hessian is checked
_MOST_FORWARD = 256  # up to this number of entries, modes that take a pass for each entry are checked


@public
def check_derivatives(
    f: Objective,
    x: Tree,
    *args: Any,
    order: Literal[1, 2] = 2,
    num_directions: int = 4,
    key: PRNGKeyArray | None = None,
) -> DerivativeReport:
    """Compare the derivatives of ``f`` at ``x`` with finite differences and with each other.

    - First derivatives with central differences of ``f``, ``(f(x + h v) - f(x - h v)) / 2h``.
    - Second derivatives with differences of the gradient, and with second differences of ``f``, ``(f(x + h v) - 2 f(x)
      + f(x - h v)) / h^2``, which do not depend on the gradient.
    - All legal modes with each other; ``u'Hv = v'Hu``; ``H(2u - 3v) = 2Hu - 3Hv``; NaN and infinities by leaf.
    - If ``hessian`` finds that ``f`` is a mean over examples, the matrix that it assembles (``"taps"``) with ``H v``
      and with differences of the gradient.

    Differences are extrapolated (Richardson) from 16 steps and have an error estimate. The tolerance is 20 times that
    estimate, plus ``eps**(3/8)`` of the compared values (1.4e-6 in double precision). Derivatives by different modes
    may differ by ``sqrt(eps)``. Computations are in float64 for every dtype of ``x``, if ``f`` allows it; NaN and
    infinities are detected in the dtype of ``x``. Steps are relative to the entries of ``x``.

    Args:
        f: the function, ``f(x, *args)``; for a vector-valued function a random combination of the outputs is checked.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated.
        order: 1 for first derivatives only, 2 for first and second.
        num_directions: the number of random directions, besides all coordinates (if at most 32), or else a random
            direction in each leaf.
        key: the random key of the directions; None is ``jax.random.key(0)``, so that reports are reproducible.

    Returns:
        A report that prints as a table, for ``assert report.ok, report``. At a kink (``relu`` at 0) the derivative does
        not exist: the verdict is "kink", not "wrong", and ``report.ok`` is false.

    Raises:
        TypeError: if ``f`` is not callable, no mode can differentiate it, a leaf of ``x`` or of the output is not of a
            real floating dtype, or the call is traced.
        ValueError: for an unknown order, or ``num_directions`` below 1.

    Cost: 32 evaluations and, for the second order, 32 gradients per direction; about six compilations; the assembled
        Hessian, unless it has more than 4,096 rows.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.check_derivatives(lambda x: jnp.sum(jnp.sin(x)), jnp.array([0.5, 2.0])).ok
        True

    References: Ridders, Accurate computation of F'(x) and F'(x)F''(x) (1982), doi:10.1016/S0141-1195(82)80057-0.
    """
    _checks.check_callable("f", f)
    if isinstance(order, bool) or order not in (1, 2):
        raise ValueError(f"{caller()}: order={order!r}, expected 1 or 2.")
    _checks.check_count("num_directions", num_directions, 1)
    x = _checks.check_point("x", x)
    _checks.check_concrete({"x": x, "args": args})
    _checks.check_entries("x", x)
    own = _traced.trace(lambda x: with_aux(f(x, *args), False), x)
    _checks.check_floating_output("f", own.out)
    remarks = []
    if not own.is_scalar:
        remarks.append("f is vector-valued: what is checked is one random combination of its outputs.")
    nonfinite = _nonfinite(_scalar(f, args, own), x, order)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), np.errstate(all="ignore"):
        key = jax.random.key(0) if key is None else key
        line, fun, wide_x = _line(f, args, x, order, remarks)
        directions = _directions(line, num_directions, key)
        matrix = _assembled(fun, wide_x, line, remarks) if order == 2 and own.is_scalar else None
        checks = _compare(line, directions, order, matrix)
    found = [f"{what}: {', '.join(paths)}" for what, paths in nonfinite.items()]
    verdict = "not finite" if nonfinite else "passed"
    finite = DerivativeCheck("finite values", verdict, float(len(nonfinite)), 0.0, "; ".join(found))
    name = getattr(f, "__name__", type(f).__name__)
    return DerivativeReport(name, (finite, *checks), nonfinite, tuple(remarks))


def _scalar(f: Objective, args: tuple[Any, ...], own: _traced.Program) -> Objective:
    """``f`` as a scalar function of ``x`` only: the sum of its outputs, each with a fixed random weight."""
    if own.is_scalar:
        return lambda x: f(x, *args)
    rng = np.random.default_rng(0)
    weights = [np.asarray(rng.uniform(0.5, 1.5, leaf.shape)) for leaf in jax.tree.leaves(own.out)]

    def combined(x: Tree) -> Array:
        leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(f(x, *args))]  # a number need not be an array
        parts = [jnp.sum(leaf * jnp.asarray(w, leaf.dtype)) for leaf, w in zip(leaves, weights, strict=True)]
        dtype = jnp.result_type(*(part.dtype for part in parts)) if len(parts) > 1 else parts[0].dtype
        return sum((part.astype(dtype) for part in parts[1:]), start=parts[0].astype(dtype))

    return combined


def _line(f: Objective, args: tuple[Any, ...], x: Tree, order: int, remarks: list[str]) -> tuple[Line, Objective, Tree]:
    """The function along lines, as a function of the point, and the point; in double precision if ``f`` allows it."""

    def widen(leaf: Any) -> Any:
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(leaf, jnp.float64) if floating else leaf

    def restrict(x: Tree, args: tuple[Any, ...]) -> tuple[Line, Objective]:
        fun = _scalar(f, args, _traced.trace(lambda x: (f(x, *args), None), x))
        return Line(fun, x, order), fun

    wide_x, wide_args = jax.tree.map(widen, x), jax.tree.map(widen, args)
    try:
        line, fun = restrict(wide_x, wide_args)
    except (TypeError, ValueError) as error:
        line, fun = restrict(x, args)  # raises again if double precision was not the reason
        first = next(iter(str(error).splitlines()), "")
        remarks.append(f"f does not take double precision, so differences are rough: {first}")
        return line, fun, x
    if line.eps > np.finfo(np.float64).eps:
        remarks.append(f"f returns {line.out_dtype} even for float64 arguments, so differences are rough.")
    return line, fun, wide_x


def _assembled(fun: Objective, x: Tree, line: Line, remarks: list[str]) -> np.ndarray | None:
    """The Hessian that ``hessian`` assembles from examples, in the units of the line; None if it does not assemble."""
    if find_structure(_traced.trace(lambda x: (fun(x), None), x)) is None:
        return None
    if line.size > _MOST_ASSEMBLED:
        remarks.append(f"The assembled Hessian of {line.size:,} rows was left out.")
        return None
    matrix = np.asarray(matrix_view(jax.jit(hessian(fun))(x), x).matrix, np.float64)
    return line.scales[:, None] * matrix * line.scales


def _directions(line: Line, num_directions: int, key: Array) -> list[Direction]:
    """Random directions, and all coordinates or a random direction in each leaf."""
    n = line.size
    random = np.asarray(jax.random.normal(key, (num_directions + _MOST_LEAVES, n), jnp.float64))
    directions = [Direction(f"random direction {i}", random[i]) for i in range(num_directions)]
    if n <= _MOST_COORDINATES:
        return directions + [Direction(line.entry_name(i), row) for i, row in enumerate(np.eye(n))]
    for (path, start, stop), row in zip(line.leaves[:_MOST_LEAVES], random[num_directions:], strict=False):
        vector = np.where((np.arange(n) >= start) & (np.arange(n) < stop), row, 0.0)
        directions.append(Direction(f"a random direction in {path}", vector))
    return directions


def _compare(line: Line, directions: list[Direction], order: int, matrix: np.ndarray | None) -> list[DerivativeCheck]:
    """All checks except the check for NaN; ``matrix`` is the assembled Hessian, if there is one."""
    center, gradient = line.center()
    first, values, directions = _along_all(line, directions, order)
    checks = [_verdicts.worst("first derivatives: differences of f", directions, first)]
    few = line.size <= _MOST_FORWARD
    modes = [m for m in ("rev", "fwd") if line.program.blocker(m) is None and (few or m == line.gradient_mode)]
    checks.append(_verdicts.agreement("gradient: modes agree", line.gradients_by(modes), line, float(abs(center))))
    if order == 1:
        return checks
    vectors = np.stack([direction.vector for direction in directions])
    products = np.stack([line.product(vector) for vector in vectors])
    gradients = [Samples(*line.gradients(vector), gradient) for vector in vectors]
    triples = zip(directions, products, values, strict=True)
    of_values = [_verdicts.curvature(line, *triple) for triple in triples]
    by_values = _verdicts.worst("second derivatives: second differences of f", directions, of_values)
    by_gradient = _by_gradient("second derivatives", line, directions, products, gradients)
    by_gradient = _verdicts.blame_kink(by_gradient, checks[0], "f")
    checks.append(by_gradient)
    checks.append(_verdicts.blame_kink(_verdicts.blame_kink(by_values, checks[0], "f"), by_gradient, "the gradient"))
    size = float(np.linalg.norm(gradient))
    checks += _identities(line, directions, products, size)
    if matrix is None:
        return checks
    of_taps = vectors @ matrix.T
    by_taps = [_verdicts.assembled(line, *row, size) for row in zip(directions, of_taps, products, strict=True)]
    checks.append(_verdicts.worst("assembled Hessian: agrees with H v", directions, by_taps))
    differences = _by_gradient("assembled Hessian", line, directions, of_taps, gradients)
    return [*checks, _verdicts.blame_kink(differences, checks[0], "f")]


def _by_gradient(
    name: str, line: Line, directions: list[Direction], products: np.ndarray, gradients: list[Samples]
) -> DerivativeCheck:
    """Compare products with the Hessian with differences of the gradient."""
    triples = zip(directions, products, gradients, strict=True)
    found = [_verdicts.second_order(line, *triple) for triple in triples]
    return _verdicts.worst(f"{name}: differences of the gradient", directions, found)


def _identities(line: Line, directions: list[Direction], products: np.ndarray, size: float) -> list[DerivativeCheck]:
    """Agreement of the modes, symmetry and linearity; ``size`` is the norm of the gradient."""
    few = line.size <= _MOST_FORWARD
    vectors = [direction.vector for direction in directions]
    probes = np.stack(vectors[:2] if len(vectors) > 1 else [vectors[0], -2 * vectors[0]])
    legal = [m for m in _COMPOSITIONS if line.program.composition_blocker(m) is None]
    legal = [m for m in legal if few or m != "fwd_over_fwd" or legal == [m]]
    agree = _verdicts.agreement("H v: modes agree", line.products_by(legal, probes[0]), line, size)
    symmetric = _verdicts.blame_rule(_verdicts.symmetry(line, directions, products, size), line)
    return [agree, symmetric, _verdicts.linearity(line, probes, size)]


def _along_all(
    line: Line, directions: list[Direction], order: int
) -> tuple[list[DerivativeCheck], list[Samples], list[Direction]]:
    """The check of the first derivative and the values along each direction, and the directions that were used.

    If an entry is far smaller than the others of its leaf, steps of its size may change ``f`` by less than rounding.
    Then the direction is lengthened if that gives a smaller tolerance.
    """
    center, gradient = line.center()
    product = line.product if order == 2 else None

    def evaluate(direction: Direction) -> tuple[float, DerivativeCheck, Samples]:
        values = Samples(*line.values(direction.vector), center)
        check = _verdicts.first_order(line, direction, gradient, values)
        if product is None:
            return check.tolerance, check, values
        second = _verdicts.curvature(line, direction, product(direction.vector), values)
        return max(check.tolerance, second.tolerance), check, values

    checks, values, chosen = [], [], []
    for direction in directions:
        found = evaluate(direction)
        factor = line.wider(int(np.argmax(direction.vector))) if direction.is_coordinate else 1.0
        longer = Direction(direction.label, factor * direction.vector)
        if factor > 1 and found[0] > _verdicts.ROUGH and (wider := evaluate(longer))[0] < found[0]:
            found, direction = wider, longer
        checks.append(found[1])
        values.append(found[2])
        chosen.append(direction)
    return checks, values, chosen


def _nonfinite(fun: Objective, x: Tree, order: int) -> dict[str, tuple[str, ...]]:
    """For each mode the leaves whose gradient or rows of ``H v`` are not finite, in the dtype of ``x``."""
    program = _traced.trace(lambda x: (fun(x), None), x)
    few = _trees.num_entries(x) <= _MOST_FORWARD
    first = [m for m in ("rev", "fwd") if program.blocker(m) is None and (few or m == "rev")]
    second = [m for m in _COMPOSITIONS if program.composition_blocker(m) is None and (few or m != "fwd_over_fwd")]

    def derivatives(x: Tree, v: Tree) -> dict[str, Tree]:  # one program, because the modes share most equations
        found = {"f": (program.fun(x)[0],)}
        found |= {f"gradient by {mode}": gradient_of(program, x, mode)[0] for mode in first}
        return found | {f"Hessian by {mode}": hvp(fun, x, v, mode=mode) for mode in second if order == 2}

    v = jax.tree.map(lambda leaf, scale: scale.astype(leaf.dtype), x, scales_of(x))
    found = (jax.jit(derivatives) if program.jaxpr is not None else derivatives)(x, v)
    bad = {what: _bad_leaves(tree, "f" if what == "f" else "x") for what, tree in found.items()}
    return {what: paths for what, paths in bad.items() if paths}


def _bad_leaves(tree: Tree, name: str) -> tuple[str, ...]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    bad = [jax.tree_util.keystr(path) for path, leaf in leaves if not np.isfinite(np.asarray(leaf, np.float64)).all()]
    return tuple(name if name == "f" else name + path for path in bad)
