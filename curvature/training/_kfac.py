"""KFAC: steps by the inverse of running Kronecker factors, of a length that the exact quadratic model chooses."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from curvature import _checks
from curvature._numerics import norm
from curvature._trees import ravel
from curvature._types import Scalar, Tree, Vector
from curvature.operators._curvature import GaussNewtonOperator
from curvature.operators._data import Reduction
from curvature.operators._likelihoods import Likelihood
from curvature.operators._pytrees import structure_of
from curvature.operators.kronecker._factors import Sharing
from curvature.operators.kronecker._operator import KroneckerOperator
from curvature.operators.kronecker._outputs import Kind
from curvature.optimizers._wrappers import gradient_for, is_placeholder, wrappable
from curvature.training._damping import at_step, current, judge, judges, objective_of
from curvature.training._stochastic import (
    Key,
    KeyData,
    keep_if_finite,
    key_data,
    key_of_step,
    running_mean,
    wide,
    widened,
)

_NAME = "kfac"


class KFACState(NamedTuple):
    """The state of ``kfac``: plain arrays, ready for a checkpoint.

    Attributes:
        count: the updates so far, without those that a value that is not finite kept from being made.
        damping: the damping of the last update, or for the next one if it adapts.
        ratio: the reduction ratio when it was last measured; 1 before.
        step: the last update, for momentum.
        factors: running means of the arrays that a ``KroneckerOperator`` holds.
        inverse: those of its damped inverse.
        key: the words of the key, from which and ``count`` the labels of a step follow; None where none are drawn.
    """

    count: Int[Array, ""]
    damping: Float[Array, ""]
    ratio: Float[Array, ""]
    step: Tree
    factors: tuple[Array, ...]
    inverse: tuple[Array, ...]
    key: KeyData | None


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

    The factors are those of a ``KroneckerOperator`` on the data that ``update`` is given as ``args=``, which may be
    another batch than that of the gradient ``g``. Each new one counts ``max(1 - decay, 1/k)``, where it is number k.

    With the direction ``d`` and the last step ``s`` the step is ``learning_rate d + momentum s``. Where no learning
    rate is given both numbers are those that minimize the quadratic model ``g'p + p'(G + damping I) p / 2`` over
    ``p = alpha d + mu s``, with the exact Gauss-Newton matrix ``G`` on ``args``; then nothing has to be tuned.

    The damping follows the quality of that model, and steps that raise the objective are refused, as by
    ``natural_gradient``. Where a gradient, the factors of a batch, or the step are not finite, the update is zero and
    the state stays, so that the next batch takes the place of this one.

    Args:
        model: ``model(params, *args) -> outputs``, on a batch, as for ``KroneckerOperator``.
        loss: ``loss(outputs, *args) -> scalar``, the mean or the sum over examples.
        example: a batch like those to come, of which only shapes and dtypes matter: the state depends on where the
            model uses which leaf. A tuple, or one argument that is not a tuple.
        learning_rate: a number or an optax schedule; None has the model choose at every step.
        momentum: how much of the last step is repeated; without a learning rate only whether it is 0 matters.
        damping: the first damping, in the units of the curvature; an optax schedule is followed and not adapted.
        adapt_every: how many steps between adaptations; None takes every step and keeps the damping.
        decay: the decay of the factors.
        refresh_every: how many steps between new factors.
        invert_every: how many steps between inversions, which the damping waits for too.
        exact: whether the inverse is that of the damped product ``A x G + damping I``, or of damped factors with
            their ``pi``: see ``KroneckerOperator.inverse``.
        kl_limit: with a learning rate, the most that ``learning_rate**2 g'(K + damping I)^-1 g`` may be: longer steps
            are cut. None is no limit.
        kind: ``"exact"``, ``"sampled"`` or ``"empirical"``, as for ``KroneckerOperator``, and so are all that follow.
            ``"sampled"`` takes one backward pass, ``"exact"`` one for each output.
        likelihood: for ``"sampled"``, and for closed forms.
        sharing: for weights that are used at several positions.
        reduction: ``"mean"`` or ``"sum"``: what the loss of the batch is of those of its examples.
        key: the randomness of ``"sampled"``.

    Returns:
        An ``optax.GradientTransformationExtraArgs`` whose state is a ``KFACState``; its
        ``update(grad, state, params, *, args, value=, value_fn=)`` returns the step.

    Raises:
        TypeError: when a function is not callable, or the key is none.
        ValueError: for an unknown option, a number out of range, a missing key; from ``update`` without ``args=``.

    Cost: the factors of a ``KroneckerOperator``, every ``refresh_every`` steps; an eigendecomposition of each, every
        ``invert_every`` steps; without a learning rate two JVPs of the model at each step; every ``adapt_every`` steps
        two evaluations of the objective, and with a learning rate a JVP.

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
        _checks.check_callable(_NAME, option, function)
        _checks.check_hashable(_NAME, option, function)
    for option, value in {"learning_rate": learning_rate, "damping": damping}.items():
        if value is not None:
            _checks.check_schedule(_NAME, option, value)
    for option, value in {"momentum": momentum, "decay": decay}.items():
        _checks.check_decay(_NAME, option, value)
    every = {"adapt_every": adapt_every, "refresh_every": refresh_every, "invert_every": invert_every}
    for option, count in every.items():
        if count is not None or option != "adapt_every":
            _checks.check_static_count(_NAME, option, count, 1)
    if kl_limit is not None:
        _checks.check_positive(_NAME, "kl_limit", kl_limit)
    _checks.check_choice(_NAME, "kind", kind, Kind)
    _checks.check_sampling(_NAME, kind, likelihood, key)
    sampling = key if kind == "sampled" else None
    if sampling is not None:
        _checks.check_key(_NAME, sampling)
    factors = partial(KroneckerOperator, kind=kind, likelihood=likelihood, sharing=sharing, reduction=reduction)
    example = example if type(example) is tuple else (example,)
    setting = _Setting(
        model, loss, structure_of(example), learning_rate, momentum, damping, adapt_every, decay,
        refresh_every, invert_every, exact, kl_limit, likelihood, factors, sampling,
    )  # fmt: skip
    functions = wrappable(_NAME, partial(_init, setting), partial(_update, setting))
    return optax.GradientTransformationExtraArgs(*functions)


class _Setting(NamedTuple):
    """The arguments of ``kfac``; the key only where labels are drawn."""

    model: Callable[..., Any]
    loss: Callable[..., Any]
    example: tuple[Any, ...]
    learning_rate: optax.ScalarOrSchedule | None
    momentum: float | Array
    damping: optax.ScalarOrSchedule
    adapt_every: int | None
    decay: float | Array
    refresh_every: int
    invert_every: int
    exact: bool
    kl_limit: float | Array | None
    likelihood: Likelihood | None
    operator: Callable[..., KroneckerOperator]
    key: Key | None

    @property
    def has_momentum(self) -> bool:
        """Whether the last step matters; an array may be anything."""
        return isinstance(self.momentum, jax.Array) or self.momentum != 0

    def fresh(self, params: Tree, args: tuple[Any, ...], key: Any) -> KroneckerOperator:
        """The factors on a batch."""
        return self.operator(self.model, self.loss, params, *args, key=key)

    def inverse(self, factors: KroneckerOperator, damping: Scalar) -> KroneckerOperator:
        """Their damped inverse."""
        return factors.inverse(damping, exact=self.exact)


def _init(setting: _Setting, params: Tree) -> Any:
    zero, dtype = jnp.asarray(0, jnp.int32), ravel(params)[0].dtype
    damping = at_step(setting.damping, zero, dtype)
    factors: Any = damping  # for a placeholder one leaf stands for all arrays, whose number only parameters decide
    inverse: Any = damping
    if not is_placeholder(params):
        factors, inverse = map(_zeros, _structures(setting, params, setting.example, damping))
    return KFACState(
        count=zero,
        damping=damping,
        ratio=jnp.asarray(1, dtype),
        step=jax.tree.map(jnp.zeros_like, params),
        factors=factors,
        inverse=inverse,
        key=None if setting.key is None else key_data(_NAME, setting.key),
    )


def _zeros(operator: KroneckerOperator) -> tuple[Array, ...]:
    return tuple(jnp.zeros(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(operator))


def _structures(
    setting: _Setting, params: Tree, args: tuple[Any, ...], damping: Scalar
) -> tuple[KroneckerOperator, KroneckerOperator]:
    """The factors and their inverse, of which only shapes and dtypes are there."""

    def both(params: Tree, args: tuple[Any, ...], damping: Scalar) -> tuple[KroneckerOperator, KroneckerOperator]:
        factors = setting.fresh(params, args, setting.key)
        return factors, setting.inverse(factors, damping)

    return jax.eval_shape(both, params, args, damping)


def _update(
    setting: _Setting,
    updates: Tree,
    state: Any,
    params: Tree | None = None,
    *,
    args: Any = None,
    value: Any = None,
    grad: Any = None,
    value_fn: Callable[..., Any] | None = None,
    **extra_args: Any,
) -> tuple[Tree, Any]:
    params = _checks.check_point(_NAME, "params", _checks.require_extra(_NAME, "params", params))
    updates = _checks.check_direction(_NAME, "updates", updates, "params", params)
    batch = _checks.require_data(_NAME, args)
    if judges(setting.damping, setting.adapt_every):
        gradient_for(_NAME, updates, grad)  # steps of a gradient that was changed, judged by an objective that was not
    damping = current(setting.damping, state.damping, state.count)
    factors, inverse = _refreshed(setting, state, params, batch, damping)
    flat, narrow = ravel(updates)
    grad, direction, last = widened((flat, -ravel(inverse.mv(updates))[0], ravel(state.step)[0]))

    def unravel(vector: Vector) -> Tree:
        return narrow(vector.astype(flat.dtype))

    quadratic = _Quadratic(setting, params, batch, unravel)
    if setting.learning_rate is None:
        vector = quadratic.minimizer(grad, direction, last, damping, setting.has_momentum)
    else:
        rate = at_step(setting.learning_rate, state.count, grad.dtype) * _kl_cut(setting, state.count, grad, direction)
        vector = rate * direction + jnp.asarray(setting.momentum, grad.dtype) * last
    step, objective = unravel(vector), objective_of(setting.model, setting.loss, batch, value, value_fn, extra_args)

    def measure() -> Scalar:
        slope = jnp.vdot(grad, vector, precision="highest")
        predicted = -(slope + quadratic.forms([vector])[0, 0] / 2)
        return objective.ratio(params, step, predicted.astype(flat.dtype))

    found = judge(setting.damping, damping, state.ratio, state.count, setting.adapt_every, measure)
    step = unravel(jnp.where(found.accepted, vector, 0))
    held = tuple(jax.tree.leaves(factors)), tuple(jax.tree.leaves(inverse))
    after = KFACState(state.count + 1, found.damping, found.ratio, step, *held, state.key)
    return keep_if_finite((grad, vector, held), step, after, state)


def _refreshed(
    setting: _Setting, state: KFACState, params: Tree, args: tuple[Any, ...], damping: Scalar
) -> tuple[KroneckerOperator, KroneckerOperator]:
    """The running factors and their inverse, each made anew when its turn comes."""
    shapes, inverse_shapes = _structures(setting, params, args, damping)
    factors = jax.tree.unflatten(jax.tree.structure(shapes), state.factors)
    inverse = jax.tree.unflatten(jax.tree.structure(inverse_shapes), state.inverse)
    key = None if setting.key is None or state.key is None else key_of_step(setting.key, state.key, state.count)

    def renewed() -> KroneckerOperator:
        number = (state.count // setting.refresh_every + 1).astype(wide(damping.dtype))
        kept = jnp.minimum(1 - 1 / number, jnp.asarray(setting.decay, number.dtype))
        return running_mean(factors, setting.fresh(params, args, key), kept)

    factors = jax.lax.cond(state.count % setting.refresh_every == 0, renewed, lambda: factors)
    due = state.count % setting.invert_every == 0
    return factors, jax.lax.cond(due, setting.inverse, lambda *_: inverse, factors, damping)


def _kl_cut(setting: _Setting, count: Int[Array, ""], grad: Vector, direction: Vector) -> Scalar:
    """The share of a step that the limit of its divergence leaves."""
    if setting.kl_limit is None or setting.learning_rate is None:
        return jnp.ones((), grad.dtype)
    rate = at_step(setting.learning_rate, count, grad.dtype)
    divergence = -(rate**2) * jnp.vdot(grad, direction, precision="highest")
    return jnp.sqrt(jnp.minimum(1, setting.kl_limit / jnp.where(divergence > 0, divergence, 1)))


class _Quadratic:
    """The exact Gauss-Newton matrix on a batch, by its values on a few directions alone."""

    def __init__(
        self, setting: _Setting, params: Tree, args: tuple[Any, ...], unravel: Callable[[Vector], Tree]
    ) -> None:
        op = GaussNewtonOperator(setting.model, setting.loss, params, *args, likelihood=setting.likelihood)
        jacobian, on_outputs = op.factors()
        self._push, self._weigh, self._unravel = jacobian.linearize(), on_outputs.linearize(), unravel

    def forms(self, directions: list[Vector]) -> Float[Array, "k k"]:
        """``u_i' G u_j = (J u_i)' M (J u_j)``, which takes no backward pass."""
        pushed = [self._push(self._unravel(u)) for u in directions]
        weighed = [self._weigh(u) for u in pushed]
        rows, columns = (jnp.stack([ravel(widened(u))[0] for u in trees]) for trees in (pushed, weighed))
        return jnp.matmul(rows, columns.T, precision="highest")

    def minimizer(self, grad: Vector, direction: Vector, last: Vector, damping: Scalar, with_last: bool) -> Vector:
        """The damped model's minimizer among multiples of the direction, or in the plane of it and the last step."""
        basis = [_unit(direction), _unit(last)] if with_last else [_unit(direction)]
        rows = jnp.stack(basis)
        damped = self.forms(basis) + damping.astype(grad.dtype) * jnp.matmul(rows, rows.T, precision="highest")
        curvatures = jnp.diagonal(damped)
        scale = 1 / jnp.sqrt(jnp.where(curvatures > 0, curvatures, 1))  # however much the curvatures differ
        scaled = jnp.outer(scale, scale) * (damped + damped.T) / 2
        inverse = jnp.linalg.pinv(scaled, hermitian=True)  # parallel, or no last step: rank 1
        slopes = scale * jnp.matmul(rows, grad, precision="highest")
        shares = -scale * jnp.matmul(inverse, slopes, precision="highest")
        return jnp.matmul(shares, rows, precision="highest")  # Martens & Grosse (2015), section 7


def _unit(vector: Vector) -> Vector:
    size = norm(vector)
    return vector / jnp.where(size > 0, size, 1)
