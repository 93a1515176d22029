"""Shared by the stochastic methods: random keys, estimators of the curvature's diagonal, running means."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from curvature import _checks
from curvature._types import Tree
from curvature.operators import _likelihoods
from curvature.optimizers._method import bind_extras
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


def key_of_step(key: Key, data: KeyData, count: Int[Array, ""]) -> PRNGKeyArray:
    """The key of a step, from the words in the state; ``key`` only determines the implementation."""
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


def product_of_extras(
    params: Tree, hvp_fn: Callable[[Tree], Tree] | None, value_fn: Callable[..., Any] | None, extra_args: dict[str, Any]
) -> Callable[[Tree], Tree]:
    """The ``hvp_fn=`` of an update, or the products with the Hessian of its ``value_fn=``."""
    if hvp_fn is not None:
        return hvp_fn
    fun = bind_extras(_checks.require_extra("value_fn", value_fn), extra_args)
    return lambda v: hvp(fun, params, v)


def hutchinson(params: Tree, key: PRNGKeyArray, hvp_fn: Callable[[Tree], Tree]) -> Tree:
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
    key: PRNGKeyArray,
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
