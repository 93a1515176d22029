"""The sparse Hessian of a chained Rosenbrock function: ``python -m benchmarks.sparse``.

100,000 variables, double precision. Two claims stand or fall here: what we put around asdex costs at most a tenth, and
an evaluation costs at most six gradients. Before anything is timed, the result is compared with the closed form.
"""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

import curvature
from benchmarks.timing import Row, console, measure, table

failure = ""
try:
    import asdex
except ImportError as error:  # not installed, or made for another JAX
    asdex: Any = None
    failure = str(error)

SIZE = 100_000
WANTED_OVERHEAD = 1.1  # over asdex called directly
WANTED_GRADIENTS = 6


def rosenbrock(x: jax.Array) -> jax.Array:
    """The chain of Rosenbrock's valleys."""
    return jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def closed_form(x: np.ndarray) -> scipy.sparse.csr_array:
    """Its Hessian, derived by hand."""
    diagonal = np.zeros(x.size)
    diagonal[:-1] += 1200 * x[:-1] ** 2 - 400 * x[1:] + 2
    diagonal[1:] += 200
    return scipy.sparse.diags_array([-400 * x[:-1], diagonal, -400 * x[:-1]], offsets=[-1, 0, 1]).tocsr()


def check_agreement(hessian: jax.experimental.sparse.BCOO, x: jax.Array, tolerance: float = 1e-13) -> float:
    """The largest error relative to the largest entry; raises beyond ``tolerance``."""
    expected = closed_form(np.asarray(x))
    rows, columns = np.asarray(hessian.indices).T
    got = scipy.sparse.coo_array((np.asarray(hessian.data), (rows, columns)), shape=hessian.shape)
    error = abs(got - expected).max() / abs(expected).max()
    assert error <= tolerance, f"the sparse Hessian is off by {error:.1e}"
    return float(error)


def verdicts(rows: dict[str, Row]) -> list[str]:
    """The claims, each with what was measured of it."""
    overhead = rows["curvature under jit"].seconds / rows["asdex under jit"].seconds
    gradients = rows["curvature"].seconds / rows["gradient"].seconds
    claims = [
        (
            overhead <= WANTED_OVERHEAD,
            f"{overhead:.2f} times asdex, both under jit (wanted: at most {WANTED_OVERHEAD})",
        ),
        (gradients <= WANTED_GRADIENTS, f"{gradients:.1f} gradients (wanted: at most {WANTED_GRADIENTS})"),
    ]
    return [f"{'holds' if holds else 'FAILS'}  an evaluation takes {claim}" for holds, claim in claims]


def main() -> None:
    """Run it all."""
    screen = console()
    if asdex is None:
        screen.print(f"Sparse Hessian: not measured, for asdex cannot be imported: {failure}", soft_wrap=True)
        return
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=SIZE))
        seconds, prepared = {}, {}
        for name, prepare in {"curvature": curvature.sparse_hessian, "asdex": asdex.hessian}.items():
            start = time.perf_counter()
            prepared[name] = prepare(rosenbrock, x)
            seconds[name] = time.perf_counter() - start
        error = check_agreement(prepared["curvature"](x), x)
        compressed = asdex.compressed_hessian(rosenbrock, x)
        ways = {
            "gradient": jax.jit(jax.grad(rosenbrock)),
            "curvature": prepared["curvature"],
            "curvature under jit": jax.jit(prepared["curvature"]),
            "asdex under jit": jax.jit(prepared["asdex"]),
            "its products alone": jax.jit(compressed),
        }
        rows = measure({name: functools.partial(way, x) for name, way in ways.items()}, rounds=25)
    caption = f"Agrees with the closed form to {error:.0e}. Prepared in {seconds['curvature']:.1f} s, asdex "
    caption += f"alone {seconds['asdex']:.1f} s."
    screen.print(table(f"Sparse Hessian, {SIZE:,} variables", rows.values(), rows["gradient"], caption))
    for line in verdicts(rows):
        screen.print(line, soft_wrap=True)


if __name__ == "__main__":
    main()
