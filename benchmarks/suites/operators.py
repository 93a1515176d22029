"""Curvature operators: what a product costs in gradients, and, in ``by_products``, what is found by products."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import curvature
from benchmarks import trusted
from benchmarks.cases import Case, Choice, Claim, Contestant, Finding, Outcome, Outcomes, Plot, Race
from benchmarks.models import Model, cross_entropy, language_model, mlp, pooling
from benchmarks.peers import curvlinops_ways, operations
from benchmarks.peers.jax_ways import forward_over_reverse, of_one
from benchmarks.reading import MISSING, at_most, compared, number, part, share, timed
from benchmarks.suites import by_products

TITLE = "Operators"
QUESTION = "How many gradients does a product with a curvature matrix cost, and what can be found by products?"
TOLERANCE_SMALL = 1e-5  # on networks of a few hundred parameters, in single precision
TOLERANCE_SAMPLED = 0.1  # of v' F v: three standard errors and more, with this many samples
SAMPLES = 16

PRODUCTS = 32  # in a row from one linearization, in a loop
UNROLLED = {"convolutional": 4}  # so many without a loop: XLA runs convolutions in one slowly, jax-ml/jax#12868
IN_A_ROW = ", in a row"
GRADIENT, FRESH = "one gradient", "curvature.hvp"
HESSIAN, GAUSS_NEWTON = "curvature.HessianOperator", "curvature.GaussNewtonOperator"
FISHER, KRONECKER = "curvature.FisherOperator", "curvature.KroneckerOperator"

WANTED_LINEARIZED = 0.85  # of a fresh product
WANTED_GAUSS_NEWTON = 0.8  # of a Hessian product
WANTED_MEMORY = 2.5  # of the gradient's

Function = Callable[..., Any]

TITLES = {
    "hessian": "Hessian", "gauss-newton": "Gauss-Newton and exact Fisher", "fisher-empirical": "empirical Fisher",
    "fisher-sampled": f"sampled Fisher, {SAMPLES} labels each", "expand": "KFAC, expand", "reduce": "KFAC, reduce",
    "ekfac": "EKFAC",
}  # fmt: skip
CAPTIONS = {
    "fisher-sampled": "Labels are drawn, so that v' F v is compared with the exact one, within its standard error.",
    **dict.fromkeys(curvlinops_ways.KRONECKER, "The factors are made before; 'with its factors' makes them as well."),
}
SMALL = ("hessian", "gauss-newton", "fisher-empirical", "expand", "reduce", "ekfac")
REFERENCES: dict[str, Function] = {
    "hessian": trusted.hessian,
    "gauss-newton": trusted.gauss_newton,
    "fisher-empirical": trusted.empirical_fisher,
    "fisher-sampled": trusted.fisher_form,
    **{way: partial(trusted.kronecker, way=way) for way in curvlinops_ways.KRONECKER},
}


def cases(choice: Choice) -> Iterator[Case]:
    quick: list[tuple[Callable[[], Model], tuple[str, ...]]] = [
        (partial(mlp, (64, 128, 128, 10), 256), ("hessian", "gauss-newton", "fisher-empirical", "expand")),
        (partial(pooling, (8, 16), 16, 16), ("expand",)),
    ]
    full: list[tuple[Callable[[], Model], tuple[str, ...]]] = [
        (partial(mlp, (128, 256, 256, 10), 512), tuple(TITLES)),
        (pooling, tuple(TITLES)),
        (partial(language_model, examples=8), ("hessian", "gauss-newton", "fisher-empirical", "fisher-sampled")),
        (partial(mlp, (6, 5, 4, 3), 7), SMALL),
        (partial(pooling, (3, 4), 8, 7), SMALL),
        (partial(language_model, layers=6, width=384, words=512, examples=4), ("hessian", "gauss-newton")),
    ]
    for make, whats in quick if choice.quick else full:
        for what in whats:
            yield case(choice, make, what)
    yield from by_products.cases(choice)


def case(choice: Choice, make: Callable[[], Model], what: str) -> Race:
    model = make()
    n, count = model.num_parameters, len(model.batch[0])
    small = n < 1000 and what != "ekfac"
    tolerance = choice.tolerance(TOLERANCE_SMALL if small else 1e-4)
    return Race(
        f"operators/{what}/{model.name}/n={n}",
        f"Products, {TITLES[what]}, {model.title}, {n:,} parameters, {count} examples", model.name,
        lambda: contestants(make(), what, choice.dtype), lambda: trusted.in_double(REFERENCES[what], make()),
        TOLERANCE_SAMPLED if what == "fisher-sampled" else tolerance, {"n": n, "batch": count},
        claims=partial(claims, what, n), caption=CAPTIONS.get(what, ""), **choice.effort(0.25, 1.0),
    )  # fmt: skip


class Pieces:
    """A network as operators take it: a model, a loss of its outputs, and the arguments of a product."""

    def __init__(self, network: Model):
        ops, outputs = operations.for_jax(), network.outputs
        assert outputs is not None
        self.model: Function = lambda p, x, y: outputs(ops, p, x)
        self.loss: Function = lambda outputs, x, y: cross_entropy(ops, outputs, y)
        self.objective: Function = lambda p, x, y: network.loss(ops, p, x, y)
        self.params, self.v, self.batch = trusted.numbers(network)
        self.args = (self.params, self.v, *self.batch)
        self.count = UNROLLED.get(network.name, PRODUCTS)
        self.unroll = network.name in UNROLLED

    def product(self, name: str, make: Function, **more: Any) -> Contestant:
        """A single product, evaluated afresh; ``make(params, *batch)`` is the operator."""
        return Contestant(name, "curvature", lambda p, v, *batch: make(p, *batch).mv(v), self.args, **more)

    def products_in_a_row(self, name: str, make: Function, **more: Any) -> Contestant:
        """As in a solve: one linearization, then one product after the other."""
        many_v = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (self.count, *leaf.shape)), self.v)

        def function(p: Any, many_v: Any, *batch: Any) -> Any:
            product = make(p, *batch).linearize()
            return jax.lax.scan(lambda carry, v: (carry, product(v)), None, many_v, unroll=self.unroll)[1]

        args = (self.params, many_v, *self.batch)
        more |= {"read": lambda products: jax.tree.map(lambda leaf: leaf[-1], products), "pieces": self.count}
        return Contestant(name + IN_A_ROW, "curvature", function, args, **more)

    def both(self, name: str, make: Function, **more: Any) -> Iterator[Contestant]:
        yield self.product(name, make, **more)
        yield self.products_in_a_row(name, make, **more)

    def hessian(self, p: Any, *batch: Any) -> Any:
        return curvature.HessianOperator(self.objective, p, *batch)

    def gauss_newton(self, p: Any, *batch: Any) -> Any:
        return curvature.GaussNewtonOperator(self.model, self.loss, p, *batch)

    def fisher(self, p: Any, *batch: Any, **options: Any) -> Any:
        return curvature.FisherOperator(self.model, self.loss, p, *batch, **options)

    def kronecker(self, p: Any, *batch: Any, **options: Any) -> Any:
        return curvature.KroneckerOperator(self.model, self.loss, p, *batch, likelihood="categorical", **options)


def contestants(network: Model, what: str, dtype: str) -> Iterator[Contestant]:
    pieces = Pieces(network)
    if what in curvlinops_ways.KRONECKER:
        yield from kronecker(pieces, what)
    else:
        makers = {"hessian": hessian, "gauss-newton": gauss_newton, "fisher-empirical": empirical}
        yield from makers.get(what, sampled)(pieces)
    if not (what == "fisher-empirical" and network.name == "transformer"):  # it takes each token for an example
        peer = curvlinops_ways.contestant(network, dtype, what, SAMPLES)
        yield by_form(peer, pieces) if what == "fisher-sampled" else peer
    yield Contestant(GRADIENT, "jax", jax.grad(pieces.objective), (pieces.params, *pieces.batch), floor=True)


def hessian(pieces: Pieces) -> Iterator[Contestant]:
    """The operator, ``hvp``, and what anyone writes in JAX."""
    yield from pieces.both(HESSIAN, pieces.hessian)
    hvp = partial(curvature.hvp, pieces.objective)
    yield Contestant(FRESH, "curvature", lambda p, v, *batch: hvp(p, v, *batch), pieces.args)
    yield Contestant("jax, jvp of grad", "jax", partial(forward_over_reverse, pieces.objective), pieces.args)


def gauss_newton(pieces: Pieces) -> Iterator[Contestant]:
    """The operator, the Fisher matrix in closed form, which is the same, and what anyone writes in JAX."""

    def by_hand(p: Any, v: Any, *batch: Any) -> Any:
        outputs, tangents = jax.jvp(lambda p: pieces.model(p, *batch), (p,), (v,))
        curved = jax.jvp(jax.grad(lambda z: pieces.loss(z, *batch)), (outputs,), (tangents,))[1]
        return jax.vjp(lambda p: pieces.model(p, *batch), p)[1](curved)[0]

    yield from pieces.both(GAUSS_NEWTON, pieces.gauss_newton)
    yield pieces.product(f"{FISHER}, closed form", partial(pieces.fisher, likelihood="categorical"))
    yield Contestant("jax, jvp and vjp", "jax", by_hand, pieces.args)
    yield from pieces.both(HESSIAN, pieces.hessian, floor=True)


def empirical(pieces: Pieces) -> Iterator[Contestant]:
    def by_hand(p: Any, v: Any, *batch: Any) -> Any:
        g = jax.vmap(lambda *example: jax.grad(of_one(pieces.objective))(p, *example))(*batch)
        inner = sum(jnp.tensordot(g[name], v[name], v[name].ndim) for name in g) / len(batch[0])
        return jax.tree.map(lambda leaf: jnp.tensordot(inner, leaf, 1), g)

    yield pieces.product(FISHER, partial(pieces.fisher, kind="empirical"))
    yield Contestant("jax, vmap(grad)", "jax", by_hand, pieces.args)


def sampled(pieces: Pieces) -> Iterator[Contestant]:
    """The operator; its product is read as ``v' F v``."""
    options = {"kind": "sampled", "likelihood": "categorical", "key": jax.random.key(7), "num_samples": SAMPLES}
    yield by_form(pieces.product(FISHER, partial(pieces.fisher, **options)), pieces)


