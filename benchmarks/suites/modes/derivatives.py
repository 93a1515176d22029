"""Gradients, Hessian products and Hessians of the models by every library, over growing n and batch."""

from collections.abc import Callable, Iterator
from functools import partial

from benchmarks import reading
from benchmarks.cases import Case, Choice, Claim, Finding, Outcome, Plot, Race
from benchmarks.models import MODELS, Model, mlp
from benchmarks.peers import everyone, jax_ways
from benchmarks.suites.modes.regret import regret

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
WORDS = {
    "gradient": "Gradient",
    "hvp": "Hessian-vector product",
    "products": "Hessian products at one point, one of 32",
    "hessian": "Hessian",
}

# Each MLP as (sizes, examples): first over growing n, then over growing batch.
GROWTH = (
    ((10, 8, 4), 256), ((20, 16, 5), 256), ((20, 32, 10), 256), ((32, 64, 10), 256), ((40, 96, 10), 256),
    ((20, 32, 10), 32), ((20, 32, 10), 1024), ((20, 32, 10), 4096),
)  # fmt: skip
QUICK_GROWTH = {((10, 8, 4), 256), ((20, 16, 5), 256)}
# Where a case takes minutes, most of them for the slowest libraries, fewer points make the line.
SPARSE_GROWTH = {
    "products": {((10, 8, 4), 256), ((20, 32, 10), 256), ((40, 96, 10), 256)},
    "hessian": {pair for pair in GROWTH if pair not in (((40, 96, 10), 256), ((20, 32, 10), 4096))},
}

QUICK = {
    "gradient": ("mlp", "neural-ode"),
    "hvp": ("mlp",),
    "products": ("mlp",),
    "hessian": ("mlp",),
}
"""The models of a quick run that names none."""

CAPTION = (
    "curvature and jax differentiate a tree of parameters, the other libraries one vector that the loss takes apart; "
    "the row of jax.hessian by such a vector shows what that costs. "
    "Temporary memory is what XLA says, and of JAX's programs only."
)


def cases(choice: Choice) -> Iterator[Case]:
    """Each derivative of each model; the MLP in several sizes."""
    for derivative in WORDS:
        for model in models(choice, derivative):
            yield race(choice, derivative, model)


def models(choice: Choice, derivative: str) -> Iterator[Model]:
    """Those of the choice; of a quick one without names, a few."""
    for name in QUICK[derivative] if choice.quick and not choice.models else filter(choice.wants, MODELS):
        if name != "mlp":
            yield MODELS[name]()
            continue
        wanted = set(SPARSE_GROWTH.get(derivative, GROWTH)) & (QUICK_GROWTH if choice.quick else set(GROWTH))
        yield from (mlp(*pair) for pair in GROWTH if pair in wanted)


def race(choice: Choice, derivative: str, model: Model) -> Race:
    """One derivative of one model."""
    n, batch = model.num_parameters, len(model.batch[0])
    compiled = not choice.quick and model.name in ("logistic", "mlp")
    return Race(
        f"modes/{derivative}/{model.name}/n={n}/batch={batch}",
        f"{WORDS[derivative]}, {model.title}, {n:,} parameters, batch of {batch}",
        model.name,
        partial(everyone.of_model, model, derivative, choice, compiled=compiled),
        partial(jax_ways.reference, model, derivative),
        TOLERANCE[choice.dtype],
        {"n": n, "batch": batch},
        budget=0.1 if choice.quick else 0.5,
        rounds=choice.rounds,
        claims=partial(regret, WORDS[derivative]) if derivative != "products" else _no_claims,
        caption=CAPTION,
    )


def _no_claims(outcome: Outcome) -> list[Claim]:
    return []


# ---- what the rows show ----------------------------------------------------------------------------------------------


def plots(outcomes: reading.Outcomes) -> list[Plot]:
    """Time and memory of the MLP's derivatives over n and over the batch."""
    found = []
    for derivative, word in WORDS.items():
        every = reading.part(outcomes, f"modes/{derivative}/mlp/")
        for axis, label, fixed in (("n", "parameters n", "batch"), ("batch", "examples in the batch", "n")):
            series = _along(every, axis, fixed)
            for metric, y_label in (("seconds", "seconds"), ("temporary_bytes", "temporary bytes")):
                lines = reading.curves(series, axis, metric)
                name = f"{derivative}-{metric.split('_')[0]}-by-{axis}"
                title = f"{word} of an MLP: {y_label} against {label}"
                found.append(Plot(name, title, label, y_label, lines))
    return [plot for plot in found if plot.lines]


def _along(outcomes: reading.Outcomes, axis: str, fixed: str) -> dict[str, Outcome]:
    """The outcomes that share the size ``fixed`` with most others: a line along ``axis``."""
    values = [outcome.sizes[fixed] for outcome in outcomes.values()]
    most = max(values, key=values.count, default=None)
    return {id: outcome for id, outcome in outcomes.items() if outcome.sizes[fixed] == most}


def findings(outcomes: reading.Outcomes) -> list[Finding]:
    """What the rows answer."""
    makers: tuple[Callable[[reading.Outcomes], Finding | None], ...] = (gradient_finding, order_finding, reuse_finding)
    return [finding for make in makers if (finding := make(outcomes))]


def gradient_finding(outcomes: reading.Outcomes) -> Finding | None:
    """Forward against reverse, at one output."""
    races = reading.part(outcomes, "modes/gradient/")
    pairs = {"JAX": ("jax.jacfwd", "jax.grad"), "PyTorch": ("torch.func.jacfwd", "torch.func.grad")}
    answer = [
        f"In {library} forward mode takes {reading.spread(reading.share(race, *pair) for race in races.values())} "
        "as long as reverse."
        for library, pair in pairs.items()
    ]
    return Finding("Forward or reverse for a gradient?", " ".join(answer), list(races)) if races else None


def order_finding(outcomes: reading.Outcomes) -> Finding | None:
    """The compositions of a Hessian product."""
    races = reading.part(outcomes, "modes/hvp/")
    answer = [
        f"In {library} reverse over reverse takes {reading.spread(ratios)} as long as forward over reverse, "
        f"over {len(ratios)} cases."
        for library, prefix in {"JAX": "jax", "PyTorch": "torch.func"}.items()
        if (
            ratios := [
                value
                for race in races.values()
                if (value := reading.share(race, f"{prefix}, reverse over reverse", f"{prefix}, forward over reverse"))
            ]
        )
    ]
    question = "In which order for a Hessian-vector product?"
    return Finding(question, " ".join(answer) or "Not measured in this run.", list(races)) if races else None


def reuse_finding(outcomes: reading.Outcomes) -> Finding | None:
    """What one linearization spares."""
    races = reading.part(outcomes, "modes/products/")
    pairs = {
        "curvature": ("curvature.hvp, each anew", "curvature.linearize_grad"),
        "JAX": ("jax, forward over reverse", "jax.linearize"),
        "PyTorch": ("torch.func, forward over reverse", "torch.func.linearize"),
        "PyTorch, with one graph": ("torch.func, forward over reverse", "torch.autograd.grad, one graph"),
    }
    answer = "; ".join(
        f"{library}: {reading.spread(reading.share(race, *pair) for race in races.values())}"
        for library, pair in pairs.items()
    )
    question = "How much do 32 Hessian products at one point gain from one linearization?"
    return Finding(question, f"Each anew takes as long as with one, in {answer}.", list(races)) if races else None
