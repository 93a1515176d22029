"""Softmax regression on handwritten digits: what each derivative costs, and Newton's method to the last digit.

Run it with ``python -m examples.digits``. It needs scikit-learn, SciPy, matplotlib and rich, takes a minute or two on
two cores, and writes ``examples/output/digits.png``.
"""

import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

import curvature
from benchmarks import timing
from examples import costs
from examples.digits_methods import compare_methods
from examples.digits_picture import held_by, save_picture

PIXELS, CLASSES = 64, 10
L2 = 1e-3
GTOL = 1e-9  # on the largest entry of the gradient
PRODUCTS = 32  # in a row from one linearization
LINEARIZED = f"hvp linearized, 1 of {PRODUCTS}"
LINEARIZED_NOTE = f"The last row: one linearize_grad and {PRODUCTS} products with it, divided by {PRODUCTS}."
PICTURE = Path(__file__).parent / "output" / "digits.png"

Params = dict[str, jax.Array]
Data = tuple[jax.Array, jax.Array, jax.Array]  # images, labels, strength of the L2 term


# ---- the problem -------------------------------------------------------------------------------------------------


def logits(params: Params, images: jax.Array) -> jax.Array:
    """The score of each class for each image."""
    return images @ params["weights"] + params["bias"]


def loss(params: Params, images: jax.Array, labels: jax.Array, l2: jax.Array) -> jax.Array:
    """Mean cross entropy with an L2 term on the weights; the bias is free."""
    errors = optax.losses.softmax_cross_entropy_with_integer_labels(logits(params, images), labels)
    return jnp.mean(errors) + 0.5 * l2 * jnp.sum(params["weights"] ** 2)


def load() -> tuple[Params, Data]:
    """All parameters at zero, and the 1,797 images that come with scikit-learn."""
    images, labels = load_digits(return_X_y=True)
    params = {"weights": jnp.zeros((PIXELS, CLASSES)), "bias": jnp.zeros(CLASSES)}
    return params, (jnp.asarray(images / 16), jnp.asarray(labels), jnp.asarray(L2))


# ---- what derivatives cost ---------------------------------------------------------------------------------------


def show_costs(screen: Console, title: str, caption: str, contestants: Mapping[str, costs.Contestant]) -> None:
    """Time the contestants against the gradient, mark the one that ``auto`` turns out to be, and print the table."""
    screen.print(f"{title}: measuring ...", style="dim")
    with screen.status(title) as status:
        rows = costs.compare(contestants, budget=0.5, report=lambda line: status.update(f"{title}: {line}"))
    if LINEARIZED in rows:
        rows[LINEARIZED] = costs.share(rows[LINEARIZED], PRODUCTS)
    screen.print(costs.table(title, costs.mark_choice(rows, "auto"), rows["gradient"], caption))
    screen.print()


def product_contestants(params: Params, data: Data) -> dict[str, costs.Contestant]:
    """The gradient, ``hvp`` in each composition of modes, and ``PRODUCTS`` products from one linearization."""
    v = jax.tree.map(jnp.ones_like, params)
    many_v = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (PRODUCTS, *leaf.shape)), v)

    def many_products(params: Params, many_v: Params, *data: jax.Array) -> Any:
        _, _, hvp_fn = curvature.linearize_grad(loss, params, *data)
        return jax.lax.map(hvp_fn, many_v)

    contestants: dict[str, costs.Contestant] = {"gradient": (jax.grad(loss), (params, *data))}
    for mode in ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd"):
        contestants[f"hvp {mode}"] = (functools.partial(curvature.hvp, loss, mode=mode), (params, v, *data))
    return {**contestants, LINEARIZED: (many_products, (params, many_v, *data))}


def show_derivatives(screen: Console, params: Params, data: Data) -> None:
    """Hessian-vector products, Hessians and Jacobians, by every way that ends within seconds."""
    auto = {"auto": (functools.partial(curvature.hvp, loss), (params, params, *data))}
    products = {**product_contestants(params, data), **auto}
    show_costs(screen, "One Hessian-vector product, 650 parameters", LINEARIZED_NOTE, products)

    ways: dict[str, Callable[..., Any]] = {
        "gradient": jax.grad(loss),
        "jax.hessian": jax.hessian(loss),
        "all at once": curvature.hessian(loss, chunk_size=None),
        "chunks of 64": curvature.hessian(loss, chunk_size=64),
        "fwd_over_rev": curvature.hessian(loss, mode="fwd_over_rev"),
        "rev_over_rev": curvature.hessian(loss, mode="rev_over_rev"),
        "auto": curvature.hessian(loss),
    }
    caption = (
        "A row that names a mode goes in chunks sized for the cache. Left out: the modes over forward, whose gradient "
        "alone takes 650 forward passes."
    )
    hessians = {name: (way, (params, *data)) for name, way in ways.items()}
    show_costs(screen, "The full Hessian, 650 x 650", caption, hessians)

    for count, shape in ((10, "wide"), (200, "tall")):
        jacobians: dict[str, costs.Contestant] = {"gradient": (jax.grad(loss), (params, *data))}
        for mode in ("fwd", "rev", "auto"):
            jacobians[mode] = (curvature.jacobian(logits, mode=mode), (params, data[0][:count]))
        title = f"A {shape} Jacobian, {count * CLASSES:,} x 650: the logits of {count} images"
        show_costs(screen, title, "The gradient is that of the loss over all images.", jacobians)


