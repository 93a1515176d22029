"""The diagonal of a Hessian with 20,000 parameters: ``python -m benchmarks.diagonal``.

A tanh network and 64 examples, single precision. A product for each column of a dense identity is the way people write
it; at this size all of them at once do not fit, so it is timed on a smaller network, and in chunks on the large one.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

import curvature
from benchmarks.hessian import loss, num_parameters, problem
from benchmarks.timing import Row, compare, console, table

SMALL, LARGE = (16, 32, 32, 1), (64, 132, 86, 1)  # 1,633 and 20,105 parameters
EXAMPLES = 64
CHUNK = 64

WANTED_BYTES = 2**28  # of temporaries on the large network, where the matrix takes 1.6 GB
OURS = "hessian_diagonal"


def products_with_identity(params: Any, *data: jax.Array) -> jax.Array:
    """A Hessian product for each row of a dense identity, all at once."""
    x, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda x: loss(unravel(x), *data))
    return jnp.diag(jax.vmap(lambda v: jax.jvp(gradient, (x,), (v,))[1])(jnp.eye(x.size)))


def products_in_chunks(params: Any, *data: jax.Array) -> jax.Array:
    """The same by a loop over chunks that keeps one entry of each product."""
    x, unravel = ravel_pytree(params)
    _, push = jax.linearize(jax.grad(lambda x: loss(unravel(x), *data)), x)

    def entry(i: jax.Array) -> jax.Array:
        return push(jnp.zeros_like(x).at[i].set(1.0))[i]

    return jax.lax.map(entry, jnp.arange(x.size), batch_size=CHUNK)


def diagonal_of_jax_hessian(params: Any, *data: jax.Array) -> jax.Array:
    """The diagonal of the whole matrix."""
    x, unravel = ravel_pytree(params)
    return jnp.diag(jax.hessian(lambda x: loss(unravel(x), *data))(x))


def ours(params: Any, *data: jax.Array) -> jax.Array:
    """As it comes."""
    return ravel_pytree(curvature.hessian_diagonal(loss, params, *data))[0]


def measure(sizes: tuple[int, ...], others: dict[str, Callable[..., jax.Array]], tolerance: float = 1e-4) -> list[Row]:
    """Check that all agree, then time them; ours comes first."""
    params, *data = problem(sizes)
    args = (params, *(part[:EXAMPLES] for part in data))
    expected, *rest = (np.asarray(jax.jit(way)(*args)) for way in (ours, *others.values()))
    for name, got in zip(others, rest, strict=True):
        error = np.abs(got - expected).max() / np.abs(expected).max()
        assert error <= tolerance, f"{name} differs by {error:.1e}"
    ways = {OURS: ours, **others}
    rows = compare({name: (way, args) for name, way in ways.items()}, budget=4.0, rounds=3)
    title = f"Diagonal of the Hessian, {num_parameters(params):,} parameters"
    console().print(table(title, rows.values(), rows[OURS]))
    return list(rows.values())


def main() -> None:
    """Run it all."""
    screen = console()
    dense = {
        "products with a dense identity": products_with_identity,
        "diagonal of jax.hessian": diagonal_of_jax_hessian,
    }
    small = measure(SMALL, dense)
    large = measure(LARGE, {f"products in chunks of {CHUNK}": products_in_chunks})
    speedup = min(row.seconds for row in small[1:]) / small[0].seconds
    chunked = large[1].seconds / large[0].seconds
    megabytes = (large[0].temporary_bytes or 0) / 2**20
    claims = [
        (speedup >= 1, f"{speedup:.1f} times as fast as a dense way (wanted: at least 1)"),
        (chunked >= 1, f"{chunked:.1f} times as fast as Hessian products in chunks (wanted: at least 1)"),
        (
            megabytes <= WANTED_BYTES / 2**20,
            f"{megabytes:.0f} MiB of temporaries (wanted: at most {WANTED_BYTES >> 20})",
        ),
    ]
    for holds, claim in claims:
        screen.print(f"{'holds' if holds else 'FAILS'}  {claim}", soft_wrap=True)


if __name__ == "__main__":
    main()
