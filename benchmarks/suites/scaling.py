"""The same work on more devices of one process: strong scaling, of a fixed batch, and weak, of one that grows along.

On a CPU the devices are virtual ones that share its cores, so that time can fall only as far as there are cores; the
figures then show what splitting costs, the memory of a device, and how many collectives a program holds. The number of
devices is fixed when JAX starts, so each is measured in a process of its own: ``suites/scaling_worker.py``.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks.cases import Case, Choice, Claim, Finding, Line, Outcome, Outcomes, Plot, Row, Study
from benchmarks.reading import part

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


def cases(choice: Choice) -> Iterator[Case]:
    """Each piece of work over all counts of devices; a quick run takes the first."""
    for work, title in WORK.items():
        if not choice.quick or work == "hvp":
            yield Study(f"scaling/{work}/mlp", title, "mlp", partial(study, work, choice))


def study(work: str, choice: Choice, report: Callable[[str], Any]) -> Outcome:
    """A process for each count of devices, one after the other, so that they do not share the cores."""
    found: list[dict[str, Any]] = []
    for count in (1, 2) if choice.quick else (1, 2, 4, 8):
        report(f"{count} devices")
        answer = run_worker(work, count, choice)
        if answer is None:
            break  # the machine has no more devices
        found += answer
    ones = {(entry["name"], entry["kind"]): entry["seconds"] for entry in found if entry["devices"] == 1}
    rows = [row(entry, ones[entry["name"], entry["kind"]]) for entry in found]
    claims = [
        Claim(f"{row.name} agrees with one device to {row.metrics['error']:.0e}", row.status == "ok", correctness=True)
        for row in rows
        if row.peer == "curvature"
    ]
    caption = (
        f"Measured on {choice.threads} cores. Strong: the batch stays, so the ideal is 1 / devices of the {OF_ONE}, "
        "down to 1 / cores. Weak: the batch grows along, so the ideal is 1 while there are cores."
    )
    return Outcome(rows=rows, claims=claims, caption=caption)


def row(entry: dict[str, Any], one: float) -> Row:
    metrics = {
        "devices": entry["devices"], "examples": entry["examples"], OF_ONE: entry["seconds"] / one,
        "seconds": entry["seconds"], "temporary_bytes": entry["temporary_bytes"], "all-reduces": entry["all_reduces"],
        "error": entry["error"],
    }  # fmt: skip
    wrong = not entry["error"] <= entry["tolerance"]
    note = f"differs from one device by {entry['error']:.1e}" if wrong else ""
    name = f"{entry['name']}, {entry['kind']}, {entry['devices']} device{'s' * (entry['devices'] > 1)}"
    return Row(name, entry["peer"], "wrong" if wrong else "ok", metrics, note)


def run_worker(work: str, count: int, choice: Choice) -> list[dict[str, Any]] | None:
    """What the process of one count prints; None if there are fewer devices; ``RuntimeError`` if it fails."""
    environment = {**os.environ, "JAX_ENABLE_X64": str(choice.dtype == "float64")}
    if choice.device == "cpu":
        flags = environment.get("XLA_FLAGS", "")
        environment["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}"
    command = [sys.executable, "-m", "benchmarks.suites.scaling_worker", work, str(count)]
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
    ours = [line for line in lines if line.label.startswith("curvature")]
    said = [f"{line.label} on {line.x[-1]:.0f} devices: {line.y[-1]:.2f} times the {OF_ONE}." for line in ours]
    return [Finding(QUESTION, " ".join(said))] if said else []
