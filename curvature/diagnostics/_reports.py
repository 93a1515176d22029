"""The results of ``explain`` and ``check_derivatives``: figures by attribute, and how they print."""

import math
from dataclasses import dataclass
from typing import Literal

from curvature.diagnostics._print import Printable, Sheet
from curvature.transforms._sites import SiteRule

_MOST_SITES = 12  # that are printed


@dataclass(frozen=True)
class ModeCost:
    """One way to a derivative: a row of ``explain``.

    Attributes:
        derivative: ``"gradient"``, ``"hvp"``, ``"hessian"`` or ``"jacobian"``.
        mode: the mode or composition of modes; "taps" for a Hessian assembled as ``mean_hessian`` does, where ``auto``
            finds that ``f`` is a sum or mean over examples.
        chosen: whether it is what ``mode="auto"`` takes.
        blocker: why it is not legal: the primitive, and the user's line that brought it in; None if it is legal.
        flops: XLA's count, which takes the body of a loop once; None if XLA does not say or nothing was compiled.
        temporary_bytes: what XLA sets aside for intermediates, beyond arguments and results; None as above.
        compile_seconds: tracing, lowering and compiling together; None as above.
        seconds: the median time of a call; None if it was not measured.
        remark: what else there is to say, such as why a legal way has no figures.
    """

    derivative: Literal["gradient", "hvp", "hessian", "jacobian"]
    mode: str
    chosen: bool
    blocker: str | None = None
    flops: float | None = None
    temporary_bytes: int | None = None
    compile_seconds: float | None = None
    seconds: float | None = None
    remark: str | None = None

    @property
    def legal(self) -> bool:
        """Whether this way can differentiate the function."""
        return self.blocker is None


@dataclass(frozen=True, repr=False)
class ModeReport(Printable):
    """What ``explain`` found; prints as a table.

    Attributes:
        name: the function's.
        ways: a ``ModeCost`` for each derivative and composition of modes.
        num_inputs: the number of entries of ``x``.
        num_outputs: the number of entries of ``f(x)``.
        chunk: how many columns of the Hessian (or tangents or cotangents of the Jacobian) run at once; None if no mode
            is legal, or the Hessian is assembled from taps.
        unused: the paths of the leaves of ``x`` that ``f`` does not depend on.
        without_curvature: the paths of the leaves that ``f`` is linear in, or piecewise so, all else fixed and not:
            the rows and columns of the Hessian are zero there, whatever the values.
        structure: what structure of ``f`` the Hessian is formed from, in words; None if it goes column by column.
        sites: where the Hessian is formed from examples, a ``SiteRule`` for each equation that leaves of ``x`` enter
            together with data: ``primitive``, ``where`` (the user's line), ``leaves`` (their paths) and ``rule``.
        remarks: what else is worth knowing, in sentences.
    """

    name: str
    ways: tuple[ModeCost, ...]
    num_inputs: int
    num_outputs: int
    chunk: int | None
    unused: tuple[str, ...]
    without_curvature: tuple[str, ...]
    structure: str | None
    sites: tuple[SiteRule, ...]
    remarks: tuple[str, ...]

    def way(self, derivative: str, mode: str = "auto") -> ModeCost | None:
        """The row of a derivative by a mode; for ``"auto"`` the chosen one; None if there is none."""
        for way in self.ways:
            if way.derivative == derivative and (way.chosen if mode == "auto" else way.mode == mode):
                return way
        return None

    def sheet(self) -> Sheet:
        """What is printed."""
        measured = any(way.seconds is not None for way in self.ways)
        columns = ("derivative", "mode", "FLOP", "temporary", "compile s") + ("call ms",) * measured
        size = f"{self.num_inputs:,} inputs, {self.num_outputs:,} output{'s' * (self.num_outputs != 1)}"
        remarks = ["An arrow marks what 'auto' takes.", *self._findings(), *self.remarks]
        rows = tuple(_way_cells(way, measured) for way in self.ways)
        return Sheet(f"{self.name}: {size}", columns, 2, rows, tuple(remarks))

    def _findings(self) -> list[str]:
        findings = []
        if self.structure is not None:
            findings.append(self.structure)
        findings += map(str, self.sites[:_MOST_SITES])
        if len(self.sites) > _MOST_SITES:
            findings.append(f"{len(self.sites) - _MOST_SITES:,} more equations are in the attribute sites.")
        if self.chunk is not None:
            matrix = "Hessian" if self.way("hessian") else "Jacobian"
            findings.append(f"The {matrix} takes {self.chunk:,} of its columns or rows at once.")
        if self.unused:
            findings.append(f"f does not depend on {', '.join(self.unused)}: every derivative by it is zero.")
        flat = [path for path in self.without_curvature if path not in self.unused]
        if flat:
            findings.append(
                f"The Hessian is zero in the rows and columns of {', '.join(flat)}, whatever the values: "
                "f is linear there, or piecewise linear."
            )
        return findings


