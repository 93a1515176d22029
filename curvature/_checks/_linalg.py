"""Errors about operators and the sizes that solvers of linear systems and eigenproblems ask for."""

from typing import Any

from curvature._checks._words import describe


def check_operator(function: str, name: str, op: Any, is_operator: bool) -> None:
    """Refuse anything but an operator; ``is_operator`` says whether it is one."""
    if not is_operator:
        raise TypeError(
            f"{function}: {name} is {describe(op)}, expected a curvature.LinearOperator, which knows its structure."
        )


def check_size(function: str, name: str, value: Any, limit: int, what: str) -> None:
    """Refuse anything but an integer from 1 to ``limit``, which ``what`` explains."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ValueError(f"{function}: {name}={value!r}, expected an integer from 1 to {limit}, {what}.")


def check_whole(function: str, whole: bool) -> None:
    """Refuse to factor an operator whose data comes in parts, or a block of one."""
    if not whole:
        raise ValueError(
            f"{function}.factors: the data comes in slices or batches, or the operator is a block, expected whole data "
            "and all of x; use another method, such as 'cg'."
        )


def no_damping(function: str) -> TypeError:
    """The error for an operator without the multiple of the identity that the method needs."""
    return TypeError(
        f"{function}: method='woodbury' needs A = J' M J + c I, but op has no damping; add it, as in "
        "op + damping(1e-3)."
    )


def no_factors(function: str, op: Any) -> TypeError:
    """The error for an operator that cannot be written as a product."""
    return TypeError(
        f"{function}: method='woodbury' needs one term with factors() -> (J, M), as a Gauss-Newton operator, plus "
        f"damping; op is {type(op).__name__}. Use another method, such as 'cg'."
    )


def no_streaming_inside(function: str) -> TypeError:
    """The error for a solver that is traced although its operator is summed over batches on the host."""
    return TypeError(
        f"{function}: called inside jit, vmap, grad or another transformation with an operator that has batches=, "
        f"which are summed on the host; call {function} outside of it, or give the data as arrays with chunk_size=."
    )
