"""Per example: the norms, the clipped mean and the moments of gradients, the gradients and the Hessians themselves."""

import functools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks import networks
from benchmarks.cases import Case, Choice, Claim, Contestant, Finding, Outcome, Plot, Race
from benchmarks.models import Model
from benchmarks.peers import jax_ways, operations, torch_per_example
from benchmarks.reading import at_most, comparison, curves, share

TITLE = "Per example"
QUESTION = "What does it cost to know the gradient of every example, and what to know only its norm?"
REASONS = {
    ("per_example/Hessians", "jax, vmap(hessian)"): (
        "ours takes the examples in chunks, so that memory is bounded for any batch; these Hessians would have "
        "fitted at once, which chunk_size=None asks for"
    ),
    ("per_example/gradients", "torch.func"): (
        "one gradient for each example is to be written, and most of the time is that: jax.vmap(jax.grad), which "
        "compiles to the like of ours, takes as long"
    ),
    ("per_example/norms/convolutional", "torch.func"): (
        "one gradient of the mean by XLA takes as long as all that torch does: its convolutions are faster here"
    ),
    ("per_example/norms/convolutional", "jax, vmap(grad)"): (
        "ours keeps no gradient of an example, which saves memory"
    ),
    ("per_example/moments/convolutional", ""): (
        "gradients as small as these may as well be formed, for each example; ours keeps factors, which pays "
        "where a layer is large"
    ),
}
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
GRADIENT = "one gradient of the mean"
BY_GRADIENTS = ("norms", "clipped mean", "moments")
OURS = {
    "norms": "curvature.per_example_grad_norm",
    "clipped mean": "curvature.clipped_grad",
    "moments": "curvature.per_example_grad_moments",
    "gradients": "curvature.per_example_grad",
    "Hessians": "curvature.per_example_hessian",
}
JAX, TORCH = "jax, vmap(grad)", "torch.func, vmap(grad)"

WANTED_NORMS = 1.3  # gradients, on the perceptron
WANTED_CLIPPED = 3  # gradients, on the perceptron
WANTED_MEMORY = 1 / 3  # of the temporaries of vmap(grad), on the other two

Function = Callable[..., Any]
Make = Callable[[int], Model]


def perceptron(batch: int) -> Model:
    """784-256-10, the sizes of a classifier of digits."""
    return networks.perceptron((784, 256, 10), batch).model


def convolutional(batch: int) -> Model:
    """Two filters with pooling and a linear layer on images of 28 x 28."""
    return networks.convolutional(examples=batch).model


def transformer(batch: int) -> Model:
    """One block with four heads on 64 tokens."""
    return networks.transformer(examples=batch, head=32).model


def small(batch: int) -> Model:
    """A perceptron whose Hessians fit into memory, one for each example."""
    return networks.perceptron((20, 16, 5), batch).model


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
            yield case(choice, make, what, batch)


def case(choice: Choice, make: Make, what: str, batch: int) -> Race:
    """One quantity of one network at one batch size."""
    model = make(batch)
    n = model.num_parameters
    return Race(
        f"per_example/{what.replace(' ', '-')}/{model.name}/n={n}/batch={batch}",
        f"Per-example gradients: {what}, {model.title}, {n:,} parameters, {batch} examples",
        model.name,
        partial(contestants, make, batch, what, choice.dtype),
        lambda: reference(make, batch)[what],
        TOLERANCE[choice.dtype],
        {"n": n, "batch": batch},
        budget=0.25 if choice.quick else 1.0,
        rounds=choice.rounds,
        claims=partial(claims, what, model.name, batch),
        caption=f"The row '{GRADIENT}' is what plain training pays.",
    )


# ---- from the gradient of every example, and without -----------------------------------------------------------------


def example_loss(model: Model) -> Function:
    """The loss of one example, without a batch axis."""
    ops = operations.for_jax()
    return lambda p, *example: model.loss(ops, p, *(a[None] for a in example))


def numbers(model: Model) -> tuple[dict[str, jax.Array], tuple[jax.Array, ...]]:
    """Parameters and batch in the precision JAX is set to; integers stay what they are."""
    params = {name: jnp.asarray(value, float) for name, value in model.params().items()}
    return params, tuple(jnp.asarray(a, float if np.issubdtype(a.dtype, np.floating) else int) for a in model.batch)


def contestants(make: Make, batch: int, what: str, dtype: str) -> Iterator[Contestant]:
    """Ours, ``vmap`` over the derivative in JAX and in torch, and one derivative of the mean."""
    model, max_norm = make(batch), median_norm(make, batch)
    loss, args = example_loss(model), (params_and_batch := numbers(model))[0:1] + params_and_batch[1]
    mean, _, _ = jax_ways.problem(model)
    whole = "one Hessian of the mean" if what == "Hessians" else GRADIENT
    yield Contestant(OURS[what], "curvature", by_curvature(loss, max_norm)[what], args)
    yield Contestant(JAX if what != "Hessians" else "jax, vmap(hessian)", "jax", by_vmap(loss, max_norm)[what], args)
    name = TORCH if what != "Hessians" else "torch.func, vmap(hessian)"
    yield torch_per_example.contestant(name, model, dtype, what, max_norm)
    yield Contestant(whole, "jax", (jax.hessian if what == "Hessians" else jax.grad)(mean), args, floor=True)


def by_curvature(loss: Function, max_norm: float) -> dict[str, Function]:
    """Each quantity by the function made for it."""
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
        return mean, second, jax.tree.map(lambda first, second: second - first**2, mean, second)

    return {
        "norms": lambda params, *batch: norms_of(gradients(params, *batch)),
        "clipped mean": clipped, "moments": moments, "gradients": gradients, "Hessians": each(jax.hessian(loss)),
    }  # fmt: skip


