"""The suites, in the order they run."""

from types import ModuleType

from benchmarks.suites import folklore, modes

SUITES: dict[str, ModuleType] = {"modes": modes, "folklore": folklore}
