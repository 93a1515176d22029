"""Curvature operators: what a product costs in gradients, and, in ``by_products``, what is found by products."""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Case, Choice, Claim, Contestant, Finding, Outcome, Outcomes, Race
from benchmarks.models import Model, language_model, layered, mlp, pooling
from benchmarks.peers import curvlinops_ways, operations
from benchmarks.peers.flat import Function
from benchmarks.peers.jax_ways import InJax, forward_over_reverse, in_double, of_one
from benchmarks.reading import MISSING, compared, number, share, timed
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
WANTED_MEMORY = 2.5  # of the gradient's
TITLES = {
    "hessian": "Hessian", "gauss-newton": "Gauss-Newton and exact Fisher", "fisher-empirical": "empirical Fisher",
    "fisher-sampled": f"sampled Fisher, {SAMPLES} labels each", "expand": "KFAC, expand", "reduce": "KFAC, reduce",
    "ekfac": "EKFAC",
}  # fmt: skip
CAPTIONS = {
    "fisher-sampled": "Labels are drawn, so that v' F v is compared with the exact one, within its standard error.",
    **dict.fromkeys(curvlinops_ways.KRONECKER, "The factors are made before; 'with its factors' makes them as well."),
}
ALL, SMALL = tuple(TITLES), tuple(what for what in TITLES if what != "fisher-sampled")


def cases(choice: Choice) -> Iterator[Case]:
    quick = [
        (mlp((64, 128, 128, 10), 256), ("hessian", "gauss-newton", "fisher-empirical", "expand")),
        (pooling((8, 16), 16, 16), ("expand",)),
    ]
    full = [
        (mlp((128, 256, 256, 10), 512), ALL),
        (pooling(), ALL),
        (language_model(), ("hessian", "gauss-newton", "fisher-empirical", "fisher-sampled")),
        (mlp((6, 5, 4, 3), 7), SMALL),
        (pooling((3, 4), 8, 7), SMALL),
        (language_model(layers=6, width=384, words=512, examples=4), ("hessian", "gauss-newton")),
    ]
    for model, whats in quick if choice.quick else full:
        n, count = model.num_parameters, len(model.batch[0])
        for what in whats:
            small = n < 1000 and what != "ekfac"
            tolerance = choice.tolerance(TOLERANCE_SMALL if small else 1e-4)
            yield Race(
                f"operators/{what}/{model.name}/n={n}",
                f"Products, {TITLES[what]}, {model.title}, {n:,} parameters, {count} examples", model.name,
                partial(contestants, model, what, choice.dtype), partial(reference, model, what),
                TOLERANCE_SAMPLED if what == "fisher-sampled" else tolerance, {"n": n, "batch": count},
                claims=partial(memory_claims, n), caption=CAPTIONS.get(what, ""), **choice.effort(0.25, 1.0),
            )  # fmt: skip
    yield from by_products.cases(choice)


def reference(model: Model, what: str) -> Any:
    """The product by plain transformations; a sampled one only as the ``v' F v`` that it estimates."""
    made, args = InJax(model), (model.params(), model.direction(), *model.batch)
    products: dict[str, Function] = {
        "hessian": partial(forward_over_reverse, made.loss),
        "gauss-newton": partial(gauss_newton_in_jax, made),
        "fisher-empirical": partial(fisher_in_jax, made),
    }
    if what == "fisher-sampled":
        product, v = in_double(products["gauss-newton"], *args), model.direction()
        return sum(np.sum(product[name] * v[name]) for name in v)
    return in_double(products.get(what, partial(kronecker, model, way=what)), *args)


