"""What a suite is made of: races between contestants whose answers are checked, and studies that fill their own rows.

A suite is a module of ``benchmarks.suites`` with a ``TITLE``, a ``QUESTION`` and ``cases(choice)``, and, where it
draws or concludes something, ``plots(outcomes)`` and ``findings(outcomes)``. Every case ends in an ``Outcome`` of plain
numbers and strings, which goes into ``results.json.gz``; the report is made from that file alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Task = Callable[[], Any]

OURS = "curvature"


@dataclass(frozen=True)
class Choice:
    """What the command line asks of a suite; ``models`` are the names wanted, empty for all."""

    quick: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    models: tuple[str, ...] = ()
    threads: int = 1

    def wants(self, model: str) -> bool:
        return not self.models or model in self.models

    def effort(self, quick: float = 0.1, full: float = 0.5) -> dict[str, Any]:
        """The budget of a race, in seconds, and its rounds: many short ones, since disturbances last."""
        return {"budget": quick if self.quick else full, "rounds": 3 if self.quick else 20}

    def tolerance(self, single: float = 1e-4) -> float:
        return single if self.dtype == "float32" else 1e-9


@dataclass(frozen=True)
class Contestant:
    """One way to an answer.

    Attributes:
        name: in the table, such as ``torch.func.hessian``.
        peer: the library, a key of ``benchmarks.peers.PACKAGES``; ours is ``curvature``.
        function: a JAX function of ``args``, compiled ahead of time.
        make: instead of a function: imports the library, builds and compiles, and returns the call to be timed.
        read: turns what a call returns into an array, or a tree of arrays, laid out as the reference.
        pieces: how many equal pieces of work one call does in a row; the time of one is reported.
        floor: does a part of the work only, to show what that part costs; its answer is not checked.
        only_cpu: written for the CPU, and left out of races on a GPU.
    """

    name: str
    peer: str
    function: Callable[..., Any] | None = None
    args: tuple[Any, ...] = ()
    make: Callable[[], Task] | None = None
    read: Callable[[Any], Any] = lambda answer: answer
    pieces: int = 1
    floor: bool = False
    only_cpu: bool = False


@dataclass(frozen=True)
class Race:
    """Contestants for one answer, timed in turns once each answer agrees with the reference.

    Attributes:
        id: ``suite/case/model/n=...``, unique; a result is found by it when a run is resumed or compared.
        model: what ``--models`` selects by.
        contestants: makes them; the first of ours is what ratios refer to.
        reference: makes the trusted answer, from something slower, in double precision where it can be.
        tolerance: of an answer, relative to the largest entry of each array of the reference.
        judge: instead of a reference, ``judge(row, answer, seconds)`` records in the row what an answer is worth that
            came after so many seconds, and says whether it is timed; ratios are then to the fastest of ours.
        sizes: the axes of plots, such as ``{"n": 337, "batch": 256}``.
        budget: seconds for each contestant, in all its turns together.
        rounds: how many turns each gets.
        claims: what should hold of the rows, beyond right answers of ours.
    """

    id: str
    title: str
    model: str
    contestants: Callable[[], Sequence[Contestant] | Any]
    reference: Callable[[], Any] = lambda: None
    tolerance: float = 0.0
    sizes: Mapping[str, float] = field(default_factory=dict)
    budget: float = 1.0
    rounds: int = 5
    claims: "Callable[[Outcome], list[Claim]]" = lambda outcome: []
    judge: "Callable[[Row, Any, float], bool] | None" = None
    caption: str = ""


@dataclass(frozen=True)
class Study:
    """A measurement that is no race: ``run`` makes the rows and claims, and reports its progress line by line."""

    id: str
    title: str
    model: str
    run: Callable[[Callable[[str], Any]], "Outcome"]
    sizes: Mapping[str, float] = field(default_factory=dict)


Case = Race | Study


@dataclass
class Row:
    """A line of a table.

    Attributes:
        status: ``"ok"``, ``"wrong"``, ``"failed"`` (it raised), ``"absent"`` (not installed) or ``"floor"``.
        metrics: numbers by name. Those of a race are ``ratio`` (of the time to ours), ``seconds``, ``low`` and ``high``
            (quartiles), ``compile_seconds``, ``temporary_bytes``, ``flops``, ``bytes`` (accessed), ``error``.
        note: what a reader must know about this row; of one that failed, why.
    """

    name: str
    peer: str
    status: str = "ok"
    metrics: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    def shares_program_with(self, other: "Row") -> bool:
        """Whether both are one compiled program, so that only the clock separates their times."""
        return self.metrics.get("program") == other.metrics.get("program") is not None


@dataclass
class Claim:
    """A sentence that was measured, and whether it holds; one about correctness that fails makes the run fail."""

    text: str
    holds: bool
    correctness: bool = False


@dataclass
class Outcome:
    """The rows, claims and curves of a case."""

    title: str = ""
    model: str = ""
    sizes: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    series: dict[str, list[list[float]]] = field(default_factory=dict)
    caption: str = ""
    seconds: float = 0.0

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name and row.status == "ok"), None)

    def wrong(self) -> list[str]:
        """What is wrong with the answers of ours."""
        return [claim.text for claim in self.claims if claim.correctness and not claim.holds]


Outcomes = Mapping[str, Outcome]


@dataclass
class Line:
    """One line of a plot; ``style`` is "line", "steps", "marks" or "dashed"; its color is that of its library."""

    label: str
    x: list[float]
    y: list[float]
    style: str = "line"
    library: str = ""  # by default the one that the label begins with


@dataclass
class Plot:
    """A picture, as data: the report draws it. ``name`` is unique within the suite."""

    name: str
    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    x_log: bool = True
    y_log: bool = True
    caption: str = ""


@dataclass
class Finding:
    """A question, and the answer that the rows of this run give: made from the rows, never written in advance."""

    question: str
    answer: str
