"""Squared norm of the gradient of one example from taps, without forming the gradient where its structure allows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature.programs._affine import Lookup
from curvature.programs._jaxprs import Environment
from curvature.programs._tap_gradients import Factors, canonical_gradient, factors, gradients_of_roots, to_canonical
from curvature.programs._taps import Site, Taps

Square = Float[Array, ""]


class Route(NamedTuple):
    """The rule for the norm of one leaf's gradient.

    Attributes:
        uses: the numbers of the sites where the leaf meets the data; empty if its gradient is formed.
        scalars: roots of one entry that also depend on the leaf, such as a penalty that is part of the loss.
        description: the rule in words.
    """

    uses: tuple[int, ...]
    scalars: tuple[Any, ...]
    description: str


def routes_of(taps: Taps) -> list[Route]:
    """The rule for each leaf."""
    return [_choose_route(taps, leaf) for leaf in range(len(taps.leaves))]


def _choose_route(taps: Taps, leaf: int) -> Route:
    roots = [root for root in taps.roots if leaf in taps.leaves_of[root]]
    own = [root for root in roots if root in taps.views]
    scalars = tuple(root for root in roots if root not in own)
    uses = tuple(n for n, site in enumerate(taps.sites) if any(origin.root in own for origin in site.origins))
    sites = [taps.sites[n] for n in uses]
    unknown = dict.fromkeys(site.eqn.primitive.name for site in sites if site.form is None)
    if not roots:
        return Route((), (), "unused: its gradient is zero")
    if unknown:
        return Route((), (), f"gradient formed, by reverse mode through {', '.join(unknown)}")
    if len(own) != 1 or any(root.aval.size != 1 for root in scalars):
        return Route((), (), "gradient formed: what meets the data is a function of this leaf, not the leaf itself")
    if len({(site.group, frozenset([site.form.rows, site.form.columns])) for site in sites}) != 1:
        return Route((), (), "gradient formed: its uses have no layout in common")
    return Route(uses, scalars, _describe_route(sites))


def _describe_route(sites: Sequence[Site]) -> str:
    positions = sum(site.sizes[1] for site in sites)
    _, _, rows, columns = sites[0].sizes
    if positions == 1:
        return "from inputs and cotangents, gradient not formed"
    if _gram_is_cheaper(positions, rows, columns):
        return f"from the Gram matrices of inputs and cotangents at {positions} positions, gradient not formed"
    return f"gradient formed from inputs and cotangents at {positions} positions"


def _gram_is_cheaper(positions: int, rows: int, columns: int) -> bool:
    """Whether two Gram matrices, s^2 (i + o) products, cost less than the gradient, s i o."""
    return positions * (rows + columns) < rows * columns


def squared_norm(taps: Taps, values: Environment, leaves: Sequence[Array]) -> Callable[[list[Any], list[Any]], Square]:
    """The map from the inputs and cotangents of one example at all sites to the squared norm of its gradient."""
    sites, routes, dtype = taps.sites, routes_of(taps), accumulator(leaves)
    formed = formed_gradients(taps, values, leaves, [k for k, route in enumerate(routes) if not route.uses])
    scalars = list(dict.fromkeys(root for route in routes for root in route.scalars))

    def scalar_root(leaves: list[Array], root: Any) -> Array:
        return taps.parameter_values(leaves)[root].reshape(())

    slopes = {root: jax.grad(scalar_root)(list(leaves), root) for root in scalars}

    def of_example(captured: list[Any], d: list[Any]) -> Square:
        parts = list(zip(sites, captured, d, strict=True))
        weights = gradients_of_roots(taps, values, parts, scalars)
        squares = [jnp.sum(gradient.astype(dtype) ** 2) for gradient in formed(parts)]
        for k, route in enumerate(routes):
            if route.uses:
                uses = [factors(sites[n], captured[n], d[n][0]).astype(dtype) for n in route.uses]
                view = taps.views[sites[route.uses[0]].origins[0].root]
                penalties = [
                    weights[root].reshape(()).astype(dtype) * view.apply(slopes[root][k]).astype(dtype)
                    for root in route.scalars
                ]
                squares.append(_squared_norm_of(_concatenate_positions(uses), penalties))
        return sum(squares[1:], squares[0])  # on an explicit mesh, arrays sharded unlike cannot be stacked

    return of_example


def accumulator(leaves: Sequence[Array]) -> Any:
    """The dtype in which squares are summed: that of the widest leaf, single precision at least."""
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
        return functools.reduce(jnp.promote_types, (leaf.dtype for leaf in leaves), jnp.dtype(jnp.float32))


def formed_gradients(
    taps: Taps, values: Environment, leaves: Sequence[Array], chosen: Sequence[int]
) -> Callable[[list[Any]], list[Array]]:
    """The map from the inputs and cotangents at the sites to the gradients of the ``chosen`` leaves."""
    roots = [root for root in taps.roots if taps.leaves_of[root] & set(chosen)]

    def roots_of(parameters: Sequence[Array]) -> list[Array]:
        replaced = dict(zip(chosen, parameters, strict=True))
        return taps.parameter_values([replaced.get(k, leaf) for k, leaf in enumerate(leaves)]).read(roots)

    _, pull = jax.vjp(roots_of, [leaves[k] for k in chosen])

    def gradients(parts: list[Any]) -> list[Array]:
        by_root = gradients_of_roots(taps, values, parts, roots)
        return pull([by_root[root] for root in roots])[0]

    return gradients


def _concatenate_positions(uses: Sequence[Factors]) -> Factors:
    """Several uses of one root as one use with the positions of all of them."""
    first, *others = uses
    if not others:
        return first
    # With inputs and cotangents exchanged, a use of the transposed matrix becomes a use of the matrix.
    turned = [
        use if use.rows == first.rows else Factors(use.d, dense(use), use.group, use.columns, use.rows) for use in uses
    ]
    if all(isinstance(use.a, Lookup) for use in turned):
        a = Lookup(jnp.concatenate([use.a.rows for use in turned], 1), first.a.size)
    else:
        a = jnp.concatenate([dense(use) for use in turned], 1)
    return first._replace(a=a, d=jnp.concatenate([use.d for use in turned], 1))


def dense(use: Factors) -> Array:
    """The input of a use as an array, also if it is a lookup."""
    return use.a.one_hot(use.d.dtype) if isinstance(use.a, Lookup) else use.a


def _squared_norm_of(use: Factors, penalties: Sequence[Array]) -> Square:
    """The squared norm of ``sum_s a[g, s, i] d[g, s, o]`` plus the ``penalties``, gradients with the axes of the root.

    With the Gram matrices it is ``sum_st (a_s' a_t) (d_s' d_t) + 2 <a' d, p> + <p, p>`` for the sum p of the penalties.
    """
    _, positions, columns = use.d.shape
    rows = use.a.size if isinstance(use.a, Lookup) else use.a.shape[2]
    constant = to_canonical(sum(penalties[1:], penalties[0]), use) if penalties else None
    if positions > 1 and not _gram_is_cheaper(positions, rows, columns):
        gradient = canonical_gradient(use)
        return jnp.sum((gradient if constant is None else gradient + constant) ** 2)
    square = jnp.sum(_gram(use.a, use.d.dtype) * _gram(use.d, use.d.dtype))
    if constant is not None:
        square = square + 2 * jnp.sum(_multiply(use.a, constant) * use.d) + jnp.sum(constant**2)
    return jnp.maximum(square, 0)  # rounding can make it slightly negative


def _gram(a: Array | Lookup, dtype: Any) -> Float[Array, "groups positions positions"]:
    """The inner products of the vectors at every two positions."""
    if isinstance(a, Lookup):
        same = (a.rows[:, :, None] == a.rows[:, None, :]) & (a.rows >= 0)[:, :, None]
        return same.astype(dtype)
    if a.shape[1] == 1:
        return jnp.sum(a**2, 2, keepdims=True)
    return jnp.einsum("gsi,gri->gsr", a, a)  # g: group, s and r: positions, i: entry


def _multiply(a: Array | Lookup, matrix: Array) -> Float[Array, "groups positions columns"]:
    """``sum_i a[g, s, i] matrix[g, i, o]``."""
    if isinstance(a, Lookup):
        return jax.vmap(lambda matrix, rows: matrix.at[rows].get(mode="fill", fill_value=0))(matrix, a.rows)
    return jnp.einsum("gsi,gio->gso", a, matrix)
