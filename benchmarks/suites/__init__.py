"""The suites, in the order they run; ``notes.toml`` has what the report says of them without code."""

from types import ModuleType

from benchmarks.suites import folklore, laplacian, modes, operators, optimizers, per_example, scaling, sparse

SUITES: dict[str, ModuleType] = {
    "modes": modes,
    "folklore": folklore,
    "per_example": per_example,
    "laplacian": laplacian,
    "sparse": sparse,
    "operators": operators,
    "optimizers": optimizers,
    "scaling": scaling,
}
