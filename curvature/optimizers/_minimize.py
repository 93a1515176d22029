"""One compiled loop that drives any optax transformation to a point where the gradient vanishes, or says why not."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._types import MinimizeResult, Objective, Status, Tree, ravel
from curvature.optimizers._bfgs import bfgs
from curvature.optimizers._cubic_newton import cubic_newton
from curvature.optimizers._implicit import implicit_minimizer, lift_objective
from curvature.optimizers._lbfgs import lbfgs
from curvature.optimizers._newton import newton
from curvature.optimizers._newton_cg import newton_cg
from curvature.optimizers._programs import compiled
from curvature.optimizers._progress import Watch, close, observe, start_watch
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
from curvature.optimizers._sr1 import sr1
from curvature.optimizers._trust_region import trust_region
from curvature.transforms._compositions import linearize_program, trace_objective
from curvature.transforms._modes import Program, choose_composition, num_entries

Method = str | optax.GradientTransformation

_METHODS: dict[str, Callable[[], WithStatus]] = {
    "bfgs": bfgs,
    "l-bfgs": lbfgs,
    "sr1": sr1,
    "newton": newton,
    "newton-cg": newton_cg,
    "cubic-newton": cubic_newton,
    "trust-region": lambda: trust_region("gltr"),
    "trust-exact": lambda: trust_region("exact"),
}
_DENSE_ENTRIES = 100  # up to here "auto" forms the Hessian
_PATIENCE = 10  # steps without a lower value or a smaller gradient, beyond rounding, before a method has stalled


class MinimizeStep(NamedTuple):
    """What the callback of ``minimize`` is told at each iterate.

    Attributes:
        num_steps: the steps taken so far.
        value: the objective.
        grad_norm: the largest absolute entry of its gradient.
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


class Loop(NamedTuple):
    """Where a solve stands: ``minimize`` carries it from step to step, ``minimize_batched`` from block to block."""

    x: Tree
    state: Any
    best: _Point
    tolerance: Float[Array, ""]
    num_steps: Int[Array, ""]
    idle_steps: Int[Array, ""]
    status: Int[Array, ""]
    watch: Watch = Watch()


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
    callback: Callable[[MinimizeStep], None] | None = None,
    history: bool = False,
    progress: bool = False,
) -> MinimizeResult:
    """Minimize ``fun(x, *args)`` from ``x0`` in one compiled loop.

    Converged means ``max|grad| <= gtol + rtol * max|grad at x0|`` at the returned point, and nothing else is called
    success. The program is compiled once for each ``fun``, method and shape; data, tolerances and ``max_steps`` are
    operands. It runs under ``jit`` and under ``vmap``, where each lane stops by itself with a status of its own.

    The solution, not the iteration, is differentiated, in forward and reverse mode and to any order, by ``args`` and by
    what ``fun`` closes over: ``x`` by ``H dx = -(d grad f / d args) d args`` with the Hessian ``H`` at ``x``, as the
    implicit function theorem has it, and ``value`` at fixed ``x``, by the envelope theorem. ``grad`` stays zero at a
    minimizer, so its derivative is zero, and so are those by ``x0`` and the tolerances. All of this holds for a point
    that passed the test; at any other the formulas are evaluated all the same.

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
        callback: called on the host with a ``MinimizeStep`` at every iterate, the first and the last included. Not for
            ``vmap``, where it would be called for lanes that have stopped.
        history: whether to keep value and gradient norm of every point in ``result.history``. It holds two numbers for
            each of ``max_steps + 1`` points, whatever the steps taken, so ``max_steps`` is static then.
        progress: whether to write a line on standard error that says how far the gradient has come. The loop asks the
            host, at first after a few steps and then about twice a second, and when to be asked again. Not for
            ``vmap``.

    Returns:
        A ``MinimizeResult``: the point that passed the test or, on failure, the best one seen, with its value and
        gradient; ``status`` says which, ``success`` and ``message`` say it in other words.

    Raises:
        TypeError: when ``fun`` is not callable or not scalar, when a leaf of ``x0`` is not of a real floating dtype, or
            when no composition of modes can differentiate ``fun``.
        ValueError: when ``x0`` is known to hold NaN or infinity, when the method is unknown or has no use for
            ``hessian``, or a number is out of range.

    Cost: for each step one linearization of the gradient and what the method adds; the objective is evaluated once
        more for each point the method tries. The optax transformations take a gradient a step, or none where a line
        search has stored it. Of derivatives: one factorization of the Hessian, or beyond 1,000 entries one iterative
        solve for each direction; nothing before they are asked for.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> def rosenbrock(x, scale):
        ...     return scale * jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)
        >>> result = curvature.minimize(rosenbrock, jnp.zeros(3), (1e-3,), gtol=0, rtol=1e-5)
        >>> bool(result.success), jnp.round(result.x, 2)
        (True, Array([1., 1., 1.], dtype=float32))
    """
    _checks.check_callable("minimize", "fun", fun)
    x0 = _checks.check_point("minimize", "x0", x0)
    _checks.check_entries("minimize", "x0", x0)
    _checks.check_finite("minimize", "x0", x0)
    args = args if type(args) is tuple else (args,)
    _checks.check_data("minimize", args)
    for name, function in {"hessian": hessian, "callback": callback}.items():
        if function is not None:
            _checks.check_callable("minimize", name, function)
    limits = limits_of("minimize", x0, gtol, rtol, max_steps)
    most_steps: Any = max_steps
    if history:
        _checks.check_static_count("minimize", "max_steps", most_steps, least=0)
    transformation = resolve("minimize", method, x0, hessian)
    x0 = jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype), x0)  # drops weak types
    return compiled(_run, fun)(
        x0, args, limits, transformation=transformation, hessian=hessian, callback=callback,
        history_length=int(most_steps) + 1 if history else 0, progress=bool(progress),
    )  # fmt: skip


