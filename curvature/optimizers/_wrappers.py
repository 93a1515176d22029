"""Support for optax's wrappers: placeholders, masked trees, gradients changed upstream, donated states."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from curvature import _checks
from curvature._errors import caller, later
from curvature._types import Tree

Init = Callable[[Tree], Any]
Update = Callable[..., tuple[Tree, Any]]

_MOST_PATHS = 5  # in one message


def wrappable(init: Init, update: Update) -> tuple[Any, Any]:
    """``init`` and ``update`` as optax's wrappers can take them.

    ``init`` also takes the placeholder of ``optax.tree.map_params``, and makes a state that a jitted step may donate.
    An error on a tree with masked leaves says so.
    """

    @later
    def init_fn(params: Tree) -> Any:
        if is_placeholder(params):
            return init(params)
        params = _checks.check_point("params", params)
        return in_own_buffers(_naming_masks("init", params, init, params))

    @later
    def update_fn(updates: Tree, state: Any, params: Tree | None = None, **extra_args: Any) -> tuple[Tree, Any]:
        return _naming_masks("update", params, update, updates, state, params, **extra_args)

    return init_fn, update_fn


def is_placeholder(params: Tree) -> bool:
    """Whether ``optax.tree.map_params`` asks which parts of a state are trees like the parameters."""
    return isinstance(params, _placeholder_type())


@functools.cache
def _placeholder_type() -> type:
    """The class of the tree without leaves that stands for the parameters; optax has no public name for it."""
    seen: list[Any] = []

    def init(params: Tree) -> tuple[()]:
        seen.append(params)
        return ()

    optax.tree.map_params(init, lambda leaf: leaf, ())
    return type(seen[0])


def in_own_buffers(state: Any) -> Any:
    """The state with each leaf in a buffer that nothing else uses, neither another leaf nor the caller.

    A jitted step may donate it: a buffer cannot be donated twice, and a donated key or radius would be lost to its
    owner. Outputs of a compiled function have buffers that nothing else uses.
    """
    return jax.tree.map(lambda leaf: leaf if isinstance(leaf, Tracer) else jnp.array(leaf, copy=True), state)


def gradient_for(updates: Tree | None, grad: Tree | None) -> Any:
    """The gradient of an update, where ``updates`` and ``grad=`` are the same arrays but for masked leaves.

    What changed the updates before, such as weight decay or clipping in an ``optax.chain``, has not changed
    ``value_fn``: no step fits both. Tracers are compared by identity, because their values are not known.
    """
    if updates is None or grad is None:
        return grad if updates is None else updates
    if not _are_same(updates, grad):
        _refuse_changed_gradient()
    return updates


def _are_same(updates: Tree, grad: Tree) -> bool:
    leaves, structure = jax.tree.flatten(updates, is_leaf=_is_masked)
    try:
        others = structure.flatten_up_to(grad)
    except ValueError:  # another structure
        return False
    return all(_is_masked(leaf) or _are_equal(leaf, other) for leaf, other in zip(leaves, others, strict=True))


def _are_equal(one: Any, other: Any) -> bool:
    if one is other or isinstance(one, Tracer) or isinstance(other, Tracer):
        return one is other
    return np.array_equal(one, other, equal_nan=True)


def _naming_masks(method: str, params: Tree, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The call, whose errors say so where parts of ``params`` are masked: no function of the user expects that."""
    try:
        return function(*args, **kwargs)
    except Exception as failure:
        nodes = jax.tree_util.tree_leaves_with_path(params, is_leaf=_is_masked)
        masked = [jax.tree_util.keystr(path) for path, node in nodes if _is_masked(node)]
        if masked:
            raise _masked_params(method, masked, failure) from failure
        raise


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _refuse_changed_gradient() -> NoReturn:
    """Raise the error for ``updates`` that differ from ``grad=``."""
    raise ValueError(
        f"{caller()}: updates are other arrays than grad=, expected the gradient of the objective in both. What comes "
        f"before {caller()} in optax.chain (weight decay, clipping), or a wrapper around it (optax.MultiSteps, "
        f"optax.flatten), changes the updates and not the objective. Put {caller()} first in the chain and a penalty "
        "into the objective; or, where the updates are the gradient of the objective, leave out grad=."
    )


def _masked_params(method: str, paths: list[str], failure: Exception) -> TypeError:
    """The error for a call that failed on parameters with masked leaves."""
    shown = ", ".join(f"params{path}" for path in paths[:_MOST_PATHS]) + (", ..." if len(paths) > _MOST_PATHS else "")
    return TypeError(
        f"{caller()}: {method}() has params with optax.MaskedNode instead of {shown}, as optax.masked and "
        f"optax.partition pass them, and fails on them: {type(failure).__name__}: {failure}. Leave out grad=, and pass "
        "functions that fill in the masked leaves; or call it on the tree of the other leaves alone."
    )
