"""Which mode: gradients, Jacobians, Hessian products and Hessians by every composition, in every library."""

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from benchmarks.cases import OURS, Case, Choice, Claim, Contestant, Finding, Outcome, Outcomes, Plot, Race, Row
from benchmarks.models import MODELS, Model, mlp, tanh_network
from benchmarks.peers import autograd_ways, flat, jax_ways, operations, tensorflow_ways, torch_ways
from benchmarks.peers.jax_ways import in_double, numbers
from benchmarks.reading import MISSING, number, others, over, part, ratio_of_fastest, share, spread

TITLE = "Modes"
QUESTION = "Forward or reverse, and in which order; and by which library?"


def cases(choice: Choice) -> Iterator[Case]:
    for make in (jacobians, derivatives, forbidden, networks, diagonals):
        yield from make(choice)


def model_race(choice: Choice, model: Model, derivative: str, contestants: Any, **options: Any) -> Race:
    n, batch = model.num_parameters, len(model.batch[0])
    kept = {
        "id": f"modes/{derivative}/{model.name}/n={n}/batch={batch}",
        "title": f"{WORDS[derivative]}, {model.title}, {n:,} parameters, batch of {batch}",
        "reference": partial(jax_ways.reference, model, derivative), "tolerance": choice.tolerance(),
        "sizes": {"n": n, "batch": batch}, "claims": partial(regret, WORDS[derivative]),
    }  # fmt: skip
    return Race(model=model.name, contestants=contestants, **(kept | choice.effort() | options))


REGRET = 1.1  # time of ours over that of the best composition of JAX's transformations


def regret(what: str, outcome: Outcome) -> list[Claim]:
    """Whether ours, by default, is as fast as the best composition of JAX, or the same program."""

    def low(row: Row) -> float:
        """The lower quartile: other work on the machine only ever adds."""
        return number(row, "low") or 0.0

    ours = next((row for row in outcome.rows if row.peer == OURS and row.status == "ok"), None)
    timed = [row for row in outcome.rows if "low" in row.metrics]
    best = min((row for row in timed if row.peer == "jax" and row.status == "ok"), key=low, default=None)
    if ours is None or "low" not in ours.metrics or best is None:
        return []
    same = ours.shares_program_with(best)
    twins = [row for row in timed if ours.shares_program_with(row)]
    factor = 1.0 if same else min(map(low, (ours, *twins))) / low(best)  # the time of any twin is ours too
    said = "is the same program as" if same else f"takes {factor:.2f} times as long as"
    return [Claim(f"{what}: {ours.name} {said} {best.name} (wanted: at most {REGRET} times)", factor <= REGRET)]


def regret_finding(outcomes: Outcomes) -> list[Finding]:
    mark = f"(wanted: at most {REGRET} times)"
    every = [(id, claim) for id, outcome in outcomes.items() for claim in outcome.claims if mark in claim.text]
    failed = "".join(f" Not in {id}: {claim.text}." for id, claim in every if not claim.holds)
    held = sum(claim.holds for _, claim in every)
    answer = f"In {held} of {len(every)} cases it takes at most {REGRET} times as long.{failed}"
    return [Finding('Is what "auto" takes the best composition by hand?', answer)] if every else []


RATIOS = (1 / 64, 1 / 16, 1 / 4, 1 / 2.25, 1, 2.25, 4, 16, 64)  # m/n, at the same m n
QUICK_RATIOS = (1 / 64, 1 / 4, 1, 4, 64)
GROWTH_OF_SQUARES = (32, 64, 128, 512, 1024)
WIDTH, EXAMPLES = 64, 16
# The libraries that have both modes, and what they are called there.
BOTH = {"JAX": ("jax.jacfwd", "jax.jacrev"), "torch.func": ("torch.func.jacfwd", "torch.func.jacrev")}


