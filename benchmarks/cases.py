"""What a suite is made of: races between contestants whose answers are checked, and studies that measure by themselves.

A suite is a module of ``benchmarks.suites`` with a ``TITLE``, a ``QUESTION``, ``cases(choice)``, and, where it draws or
concludes something, ``plots(outcomes)`` and ``findings(outcomes)``. ``REASONS`` has, by the beginnings of a case's id
and of a row's name, why ours is behind that row; it is told only where it is. Everything that leaves a case is an
``Outcome`` of plain numbers and strings: it goes into ``results.json``, and all that the report shows is made from
there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Number = float | int | str | bool | None
Task = Callable[[], Any]

OURS = "curvature"


@dataclass(frozen=True)
class Choice:
    """What the command line asks of a suite.

    Attributes:
        quick: only what fits into a few minutes for all suites together; the smallest sizes of each axis.
        dtype: ``"float32"`` or ``"float64"``, what JAX is set to while the suite runs.
        device: ``"cpu"`` or ``"gpu"``.
        models: the names wanted; empty for all.
        threads: how many cores everyone may use.
    """

    quick: bool = False
    dtype: str = "float32"
    device: str = "cpu"
    models: tuple[str, ...] = ()
    threads: int = 1

    @property
    def rounds(self) -> int:
        """How many turns each contestant of a race takes: many short ones, since what disturbs the machine is long."""
        return 3 if self.quick else 20

    def wants(self, model: str) -> bool:
        """Whether a model is among those asked for."""
        return not self.models or model in self.models


@dataclass(frozen=True)
class Contestant:
    """One way to an answer.

    Attributes:
        name: what it is called in the table, such as ``torch.func.hessian``.
        peer: the library that it stands for, a key of ``benchmarks.peers.PACKAGES``; ours is ``curvature``.
        function: a JAX function of ``args``, to be compiled ahead of time.
        args: its arguments, arrays.
        make: instead of a function, for a library that JAX does not compile: imports it, builds and compiles, and
            returns the call to be timed, which ends when its answer is there.
        read: turns what a call returns into an array, or a tree of arrays, laid out as the reference is.
        pieces: how many equal pieces of work one call does in a row; the time of one is reported.
        floor: it does a part of the work only and answers nothing, to show what that part costs.
        only_cpu: it is written for the CPU, though its library knows GPUs, and is left out of races on one.
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
    """Contestants for one answer, timed in turns once the answer of each has been held against the reference.

    Attributes:
        id: ``suite/case/model/n=...``, unique; a result is found again by it when a run is resumed or compared.
        title: a line above the table.
        model: what ``--models`` selects by.
        contestants: makes them, when the case's turn comes; the first of ours is what ratios are to.
        reference: makes the trusted answer, from something slower, in double precision where it can be.
        tolerance: how far from it an answer may be, relative to the largest entry of each array.
        sizes: what the axes of plots are, such as ``{"n": 337, "batch": 256}``.
        budget: seconds for each contestant, in all its turns together.
        rounds: how many turns each gets.
        claims: what is to hold of the rows, beyond right answers of ours.
        caption: what a reader of the table must know.
    """

    id: str
    title: str
    model: str
    contestants: Callable[[], Sequence[Contestant]]
    reference: Callable[[], Any]
    tolerance: float
    sizes: Mapping[str, float] = field(default_factory=dict)
    budget: float = 1.0
    rounds: int = 5
    claims: "Callable[[Outcome], list[Claim]]" = lambda outcome: []
    caption: str = ""


@dataclass(frozen=True)
class Study:
    """A measurement that is no race: it fills an outcome by itself; the fields that a race has mean the same here.

    Attributes:
        run: makes the rows and claims; what it is given reports a line of progress.
    """

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
        name: of the contestant.
        peer: the library.
        status: ``"ok"``; ``"wrong"``, when the answer was; ``"failed"``, when there was none; ``"absent"``, when the
            library is not installed; ``"floor"``, for work that is not the whole.
        metrics: numbers by name, in the order of the columns. Those of a race are ``ratio`` (of the time to ours),
            ``seconds``, ``low`` and ``high`` (quartiles), ``compile_seconds``, ``temporary_bytes``, ``flops``,
            ``bytes`` (accessed, as XLA counts), ``error`` (of the answer).
        note: what a reader must know about this row; of one that failed, why.
    """

    name: str
    peer: str
    status: str = "ok"
    metrics: dict[str, Number] = field(default_factory=dict)
    note: str = ""

    def shares_program_with(self, other: "Row") -> bool:
        """Whether both are one compiled program, so that what differs between their times is the clock."""
        return self.metrics.get("program") == other.metrics.get("program") is not None


@dataclass
class Claim:
    """A sentence that was measured, and whether it holds; ``correctness`` ones fail a quick run, others do not."""

    text: str
    holds: bool
    correctness: bool = False


@dataclass
class Outcome:
    """What came of a case."""

    title: str = ""
    model: str = ""
    sizes: dict[str, float] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    series: dict[str, list[list[float]]] = field(default_factory=dict)
    caption: str = ""
    seconds: float = 0.0

    def row(self, name: str) -> Row | None:
        """The row of that name, if it is there and its answer was right."""
        return next((row for row in self.rows if row.name == name and row.status == "ok"), None)

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> "Outcome":
        """What ``to_json`` wrote."""
        rows = [Row(**row) for row in entry["rows"]]
        claims = [Claim(**claim) for claim in entry["claims"]]
        return cls(**{**entry, "rows": rows, "claims": claims})


@dataclass
class Line:
    """One line, or one set of marks, of a plot."""

    label: str
    x: list[float]
    y: list[float]
    style: str = "line"  # or "steps", "marks", "dashed"
    library: str = ""  # whose color it has; by default, the one that the label begins with


@dataclass
class Plot:
    """A picture, as data: the report draws it.

    Attributes:
        name: of its file, unique within the suite.
        title: what it shows, as a sentence that states the finding where there is one.
        x_label, y_label: with units.
        lines: what is drawn; a label that begins with ``curvature`` gets the color of ours.
        x_log, y_log: logarithmic axes.
        caption: how to read it.
    """

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
    """A question with the answer that the rows of this run give.

    Attributes:
        question: in the words of those who ask it.
        answer: sentences with figures, made from the rows; never written in advance.
        cases: the ids of the rows it rests on.
    """

    question: str
    answer: str
    cases: list[str]
