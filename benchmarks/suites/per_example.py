"""Per example: the norms, the clipped mean and the moments of gradients, the gradients and the Hessians themselves."""

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import Case, Choice, Claim, Contestant, Finding, Outcome, Outcomes, Plot, Race
from benchmarks.models import Model, language_model, mlp, pooling
from benchmarks.peers import operations, torch_ways
from benchmarks.peers.jax_ways import of_one
from benchmarks.reading import MISSING, at_most, over, part, share
from benchmarks.trusted import numbers

TITLE = "Per example"
QUESTION = "What does it cost to know the gradient of every example, and what to know only its norm?"
GRADIENT = "one gradient of the mean"
BY_GRADIENTS = ("norms", "clipped mean", "moments")
OURS = {
    "norms": "curvature.per_example_grad_norm",
    "clipped mean": "curvature.clipped_grad",
    "moments": "curvature.per_example_grad_moments",
    "gradients": "curvature.per_example_grad",
    "Hessians": "curvature.per_example_hessian",
}
JAX = "jax, vmap(grad)"
WANTED = {"norms": 1.3, "clipped mean": 3}  # gradients, on the perceptron
WANTED_MEMORY = 1 / 3  # of the temporaries of vmap(grad), on the other two

Function = Callable[..., Any]
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
                choice.tolerance(), {"n": n, "batch": batch}, claims=partial(claims, what, model.name, batch),
                caption=f"The row '{GRADIENT}' is what plain training pays.", **choice.effort(0.25, 1.0),
            )  # fmt: skip


def loss_of(model: Model) -> Function:
    ops = operations.for_jax()
    return lambda p, *batch: model.loss(ops, p, *batch)


def contestants(make: Make, batch: int, what: str, dtype: str) -> Iterator[Contestant]:
    """Ours, ``vmap`` over the derivative in JAX and in torch, and one derivative of the mean."""
    model, max_norm = make(batch), median_norm(make, batch)
    mean = loss_of(model)
    params, _, data = numbers(model)
    args, hessian = (params, *data), what == "Hessians"
    inner, whole, derivative = (
        ("hessian", "one Hessian of the mean", jax.hessian) if hessian else ("grad", GRADIENT, jax.grad)
    )
    yield Contestant(OURS[what], "curvature", by_curvature(of_one(mean), max_norm)[what], args)
    yield Contestant(f"jax, vmap({inner})", "jax", by_vmap(of_one(mean), max_norm)[what], args)
    yield torch_ways.per_example(f"torch.func, vmap({inner})", model, dtype, what, max_norm)
    yield Contestant(whole, "jax", derivative(mean), args, floor=True)


def by_curvature(loss: Function, max_norm: float) -> dict[str, Function]:
    return {
        "norms": curvature.per_example_grad_norm(loss),
        "clipped mean": curvature.clipped_grad(loss, max_norm),
        "moments": curvature.per_example_grad_moments(loss),
        "gradients": curvature.per_example_grad(loss),
        "Hessians": curvature.per_example_hessian(loss),
    }


def by_vmap(loss: Function, max_norm: float) -> dict[str, Function]:
    """Each quantity from ``jax.vmap`` of the derivative of one example."""

    def each(function: Function) -> Function:
        return lambda params, *batch: jax.vmap(function, (None,) + (0,) * len(batch))(params, *batch)

    gradients = each(jax.grad(loss))

    def clipped(params: Any, *batch: Any) -> Any:
        formed = gradients(params, *batch)
        norms = norms_of(formed)
        weights = jnp.minimum(1, max_norm / norms) / len(norms)
        return jax.tree.map(lambda leaf: jnp.tensordot(weights, leaf, 1), formed), norms

    def moments(params: Any, *batch: Any) -> Any:
        formed = gradients(params, *batch)
        mean = jax.tree.map(lambda leaf: jnp.mean(leaf, 0), formed)
        second = jax.tree.map(lambda leaf: jnp.mean(leaf**2, 0), formed)
        return mean, second, variance(mean, second)

    return {
        "norms": lambda params, *batch: norms_of(gradients(params, *batch)),
        "clipped mean": clipped, "moments": moments, "gradients": gradients, "Hessians": each(jax.hessian(loss)),
    }  # fmt: skip