def function(m: int, n: int) -> flat.Flat:
    """From n numbers to m: two layers of a network whose inputs are sums over examples, so that no entry is cheap."""
    rng = np.random.default_rng(0)
    into, out = rng.normal(size=(EXAMPLES, n, WIDTH)) / math.sqrt(n), rng.normal(size=(WIDTH, m)) / math.sqrt(WIDTH)

    def build(ops: operations.Operations) -> Callable[..., Any]:
        def fun(x: Any, into: Any, out: Any) -> Any:
            hidden = ops.tanh(ops.einsum("n,bnh->bh", x, into))
            return ops.sum(ops.tanh(ops.einsum("bh,hm->bm", hidden, out)), axis=0)

        return fun

    return flat.Flat(build, rng.normal(size=n), (into, out))


def jacobians(choice: Choice) -> Iterator[Race]:
    entries, ratios = (2**14, QUICK_RATIOS) if choice.quick else (2**16, RATIOS)
    tall = [round(math.sqrt(entries * ratio)) for ratio in ratios]
    squares = () if choice.quick else GROWTH_OF_SQUARES
    for m, n in [(m, round(entries / m)) for m in tall] + [(size, size) for size in squares]:
        made = function(m, n)
        plain = (jax.jacrev if m < n else jax.jacfwd)(made.build(operations.for_jax()))
        yield Race(
            f"modes/jacobian/m={m}/n={n}", f"Jacobian of {m} outputs by {n} inputs", "jacobian",
            partial(jacobian_ways, made, choice), partial(in_double, plain, made.x, *made.data), choice.tolerance(),
            {"m": m, "n": n, "m/n": m / n}, claims=partial(regret, "Jacobian"), **choice.effort(),
        )  # fmt: skip


def jacobian_ways(made: flat.Flat, choice: Choice) -> Iterator[Contestant]:
    fun = made.build(operations.for_jax())
    ways = {"curvature.jacobian": curvature.jacobian, "jax.jacfwd": jax.jacfwd, "jax.jacrev": jax.jacrev}
    yield from jax_ways.named({name: way(fun) for name, way in ways.items()}, numbers((made.x, *made.data)))
    yield from other_libraries(made, "jacobian", choice, compiled=False)


def other_libraries(made: flat.Flat, derivative: str, choice: Choice, *, compiled: bool) -> Iterator[Contestant]:
    """Those that JAX does not compile; ``compiled`` adds ``torch.compile``, which takes long to start.

    A quick run takes TensorFlow as XLA compiles it, and only so: eager execution and ``tf.function`` are left out.
    """
    quick = ("tf.function",) if derivative == "products" else ("XLA",)  # XLA takes half a minute to compile 32 passes
    executions = quick if choice.quick else tensorflow_ways.EXECUTIONS
    yield from torch_ways.contestants(made, derivative, choice, compiled=compiled)
    yield from tensorflow_ways.contestants(made, derivative, choice, executions)
    yield from autograd_ways.contestants(made, derivative, choice)


def crossover(outcomes: Outcomes, forward: str, reverse: str) -> float | None:
    """The m/n at which both take the same time: between the two shapes around it, straight in logarithms."""
    points = sorted(
        (math.log(outcome.sizes["m/n"]), math.log(ratio))
        for outcome in outcomes.values()
        if (ratio := share(outcome, forward, reverse))
    )
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 >= 0 > y1:  # reverse was faster, forward is
            return math.exp(x0 + (x1 - x0) * y0 / (y0 - y1))
    return None


def of_ratios(outcomes: Outcomes) -> dict[str, Outcome]:
    """The races in which only m/n differs: those of one m n."""
    found = part(outcomes, "modes/jacobian/")
    entries = [race.sizes["m"] * race.sizes["n"] for race in found.values()]
    most = max(entries, key=entries.count, default=0)
    return {id: race for id, race in found.items() if abs(race.sizes["m"] * race.sizes["n"] / most - 1) < 0.01}


