"""The optax protocol of methods that work on residuals, and the variables that they scale."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from curvature import _checks
from curvature._errors import caller
from curvature._trees import ravel
from curvature._types import Matrix, Scalar, Tree, Vector
from curvature.optimizers._method import Local, WithStatus, bind_extras, choose, is_finite, transformation, unless_lost
from curvature.optimizers._residual_hessian import Newton, newton
from curvature.optimizers._residuals import Linearized, SecondOrder, linearize_residuals
from curvature.optimizers._wrappers import gradient_for
from curvature.transforms._jacobian import map_basis


class Request(NamedTuple):
    """What a driver asks of an update beside a step.

    Attributes:
        decrement: whether to evaluate the Newton decrement at the point, whose Hessian the step may not need.
        shorter: whether the last step has been taken back, because derivatives are not finite where it led.
        deferred: whether the decrement is left to another program, for which the driver stops where it asks for it.
    """

    decrement: Bool[Array, ""]
    shorter: Bool[Array, ""]
    deferred: bool = False


class ResidualMethod(WithStatus):
    """An optax transformation whose ``update`` takes ``residual_fn=``, or what is known of it as ``linearized=``."""


class DenseResidualMethod(ResidualMethod):
    """A ``ResidualMethod`` that forms the Jacobian."""


def residual_method(
    kind: type[Any],
    step: Callable[[Any, Linearized, Request], tuple[Vector, Any]],
    *,
    dense: bool,
    start: Callable[[Vector], dict[str, Any]],
) -> ResidualMethod:
    """A transformation from ``step(state, linearized, request) -> (step, state)``; see ``transformation``."""

    def update(updates: Tree, state: Any, params: Tree | None = None, **extras: Any) -> tuple[Tree, Any]:
        names = "grad", "residual_fn", "linearized", "request"
        grad, residual_fn, linearized, request = (extras.pop(name, None) for name in names)
        params = _checks.check_point("params", _require_residuals("params", params))
        gradient_for(updates, grad)  # which the residuals give anyway: a changed one would be ignored
        if linearized is None:
            residual_fn = bind_extras(_require_residuals("residual_fn", residual_fn), extras)
            linearized = linearize_residuals(residual_fn, params, loss="linear", scale=jnp.ones(()), dense=dense)
        if request is None:
            request = Request(decrement=jnp.asarray(False), shorter=jnp.asarray(False))
        usable = is_finite(linearized.value, linearized.grad)
        vector, after = step(state, linearized, request)
        return ravel(params)[1](jnp.where(usable, vector, 0)), unless_lost(usable, after, state)

    return transformation(DenseResidualMethod if dense else ResidualMethod, kind, update, start=start)


class Curvature(NamedTuple):
    """Second derivatives and what Newton's method makes of them; zero where they were not wanted."""

    second: SecondOrder
    newton: Newton

    def helps(self) -> Bool[Array, ""]:
        """Whether Newton's method was asked for and has a step."""
        return jnp.isfinite(self.newton.decrement)


def curvature_if(wanted: Bool[Array, ""], request: Request, linear: Linearized) -> Curvature | None:
    """Second derivatives where ``wanted`` or the decrement is, and then Newton's step; None where there are none.

    Where they are not finite, as those of a function that guards a NaN may be, they are zero: the Jacobian decides.
    """
    if linear.second_order is None:
        return None
    evaluate_second, tested = linear.second_order, request.decrement
    nowhere = Newton(jnp.zeros_like(linear.x), jnp.zeros_like(linear.value), jnp.full_like(linear.value, jnp.inf))

    def second_order(tested: Bool[Array, ""] | None) -> tuple[SecondOrder, Bool[Array, ""]]:
        second = evaluate_second(tested)
        finite = jnp.all(jnp.isfinite(second.matrix))
        return choose(finite, second, SecondOrder.none(linear.x)), finite

    def evaluate() -> Curvature:
        second, finite = second_order(tested)
        return Curvature(second, jax.lax.cond(tested & finite, lambda: newton(linear, second), lambda: nowhere))

    def nothing() -> Curvature:
        return Curvature(SecondOrder.none(linear.x), nowhere)

    if request.deferred:
        return jax.lax.cond(wanted, lambda: Curvature(second_order(None)[0], nowhere), nothing)
    return jax.lax.cond(wanted | tested, evaluate, nothing)


def decrement_of(curvature: Curvature | None, like: Scalar) -> Scalar:
    """The Newton decrement; infinite where there is none."""
    return jnp.full_like(like, jnp.inf) if curvature is None else curvature.newton.decrement


def scaled_local(linear: Linearized, scale: Vector) -> Local:
    """The sum of squares in the variables ``scale * x``, with the Gauss-Newton matrix for its Hessian."""

    def product(v: Vector) -> Vector:
        return linear.pull(linear.push(v / scale)) / scale

    def matrix() -> Matrix:
        return map_basis(product, scale, None)

    return Local(
        x=scale * linear.x,
        value=linear.value,
        noise=linear.noise,
        grad=linear.grad / scale,
        hvp=product,
        hessian=matrix,
        value_after=lambda step: linear.value_after(step / scale),
    )


def _require_residuals(name: str, value: Any) -> Any:
    """``value``, a required extra argument of the ``update`` of a least-squares method; refuses None."""
    if value is None:
        raise ValueError(
            f"{caller()}: update() needs {name}=; call update(grad, state, params, residual_fn=residual_fn), where "
            "residual_fn(params) returns the residuals whose squares are summed."
        )
    return value
