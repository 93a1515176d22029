"""Kronecker factors: the rule for the block of each leaf, and the sums over examples that form it."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from curvature._types import ChunkSize
from curvature.operators._pytrees import replace
from curvature.operators.kronecker._blocks import Block, DenseBlock, DiagonalBlock, EigenBlock, KroneckerBlock, Layout
from curvature.operators.kronecker._examples import ExampleTaps
from curvature.programs._affine import Lookup
from curvature.programs._tap_gradients import all_axes, factors
from curvature.programs._taps import Site, Taps
from curvature.transforms._chunks import num_batch_chunks, sum_over_chunks
from curvature.transforms._per_example_norms import accumulator

Sharing = Literal["expand", "reduce"]
Sums = dict[int, Any]
"""From the number of a leaf to its sums over examples."""

# Heuristic: leaves without Kronecker factors get their exact block up to this number of entries (1 MiB in float32).
_EXACT_BLOCK = 512


class Rule(NamedTuple):
    """How the block of one leaf is formed.

    Attributes:
        form: Kronecker factors, the exact block, its exact diagonal, or zero.
        uses: the numbers of the sites where the leaf is combined with data; only for Kronecker factors.
        description: the rule in words.
    """

    form: Literal["kronecker", "block", "diagonal", "zero"]
    uses: tuple[int, ...]
    description: str


class Use(NamedTuple):
    """The inputs and cotangents at all uses of a leaf in canonical form, concatenated along the positions.

    The indices are b: example of a chunk, c: column ``w_c``, g: group, s: position, i: input, o: output.

    Attributes:
        a: inputs, of shape (b, g, s, i), or a ``Lookup`` of shape (b, g, s).
        d: cotangents, of shape (b, c, g, s, o).
    """

    a: Any
    d: Array


def rules_of(taps: Taps | None, leaves: Sequence[Array], sharing: Sharing) -> list[Rule]:
    """The rule of each leaf."""
    if taps is None:
        return [_exact(leaf, "the model has no taps") for leaf in leaves]
    return [_rule(taps, k, leaf, sharing) for k, leaf in enumerate(leaves)]


def _rule(taps: Taps, k: int, leaf: Array, sharing: Sharing) -> Rule:
    roots = [root for root in taps.roots if k in taps.leaves_of[root]]
    uses = tuple(n for n, site in enumerate(taps.sites) if any(origin.root in roots for origin in site.origins))
    sites = [taps.sites[n] for n in uses]
    unknown = dict.fromkeys(site.eqn.primitive.name for site in sites if site.form is None)
    if not roots:
        return Rule("zero", (), "zero: the outputs do not depend on it")
    if len(roots) != 1 or roots[0] not in taps.views:
        return _exact(leaf, "what meets the data is a function of this leaf, not the leaf itself")
    if unknown:
        return _exact(leaf, f"it enters {', '.join(unknown)}")
    if len({(site.group, site.form.rows, site.form.columns) for site in sites}) != 1:
        return _exact(leaf, "its uses have no layout in common")
    if not (sites[0].form.rows or sites[0].form.columns):
        return _exact(leaf, "it scales, entry by entry")
    return Rule("kronecker", uses, _describe(sites, sharing))


def _exact(leaf: Array, why: str) -> Rule:
    if leaf.size <= _EXACT_BLOCK:
        return Rule("block", (), f"exact block of {leaf.size} entries: {why}")
    return Rule("diagonal", (), f"exact diagonal of {leaf.size} entries: {why}")


def _describe(sites: Sequence[Site], sharing: Sharing) -> str:
    groups, _, rows, columns = sites[0].sizes
    positions, lookup = sum(site.sizes[1] for site in sites), all(map(_is_lookup, sites))
    text = f"Kronecker factors {rows} x {rows}{' (diagonal)' if lookup else ''} and {columns} x {columns}"
    text += f" for each of {groups} groups" if groups > 1 else ""
    if positions > 1:
        text += f", {'expanded over' if lookup or sharing == 'expand' else 'reduced from'} {positions} positions"
    return text + (f" of {len(sites)} uses" if len(sites) > 1 else "")


def _is_lookup(site: Site) -> bool:
    return site.eqn.primitive.name in ("gather", "dynamic_slice")


def build_blocks(
    examples: ExampleTaps, rules: Sequence[Rule], sharing: Sharing, corrected: bool, chunk_size: ChunkSize
) -> list[Block]:
    """The block of each leaf; ``corrected`` replaces the eigenvalues as in EKFAC."""
    dtype = accumulator(examples.leaves)
    sums = _ChunkSums(examples, rules, sharing, dtype)
    pairs = list(zip(examples.leaves, rules, strict=True))
    formed = sum(leaf.size for leaf, rule in pairs if rule.form in ("block", "diagonal"))
    first = _sum_over_examples(examples, formed, sums.factors_and_exact, chunk_size, dtype)
    blocks: list[Block] = []
    for k, (leaf, rule) in enumerate(pairs):
        if rule.form == "kronecker":
            a, g = first[k]
            blocks.append(KroneckerBlock(a, g, _layout(examples, examples.sites[rule.uses[0]])))
        elif rule.form == "block":
            blocks.append(DenseBlock(first[k], leaf.shape))
        else:
            blocks.append(DiagonalBlock(first[k] if k in first else jnp.zeros(leaf.shape, dtype)))
    eigen = {k: block.eigen() for k, block in enumerate(blocks) if corrected and isinstance(block, KroneckerBlock)}
    if not eigen:
        return blocks
    formed = max((leaf.size for leaf, rule in pairs if not _is_outer_product(examples, rule)), default=0)
    spectra = _sum_over_examples(examples, formed, sums.spectra(eigen), chunk_size, dtype)
    return [replace(eigen[k], eigenvalues=spectra[k]) if k in eigen else block for k, block in enumerate(blocks)]


def _layout(examples: ExampleTaps, site: Site) -> Layout:
    assert examples.taps is not None, "only taps have sites"
    root, (groups, _, rows, columns) = site.origins[0].root, site.sizes
    order = all_axes(site.axes, root.aval.ndim)
    return Layout(examples.taps.views[root], root.aval.shape, order, (groups, rows, columns))


def _is_outer_product(examples: ExampleTaps, rule: Rule) -> bool:
    """Whether the gradient of an example is one outer product, so that EKFAC need not form it."""
    sites = [examples.sites[n] for n in rule.uses]
    return not any(map(_is_lookup, sites)) and sum(site.sizes[1] for site in sites) <= 1


def _sum_over_examples(
    examples: ExampleTaps, formed: int, of_chunk: Callable[[Any, Any, Array], Sums], chunk_size: ChunkSize, dtype: Any
) -> Sums:
    """The sum of ``of_chunk(inputs, cotangents, shares)`` over chunks; it forms ``formed`` entries per example."""

    def of_part(part: tuple[Array, list[Array], Any, Array], weights: Array) -> Sums:
        indices, rows, sides, shares = part
        captured, d = jax.vmap(examples.capture)(indices, rows, sides, weights)
        return of_chunk(captured, d, weights * shares.astype(dtype))

    row, side = jax.tree.map(lambda leaf: leaf[0], (examples.rows, examples.side))
    captured = jax.eval_shape(lambda *lane: jax.tree.leaves(examples.capture(*lane)), 0, row, side, jnp.ones((), dtype))
    num_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in captured) + dtype.itemsize * formed
    chunks = num_batch_chunks(examples.size, chunk_size, num_bytes, least=1)
    lanes = jnp.arange(examples.size), examples.rows, examples.side, examples.shares
    return sum_over_chunks(of_part, lanes, chunks, dtype)


class _ChunkSums:
    """The sums over the examples of one chunk, from their inputs and cotangents."""

    def __init__(self, examples: ExampleTaps, rules: Sequence[Rule], sharing: Sharing, dtype: Any) -> None:
        self.examples, self.rules, self.sharing, self.dtype = examples, rules, sharing, dtype

    def factors_and_exact(self, captured: Any, d: Any, shares: Array) -> Sums:
        """For each leaf by its rule: ``A`` and ``G``, or sums of outer products or squares of gradients."""
        sums: Sums = {}
        for k, rule in enumerate(self.rules):
            if rule.form == "kronecker":
                use = self._use(rule, captured, d)
                if self.sharing == "reduce" and not isinstance(use.a, Lookup):  # the factor of a lookup stays diagonal
                    use = Use(jnp.mean(use.a, 2, keepdims=True), jnp.sum(use.d, 3, keepdims=True))
                sums[k] = _input_factor(use, shares), _einsum("bcgso,bcgsp->gop", use.d, use.d)
        chosen = [k for k, rule in enumerate(self.rules) if rule.form in ("block", "diagonal")]
        if chosen:
            sums.update(self._exact(chosen, captured, d))
        return sums

    def spectra(self, blocks: dict[int, EigenBlock]) -> Callable[[Any, Any, Array], Sums]:
        """Sums of the squared gradients in the eigenbases of the blocks."""

        def of_chunk(captured: Any, d: Any, _: Array) -> Sums:
            return {k: _spectrum(self._use(self.rules[k], captured, d), block) for k, block in blocks.items()}

        return of_chunk

    def _use(self, rule: Rule, captured: Any, d: Any) -> Use:
        """The inputs and cotangents at the sites of a leaf."""

        def at_site(n: int) -> tuple[Any, Array]:
            site = self.examples.sites[n]
            columns = jax.vmap(lambda a, d: factors(site, a, d)[:2], (None, 0), (None, 0))
            return jax.vmap(columns)(captured[n], d[n][0])

        inputs, cotangents = zip(*map(at_site, rule.uses), strict=True)
        all_cotangents = jnp.concatenate([d.astype(self.dtype) for d in cotangents], 3)
        if all(isinstance(a, Lookup) for a in inputs):
            return Use(Lookup(jnp.concatenate([a.rows for a in inputs], 2), inputs[0].size), all_cotangents)
        dense = [a.one_hot(self.dtype) if isinstance(a, Lookup) else a.astype(self.dtype) for a in inputs]
        return Use(jnp.concatenate(dense, 2), all_cotangents)

    def _exact(self, chosen: list[int], captured: Any, d: Any) -> Sums:
        gradients = jax.vmap(jax.vmap(self.examples.gradients(chosen), (None, 0)))

        def of_columns(columns: Any, counted: Array) -> Sums:
            formed = gradients(captured, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), columns))
            sums = {}
            for k, gradient in zip(chosen, formed, strict=True):
                rows = gradient.astype(self.dtype) * counted.reshape(1, -1, *[1] * (gradient.ndim - 2))
                if self.rules[k].form == "block":
                    rows = rows.reshape(-1, self.examples.leaves[k].size)
                    sums[k] = jnp.matmul(rows.T, rows, precision="highest")
                else:
                    sums[k] = jnp.sum(rows**2, (0, 1))
            return sums

        return _over_columns(of_columns, d, sum(self.examples.leaves[k].size for k in chosen), self.dtype)


def _over_columns(fun: Callable[[Any, Array], Any], d: Any, entries: int, dtype: Any) -> Any:
    """The sum over chunks of columns of ``d``, of shape (b, c, ...); ``fun`` forms ``entries`` for each b and c."""
    batch, columns = jax.tree.leaves(d)[0].shape[:2]
    chunks = num_batch_chunks(columns, "auto", batch * entries * dtype.itemsize, least=1)
    return sum_over_chunks(fun, jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), d), chunks, dtype)


def _einsum(formula: str, *operands: Array) -> Array:
    return jnp.einsum(formula, *operands, precision="highest")


def _input_factor(use: Use, shares: Array) -> Array:
    """``A[g] = sum_b share_b (1/S) sum_s a a'``; only the diagonal for a lookup, whose factor is diagonal."""
    if not isinstance(use.a, Lookup):
        weighted = use.a * (shares / use.a.shape[2])[:, None, None, None]
        return _einsum("bgsi,bgsj->gij", weighted, use.a)
    rows = jnp.swapaxes(_rows_to_drop(use.a), 0, 1)
    each = jnp.broadcast_to((shares / rows.shape[2])[None, :, None], rows.shape)
    return jax.vmap(lambda rows, each: jnp.zeros(use.a.size, each.dtype).at[rows].add(each, mode="drop"))(rows, each)


