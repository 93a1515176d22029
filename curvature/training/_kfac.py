"""KFAC: running Kronecker factors; the learning rate and momentum minimize the exact quadratic model."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._errors import public
from curvature._numerics import dot, matmul, norm
from curvature._trees import ravel
from curvature._types import Scalar, Tree, Vector
from curvature.operators._curvature import GaussNewtonOperator
from curvature.operators._data import Reduction
from curvature.operators._likelihoods import Likelihood
from curvature.operators._pytrees import structure_of
from curvature.operators.kronecker._factors import Sharing
from curvature.operators.kronecker._operator import KroneckerOperator
from curvature.operators.kronecker._outputs import Kind
from curvature.optimizers._wrappers import is_placeholder
from curvature.training._damping import DampedMethod, Proposal, at_step
from curvature.training._stochastic import Key, KeyData, key_of_step, running_mean, sampling_key, wide, widened


class KFACState(NamedTuple):
    """The state of ``kfac``: plain arrays, ready for a checkpoint.

    Attributes:
        count: the number of updates, not counting updates skipped because a value was not finite.
        damping: the damping of the last update, or of the next update if it adapts.
        ratio: the last reduction ratio that was measured; 1 before the first.
        step: the last update, for momentum.
        factors: running means of the arrays of a ``KroneckerOperator``.
        inverse: the arrays of the damped inverse of these factors.
        key: the words of the key; ``key`` and ``count`` determine the labels of a step. None if none are drawn.
    """

    count: Int[Array, ""]
    damping: Float[Array, ""]
    ratio: Float[Array, ""]
    step: Tree
    factors: tuple[Array, ...]
    inverse: tuple[Array, ...]
    key: KeyData | None


@public
def kfac(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    example: Any,
    *,
    learning_rate: optax.ScalarOrSchedule | None = None,
    momentum: float | Array = 0.9,
    damping: optax.ScalarOrSchedule = 1e-2,
    adapt_every: int | None = 1,
    decay: float | Array = 0.95,
    refresh_every: int = 1,
    invert_every: int = 5,
    exact: bool = True,
    kl_limit: float | Array | None = None,
    kind: Kind = "exact",
    likelihood: Likelihood | None = None,
    sharing: Sharing = "expand",
    reduction: Reduction = "mean",
    key: Key | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Steps along ``-(K + damping I)^-1 g`` with running means ``K`` of Kronecker factors: an optax transformation.

    ``K`` averages the factors of ``KroneckerOperator`` on the data that is passed to ``update`` as ``args=``, possibly
    another batch than that of the gradient ``g``. The k-th factors have the weight ``max(1 - decay, 1/k)``.

    With the direction ``d`` and the last step ``s`` the step is ``learning_rate d + momentum s``. Without a learning
    rate, both numbers minimize the quadratic model ``g'p + p'(G + damping I) p / 2`` over ``p = alpha d + mu s``, with
    the exact Gauss-Newton matrix ``G`` on ``args``, and need no tuning.

    The damping adapts to the quality of that model, and steps that raise the objective are rejected, as in
    ``natural_gradient``. If a gradient, the factors of a batch, or the step is not finite, the update is zero and the
    state is unchanged, so the next batch replaces the current one.

    Args:
        model: ``model(params, *args) -> outputs`` for a batch; see ``KroneckerOperator``.
        loss: ``loss(outputs, *args) -> scalar``, the mean or the sum over examples.
        example: a batch with the shapes and dtypes of later batches; its values do not matter. The structure of the
            state depends on how the model uses its parameters. A tuple, or one argument that is not a tuple.
        learning_rate: a number or an optax schedule; None minimizes the quadratic model at every step.
        momentum: the factor of the last step; without a learning rate it only matters whether it is 0.
        damping: the initial damping, in the units of the curvature; an optax schedule is followed and not adapted.
        adapt_every: the number of steps between adaptations; None accepts every step and keeps the damping.
        decay: the decay rate of the factors.
        refresh_every: the number of steps between evaluations of the factors.
        invert_every: the number of steps between inversions; a new damping takes effect at the next inversion.
        exact: True to invert the damped product ``A x G + damping I``, False to invert damped factors with ``pi``; see
            ``KroneckerOperator.inverse``.
        kl_limit: with a learning rate, the upper bound of ``learning_rate**2 g'(K + damping I)^-1 g``; longer steps are
            shortened. None is no bound.
        kind: ``"exact"``, ``"sampled"`` or ``"empirical"``; see ``KroneckerOperator``. ``"sampled"`` takes one backward
            pass, ``"exact"`` one for each output.
        likelihood: for ``"sampled"`` and for closed forms; see ``KroneckerOperator``.
        sharing: for weights that are used at several positions; see ``KroneckerOperator``.
        reduction: whether the loss of a batch is the ``"mean"`` or the ``"sum"`` of the losses of its examples.
        key: the random key for ``"sampled"``.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``KFACState``; its
        ``update(grad, state, params, *, args, value=, value_fn=)`` returns the step.

    Raises:
        TypeError: if a function is not callable, or ``key`` is not a random key.
        ValueError: for an unknown option, a number out of range, a missing key; from ``update`` without ``args=``.

    Cost: the factors of a ``KroneckerOperator`` every ``refresh_every`` steps; an eigendecomposition of each factor
        every ``invert_every`` steps; without a learning rate two JVPs of the model per step; every ``adapt_every``
        steps two evaluations of the objective, and with a learning rate a JVP.

    Example:
        >>> import jax, jax.numpy as jnp, optax, curvature
        >>> model = lambda w, a, y: jnp.tanh(a @ w["in"]) @ w["out"]
        >>> loss = lambda z, a, y: 0.5 * jnp.mean((z[:, 0] - y) ** 2)
        >>> w = {"in": jnp.array([[1.0, -1.0]]), "out": jnp.ones((2, 1)) / 2}
        >>> a = jnp.linspace(-1.0, 1.0, 20)[:, None]
        >>> batch = a, jnp.sin(a[:, 0])
        >>> objective = lambda w: loss(model(w, *batch), *batch)
        >>> solver = curvature.kfac(model, loss, batch)
        >>> state, update = solver.init(w), jax.jit(solver.update)
        >>> for _ in range(20):
        ...     step, state = update(jax.grad(objective)(w), state, w, args=batch)
        ...     w = optax.apply_updates(w, step)
        >>> bool(objective(w) < 1e-4)
        True

    References: Martens and Grosse (arXiv:1503.05671), sections 5, 6 and 7; for ``kl_limit`` Distributed second-order
        optimization using Kronecker-factored approximations (ICLR 2017), section 5.
    """
    for option, function in {"model": model, "loss": loss}.items():
        _checks.check_static_function(option, function)
    for option, value in {"learning_rate": learning_rate, "damping": damping}.items():
        if value is not None:
            _checks.check_schedule(option, value)
    for option, value in {"momentum": momentum, "decay": decay}.items():
        _checks.check_decay(option, value)
    every = {"adapt_every": adapt_every, "refresh_every": refresh_every, "invert_every": invert_every}
    for option, count in every.items():
        if count is not None or option != "adapt_every":
            _checks.check_static_count(option, count, 1)
    if kl_limit is not None:
        _checks.check_positive("kl_limit", kl_limit)
    _checks.check_choice("kind", kind, Kind)
    key = sampling_key(kind, likelihood, key)
    operator = partial(
        KroneckerOperator, model, loss, kind=kind, likelihood=likelihood, sharing=sharing, reduction=reduction
    )
    factors = _Factors(operator, decay, refresh_every, invert_every, exact, key)
    example = structure_of(example if type(example) is tuple else (example,))
    has_momentum = isinstance(momentum, jax.Array) or momentum != 0  # the value of an array may be unknown

    def start(params: Tree, damping: Scalar) -> tuple[Any, ...]:
        arrays: Any = damping, damping  # for a placeholder of params, whose number of arrays is unknown, one leaf each
        if not is_placeholder(params):
            shapes = factors.structures(params, example, damping)
            arrays = tuple(
                tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(operator)) for operator in shapes
            )
        return jax.tree.map(jnp.zeros_like, params), *arrays

    def propose(updates: Tree, state: Any, params: Tree, batch: tuple[Any, ...], damping: Scalar) -> Proposal:
        # 1. Refresh the factors and their inverse: the direction d.
        refreshed = factors.refresh(state, params, batch, damping)
        (grad, unravel), last = ravel(updates), ravel(state.step)[0]
        direction = -ravel(refreshed[1].mv(updates))[0]
        # 2. Choose the learning rate and momentum.
        op = GaussNewtonOperator(model, loss, params, *batch, likelihood=likelihood)
        quadratic = _Quadratic(op, unravel)
        if learning_rate is None:
            vector = quadratic.minimizer(grad, direction, last, damping, has_momentum)
        else:
            rate = at_step(learning_rate, state.count, grad.dtype)
            rate = rate * _kl_factor(kl_limit, rate, grad, direction)
            vector = rate * direction + jnp.asarray(momentum, grad.dtype) * last
        arrays = tuple(tuple(jax.tree.leaves(op)) for op in refreshed)
        return Proposal(vector, lambda step: quadratic.forms([step])[0, 0], lambda step: (step, *arrays), arrays)

    return DampedMethod(model, loss, damping, adapt_every, key).transformation(KFACState, start, propose)


