"""Report of the sites of a loss, where parameters meet data, with the rule that ``hessian`` applies at each of them."""

from dataclasses import dataclass

import jax.extend as jex

from curvature._trees import leaf_paths
from curvature._types import Tree
from curvature.programs._affine import RULES
from curvature.transforms._tap_hessian import Points


@dataclass(frozen=True)
class SiteRule:
    """An equation that parameters enter together with data, and the rule for its part of the Hessian.

    Attributes:
        primitive: the primitive of the equation.
        where: the user's line that the equation comes from.
        leaves: the paths of the leaves of ``x`` that enter.
        rule: "matrix product", "convolution", "bias", "scale" or "lookup" where the block is read off from inputs and
            cotangents; "products along k directions" where columns of the Hessian are computed one by one.
    """

    primitive: str
    where: str
    leaves: tuple[str, ...]
    rule: str

    def __str__(self) -> str:
        """The line that ``explain`` prints."""
        return f"{', '.join(leaf or 'x' for leaf in self.leaves)}: {self.rule}, {self.primitive} at {self.where}"


def rules_of_sites(points: Points, x: Tree) -> tuple[SiteRule, ...]:
    """The rule at each site of a loss, in the order of evaluation."""
    taps, paths = points.taps, leaf_paths(x)
    rules = []
    for site in taps.sites:
        roots = [origin.root for origin in site.origins]
        leaves = sorted({leaf for root in roots for leaf in taps.leaves_of[root]})
        entries = sum(root.aval.size for root in dict.fromkeys(roots) if root in points.rest)
        name: str = site.eqn.primitive.name
        kind = RULES[name][0] if name in RULES else name
        rule = f"products along {entries:,} directions" if entries else kind
        where = jex.source_info_util.summarize(site.eqn.source_info)
        rules.append(SiteRule(name, where, tuple(paths[leaf] for leaf in leaves), rule))
    return tuple(rules)
