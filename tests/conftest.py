"""Settings of every test: double precision available, strict promotion, annotations checked, compilations cached."""

import collections
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

import tests.typecheck  # noqa: F401 - the import hook looks it up by name

# The programs of tests are many, and run once: LLVM need not polish them, and older versions of XLA emit them sooner in
# the older way. Processes that tests start inherit the flags. XLA reads them at the first compilation.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11, 1):  # later ones know no such flag, and refuse it
    QUICK += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"

# A second run finds the programs of the first, and each worker those of the others.
jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

# Every annotation of the package is checked at every call of every test; see tests/typecheck.py.
jaxtyping.install_import_hook("curvature", "tests.typecheck.checked")


_THIN = 4  # make test runs every fourth case of a test that is marked thin, make test-slow the others


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items):
    """Mark as slow most cases of thin tests; skip what needs asdex until it has a release for the installed JAX."""
    cases = collections.Counter()
    for item in items:
        if item.get_closest_marker("thin"):
            name = item.nodeid.partition("[")[0]
            if cases[name] % _THIN:
                item.add_marker(pytest.mark.slow)
            cases[name] += 1
    try:
        import asdex  # noqa: F401
    except ImportError as error:
        for item in items:
            if "sparse" in item.nodeid and "asdex" not in item.name:
                item.add_marker(pytest.mark.skip(reason=f"asdex: {error}"))


@pytest.fixture(autouse=True)
def strict_double_precision():
    """float64 exists, and nothing is promoted or broadcast in rank behind the user's back."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(params=[jnp.float32, jnp.float64], ids=["float32", "float64"])
def dtype(request):
    """Both precisions."""
    return request.param
