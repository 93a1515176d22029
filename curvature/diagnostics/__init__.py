"""Is this derivative right, and which way to it is cheap."""

from curvature.diagnostics._check_derivatives import check_derivatives
from curvature.diagnostics._explain import explain
from curvature.diagnostics._reports import DerivativeCheck, DerivativeReport, Explanation, Way

__all__ = ["DerivativeCheck", "DerivativeReport", "Explanation", "Way", "check_derivatives", "explain"]
