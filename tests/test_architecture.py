"""The house rules a machine can hold: imports along the arrows, short files, full docstrings, public API only."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import curvature

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "curvature"
FLOORS = ["base", "programs", "transforms", "operators", "linalg", "optimizers", "training", "solvers", "diagnostics"]
TOP = {PACKAGE / "__init__.py", PACKAGE / "types.py"}  # what users import
FILES = sorted(PACKAGE.rglob("*.py"))
ids = [str(file.relative_to(PACKAGE)) for file in FILES]


def floor_of(parts: tuple[str, ...]) -> int | None:
    """The floor of a module by the parts of its name below ``curvature``; None for the package itself."""
    if not parts:
        return None
    return FLOORS.index(parts[0]) if parts[0] in FLOORS else 0


def imported_modules(tree: ast.AST) -> list[tuple[str, bool]]:
    """Each imported name, and whether a function imports it."""
    inner = {
        node for function in ast.walk(tree) if isinstance(function, ast.FunctionDef) for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in inner) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(f"{node.module}.{alias.name}", node in inner) for alias in node.names]
    return found


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_imports_point_one_way(file):
    tree = ast.parse(file.read_text())
    own = floor_of(file.relative_to(PACKAGE).with_suffix("").parts) if file.parent != PACKAGE else 0
    for name, in_function in imported_modules(tree):
        assert not in_function, f"{name} is imported inside a function"
        assert "._src" not in name, f"{name} is private to JAX"
        if name.startswith("curvature.") and file not in TOP:
            floor = floor_of(tuple(name.split(".")[1:]))
            assert floor <= own, f"{file.name} imports {name}, against the arrows"


def test_there_is_no_import_cycle():
    graph = {}
    for file in FILES:
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        names = {name for name, _ in imported_modules(ast.parse(file.read_text())) if name.startswith("curvature")}
        graph[module] = names
    modules = set(graph)

    def targets(module):
        for name in graph[module]:
            yield name if name in modules else name.rpartition(".")[0]

    done, active = set(), []

    def visit(module):
        assert module not in active, f"import cycle: {' -> '.join([*active, module])}"
        if module in done or module not in modules:
            return
        active.append(module)
        for target in targets(module):
            visit(target)
        done.add(active.pop())

    for module in modules:
        visit(module)


@pytest.mark.parametrize("file", FILES, ids=ids)
def test_files_and_functions_are_short(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= 60, f"{node.name} has a body of {lines} lines"


def public_names(module):
    return sorted(
        name for name, value in vars(module).items() if not name.startswith("_") and not inspect.ismodule(value)
    )


def test_the_public_surface_is_small_and_disjoint():
    assert len(public_names(curvature)) <= 70
    assert not set(public_names(curvature)) & set(public_names(curvature.types))
    assert re.fullmatch(r"\d+\.\d+.*", curvature.__version__)


functions = [name for name in public_names(curvature) if inspect.isfunction(getattr(curvature, name))]


@pytest.mark.parametrize("name", functions)
def test_docstrings_and_annotations(name):
    function = inspect.unwrap(getattr(curvature, name))
    document = inspect.getdoc(function)
    for section in ["Returns:", "Raises:", "Cost:", "Example:"]:
        assert section in document, f"{name} has no section {section}"
    signature = inspect.signature(function)
    assert ("Args:" in document) == bool(signature.parameters)
    for parameter in signature.parameters.values():
        assert parameter.annotation is not parameter.empty, f"{name}: {parameter.name} is not annotated"
        assert re.search(rf"^ +\*?{parameter.name}: ", document, re.MULTILINE), f"{name}: {parameter.name} is not told"
    assert signature.return_annotation is not signature.empty


def test_nobody_is_sent_to_the_other_package():
    """``curvature`` on the index is an unrelated package."""
    files = [
        *ROOT.glob("*.md"),
        *(file for folder in ("curvature", "examples", "benchmarks") for file in (ROOT / folder).rglob("*.py")),
    ]
    for file in files:
        assert not re.search(r"pip install (-\S+ )*['\"]?curvature(?!-jax)", file.read_text()), file


def test_contributing_names_what_exists():
    text = re.sub(r"```.*?```", "", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.DOTALL)
    for path in re.findall(r"`([\w.]+/[\w./]*)`", text):
        assert (ROOT / path).exists() or (PACKAGE / path).exists(), path
    named = re.findall(r"`([\w.]+)(?:\(\.\.\.\))?`\s+(?:in|of)\s+`([\w/]+\.py)`", text)
    assert len(named) > 5
    for name, path in named:
        assert re.search(rf"\b{name}\b", (PACKAGE / path).read_text()), f"{name} is not in {path}"