class Limits(NamedTuple):
    """Arrays, whatever numbers the user gave, so that other numbers find the same program."""

    gtol: Float[Array, ""]
    rtol: Float[Array, ""]
    max_steps: Int[Array, ""]


def limits_of(function: str, x0: Tree, gtol: ArrayLike | None, rtol: ArrayLike, max_steps: ArrayLike) -> Limits:
    """The limits, checked; ``gtol=None`` is the square root of the rounding unit."""
    if gtol is None:
        gtol = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x0)) ** 0.5
    for name, tolerance in {"gtol": gtol, "rtol": rtol}.items():
        _checks.check_nonnegative(function, name, tolerance)
    _checks.check_count(function, "max_steps", max_steps)
    dtype = ravel(x0)[0].dtype
    return Limits(jnp.asarray(gtol, dtype), jnp.asarray(rtol, dtype), jnp.asarray(max_steps, jnp.int32))


def resolve(
    function: str, method: Method, x0: Tree, hessian: Callable[..., Tree] | None
) -> optax.GradientTransformation:
    """The transformation that a method names."""
    if isinstance(method, optax.GradientTransformation):
        transformation = method
    else:
        _checks.check_method(function, method, ("auto", *_METHODS))
        small = num_entries(x0) <= _DENSE_ENTRIES
        automatic = "trust-exact" if hessian is not None or small else "trust-region"
        transformation = _METHODS[automatic if method == "auto" else method]()
    if hessian is not None:
        _checks.check_hessian_used(function, method, isinstance(transformation, DenseSecondOrder))
    return transformation


def _run(
    fun: Objective,
    x0: Tree,
    args: tuple[Any, ...],
    limits: Limits,
    *,
    transformation: optax.GradientTransformation,
    hessian: Callable[..., Tree] | None,
    callback: Callable[[MinimizeStep], None] | None,
    history_length: int,
    progress: bool,
) -> MinimizeResult:
    """The whole solve; data and limits are operands, so that new ones find the program they need.

    Derivatives are taken of the solution, so nothing that goes through the loop has any.
    """
    objective, operands = lift_objective("minimize", fun, x0, args)
    x0, args, limits, data = jax.lax.stop_gradient((x0, args, limits, operands))
    value_fn = functools.partial(_at, objective, data)
    advance = stepper(value_fn, args, limits, transformation, hessian, callback)
    start = start_loop(value_fn, x0, limits, transformation)
    start = start._replace(watch=start_watch(limits.gtol, history_length, progress))
    loop = jax.lax.while_loop(is_running, advance, start)
    best, watch = loop.best, loop.watch
    close(watch, loop.num_steps, best.value, best.grad_norm, loop.tolerance)
    x, value = implicit_minimizer(objective, operands, best.x, best.value)
    return MinimizeResult(x, value, best.grad, loop.num_steps, loop.status, watch.history)


