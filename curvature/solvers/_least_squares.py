"""One compiled loop that drives a method for residuals to a least sum of squares, or says why not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._compile_cache import compiled, is_traced
from curvature._errors import later, public
from curvature._numerics import norm
from curvature._sharding import vary_like
from curvature._trees import num_entries, ravel
from curvature._types import Scalar, Status, Tree
from curvature.optimizers import _residuals
from curvature.optimizers._gauss_newton import gauss_newton
from curvature.optimizers._levenberg_marquardt import levenberg_marquardt
from curvature.optimizers._method import choose
from curvature.optimizers._residual_method import DenseResidualMethod, Request, ResidualMethod
from curvature.optimizers._robust import Loss, half_sum
from curvature.solvers._fit import LeastSquaresResult
from curvature.solvers._implicit import implicit_minimizer, known_at, lift, root_at, trace_from
from curvature.solvers._limits import Limits, limits_of
from curvature.solvers._loop import is_running

_METHODS: dict[str, Callable[[bool], ResidualMethod]] = {
    "levenberg-marquardt": lambda dense: levenberg_marquardt("exact" if dense else "cg"),
    "dogleg": lambda dense: levenberg_marquardt("dogleg" if dense else "cg"),
    "gauss-newton": lambda dense: gauss_newton("exact" if dense else "cg"),
}
_DENSE_VARIABLES, _DENSE_ENTRIES = 500, 2**24  # up to here the Jacobian is formed
_PATIENCE = 10  # steps without a lower sum or a smaller _residuals.offset, beyond rounding, before a method has stalled
_PERSISTENCE = 100  # heuristic: as many where the sum curves down, so that there is a way on, however level it is


class _Point(NamedTuple):
    x: Tree
    value: Float[Array, ""]
    residuals: Tree
    grad: Tree
    root: tuple[Float[Array, "n k"], Bool[Array, " n"]] | None  # of the inverse of J'J, for the covariance
    offset: Float[Array, ""]
    rounding: Float[Array, ""]
    noise: Float[Array, ""]


class _Loop(NamedTuple):
    x: Tree
    before: Tree  # the point from which the last step led here, or that to which it was taken back
    taken_back: Bool[Array, ""]
    state: Any
    best: _Point
    tolerance: Float[Array, ""]
    num_steps: Int[Array, ""]
    idle_steps: Int[Array, ""]
    status: Int[Array, ""]
    is_deferred: Bool[Array, ""]  # whether the next update needs the decrement, which this program does without


@public
def least_squares(
    residuals: Callable[..., Tree],
    x0: Tree,
    args: Any = (),
    *,
    method: str | optax.GradientTransformation = "levenberg-marquardt",
    loss: Loss = "linear",
    f_scale: ArrayLike = 1.0,
    gtol: ArrayLike | None = None,
    rtol: ArrayLike = 0.0,
    max_steps: ArrayLike = 10_000,
) -> LeastSquaresResult:
    """Minimize ``sum(r**2) / 2`` for ``r = residuals(x, *args)`` from ``x0`` in one compiled loop.

    Converged means that the linear model at the returned point can remove next to nothing of the residuals,

        ``norm(P r) <= gtol * norm(r) + rtol * norm(P r at x0) + eps * sum_k norm(J_k) * abs(x_k)``,

    where ``P`` projects on the range of the Jacobian ``J``. This is the gradient ``g = J'r`` in the one norm that no
    change of units alters: ``norm(P r)^2 = g' (J'J)^-1 g``. It says that the next Gauss-Newton step is about ``gtol``
    standard errors or less, give or take the last term: what rounding of the variables does to the residuals, so that
    fits without residuals end too. Where ``J`` is not formed, ``P`` projects on its product with the scaled gradient
    only, a weaker test.

    That test says nothing where ``J`` loses rank: near the minimizer 0 of ``x^2 + 5`` any ``J = 2x`` spans all
    residuals. So where steps no longer lower the sum, and where ``J``, its columns brought to norm one, has directions
    that are lost in rounding, the Newton decrement replaces ``norm(P r)``: ``sqrt(g' B^-1 g)`` with the
    whole Hessian ``B = J'J + sum_i r_i H_i``, infinite unless ``B`` is positive up to directions along which neither
    curvature nor gradient exceeds rounding. On a plateau to which the sum has risen it is infinite. It needs second
    derivatives of ``residuals``; without them the first test decides alone. Nothing else is called success.

    A step to a point where the derivatives are not finite is taken back, and a shorter one is tried.

    With another ``loss`` than ``"linear"`` the sum is ``f_scale^2 sum(rho((r / f_scale)^2)) / 2``, as in SciPy, with
    ``rho(z)`` of ``"soft_l1"``: ``2 (sqrt(1 + z) - 1)``; ``"huber"``: ``z`` up to 1 and ``2 sqrt(z) - 1`` beyond;
    ``"cauchy"``: ``log(1 + z)``; ``"arctan"``: ``arctan(z)``. Then ``J`` and ``r`` above have their rows weighted so
    that ``J'r`` is the gradient of the sum, and ``norm(r)`` is the root of twice the sum.

    Args:
        residuals: ``residuals(x, *args)`` returns any tree of floating arrays; pure, as for ``jit``. Fewer residuals
            than variables are allowed.
        x0: where to start, any tree of floating arrays.
        args: data: a tuple, or one argument that is not a tuple.
        method: ``"levenberg-marquardt"``, ``"dogleg"`` or ``"gauss-newton"``, which form the Jacobian for up to 500
            variables and 2^24 entries and work by products with it beyond, spelled as for ``minimize``; or
            ``levenberg_marquardt(...)`` or ``gauss_newton(...)``, to choose.
        loss: what grows slower than squares where residuals are large.
        f_scale: the size of a residual from which on ``loss`` holds it down.
        gtol: see above; ``None`` is the square root of the rounding unit of ``x0``: 1.5e-8 in double precision, 3.5e-4
            in single.
        rtol: see above.
        max_steps: the most steps.

    Returns:
        A ``LeastSquaresResult``: the point that passed the test or, on failure, the best one seen, with its sum,
        residuals and gradient; ``.success``, ``.message``, ``.covariance()`` and ``.standard_errors()``.

    Raises:
        TypeError: when ``residuals`` is not callable or returns a scalar, when a leaf of ``x0`` is not of a real
            floating dtype, or when no mode can differentiate ``residuals``.
        ValueError: when ``x0`` is known to hold NaN or infinity, a word is unknown or a number is out of range.

    Derivatives are those of the solution, forward and reverse, of ``x``, ``value``, ``residuals`` and ``covariance()``,
    by ``args``, by what ``residuals`` closes over, and by ``f_scale``. The last two have them where forward mode can
    differentiate ``residuals``; through a ``custom_vjp`` they are constants.

    Cost: each step as ``levenberg_marquardt`` says. Of derivatives as ``minimize`` says, and for ``residuals`` and
        ``covariance()`` one product with the Jacobian and one derivative of the Jacobian for each direction, which
        ``jit`` leaves out where they are not used. Compiled once for each function, method, loss and shape; data,
        tolerances and ``f_scale`` are operands.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> t, y = jnp.arange(5.0), jnp.array([5.1, 3.0, 1.8, 1.2, 0.6])
        >>> fit = curvature.least_squares(lambda x, t, y: x[0] * jnp.exp(-x[1] * t) - y, jnp.ones(2), (t, y))
        >>> bool(fit.success), jnp.round(fit.x, 2), jnp.round(fit.standard_errors(), 2)
        (True, Array([5.08, 0.51], dtype=float32), Array([0.07, 0.01], dtype=float32))

    References: Moré, The Levenberg-Marquardt algorithm (1978), doi:10.1007/BFb0067700; Bates and Watts, A relative
        offset orthogonality convergence criterion for nonlinear least squares, Technometrics 23 (1981),
        doi:10.1080/00401706.1981.10486268.
    """
    _checks.check_callable("residuals", residuals)
    x0 = _checks.check_start("x0", x0)
    args = _checks.check_data(args)
    if not isinstance(method, ResidualMethod):
        method = _checks.check_method(method, tuple(_METHODS), "residuals")
    how = {"method": method, "loss": loss}
    operands = x0, args, *check_limits(x0, loss, f_scale, gtol, rtol, max_steps)
    return run_in_two(compiled(run, residuals, (x0, args)), operands, **how)


def run_in_two(program: Callable[..., Any], operands: tuple[Any, ...], **how: Any) -> Any:
    """The result of ``program``, which compiles the Newton decrement only if the solve asks for it.

    Most fits end without, and the decrement takes half of a compilation. So an eager call first runs a program without
    the decrement; if that stops where the decrement is asked for, the whole program continues from there. Inside
    another transformation there is only the whole program. Both take the same steps.
    """
    if is_traced():
        return program(*operands, None, deferred=False, **how)[0]
    result, loop = program(*operands, None, deferred=True, **how)
    if int(loop.status) != Status.RUNNING:
        return result
    return program(*operands, loop, deferred=False, **how)[0]


def check_limits(x0: Tree, loss: Any, f_scale: Any, gtol: Any, rtol: Any, max_steps: Any) -> tuple[Limits, Any]:
    """The limits and the scale of the loss as operands, and the loss checked."""
    _checks.check_choice("loss", loss, Loss)
    _checks.check_positive("f_scale", f_scale)
    if gtol is None:
        gtol = max(float(jnp.finfo(leaf.dtype).eps) for leaf in jax.tree.leaves(x0)) ** 0.5
    limits = limits_of(x0, gtol, rtol, max_steps)
    return limits, jnp.asarray(f_scale, limits.gtol.dtype)


def run(
    residuals: Callable[..., Tree],
    x0: Tree,
    args: tuple[Any, ...],
    limits: Limits,
    f_scale: Scalar,
    resumed: _Loop | None,
    *,
    method: str | ResidualMethod,
    loss: Loss,
    deferred: bool,
) -> tuple[LeastSquaresResult, _Loop]:
    """Run the loop from the start, or from where another program stopped; returns its last state too.

    If the decrement is ``deferred``, it stops before the first update that needs it, with the status RUNNING.
    Data and limits are operands, so that new ones find the program they need. Derivatives are taken of the solution, so
    nothing in the loop has any.
    """
    program, x0 = trace_from(lambda x: _residuals.trace_residuals(lambda x: residuals(x, *args), x), x0)
    num_residuals = num_entries(program.out)
    residuals_of, operands = lift(program)
    scaled = [f_scale, *operands]

    def cost(x: Tree, scale: Array, *operands: Any) -> Array:
        return half_sum(_residuals.flat(residuals_of(x, *operands), scale.dtype), loss, scale)

    @later
    def jacobian(x: Tree, scale: Array, *operands: Any) -> Array:
        return _residuals.weighted_jacobian(lambda x: residuals_of(x, *operands), x, loss=loss, scale=scale)

    if isinstance(method, str):
        n = num_entries(x0)
        method = _METHODS[method](n <= _DENSE_VARIABLES and n * num_residuals <= _DENSE_ENTRIES)
    x0, limits, f_scale, data = jax.lax.stop_gradient((x0, limits, f_scale, operands))
    solve = _Solve(lambda x: residuals_of(x, *data), limits, method, loss, f_scale, deferred)
    # What is counted in a step varies as the step does, and so from the start.
    start = vary_like(solve.start(x0), x0) if resumed is None else resumed
    start = start._replace(is_deferred=jnp.zeros_like(start.is_deferred))
    loop = jax.lax.while_loop(lambda loop: is_running(loop) & ~loop.is_deferred, solve.advance, start)
    best = loop.best
    degrees = num_residuals - num_entries(x0)
    x, value = implicit_minimizer(cost, scaled, best.x, best.value)
    found = known_at(residuals_of, best.residuals, x, operands)
    root = None
    if best.root is not None:
        root, determined = best.root
        root = jnp.where(determined[:, None], root_at(jacobian, root, x, scaled), jnp.inf)
    return LeastSquaresResult(x, value, found, best.grad, loop.num_steps, loop.status, root, degrees), loop


class _Solve(NamedTuple):
    """What a loop fits, how, and to which limits; its methods are the parts of the loop, as in ``_loop.Solve``."""

    residual_fn: Callable[[Tree], Tree]
    limits: Limits
    method: ResidualMethod
    loss: str
    f_scale: Scalar
    deferred: bool

    def start(self, x0: Tree) -> _Loop:
        """The loop before the first evaluation; the tolerance is zero until the first offset is known."""
        zero, no = jnp.asarray(0, jnp.int32), jnp.asarray(False)
        infinity = jnp.full_like(self.limits.gtol, jnp.inf)
        shapes = jax.eval_shape(lambda x: _point(x, self._linearize(x)), x0)
        nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return _Loop(
            x=x0,
            before=x0,
            taken_back=no,
            state=self.method.init(x0),
            best=nothing._replace(value=infinity, offset=infinity),
            tolerance=jnp.zeros_like(infinity),
            num_steps=zero,
            idle_steps=zero,
            status=jnp.asarray(Status.RUNNING, jnp.int32),
            is_deferred=no,
        )

    def advance(self, before: _Loop) -> _Loop:
        """The body of the loop: evaluate the point, test it, and take a step or take the last one back."""
        linear = self._linearize(before.x)
        point = _point(before.x, linear)
        finite = jnp.isfinite(point.value) & jnp.isfinite(point.offset)
        finite &= jnp.isfinite(norm(ravel(point.grad)[0]))
        # 1. Test the point for convergence.
        tolerance = jnp.where(before.best.value == jnp.inf, self.limits.rtol * point.offset, before.tolerance)
        allowed = self.limits.gtol * jnp.sqrt(2 * point.value) + tolerance + point.rounding
        allowed = jnp.where(finite & jnp.isfinite(allowed), allowed, -1)
        is_flat = point.offset <= allowed
        doubtful = is_flat & _loses_rank(linear)
        loop = before._replace(tolerance=tolerance)
        loop = _record_point(loop, point, is_flat & ~doubtful, finite, self.limits.max_steps)
        # 2. Take a step, or take the last one back where it led to derivatives that are not finite.
        request = Request(doubtful | (loop.idle_steps > 0), loop.taken_back, self.deferred)
        update_fn: Callable[..., tuple[Tree, Any]] = self.method.update

        def update(loop: _Loop) -> _Loop:
            updates, state = update_fn(None, loop.state, loop.x, linearized=linear, request=request)
            return _apply_update(loop, point, updates, state, allowed, request)

        def take_back(loop: _Loop) -> _Loop:
            return loop._replace(x=loop.before, taken_back=jnp.ones_like(loop.taken_back))

        running = is_running(loop)
        loop = jax.lax.cond(running & finite, update, lambda loop: loop, loop)
        loop = jax.lax.cond(is_running(loop) & ~finite, take_back, lambda loop: loop, loop)
        if not self.deferred or linear.second_order is None:
            return loop
        missing = running & finite & request.decrement
        return choose(missing, before._replace(is_deferred=missing), loop)

    def _linearize(self, x: Tree) -> _residuals.Linearized:
        dense = isinstance(self.method, DenseResidualMethod)
        return _residuals.linearize_residuals(self.residual_fn, x, loss=self.loss, scale=self.f_scale, dense=dense)


def _point(x: Tree, linear: _residuals.Linearized) -> _Point:
    return _Point(
        x=x,
        value=linear.value,
        residuals=linear.out,
        grad=ravel(x)[1](linear.grad),
        root=None if linear.factors is None else linear.factors.inverse_root(),
        offset=_residuals.offset(linear),
        rounding=_residuals.rounding_of(linear.columns, linear.x),
        noise=linear.noise,
    )


def _apply_update(loop: _Loop, point: _Point, updates: Tree, state: Any, allowed: Scalar, request: Request) -> _Loop:
    """The loop after an update, which stays where the decrement says that the point has converged.

    An update that found no step ends the solve only if it evaluated the decrement: else the next one does.
    """
    converged = state.decrement <= allowed
    moved = (state.status == Status.RUNNING) & ~converged
    again = (state.status == Status.STALLED) & ~request.decrement & ~converged
    status = jnp.where(again, Status.RUNNING, state.status)
    return loop._replace(
        x=choose(converged, loop.x, optax.apply_updates(loop.x, updates)),
        before=loop.x,
        taken_back=jnp.zeros_like(loop.taken_back),
        state=state,
        best=choose(converged, point, loop.best),
        status=jnp.where(converged, Status.CONVERGED, status).astype(jnp.int32),
        num_steps=loop.num_steps + moved.astype(jnp.int32),
    )


def _loses_rank(linear: _residuals.Linearized) -> Bool[Array, ""]:
    """Whether the Jacobian has directions that are lost in rounding, where only the Hessian can say what they do."""
    if linear.factors is None or linear.second_order is None:
        return jnp.zeros_like(linear.value, bool)
    return jnp.any(linear.factors.values == 0)


def _record_point(loop: _Loop, point: _Point, converged: Array, finite: Array, max_steps: Array) -> _Loop:
    """Update the best point and the status: is it converged, out of steps, or stuck?

    Where it is not finite, the solve ends only if it stands at the start or if too many steps in a row led nowhere.
    """
    first = loop.best.value == jnp.inf
    lower = point.value < loop.best.value - loop.best.noise
    flatter = (point.value <= loop.best.value + loop.best.noise) & (point.offset < loop.best.offset)
    better = finite & (lower | flatter)
    best = choose(better | converged | first, point, loop.best)
    idle_steps = jnp.where(better, 0, loop.idle_steps + jnp.where(loop.taken_back, 0, 1))

    status = jnp.where(loop.num_steps >= max_steps, Status.MAX_STEPS, Status.RUNNING)
    curves_down = (loop.idle_steps > 0) & jnp.isinf(loop.state.decrement)
    status = jnp.where(idle_steps >= jnp.where(curves_down, _PERSISTENCE, _PATIENCE), Status.STALLED, status)
    status = jnp.where(first & ~finite, Status.NONFINITE_START, status)
    status = jnp.where(converged, Status.CONVERGED, status).astype(jnp.int32)
    return loop._replace(best=best, idle_steps=idle_steps, status=status)
