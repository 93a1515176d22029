"""The suites, in the order they run."""

from types import ModuleType

from benchmarks.suites import modes, optimizers

SUITES: dict[str, ModuleType] = {"modes": modes, "optimizers": optimizers}
