"""One compiled loop that drives any optax transformation to a point where the gradient vanishes, or says why not."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from curvature import _checks
from curvature._compile_cache import compiled
from curvature._errors import public
from curvature._sharding import vary_like
from curvature._types import MinimizeResult, Objective, Tree
from curvature.optimizers._bounds import Box, box_of, project, rest_on_bounds
from curvature.solvers._implicit import implicit_minimizer, lift, trace_from
from curvature.solvers._limits import Limits, limits_of
from curvature.solvers._loop import MinimizeStep, Point, Solve, is_running, may_step
from curvature.solvers._methods import Method, resolve, resolve_bounded
from curvature.solvers._progress import close, start_watch
from curvature.transforms._compositions import trace_objective


@public
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
    history: bool = False,
    progress: bool = False,
) -> MinimizeResult:
    """Minimize ``fun(x, *args)`` from ``x0`` in one compiled loop.

    Converged means, with ``gtol``, that ``max|grad| <= gtol + rtol * max|grad at x0|`` at the returned point. Without
    ``gtol`` it means that the point is stationary to rounding: for each entry ``i`` of the gradient::

        |grad f(x)_i| <= max_c |grad f(x + 16 eps max(|x|, sqrt(eps) |x0|) c)_i - grad f(x)_i|

    with ``eps`` the rounding unit, over four vectors ``c`` of factors between -1 and 1, and with four times the
    right side where no further step is found. The same must hold of the norms of what is left when gradient and changes
    are projected onto the complement of the first change: on the floor of a narrow valley all changes are across the
    floor. So other units of
    ``f`` or ``x`` change nothing but the units. The test is made where a step has not lowered the value by more than
    its rounding, or five in a row have not for a method without the Hessian; and every 64 steps, if the last one has
    lowered it by no more than ``10 eps^2`` of the largest value seen. Nothing else is called success. Where the value
    settles and the test fails, the status is ``SETTLED``. Where the value does not rise again half as far from ``x0``
    again, it is ``NO_MINIMUM``, as for separable classes in logistic regression.

    The program is compiled once for each ``fun``, ``hessian``, ``callback``, method and shape, functions being
    compared as objects, as ``jit`` does; data, tolerances and ``max_steps`` are operands. It runs under ``jit`` and
    under ``vmap``, where each lane stops alone with its own status. Inside ``shard_map`` each device minimizes
    what ``fun`` gives there; what ``psum`` has summed over devices they minimize together.

    The solution, not the iteration, is differentiated, in forward and reverse mode and to any order, by ``args`` and by
    what ``fun`` closes over: ``x`` by ``H dx = -(d grad f / d args) d args`` with the Hessian ``H`` at ``x``, as the
    implicit function theorem has it, and ``value`` at fixed ``x``, by the envelope theorem. ``grad`` stays zero at a
    minimizer, so its derivative is zero, and so are those by ``x0`` and the tolerances. All of this holds for a point
    that passed the test; at any other the formulas are evaluated all the same.

    Args:
        fun: the objective, ``fun(x, *args) -> scalar``; pure, as for ``jit``.
        x0: where to start, any tree of floating arrays.
        args: data for ``fun``: a tuple, or one argument that is not a tuple.
        method: ``"trust-exact"``, ``"trust-region"`` (by conjugate gradients), ``"newton"``, ``"newton-cg"``,
            ``"cubic-newton"``, ``"bfgs"``, ``"l-bfgs"``, ``"sr1"``, any optax transformation of gradients, or
            ``"auto"``: exact up to 100 entries, by conjugate gradients beyond. A name may be spelled as its function
            is, in any case: ``"trust_region"``, ``"LBFGS"``.
        gtol: the absolute tolerance, in units of the gradient; ``None`` asks for a point that is stationary to
            rounding.
        rtol: the tolerance relative to the first gradient: another test that does not depend on the scale of ``fun``,
            which a start far away loosens.
        max_steps: the most steps.
        hessian: ``hessian(x, *args)`` forms the Hessian, as ``curvature.hessian(fun)`` would, for the methods that form
            one; then ``fun`` needs no second derivative. Make it once: a new function is compiled again.
        bounds: ``(lower, upper)``, each a tree like ``x0`` or a prefix of one, where a number stands for all entries
            below it; ``None`` and infinities are no bound. ``x0`` is projected into the box, which no iterate and no
            trial point leaves, and converged means that the projected gradient passes,
            ``max|P(x - grad) - x| <= gtol + rtol * (the same at x0)``, or without ``gtol`` the gradient without the
            entries that point out of the box at a bound. For ``"trust-exact"``, ``"trust-region"`` and
            ``"auto"``, which become ``projected_newton``, and ``"l-bfgs"``, which becomes ``lbfgsb``. Bounds are
            operands too.
        callback: called on the host with a ``MinimizeStep`` at every iterate, the first and the last included. Not for
            ``vmap``, where it would be called for lanes that have stopped.
        history: whether to keep value and gradient norm of every point in ``result.history``. It holds two numbers for
            each of ``max_steps + 1`` points, however few steps are taken, so ``max_steps`` is static then.
        progress: whether to write a line on standard error that says how far the gradient has come. The loop asks the
            host, at first after a few steps and then about twice a second, and when to be asked again. Not for
            ``vmap``.

    Returns:
        A ``MinimizeResult``: the point that passed the test or, on failure, the best one seen, with its value and
        gradient; ``status`` says which, ``success`` and ``message`` say it in other words.

    Raises:
        TypeError: when ``fun`` is not callable or not scalar, ``bounds`` is no pair, a leaf of ``x0`` is not of a real
            floating dtype, or no composition of modes can differentiate ``fun``.
        ValueError: when ``x0`` is known to hold NaN or infinity, when the method is unknown or has no use for
            ``hessian`` or ``bounds``, bounds do not match ``x0`` or cross, or a number is out of range.

    Cost: for each step one linearization of the gradient and what the method adds; the objective is evaluated once
        more for each point the method tries. Without ``gtol`` each test takes up to 7 gradients, and mostly one where
        it fails. The optax transformations take a gradient a step, or none where a line
        search has stored it. Of derivatives: one factorization of the Hessian, or beyond 1,000 entries one iterative
        solve for each direction; nothing before they are asked for.

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
    _checks.check_callable("fun", fun)
    x0 = _checks.check_start("x0", x0)
    args = _checks.check_data(args)
    for name, function in {"hessian": hessian, "callback": callback}.items():
        if function is not None:
            _checks.check_callable(name, function)
    limits = limits_of(x0, gtol, rtol, max_steps)
    most_steps: Any = max_steps
    if history:
        _checks.check_static_count("max_steps", most_steps, least=0)
    if bounds is None:
        resolved, box = resolve(method, x0, hessian), None
    else:
        resolved = resolve_bounded(method, x0, hessian)
        box = box_of(*_checks.check_pair_of_bounds(bounds), "x0", x0)
    return compiled(_run, fun, (x0, args))(
        x0, args, limits, box, method=resolved, hessian=hessian, callback=callback,
        history_length=int(most_steps) + 1 if history else 0, progress=bool(progress),
    )  # fmt: skip


