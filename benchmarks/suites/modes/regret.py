"""Is what ``auto`` takes the best there is? The claim, and two functions that forbid some of the compositions."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import reading
from benchmarks.cases import OURS, Case, Choice, Claim, Finding, Outcome, Race, Row
from benchmarks.models import Model
from benchmarks.peers import jax_ways, operations

WANTED = 1.1  # time of ours over that of the best composition of JAX's transformations
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}


def regret(what: str, outcome: Outcome) -> list[Claim]:
    """Whether ours, as it comes, is as fast as the best that JAX is told by hand, or the same program."""
    ours = next((row for row in outcome.rows if row.peer == OURS and row.status == "ok"), None)
    hands = [row for row in outcome.rows if row.peer == "jax" and row.status == "ok" and "low" in row.metrics]
    if ours is None or "low" not in ours.metrics or not hands:
        return []
    best = min(hands, key=_low)
    same = ours.shares_program_with(best)
    twins = [row for row in outcome.rows if "low" in row.metrics and ours.shares_program_with(row)]
    factor = 1.0 if same else min(_low(row) for row in (ours, *twins)) / _low(best)  # of twins it is the time of all
    said = "is the same program as" if same else f"takes {factor:.2f} times as long as"
    return [Claim(f"{what}: {ours.name} {said} {best.name} (wanted: at most {WANTED} times)", factor <= WANTED)]


def _low(row: Row) -> float:
    """The lower quartile: other work on the machine only ever adds."""
    return reading.number(row, "low") or 0.0


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


MODELS = {"custom-vjp": (custom_rule, jax.jacrev, jax.jacrev), "while-loop": (loop, jax.jacfwd, jax.jacfwd)}
"""The function, and the inner and outer transformation of its reference."""


def cases(choice: Choice) -> Iterator[Case]:
    """Each derivative of both; a quick run takes the products only."""
    for name, (make, inner, outer) in MODELS.items():
        for derivative in ("hvp",) if choice.quick and not choice.models else ("gradient", "hvp", "hessian"):
            model = make()
            n = model.num_parameters
            yield Race(
                f"modes/{derivative}/{name}/n={n}",
                f"{derivative}, {model.title}, {n} parameters",
                name,
                partial(jax_ways.contestants, model, derivative),
                partial(reference, model, derivative, inner, outer),
                TOLERANCE[choice.dtype],
                {"n": n},
                budget=0.1 if choice.quick else 0.5,
                rounds=choice.rounds,
                claims=partial(regret, derivative),
                caption="JAX's compositions that fail are those that the function forbids.",
            )


def reference(model: Model, derivative: str, inner: Any, outer: Any) -> np.ndarray:
    """The trusted answer, laid out flat, in double precision, by the modes that the function allows."""
    with jax.enable_x64(True):
        loss = model.flat_loss(operations.for_jax())
        x, batch = jnp.asarray(model.pack(model.params())), tuple(jnp.asarray(part) for part in model.batch)
        if derivative == "gradient":
            return np.asarray(jax.jit(inner(loss))(x, *batch))
        hessian = np.asarray(jax.jit(outer(inner(loss)))(x, *batch))
        return hessian @ model.pack(jax_ways.direction(model)) if derivative == "hvp" else hessian


def findings(outcomes: reading.Outcomes) -> list[Finding]:
    """How many of the claims hold, and those that do not."""
    marked = {
        id: [claim for claim in outcome.claims if f"(wanted: at most {WANTED} times)" in claim.text]
        for id, outcome in outcomes.items()
    }
    found = {id: claims for id, claims in marked.items() if claims}
    every = [(id, claim) for id, claims in found.items() for claim in claims]
    failed = [f"{id}: {claim.text}" for id, claim in every if not claim.holds]
    answer = f"In {len(every) - len(failed)} of {len(every)} cases it takes at most {WANTED} times as long." + "".join(
        f" Not in {text}." for text in failed
    )
    return [Finding('Is what "auto" takes the best composition by hand?', answer, list(found))] if every else []