def jacobian_finding(outcomes: Outcomes) -> list[Finding]:
    races, sentences = of_ratios(outcomes), []
    ordered = sorted(races.values(), key=lambda race: race.sizes["m/n"])
    for library, (forward, reverse) in BOTH.items():
        ratio = crossover(races, forward, reverse)
        ends = [spread([share(race, forward, reverse)]) for race in (*ordered[:1], *ordered[-1:])]
        where = "they do not cross" if ratio is None else f"they take the same time at m/n = {ratio:.2g}"
        sentences.append(
            f"In {library} forward takes {ends[0]} as long as reverse at the widest shape and {ends[1]} at the "
            f"tallest; {where}." if ends else ""
        )  # fmt: skip
    question = "At which shape of a Jacobian does one mode overtake the other?"
    return [Finding(question, " ".join(sentences))] if races else []


def jacobian_plots(outcomes: Outcomes) -> list[Plot]:
    races = of_ratios(outcomes)
    square = {id: o for id, o in part(outcomes, "modes/jacobian/").items() if o.sizes["m"] == o.sizes["n"]}
    found = {library: crossover(races, *modes) for library, modes in BOTH.items()}
    where = ", ".join(f"at m/n = {value:.2g} in {library}" for library, value in found.items() if value)
    title = f"Forward overtakes reverse {where}" if where else "Forward and reverse do not cross in this run"
    plots = over(races, "m/n", "jacobian-crossover", title, "outputs over inputs, m/n")
    return plots + over(square, "n", "jacobian-square", "Square Jacobians", "inputs n = outputs m")


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
QUICK_GROWTH = GROWTH[:2]
# Where a case takes minutes, most of them for the slowest libraries, fewer points make the line.
FEWER = {
    "products": (((10, 8, 4), 256), ((20, 32, 10), 256), ((40, 96, 10), 256)),
    "hessian": tuple(pair for pair in GROWTH if pair not in (((40, 96, 10), 256), ((20, 32, 10), 4096))),
}
QUICK = {"gradient": ("mlp", "neural-ode"), "hvp": ("mlp",), "products": ("mlp",), "hessian": ("mlp",)}
CAPTION = (
    "curvature and jax differentiate a tree of parameters, the other libraries one vector that the loss takes apart; "
    "the row of jax.hessian by such a vector shows what that costs. "
    "Temporary memory is what XLA says, and of JAX's programs only."
)


def derivatives(choice: Choice) -> Iterator[Race]:
    """Each derivative of each model; the MLP in several sizes."""
    for derivative in WORDS:
        for model in models(choice, derivative):
            options = {"claims": lambda outcome: []} if derivative == "products" else {}
            contestants = partial(every_library, model, derivative, choice)
            yield model_race(choice, model, derivative, contestants, caption=CAPTION, **options)


def every_library(model: Model, derivative: str, choice: Choice) -> Iterator[Contestant]:
    """Ours, JAX, and all others, at a derivative of a model's loss with respect to its parameters."""
    yield from jax_ways.contestants(model, derivative)
    compiled = not choice.quick and model.name in ("logistic", "mlp")
    yield from other_libraries(flat.of_model(model, derivative), derivative, choice, compiled=compiled)


def models(choice: Choice, derivative: str) -> Iterator[Model]:
    """Those of the choice; of a quick one without names, a few."""
    for name in QUICK[derivative] if choice.quick and not choice.models else filter(choice.wants, MODELS):
        if name == "mlp":
            wanted = [p for p in FEWER.get(derivative, GROWTH) if p in (QUICK_GROWTH if choice.quick else GROWTH)]
            yield from (mlp(*pair) for pair in wanted)
        else:
            yield MODELS[name]()


def growth_plots(outcomes: Outcomes) -> list[Plot]:
    """Time and memory of the MLP's derivatives over n and over the batch."""
    found = []
    for derivative, word in WORDS.items():
        every = part(outcomes, f"modes/{derivative}/mlp/")
        for axis, label, fixed in (("n", "parameters n", "batch"), ("batch", "examples in the batch", "n")):
            values = [outcome.sizes[fixed] for outcome in every.values()]
            most = max(values, key=values.count, default=None)
            series = {id: outcome for id, outcome in every.items() if outcome.sizes[fixed] == most}
            for metric, words in (("seconds", "time"), ("temporary_bytes", "temporary memory")):
                name, title = f"{derivative}-{metric.split('_')[0]}-by-{axis}", f"{word} of an MLP: {words} by {label}"
                found += over(series, axis, name, title, label, metric)
    return found