def contestants(network: Model, what: str, dtype: str) -> Iterator[Contestant]:
    """Ours, what anyone writes in JAX, the same operator of curvlinops, and one gradient."""
    made = InJax(network)
    many = UNROLLED.get(network.name, PRODUCTS)
    args = (made.params, made.v, *made.batch)
    hessian = partial(curvature.HessianOperator, made.loss)
    gauss_newton, fisher, factored_fisher = (
        partial(operator, made.outputs, made.of_outputs)
        for operator in (curvature.GaussNewtonOperator, curvature.FisherOperator, curvature.KroneckerOperator)
    )

    def product(name: str, make: Function, **more: Any) -> Contestant:
        """A single product, evaluated afresh; ``make(params, *batch)`` is the operator."""
        return Contestant(name, "curvature", lambda p, v, *batch: make(p, *batch).mv(v), args, **more)

    def in_a_row(name: str, make: Function, **more: Any) -> Contestant:
        """As in a solve: one linearization, then one product after the other."""
        many_v = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (many, *leaf.shape)), made.v)

        def function(p: Any, many_v: Any, *batch: Any) -> Any:
            of = make(p, *batch).linearize()
            return jax.lax.scan(lambda carry, v: (carry, of(v)), None, many_v, unroll=network.name in UNROLLED)[1]

        more |= {"read": lambda products: jax.tree.map(lambda leaf: leaf[-1], products), "pieces": many}
        return Contestant(name + IN_A_ROW, "curvature", function, (made.params, many_v, *made.batch), **more)

    def form(contestant: Contestant) -> Contestant:
        """The contestant, with its product multiplied by v once more, outside of what is timed."""

        def read(answer: Any) -> float:
            found = contestant.read(answer)
            return sum(float(jnp.sum(jnp.asarray(found[name]) * made.v[name])) for name in found)

        return dataclasses.replace(contestant, read=read)

    peer = curvlinops_ways.contestant(network, dtype, what, SAMPLES)
    if what == "hessian":
        yield product(HESSIAN, hessian)
        yield in_a_row(HESSIAN, hessian)
        hvp = partial(curvature.hvp, made.loss)
        yield Contestant(FRESH, "curvature", lambda p, v, *batch: hvp(p, v, *batch), args)
        yield Contestant("jax, jvp of grad", "jax", partial(forward_over_reverse, made.loss), args)
    elif what == "gauss-newton":  # the Fisher matrix in closed form is the same
        yield product(GAUSS_NEWTON, gauss_newton)
        yield in_a_row(GAUSS_NEWTON, gauss_newton)
        yield product(f"{FISHER}, closed form", partial(fisher, likelihood="categorical"))
        yield Contestant("jax, jvp and vjp", "jax", partial(gauss_newton_in_jax, made), args)
        yield product(HESSIAN, hessian, floor=True)
        yield in_a_row(HESSIAN, hessian, floor=True)
    elif what == "fisher-empirical":
        yield product(FISHER, partial(fisher, kind="empirical"))
        yield Contestant("jax, vmap(grad)", "jax", partial(fisher_in_jax, made), args)
    elif what == "fisher-sampled":
        how = {"kind": "sampled", "likelihood": "categorical", "key": jax.random.key(7), "num_samples": SAMPLES}
        yield form(product(FISHER, partial(fisher, **how)))
        peer = form(peer)
    else:
        how = {"approximation": "ekfac"} if what == "ekfac" else {"sharing": what}
        make = partial(factored_fisher, likelihood="categorical", **how)
        op = jax.jit(make)(made.params, *made.batch)
        yield Contestant(KRONECKER, "curvature", lambda op, v: op.mv(v), (op, made.v))
        yield product(f"{KRONECKER}, with its factors", make)
    if not (what == "fisher-empirical" and network.name == "transformer"):  # it takes each token for an example
        yield peer
    yield Contestant(GRADIENT, "jax", jax.grad(made.loss), (made.params, *made.batch), floor=True)


def gauss_newton_in_jax(made: InJax, p: Any, v: Any, *batch: Any) -> Any:
    outputs, tangents = jax.jvp(lambda p: made.outputs(p, *batch), (p,), (v,))
    curved = jax.jvp(jax.grad(lambda z: made.of_outputs(z, *batch)), (outputs,), (tangents,))[1]
    return jax.vjp(lambda p: made.outputs(p, *batch), p)[1](curved)[0]


def fisher_in_jax(made: InJax, p: Any, v: Any, *batch: Any) -> Any:
    g = jax.vmap(lambda *example: jax.grad(of_one(made.loss))(p, *example))(*batch)
    inner = sum(jnp.tensordot(g[name], v[name], v[name].ndim) for name in g) / len(batch[0])
    return jax.tree.map(lambda leaf: jnp.tensordot(inner, leaf, 1), g)


