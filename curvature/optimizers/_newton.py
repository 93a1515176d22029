"""Newton's method with a line search, on a Hessian made positive definite."""

import functools
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from curvature._errors import public
from curvature._numerics import dot
from curvature._types import Vector
from curvature.linalg._subproblems import positive_definite_solve
from curvature.optimizers._line_search import search_values, with_gradients
from curvature.optimizers._method import Local, SecondOrder, Unevaluated, second_order


class NewtonState(NamedTuple):
    """The state of ``newton``: plain arrays, ready for a checkpoint.

    Attributes:
        step_size: the share of the Newton step that the last update took.
        num_trials: the points that it tried.
        status: a ``Status``: running, or why the last update could not move.
        stored: nothing, for optax.
    """

    step_size: Float[Array, ""]
    num_trials: Int[Array, ""]
    status: Int[Array, ""]
    stored: Unevaluated


@functools.lru_cache(maxsize=64)
@public
def newton() -> SecondOrder:
    """Newton's method with a line search: an optax transformation for smooth objectives with a Hessian to form.

    The direction is ``-B^-1 g``, with ``B = H`` where the Hessian is positive definite and ``H`` with its eigenvalues
    replaced by their absolute values where it is not, so it always descends. The step is cut from 1 until the value
    falls by ``1e-4`` of what the slope promises, give or take 10 roundings of the value. The direction does not depend
    on the scale of the objective, nor on that of any variable.

    Use it where ``optax.lbfgs()`` stands: ``update(grad, state, params, value=, grad=, value_fn=)`` returns the step to
    an accepted point. If there is none, the step is zero and ``state.status`` says why.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``NewtonState``.

    Raises:
        ValueError: from ``update`` when an argument is missing.

    Cost: for each update one linearization of the gradient, n Hessian products, n^3 / 3 FLOPs (30 times that where the
        Hessian is not positive definite), one value and gradient for each trial; memory for 3 n^2 numbers.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> f = lambda x: jnp.sum(jnp.cosh(x - jnp.arange(2.0)))
        >>> x, solver = jnp.zeros(2), curvature.newton()
        >>> state = solver.init(x)
        >>> for _ in range(5):
        ...     value, grad = jax.value_and_grad(f)(x)
        ...     step, state = solver.update(grad, state, x, value=value, grad=grad, value_fn=f)
        ...     x = optax.apply_updates(x, step)
        >>> jnp.round(x, 3)
        Array([0., 1.], dtype=float32)

    References: Nocedal and Wright, Numerical Optimization, 2nd ed. (2006), algorithms 3.1 and 3.2, section 3.4.
    """
    return second_order(NewtonState, _step, dense=True, start=lambda x: {"step_size": jnp.asarray(1, x.dtype)})


def _step(state: NewtonState, local: Local) -> tuple[Vector, NewtonState]:
    direction = -positive_definite_solve(local.hessian(), local.grad)
    step, fields = search_values(with_gradients(local), direction, dot(local.grad, direction))
    return step, state._replace(**fields)
