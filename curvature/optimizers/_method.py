"""Shared by the optimizers: the optax protocol with a status, and the objective around the current point."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._numerics import norm
from curvature._trees import ravel
from curvature._types import Matrix, Objective, Scalar, Status, Tree, Vector
from curvature.optimizers._wrappers import gradient_for, is_placeholder, wrappable
from curvature.programs._traced import Program
from curvature.transforms._blocks import matrix_of, side_by_side
from curvature.transforms._compositions import trace_objective
from curvature.transforms._hessian import linearize_grad
from curvature.transforms._jacobian import gradient_of, map_basis
from curvature.transforms._modes import choose_jacobian

_NOISE = 10  # a change of fewer roundings of the value decides nothing: Conn, Gould and Toint (2000), section 17.4.2
_SHRINK = (0.1, 0.5)  # a rejected step is cut to a length between these shares of it
MAX_TRIALS = 40


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
    """What ``optax.value_and_grad_from_state`` looks for in a state, with nothing in it.

    The value is infinite, which has optax evaluate both afresh: the gradient at the new point comes with the
    linearization that the next update makes there, so an update has none to leave behind.
    """

    value: Float[Array, ""]
    grad: Tree


def unevaluated(params: Tree) -> Unevaluated:
    """Nothing stored, in the shapes of what could be; the value in the dtype of the parameters, as optax has it."""
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
        dtype = jnp.result_type(*jax.tree.leaves(params) or [jnp.float32])  # map_params passes a tree without leaves
    return Unevaluated(jnp.asarray(jnp.inf, dtype), jax.tree.map(jnp.zeros_like, params))


class Stored(NamedTuple):
    """Value and gradient at the point that an update chose, where ``optax.value_and_grad_from_state`` finds them.

    ``params`` is that point: what comes later in a chain, or a projection, may have led to another.
    """

    value: Float[Array, ""]
    grad: Tree
    params: Tree


def nothing_stored(params: Tree) -> Stored:
    """No value, gradient or point, in the shapes of what could be."""
    return Stored(*unevaluated(params), jax.tree.map(jnp.zeros_like, params))


class Slope(NamedTuple):
    """The objective around the current point to first order, in flat vectors of at least single precision."""

    x: Vector
    value: Scalar
    noise: Scalar  # the change of the value that rounding alone can make
    grad: Vector  # NaN where it is not usable
    usable: Bool[Array, ""]  # whether value and gradient are finite and those of ``x``; else the memory stays unchanged
    value_and_grad_after: Callable[[Vector], tuple[Scalar, Vector]]


class Local(NamedTuple):
    """The objective around the current point, in flat vectors of at least single precision."""

    x: Vector
    value: Scalar
    noise: Scalar  # the change of the value that rounding alone can make
    grad: Vector
    hvp: Callable[[Vector], Vector]
    hessian: Callable[[], Matrix]
    value_after: Callable[[Vector], Scalar]


def second_order(
    init: Callable[[Vector, Tree], Any], step: Callable[[Any, Local], tuple[Vector, Any]], *, dense: bool
) -> SecondOrder:
    """An optax transformation from ``init(x, params) -> state`` and ``step(state, local) -> (step, state)``."""
    functions = wrappable(functools.partial(at_start, init), functools.partial(second_order_update, step))
    return (DenseSecondOrder if dense else SecondOrder)(*functions)


def second_order_update(
    step: Callable[[Any, Local], tuple[Vector, Any]],
    updates: Tree,
    state: Any,
    params: Tree | None = None,
    *,
    value: Any = None,
    grad: Tree | None = None,
    value_fn: Callable[..., Any] | None = None,
    hvp_fn: Callable[[Tree], Tree] | None = None,
    hessian_fn: Callable[[Tree], Tree] | None = None,
    **extra_args: Any,
) -> tuple[Tree, Any]:
    """The ``update`` of ``second_order``; a gradient that is not finite changes nothing but the status."""
    params, value, grad, fun = _operands(updates, params, value, grad, value_fn, extra_args)
    local = _localize(params, value, grad, fun, hvp_fn, hessian_fn)
    usable = is_finite(value, local.grad)
    vector, after = step(state, local._replace(grad=choose(usable, local.grad, jnp.full_like(local.grad, jnp.nan))))
    return ravel(params)[1](choose(usable, vector, jnp.zeros_like(vector))), unless_lost(usable, after, state)


def first_order(
    init: Callable[[Vector, Tree], Any], step: Callable[[Any, Slope], tuple[Vector, Scalar, Vector, Any]]
) -> FirstOrder:
    """An optax transformation from ``init(x, params)`` and ``step(state, slope) -> (step, value, grad, state)``.

    ``value`` and ``grad`` are those after the step, and end in ``state.stored``, where ``init`` leaves
    ``nothing_stored``. Where the slope is not usable, ``step`` keeps its memory and stays.
    """
    functions = wrappable(functools.partial(at_start, init), functools.partial(first_order_update, step))
    return FirstOrder(*functions)


def first_order_update(
    step: Callable[[Any, Slope], tuple[Vector, Scalar, Vector, Any]],
    updates: Tree,
    state: Any,
    params: Tree | None = None,
    *,
    value: Any = None,
    grad: Tree | None = None,
    value_fn: Callable[..., Any] | None = None,
    **extra_args: Any,
) -> tuple[Tree, Any]:
    """The ``update`` of ``first_order``.

    Where the gradient is not finite, or of another point, the step is zero and nothing is stored, so that
    ``optax.value_and_grad_from_state`` evaluates afresh.
    """
    point, value, grad, fun = _operands(updates, params, value, grad, value_fn, extra_args)
    x, unravel = ravel(point)

    def value_and_grad_after(step: Vector) -> tuple[Scalar, Vector]:
        after, grad_after = evaluate(fun, optax.apply_updates(point, unravel(step)))  # rounded as that is
        return after.astype(x.dtype), ravel(grad_after)[0]

    vector, stale = ravel(grad)[0], _is_stale(state.stored, point, value, grad)
    usable = is_finite(value, vector) & ~stale
    vector = jnp.where(usable, vector, jnp.nan)
    slope = Slope(x, value.astype(x.dtype), noise_of(value).astype(x.dtype), vector, usable, value_and_grad_after)
    vector, after, grad_after, new = step(state, slope)
    updates = unravel(vector)
    after, grad_after = choose(usable, (after, grad_after), (jnp.full_like(after, jnp.inf), jnp.zeros_like(grad_after)))
    stored = Stored(after.astype(state.stored.value.dtype), unravel(grad_after), optax.apply_updates(point, updates))
    return updates, new._replace(stored=stored, status=jnp.where(stale, jnp.int32(Status.RUNNING), new.status))


def at_start(init: Callable[[Vector, Tree], Any], params: Tree) -> Any:
    """``init(x, params)``; a placeholder for the parameters has no entries, and a state for it no shapes that count."""
    return init(jnp.zeros(1, jnp.float32) if is_placeholder(params) else ravel(params)[0], params)


def is_finite(value: Scalar, grad: Vector) -> Bool[Array, ""]:
    """Whether there is a step from here: an infinite value is one that any other is below."""
    return (value == value) & jnp.all(jnp.isfinite(grad))  # a NaN equals nothing; fewer operations than its negation


def unless_lost(usable: Bool[Array, ""], after: Any, state: Any) -> Any:
    """The state after a step, or, where the gradient was not usable, the one before it, which says so."""

    def leaf(new: Array, old: Array) -> Array:
        return new if new is old else jax.lax.select(usable, new, old)

    lost = state._replace(status=jnp.asarray(Status.NONFINITE, jnp.int32))
    return jax.tree.map(leaf, after, lost)


def _is_stale(stored: Stored, params: Tree, value: Scalar, grad: Tree) -> Bool[Array, ""] | np.ndarray:
    """Whether value and gradient were taken from the state while the parameters have gone elsewhere since.

    That is so where something follows in a chain, or projects the parameters. Whoever passes the very arrays of the
    state, as ``minimize`` does, has gone to its point.
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


