"""Shared by the stochastic methods: random keys, estimators of the curvature's diagonal, running means."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from curvature import _checks
from curvature._types import Tree
from curvature.operators import _likelihoods
from curvature.optimizers._method import bind_extras
from curvature.optimizers._wrappers import wrappable
from curvature.transforms._hessian import hvp

Key = PRNGKeyArray | UInt32[Array, "..."]
State = TypeVar("State")
KeyData = UInt32[Array, " words"]
"""A key as plain integers, which every checkpoint format can hold."""


def key_data(key: Key) -> KeyData:
    """The words of a typed or raw key."""
    _checks.check_key(key)
    return jax.random.key_data(key)


def sampling_key(kind: str, likelihood: str | None, key: Key | None) -> Key | None:
    """The key for ``kind="sampled"``, checked; None for kinds that draw no labels."""
    _checks.check_sampling(kind, likelihood, key)
    if kind != "sampled":
        return None
    _checks.check_key(key)
    return key


def key_of_step(key: Key | None, data: KeyData | None, count: Int[Array, ""]) -> Any:
    """The key of a step, from the words in the state; ``key`` only determines the implementation. None without one."""
    if key is None or data is None:
        return None
    return jax.random.fold_in(jax.random.wrap_key_data(data, impl=jax.random.key_impl(key)), count)


def check_update(updates: Tree, params: Tree | None) -> tuple[Tree, Tree]:
    """The arguments ``updates`` and ``params`` of ``update``, as arrays of the same shapes and dtypes."""
    params = _checks.check_point("params", _checks.require_extra("params", params))
    return _checks.check_direction("updates", updates, "params", params), params


Mask = Tree | Callable[[Tree], Tree]
"""A mask as optax accepts it: a tree of booleans, a prefix of one, or a function from the parameters to one."""


def with_learning_rate(
    scale: optax.GradientTransformationExtraArgs,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: float | Array,
    mask: Mask | None,
) -> optax.GradientTransformationExtraArgs:
    """``x <- x - learning_rate (u + weight_decay x)`` with the updates ``u`` of ``scale``."""
    _checks.check_schedule("learning_rate", learning_rate)
    _checks.check_nonnegative("weight_decay", weight_decay)
    decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(scale, decay, optax.scale_by_learning_rate(learning_rate))


class ScaledByDiagonal(NamedTuple):
    """The frame of Sophia and AdaHessian: running means of the gradient, and of estimates of a diagonal."""

    key: Key
    b1: float | Array
    b2: float | Array
    refresh_every: int

    def transformation(
        self,
        state_of: Callable[..., Any],
        estimator: Callable[[Tree, dict[str, Any]], Callable[[Key], Tree]],
        scale: Callable[[Tree, Tree, Tree, Int[Array, ""]], tuple[Any, ...]],
        *fields: Array,
    ) -> optax.GradientTransformationExtraArgs:
        """An optax transformation whose states are ``state_of(count, momentum, mean, *fields, key)``.

        ``estimator(params, extras)`` returns the estimate as a function of a key, of which ``mean`` is the running
        mean. ``scale(momentum, mean, updates, count)`` returns the updates and the next ``fields``.
        """
        data = key_data(self.key)

        def init(params: Tree) -> Any:
            zeros = wide_zeros(params)
            return state_of(jnp.asarray(0, jnp.int32), zeros, zeros, *fields, data)

        def update(updates: Tree, state: Any, params: Tree | None = None, **extras: Any) -> tuple[Tree, Any]:
            updates, params = check_update(updates, params)
            estimate, old = estimator(params, extras), state[2]

            def refresh() -> Tree:
                return running_mean(old, estimate(key_of_step(self.key, state.key, state.count)), self.b2)

            momentum = running_mean(state.momentum, updates, self.b1)
            mean = jax.lax.cond(state.count % self.refresh_every == 0, refresh, lambda: old)
            step, *following = scale(momentum, mean, updates, state.count)
            after = state_of(state.count + 1, momentum, mean, *following, state.key)
            return keep_if_finite((momentum, mean), step, after, state)

        return optax.GradientTransformationExtraArgs(*wrappable(init, update))


def estimate_by_products(params: Tree, extras: dict[str, Any]) -> Callable[[Key], Tree]:
    """Hutchinson's estimate with the ``hvp_fn=`` of an update, or with the Hessian of its ``value_fn=``."""
    hvp_fn, value_fn = extras.pop("hvp_fn", None), extras.pop("value_fn", None)
    if hvp_fn is None:
        fun = bind_extras(_checks.require_extra("value_fn", value_fn), extras)
        return lambda key: hutchinson(params, key, lambda v: hvp(fun, params, v))
    return lambda key: hutchinson(params, key, hvp_fn)


