"""The squared norm of one example's gradient, without forming the gradient where its structure allows."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature.programs._affine import Lookup
from curvature.programs._jaxprs import Environment
from curvature.programs._tap_gradients import Factors, canonical_gradient, factors, gradients_of_site, to_canonical
from curvature.programs._taps import Site, Taps

Square = Float[Array, ""]


class Route(NamedTuple):
    """How one leaf's norm is found.

    Attributes:
        uses: the sites where the leaf itself meets the data; empty if its gradient is formed.
        scalars: roots of one entry that depend on the leaf too, such as a penalty that is part of the loss.
        told: the route in words.
    """

    uses: tuple[int, ...]
    scalars: tuple[Any, ...]
    told: str


def routes_of(taps: Taps) -> list[Route]:
    """For each leaf how its norm is found."""
    return [_route(taps, leaf) for leaf in range(len(taps.leaves))]


def _route(taps: Taps, leaf: int) -> Route:
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
    return Route(uses, scalars, _told(sites))


def _told(sites: Sequence[Site]) -> str:
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
    """From the inputs and cotangents of one example at all sites to the squared norm of its gradient."""
    sites, routes, dtype = taps.sites, routes_of(taps), accumulator(leaves)
    formed = formed_gradients(taps, values, leaves, [k for k, route in enumerate(routes) if not route.uses])
    scalars = list(dict.fromkeys(root for route in routes for root in route.scalars))
    slopes = {root: jax.grad(_scalar_root(taps, root))(list(leaves)) for root in scalars}

    def of_example(captured: list[Any], d: list[Any]) -> Square:
        parts = list(zip(sites, captured, d, strict=True))
        weights = _gradients_of_roots(taps, values, parts, scalars)
        squares = [jnp.sum(gradient.astype(dtype) ** 2) for gradient in formed(parts)]
        for k, route in enumerate(routes):
            if route.uses:
                uses = [_cast(factors(sites[n], captured[n], d[n][0]), dtype) for n in route.uses]
                view = taps.views[sites[route.uses[0]].origins[0].root]
                penalties = [
                    weights[root].reshape(()).astype(dtype) * view.apply(slopes[root][k]).astype(dtype)
                    for root in route.scalars
                ]
                squares.append(_square(_side_by_side(uses), penalties))
        return jnp.sum(jnp.stack(squares))

    return of_example


def accumulator(leaves: Sequence[Array]) -> Any:
    """The dtype to add squares in: that of the widest leaf, single precision at least."""
    with jax.numpy_dtype_promotion("standard"):  # leaves may differ in dtype even where users are strict
        return functools.reduce(jnp.promote_types, (leaf.dtype for leaf in leaves), jnp.dtype(jnp.float32))


def _cast(use: Factors, dtype: Any) -> Factors:
    return use._replace(a=use.a if isinstance(use.a, Lookup) else use.a.astype(dtype), d=use.d.astype(dtype))


def _scalar_root(taps: Taps, root: Any) -> Callable[[list[Array]], Array]:
    return lambda leaves: taps.parameter_values(leaves)[root].reshape(())


def formed_gradients(
    taps: Taps, values: Environment, leaves: Sequence[Array], chosen: Sequence[int]
) -> Callable[[list[Any]], list[Array]]:
    """From what is known at the sites to the gradients of some leaves."""
    roots = [root for root in taps.roots if taps.leaves_of[root] & set(chosen)]

    def roots_of(parameters: Sequence[Array]) -> list[Array]:
        replaced = dict(zip(chosen, parameters, strict=True))
        return taps.parameter_values([replaced.get(k, leaf) for k, leaf in enumerate(leaves)]).read(roots)

    _, pull = jax.vjp(roots_of, [leaves[k] for k in chosen])

    def gradients(parts: list[Any]) -> list[Array]:
        by_root = _gradients_of_roots(taps, values, parts, roots)
        return pull([by_root[root] for root in roots])[0]

    return gradients


def _gradients_of_roots(taps: Taps, values: Environment, parts: list[Any], roots: Sequence[Any]) -> dict[Any, Array]:
    """The gradients of some roots, formed."""
    found: dict[Any, Any] = dict.fromkeys(roots, 0)
    for site, captured, d in parts:
        if any(origin.root in found for origin in site.origins):
            gradients = gradients_of_site(taps, site, values, captured, d)
            for origin, gradient in zip(site.origins, gradients, strict=True):
                if origin.root in found:
                    found[origin.root] = found[origin.root] + gradient
    return found


def _side_by_side(uses: Sequence[Factors]) -> Factors:
    """Uses of one root as a single one: their positions stand one after the other."""
    first, *others = uses
    if not others:
        return first
    turned = [first, *(use if use.rows == first.rows else _turn(use) for use in others)]
    if all(isinstance(use.a, Lookup) for use in turned):
        a = Lookup(jnp.concatenate([use.a.rows for use in turned], 1), first.a.size)
    else:
        a = jnp.concatenate([dense(use) for use in turned], 1)
    return first._replace(a=a, d=jnp.concatenate([use.d for use in turned], 1))


def _turn(use: Factors) -> Factors:
    """Inputs and cotangents exchanged: the gradient of the transposed matrix."""
    return Factors(use.d, dense(use), use.group, use.columns, use.rows)


def dense(use: Factors) -> Array:
    """The input of a use as an array, of a lookup too."""
    return use.a.one_hot(use.d.dtype) if isinstance(use.a, Lookup) else use.a


def _square(use: Factors, penalties: Sequence[Array]) -> Square:
    """The squared norm of ``sum_s a[g, s, i] d[g, s, o]`` plus gradients with the axes of the root."""
    _, positions, columns = use.d.shape
    rows = use.a.size if isinstance(use.a, Lookup) else use.a.shape[2]
    constant = to_canonical(sum(penalties[1:], penalties[0]), use) if penalties else None
    if positions > 1 and not _gram_is_cheaper(positions, rows, columns):
        gradient = canonical_gradient(use)
        return jnp.sum((gradient if constant is None else gradient + constant) ** 2)
    square = jnp.sum(_gram(use.a, use.d.dtype) * _gram(use.d, use.d.dtype))
    if constant is not None:
        square = square + 2 * jnp.sum(_times(use.a, constant) * use.d) + jnp.sum(constant**2)
    return jnp.maximum(square, 0)  # rounding can leave it just below


def _gram(a: Array | Lookup, dtype: Any) -> Float[Array, "groups positions positions"]:
    """The inner products of the positions."""
    if isinstance(a, Lookup):
        same = (a.rows[:, :, None] == a.rows[:, None, :]) & (a.rows >= 0)[:, :, None]
        return same.astype(dtype)
    if a.shape[1] == 1:
        return jnp.sum(a**2, 2, keepdims=True)
    return jnp.einsum("gsi,gri->gsr", a, a)


def _times(a: Array | Lookup, matrix: Array) -> Float[Array, "groups positions columns"]:
    """``sum_i a[g, s, i] matrix[g, i, o]``."""
    if isinstance(a, Lookup):
        return jax.vmap(lambda matrix, rows: matrix.at[rows].get(mode="fill", fill_value=0))(matrix, a.rows)
    return jnp.einsum("gsi,gio->gso", a, matrix)
