"""One compiled loop that drives any optax transformation to a point where the gradient vanishes, or says why not."""

import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._types import MinimizeResult, Objective, Status, Tree, ravel
from curvature.optimizers._bounded import Resolved, resolve_bounded, start_within
from curvature.optimizers._bounds import Box, box_of, projected_gradient_norm
from curvature.optimizers._newton import newton
from curvature.optimizers._protocol import (
    DenseSecondOrder,
    FirstOrder,
    SecondOrder,
    Stored,
    WithStatus,
    evaluate,
    noise_of,
    value_and_grad,
)
from curvature.optimizers._trust_region import trust_region
from curvature.transforms._compositions import linearize_program, trace_objective
from curvature.transforms._modes import Program, choose_composition, num_entries

Method = str | optax.GradientTransformation

_METHODS: dict[str, Callable[[], SecondOrder]] = {
    "newton": newton,
    "trust-region": lambda: trust_region("cg"),
    "trust-exact": lambda: trust_region("exact"),
}
_DENSE_ENTRIES = 100  # up to here "auto" forms the Hessian
_PATIENCE = 10  # steps without a lower value or a smaller gradient, beyond rounding, before a method has stalled


class MinimizeStep(NamedTuple):
    """What the callback of ``minimize`` is told at each iterate.

    Attributes:
        num_steps: the steps taken so far.
        value: the objective.
        grad_norm: the largest absolute entry of its gradient; with bounds of the projected one.
        state: the state of the method: what the step that led here has left, and what the next one starts from.
    """

    num_steps: Int[Array, ""]
    value: Float[Array, ""]
    grad_norm: Float[Array, ""]
    state: Any


class _Point(NamedTuple):
    x: Tree
    value: Float[Array, ""]
    grad: Tree
    grad_norm: Float[Array, ""]
    noise: Float[Array, ""]


class _Loop(NamedTuple):
    x: Tree
    state: Any
    best: _Point
    tolerance: Float[Array, ""]
    num_steps: Int[Array, ""]
    idle_steps: Int[Array, ""]
    status: Int[Array, ""]