def _rows_to_drop(lookup: Lookup) -> Array:
    """The rows of a lookup; negative ones, which pick no row, become out of range for ``mode="drop"``."""
    return jnp.where(lookup.rows < 0, lookup.size, lookup.rows)


def _spectrum(use: Use, block: EigenBlock) -> Array:
    """``sum_bc (sum_s a[b, g, s, i] d[b, c, g, s, o])**2`` with inputs and cotangents in the eigenbases."""
    a = use.a if block.basis_a is None else _einsum("bgsi,gij->bgsj", use.a, block.basis_a)  # j: input eigenvector
    use = Use(a, _einsum("bcgso,gop->bcgsp", use.d, block.basis_g))  # p: output eigenvector
    _, _, groups, positions, columns = use.d.shape
    if positions == 1 and not isinstance(use.a, Lookup):
        return _einsum("bgi,bgo->gio", use.a[:, :, 0] ** 2, jnp.sum(use.d[:, :, :, 0] ** 2, 1))
    rows = use.a.size if isinstance(use.a, Lookup) else use.a.shape[3]

    def of_columns(d: Array, counted: Array) -> Array:  # d is (c, b, g, s, o)
        if isinstance(use.a, Lookup):
            formed = jax.vmap(lambda d: _scatter_rows(_rows_to_drop(use.a), rows, d))(d)
        else:
            formed = _einsum("bgsi,cbgso->cbgio", use.a, d)
        return _einsum("cbgio,c->gio", formed**2, counted)

    return _over_columns(of_columns, use.d, groups * rows * columns, use.d.dtype)


def _scatter_rows(rows: Array, size: int, d: Array) -> Array:
    """Add the cotangents, of shape (b, g, s, o), to the rows that they belong to, of shape (b, g, size, o)."""

    def of_group(rows: Array, d: Array) -> Array:
        return jnp.zeros((size, d.shape[1]), d.dtype).at[rows].add(d, mode="drop")

    return jax.vmap(jax.vmap(of_group))(rows, d)