def _way_cells(way: ModeCost, measured: bool) -> tuple[str, ...]:
    start = (way.derivative, way.mode + "  <-" * way.chosen)
    if way.blocker is not None:
        return (*start, f"not legal: {way.blocker}")
    if way.compile_seconds is None:
        return (*start, way.remark or "")
    figures = [_scaled(way.flops, 1000, ("", "k", "M", "G", "T"))]
    figures.append(_scaled(way.temporary_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB")))
    figures.append(_digits(way.compile_seconds))
    figures += ["" if way.seconds is None else _digits(1e3 * way.seconds)] * measured
    return (*start, *figures)


def _scaled(number: float | None, base: int, units: tuple[str, ...]) -> str:
    """Three digits and a unit."""
    if number is None or not number > 0:
        return "?" if number is None else "0"
    power = min(max(int(math.log(number, base)), 0), len(units) - 1)
    return f"{number / base**power:,.3g} {units[power]}".rstrip()


def _digits(number: float) -> str:
    """Three significant digits without an exponent, at most three of them after the point."""
    if number == 0:
        return "0"
    return f"{number:,.{min(max(2 - math.floor(math.log10(abs(number))), 0), 3)}f}"


Verdict = Literal["passed", "wrong", "kink", "not finite", "inconclusive"]


@dataclass(frozen=True)
class DerivativeCheck:
    """One check of ``check_derivatives``.

    Attributes:
        name: what was checked.
        verdict: ``"passed"``; ``"wrong"``: the two sides differ by more than the tolerance; ``"kink"``: the derivative
            does not exist at this point, its one-sided limits differ; ``"not finite"``: a NaN or an infinity;
            ``"inconclusive"``: the differences are too rough to judge by.
        error: the largest error found, relative to the scale of what is compared.
        tolerance: the error allowed there, likewise.
        sentence: what was found, and where, for people.
    """

    name: str
    verdict: Verdict
    error: float
    tolerance: float
    sentence: str = ""


@dataclass(frozen=True, repr=False)
class DerivativeReport(Printable):
    """What ``check_derivatives`` found; prints as a table. Usable as ``assert report.ok, report``.

    Attributes:
        name: the function's.
        checks: a ``DerivativeCheck`` each.
        nonfinite: mode -> paths of the leaves whose gradient or Hessian has a NaN or an infinity, in the user's own
            precision; keys are such as ``"gradient by rev"``. Empty if all is finite.
        remarks: in which precision the differences were taken, and what was left out and why.
    """

    name: str
    checks: tuple[DerivativeCheck, ...]
    nonfinite: dict[str, tuple[str, ...]]
    remarks: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return all(check.verdict == "passed" for check in self.checks)

    @property
    def failures(self) -> tuple[DerivativeCheck, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if check.verdict != "passed")

    def sheet(self) -> Sheet:
        """What is printed."""
        verdict = "all checks passed" if self.ok else f"{len(self.failures)} of {len(self.checks)} checks did not pass"
        columns = ("check", "verdict", "error", "tolerance")
        rows = tuple((c.name, c.verdict, f"{c.error:.1e}", f"{c.tolerance:.1e}") for c in self.checks)
        found = [f"{check.name}: {check.sentence}" for check in self.failures]
        return Sheet(f"Derivatives of {self.name}: {verdict}", columns, 2, rows, (*found, *self.remarks))