def minimize(
    fun: Objective,
    x0: Tree,
    args: Any = (),
    *,
    method: Method = "auto",
    gtol: ArrayLike | None = None,
    rtol: ArrayLike = 0.0,
    max_steps: ArrayLike = 1000,
    hessian: Callable[..., Tree] | None = None,
    bounds: tuple[Tree, Tree] | None = None,
    callback: Callable[[MinimizeStep], None] | None = None,
) -> MinimizeResult:
    """Minimize ``fun(x, *args)`` from ``x0`` in one compiled loop.

    Converged means ``max|grad| <= gtol + rtol * max|grad at x0|`` at the returned point, and nothing else is called
    success. The program is compiled once for each ``fun``, method and shape; data, tolerances and ``max_steps`` are
    operands. It runs under ``jit`` and under ``vmap``, where each lane stops by itself with a status of its own.

    Args:
        fun: the objective, ``fun(x, *args) -> scalar``; pure, as for ``jit``.
        x0: where to start, any tree of floating arrays.
        args: data for ``fun``: a tuple, or one argument that is not a tuple.
        method: ``"trust-exact"``, ``"trust-region"`` (by conjugate gradients), ``"newton"``, any optax transformation,
            or ``"auto"``: exact up to 100 entries, by conjugate gradients beyond.
        gtol: the absolute tolerance; ``None`` is the square root of the rounding unit of ``x0``: 1.5e-8 in double
            precision, 3.5e-4 in single.
        rtol: the tolerance relative to the first gradient; with ``gtol=0`` it makes the test independent of scale.
        max_steps: the most steps.
        hessian: ``hessian(x, *args)`` forms the Hessian, as ``curvature.hessian(fun)`` would, for the methods that form
            one; then ``fun`` needs no second derivative.
        bounds: ``(lower, upper)``, each a tree like ``x0`` or a prefix of one, where a number stands for all entries
            below it; ``None`` and infinities are no bound. ``x0`` is projected into the box, which no iterate and no
            trial point leaves, and converged means that the projected gradient passes,
            ``max|P(x - grad) - x| <= gtol + rtol * (the same at x0)``. For ``"trust-exact"``, ``"trust-region"`` and
            ``"auto"``, which become ``projected_newton``, and ``"l-bfgs"``, which becomes ``lbfgsb``. Bounds are
            operands too.
        callback: called on the host with a ``MinimizeStep`` at every iterate, the first and the last included. Not for
            ``vmap``, where it would be called for lanes that have stopped.

    Returns:
        A ``MinimizeResult``: the point that passed the test or, on failure, the best one seen, with its value and
        gradient; ``status`` says which, ``success`` and ``message`` say it in other words.

    Raises:
        TypeError: when ``fun`` is not callable or not scalar, ``bounds`` is no pair, a leaf of ``x0`` is not of a real
            floating dtype, or no composition of modes can differentiate ``fun``.
        ValueError: when ``x0`` is known to hold NaN or infinity, when the method is unknown or has no use for
            ``hessian`` or ``bounds``, bounds do not match ``x0`` or cross, or a number is out of range.

    Cost: for each step one linearization of the gradient and what the method adds; the objective is evaluated once
        more for each point the method tries. The optax transformations take a gradient a step, or none where a line
        search has stored it.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> def rosenbrock(x, scale):
        ...     return scale * jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
        >>> result = curvature.minimize(rosenbrock, jnp.zeros(3), (1e-3,), gtol=0, rtol=1e-5)
        >>> bool(result.success), jnp.round(result.x, 2)
        (True, Array([1., 1., 1.], dtype=float32))
        >>> result = curvature.minimize(rosenbrock, jnp.zeros(3), (1.0,), bounds=(None, 0.5))
        >>> bool(result.success), jnp.round(result.x, 2)
        (True, Array([0.5 , 0.26, 0.07], dtype=float32))

    References: Conn, Gould and Toint, Trust-Region Methods (2000), section 12.1.4, doi:10.1137/1.9780898719857, and
        Byrd, Lu, Nocedal and Zhu (1995), equation (6.1), doi:10.1137/0916069, for the projected gradient.
    """
    _checks.check_callable("minimize", "fun", fun)
    x0 = _checks.check_point("minimize", "x0", x0)
    _checks.check_entries("minimize", "x0", x0)
    _checks.check_finite("minimize", "x0", x0)
    args = args if type(args) is tuple else (args,)
    _checks.check_data("minimize", args)
    gtol = _default_gtol(x0) if gtol is None else gtol
    for name, tolerance in {"gtol": gtol, "rtol": rtol}.items():
        _checks.check_nonnegative("minimize", name, tolerance)
    _checks.check_count("minimize", "max_steps", max_steps)
    for name, function in {"hessian": hessian, "callback": callback}.items():
        if function is not None:
            _checks.check_callable("minimize", name, function)
    if bounds is None:
        resolved, box = _resolve(method, x0, hessian is not None), None
    else:
        resolved = resolve_bounded(method, num_entries(x0) <= _DENSE_ENTRIES, hessian is not None)
        box = box_of("minimize", *_checks.check_pair_of_bounds("minimize", bounds), "x0", x0)
    x0 = jax.tree.map(_strongly_typed, x0)
    dtype = _dtype_of_vector(x0)
    limits = _Limits(_operand(gtol, dtype), _operand(rtol, dtype), _operand(max_steps, jnp.int32))
    return _compiled(fun)(x0, args, limits, box, method=resolved, hessian=hessian, callback=callback)


class _Limits(NamedTuple):
    """Arrays, whatever numbers the user gave, so that other numbers find the same program."""

    gtol: Float[Array, ""]
    rtol: Float[Array, ""]
    max_steps: Int[Array, ""]


def _operand(number: ArrayLike, dtype: Any) -> Any:
    """The number in that dtype; by NumPy if it is not in JAX's hands, for a kernel takes longer than a small solve."""
    return jnp.asarray(number, dtype) if isinstance(number, jax.Array) else np.asarray(number, dtype)


def _strongly_typed(leaf: Array) -> Array:
    return jax.lax.convert_element_type(leaf, leaf.dtype) if jax.typeof(leaf).weak_type else leaf


