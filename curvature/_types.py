"""Type aliases, modes, statuses and result types that all packages share."""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

Objective = Callable[..., Any]
"""A function ``fun(x, *args)``, differentiated with respect to ``x``, any tree of floating arrays; ``args`` is data."""

Tree = PyTree[Any]
"""A tree of arrays: the point ``x``, a direction, a gradient."""

Vector = Float[Array, " n"]
"""A tree as one vector; see ``ravel``."""

Matrix = Float[Array, "n n"]
Scalar = Float[Array, ""]
VectorMap = Callable[[Vector], Vector]

HessianMode = Literal["auto", "fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd"]
"""A composition of two derivatives: ``"a_over_b"`` differentiates, by mode ``a``, the gradient by mode ``b``."""

SparseHessianMode = Literal["auto", "fwd_over_rev", "rev_over_rev", "rev_over_fwd"]
"""The compositions for the products of a sparse Hessian, one for each color, cheapest first."""

JacobianMode = Literal["auto", "fwd", "rev"]
"""Forward mode costs one JVP for each input, reverse mode one VJP for each output."""

ChunkSize = int | Literal["auto"] | None
"""How many lanes run at once: a number, all lanes (``None``), or as many as the cache holds (``"auto"``)."""

HessianBlocks = tuple[str, str] | Literal["diagonal"] | None
"""The part of a Hessian: the block of two sub-trees named by path, the block of each leaf with itself, or all."""


class Status(enum.IntEnum):
    """Why a solver stopped; ``message`` is a sentence on each value.

    ``CONVERGED`` is the only success, and is reported only if the stated test holds at the returned point. Inside
    ``jit`` and ``vmap`` a status is an integer array; ``Status(int(status))`` is the member.

    Example:
        >>> Status.CONVERGED.message
        'The convergence test holds at the returned point.'
    """

    RUNNING = -1
    CONVERGED = 0
    MAX_STEPS = 1
    STALLED = 2
    NONFINITE_START = 3
    NONFINITE = 4
    UNBOUNDED = 5
    NEGATIVE_CURVATURE = 6
    SETTLED = 7
    NO_MINIMUM = 8

    @property
    def message(self) -> str:
        """One sentence on why the solver stopped."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.RUNNING: "The solver has not stopped yet.",
    Status.CONVERGED: "The convergence test holds at the returned point.",
    Status.MAX_STEPS: "The limit of steps was reached before the convergence test held.",
    Status.STALLED: "No step lowers the value or the gradient any further in this precision, "
    "and the convergence test does not hold.",
    Status.NONFINITE_START: "The value or the gradient is NaN or infinite at the starting point.",
    Status.NONFINITE: "A NaN or an infinity appeared; the best finite point is returned.",
    Status.UNBOUNDED: "The objective falls to minus infinity; the lowest finite point is returned.",
    Status.NEGATIVE_CURVATURE: "The operator is not positive definite; the direction that shows it is returned.",
    Status.SETTLED: "The value no longer falls by more than its rounding, and the convergence test does not hold.",
    Status.NO_MINIMUM: "The value does not rise again along x - x0 however far: no minimum was found that way.",
}


def messages_of(status: Int[Array, "*lanes"]) -> str | list[Any]:
    """The message of a status that is known; nested lists of messages for many lanes."""
    sentences = {int(s): s.message for s in Status}
    return jax.tree.map(sentences.get, np.asarray(status).tolist())


class History(NamedTuple):
    """The iterates of ``minimize``, the start first; entries after the last iterate are NaN.

    Attributes:
        value: the objective.
        grad_norm: the largest absolute entry of its gradient.
    """

    value: Float[Array, "*lanes points"]
    grad_norm: Float[Array, "*lanes points"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MinimizeResult:
    """The result of ``minimize``. Under ``vmap`` every field has a leading axis of lanes.

    Attributes:
        x: the best point: the point that passed the convergence test or, on failure, the point of lowest value.
        value: the objective at ``x``.
        grad: the gradient at ``x``, shaped like ``x``.
        num_steps: how many steps the method took.
        status: a ``Status`` as an integer array.
        history: a ``History`` of ``max_steps + 1`` points, if requested.
    """

    x: Tree
    value: Float[Array, "*lanes"]
    grad: Tree
    num_steps: Int[Array, "*lanes"]
    status: Int[Array, "*lanes"]
    history: History | None = None

    @property
    def success(self) -> Bool[Array, "*lanes"]:
        """Whether the convergence test of ``minimize`` holds at ``x``."""
        return self.status == Status.CONVERGED

    @property
    def message(self) -> str | list[Any]:
        """The message of the status; nested lists of messages for many lanes. Not available while tracing."""
        return messages_of(self.status)


class SolveInfo(NamedTuple):
    """Status, residual and curvature of a solved linear system.

    Attributes:
        status: a ``Status`` as an integer array.
        num_steps: the number of iterations, each one product with the operator; for a factorization, how many times it
            was applied.
        residual_norm: ``norm(b - A x)``, recomputed from the returned ``x``.
        min_curvature: the smallest ``p' A p / p' p`` over the directions ``p``: search directions, or an eigenvector;
            infinity before the first direction.
        direction: the direction ``p`` of ``min_curvature``; of negative curvature if the status says so.
    """

    status: Int[Array, ""]
    num_steps: Int[Array, ""]
    residual_norm: Float[Array, ""]
    min_curvature: Float[Array, ""]
    direction: Tree