def hutchinson(params: Tree, key: Key, hvp_fn: Callable[[Tree], Tree]) -> Tree:
    """``z * (H z)`` for random signs ``z``: mean ``diag H``, variance ``sum_(j != i) H[i, j]^2`` of entry i.

    Hutchinson (1989), doi:10.1080/03610918908812806; for the diagonal, Bekas, Kokiopoulou and Saad (2007).
    """
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    signs = [jax.random.rademacher(one, leaf.shape, leaf.dtype) for one, leaf in zip(keys, leaves, strict=True)]
    z = structure.unflatten(signs)
    return jax.tree.map(jnp.multiply, z, hvp_fn(z))


def gauss_newton_bartlett(
    model: Callable[..., Any],
    loss: Callable[..., Any],
    likelihood: _likelihoods.Likelihood,
    params: Tree,
    args: tuple[Any, ...],
    key: Key,
) -> Tree:
    """The squared gradient at drawn labels, whose mean is the diagonal of the Gauss-Newton matrix.

    For a loss ``sum_r w_r nll_r`` it is ``(sum_r sqrt(w_r) J_r' s_r)**2`` with ``s_r`` the score at a drawn label. The
    scores are independent with mean zero, so the expectation of the square is ``sum_r w_r E[(J_r' s_r)**2]``. For a
    mean over B rows it is ``B`` times the squared gradient: Liu et al. (arXiv:2305.14342), algorithm 2.
    """
    outputs, pull = jax.vjp(lambda params: model(params, *args), params)
    family, weights = _likelihoods.family_and_weights(likelihood, loss, outputs, args)
    scores = _likelihoods.draw_scores(family, key, outputs, jnp.zeros((), jnp.int32), num_samples=1)
    columns = jax.tree.map(lambda weight, score: jnp.sqrt(weight) * score[0], weights, scores)
    return jax.tree.map(jnp.square, widened(pull(columns)[0]))


def wide(dtype: Any) -> Any:
    """The dtype to accumulate in: at least single precision, because in half precision decay rates near 1 are 1."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else dtype


def widened(tree: Tree) -> Tree:
    """The tree in the dtypes to accumulate in."""
    return jax.tree.map(lambda leaf: leaf.astype(wide(leaf.dtype)), tree)


def wide_zeros(params: Tree) -> Tree:
    """Initial running means: zeros like the parameters, in the dtypes to accumulate in."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, wide(leaf.dtype)), params)


def keep_if_finite(checked: Tree, step: Tree, after: State, before: State) -> tuple[Tree, State]:
    """The step and the state after it; a zero step and the state before it if a checked array is not finite."""
    leaves = jax.tree.leaves(checked)
    finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))
    step = jax.tree.map(lambda leaf: jnp.where(finite, leaf, jnp.zeros_like(leaf)), step)
    return step, jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, before)


def running_mean(mean: Tree, new: Tree, decay: Any) -> Tree:
    """``decay mean + (1 - decay) new``; each leaf keeps its dtype."""

    def of_leaf(old: Array, leaf: Array) -> Array:
        kept = jnp.asarray(decay, old.dtype)
        return kept * old + (1 - kept) * leaf.astype(old.dtype)

    return jax.tree.map(of_leaf, mean, new)


def unbiased(mean: Tree, decay: Any, terms: Int[Array, ""]) -> Tree:
    """Bias correction of a running mean that started at zero, after ``terms`` terms."""
    return jax.tree.map(lambda leaf: leaf / (1 - jnp.asarray(decay, leaf.dtype) ** terms.astype(leaf.dtype)), mean)
