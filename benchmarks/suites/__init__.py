"""The suites, in the order they run."""

from types import ModuleType

from benchmarks.suites import laplacian, modes, operators, per_example, scaling, sparse

SUITES: dict[str, ModuleType] = {
    "modes": modes,
    "per_example": per_example,
    "laplacian": laplacian,
    "sparse": sparse,
    "operators": operators,
    "scaling": scaling,
}