def library_findings(outcomes: Outcomes) -> Iterator[Finding]:
    """The fastest way of each library against ours, derivative by derivative."""
    for derivative, word in WORDS.items():
        races = part(outcomes, f"modes/{derivative}/")
        said = [f"{p} {spread(ratio_of_fastest(race, p) for race in races.values())}" for p in others(races)]
        if races:
            answer = f"The fastest of each library against the fastest of ours takes: {'; '.join(said)}."
            yield Finding(f"{word}: which library?", answer if said else MISSING)


@jax.custom_vjp
def _softsign(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.abs(x))


_softsign.defvjp(lambda x: (_softsign(x), x), lambda x, ct: (ct / (1 + jnp.abs(x)) ** 2,))


def custom_rule() -> Model:
    """A network of 288 parameters whose activation is a ``custom_vjp``: only reverse over reverse is legal."""

    def loss(ops: operations.Operations, p: Any, x: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum(_softsign(x @ p["w1"]) @ p["w2"], axis=1) ** 2)

    batch = (np.random.default_rng(1).normal(size=(128, 12)),)
    return Model("custom-vjp", "network with a custom_vjp", {"w1": (12, 16), "w2": (16, 6)}, loss, batch)


def loop() -> Model:
    """A power iteration on 24 numbers, by a ``while_loop`` whose length depends on them: only forward is legal."""

    def loss(ops: operations.Operations, p: Any, matrix: jax.Array) -> jax.Array:
        shifted = matrix + jnp.diag(p["x"])

        def step(carry: Any) -> Any:
            v, count = carry
            w = shifted @ v
            return w / jnp.sqrt(w @ w), count + 1

        v, _ = jax.lax.while_loop(lambda c: (c[1] < 50) & (c[0] @ c[0] > 0), step, (jnp.ones_like(p["x"]), 0))
        return v @ (shifted @ v)

    matrix = np.random.default_rng(1).normal(size=(24, 24))
    return Model("while-loop", "power iteration", {"x": (24,)}, loss, (matrix @ matrix.T,), is_mean=False)


def forbidden(choice: Choice) -> Iterator[Race]:
    """Each derivative of both, against the composition that is legal; a quick run takes the products only."""
    for make, legal in ((custom_rule, jax.jacrev), (loop, jax.jacfwd)):
        for derivative in ("hvp",) if choice.quick and not choice.models else ("gradient", "hvp", "hessian"):
            model = make()
            n = model.num_parameters
            yield model_race(
                choice, model, derivative, partial(jax_ways.contestants, model, derivative),
                id=f"modes/{derivative}/{model.name}/n={n}", title=f"{derivative}, {model.title}, {n} parameters",
                reference=partial(jax_ways.reference, model, derivative, legal, legal), sizes={"n": n},
                claims=partial(regret, derivative),
                caption="JAX's compositions that fail are those that the function forbids.",
            )  # fmt: skip


PRODUCT = "the product G.T @ G alone"  # which no way of assembling the matrix from examples avoids
# Sizes, examples, and how the network is made; what is promised of each is in ``notes.toml``.
NETWORKS: tuple[tuple[tuple[int, ...], int, dict[str, bool]], ...] = (
    ((10, 20, 1), 512, {}),
    ((20, 48, 1), 256, {}),
    ((20, 48, 1), 512, {}),
    ((30, 64, 1), 512, {}),
    ((64, 10), 1797, {"classifies": True, "bias": True}),
    ((64, 64, 10), 512, {"classifies": True}),
)


def networks(choice: Choice) -> Iterator[Race]:
    for sizes, examples, how in () if choice.quick else NETWORKS:
        made = tanh_network(sizes, examples, **how)
        yield model_race(
            choice, made, "hessian", partial(network_ways, made), claims=lambda outcome: [],
            id=f"modes/hessian/network-{'-'.join(map(str, sizes))}/n={made.num_parameters}/batch={examples}",
            tolerance=choice.tolerance(1e-5), **choice.effort(full=1.5),
        )  # fmt: skip