def by_form(contestant: Contestant, pieces: Pieces) -> Contestant:
    """The contestant, with its product multiplied by v once more, outside of what is timed."""

    def read(product: Any) -> float:
        found = contestant.read(product)
        return sum(float(jnp.sum(jnp.asarray(found[name]) * pieces.v[name])) for name in found)

    return Contestant(contestant.name, contestant.peer, contestant.function, contestant.args, contestant.make, read)


def kronecker(pieces: Pieces, way: str) -> Iterator[Contestant]:
    """The operator with its factors made before, and one that makes them first."""
    options: dict[str, Any] = {"approximation": "ekfac"} if way == "ekfac" else {"sharing": way}
    make = partial(pieces.kronecker, **options)
    op = jax.jit(make)(pieces.params, *pieces.batch)
    yield Contestant(KRONECKER, "curvature", lambda op, v: op.mv(v), (op, pieces.v))
    yield pieces.product(f"{KRONECKER}, with its factors", make)


def claims(what: str, n: int, outcome: Outcome) -> list[Claim]:
    """What a product in a row saves, what Gauss-Newton saves, and the memory of products of a large network."""
    found: list[Claim] = []
    if what == "hessian" and n > 1000:
        found += at_most(outcome, HESSIAN + IN_A_ROW, FRESH, WANTED_LINEARIZED)
    if what == "gauss-newton" and n > 1000:
        for suffix in ("", IN_A_ROW):
            found += at_most(outcome, GAUSS_NEWTON + suffix, HESSIAN + suffix, WANTED_GAUSS_NEWTON)
    if n > 10**6:
        found += memory_claims(outcome, n, GAUSS_NEWTON if what == "gauss-newton" else HESSIAN)
    return found


