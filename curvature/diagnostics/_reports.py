"""Reports of ``explain`` and ``check_derivatives``: data classes that print as tables."""

import math
from dataclasses import dataclass
from typing import Literal

from curvature.diagnostics._print import Printable, Sheet
from curvature.transforms._sites import SiteRule

_MOST_SITES = 12  # the most sites that are printed


@dataclass(frozen=True)
class ModeCost:
    """The cost of one mode for one derivative: a row of ``explain``.

    Attributes:
        derivative: ``"gradient"``, ``"hvp"``, ``"hessian"`` or ``"jacobian"``.
        mode: the mode or composition of modes; "taps" for a Hessian that is assembled as by ``mean_hessian``, if
            ``auto`` finds that ``f`` is a sum or mean over examples.
        chosen: whether ``mode="auto"`` chooses it.
        blocker: why it is not legal: the primitive, and the line of the user's code; None if it is legal.
        flops: XLA's count, which counts the body of a loop once; None if XLA does not report it or nothing was
            compiled.
        temporary_bytes: the memory that XLA allocates for intermediates, besides arguments and results; None as for
            ``flops``.
        compile_seconds: the time of tracing, lowering and compiling together; None if nothing was compiled.
        seconds: the median time of a call; None if it was not measured.
        remark: further remarks, such as why a legal mode has no figures.
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
        """Whether this mode can differentiate the function."""
        return self.blocker is None


@dataclass(frozen=True, repr=False)
class ModeReport(Printable):
    """The result of ``explain``; prints as a table.

    Attributes:
        name: the name of the function.
        ways: a ``ModeCost`` for each derivative and composition of modes.
        num_inputs: the number of entries of ``x``.
        num_outputs: the number of entries of ``f(x)``.
        chunk: the number of columns of the Hessian (or tangents or cotangents of the Jacobian) that run at once; None
            if no mode is legal, or the Hessian is assembled from taps.
        unused: the paths of the leaves of ``x`` that ``f`` does not depend on.
        without_curvature: the paths of the leaves whose rows and columns of the Hessian are zero for all values: ``f``
            is linear or piecewise linear in them, also jointly with the other leaves.
        structure: the structure of ``f`` from which the Hessian is assembled, in words; None if it is formed column by
            column.
        sites: if the Hessian is assembled from examples, a ``SiteRule`` for each equation that combines leaves of ``x``
            with data: ``primitive``, ``where`` (the line of the user's code), ``leaves`` (their paths) and ``rule``.
        remarks: further remarks, in sentences.
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
        """The row of a derivative and a mode, for ``"auto"`` the row of the chosen mode; None if it does not exist."""
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
                f"The Hessian is zero in the rows and columns of {', '.join(flat)} at all values: "
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
    """The number with three digits and a unit."""
    if number is None or not number > 0:
        return "?" if number is None else "0"
    power = min(max(int(math.log(number, base)), 0), len(units) - 1)
    return f"{number / base**power:,.3g} {units[power]}".rstrip()


def _digits(number: float) -> str:
    """The number with three significant digits, no exponent, and at most three decimals."""
    if number == 0:
        return "0"
    return f"{number:,.{min(max(2 - math.floor(math.log10(abs(number))), 0), 3)}f}"


Verdict = Literal["passed", "wrong", "kink", "not finite", "inconclusive"]


@dataclass(frozen=True)
class DerivativeCheck:
    """One check of ``check_derivatives``.

    Attributes:
        name: the identity that was checked.
        verdict: ``"passed"``; ``"wrong"``: the two sides differ by more than the tolerance; ``"kink"``: the derivative
            does not exist at this point because its one-sided limits differ; ``"not finite"``: a NaN or an infinity;
            ``"inconclusive"``: the differences are too inaccurate.
        error: the largest error, relative to the scale of the compared values.
        tolerance: the allowed error, relative to the same scale.
        sentence: the finding and its location, in words.
    """

    name: str
    verdict: Verdict
    error: float
    tolerance: float
    sentence: str = ""


@dataclass(frozen=True, repr=False)
class DerivativeReport(Printable):
    """The result of ``check_derivatives``; prints as a table. Use it as ``assert report.ok, report``.

    Attributes:
        name: the name of the function.
        checks: a ``DerivativeCheck`` for each identity.
        nonfinite: from a mode, such as ``"gradient by rev"``, to the paths of the leaves whose gradient or Hessian has
            a NaN or an infinity in the dtype of ``x``. Empty if all values are finite.
        remarks: the precision of the differences, and which checks were skipped and why.
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
