"""``python -m benchmarks``: which mode, which method, which library; measured on this machine, from one command.

``--quick`` ends in a few minutes; ``--suite modes --models mlp transformer --dtype float64`` selects; the same command
resumes a run that was cut off. The report lies in ``report/index.html`` afterwards.
"""

import argparse
import os
import sys
from pathlib import Path

from benchmarks import crashes, peers


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few sizes, fewer turns: eight minutes on two cores")
    parser.add_argument("--suite", nargs="+", metavar="SUITE", help="only these; --list names them")
    parser.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="only the cases of these models")
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--threads", type=int, default=peers.num_cores(), help="cores for everyone (default: all)")
    parser.add_argument("--output", type=Path, default=Path("report"), help="the folder of the report")
    parser.add_argument("--compare", type=Path, metavar="OLD", help="say what changed since that results.json.gz")
    parser.add_argument("--fresh", action="store_true", help="do not resume an earlier run that was cut off")
    parser.add_argument("--list", action="store_true", help="list suites and cases, and stop")
    parser.add_argument("--only-report", action="store_true", help="make the report again from its results.json.gz")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads is {options.threads}; it takes 1 or more")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run what was asked for, in a process that may be lost; 1 if an answer of ours was wrong."""
    options = parse(arguments)
    if not crashes.is_child():
        return crashes.watch(sys.argv[1:] if arguments is None else arguments, options.output)
    peers.pin_threads(options.threads)
    os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu" if options.device == "gpu" else "cpu")
    from benchmarks import session  # imports jax, which counts the cores when it starts

    return session.run(options)


if __name__ == "__main__":
    sys.exit(main())
