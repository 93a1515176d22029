"""The suites, in the order they run."""

from types import ModuleType

from benchmarks.suites import modes, scaling

SUITES: dict[str, ModuleType] = {"modes": modes, "scaling": scaling}
