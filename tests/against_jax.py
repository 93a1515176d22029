"""Every fast path of the library against the plain composition of JAX, for a program given by two losses.

``failures_of`` passes over what is not finite by JAX either.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import curvature
from curvature.transforms import _mean_hessian

MODES = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")
CLIP = 0.7


class NotDifferentiableError(Exception):
    """JAX has no derivatives to compare with."""


class Case(NamedTuple):
    """A program.

    Attributes:
        per: ``per(p, *example)``, the loss of one example.
        f: ``f(p, *batch)``, the loss of a batch, which need not be the mean of ``per``.
        p: the parameters.
        batch: the data, with a leading axis of examples.
        output: ``output(p, *example)``, if ``per`` is a convex function of it alone, else None.
        loss_of_output: that function, ``loss_of_output(output(p, *example), *example)``.
    """

    per: Callable[..., Any]
    f: Callable[..., Any]
    p: Any
    batch: tuple[Any, ...]
    output: Callable[..., Any] | None = None
    loss_of_output: Callable[..., Any] | None = None


@contextmanager
def examples_taken_apart(always: bool) -> Iterator[None]:
    """Within it ``hessian`` takes a mean apart into examples even where a program is too small to gain from it."""
    before = _mean_hessian._FEWER
    _mean_hessian._FEWER = 0 if always else before
    try:
        yield
    finally:
        _mean_hessian._FEWER = before


def over_examples(per: Callable[..., Any]) -> Callable[..., Any]:
    return lambda p, *batch: jax.vmap(per, (None,) + (0,) * len(batch))(p, *batch)


def gradient_by_jax(fun: Callable[..., Any]) -> Callable[..., Any]:
    """JAX's gradient: by forward mode where reverse mode raises, as for a derivative rule that cannot be transposed."""

    def gradient(p: Any, *args: Any) -> Any:
        try:
            return jax.grad(fun)(p, *args)
        except Exception:
            return jax.jacfwd(fun)(p, *args)

    return gradient


# ---- by JAX ---------------------------------------------------------------------------------------------------------


class Truth(NamedTuple):
    """The derivatives of a program by the vector of all parameters, from JAX.

    Attributes:
        gradient: of ``f``.
        hessian: of ``f``: the Jacobian of JAX's gradient, which is what ``jax.hessian`` is.
        hessian_of_mean: of the mean of ``per``; not the mean of ``hessians`` where a rule clips its cotangents.
        gradients: of ``per``, a row for each example.
        hessians: of ``per``, a matrix for each example.
    """

    gradient: np.ndarray
    hessian: np.ndarray
    hessian_of_mean: np.ndarray
    gradients: np.ndarray
    hessians: np.ndarray


def truth_of(case: Case) -> Truth:
    """The derivatives of a program by JAX alone."""
    vector, unravel = ravel_pytree(case.p)

    def derivatives(fun: Callable[..., Any], vector: Any, *args: Any) -> tuple[Any, Any]:
        gradient = gradient_by_jax(lambda v: fun(unravel(v), *args))

        def twice(v: Any) -> tuple[Any, Any]:
            slope = gradient(v)
            return slope, slope

        hessian, slope = jax.jacfwd(twice, has_aux=True)(vector)
        return slope, hessian

    @jax.jit
    def all_derivatives(vector: Any, *batch: Any) -> Any:
        each = jax.vmap(lambda *example: derivatives(case.per, vector, *example))(*batch)
        mean = derivatives(lambda p, *batch: jnp.mean(over_examples(case.per)(p, *batch)), vector, *batch)
        return *derivatives(case.f, vector, *batch), mean[1], *each

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # leaves of two precisions in one vector
        found = all_derivatives(vector, *case.batch)
    return Truth(*(np.asarray(array, np.float64) for array in found))


