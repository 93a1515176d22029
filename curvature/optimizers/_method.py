"""Shared by the optimizers: the optax protocol with a status, and the objective around the current point."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from curvature import _checks
from curvature._trees import ravel
from curvature._types import Matrix, Objective, Scalar, Status, Tree, Vector
from curvature.optimizers._bounds import Box, box_of, flat, stay_inside
from curvature.optimizers._wrappers import gradient_for, is_placeholder, wrappable
from curvature.programs._traced import Program
from curvature.transforms._blocks import matrix_of, side_by_side
from curvature.transforms._compositions import trace_objective
from curvature.transforms._hessian import linearize_grad
from curvature.transforms._jacobian import gradient_of, map_basis
from curvature.transforms._modes import choose_jacobian

_NOISE = 10  # a change of fewer roundings of the value decides nothing: Conn, Gould and Toint (2000), section 17.4.2

P = ParamSpec("P")
T = TypeVar("T")
Bounds = tuple[Tree, Tree]
"""The lower and the upper bounds as a user gives them."""


class WithStatus(optax.GradientTransformationExtraArgs):
    """An optax transformation whose state has a ``status``: an update that finds no step is zero and says why."""


class FirstOrder(WithStatus):
    """A ``WithStatus`` that evaluates the gradient at each trial and stores it and the value in ``state.stored``."""


class SecondOrder(WithStatus):
    """A ``WithStatus`` whose ``update`` takes two more extra arguments.

    ``hvp_fn=`` is the Hessian's product at ``params``, and ``hessian_fn=`` a function of ``params`` that forms it;
    without them the Hessian is that of ``value_fn``. An update moves to a point it has accepted.
    """


class DenseSecondOrder(SecondOrder):
    """A ``SecondOrder`` that forms the Hessian."""


class Unevaluated(NamedTuple):
    """A placeholder for the value and the gradient that ``optax.value_and_grad_from_state`` reads.

    The value is infinite, so optax evaluates both. Methods of second order store nothing: the next update computes the
    gradient as part of its linearization.
    """

    value: Float[Array, ""]
    grad: Tree


def unevaluated(params: Tree) -> Unevaluated:
    """The placeholder, in the shapes and dtypes of ``params``."""
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
        dtype = jnp.result_type(*jax.tree.leaves(params) or [jnp.float32])  # map_params passes a tree without leaves
    return Unevaluated(jnp.asarray(jnp.inf, dtype), jax.tree.map(jnp.zeros_like, params))


class Stored(NamedTuple):
    """Value and gradient at the point that an update chose, where ``optax.value_and_grad_from_state`` finds them.

    ``params`` is that point: a later transformation of a chain, or a projection, may have moved on from it.
    """

    value: Float[Array, ""]
    grad: Tree
    params: Tree


def nothing_stored(params: Tree) -> Stored:
    """The placeholder for value, gradient and point, in the shapes and dtypes of ``params``."""
    return Stored(*unevaluated(params), jax.tree.map(jnp.zeros_like, params))


class Slope(NamedTuple):
    """The objective around the current point to first order, in flat vectors of at least single precision."""

    x: Vector
    value: Scalar
    noise: Scalar  # the change of the value that rounding alone can make
    grad: Vector  # NaN where it is not usable
    usable: Bool[Array, ""]  # whether value and gradient are finite and those of ``x``; else the memory stays unchanged
    value_and_grad_after: Callable[[Vector], tuple[Scalar, Vector]]
    box: Box | None = None  # flat, for methods with bounds


class Local(NamedTuple):
    """The objective around the current point, in flat vectors of at least single precision."""

    x: Vector
    value: Scalar
    noise: Scalar  # the change of the value that rounding alone can make
    grad: Vector
    hvp: Callable[[Vector], Vector]
    hessian: Callable[[], Matrix]
    value_after: Callable[[Vector], Scalar]
    box: Box | None = None  # flat, for methods with bounds


def second_order(
    kind: type[Any],
    step: Callable[[Any, Local], tuple[Vector, Any]],
    *,
    dense: bool,
    start: Callable[[Vector], dict[str, Any]] = lambda x: {},
    bounds: Bounds | None = None,
) -> SecondOrder:
    """An optax transformation from ``step(state, local) -> (step, state)``; see ``transformation`` for the state.

    A gradient that is not finite changes only the status. With ``bounds`` the step ends inside the box ``local.box``.
    """

    def update(updates: Tree, state: Any, params: Tree | None = None, **extras: Any) -> tuple[Tree, Any]:
        hvp_fn, hessian_fn = extras.pop("hvp_fn", None), extras.pop("hessian_fn", None)
        params, value, grad, fun = _operands(updates, params, extras)
        box = box_of(*bounds, "params", params) if bounds else None
        local = _localize(params, value, grad, fun, hvp_fn, hessian_fn)
        usable = is_finite(value, local.grad)
        grad = choose(usable, local.grad, jnp.full_like(local.grad, jnp.nan))
        vector, after = step(state, local._replace(grad=grad, box=flat(box) if box else None))
        updates = ravel(params)[1](choose(usable, vector, jnp.zeros_like(vector)))
        return stay_inside(box, params, updates) if box else updates, unless_lost(usable, after, state)

    return transformation(DenseSecondOrder if dense else SecondOrder, kind, update, start=start, bounds=bounds)


def first_order(
    kind: type[Any],
    step: Callable[[Any, Slope], tuple[Vector, Scalar, Vector, Any]],
    *,
    start: Callable[[Vector], dict[str, Any]] = lambda x: {},
    bounds: Bounds | None = None,
) -> FirstOrder:
    """An optax transformation from ``step(state, slope) -> (step, value, grad, state)``; see ``transformation``.

    ``value`` and ``grad`` are those after the step, and are stored in ``state.stored``. Where the slope is not usable,
    ``step`` keeps its memory and returns zero. Where the gradient is not finite, or of another point, nothing is
    stored, so that ``optax.value_and_grad_from_state`` evaluates both. With ``bounds`` the step ends inside the box
    ``slope.box``.
    """

    def update(updates: Tree, state: Any, params: Tree | None = None, **extras: Any) -> tuple[Tree, Any]:
        point, value, grad, fun = _operands(updates, params, extras)
        box = box_of(*bounds, "params", point) if bounds else None
        x, unravel = ravel(point)

        def value_and_grad_after(step: Vector) -> tuple[Scalar, Vector]:
            after, grad_after = evaluate(fun, optax.apply_updates(point, unravel(step)))  # rounded as that is
            return after.astype(x.dtype), ravel(grad_after)[0]

        vector, stale = ravel(grad)[0], _is_stale(state.stored, point, value, grad)
        usable = is_finite(value, vector) & ~stale
        slope = Slope(
            x=x,
            value=value.astype(x.dtype),
            noise=noise_of(value).astype(x.dtype),
            grad=jnp.where(usable, vector, jnp.nan),
            usable=usable,
            value_and_grad_after=value_and_grad_after,
            box=flat(box) if box else None,
        )
        vector, after, grad_after, new = step(state, slope)
        updates = unravel(vector)
        nothing = jnp.full_like(after, jnp.inf), jnp.zeros_like(grad_after)
        after, grad_after = choose(usable, (after, grad_after), nothing)
        reached = optax.apply_updates(point, updates)
        stored = Stored(after.astype(state.stored.value.dtype), unravel(grad_after), reached)
        new = new._replace(stored=stored, status=jnp.where(stale, jnp.int32(Status.RUNNING), new.status))
        return stay_inside(box, point, updates) if box else updates, new

    return transformation(FirstOrder, kind, update, start=start, bounds=bounds, stored=nothing_stored)


def transformation(
    protocol: Callable[..., T],
    kind: type[Any],
    update: Callable[..., tuple[Tree, Any]],
    *,
    start: Callable[[Vector], dict[str, Any]],
    bounds: Bounds | None = None,
    stored: Callable[[Tree], Any] = unevaluated,
) -> T:
    """An optax transformation whose state is a named tuple of this ``kind``.

    At first every field is zero, an integer if its name starts with ``num_``, but for ``status``, ``stored`` and those
    that ``start(x)`` gives.
    """

    def init(params: Tree) -> Any:
        if bounds and not is_placeholder(params):
            box_of(*bounds, "params", params)
        # Optax may pass a placeholder without arrays, for which the shapes of the state do not matter.
        x = jnp.zeros(1, jnp.float32) if is_placeholder(params) else ravel(params)[0]
        fields = {name: jnp.asarray(0, jnp.int32 if name.startswith("num_") else x.dtype) for name in kind._fields}
        fields |= {"status": jnp.asarray(Status.RUNNING, jnp.int32), "stored": stored(params)}
        return kind(**fields | start(x))

    return protocol(*wrappable(init, update))


def reused(build: Callable[P, T]) -> Callable[P, T]:
    """``build``, but equal settings return the same transformation, and so use the same compiled solve.

    Arrays cannot be keys of this cache, so settings with an array build another transformation.
    """
    cached: Callable[..., T] = functools.lru_cache(maxsize=64)(build)

    @functools.wraps(build)
    def call(*settings: P.args, **named: P.kwargs) -> T:
        has_arrays = any(isinstance(setting, jax.Array) for setting in (*settings, *named.values()))
        return (build if has_arrays else cached)(*settings, **named)

    return call


def is_finite(value: Scalar, grad: Vector) -> Bool[Array, ""]:
    """Whether a step can start here: the gradient is finite, and the value no NaN. Every value is below infinity."""
    return (value == value) & jnp.all(jnp.isfinite(grad))  # a NaN equals nothing; fewer operations than its negation


def unless_lost(usable: Bool[Array, ""], after: Any, state: Any) -> Any:
    """The state after a step; where the gradient was not usable the one before it, with the status NONFINITE."""

    def leaf(new: Array, old: Array) -> Array:
        return new if new is old else jax.lax.select(usable, new, old)

    lost = state._replace(status=jnp.asarray(Status.NONFINITE, jnp.int32))
    return jax.tree.map(leaf, after, lost)


def _is_stale(stored: Stored, params: Tree, value: Scalar, grad: Tree) -> Bool[Array, ""] | np.ndarray:
    """Whether value and gradient are the stored ones although ``params`` is no longer the stored point.

    That is so where a later transformation of a chain, or a projection, has moved the parameters. If ``grad`` holds the
    very arrays of the state, as in ``minimize``, it is not stale, and nothing is compared.
    """
    pairs = list(zip(jax.tree.leaves(grad), jax.tree.leaves(stored.grad), strict=True))
    if all(one is other for one, other in pairs):
        return np.zeros((), bool)
    moved = [
        jnp.any(jnp.abs(x - p) > 4 * jnp.finfo(x.dtype).eps * jnp.maximum(jnp.abs(x), jnp.abs(p)))
        for x, p in zip(jax.tree.leaves(params), jax.tree.leaves(stored.params), strict=True)
    ]
    same = [jnp.all(one == other) for one, other in pairs]
    value_is = value.astype(stored.value.dtype) == stored.value
    return jnp.any(jnp.stack(moved)) & jnp.all(jnp.stack(same)) & value_is & jnp.isfinite(stored.value)


def evaluate(fun: Objective, params: Tree) -> tuple[Scalar, Tree]:
    """Value and gradient, by the mode that ``fun`` allows."""
    return value_and_grad(trace_objective("fun", fun, params, ()))


def value_and_grad(program: Program) -> tuple[Scalar, Tree]:
    """Value and gradient of a traced objective at its point, by the mode it allows."""
    grad, (value, _) = gradient_of(program, program.x, choose_jacobian(program, "auto"))
    return jnp.asarray(value), grad


def _operands(updates: Tree, params: Tree | None, extras: dict[str, Any]) -> tuple[Tree, Scalar, Tree, Objective]:
    """The checked arguments that every update needs; ``value_fn`` is bound to the extra arguments that it takes."""
    params = _checks.check_point("params", _checks.require_extra("params", params))
    value, grad, value_fn = (extras.pop(name, None) for name in ("value", "grad", "value_fn"))
    value, value_fn = _checks.require_extra("value", value), _checks.require_extra("value_fn", value_fn)
    grad = _checks.check_direction("grad", gradient_for(updates, grad), "params", params)
    return params, jnp.asarray(value), grad, bind_extras(value_fn, extras)


def _localize(params: Tree, value: Scalar, grad: Tree, fun: Objective, hvp_fn: Any, hessian_fn: Any) -> Local:
    """Gather what a step needs; linearizes ``fun`` unless its Hessian products were handed over."""
    x, unravel = ravel(params)
    if hvp_fn is None and hessian_fn is None:
        hvp_fn = linearize_grad(fun, params)[2]

    def product(v: Tree) -> Tree:
        return _checks.require_extra("hvp_fn", hvp_fn)(v)

    def hessian() -> Matrix:
        if hessian_fn is None:
            matrix = side_by_side(map_basis(product, params, "auto"), x.size, x.dtype)
        else:
            matrix = matrix_of("hessian(x)", hessian_fn(params), params).astype(x.dtype)
        return (matrix + matrix.T) / 2

    return Local(
        x=x,
        value=value.astype(x.dtype),
        noise=noise_of(value).astype(x.dtype),
        grad=ravel(grad)[0],
        hvp=lambda v: ravel(product(unravel(v)))[0],
        hessian=hessian,
        value_after=lambda step: jnp.asarray(fun(optax.apply_updates(params, unravel(step))), x.dtype),
    )


def bind_extras(value_fn: Callable[..., Any], extras: dict[str, Any]) -> Callable[[Tree], Any]:
    """``value_fn`` with the extra arguments that it has a parameter for; neighbors in a chain may be sent others."""
    parameters = inspect.signature(value_fn).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        names = {parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_POSITIONAL}
        extras = {name: extra for name, extra in extras.items() if name in names}
    return functools.partial(value_fn, **extras)


def resolved(local: Local, *, by_powers_of_two: bool = False) -> tuple[Local, Vector]:
    """The objective in scaled variables ``d x``, in which no curvature is lost in the rounding of another, and ``d``.

    An eigendecomposition has errors of ``eps`` times the largest eigenvalue. With ``h`` the diagonal of the Hessian
    over its largest entry, in absolute values, ``d = sqrt(clip(h / sqrt(eps), sqrt(eps), 1))``: 1 for a relative
    curvature of at least ``sqrt(eps)``, and smaller ones are raised, by at most ``1 / sqrt(eps)``. Heuristic: these
    bounds, with which a region in ``d x`` is one in ``x`` to a bounded factor, as the theory of trust regions asks.
    With ``d`` ``by_powers_of_two`` a step to a bound is exact in either variables.
    """
    hessian = local.hessian()
    curvature = jnp.abs(jnp.einsum("ii->i", hessian))  # jnp.diagonal would be a gather
    largest = jnp.max(curvature)
    root = float(jnp.finfo(curvature.dtype).eps) ** 0.5
    share = jnp.where(largest > 0, curvature / jnp.where(largest > 0, largest, 1), 1)
    real = curvature.dtype.type
    d = jnp.sqrt(jax.lax.clamp(real(root), share / real(root), real(1)))
    if by_powers_of_two:
        d = d / (2 * jnp.frexp(d)[0])
    scaled = local._replace(
        x=d * local.x,
        grad=local.grad / d,
        hvp=lambda v: local.hvp(v / d) / d,
        hessian=lambda: hessian / (d[:, None] * d[None, :]),
        value_after=lambda step: local.value_after(step / d),
    )
    return scaled, d


def noise_of(value: Scalar) -> Scalar:
    """The change of the value that rounding alone can make."""
    return _NOISE * jnp.finfo(value.dtype).eps * jnp.abs(value)


def choose(condition: Bool[Array, " *shape"], new: Any, old: Any) -> Any:
    """``jnp.where`` of trees whose leaves agree in shape and dtype, a third of its operations."""
    return jax.tree.map(functools.partial(jax.lax.select, condition), new, old)
