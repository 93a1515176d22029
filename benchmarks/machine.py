"""The machine a run is made on: what it is, and how fast it multiplies matrices and moves memory."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.timing import clock, prepare

_SIDE = {"cpu": 1536, "gpu": 8192}  # of the matrices
_BYTES = {"cpu": 2**28, "gpu": 2**30}  # of an array that fits no cache
_CALLS = 31


def environment(threads: int) -> dict[str, Any]:
    """Everything that a figure of this run depends on, and no name of a person or a path."""
    device = jax.devices()[0]
    return {
        "processor": _processor(),
        "device": device.device_kind,
        "platform": device.platform,
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "packages": peers.versions(),
        "commit": _commit(),
    }


def rates(dtype: str, platform_name: str) -> dict[str, float]:
    """FLOP/s of a large matrix product, and bytes per second read and written by ``x + 1`` in place: the two roofs."""
    side, count = _SIDE[platform_name], _BYTES[platform_name] // jnp.dtype(dtype).itemsize
    matrix, vector = jnp.ones((side, side), dtype), jnp.ones(count, dtype)
    _, product = prepare("product", lambda a: a @ a, (matrix,))
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0).lower(vector).compile()  # new pages would cost more than sums

    def stream() -> jax.Array:
        nonlocal vector
        vector = in_place(vector)
        return vector

    work = {"flops_per_second": (2 * side**3, product), "bytes_per_second": (2 * vector.nbytes, stream)}
    # The least time of the calls: other work on the machine only ever adds.
    return {name: amount / min(clock(call)[1] for _ in range(_CALLS)) for name, (amount, call) in work.items()}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str:
    """The commit measured, with a plus where the tree differs from it; empty outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