def _operands(
    updates: Tree,
    params: Tree | None,
    value: Any,
    grad: Tree | None,
    value_fn: Callable[..., Any] | None,
    extra_args: dict[str, Any],
) -> tuple[Tree, Scalar, Tree, Callable[[Tree], Any]]:
    """The checked arguments that every update needs; ``value_fn`` is bound to the extra arguments that it takes."""
    params = _checks.check_point("params", _checks.require_extra("params", params))
    value = _checks.require_extra("value", value)
    value_fn = _checks.require_extra("value_fn", value_fn)
    grad = _checks.check_direction("grad", gradient_for(updates, grad), "params", params)
    return params, jnp.asarray(value), grad, bind_extras(value_fn, extra_args)


def _localize(
    params: Tree,
    value: Scalar,
    grad: Tree,
    fun: Callable[[Tree], Any],
    hvp_fn: Callable[[Tree], Tree] | None,
    hessian_fn: Callable[[Tree], Tree] | None,
) -> Local:
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


def first_length(local: Slope | Local, slope: Scalar) -> Scalar:
    """A guess of how long a first step may be: a hundredth of ``norm(x)``, or of ``abs(f) / norm(g)`` where ``x = 0``.

    ``slope`` is ``norm(g)``.
    Both follow the units of ``x`` and of ``f``. Without either it is a hundredth. Heuristic: a length that is too short
    costs a few evaluations, one that is too long may end on a plateau, which is why a step of this length must be one
    that the model foresees.
    """
    size = norm(local.x)
    unit = jnp.where(size > 0, size, jnp.abs(local.value) / slope)
    return jnp.where((unit > 0) & jnp.isfinite(unit), unit, 1) / 100


