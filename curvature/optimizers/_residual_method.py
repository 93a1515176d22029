"""The optax protocol of methods that work on residuals, and the variables that they scale."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from curvature import _checks
from curvature._trees import ravel
from curvature._types import Matrix, Scalar, Tree, Vector
from curvature.optimizers._method import Local, WithStatus, at_start, bind_extras, is_finite, unless_lost
from curvature.optimizers._residuals import Linearized, linearize_residuals, newton_decrement
from curvature.optimizers._wrappers import gradient_for, wrappable
from curvature.transforms._jacobian import map_basis


class Request(NamedTuple):
    """What a driver asks of an update beside a step.

    Attributes:
        decrement: whether to evaluate the Newton decrement at the point, whose Hessian the step may not need.
        shorter: whether the last step has been taken back, because derivatives are not finite where it led.
    """

    decrement: Bool[Array, ""]
    shorter: Bool[Array, ""]


class ResidualMethod(WithStatus):
    """An optax transformation whose ``update`` takes ``residual_fn=``, or what is known of it as ``linearized=``."""


class DenseResidualMethod(ResidualMethod):
    """One that forms the Jacobian."""


def residual_method(
    name: str,
    init: Callable[[Vector, Tree], Any],
    step: Callable[[Any, Linearized, Request], tuple[Vector, Any]],
    *,
    dense: bool,
) -> ResidualMethod:
    """A transformation from ``init(x, params) -> state`` and ``step(state, linearized, request) -> (step, state)``."""

    def update(
        updates: Tree,
        state: Any,
        params: Tree | None = None,
        *,
        grad: Tree | None = None,
        residual_fn: Callable[..., Any] | None = None,
        linearized: Linearized | None = None,
        request: Request | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, Any]:
        params = _checks.check_point(name, "params", _checks.require_residuals(name, "params", params))
        gradient_for(name, updates, grad)  # which the residuals give anyway: a changed one would be ignored
        if linearized is None:
            residual_fn = bind_extras(_checks.require_residuals(name, "residual_fn", residual_fn), extra_args)
            linearized = linearize_residuals(name, residual_fn, params, loss="linear", scale=jnp.ones(()), dense=dense)
        if request is None:
            request = Request(decrement=jnp.asarray(False), shorter=jnp.asarray(False))
        usable = is_finite(linearized.value, linearized.grad)
        vector, after = step(state, linearized, request)
        return ravel(params)[1](jnp.where(usable, vector, 0)), unless_lost(usable, after, state)

    kind = DenseResidualMethod if dense else ResidualMethod
    return kind(*wrappable(name, functools.partial(at_start, init), update))


class Curvature(NamedTuple):
    """The Hessian of the sum and the Newton decrement; zero and infinite where they were not wanted."""

    hessian: Float[Array, "n n"]
    decrement: Scalar


def curvature_if(wanted: Bool[Array, ""], linear: Linearized) -> Curvature | None:
    """The Hessian and the decrement where they are ``wanted``; None where ``residuals`` has no second derivatives."""
    if linear.hessian is None:
        return None
    matrix = linear.hessian
    size = linear.x.size

    def evaluate() -> Curvature:
        hessian = matrix()
        return Curvature(hessian, newton_decrement(linear, hessian))

    def nothing() -> Curvature:
        return Curvature(jnp.zeros_like(linear.x, shape=(size, size)), jnp.full_like(linear.value, jnp.inf))

    return jax.lax.cond(wanted, evaluate, nothing)


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
