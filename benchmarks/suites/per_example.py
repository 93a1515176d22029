"""Per example: the norms, the clipped mean and the moments of gradients, the gradients and the Hessians themselves."""

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

MODELS: dict[str, Callable[[int], Model]] = {
    "perceptron": lambda batch: mlp((784, 256, 10), batch),
    "small": lambda batch: mlp((20, 16, 5), batch),
    "convolutional": lambda batch: pooling(examples=batch),
    "transformer": lambda batch: language_model(examples=batch, head=32),
}


def cases(choice: Choice) -> Iterator[Case]:
    """Each quantity over growing batches of a perceptron; norms on the others; then what forms every gradient."""
    grid: list[tuple[str, str, tuple[int, ...]]] = [
        *(("perceptron", what, (256,) if choice.quick else (16, 64, 256, 1024)) for what in BY_GRADIENTS),
        ("convolutional", "norms", (32,) if choice.quick else (32, 128)),
        ("transformer", "norms", () if choice.quick else (16, 64)),
        ("perceptron", "gradients", (32,) if choice.quick else (32, 256)),
        ("small", "Hessians", () if choice.quick else (16, 64, 256)),
    ]
    if not choice.quick:
        grid += [(name, what, (64,)) for name in ("convolutional", "transformer") for what in BY_GRADIENTS[1:]]
    for name, what, batches in grid:
        for batch in batches:
            model = MODELS[name](batch)
            n = model.num_parameters
            yield Race(
                f"per_example/{what.replace(' ', '-')}/{model.name}/n={n}/batch={batch}",
                f"Per-example gradients: {what}, {model.title}, {n:,} parameters, {batch} examples", model.name,
                partial(contestants, model, what, choice.dtype), partial(reference, model, what),
                choice.tolerance(), {"n": n, "batch": batch},
                caption=f"The row '{GRADIENT}' is what plain training pays.", **choice.effort(0.25, 1.0),
            )  # fmt: skip


def reference(model: Model, what: str) -> Any:
    """By plain ``vmap``."""
    loss, max_norm = of_one(InJax(model).loss), median_norm(model, what)
    return in_double(by_vmap(jnp, jax, loss, max_norm)[what], model.params(), *model.batch)


def median_norm(model: Model, what: str) -> float:
    """To what length gradients are clipped, where they are."""
    return float(np.median(reference(model, "norms"))) if what == "clipped mean" else 1.0


def contestants(model: Model, what: str, dtype: str) -> Iterator[Contestant]:
    """Ours, ``vmap`` over the derivative in JAX and in torch, and one derivative of the mean."""
    made, max_norm = InJax(model), median_norm(model, what)
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