def network_ways(model: Model) -> Iterator[Contestant]:
    """JAX's and ours, the diagonal blocks of ours, and the product that cannot be avoided."""
    yield from jax_ways.contestants(model, "hessian")
    made = jax_ways.InJax(model)
    # Its answer is a part of the matrix only, so that it is shown beside the race, not in it.
    blocks = curvature.mean_hessian(jax_ways.of_one(made.loss), blocks="diagonal")
    args = (made.params, *made.batch)
    yield Contestant('curvature.mean_hessian, "diagonal"', "curvature", blocks, args, floor=True)
    rows = jax.random.normal(jax.random.key(1), (len(made.batch[0]), model.num_parameters))
    yield Contestant(PRODUCT, "jax", lambda g: g.T @ g, (rows,), floor=True)


DIAGONALS = {"small": (16, 32, 32, 1), "large": (64, 132, 86, 1)}  # 1,568 parameters, and too many for the matrix
CHUNK = 64
WANTED_BYTES = 2**28  # of temporaries on the large network, where the matrix takes 1.6 GB
DIAGONAL = "curvature.hessian_diagonal"


def diagonals(choice: Choice) -> Iterator[Race]:
    for name, sizes in () if choice.quick else DIAGONALS.items():
        made = tanh_network(sizes, 64)
        n = made.num_parameters
        title = f"Diagonal of the Hessian, {made.title}, {n:,} parameters"
        yield Race(
            f"modes/diagonal/{name}/n={n}", title, made.name, partial(diagonal_ways, made, small=name == "small"),
            partial(diagonal_reference, made), 1e-4, {"n": n, "batch": 64}, budget=4.0, rounds=3,
            claims=memory_claim,
        )  # fmt: skip


def diagonal_ways(model: Model, *, small: bool) -> Iterator[Contestant]:
    made, flat_loss = jax_ways.InJax(model), model.flat_loss(operations.for_jax())

    def ours(x: Any, *batch: jax.Array) -> Any:
        return curvature.hessian_diagonal(made.loss, x, *batch)

    def products(flat: jax.Array, *batch: jax.Array) -> jax.Array:
        push = jax.linearize(lambda flat: jax.grad(flat_loss)(flat, *batch), flat)[1]
        return jnp.diag(jax.vmap(push)(jnp.eye(flat.size)))

    ways = {f"jax, products in chunks of {CHUNK}": partial(in_chunks, flat_loss)}
    if small:
        ways["jax, products with a dense identity"] = products
        ways["diagonal of jax.hessian"] = lambda x, *batch: jnp.diag(jax.hessian(flat_loss)(x, *batch))
    yield Contestant(DIAGONAL, "curvature", ours, (made.params, *made.batch), read=model.pack)
    yield from jax_ways.named(ways, (numbers(model.pack(model.params())), *made.batch))


def in_chunks(loss: Any, flat: jax.Array, *batch: jax.Array) -> jax.Array:
    push = jax.linearize(lambda flat: jax.grad(loss)(flat, *batch), flat)[1]
    entries = jnp.arange(flat.size)
    return jax.lax.map(lambda i: push(jnp.zeros_like(flat).at[i].set(1.0))[i], entries, batch_size=CHUNK)


def diagonal_reference(model: Model) -> np.ndarray:
    loss = partial(in_chunks, model.flat_loss(operations.for_jax()))
    return in_double(loss, model.pack(model.params()), *model.batch)


def memory_claim(outcome: Outcome) -> list[Claim]:
    memory = number(outcome.row(DIAGONAL), "temporary_bytes")
    text = f"{(memory or 0) / 2**20:.0f} MiB of temporaries (wanted: at most {WANTED_BYTES >> 20})"
    return [Claim(text, memory is not None and memory <= WANTED_BYTES)]


def plots(outcomes: Outcomes) -> list[Plot]:
    return jacobian_plots(outcomes) + growth_plots(outcomes)


def findings(outcomes: Outcomes) -> list[Finding]:
    return [*jacobian_finding(outcomes), *regret_finding(outcomes), *library_findings(outcomes)]
