"""Per example: the norms, the clipped mean and the moments of gradients, the gradients and the Hessians themselves."""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Case, Choice, Contestant, Finding, Outcomes, Plot, Race
from benchmarks.models import Model, language_model, mlp, pooling
from benchmarks.peers import operations, torch_ways
from benchmarks.peers.flat import Function
from benchmarks.peers.jax_ways import InJax, in_double, of_one
from benchmarks.reading import MISSING, over, part, share

TITLE = "Per example"
QUESTION = "What does it cost to know the gradient of every example, and what to know only its norm?"
GRADIENT = "one gradient of the mean"
BY_GRADIENTS = ("norms", "clipped mean", "moments")
NORMS, JAX = "curvature.per_example_grad_norm", "jax, vmap(grad)"

Make = Callable[[int], Model]


def perceptron(batch: int) -> Model:
    return mlp((784, 256, 10), batch)


def convolutional(batch: int) -> Model:
    return pooling(examples=batch)


def transformer(batch: int) -> Model:
    return language_model(examples=batch, head=32)


def small(batch: int) -> Model:
    return mlp((20, 16, 5), batch)


def cases(choice: Choice) -> Iterator[Case]:
    """Each quantity over growing batches of a perceptron; norms on the others; then what forms every gradient."""
    grid: list[tuple[Make, str, tuple[int, ...]]] = [
        *((perceptron, what, (256,) if choice.quick else (16, 64, 256, 1024)) for what in BY_GRADIENTS),
        (convolutional, "norms", (32,) if choice.quick else (32, 128)),
        (transformer, "norms", () if choice.quick else (16, 64)),
        (perceptron, "gradients", (32,) if choice.quick else (32, 256)),
        (small, "Hessians", () if choice.quick else (16, 64, 256)),
    ]
    if not choice.quick:
        grid += [(make, what, (64,)) for make in (convolutional, transformer) for what in BY_GRADIENTS[1:]]
    for make, what, batches in grid:
        for batch in batches:
            model = make(batch)
            n = model.num_parameters
            yield Race(
                f"per_example/{what.replace(' ', '-')}/{model.name}/n={n}/batch={batch}",
                f"Per-example gradients: {what}, {model.title}, {n:,} parameters, {batch} examples", model.name,
                partial(contestants, make, batch, what, choice.dtype), partial(reference, make, batch, what),
                choice.tolerance(), {"n": n, "batch": batch},
                caption=f"The row '{GRADIENT}' is what plain training pays.", **choice.effort(0.25, 1.0),
            )  # fmt: skip


def contestants(make: Make, batch: int, what: str, dtype: str) -> Iterator[Contestant]:
    """Ours, ``vmap`` over the derivative in JAX and in torch, and one derivative of the mean."""
    model, max_norm = make(batch), median_norm(make, batch)
    made = InJax(model)
    loss, args = of_one(made.loss), (made.params, *made.batch)
    ours = {
        "norms": (NORMS, curvature.per_example_grad_norm(loss)),
        "clipped mean": ("curvature.clipped_grad", curvature.clipped_grad(loss, max_norm)),
        "moments": ("curvature.per_example_grad_moments", curvature.per_example_grad_moments(loss)),
        "gradients": ("curvature.per_example_grad", curvature.per_example_grad(loss)),
        "Hessians": ("curvature.per_example_hessian", curvature.per_example_hessian(loss)),
    }
    inner, whole, derivative = (
        ("hessian", "one Hessian of the mean", jax.hessian) if what == "Hessians" else ("grad", GRADIENT, jax.grad)
    )

    def in_torch(torch: Any) -> Function:
        loss = of_one(partial(model.loss, operations.for_torch()))
        return by_vmap(torch, torch.func, loss, max_norm)[what]

    yield Contestant(ours[what][0], "curvature", ours[what][1], args)
    yield Contestant(f"jax, vmap({inner})", "jax", by_vmap(jnp, jax, loss, max_norm)[what], args)
    name = f"torch.func, vmap({inner})"
    yield torch_ways.without_graph(name, in_torch, dtype, model.params(), *model.batch)
    yield Contestant(whole, "jax", derivative(made.loss), args, floor=True)


