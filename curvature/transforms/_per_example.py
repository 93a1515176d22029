"""Gradients and Hessians of a loss for each example of a batch."""

from collections.abc import Callable
from typing import Any

from curvature import _checks
from curvature._errors import later, public
from curvature._types import ChunkSize, HessianMode, Objective, Tree
from curvature.programs import _traced
from curvature.transforms import _modes
from curvature.transforms._chunks import vmap
from curvature.transforms._compositions import hessian_of
from curvature.transforms._jacobian import gradient_of


@public
def per_example_grad(loss: Objective, *, chunk_size: ChunkSize = "auto") -> Callable[..., Tree]:
    """The gradient of ``loss`` for each example: ``G[b] = d loss(params, *example_b) / d params``.

    A loss that computes statistics of its batch, such as batch normalization in training mode on ``x[None]``, sees a
    batch of one example here.

    Args:
        loss: ``loss(params, *example) -> scalar``, for one example.
        chunk_size: how many examples run at once; see ``vmap``.

    Returns:
        A function ``(params, *batch)``, where every leaf of the batch has a leading axis of B examples. It returns a
        tree like ``params`` with leaves of shape ``(B,) + leaf.shape``, the gradients of single examples: nothing is
        divided by B. Inside ``jax.shard_map`` each device returns the gradients of its examples.

    Raises:
        TypeError: if the loss is not scalar, or a leaf of ``params`` is not of a real floating dtype.
        ValueError: if no batch is given, or its leaves differ in their leading axis.

    Cost: one gradient for each example. Memory: B copies of ``params``, and the intermediates of one chunk.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> loss = lambda w, x, y: 0.5 * (w @ x - y) ** 2
        >>> curvature.per_example_grad(loss)(jnp.ones(2), jnp.eye(2), jnp.array([0.0, 1.0]))
        Array([[1., 0.],
               [0., 0.]], dtype=float32)
    """

    def gradient(program: _traced.Program) -> Tree:
        mode = _modes.choose_jacobian(program, "auto")
        return gradient_of(program, program.x, mode)[0]

    return _map_over_batch(loss, gradient, chunk_size)


@public
def per_example_hessian(
    loss: Objective, *, mode: HessianMode = "auto", chunk_size: ChunkSize = "auto"
) -> Callable[..., Tree]:
    """The Hessian of ``loss`` for each example: ``H[b] = d^2 loss(params, *example_b) / d params^2``.

    Args:
        loss: ``loss(params, *example) -> scalar``, for one example.
        mode: the composition of modes; see ``hvp``.
        chunk_size: how many examples run at once; see ``vmap``.

    Returns:
        A function ``(params, *batch)``, where every leaf of the batch has a leading axis of B examples. It returns a
        tree like ``params`` of trees like ``params`` with blocks of shape ``(B,) + leaf_i.shape + leaf_j.shape``.

    Raises:
        TypeError, ValueError: as ``per_example_grad``; and for an unknown or illegal mode.

    Cost: one Hessian for each example. Memory: B matrices of n x n entries, and the intermediates of one chunk.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> loss = lambda w, x: 0.5 * (w @ x) ** 2
        >>> curvature.per_example_hessian(loss)(jnp.ones(2), jnp.array([[1.0, 2.0]]))
        Array([[[1., 2.],
                [2., 4.]]], dtype=float32)
    """
    _checks.check_choice("mode", mode, HessianMode)

    def one_hessian(program: _traced.Program) -> Tree:
        return hessian_of(program, mode, None)[0]

    return _map_over_batch(loss, one_hessian, chunk_size)


def _map_over_batch(
    loss: Objective, derivative: Callable[[_traced.Program], Tree], chunk_size: ChunkSize
) -> Callable[..., Tree]:
    """``derivative`` of the loss at ``params``, mapped over the leading axis of the batch."""
    _checks.check_callable("loss", loss)
    _checks.check_chunk_size(chunk_size)

    def derivative_of_example(params: Tree, *example: Any) -> Tree:
        def value(params: Tree) -> tuple[Any, None]:
            return _checks.check_arrays("loss", loss(params, *example)), None

        program = _traced.trace_on_device(value, params)
        _checks.check_scalar_output("loss", program.out)
        return derivative(program)

    @later
    def over_batch(params: Tree, *batch: Any) -> Tree:
        params = _checks.check_point("params", params)
        _checks.check_batch(batch)
        return vmap(derivative_of_example, (None,) + (0,) * len(batch), chunk_size=chunk_size)(params, *batch)

    return over_batch
