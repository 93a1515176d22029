"""What our optimizers share: the optax protocol with a status, and the objective around the current point."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from curvature import _checks
from curvature._types import Status, Tree, ravel
from curvature.transforms import linearize_grad
from curvature.transforms._blocks import matrix_of, side_by_side
from curvature.transforms._jacobian import map_basis

Vector = Float[Array, " n"]
Matrix = Float[Array, "n n"]
Scalar = Float[Array, ""]

_NOISE = 10  # a change of fewer roundings of the value decides nothing: Conn, Gould and Toint (2000), section 17.4.2
_SHRINK = (0.1, 0.5)  # a rejected step is cut to a length between these shares of it
MAX_TRIALS = 40


class SecondOrder(optax.GradientTransformationExtraArgs):
    """An optax transformation whose state has a ``status``, and whose ``update`` takes two more extra arguments.

    ``hvp_fn=`` is the Hessian's product at ``params``, and ``hessian_fn=`` a function of ``params`` that forms it;
    without them the Hessian is that of ``value_fn``. An update moves to a point it has accepted; when it finds none the
    update is zero and the status says why.
    """


class DenseSecondOrder(SecondOrder):
    """One that forms the Hessian."""


class Unevaluated(NamedTuple):
    """What ``optax.value_and_grad_from_state`` looks for in a state, with nothing in it.

    The value is infinite, which has optax evaluate both afresh: the gradient at the new point comes with the
    linearization that the next update makes there, so an update has none to leave behind.
    """

    value: Float[Array, ""]
    grad: Tree


def unevaluated(x: Vector, params: Tree) -> Unevaluated:
    """Nothing stored, in the shapes of what could be."""
    return Unevaluated(jnp.asarray(jnp.inf, x.dtype), jax.tree.map(jnp.zeros_like, params))


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
    name: str, init: Callable[[Vector, Tree], Any], step: Callable[[Any, Local], tuple[Vector, Any]], *, dense: bool
) -> SecondOrder:
    """An optax transformation from ``init(x, params) -> state`` and ``step(state, local) -> (step, state)``."""

    def init_fn(params: Tree) -> Any:
        params = _checks.check_point(name, "params", params)
        return init(ravel(params)[0], params)

    def update_fn(
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
        grad = updates if grad is None else grad
        params = _checks.check_point(name, "params", _checks.require_extra(name, "params", params))
        value = _checks.require_extra(name, "value", value)
        value_fn = _checks.require_extra(name, "value_fn", value_fn)
        grad = _checks.check_direction(name, "grad", grad, "params", params)
        fun = functools.partial(value_fn, **_named_extras(value_fn, extra_args))
        vector, state = step(state, _localize(name, params, value, grad, fun, hvp_fn, hessian_fn))
        return ravel(params)[1](vector), state

    return (DenseSecondOrder if dense else SecondOrder)(init_fn, update_fn)


def _localize(
    name: str,
    params: Tree,
    value: Any,
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
        return _checks.require_extra(name, "hvp_fn", hvp_fn)(v)

    def hessian() -> Matrix:
        if hessian_fn is None:
            matrix = side_by_side(map_basis(product, params, "auto"), x.size, x.dtype)
        else:
            matrix = matrix_of(name, "hessian(x)", hessian_fn(params), params).astype(x.dtype)
        return (matrix + matrix.T) / 2

    value = jnp.asarray(value)
    return Local(
        x=x,
        value=value.astype(x.dtype),
        noise=noise_of(value).astype(x.dtype),
        grad=ravel(grad)[0],
        hvp=lambda v: ravel(product(unravel(v)))[0],
        hessian=hessian,
        value_after=lambda step: jnp.asarray(fun(unravel(x + step)), x.dtype),
    )


def _named_extras(value_fn: Callable[..., Any], extras: dict[str, Any]) -> dict[str, Any]:
    """The extra arguments that ``value_fn`` has a parameter for; its neighbors in a chain may be sent others."""
    parameters = inspect.signature(value_fn).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return extras
    return {name: extra for name, extra in extras.items() if name in parameters}


def noise_of(value: Scalar) -> Scalar:
    """The change of the value that rounding alone can make."""
    return _NOISE * jnp.finfo(value.dtype).eps * jnp.abs(value)


def shrink_factor(value: Scalar, slope: Scalar, trial: Scalar) -> Scalar:
    """The share of a rejected step to try next: the minimizer of the parabola through what is known along it.

    ``slope`` is the gradient times the step. N&W (3.57), kept within ``_SHRINK``, whose lesser end serves a trial that
    is NaN or infinite.
    """
    low, high = _SHRINK
    factor = -slope / (2 * (trial - value - slope))
    return jnp.where(jnp.isfinite(factor) & jnp.isfinite(trial), jnp.clip(factor, low, high), low)


def trial_status(accepted: Bool[Array, ""], trial: Scalar, model: Scalar) -> Int[Array, ""]:
    """The status of an update from its last trial value and from what the model promised for it."""
    failed = jnp.where(jnp.isnan(model), Status.NONFINITE, Status.STALLED)
    failed = jnp.where(trial == -jnp.inf, Status.UNBOUNDED, failed)
    return jnp.where(accepted, Status.RUNNING, failed).astype(jnp.int32)
