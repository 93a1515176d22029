"""Tries random programs, and prints those that fail, made small: ``python -m tests.fuzz 0:5000 [graphs]``."""

import os
import sys
import time
from collections.abc import Sequence

import jax

from tests.against_jax import Case, NotDifferentiableError, examples_taken_apart, failures_of
from tests.random_graphs import draw_graph
from tests.random_programs import Program, draw, namespace_of, shrink

# Each program runs once; see conftest.py. XLA reads the flags at the first compilation.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
if jax.__version_info__ < (0, 11, 1):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def case_of(program: Program) -> Case:
    """The functions and values of a program."""
    text = program.text()
    names = namespace_of(text)
    # A pull-back that is not linear in its cotangents is that of no Jacobian: there is no Gauss-Newton matrix.
    outputs = (None, None) if "clipped_back" in text else (names.get("output"), names.get("loss_of_output"))
    return Case(names["per"], names["f"], names["p"], names["batch"], *outputs)


def failures(program: Program, only: Sequence[str] = ()) -> dict[str, str]:
    """What differs from JAX; programs of even seeds are taken apart into examples even where that does not pay."""
    case = case_of(program)
    if not case.p:  # no piece has drawn a parameter: nothing to differentiate
        return {}
    tolerance = 2e-3 if program.low_precision else 1e-8
    with examples_taken_apart(program.seed % 2 == 0):
        try:
            return failures_of(case, tolerance, program.seed, only)
        except NotDifferentiableError:
            return {}


def kind_of(words: str | None) -> str | None:
    """What a failure is, without its numbers: an exception by its type, or an entry that differs."""
    return None if words is None else words.partition(":")[0] if words.startswith("raises") else words.split()[0]


def smallest(program: Program, check: str, words: str) -> Program:
    """A program that fails in the same check in the same way, shrunk."""

    def fails(candidate: Program) -> bool:
        try:
            return kind_of(failures(candidate, [check]).get(check)) == kind_of(words)
        except Exception:  # dropping a piece left a program that does not run
            return False

    return shrink(program, fails)


def report(program: Program, found: dict[str, str]) -> str:
    """A failing program as text that runs, with what failed as its first lines."""
    small = smallest(program, *next(iter(found.items())))
    now = failures(small)
    lines = [f"# seed {program.seed}: {name}: {words}" for name, words in now.items()]
    if small.seed % 2 == 0:
        lines.append("# from curvature.transforms import _mean_hessian; _mean_hessian._FEWER = 0")
    return "\n".join([*lines, small.text()])


def failures_of_graph(seed: int) -> str:
    """A random graph that differs from JAX, in words; empty if it does not."""
    graph = draw_graph(seed)
    with examples_taken_apart(seed % 2 == 0):
        try:
            found = failures_of(graph.case, 1e-7, seed)
        except NotDifferentiableError:
            return ""
    return "\n".join(
        [f"# seed {seed}: {graph.text}", *(f"#   {name}: {words}" for name, words in found.items())] * bool(found)
    )


def failures_of_program(seed: int) -> str:
    """A random program that differs from JAX, made small, as text; empty if it does not."""
    program = draw(seed)
    found = failures(program)
    return report(program, found) if found else ""


def main(seeds: range, graphs: bool) -> int:
    """Tries the programs of some seeds; the number of those that fail."""
    os.environ["XLA_FLAGS"] = f"{QUICK} {os.environ.get('XLA_FLAGS', '')}"
    jax.config.update("jax_enable_x64", True)
    count, begin = 0, time.perf_counter()
    for tried, seed in enumerate(seeds, 1):
        found = failures_of_graph(seed) if graphs else failures_of_program(seed)
        if found:
            count += 1
            print(found, end="\n\n" + "-" * 80 + "\n", flush=True)
        if tried % 50 == 0:
            jax.clear_caches()
            print(f"# {tried} programs, {count} fail, {time.perf_counter() - begin:.0f} s", flush=True)
    print(f"{len(seeds)} programs, {count} fail")
    return count


if __name__ == "__main__":
    first, _, last = (sys.argv[1] if len(sys.argv) > 1 else "0:300").partition(":")
    sys.exit(1 if main(range(int(first), int(last or int(first) + 1)), "graphs" in sys.argv) else 0)