def norms_of(gradients: Any) -> jax.Array:
    """The norm of each example's gradient, over all leaves."""
    return jnp.sqrt(sum(jnp.sum(leaf**2, axis=range(1, leaf.ndim)) for leaf in jax.tree.leaves(gradients)))


# ---- the trusted answers ---------------------------------------------------------------------------------------------


def reference(make: Make, batch: int) -> dict[str, Any]:
    """Every quantity in double precision, example by example; what would be large is made when it is asked for."""
    return _Answers(make, batch)


class _Answers(dict[str, Any]):
    def __init__(self, make: Make, batch: int):
        super().__init__(sums(make, batch))
        self.make, self.batch = make, batch

    def __missing__(self, what: str) -> Any:
        model = self.make(self.batch)
        derivative = {"gradients": jax.grad, "Hessians": jax.hessian}[what](example_loss(model))
        with jax.enable_x64(True):
            params, batch = numbers(model)
            return jax.jit(lambda p, *batch: jax.lax.map(lambda example: derivative(p, *example), batch))(
                params, *batch
            )


@functools.lru_cache(maxsize=2)
def sums(make: Make, batch: int) -> dict[str, Any]:
    """Norms, clipped mean and moments in double precision, each example's gradient formed and forgotten."""
    model = make(batch)
    loss, max_norm = example_loss(model), median_norm(make, batch)

    def add(total: Any, example: Any, params: Any) -> tuple[Any, jax.Array]:
        gradient = jax.grad(loss)(params, *example)
        norm = norms_of(jax.tree.map(lambda leaf: leaf[None], gradient))[0]
        clipped = jax.tree.map(lambda leaf: leaf * jnp.minimum(1, max_norm / norm), gradient)
        squares = jax.tree.map(lambda leaf: leaf**2, gradient)
        return jax.tree.map(jnp.add, total, (gradient, squares, clipped)), norm

    def of_all(params: Any, *batch: Any) -> Any:
        zero = jax.tree.map(jnp.zeros_like, (params, params, params))
        total, norms = jax.lax.scan(lambda total, example: add(total, example, params), zero, batch)
        return jax.tree.map(lambda leaf: leaf / len(batch[0]), total), norms

    with jax.enable_x64(True):
        params, data = numbers(model)
        (mean, second, clipped), norms = jax.device_get(jax.jit(of_all)(params, *data))
    variance = jax.tree.map(lambda first, second: second - first**2, mean, second)
    return {"norms": norms, "clipped mean": (clipped, norms), "moments": (mean, second, variance)}


@functools.lru_cache(maxsize=2)
def median_norm(make: Make, batch: int) -> float:
    """A norm that clips one half of the examples."""
    loss = example_loss(make(batch))
    with jax.enable_x64(True):
        params, data = numbers(make(batch))
        norm = jax.jit(
            lambda p, *data: jax.lax.map(
                lambda example: norms_of(jax.tree.map(lambda leaf: leaf[None], jax.grad(loss)(p, *example)))[0], data
            )
        )
        return float(np.median(norm(params, *data)))


# ---- what is claimed, drawn and concluded ----------------------------------------------------------------------------


def claims(what: str, model: str, batch: int, outcome: Outcome) -> list[Claim]:
    """Times in gradients on the perceptron; time and memory against ``vmap(grad)`` on the others."""
    if model == "mlp" and batch == 256 and what in ("norms", "clipped mean"):
        return at_most(outcome, OURS[what], GRADIENT, WANTED_NORMS if what == "norms" else WANTED_CLIPPED)
    if model != "mlp" and what == "norms":
        return [
            *at_most(outcome, OURS[what], JAX, 1.0),
            *at_most(outcome, OURS[what], JAX, WANTED_MEMORY, "temporary_bytes"),
        ]
    return []


def plots(outcomes: Mapping[str, Outcome]) -> list[Plot]:
    """Time and temporary memory over the batch, for each quantity of the perceptron."""
    found = []
    for what in BY_GRADIENTS:
        prefix = f"per_example/{what.replace(' ', '-')}/mlp/"
        for metric, scale, label in (("seconds", 1e3, "time [ms]"), ("temporary_bytes", 2**-20, "temporaries [MiB]")):
            lines = curves(outcomes, "batch", metric, prefix=prefix, scale=scale)
            if lines:
                name = f"{what.replace(' ', '-')}-{'time' if metric == 'seconds' else 'memory'}"
                title = f"{what.capitalize()} of per-example gradients of a perceptron: {label.split(' [')[0]}"
                found.append(Plot(name, title, "examples in the batch", label, lines))
    return found


def findings(outcomes: Mapping[str, Outcome]) -> list[Finding]:
    """What the norms cost in gradients, and what each quantity costs elsewhere."""
    chosen = {id: outcome for id, outcome in outcomes.items() if "/norms/" in id}
    costs = [
        f"{outcome.title}: {cost:.2f} gradients, {there:.2f} by vmap(grad)."
        for outcome in chosen.values()
        if (cost := share(outcome, OURS["norms"], GRADIENT)) and (there := share(outcome, JAX, GRADIENT))
    ]
    return [
        Finding(
            "What do the norms of all per-example gradients cost, in gradients of the mean?",
            " ".join(costs) or "Not measured in this run.",
            list(chosen),
        ),
        Finding(
            "Is anything per example faster elsewhere?",
            " ".join(map(comparison, outcomes.values())) or "Not measured in this run.",
            list(outcomes),
        ),
    ]