def _at(objective: Callable[..., Any], operands: Sequence[Any], x: Tree) -> Any:
    return objective(x, *operands)


def is_running(loop: Loop) -> Bool[Array, ""]:
    """Whether the loop has not ended yet."""
    return loop.status == Status.RUNNING


def stepper(
    value_fn: Callable[[Tree], Any],
    args: tuple[Any, ...],
    limits: Limits,
    transformation: optax.GradientTransformation,
    hessian: Callable[..., Tree] | None,
    callback: Callable[[MinimizeStep], None] | None = None,
) -> Callable[[Loop], Loop]:
    """The body of the loop: judge the point, and go to the next unless it ends here."""
    has_status = isinstance(transformation, WithStatus)
    update_fn: Callable[..., tuple[Tree, Any]] = optax.with_extra_args_support(transformation).update

    def objective(x: Tree, args: Any = None) -> Any:  # optax's line searches refuse what it does not take
        return value_fn(x)

    def advance(loop: Loop) -> Loop:
        point, extras = _evaluate(value_fn, args, hessian, loop, transformation)
        if callback is not None:
            jax.debug.callback(callback, MinimizeStep(loop.num_steps, point.value, point.grad_norm, loop.state))
        loop = _judge(loop, point, limits, has_status)
        watch = observe(loop.watch, loop.num_steps, point.value, point.grad_norm, loop.tolerance)
        loop = loop._replace(watch=watch)

        def update(loop: Loop) -> Loop:
            updates, state = update_fn(
                point.grad, loop.state, loop.x, grad=point.grad, value_fn=objective, args=args, **extras
            )
            status = state.status if has_status else loop.status
            moved = (status == Status.RUNNING).astype(jnp.int32)
            x = optax.apply_updates(loop.x, updates)
            return loop._replace(x=x, state=state, status=status, num_steps=loop.num_steps + moved)

        loop = jax.lax.cond(is_running(loop), update, lambda loop: loop, loop)
        return jax.lax.stop_gradient(loop)  # what the method or the Hessian may have closed over

    return advance


def start_loop(
    value_fn: Callable[[Tree], Any], x0: Tree, limits: Limits, transformation: optax.GradientTransformation
) -> Loop:
    """The loop before the first judgment; the tolerance is ``gtol`` until the first gradient is known."""
    state: Any = transformation.init(x0)
    if isinstance(transformation, FirstOrder):
        state = state._replace(stored=Stored(*evaluate("minimize", value_fn, x0)))
    zero = jnp.asarray(0, jnp.int32)
    infinity = jnp.full_like(limits.gtol, jnp.inf)
    return Loop(
        x=x0,
        state=jax.lax.stop_gradient(state),
        best=_Point(x0, infinity, jax.tree.map(jnp.zeros_like, x0), infinity, infinity),
        tolerance=limits.gtol,
        num_steps=zero,
        idle_steps=zero,
        status=jnp.asarray(Status.RUNNING, jnp.int32),
    )


def _evaluate(
    value_fn: Callable[[Tree], Any],
    args: tuple[Any, ...],
    hessian: Callable[..., Tree] | None,
    loop: Loop,
    transformation: optax.GradientTransformation,
) -> tuple[_Point, dict[str, Any]]:
    """The objective at the current point, once, and what else the method's update takes."""
    extras: dict[str, Any] = {}
    if isinstance(transformation, FirstOrder):
        value, grad = loop.state.stored
        return _point(loop, value, grad), {"value": value}
    program = trace_objective("minimize", "fun", value_fn, loop.x, ())
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


def _point(loop: Loop, value: Float[Array, ""], grad: Tree) -> _Point:
    dtype = loop.tolerance.dtype
    grad_norm = jnp.max(jnp.abs(ravel(grad)[0]))
    return _Point(loop.x, value.astype(dtype), grad, grad_norm, noise_of(value).astype(dtype))


def _stored_or_fresh(program: Program, loop: Loop) -> tuple[Float[Array, ""], Tree]:
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


def _judge(loop: Loop, point: _Point, limits: Limits, has_status: bool) -> Loop:
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