def _run(
    fun: Objective,
    x0: Tree,
    args: tuple[Any, ...],
    limits: Limits,
    box: Box | None,
    *,
    method: Any,  # a transformation, or where there is a box a function of its bounds that returns one
    hessian: Callable[..., Tree] | None,
    callback: Callable[[MinimizeStep], None] | None,
    history_length: int,
    progress: bool,
) -> MinimizeResult:
    """The whole solve; data and limits are operands, so that new values use the same compiled program.

    Derivatives are taken of the solution, so nothing that goes through the loop has any.
    """
    program, x0 = trace_from(lambda x: trace_objective("fun", fun, x, args), x0)
    objective, operands = lift(program)
    x0, args, limits, data, walls = jax.lax.stop_gradient((x0, args, limits, operands, box))
    transformation = method
    if walls is not None:
        transformation, x0 = method(*walls), project(walls, x0)
    solve = Solve(lambda x: objective(x, *data), limits, transformation, args, hessian, callback, walls)
    start = solve.start(x0, start_watch(limits.gtol, history_length, progress))
    start = vary_like(start, x0)  # what is counted in a step varies as the step does, and so from the start
    loop = jax.lax.while_loop(
        is_running, lambda loop: solve.settle(jax.lax.while_loop(may_step, solve.advance, loop)), start
    )
    best, watch = loop.best, loop.watch
    close(watch, loop.num_steps, best.value, best.grad_norm, loop.tolerance)
    if box is None:
        x, value = implicit_minimizer(objective, operands, best.x, best.value)
    else:
        x, value = _minimizer_within(box, objective, operands, best)
    return MinimizeResult(x, value, best.grad, loop.num_steps, loop.status, watch.history)


def _minimizer_within(
    box: Box, objective: Callable[..., Any], operands: Sequence[Any], best: Point
) -> tuple[Tree, Float[Array, ""]]:
    """``implicit_minimizer`` whose entries on a bound move with it, and the free ones with them."""
    free, shift = rest_on_bounds(box, best.x, best.grad)
    leaves, structure = jax.tree.flatten(shift)

    def shifted(x: Tree, *operands: Any) -> Any:
        moved = jax.tree.map(jnp.add, x, structure.unflatten(operands[: len(leaves)]))
        return objective(moved, *operands[len(leaves) :])

    x, value = implicit_minimizer(shifted, [*leaves, *operands], best.x, best.value, free)
    return jax.tree.map(jnp.add, x, shift), value