class _Factors(NamedTuple):
    """How the running Kronecker factors are formed and inverted."""

    operator: Callable[..., KroneckerOperator]
    decay: float | Array
    refresh_every: int
    invert_every: int
    exact: bool
    key: Key | None

    def structures(
        self, params: Tree, args: tuple[Any, ...], damping: Scalar
    ) -> tuple[KroneckerOperator, KroneckerOperator]:
        """The factors and their inverse, with shapes and dtypes only."""

        def both(params: Tree, args: tuple[Any, ...], damping: Scalar) -> tuple[KroneckerOperator, KroneckerOperator]:
            factors = self.operator(params, *args, key=self.key)
            return factors, factors.inverse(damping, exact=self.exact)

        return jax.eval_shape(both, params, args, damping)

    def refresh(
        self, state: KFACState, params: Tree, args: tuple[Any, ...], damping: Scalar
    ) -> tuple[KroneckerOperator, KroneckerOperator]:
        """The running factors every ``refresh_every`` steps, and their inverse every ``invert_every`` steps."""
        shapes = self.structures(params, args, damping)
        factors, inverse = (
            jax.tree.unflatten(jax.tree.structure(shape), arrays)
            for shape, arrays in zip(shapes, (state.factors, state.inverse), strict=True)
        )

        def update_mean() -> KroneckerOperator:
            k = (state.count // self.refresh_every + 1).astype(wide(damping.dtype))
            decay = jnp.minimum(1 - 1 / k, jnp.asarray(self.decay, k.dtype))
            on_batch = self.operator(params, *args, key=key_of_step(self.key, state.key, state.count))
            return running_mean(factors, on_batch, decay)

        factors = jax.lax.cond(state.count % self.refresh_every == 0, update_mean, lambda: factors)
        due = state.count % self.invert_every == 0
        return factors, jax.lax.cond(due, lambda: factors.inverse(damping, exact=self.exact), lambda: inverse)


def _kl_factor(kl_limit: float | Array | None, rate: Scalar, grad: Vector, direction: Vector) -> Scalar:
    """The factor, at most 1, that bounds the estimated KL divergence of the step by ``kl_limit``."""
    if kl_limit is None:
        return jnp.ones((), grad.dtype)
    divergence = -(rate**2) * dot(grad, direction)
    return jnp.sqrt(jnp.minimum(1, kl_limit / jnp.where(divergence > 0, divergence, 1)))


class _Quadratic:
    """The quadratic model with the exact Gauss-Newton matrix on a batch, restricted to a few directions."""

    def __init__(self, op: GaussNewtonOperator, unravel: Callable[[Vector], Tree]) -> None:
        jacobian, on_outputs = op.factors()
        self._push, self._weigh, self._unravel = jacobian.linearize(), on_outputs.linearize(), unravel

    def forms(self, directions: list[Vector]) -> Float[Array, "k k"]:
        """``u_i' G u_j = (J u_i)' M (J u_j)``, which takes no backward pass."""
        pushed = [self._push(self._unravel(u)) for u in directions]
        weighted = [self._weigh(u) for u in pushed]
        rows, columns = (jnp.stack([ravel(widened(u))[0] for u in trees]) for trees in (pushed, weighted))
        return matmul(rows, columns.T)

    def minimizer(self, grad: Vector, direction: Vector, last: Vector, damping: Scalar, with_last: bool) -> Vector:
        """The minimizer of the damped model over ``alpha d``, or over ``alpha d + mu s`` with the last step ``s``."""
        basis = [_unit(direction), _unit(last)] if with_last else [_unit(direction)]
        rows = jnp.stack(basis)
        damped = self.forms(basis) + damping.astype(grad.dtype) * matmul(rows, rows.T)
        curvatures = jnp.diagonal(damped)
        scale = 1 / jnp.sqrt(jnp.where(curvatures > 0, curvatures, 1))  # Jacobi scaling
        scaled = jnp.outer(scale, scale) * (damped + damped.T) / 2
        inverse = jnp.linalg.pinv(scaled, hermitian=True)  # of rank 1 if s is zero or parallel to d
        coefficients = -scale * matmul(inverse, scale * matmul(rows, grad))
        return matmul(coefficients, rows)  # Martens & Grosse (2015), section 7


def _unit(vector: Vector) -> Vector:
    size = norm(vector)
    return vector / jnp.where(size > 0, size, 1)