def _dtype_of_vector(x: Tree) -> Any:
    """The dtype of ``ravel(x)``, without forming it."""
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, (leaf.dtype for leaf in jax.tree.leaves(x)), jnp.float32)


def _default_gtol(x0: Tree) -> float:
    return max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x0)) ** 0.5


def _resolve(method: Method, x0: Tree, has_hessian: bool) -> optax.GradientTransformation:
    if isinstance(method, optax.GradientTransformation):
        transformation = method
    else:
        _checks.check_method("minimize", method, ("auto", *_METHODS))
        small = num_entries(x0) <= _DENSE_ENTRIES
        automatic = "trust-exact" if has_hessian or small else "trust-region"
        transformation = _METHODS[automatic if method == "auto" else method]()
    if has_hessian:
        _checks.check_hessian_used("minimize", method, isinstance(transformation, DenseSecondOrder))
    return transformation


# A cache and nothing else: it is never read but for the very function that put its program there.
_PROGRAMS: weakref.WeakKeyDictionary[Objective, Callable[..., MinimizeResult]] = weakref.WeakKeyDictionary()


def _compiled(fun: Objective) -> Callable[..., MinimizeResult]:
    """The compiled loop of an objective, found again as long as the objective lives, and not kept any longer.

    What cannot be looked up, a bound method (made anew at each mention) or a callable that holds arrays, is compiled at
    every call.
    """
    static = ("method", "hessian", "callback")
    try:
        if fun not in _PROGRAMS:
            _PROGRAMS[fun] = jax.jit(functools.partial(_run_alive, weakref.ref(fun)), static_argnames=static)
        return _PROGRAMS[fun]
    except TypeError:  # not hashable, or not weakly referable
        return jax.jit(functools.partial(_run, fun), static_argnames=static)


def _run_alive(reference: Callable[[], Any], *operands: Any, **how: Any) -> MinimizeResult:
    return _run(reference(), *operands, **how)


def _run(
    fun: Objective,
    x0: Tree,
    args: tuple[Any, ...],
    limits: _Limits,
    box: Box | None,
    *,
    method: Resolved,
    hessian: Callable[..., Tree] | None,
    callback: Callable[[MinimizeStep], None] | None,
) -> MinimizeResult:
    """The loop itself; data and limits are operands, so that new ones find the program they need."""
    transformation, x0 = start_within(box, method, x0)
    has_status = isinstance(transformation, WithStatus)
    update_fn: Callable[..., tuple[Tree, Any]] = optax.with_extra_args_support(transformation).update

    def value_fn(x: Tree) -> Any:
        return fun(x, *args)

    def advance(loop: _Loop) -> _Loop:
        point, extras = _evaluate(fun, args, hessian, loop, transformation)
        if box is not None:
            grad_norm = projected_gradient_norm(box, point.x, point.grad)
            point = point._replace(grad_norm=grad_norm.astype(point.grad_norm.dtype))
        if callback is not None:
            jax.debug.callback(callback, MinimizeStep(loop.num_steps, point.value, point.grad_norm, loop.state))
        loop = _judge(loop, point, limits, has_status)

        def update(loop: _Loop) -> _Loop:
            updates, state = update_fn(point.grad, loop.state, loop.x, grad=point.grad, value_fn=value_fn, **extras)
            status = state.status if has_status else loop.status
            moved = (status == Status.RUNNING).astype(jnp.int32)
            x = optax.apply_updates(loop.x, updates)
            return loop._replace(x=x, state=state, status=status, num_steps=loop.num_steps + moved)

        return jax.lax.cond(loop.status == Status.RUNNING, update, lambda loop: loop, loop)

    state: Any = transformation.init(x0)
    if isinstance(transformation, FirstOrder):
        state = state._replace(stored=Stored(*evaluate("minimize", value_fn, x0)))
    start = _start(state, x0, limits)
    loop = jax.lax.while_loop(lambda loop: loop.status == Status.RUNNING, advance, start)
    return MinimizeResult(loop.best.x, loop.best.value, loop.best.grad, loop.num_steps, loop.status)