# ---- one fit, watched --------------------------------------------------------------------------------------------


def show_fit(screen: Console, params: Params, data: Data) -> curvature.MinimizeResult:
    """Fit by trust-region Newton and print each step as it is taken."""
    screen.print('curvature.minimize(loss, params, data, method="trust-region", gtol=1e-9)', style="bold")
    screen.print("step   objective           max|gradient|   radius   CG steps")

    def show(step: curvature.types.MinimizeStep) -> None:
        state = f"{float(step.state.radius):6.3g}   {int(step.state.num_inner_steps):8}"
        screen.print(f"{int(step.num_steps):4}   {float(step.value):.15f}   {float(step.grad_norm):13.1e}   {state}")

    result = curvature.minimize(loss, params, data, method="trust-region", gtol=GTOL, callback=show)
    jax.effects_barrier()  # the last lines may still be under way
    accuracy = float(jnp.mean(jnp.argmax(logits(result.x, data[0]), axis=1) == data[1]))
    screen.print(f"{result.message} {int(result.num_steps)} steps; {accuracy:.1%} of these images are read right.\n")
    return result


def show_agreement(screen: Console, result: curvature.MinimizeResult, data: Data) -> None:
    """Hold the result against scikit-learn's, which minimizes the same objective."""
    images, labels, _ = (np.asarray(array) for array in data)
    strength = 1 / (len(labels) * L2)  # scikit-learn weighs the summed errors, we weigh the L2 term
    model = LogisticRegression(C=strength, solver="newton-cholesky", tol=1e-12, max_iter=1000).fit(images, labels)
    theirs = float(loss({"weights": jnp.asarray(model.coef_.T), "bias": jnp.asarray(model.intercept_)}, *data))
    difference = abs(float(result.value) - theirs) / theirs
    screen.print(f"Objective of curvature:     {float(result.value):.15f}")
    screen.print(f"Objective of scikit-learn:  {theirs:.15f}")
    verdict = "They agree" if difference <= 1e-8 else "THEY DISAGREE"
    screen.print(f"{verdict}: relative difference {difference:.1e}, wanted at most 1e-8.\n")


# ---- the spectrum, and the whole show ----------------------------------------------------------------------------


def spectrum(screen: Console, solution: Params, data: Data) -> np.ndarray:
    """The eigenvalues of the Hessian at the minimum, and where the smallest ones come from."""
    vector, unravel = ravel_pytree(solution)  # of one vector the Hessian is one matrix
    hessian = jax.jit(curvature.hessian(lambda vector, *data: loss(unravel(vector), *data)))(vector, *data)
    eigenvalues = np.linalg.eigvalsh(hessian)
    held, blank = int(held_by(eigenvalues, L2).sum()), int(jnp.sum(jnp.max(data[0], axis=0) == 0))
    screen.print(
        f"Eigenvalues of the Hessian at the minimum: {eigenvalues[-1]:.2g} down to 0. Of them\n"
        f"- {held} are {L2:g}, the L2 term alone; {PIXELS} of them are expected since softmax ignores\n"
        f"  what all classes share, and {(CLASSES - 1) * blank} since {blank} pixels are blank in every image;\n"
        "- the 0 is the same number added to every bias, which the L2 term leaves alone.\n"
    )
    return eigenvalues


def main() -> None:
    """Run it all."""
    jax.config.update("jax_enable_x64", True)
    start = time.perf_counter()
    screen = timing.console()
    screen.print("Handwritten digits by softmax regression", style="bold")
    screen.print("1,797 images of 8 x 8 pixels, 10 classes, 650 parameters, double precision.")
    screen.print(f"JAX {jax.__version__} on {jax.devices()[0].device_kind}; median times, compilation apart.")
    screen.print("An arrow marks what curvature takes when it is left to choose: the same program as its own.\n")
    # OpenBLAS's own threads spin while they wait and take the cores from XLA: eigh was several times slower.
    with threadpool_limits(1, user_api="blas"):
        params, data = load()
        show_derivatives(screen, params, data)
        result = show_fit(screen, params, data)
        show_agreement(screen, result, data)
        fits, curves = compare_methods(screen, loss, params, data, GTOL)
        eigenvalues = spectrum(screen, result.x, data)
    save_picture(PICTURE, curves, {name: fit.steps for name, fit in fits.items()}, eigenvalues, L2)
    screen.print(f"Picture: {os.path.relpath(PICTURE)}")
    screen.print(f"Done in {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
