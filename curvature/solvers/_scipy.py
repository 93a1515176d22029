"""SciPy's own minimizers on compiled values, gradients, Hessian products and Hessians."""

import importlib
import inspect
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from curvature import _checks
from curvature._compile_cache import cached
from curvature._errors import public
from curvature._trees import ravel
from curvature._types import Objective, Tree
from curvature.optimizers._bounds import box_of, flat, project
from curvature.optimizers._method import evaluate
from curvature.transforms._compositions import trace_objective
from curvature.transforms._hessian import hessian, hvp

ScipyMethod = Literal[
    "Nelder-Mead", "Powell", "CG", "BFGS", "Newton-CG", "L-BFGS-B", "TNC", "COBYLA", "COBYQA", "SLSQP", "trust-constr",
    "dogleg", "trust-ncg", "trust-exact", "trust-krylov",
]  # fmt: skip

_VALUE_ONLY = ("Nelder-Mead", "Powell", "COBYLA", "COBYQA")
_PRODUCTS = ("Newton-CG", "trust-ncg", "trust-krylov", "trust-constr")
_MATRIX = ("dogleg", "trust-exact")
_BOUNDED = ("Nelder-Mead", "Powell", "L-BFGS-B", "TNC", "COBYLA", "COBYQA", "SLSQP", "trust-constr")


class _Programs(NamedTuple):
    """The compiled derivatives of one objective, each of ``(vector, like, args)``; ``like`` only shapes the point."""

    value: Callable[..., Float[Array, ""]]
    value_and_grad: Callable[..., tuple[Float[Array, ""], Float[Array, " n"]]]
    product: Callable[..., Float[Array, " n"]]  # also of a direction, last
    matrix: Callable[..., Float[Array, "n n"]]


@public
def scipy_minimize(
    fun: Objective,
    x0: Tree,
    args: Any = (),
    *,
    method: ScipyMethod | None = None,
    bounds: tuple[Tree, Tree] | None = None,
    tol: float | None = None,
    options: Mapping[str, Any] | None = None,
    callback: Callable[..., Any] | None = None,
) -> Any:
    """Minimize ``fun(x, *args)`` by ``scipy.optimize.minimize``, with the derivatives that its method takes.

    They are compiled, once for each ``fun`` and shape: value and gradient together, a Hessian product for Newton-CG,
    trust-ncg, trust-krylov and trust-constr, the Hessian for dogleg and trust-exact. The loop is SciPy's, on the host,
    and what it calls success is its own: for some methods that a step was small. ``minimize`` compiles the loop too.

    SciPy works in double precision. With ``x0`` in single, each point is rounded to single, where ``fun`` is evaluated,
    and what comes back is widened. Its noise of 1e-7 is more than SciPy's default tolerances foresee: line searches end
    with "precision loss", and methods that test changes of the value may stop early. ``jax.enable_x64`` or a ``tol`` of
    about 1e-4 avoids both.

    Args:
        fun: the objective, ``fun(x, *args) -> scalar``; pure, as for ``jit``.
        x0: where to start, any tree of floating arrays.
        args: data for ``fun``: a tuple, or one argument that is not a tuple.
        method: one of SciPy's; ``None`` is ``"BFGS"``, or ``"L-BFGS-B"`` with bounds.
        bounds: ``(lower, upper)`` as ``minimize`` takes them, for the methods of SciPy that take bounds.
        tol: SciPy's, which means something else for each method.
        options: SciPy's, of the method.
        callback: SciPy's: called with the point, or with ``intermediate_result=`` if its parameter is called so. The
            point is a tree like ``x0``. ``StopIteration`` ends the solve.

    Returns:
        SciPy's ``OptimizeResult``, where ``x`` is a tree like ``x0`` and ``x_flat`` the vector that SciPy found. All
        else is SciPy's, with entries in the order of ``jax.flatten_util.ravel_pytree``.

    Raises:
        TypeError: when ``fun`` is not callable or not scalar, ``bounds`` is no pair, a leaf of ``x0`` is not of a real
            floating dtype, or anything is traced: SciPy cannot run under ``jit``, ``vmap`` or ``grad``.
        ValueError: when ``x0`` holds NaN or infinity, the method is unknown or takes no bounds, or bounds do not match
            ``x0`` or cross.

    Cost: SciPy's evaluations, each a compiled call of some 10 to 100 microseconds and the way to NumPy and back. A
        product linearizes the gradient afresh: two to three gradients.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> bowl = lambda x, c: jnp.sum(jnp.cosh(x["a"] - c)) + x["b"] ** 2
        >>> x0 = {"a": jnp.zeros(2), "b": jnp.asarray(1.0)}
        >>> result = curvature.scipy_minimize(bowl, x0, jnp.array([1.0, 2.0]), method="trust-exact", tol=1e-3)
        >>> bool(result.success), jnp.round(result.x["a"], 2), result.x_flat.shape
        (True, Array([1., 2.], dtype=float32), (3,))
    """
    _checks.check_callable("fun", fun)
    x0 = _checks.check_start("x0", x0)
    args = _checks.check_data(args)
    _checks.check_concrete({"x0": x0, "args": args, "bounds": bounds})
    if callback is not None:
        _checks.check_callable("callback", callback)
    default = "BFGS" if bounds is None else "L-BFGS-B"
    name: str = default if method is None else _checks.spelled(method, get_args(ScipyMethod))
    _checks.check_choice("method", name, ScipyMethod)
    box = None
    if bounds is not None:
        _checks.check_method(name, _BOUNDED, "bounds")
        box = box_of(*_checks.check_pair_of_bounds(bounds), "x0", x0)
        x0 = project(box, x0)
    optimize: Any = importlib.import_module("scipy.optimize")  # not at the top: it takes a quarter of a second
    vector, unravel = ravel(x0)
    given = dict(zip(("lb", "ub"), map(_widen, flat(box)), strict=True)) if box is not None else None
    result = optimize.minimize(
        x0=_widen(vector),
        method=name,
        bounds=None if given is None else optimize.Bounds(**given),
        tol=tol,
        options=None if options is None else dict(options),
        callback=None if callback is None else _telling(callback, x0, optimize.OptimizeResult),
        **_derivatives(_programs(fun), name, x0, args),
    )
    result.x_flat, result.x = result.x, unravel(jnp.asarray(result.x, vector.dtype))
    return result


