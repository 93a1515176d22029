"""Is what ``auto`` takes the best there is? ``python -m benchmarks.modes``.

Seven functions, their gradient, Hessian-vector product and Hessian: what ``curvature`` takes when it is left to choose
against every composition of ``jax.grad``, ``jax.jvp``, ``jax.jacfwd`` and ``jax.jacrev`` by hand that is legal.
Compositions whose passes through the function are beyond counting, such as forward over forward by a thousand
parameters, are left out. Single precision.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import curvature
from benchmarks.timing import Contestant, Row, compare, console, mark_choice, table

WANTED_REGRET = 1.1  # time of "auto" over that of the best by hand
MOST_PASSES = 1000  # through the function: a way by hand that takes more has lost already
BUDGET = 0.25  # seconds for each contestant

Problem = tuple[Callable[..., jax.Array], Any, tuple[Any, ...]]


def keys(count: int) -> list[jax.Array]:
    """So many independent keys, the same in every run."""
    return list(jax.random.split(jax.random.key(0), count))


# ---- the functions ---------------------------------------------------------------------------------------------------


def mlp() -> Problem:
    """A tanh network with 337 parameters, 256 examples."""
    a, b, c, d = keys(4)

    def loss(params: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        hidden = jnp.tanh(inputs @ params["w1"] + params["b1"])
        return jnp.mean((hidden @ params["w2"] - targets) ** 2)

    params = {"w1": jax.random.normal(a, (12, 24)) / 4, "b1": jnp.zeros(24), "w2": jax.random.normal(b, (24, 1)) / 5}
    return loss, params, (jax.random.normal(c, (256, 12)), jax.random.normal(d, (256, 1)))


def convolutional() -> Problem:
    """Two convolutions of 3 x 3 and a linear layer, 518 parameters, 32 images of 10 x 10."""
    a, b, c, d = keys(4)

    def convolve(images: jax.Array, kernels: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(images, kernels, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        hidden = jnp.tanh(convolve(jnp.tanh(convolve(images, params["k1"])), params["k2"]))
        scores = hidden.mean((1, 2)) @ params["w"]
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(scores), labels[:, None], axis=1))

    params = {
        "k1": jax.random.normal(a, (3, 3, 1, 6)) / 3,
        "k2": jax.random.normal(b, (3, 3, 6, 8)) / 7,
        "w": jax.random.normal(c, (8, 4)) / 3,
    }
    images, labels = jax.random.normal(d, (32, 10, 10, 1)), jax.random.randint(c, (32,), 0, 4)
    return loss, params, (images, labels)


def transformer() -> Problem:
    """One block of attention and a feed-forward network, width 8, 512 parameters, 8 sequences of 12 tokens."""
    *ks, d = keys(7)

    def norm(x: jax.Array) -> jax.Array:
        centered = x - x.mean(-1, keepdims=True)
        return centered * jax.lax.rsqrt(jnp.mean(centered**2, -1, keepdims=True) + 1e-5)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        x = norm(tokens)
        q, k, v = x @ params["q"], x @ params["k"], x @ params["v"]
        weights = jax.nn.softmax(jnp.einsum("bsd,btd->bst", q, k) / q.shape[-1] ** 0.5)
        x = tokens + jnp.einsum("bst,btd->bsd", weights, v) @ params["o"]
        x = x + jax.nn.gelu(norm(x) @ params["up"]) @ params["down"]
        return jnp.mean((x[:, :-1] - tokens[:, 1:]) ** 2)

    shapes = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "up": (8, 16), "down": (16, 8)}
    params = {name: jax.random.normal(key, shape) / 3 for (name, shape), key in zip(shapes.items(), ks, strict=True)}
    return loss, params, (jax.random.normal(d, (8, 12, 8)),)


def logistic() -> Problem:
    """Logistic regression in 200 dimensions, 1,000 examples."""
    a, b = keys(2)

    def loss(w: jax.Array, inputs: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.mean(jnp.logaddexp(0.0, -labels * (inputs @ w))) + 0.01 * jnp.sum(w**2)

    inputs = jax.random.normal(a, (1000, 200))
    return loss, jnp.zeros(200), (inputs, jnp.sign(inputs[:, 0] + jax.random.normal(b, (1000,))))


def neural_ode() -> Problem:
    """Fifty Euler steps of a small network by ``scan``, 144 parameters, 16 trajectories."""
    a, b, c = keys(3)

    def loss(params: Any, start: jax.Array) -> jax.Array:
        def step(y: jax.Array, _: None) -> tuple[jax.Array, None]:
            return y + 0.05 * jnp.tanh(y @ params["w1"]) @ params["w2"], None

        end, _ = jax.lax.scan(step, start, None, length=50)
        return jnp.mean((end - 1.0) ** 2)

    params = {"w1": jax.random.normal(a, (6, 12)) / 2, "w2": jax.random.normal(b, (12, 6)) / 3}
    return loss, params, (jax.random.normal(c, (16, 6)),)


@jax.custom_vjp
def _softsign(x: jax.Array) -> jax.Array:
    return x / (1 + jnp.abs(x))


_softsign.defvjp(lambda x: (_softsign(x), x), lambda x, ct: (ct / (1 + jnp.abs(x)) ** 2,))


def custom_rule() -> Problem:
    """A network of 288 parameters whose activation is a ``custom_vjp``."""
    a, b, c = keys(3)

    def loss(params: Any, inputs: jax.Array) -> jax.Array:
        return jnp.mean(jnp.sum(_softsign(inputs @ params["w1"]) @ params["w2"], axis=1) ** 2)

    params = {"w1": jax.random.normal(a, (12, 16)) / 4, "w2": jax.random.normal(b, (16, 6)) / 4}
    return loss, params, (jax.random.normal(c, (128, 12)),)


def loop() -> Problem:
    """A power iteration on 24 numbers, by a ``while_loop`` whose length depends on them."""
    (a,) = keys(1)

    def loss(x: jax.Array, matrix: jax.Array) -> jax.Array:
        shifted = matrix + jnp.diag(x)

        def step(carry: Any) -> Any:
            v, count = carry
            w = shifted @ v
            return w / jnp.sqrt(w @ w), count + 1

        v, _ = jax.lax.while_loop(lambda c: (c[1] < 50) & (c[0] @ c[0] > 0), step, (jnp.ones(24), 0))
        return v @ (shifted @ v)

    matrix = jax.random.normal(a, (24, 24))
    return loss, jnp.arange(24.0), (matrix @ matrix.T,)


PROBLEMS = {
    "MLP": mlp,
    "convolutional net": convolutional,
    "transformer block": transformer,
    "logistic regression": logistic,
    "neural ODE by scan": neural_ode,
    "custom_vjp": custom_rule,
    "while_loop": loop,
}


# ---- by hand and by choice -------------------------------------------------------------------------------------------


def by_hand(fun: Callable[..., Any], x: Any, data: tuple[Any, ...]) -> dict[str, dict[str, Contestant]]:
    """Derivative -> mode -> the composition of JAX's own transformations."""
    n = sum(leaf.size for leaf in jax.tree.leaves(x))
    v = jax.tree.map(jnp.ones_like, x)

    def along(x: Any, v: Any, *data: Any) -> Any:
        return jax.jvp(lambda x: fun(x, *data), (x,), (v,))[1]

    def fwd_over_rev(x: Any, v: Any, *data: Any) -> Any:
        return jax.jvp(lambda x: jax.grad(fun)(x, *data), (x,), (v,))[1]

    def rev_over_rev(x: Any, v: Any, *data: Any) -> Any:
        return jax.vjp(lambda x: jax.grad(fun)(x, *data), x)[1](v)[0]

    hvps = {
        "fwd_over_rev": fwd_over_rev,
        "rev_over_rev": rev_over_rev,
        "rev_over_fwd": jax.grad(along),
        "fwd_over_fwd": jax.jacfwd(along),
    }
    hessians = {
        "fwd_over_rev": (jax.jacfwd(jax.grad(fun)), n),
        "rev_over_rev": (jax.jacrev(jax.grad(fun)), n),
        "rev_over_fwd": (jax.jacrev(jax.jacfwd(fun)), n * n),
        "fwd_over_fwd": (jax.jacfwd(jax.jacfwd(fun)), n * n),
    }
    return {
        "gradient": {"fwd": (jax.jacfwd(fun), (x, *data)), "rev": (jax.grad(fun), (x, *data))},
        "hvp": {mode: (way, (x, v, *data)) for mode, way in hvps.items()},
        "hessian": {mode: (way, (x, *data)) for mode, (way, passes) in hessians.items() if passes <= MOST_PASSES},
    }