def kronecker(model: Model, p: Any, v: Any, x: jax.Array, _: jax.Array, *, way: str) -> Any:
    """KFAC or EKFAC of the exact Fisher matrix, layer by layer; ``way`` is "expand", "reduce" or "ekfac".

    References: Eschenhagen et al. (2023), arXiv:2311.00636, sections 3.1 and 3.2; George et al. (2018),
        arXiv:1806.03884, equation (11).
    """
    product = {}
    block, reduce = corrected if way == "ekfac" else factored, way == "reduce"
    for layer, a, g in zip(model.layers, *inputs_and_scores(model, p, x), strict=True):
        weight = v[layer.weight]
        matrix = weight if weight.ndim == 2 else weight.transpose(2, 0, 1, 3).reshape(-1, weight.shape[3])
        found = block(a, g, matrix, reduce)
        if weight.ndim == 4:  # as patches have it: channels, rows, columns
            rows, columns, channels, _ = weight.shape
            found = found.reshape(channels, rows, columns, -1).transpose(1, 2, 0, 3)
        product[layer.weight] = found
        product[layer.bias] = block(jnp.ones((*a.shape[:2], 1)), g, v[layer.bias][None], reduce)[0]
    return product


def inputs_and_scores(model: Model, p: Any, x: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """For each layer what enters, (examples, places, in), and pseudo-gradients, (examples, classes, places, out).

    The outer products of the pseudo-gradients by what leaves a layer, summed over classes, are the exact Fisher matrix.
    """
    ops = operations.for_jax()
    inputs = layered(ops, model.layers, p, x)[1]
    places = [(*rows.shape[1:-1], p[layer.bias].size) for layer, rows in zip(model.layers, inputs, strict=True)]

    def of_example(image: jax.Array) -> list[jax.Array]:
        zeros = [jnp.zeros(shape) for shape in places]

        def logits(shifts: list[jax.Array]) -> jax.Array:
            return layered(ops, model.layers, p, image[None], [shift[None] for shift in shifts])[0][0]

        q = jax.nn.softmax(logits(zeros))
        root = jnp.sqrt(q)
        roots = jnp.diag(root) - jnp.outer(q, root)  # roots @ roots.T = diag(q) - q q'
        jacobians = jax.jacrev(logits)(zeros)
        return [jnp.einsum("kc,kto->cto", roots, j.reshape(len(q), -1, j.shape[-1])) for j in jacobians]

    entered = [rows[:, None] if rows.ndim == 2 else patches(rows) for rows in inputs]
    return entered, jax.lax.map(of_example, x)


def patches(images: jax.Array) -> jax.Array:
    """What a filter of 3 x 3 sees at each place, (examples, places, channels * 9)."""
    layout = ("NHWC", "HWIO", "NHWC")
    seen = jax.lax.conv_general_dilated_patches(images, (3, 3), (1, 1), "SAME", dimension_numbers=layout)
    return seen.reshape(len(images), -1, seen.shape[-1])


def factors(a: jax.Array, g: jax.Array, reduce: bool) -> tuple[jax.Array, jax.Array]:
    count, places = a.shape[:2]
    if reduce:
        a, g, places = jnp.mean(a, axis=1, keepdims=True), jnp.sum(g, axis=2, keepdims=True), 1
    # n: example, t: place, c: class, i, j: inputs, o, p: outputs
    return jnp.einsum("nti,ntj->ij", a, a) / (count * places), jnp.einsum("ncto,nctp->op", g, g) / count


def factored(a: jax.Array, g: jax.Array, v: jax.Array, reduce: bool) -> jax.Array:
    left, right = factors(a, g, reduce)
    return left @ v @ right


def corrected(a: jax.Array, g: jax.Array, v: jax.Array, reduce: bool) -> jax.Array:
    """EKFAC: second moments of single gradients as eigenvalues, in the eigenvectors of the factors."""
    left, right = (jnp.linalg.eigh(factor)[1] for factor in factors(a, g, reduce))
    moments = jnp.mean(jnp.sum(jnp.einsum("nti,ncto->ncio", a @ left, g @ right) ** 2, axis=1), axis=0)
    return left @ (moments * (left.T @ v @ right)) @ right.T


def memory_claims(n: int, outcome: Outcome) -> list[Claim]:
    """How much more a product of a large network holds at once than a gradient: x, v and the answer, not two of them.

    The product is that of the first row.
    """
    name, size = outcome.rows[0].name, 4 * n
    own, gradient = (number(timed(outcome, row), "temporary_bytes") for row in (name, GRADIENT))
    if n <= 10**6 or own is None or gradient is None:
        return []
    peak = (3 * size + own) / (2 * size + gradient)
    text = f"a product of {name} holds {peak:.2f} times as much at once as a gradient (wanted: at most {WANTED_MEMORY})"
    return [Claim(text, peak <= WANTED_MEMORY)]


plots = by_products.plots


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
    ]