# ---- by the library -------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """One function of the library.

    Attributes:
        ours: of ``(p, *batch)``.
        theirs: the same from JAX's derivatives, as one array or a tuple of arrays.
        flatten: from our tree to such arrays.
    """

    ours: Callable[..., Any]
    theirs: Callable[[Truth], Any]
    flatten: Callable[[Any], Any]


def _vector(tree: Any) -> np.ndarray:
    leaves = [np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)]
    return np.concatenate(leaves) if leaves else np.zeros(0)


def _rows(tree: Any) -> np.ndarray:
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _matrix_of(p: Any, batched: bool = False) -> Callable[[Any], np.ndarray]:
    """From a tree like ``p`` of trees like ``p`` to a matrix, or one for each example; shapes are checked."""
    leaves, structure = jax.tree.flatten(p)

    def matrix(blocks: Any) -> np.ndarray:
        rows = []
        for leaf, row in zip(leaves, structure.flatten_up_to(blocks), strict=True):
            parts = []
            for other, block in zip(leaves, structure.flatten_up_to(row), strict=True):
                front = block.shape[:1] if batched else ()
                assert block.shape == (*front, *leaf.shape, *other.shape), f"a block of shape {block.shape}"
                parts.append(np.asarray(block, np.float64).reshape(*front, leaf.size, other.size))
            rows.append(np.concatenate(parts, axis=-1))
        return np.concatenate(rows, axis=-2)

    return matrix


def _diagonal_blocks(p: Any) -> Callable[[Any], np.ndarray]:
    leaves, structure = jax.tree.flatten(p)
    zero = [[jnp.zeros((*a.shape, *b.shape)) for b in leaves] for a in leaves]

    def matrix(blocks: Any) -> np.ndarray:
        rows = [list(row) for row in zero]
        for k, block in enumerate(structure.flatten_up_to(blocks)):
            rows[k][k] = block
        return _matrix_of(p)(structure.unflatten([structure.unflatten(row) for row in rows]))

    return matrix


def _only_diagonal_blocks(p: Any, matrix: np.ndarray) -> np.ndarray:
    number = np.repeat(np.arange(len(jax.tree.leaves(p))), [leaf.size for leaf in jax.tree.leaves(p)])
    return np.where(number[:, None] == number, matrix, 0)


def _direction(p: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.cos(jnp.arange(1.0, leaf.size + 1)).reshape(leaf.shape).astype(leaf.dtype), p)


def _clipped(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    norms = np.linalg.norm(gradients, axis=1)
    factors = np.minimum(1, CLIP / np.where(norms > 0, norms, 1))
    return (gradients * factors[:, None]).mean(0), norms


def checks_of(case: Case, number: int) -> dict[str, Check]:
    """The checks of a program: the assembled ones always, two of the others by turns."""
    per, f, p = case.per, case.f, case.p
    matrix, direction = _matrix_of(p), _vector(_direction(p))
    checks = {
        "hessian": Check(curvature.hessian(f), lambda t: t.hessian, matrix),
        "mean_hessian": Check(curvature.mean_hessian(per), lambda t: t.hessian_of_mean, matrix),
        "clipped_grad": Check(
            curvature.clipped_grad(per, CLIP), lambda t: _clipped(t.gradients), lambda out: tuple(map(_vector, out))
        ),
        "per_example_grad_moments": Check(
            curvature.per_example_grad_moments(per),
            lambda t: (t.gradients.mean(0), (t.gradients**2).mean(0), t.gradients.var(0)),
            lambda out: tuple(map(_vector, out)),
        ),
    }
    others = {
        "per_example_grad_norm": Check(
            curvature.per_example_grad_norm(per), lambda t: np.linalg.norm(t.gradients, axis=1), np.asarray
        ),
        "hessian, mean": Check(
            curvature.hessian(lambda p, *batch: jnp.mean(over_examples(per)(p, *batch))),
            lambda t: t.hessian_of_mean,
            matrix,
        ),
        "hessian, diagonal blocks": Check(
            curvature.hessian(f, blocks="diagonal"),
            lambda t: _only_diagonal_blocks(p, t.hessian),
            _diagonal_blocks(p),
        ),
        "mean_hessian, diagonal blocks": Check(
            curvature.mean_hessian(per, blocks="diagonal"),
            lambda t: _only_diagonal_blocks(p, t.hessian_of_mean),
            _diagonal_blocks(p),
        ),
        "mean_hessian, chunks": Check(curvature.mean_hessian(per, chunk_size=2), lambda t: t.hessian_of_mean, matrix),
        "per_example_grad": Check(curvature.per_example_grad(per), lambda t: t.gradients, _rows),
        "per_example_hessian": Check(
            curvature.per_example_hessian(per), lambda t: t.hessians, _matrix_of(p, batched=True)
        ),
        "hessian_diagonal": Check(
            lambda p, *batch: curvature.hessian_diagonal(f, p, *batch), lambda t: np.diagonal(t.hessian), _vector
        ),
        "laplacian": Check(
            lambda p, *batch: curvature.laplacian(f)(p, *batch), lambda t: np.trace(t.hessian), np.asarray
        ),
        "hvp": Check(
            lambda p, *batch: curvature.hvp(f, p, _direction(p), *batch), lambda t: t.hessian @ direction, _vector
        ),
        "linearize_grad": Check(
            lambda p, *batch: curvature.linearize_grad(f, p, *batch)[1], lambda t: t.gradient, _vector
        ),
    }
    for mode in MODES:
        others[f"hvp, {mode}"] = Check(
            lambda p, *batch, mode=mode: curvature.hvp(f, p, _direction(p), *batch, mode=mode),
            lambda t: t.hessian @ direction,  # and not of the transpose, which differs where a custom rule lies
            _vector,
        )
    names = list(others)
    return checks | {name: others[name] for name in [names[(number * 2 + k) % len(names)] for k in range(2)]}


def _is_illegal(case: Case, name: str) -> bool:
    """Whether JAX cannot differentiate a program either by the modes that a check asks for."""
    inner, outer = {
        "hvp, fwd_over_rev": (jax.jacrev, jax.jacfwd),
        "hvp, rev_over_rev": (jax.jacrev, jax.jacrev),
        "hvp, rev_over_fwd": (jax.jacfwd, jax.jacrev),
        "hvp, fwd_over_fwd": (jax.jacfwd, jax.jacfwd),
    }.get(name, (None, None))
    return inner is not None and isinstance(_evaluate(outer(inner(case.f)), case), Exception)


# ---- Kronecker factors ----------------------------------------------------------------------------------------------


def kronecker_blocks(case: Case) -> dict[str, tuple[Any, Any]] | None:
    """The blocks of a ``KroneckerOperator`` of the first example that must be exact, and these by JAX."""
    assert case.output is not None
    one = jax.tree.map(lambda leaf: leaf[:1], case.batch)
    example = jax.tree.map(lambda leaf: leaf[0], case.batch)

    def of_batch(outputs: Any, *batch: Any) -> Any:
        return jnp.mean(jax.vmap(case.loss_of_output)(outputs, *batch))

    def operator(p: Any, *one: Any) -> Any:
        return curvature.KroneckerOperator(over_examples(case.output), of_batch, p, *one)

    try:
        jacobians, hessian = jax.jit(lambda p: _gauss_newton(case, p, example))(case.p)
    except Exception:
        return None
    op = jax.jit(operator)(case.p, *one)
    matrix = np.asarray(op.as_matrix(), np.float64)
    found, start = {}, 0
    for leaf, jacobian, route in zip(jax.tree.leaves(case.p), jacobians, op.report.routes.values(), strict=True):
        block = matrix[start : start + leaf.size, start : start + leaf.size]
        start += leaf.size
        want = np.asarray(jacobian).T @ np.asarray(hessian) @ np.asarray(jacobian)
        if "diagonal" in route and "Kronecker" not in route:
            found[route] = np.diag(np.diag(want)), block
        elif "over" not in route and "from" not in route:
            found[route] = want, block
    return {f"KroneckerOperator: {route}": (block, want) for route, (want, block) in found.items()}


def _gauss_newton(case: Case, p: Any, example: Any) -> tuple[list[Any], Any]:
    def output(p: Any) -> Any:
        return jnp.ravel(case.output(p, *example))

    shape = jax.eval_shape(lambda: case.output(p, *example)).shape
    leaves = jax.tree.leaves(jax.jacrev(output)(p))
    hessian = jax.hessian(lambda o: case.loss_of_output(o.reshape(shape), *example))(output(p))
    return [leaf.reshape(len(leaf), -1) for leaf in leaves], hessian


# ---- comparison -----------------------------------------------------------------------------------------------------

# The numbers of a program are near one. Where all its terms cancel, in the gradient too, only rounding is left.
_LEAST_SCALE = 1e-4
_ROUNDINGS = 16  # of one, which are allowed where the tolerance at this scale is less: in single precision


def _difference(ours: Any, theirs: Any, tolerance: float, scale: float) -> str | None:
    if isinstance(theirs, tuple):
        found = [_difference(*pair, tolerance, scale) for pair in zip(ours, theirs, strict=True)]
        return next((f"part {k}: {words}" for k, words in enumerate(found) if words is not None), None)
    if ours.shape != theirs.shape:
        return f"shape {ours.shape}, by JAX {theirs.shape}"
    got, want = np.ravel(ours), np.ravel(theirs)
    if not np.isfinite(want).all():
        return None
    error = np.abs(got - want)
    if np.isfinite(got).all() and error.max(initial=0) <= tolerance * max(scale, np.abs(want).max(initial=0)):
        return None
    worst = int(np.argmax(np.where(np.isfinite(error), error, np.inf)))
    return f"entry {worst} is {got[worst]:.6g}, by JAX {want[worst]:.6g}"


def _evaluate(fun: Callable[..., Any], case: Case) -> Any:
    """The result, or the exception."""
    try:
        return jax.jit(fun)(case.p, *case.batch)
    except Exception as error:
        return error


def failures_of(case: Case, tolerance: float, number: int = 0, only: Sequence[str] = ()) -> dict[str, str]:
    """What differs from JAX, by the name of the check.

    Args:
        case: the program.
        tolerance: relative to the largest entry.
        number: which of the checks that go by turns.
        only: the checks to make, if not all.

    Raises:
        NotDifferentiableError: when JAX cannot differentiate the program.
    """
    try:
        truth = truth_of(case)
    except Exception as error:
        raise NotDifferentiableError from error
    checks = checks_of(case, number)
    if only:
        checks = {name: check for name, check in checks.items() if name in only}
    together = _evaluate(lambda *data: {name: check.ours(*data) for name, check in checks.items()}, case)
    rounding = _ROUNDINGS * max((float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(case.p)), default=0.0)
    least = max(_LEAST_SCALE, rounding / tolerance)
    scale = float(np.abs(truth.gradient).max(initial=least))  # of rounding, where a Hessian is zero
    failures = {}
    for name, check in checks.items():
        ours = _evaluate(check.ours, case) if isinstance(together, Exception) else together[name]
        if isinstance(ours, Exception):
            if not _is_illegal(case, name):
                failures[name] = f"raises {type(ours).__name__}: {str(ours)[:300]}"
            continue
        difference = _difference(check.flatten(ours), check.theirs(truth), tolerance, scale if scale < np.inf else 0.0)
        if difference is not None:
            failures[name] = difference
    if case.output is not None and (not only or "KroneckerOperator" in only[0]):
        failures |= _kronecker_failures(case, tolerance)
    return failures


def _kronecker_failures(case: Case, tolerance: float) -> dict[str, str]:
    try:
        blocks = kronecker_blocks(case)
    except Exception as error:
        return {"KroneckerOperator": f"raises {type(error).__name__}: {str(error)[:300]}"}
    found = {name: _difference(*pair, tolerance, _LEAST_SCALE) for name, pair in (blocks or {}).items()}
    return {name: difference for name, difference in found.items() if difference is not None}