def by_choice(fun: Callable[..., Any], x: Any, data: tuple[Any, ...]) -> dict[str, Contestant]:
    """Derivative -> what ``curvature`` takes by itself."""
    v = jax.tree.map(jnp.ones_like, x)
    return {
        "gradient": (curvature.jacobian(fun), (x, *data)),
        "hvp": (lambda x, v, *data: curvature.hvp(fun, x, v, *data), (x, v, *data)),
        "hessian": (curvature.hessian(fun), (x, *data)),
    }


def verdict(name: str, rows: dict[str, Row]) -> str:
    """The claim about one derivative of one function, with what was measured of it."""
    # Of lower quartiles: other work on the machine only ever adds.
    hands = {mode: row.spread[0] for mode, row in rows.items() if mode != "auto" and row.error is None}
    best = min(hands, key=lambda mode: hands[mode])
    same = rows[best].program == rows["auto"].program
    regret = 1.0 if same else rows["auto"].spread[0] / hands[best]
    holds = rows["auto"].error is None and regret <= WANTED_REGRET
    said = "is the same program as" if same else f"takes {regret:.2f} times as long as"
    claim = f"{name}: auto {said} {best} by hand (wanted: at most {WANTED_REGRET} times)"
    return f"{'holds' if holds else 'FAILS'}  {claim}"


def main() -> None:
    """Run it all."""
    screen = console()
    screen.print(
        f"JAX {jax.__version__}, {jax.devices()[0].device_kind}; float32; medians, claims by lower quartiles.\n"
    )
    claims = []
    for name, make in PROBLEMS.items():
        fun, x, data = make()
        chosen = by_choice(fun, x, data)
        for derivative, hands in by_hand(fun, x, data).items():
            title = f"{derivative}, {name}"
            with screen.status(title):
                rows = compare({**hands, "auto": chosen[derivative]}, budget=BUDGET)
            legal = {mode: row for mode, row in rows.items() if row.error is None}
            best = min((row for mode, row in legal.items() if mode != "auto"), key=lambda row: row.seconds)
            screen.print(table(title, mark_choice(legal, "auto"), best))
            claims.append(verdict(title, rows))
    screen.print("The claims, as measured in this run (other work on the machine moves them):")
    for line in claims:
        screen.print(line, soft_wrap=True)


if __name__ == "__main__":
    main()
