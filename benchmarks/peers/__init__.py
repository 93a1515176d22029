"""The other libraries: which are installed, in which version, and how each is told to use as many threads as all."""

import functools
import importlib
import importlib.metadata
import importlib.util
import os
from types import ModuleType

# What a contestant names as its peer -> (the module, the distribution).
PACKAGES = {
    "curvature": ("curvature", "curvature-jax"),
    "jax": ("jax", "jax"),
    "torch": ("torch", "torch"),
    "tensorflow": ("tensorflow", "tensorflow"),
    "autograd": ("autograd", "autograd"),
    "folx": ("folx", "folx"),
    "asdex": ("asdex", "asdex"),
    "optax": ("optax", "optax"),
    "optimistix": ("optimistix", "optimistix"),
    "jaxopt": ("jaxopt", "jaxopt"),
    "lineax": ("lineax", "lineax"),
    "scipy": ("scipy", "scipy"),
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
    "scikit-learn": ("sklearn", "scikit-learn"),
    "sif2jax": ("sif2jax", "sif2jax"),
}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "TF_NUM_INTRAOP_THREADS")
_distributions = functools.cache(importlib.metadata.packages_distributions)  # takes a second


def is_installed(peer: str) -> bool:
    return importlib.util.find_spec(PACKAGES[peer][0]) is not None


def versions() -> dict[str, str | None]:
    """The version of each library, by the distribution that its module came with; None for one that is absent."""
    return {
        peer: importlib.metadata.version(_distributions().get(module, [usual])[0]) if is_installed(peer) else None
        for peer, (module, usual) in PACKAGES.items()
    }


def pin_threads(count: int) -> None:
    """Give everyone the same cores, before any of them has been imported.

    XLA counts the cores that its process may run on, so it is these that are restricted where the system can; the
    others read a variable of the environment. ``torch`` and ``tensorflow`` are told again when they are imported.
    """
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(count)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def tensorflow() -> ModuleType:
    """The module; what its libraries tell the terminal while they are loaded goes nowhere."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            return importlib.import_module("tensorflow")
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