def shortest_radius(local: Slope | Local) -> Scalar:
    """Below this ``grad / radius`` overflows: a subproblem in a smaller region would be NaN, though nothing else is."""
    limits = jnp.finfo(local.grad.dtype)
    return limits.tiny + 8 * local.grad.size * (norm(local.grad) / limits.max)


def resolved(local: Local, *, by_powers_of_two: bool = False) -> tuple[Local, Vector]:
    """The objective in variables ``d x`` in which no curvature drowns in the rounding of another, and ``d``.

    An eigendecomposition knows eigenvalues to ``eps`` of the largest. With ``h`` the diagonal of the Hessian over its
    largest entry, in absolute values, ``d = sqrt(clip(h / sqrt(eps), sqrt(eps), 1))``: where the variables differ by
    less than ``h = sqrt(eps)`` it is 1, and beyond it brings those that hardly curve back to there. The bounds are our
    own choice; a region in ``d x`` stays one in ``x`` to a bounded factor, as the theory of trust regions asks. With
    ``d`` ``by_powers_of_two`` a step to a bound is exact in either variables.
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


def hides(local: Slope | Local, step: Vector, value: Scalar) -> Bool[Array, ""]:
    """Whether the value is the same after a step so short that the difference may be lost inside the objective.

    ``log(1 + r^2)`` is 0 for every ``abs(r) < sqrt(eps)``, and the rounding of 0 says nothing of it. This step
    is to be judged by the gradient it leads to, and so is accepted: of at most ``sqrt(eps) norm(x)``.
    """
    root = float(jnp.finfo(step.dtype).eps) ** 0.5
    return (value == local.value) & (norm(step) <= root * norm(local.x))


def shrink_factor(value: Scalar, slope: Scalar, trial: Scalar) -> Scalar:
    """The share of a rejected step to try next: the minimizer of the parabola through what is known along it.

    ``slope`` is the gradient times the step. N&W (3.57), kept within ``_SHRINK``, whose lesser end serves a trial that
    is NaN or infinite.
    """
    low, high = map(slope.dtype.type, _SHRINK)
    factor = -slope / (2 * (trial - value - slope))
    return jnp.where(jnp.isfinite(factor) & jnp.isfinite(trial), jax.lax.clamp(low, factor, high), low)


def trial_status(accepted: Bool[Array, ""], trial: Scalar, model: Scalar) -> Int[Array, ""]:
    """The status of an update from its last trial value and from what the model promised for it."""
    running, stalled, nonfinite, unbounded = map(
        np.int32, (Status.RUNNING, Status.STALLED, Status.NONFINITE, Status.UNBOUNDED)
    )
    failed = jax.lax.select(trial == -jnp.inf, unbounded, jax.lax.select(jnp.isnan(model), nonfinite, stalled))
    return jax.lax.select(accepted, jnp.asarray(running), failed)


def choose(condition: Bool[Array, " *shape"], new: Any, old: Any) -> Any:
    """``jnp.where`` of trees whose leaves agree in shape and dtype, a third of its operations."""
    return jax.tree.map(functools.partial(jax.lax.select, condition), new, old)


def search_status(
    accepted: Bool[Array, ""], remembers: Bool[Array, ""], value: Scalar, slope: Scalar
) -> Int[Array, ""]:
    """The status of a quasi-Newton update: a failed search is the end only if there is no memory left to drop."""
    status = trial_status(accepted, value, slope)
    return jnp.where((status == Status.STALLED) & remembers, Status.RUNNING, status).astype(jnp.int32)