def variance(mean: Any, second: Any) -> Any:
    return jax.tree.map(lambda first, second: second - first**2, mean, second)


def norms_of(gradients: Any) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2, axis=range(1, leaf.ndim)) for leaf in jax.tree.leaves(gradients)))


def over_examples(make: Make, batch: int, function: Function) -> Any:
    """``function(params, *example)`` of each example, one after the other."""
    with jax.enable_x64(True):
        params, _, data = numbers(make(batch))
        mapped = jax.jit(lambda p, *data: jax.lax.map(lambda example: function(p, *example), data))
        return jax.device_get(mapped(params, *data))


def reference(make: Make, batch: int, what: str) -> Any:
    if what in BY_GRADIENTS:
        return sums(make, batch)[what]
    derivative = jax.grad if what == "gradients" else jax.hessian
    return over_examples(make, batch, derivative(of_one(loss_of(make(batch)))))


def with_norm(make: Make, batch: int) -> Function:
    gradient = jax.grad(of_one(loss_of(make(batch))))

    def of_example(params: Any, *example: Any) -> Any:
        found = gradient(params, *example)
        return found, norms_of(jax.tree.map(lambda leaf: leaf[None], found))[0]

    return of_example


@functools.lru_cache(maxsize=2)
def sums(make: Make, batch: int) -> dict[str, Any]:
    """Norms, clipped mean and moments; no two gradients of examples are kept at once."""
    of_example, max_norm = with_norm(make, batch), median_norm(make, batch)

    def add(total: Any, example: Any, params: Any) -> tuple[Any, jax.Array]:
        gradient, norm = of_example(params, *example)
        clipped = jax.tree.map(lambda leaf: leaf * jnp.minimum(1, max_norm / norm), gradient)
        squares = jax.tree.map(lambda leaf: leaf**2, gradient)
        return jax.tree.map(jnp.add, total, (gradient, squares, clipped)), norm

    def of_all(params: Any, *batch: Any) -> Any:
        zero = jax.tree.map(jnp.zeros_like, (params, params, params))
        total, norms = jax.lax.scan(lambda total, example: add(total, example, params), zero, batch)
        return jax.tree.map(lambda leaf: leaf / len(batch[0]), total), norms

    with jax.enable_x64(True):
        params, _, data = numbers(make(batch))
        (mean, second, clipped), norms = jax.device_get(jax.jit(of_all)(params, *data))
    return {"norms": norms, "clipped mean": (clipped, norms), "moments": (mean, second, variance(mean, second))}


@functools.lru_cache(maxsize=2)
def median_norm(make: Make, batch: int) -> float:
    of_example = with_norm(make, batch)
    return float(np.median(over_examples(make, batch, lambda params, *example: of_example(params, *example)[1])))


def claims(what: str, model: str, batch: int, outcome: Outcome) -> list[Claim]:
    """Times in gradients on the perceptron; time and memory against ``vmap(grad)`` on the others."""
    if model == "mlp" and batch == 256 and what in WANTED:
        return at_most(outcome, OURS[what], GRADIENT, WANTED[what])
    if model != "mlp" and what == "norms":
        memory = at_most(outcome, OURS[what], JAX, WANTED_MEMORY, "temporary_bytes")
        return at_most(outcome, OURS[what], JAX, 1.0) + memory
    return []


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
        if (cost := share(outcome, OURS["norms"], GRADIENT)) and (there := share(outcome, JAX, GRADIENT))
    ]
    question = "What do the norms of all per-example gradients cost, in gradients of the mean?"
    return [Finding(question, " ".join(costs) or MISSING)]
