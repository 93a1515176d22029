"""Gradients of parameters from taps: as factors in canonical form, or formed."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Var
from jaxtyping import Array, Float

from curvature.programs._affine import Axes, Lookup
from curvature.programs._jaxprs import Environment, Variable, equation_function
from curvature.programs._taps import Site, Taps


class Factors(NamedTuple):
    """The gradient of a root at one site, in factors: ``sum_s a[g, s, i] d[g, s, o]``.

    Attributes:
        a: the input, of shape (g, s, i), or a ``Lookup`` of shape (g, s).
        d: the cotangent of the output, of shape (g, s, o).
        group, rows, columns: the axes of the root that g, i and o index.
    """

    a: Any
    d: Array
    group: Axes
    rows: Axes
    columns: Axes

    def astype(self, dtype: Any) -> "Factors":
        """The factors in another dtype; the numbers of a lookup stay."""
        a = self.a if isinstance(self.a, Lookup) else self.a.astype(dtype)
        return self._replace(a=a, d=self.d.astype(dtype))


def factors(site: Site, a: Any, d: Array) -> Factors:
    """The factors of a site that has a form, from its input and cotangent.

    A scan around the site that slices the root adds a group axis. Any other scan adds a position axis.
    """
    outputs, depth = site.form.outputs, len(site.lengths)
    for _ in range(depth):
        outputs = jax.vmap(outputs)
    loops = site.origins[0].loops
    sliced = [k for k in range(depth) if loops[k] is not None]
    order = [*sliced, depth, *(k for k in range(depth) if loops[k] is None), depth + 1]

    def arrange(array: Array) -> Array:
        array = jnp.transpose(array, [*order, *range(depth + 2, array.ndim)])
        cut = len(sliced) + 1
        groups, positions = math.prod(array.shape[:cut]), math.prod(array.shape[cut : depth + 2])
        return array.reshape(groups, positions, *array.shape[depth + 2 :])

    return Factors(jax.tree.map(arrange, a), arrange(outputs(d)), site.group, site.form.rows, site.form.columns)


def canonical_gradient(use: Factors) -> Float[Array, "groups rows columns"]:
    """The gradient in canonical form."""
    if not isinstance(use.a, Lookup):
        return jnp.einsum("gsi,gso->gio", use.a, use.d)  # g: group, s: position, i: row, o: column
    rows = jnp.where(use.a.rows < 0, use.a.size, use.a.rows)  # out of range, hence dropped

    def scatter(rows: Array, d: Array) -> Array:
        return jnp.zeros((use.a.size, d.shape[1]), d.dtype).at[rows].add(d, mode="drop")

    return jax.vmap(scatter)(rows, use.d)


def to_canonical(array: Array, use: Factors) -> Float[Array, "groups rows columns"]:
    """Rearrange an array with the axes of the root into the canonical form of a use."""
    order = all_axes((*use.group, *use.rows, *use.columns), array.ndim)
    sizes = [math.prod(array.shape[axis] for axis in axes) for axes in (use.group, use.rows, use.columns)]
    return jnp.transpose(array, order).reshape(sizes)


def all_axes(order: Axes, ndim: int) -> Axes:
    """Complete an order of axes: axes of size one that a reshape has removed come last."""
    return (*order, *(k for k in range(ndim) if k not in order))


def from_canonical(product: Array, order: Axes, root: Variable) -> Array:
    """Rearrange an array into the shape of the root; its axes are those of the root in ``order``, possibly merged."""
    shape = root.aval.shape
    order = all_axes(order, len(shape))
    back = sorted(range(len(order)), key=lambda k: order[k])
    return jnp.transpose(product.reshape([shape[k] for k in order]), back).astype(root.aval.dtype)


def gradients_of_site(taps: Taps, site: Site, captured: Any, d: Sequence[Array], values: Environment) -> list[Array]:
    """The gradients of the roots of any site: by its form or, if it has none, by reverse mode through its equation."""
    if site.form is not None:
        return [from_canonical(canonical_gradient(factors(site, captured, d[0])), site.axes, site.origins[0].root)]
    fun, variables = equation_function(taps.level.jaxpr, site.eqn)
    env = Environment({v: value for v, value in zip(site.others, captured, strict=True) if isinstance(v, Var)})
    operands = [site.eqn.invars[n] for n in site.operands]
    # JAX cannot transpose a pad by its padding value alone.
    others = [v for v in site.others if isinstance(v, Var)] if site.eqn.primitive.name == "pad" else []

    def outputs(parameters: list[Array], beside: list[Array]) -> list[Array]:
        inner = Environment(env)
        inner.write([*operands, *others], [*parameters, *beside])
        outs = dict(zip(site.eqn.outvars, fun(*inner.read(variables)), strict=True))
        return [outs[v] for v in site.outputs]

    _, pull = jax.vjp(outputs, values.read(operands), env.read(others))
    gradients = []
    for gradient, origin in zip(pull(list(d))[0], site.origins, strict=True):
        summed = jnp.sum(gradient, [k for k, axis in enumerate(origin.axes) if axis is None])  # axes that repeat
        kept = tuple(axis for axis in origin.axes if axis is not None)
        gradients.append(from_canonical(summed, kept, origin.root))
    return gradients


Parts = Sequence[tuple[Site, Any, Any]]
"""Each site with its input and the cotangents of its outputs."""


def gradients_of_roots(taps: Taps, values: Environment, parts: Parts, roots: Sequence[Any]) -> dict[Variable, Array]:
    """The gradients of some roots, for one example."""
    return _sum_by_root(parts, roots, lambda site, inputs, d: gradients_of_site(taps, site, inputs, d, values))


def sum_over_batch(taps: Taps, values: Environment, parts: Parts) -> dict[Variable, Array]:
    """The gradients of all roots, summed over examples; inputs and cotangents have a leading batch axis.

    In canonical form the batch axis is merged into the positions, over which a product of matrices sums.
    """

    def merge_batch(array: Array) -> Array:  # (batch, groups, positions, ...) to (groups, batch and positions, ...)
        groups = jnp.swapaxes(array, 0, 1)
        return groups.reshape(groups.shape[0], -1, *groups.shape[3:])

    def of_batch(site: Site, inputs: Any, cotangents: Any) -> list[Array]:
        if site.form is None:
            each = jax.vmap(lambda inputs, d: gradients_of_site(taps, site, inputs, d, values))(inputs, cotangents)
            return jax.tree.map(lambda rows: jnp.sum(rows, 0), each)
        use = jax.vmap(lambda a, d: factors(site, a, d)[:2])(inputs, cotangents[0])
        a, d = jax.tree.map(merge_batch, use)
        together = Factors(a, d, site.group, site.form.rows, site.form.columns)
        return [from_canonical(canonical_gradient(together), site.axes, site.origins[0].root)]

    return _sum_by_root(parts, taps.roots, of_batch)


def _sum_by_root(
    parts: Parts, roots: Sequence[Any], gradients: Callable[[Site, Any, Any], list[Array]]
) -> dict[Variable, Array]:
    """The sum over all sites of the ``gradients`` of each root."""
    total: dict[Variable, Any] = dict.fromkeys(roots, 0)
    for site, inputs, cotangents in parts:
        if any(origin.root in total for origin in site.origins):
            for origin, gradient in zip(site.origins, gradients(site, inputs, cotangents), strict=True):
                if origin.root in total:
                    total[origin.root] = total[origin.root] + gradient
    return total