def _derivatives(programs: _Programs, method: str, x0: Tree, args: tuple[Any, ...]) -> dict[str, Any]:
    """The functions that the method takes, of NumPy vectors in double precision."""
    dtype = ravel(x0)[0].dtype

    def on_host(program: Callable[..., Any]) -> Callable[..., Any]:
        def evaluate(x: np.ndarray, *direction: np.ndarray) -> Any:
            out = program(np.asarray(x, dtype), x0, args, *(np.asarray(v, dtype) for v in direction))
            return jax.tree.map(_widen, out)

        return evaluate

    if method in _VALUE_ONLY:
        return {"fun": on_host(programs.value)}
    functions: dict[str, Any] = {"fun": on_host(programs.value_and_grad), "jac": True}
    if method in _PRODUCTS:
        functions["hessp"] = on_host(programs.product)
    if method in _MATRIX:
        functions["hess"] = on_host(programs.matrix)
    return functions


def _widen(array: Array) -> Any:
    """A NumPy array in double precision, or a float, as a copy, into which SciPy may write."""
    wide = np.array(array, np.float64)
    return float(wide) if wide.ndim == 0 else wide


def _telling(callback: Callable[..., Any], x0: Tree, result_type: type) -> Callable[..., Any]:
    """The callback as SciPy calls it, with the point as a tree. SciPy reads its signature, which is kept."""
    vector, unravel = ravel(x0)

    def tree(x: np.ndarray) -> Tree:
        return unravel(jnp.asarray(x, vector.dtype))

    def by_name(intermediate_result: Any) -> Any:
        return callback(intermediate_result=result_type(intermediate_result, x=tree(intermediate_result.x)))

    def by_position(x: np.ndarray, *rest: Any) -> Any:
        return callback(tree(x), *rest)

    return by_name if set(inspect.signature(callback).parameters) == {"intermediate_result"} else by_position


def _programs(fun: Objective) -> _Programs:
    """The compiled derivatives of an objective, in the cache of compiled solves."""
    return cached((fun,), _compile, lambda: _compile(weakref.ref(fun)), otherwise=lambda: _compile(lambda: fun))


def _compile(reference: Callable[[], Any]) -> _Programs:
    def at(like: Tree, args: tuple[Any, ...]) -> Callable[[Array], Any]:
        """The objective as a function of the vector alone."""
        return lambda vector: reference()(ravel(like)[1](vector), *args)

    def value(vector: Array, like: Tree, args: tuple[Any, ...]) -> Array:
        return trace_objective("fun", at(like, args), vector, ()).fun(vector)[0]

    programs = (
        value,
        lambda vector, like, args: evaluate(at(like, args), vector),
        lambda vector, like, args, v: hvp(at(like, args), vector, v),
        lambda vector, like, args: hessian(at(like, args))(vector),
    )
    return _Programs(*map(jax.jit, programs))
