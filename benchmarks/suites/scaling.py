"""The same work on more devices of one process: strong scaling, of a fixed batch, and weak, of one that grows along.

On a CPU the devices are virtual ones that share its cores, so that time can fall only as far as there are cores; the
figures then show what splitting costs, the memory of a device, and how many collectives a program holds. The number of
devices is fixed when JAX starts, so each is measured in its own process, by ``print_work``.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvature
from benchmarks.cases import OURS, Case, Choice, Claim, Finding, Line, Outcome, Outcomes, Plot, Row, Study
from benchmarks.models import mlp
from benchmarks.peers.jax_ways import InJax, forward_over_reverse, of_one
from benchmarks.reading import part
from benchmarks.runner import arrays, distance
from benchmarks.solvers import rosenbrock
from benchmarks.suites.per_example import by_vmap
from benchmarks.timing import measure

TITLE = "Scaling over devices"
QUESTION = "What does it cost, and what does it save, to spread a batch over devices?"
WORK = {
    "hvp": "Hessian-vector product of an MLP",
    "gauss-newton": "Gauss-Newton product of an MLP",
    "clipped-grad": "mean of clipped per-example gradients of an MLP",
    "minimize-batched": "a Newton solve for each of many small problems",
}
LIMIT = 300  # seconds for one process
OF_ONE = "time of one device"
EXAMPLES = 2048  # of the fixed batch, and on each device of the one that grows
LANES, SIZE = 512, 6  # the same for the many problems
TOLERANCE = {"float32": 1e-4, "float64": 1e-10}


def cases(choice: Choice) -> Iterator[Case]:
    """Each piece of work over all counts of devices; a quick run takes the first."""
    for work, title in WORK.items():
        if not choice.quick or work == "hvp":
            yield Study(f"scaling/{work}/mlp", title, "mlp", partial(study, work, choice))


def study(work: str, choice: Choice, report: Callable[[str], Any]) -> Outcome:
    """A process for each count of devices, one after the other, so that they do not share the cores."""
    rows: list[Row] = []
    ones: dict[str, float] = {}  # the time of one device
    for count in (1, 2) if choice.quick else (1, 2, 4, 8):
        report(f"{count} devices")
        answer = run_worker(work, count, choice)
        if answer is None:
            break  # the machine has no more devices
        for entry in answer:
            name, wrong = entry["name"], not entry["error"] <= entry["tolerance"]
            one = ones.setdefault(name, entry["seconds"])
            names = ("devices", "examples", "seconds", "temporary_bytes", "all-reduces", "error")
            metrics = {key: entry[key] for key in names[:2]} | {OF_ONE: entry["seconds"] / one}
            metrics |= {key: entry[key] for key in names[2:]}
            note = f"differs from one device by {entry['error']:.1e}" if wrong else ""
            label = f"{name}, {count} device{'s' * (count > 1)}"
            rows.append(Row(label, entry["peer"], "wrong" if wrong else "ok", metrics, note))
    claims = [
        Claim(f"{row.name} agrees with one device to {row.metrics['error']:.0e}", row.status == "ok", correctness=True)
        for row in rows
        if row.peer == OURS
    ]
    caption = (
        f"Measured on {choice.threads} cores. Strong: the batch stays, so the ideal is 1 / devices of the {OF_ONE}, "
        "down to 1 / cores. Weak: the batch grows along, so the ideal is 1 while there are cores."
    )
    return Outcome(rows=rows, claims=claims, caption=caption)


def run_worker(work: str, count: int, choice: Choice) -> list[dict[str, Any]] | None:
    """What the process of one count prints; None if there are fewer devices; ``RuntimeError`` if it fails."""
    environment = {**os.environ, "JAX_ENABLE_X64": str(choice.dtype == "float64")}
    if choice.device == "cpu":
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"
    command = [sys.executable, "-c", f"from benchmarks.suites import scaling; scaling.print_work({work!r}, {count})"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        raise RuntimeError(f"the process with {count} devices ended with {done.returncode}: {done.stderr[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def curves(outcome: Outcome) -> dict[str, Line]:
    found: dict[str, Line] = {}
    for row in outcome.rows:
        if row.status == "ok":
            label = row.name.rsplit(",", 1)[0]
            line = found.setdefault(label, Line(label, [], []))
            line.x.append(float(row.metrics["devices"]))
            line.y.append(float(row.metrics[OF_ONE]))
    return found


def plots(outcomes: Outcomes) -> list[Plot]:
    """Time against devices, a picture for each work: strong and weak, and the ideal of strong."""
    found = []
    for id, outcome in part(outcomes, "scaling/").items():
        if lines := list(curves(outcome).values()):
            lines.append(Line("strong, ideal", lines[0].x, [1 / x for x in lines[0].x], "dashed"))
            title = f"{outcome.title}: time against devices"
            found.append(Plot(id.split("/")[1], title, "devices", f"x {OF_ONE}", lines, caption=outcome.caption))
    return found


def findings(outcomes: Outcomes) -> list[Finding]:
    lines = [line for outcome in part(outcomes, "scaling/").values() for line in curves(outcome).values()]
    ours = [line for line in lines if line.label.startswith(OURS)]
    said = [f"{line.label} on {line.x[-1]:.0f} devices: {line.y[-1]:.2f} times the {OF_ONE}." for line in ours]
    return [Finding(QUESTION, " ".join(said))] if said else []


# ---- in the process of one count of devices


def functions(work: str, size: int) -> tuple[dict[str, Callable[..., Any]], Any, tuple[Any, ...]]:
    """Functions of something that every device has and something that is spread, and both of these."""
    if work == "minimize-batched":
        # By a method without eigendecompositions: batches of those on several virtual devices can wait for each other's
        # threads forever, as of JAX 0.10.
        def solve(_: Any, x0: Any) -> Any:
            return jax.vmap(lambda x: curvature.minimize(rosenbrock, x, method="bfgs").x)(x0)

        x0 = 1 + np.random.default_rng(0).uniform(-1, 1, (size, SIZE))
        return {"curvature.minimize, vmap": solve}, (), (jnp.asarray(x0, float),)
    made = InJax(mlp((64, 128, 10), size))
    loss, one = made.loss, of_one(made.loss)

    def gauss_newton(whole: Any, *batch: Any) -> Any:
        return curvature.GaussNewtonOperator(made.outputs, made.of_outputs, whole[0], *batch).mv(whole[1])

    ours, theirs = curvature.clipped_grad(one, 1.0), by_vmap(jnp, jax, one, 1.0)["clipped mean"]
    ways: dict[str, dict[str, Callable[..., Any]]] = {
        "hvp": {
            "curvature.hvp": lambda whole, *batch: curvature.hvp(loss, *whole, *batch),
            "jax, forward over reverse": lambda whole, *batch: forward_over_reverse(loss, *whole, *batch),
        },
        "gauss-newton": {"curvature.GaussNewtonOperator": gauss_newton},
        "clipped-grad": {
            "curvature.clipped_grad": lambda whole, *batch: ours(whole[0], *batch)[0],
            "jax.vmap of jax.grad": lambda whole, *batch: theirs(whole[0], *batch)[0],
        },
    }
    return ways[work], (made.params, jax.tree.map(jnp.ones_like, made.params)), made.batch


def print_work(work: str, count: int) -> None:
    """As JSON, on one line; null where there are fewer devices."""
    if len(jax.devices()) < count:
        print("null")
        return
    lanes = work == "minimize-batched"
    size, tolerance = LANES if lanes else EXAMPLES, TOLERANCE[str(jnp.zeros(()).dtype)]
    whole, parts = PartitionSpec(), PartitionSpec("data")
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count])
    calls, entries = {}, {}
    for kind, examples in {"strong": size, "weak": size * count}.items():
        ways, everywhere, spread = functions(work, examples)
        args = jax.device_put(
            (everywhere, *spread), (NamedSharding(mesh, whole), *[NamedSharding(mesh, parts)] * len(spread))
        )
        for name, function in ways.items():
            split = function
            if lanes:  # each device loops until its own lanes are done
                split = jax.shard_map(function, mesh=mesh, in_specs=(whole, parts), out_specs=parts)
            compiled = jax.jit(split).lower(*args).compile()
            expected = jax.jit(function)(everywhere, *spread)
            key = f"{name}, {kind}"
            calls[key] = partial(compiled, *args)
            entries[key] = {
                "name": key, "peer": OURS if name.startswith(OURS) else "jax", "devices": count, "examples": examples,
                "temporary_bytes": getattr(compiled.memory_analysis(), "temp_size_in_bytes", None),
                "all-reduces": len(re.findall(r" all-reduce(?:-start)?\(", compiled.as_text())),
                "error": max(map(distance, arrays(compiled(*args)), arrays(expected))),
                # A solve ends by its gradient, far from the last digit of its solution.
                "tolerance": 100 * tolerance if lanes else tolerance,
            }  # fmt: skip
    timed = measure(calls, budget=0.5, rounds=5)
    print(json.dumps([entry | {"seconds": timed[key].seconds} for key, entry in entries.items()]))
