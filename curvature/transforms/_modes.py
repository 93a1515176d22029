"""Choice of the mode of differentiation by sizes and legality; ``programs/_legality`` knows what forbids a mode."""

from collections.abc import Sequence
from typing import get_args

import jax

from curvature._trees import num_entries
from curvature._types import HessianMode, JacobianMode
from curvature.programs._finiteness import keeps_finite
from curvature.programs._jaxprs import largest_array, num_equations
from curvature.programs._legality import first_legal
from curvature.programs._primitives import CONVOLUTION
from curvature.programs._traced import Program, has_primitive

_ORDER = get_args(HessianMode)[1:]  # cheapest first


def choose_composition(program: Program, mode: HessianMode, *, whole: bool = False) -> str:
    """The composition to use: ``mode`` itself if it is legal, or the cheapest legal one for "auto".

    ``whole`` says that a matrix is formed and not products with vectors: see ``_order_for_matrix``.
    """
    order = _order_for_matrix(program) if whole and mode == "auto" else _ORDER
    return first_legal(program.composition_blocker, order, mode)


_FORWARD_VARIABLES, _FORWARD_ENTRIES = 10, 2**16
"""Heuristic: with so few variables and so many second derivatives of one array at most, forward over forward takes
little more time than n products with the Hessian, and a quarter of the compilation."""


_LONG_PROGRAM = 128
"""Heuristic: so many equations take seconds to compile; Kepler's equation in 25 steps has 263, a test function 40."""


def choose_for_solver(program: Program, *, forms_hessian: bool) -> str:
    """The composition for a solver: of a long program the one that compiles soonest, though less finite than "auto".

    Where one derivative is infinite, forward over forward makes all of them NaN, and a solver can use neither.
    """
    is_long = num_equations(program.jaxpr) >= _LONG_PROGRAM
    return (
        "fwd_over_fwd" if forms_hessian and is_long and pays_forward(program) else choose_composition(program, "auto")
    )


def pays_forward(program: Program) -> bool:
    """Whether forward over forward is legal, with so few variables and so small arrays that it is best."""
    return is_small(program) and program.composition_blocker("fwd_over_fwd") is None


def is_small(program: Program) -> bool:
    """Whether there are so few variables, and so small arrays, that forward mode is best for all derivatives."""
    n, jaxpr = num_entries(program.x), program.jaxpr
    return jaxpr is not None and n <= _FORWARD_VARIABLES and n**2 * largest_array(jaxpr) <= _FORWARD_ENTRIES


def _order_for_matrix(program: Program) -> Sequence[str]:
    """The compositions for a symmetric matrix, cheapest first."""
    # With leaves of several dtypes, rows and columns differ in dtype. Convolutions move their axes in either mode.
    one_dtype = len({leaf.dtype for leaf in jax.tree.leaves(program.x)}) == 1
    pulling_pays = _moves_tangents(program) and not has_primitive(CONVOLUTION, program.jaxpr)
    if not (program.is_scalar and one_dtype and pulling_pays):
        return _ORDER
    # Reverse over reverse goes first only where no equation of the gradient can make a partial derivative infinite or
    # NaN: it is then as finite as ``jax.hessian``, which is forward over reverse.
    if program.blocker("rev") is not None or program.reverse.jaxpr is None or not keeps_finite(program.reverse.jaxpr):
        return _ORDER
    return ("rev_over_rev", *(mode for mode in _ORDER if mode != "rev_over_rev"))


def _moves_tangents(program: Program) -> bool:
    """Whether pushing many tangents forward costs more than pulling as many cotangents back.

    Between a product of matrices and another operation, ``vmap`` moves the axis of the tangents to the front and back;
    the axis of cotangents moves less often. XLA writes each move to memory on a CPU, and a network's Hessian takes up
    to twice as long pushed as pulled. Without products nothing is moved, and pushing fuses better: a chain's Hessian
    takes a fifth of the time (benchmarks/suites/sparse).
    """
    if jax.default_backend() != "cpu":
        return False
    return has_primitive("dot_general", program.jaxpr) or has_primitive(CONVOLUTION, program.jaxpr)


_TALL_ON_CPU = 1.5
"""Heuristic: the ratio of outputs to inputs from which forward mode is faster on a CPU where tangents are moved. Chosen
with benchmarks/suites/modes, where networks cross over between 1.3 and 2.1."""

_FEW_LANES = 8
"""Heuristic: for so few inputs both modes take about the same time, and forward mode is the smaller program."""


def choose_jacobian(program: Program, mode: JacobianMode) -> str:
    """The mode to use: ``mode`` itself if it is legal; for "auto" forward for tall Jacobians, reverse for wide."""
    inputs, outputs = num_entries(program.x), num_entries(program.out)
    is_tall = outputs >= inputs and (
        inputs <= _FEW_LANES or outputs >= _TALL_ON_CPU * inputs or not _moves_tangents(program)
    )
    order = ("fwd", "rev") if is_tall else ("rev", "fwd")
    return first_legal(program.blocker, order, mode)
