"""From an operator and a right-hand side to an answer and how it was reached."""

from curvature.linalg._eigsh import Eigenpairs, eigsh
from curvature.linalg._krylov import cg
from curvature.linalg._lanczos import Tridiagonal, lanczos
from curvature.linalg._minres import minres
from curvature.linalg._preconditioners import (
    DiagonalPreconditioner,
    NystromPreconditioner,
    diagonal_preconditioner,
    nystrom_preconditioner,
)
from curvature.linalg._solve import solve
from curvature.linalg._spectral import SpectralDensity, logdet, spectral_density
from curvature.linalg._stochastic import Estimate, diagonal, trace
from curvature.linalg._symmetry import check_symmetry

__all__ = [
    "DiagonalPreconditioner",
    "Eigenpairs",
    "Estimate",
    "NystromPreconditioner",
    "SpectralDensity",
    "Tridiagonal",
    "cg",
    "check_symmetry",
    "diagonal",
    "diagonal_preconditioner",
    "eigsh",
    "lanczos",
    "logdet",
    "minres",
    "nystrom_preconditioner",
    "solve",
    "spectral_density",
    "trace",
]