def memory_claims(outcome: Outcome, n: int, name: str) -> list[Claim]:
    """How much more a product holds at once than a gradient: x, v and the answer, against x and the answer."""
    own, gradient = (number(timed(outcome, row), "temporary_bytes") for row in (name, GRADIENT))
    if own is None or gradient is None:
        return []
    size = 4 * n
    peak = (3 * size + own) / (2 * size + gradient)
    text = f"a product of {name} holds {peak:.2f} times as much at once as a gradient (wanted: at most {WANTED_MEMORY})"
    return [Claim(text, peak <= WANTED_MEMORY)]


def plots(outcomes: Outcomes) -> list[Plot]:
    return by_products.plots(outcomes)


def findings(outcomes: Outcomes) -> list[Finding]:
    products = {id: outcome for id, outcome in outcomes.items() if id.split("/")[1] in TITLES}
    names = (HESSIAN, HESSIAN + IN_A_ROW, GAUSS_NEWTON, GAUSS_NEWTON + IN_A_ROW, FISHER, KRONECKER)
    costs = [
        f"{outcome.title}: "
        + ", ".join(f"{name} {cost:.2f}" for name in names if (cost := share(outcome, name, GRADIENT)))
        + "."
        for outcome in products.values()
    ]
    return [
        Finding("How many gradients is a product?", " ".join(costs) or MISSING),
        compared("And in other libraries?", products),
        compared("Who finds the largest eigenvalues the fastest?", part(outcomes, "operators/eigenvalues")),
        compared("And who solves the fastest?", part(outcomes, "operators/solve")),
    ]
