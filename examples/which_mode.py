"""Which mode for my function? Three functions, three answers, and how to make sure of them.

Run it with ``python -m examples.which_mode``. It needs rich and takes half a minute.

``curvature.explain`` lists every composition of forward and reverse mode for a function: whether it is legal, what it
costs, and which one ``mode="auto"`` takes. ``curvature.check_derivatives`` then holds the derivatives against
differences of the function's values.
"""

import time

import jax
import jax.numpy as jnp
from rich.console import Console

import curvature
from benchmarks import timing

Params = dict[str, jax.Array]


# ---- many inputs, one output -----------------------------------------------------------------------------------------


def wide_loss(params: Params, inputs: jax.Array) -> jax.Array:
    """A small network's loss: hundreds of parameters, one number."""
    hidden = jnp.tanh(inputs @ params["first"] + params["bias"])
    return jnp.mean((hidden @ params["second"]) ** 2)


def show_wide(screen: Console) -> None:
    """Reverse mode, since one pass back serves all parameters."""
    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "first": jax.random.normal(keys[0], (8, 16)) / 3,
        "bias": jnp.zeros(16),
        "second": jax.random.normal(keys[1], (16, 1)) / 4,
        "scale": jnp.ones(3),  # left over from an earlier version of the model
    }
    report = curvature.explain(wide_loss, params, jax.random.normal(keys[2], (64, 8)), measure=True)
    heading(screen, "1. A loss: many parameters, one number")
    screen.print(report)
    forward, reverse = (report.way("gradient", mode) for mode in ("fwd", "rev"))
    assert forward is not None
    assert reverse is not None
    times = (forward.seconds or 0) / (reverse.seconds or 1)
    screen.print(f"\nForward mode takes {report.num_inputs} passes, one for each parameter; reverse mode takes one.")
    screen.print(f"So the gradient costs {times:.0f} times as much forward.")
    screen.print(f"And {', '.join(report.unused)} is never used: a bug that a loss curve does not show.\n")


# ---- few inputs, many outputs ----------------------------------------------------------------------------------------


def tall_model(x: jax.Array, times: jax.Array) -> jax.Array:
    """A damped oscillation seen at many times: three parameters, five hundred numbers."""
    return jnp.exp(-x[0] * times) * jnp.cos(x[1] * times + x[2])


def show_tall(screen: Console) -> None:
    """Forward mode, since three passes serve all outputs."""
    report = curvature.explain(tall_model, jnp.array([0.1, 2.0, 0.5]), jnp.linspace(0, 10, 500), measure=True)
    heading(screen, "2. A curve to be fitted: three parameters, five hundred numbers")
    screen.print(report)
    screen.print("\nThe other way round: a pass for each parameter beats one for each number.\n")


# ---- rules and loops that forbid a mode ------------------------------------------------------------------------------


def looping(x: jax.Array) -> jax.Array:
    """Newton's iteration for the square root, until it stands still."""

    def moves(carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        old, new = carry
        return jnp.abs(new - old) > 1e-6 * jnp.abs(new)

    def step(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        _, new = carry
        return new, (new + x[0] / new) / 2

    return x[1] * jax.lax.while_loop(moves, step, (jnp.zeros(()), x[0]))[1]


@jax.custom_vjp
def clipped_sine(x: jax.Array) -> jax.Array:
    """The sine, whose gradient is clipped on the way back: a common trick, and a wrong derivative."""
    return jnp.sin(x)


clipped_sine.defvjp(
    lambda x: (clipped_sine(x), x),  # calls the function itself, so that the rule has no forward derivative either
    lambda x, cotangent: (cotangent * jnp.clip(jnp.cos(x), -0.5, 0.5),),
)


def show_special(screen: Console) -> None:
    """What is not legal, and what legal does not yet mean."""
    heading(screen, "3. A loop until convergence, and a rule of one's own")
    screen.print(curvature.explain(looping, jnp.array([2.0, 3.0])))
    screen.print(
        "\nA loop whose length is not known has no reverse mode; every other way names the line that is in its way.\n"
    )
    report = curvature.explain(lambda x: jnp.sum(clipped_sine(x)), jnp.array([0.3, 1.2]))
    way = report.way("hessian")
    assert way is not None
    screen.print("A custom_vjp has no forward mode, and here its rule calls it, so that the gradient has none either:")
    screen.print(f"the Hessian is made by {way.mode}, where jax.hessian raises.")
    screen.print("That it is legal does not make it right:\n")
    screen.print(curvature.check_derivatives(lambda x: jnp.sum(clipped_sine(x)), jnp.array([0.3, 1.2])))
    good = curvature.check_derivatives(looping, jnp.array([2.0, 3.0]))
    screen.print(f"\nThe loop's derivatives {'are right' if good.ok else 'ARE WRONG'}: {len(good.checks)} checks.\n")


def heading(screen: Console, text: str) -> None:
    """A line that stands out."""
    screen.print(text, style="bold underline")
    screen.print()


def main() -> None:
    """Show all three."""
    start = time.perf_counter()
    screen = timing.console()
    show_wide(screen)
    show_tall(screen)
    show_special(screen)
    screen.print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