def _start(state: Any, x0: Tree, limits: _Limits) -> _Loop:
    """The loop before the first evaluation; the tolerance is ``gtol`` until the first gradient is known."""
    zero = jnp.asarray(0, jnp.int32)
    infinity = jnp.full_like(limits.gtol, jnp.inf)
    return _Loop(
        x=x0,
        state=state,
        best=_Point(x0, infinity, jax.tree.map(jnp.zeros_like, x0), infinity, infinity),
        tolerance=limits.gtol,
        num_steps=zero,
        idle_steps=zero,
        status=jnp.asarray(Status.RUNNING, jnp.int32),
    )


def _evaluate(
    fun: Objective,
    args: tuple[Any, ...],
    hessian: Callable[..., Tree] | None,
    loop: _Loop,
    transformation: optax.GradientTransformation,
) -> tuple[_Point, dict[str, Any]]:
    """The objective at the current point, once, and what else the method's update takes."""
    extras: dict[str, Any] = {}
    if isinstance(transformation, FirstOrder):
        value, grad = loop.state.stored
        return _point(loop, value, grad), {"value": value}
    program = trace_objective("minimize", "fun", fun, loop.x, args)
    if hessian is not None:
        value, grad = value_and_grad("minimize", program)
        extras["hessian_fn"] = lambda x: hessian(x, *args)
    elif isinstance(transformation, SecondOrder):
        composition = choose_composition("minimize", program, "auto")
        value, grad, extras["hvp_fn"], _ = linearize_program(program, composition)
    else:
        value, grad = _stored_or_fresh(program, loop)
    extras["value"] = value = jnp.asarray(value)
    return _point(loop, value, grad), extras


def _point(loop: _Loop, value: Float[Array, ""], grad: Tree) -> _Point:
    dtype = loop.tolerance.dtype
    grad_norm = jnp.max(jnp.abs(ravel(grad)[0]))
    return _Point(loop.x, value.astype(dtype), grad, grad_norm, noise_of(value).astype(dtype))


def _stored_or_fresh(program: Program, loop: _Loop) -> tuple[Float[Array, ""], Tree]:
    """Value and gradient, from the state if a line search that comes last has left those of the point it chose.

    Of one that does not come last they are not: what follows it in the chain changes the step.
    """
    last = loop.state
    while isinstance(last, tuple) and last and not hasattr(last, "_fields"):
        last = last[-1]
    value, grad = getattr(last, "value", None), getattr(last, "grad", None)
    if value is None or jax.tree.structure(grad) != jax.tree.structure(loop.x):
        return value_and_grad("minimize", program)
    dtype = program.out.dtype
    return jax.lax.cond(
        jnp.isfinite(value), lambda: (jnp.asarray(value, dtype), grad), lambda: value_and_grad("minimize", program)
    )


def _judge(loop: _Loop, point: _Point, limits: _Limits, has_status: bool) -> _Loop:
    """Update the best point and the status: is it converged, out of steps, stuck, or broken?

    Stuck is asked only of methods that descend at every step; others may wander and recover.
    """
    first = loop.best.value == jnp.inf
    tolerance = loop.tolerance + jnp.where(first, limits.rtol * point.grad_norm, 0)
    finite = jnp.isfinite(point.value) & jnp.isfinite(point.grad_norm)
    converged = finite & (point.grad_norm <= tolerance)

    noise = jnp.where(first, 0, loop.best.noise)
    lower = point.value < loop.best.value - noise
    flatter = (point.value <= loop.best.value + noise) & (point.grad_norm < loop.best.grad_norm)
    better = finite & (lower | flatter)
    best = jax.tree.map(lambda new, old: jnp.where(better | converged | first, new, old), point, loop.best)
    idle_steps = jnp.where(better, 0, loop.idle_steps + 1)

    status = jnp.where(loop.num_steps >= limits.max_steps, Status.MAX_STEPS, Status.RUNNING)
    if has_status:
        status = jnp.where(idle_steps >= _PATIENCE, Status.STALLED, status)
    status = jnp.where(finite, status, jnp.where(first, Status.NONFINITE_START, Status.NONFINITE))
    status = jnp.where(converged, Status.CONVERGED, status).astype(jnp.int32)
    return loop._replace(best=best, tolerance=tolerance, idle_steps=idle_steps, status=status)