def by_vmap(np: Any, func: Any, loss: Function, max_norm: float) -> dict[str, Function]:
    """Each quantity from the derivative of one example, under ``vmap``.

    ``np`` and ``func`` are the array operations and the transformations of a library: ``jax.numpy`` and ``jax``, or
    ``torch`` and ``torch.func``.
    """

    def each(function: Function) -> Function:
        return lambda params, *batch: func.vmap(function, (None,) + (0,) * len(batch))(params, *batch)

    def norms(formed: Any) -> Any:
        return np.sqrt(sum((leaf**2).reshape(len(leaf), -1).sum(1) for leaf in formed.values()))

    gradients = each(func.grad(loss))

    def clipped(params: Any, *batch: Any) -> Any:
        formed = gradients(params, *batch)
        found = norms(formed)
        weights = np.clip(max_norm / found, max=1.0) / len(found)
        return {name: np.tensordot(weights, leaf, 1) for name, leaf in formed.items()}, found

    def moments(params: Any, *batch: Any) -> Any:
        formed = gradients(params, *batch)
        mean = {name: leaf.mean(0) for name, leaf in formed.items()}
        second = {name: (leaf**2).mean(0) for name, leaf in formed.items()}
        return mean, second, {name: second[name] - mean[name] ** 2 for name in mean}

    return {
        "norms": lambda params, *batch: norms(gradients(params, *batch)),
        "clipped mean": clipped, "moments": moments, "gradients": gradients, "Hessians": each(func.hessian(loss)),
    }  # fmt: skip


def reference(make: Make, batch: int, what: str) -> Any:
    if what in BY_GRADIENTS:
        return sums(make, batch)[what]
    model, derivative = make(batch), jax.grad if what == "gradients" else jax.hessian
    of_example = derivative(of_one(InJax(model).loss))
    return in_double(
        lambda p, *batch: jax.lax.map(lambda example: of_example(p, *example), batch), model.params(), *model.batch
    )


def norm(tree: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


@functools.lru_cache(maxsize=2)
def median_norm(make: Make, batch: int) -> float:
    model = make(batch)
    gradient = jax.grad(of_one(InJax(model).loss))
    each = in_double(
        lambda p, *batch: jax.lax.map(lambda example: norm(gradient(p, *example)), batch), model.params(), *model.batch
    )
    return float(np.median(each))


@functools.lru_cache(maxsize=2)
def sums(make: Make, batch: int) -> dict[str, Any]:
    """Norms, clipped mean and moments; no two gradients of examples are kept at once."""
    model, max_norm = make(batch), median_norm(make, batch)
    gradient_of = jax.grad(of_one(InJax(model).loss))

    def of_all(params: Any, *batch: Any) -> Any:
        def add(total: Any, example: Any) -> tuple[Any, jax.Array]:
            gradient = gradient_of(params, *example)
            length = norm(gradient)
            clipped = jax.tree.map(lambda leaf: leaf * jnp.minimum(1, max_norm / length), gradient)
            squares = jax.tree.map(jnp.square, gradient)
            return jax.tree.map(jnp.add, total, (gradient, squares, clipped)), length

        total, norms = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, (params, params, params)), batch)
        mean, second, clipped = jax.tree.map(lambda leaf: leaf / len(batch[0]), total)
        variance = jax.tree.map(lambda first, second: second - first**2, mean, second)
        return {"norms": norms, "clipped mean": (clipped, norms), "moments": (mean, second, variance)}

    return in_double(of_all, model.params(), *model.batch)


def plots(outcomes: Outcomes) -> list[Plot]:
    found = []
    for what in BY_GRADIENTS:
        name = what.replace(" ", "-")
        for metric, kind in (("seconds", "time"), ("temporary_bytes", "memory")):
            title = f"{what.capitalize()} of per-example gradients of a perceptron: {kind}"
            races = part(outcomes, f"per_example/{name}/mlp/")
            found += over(races, "batch", f"{name}-{kind}", title, "examples in the batch", metric)
    return found


def findings(outcomes: Outcomes) -> list[Finding]:
    costs = [
        f"{outcome.title}: {cost:.2f} gradients, {there:.2f} by vmap(grad)."
        for outcome in part(outcomes, "per_example/norms/").values()
        if (cost := share(outcome, NORMS, GRADIENT)) and (there := share(outcome, JAX, GRADIENT))
    ]
    question = "What do the norms of all per-example gradients cost, in gradients of the mean?"
    return [Finding(question, " ".join(costs) or MISSING)]
