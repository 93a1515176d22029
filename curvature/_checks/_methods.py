"""Input checks of optimizers and solvers: methods, bounds, the arguments of an update."""

from collections.abc import Iterable
from typing import Any, Literal, TypeVar

from curvature._errors import caller, describe
from curvature._types import Tree

T = TypeVar("T")

_REFUSALS = {
    "unknown": "is unknown, expected one of {} or an optax transformation such as curvature.newton() or optax.lbfgs()",
    "bounds": "takes no bounds; those that do are {}",
    "residuals": "is unknown, expected one of {}, curvature.levenberg_marquardt(...) or curvature.gauss_newton(...)",
}


def spelled(value: Any, names: Iterable[str]) -> Any:
    """The name that ``value`` spells, in any case, with ``_`` or nothing for ``-``; or else ``value`` itself."""

    def letters(word: str) -> str:
        return word.lower().replace("-", "").replace("_", "")

    return {letters(name): name for name in names}.get(letters(value), value) if isinstance(value, str) else value


def check_method(method: Any, names: tuple[str, ...], refusal: Literal["unknown", "bounds", "residuals"]) -> str:
    """The name that ``method`` spells; the caller has handled transformations."""
    name = spelled(method, names)
    if not (isinstance(name, str) and name in names):
        expected = _REFUSALS[refusal].format(", ".join(map(repr, names)))
        raise ValueError(f"{caller()}: method={method!r} {expected}.")
    return name


def check_hessian_used(method: Any, used: bool) -> None:
    """Refuse ``hessian=`` for a method that forms no Hessian and would ignore it."""
    if not used:
        raise ValueError(
            f"{caller()}: hessian= is for the methods that form a Hessian, 'newton', 'trust-exact' and 'cubic-newton'; "
            f"method={method!r} forms none."
        )


def check_pair_of_bounds(bounds: Any) -> tuple[Tree, Tree]:
    """Refuse anything but a pair of bounds."""
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        raise TypeError(
            f"{caller()}: bounds is {describe(bounds)}, expected a pair (lower, upper) of trees like x0, of numbers, "
            "or None; SciPy's Bounds are (bounds.lb, bounds.ub), its pairs an array of their lower ends and one of "
            "their upper ends."
        )
    return bounds[0], bounds[1]


def require_extra(name: str, value: T | None) -> T:
    """``value``, a required extra argument of an optimizer's ``update``; refuses None."""
    if value is None:
        raise ValueError(
            f"{caller()}: update() needs {name}=; call "
            "update(grad, state, params, value=value, grad=grad, value_fn=value_fn), as for optax.lbfgs()."
        )
    return value


def require_data(args: Any) -> tuple[Any, ...]:
    """``args=`` of an optimizer's ``update``, the data of the curvature, as a tuple; refuses None."""
    if args is None:
        raise ValueError(
            f"{caller()}: update() needs args=, the data on which the curvature is taken; call "
            "update(grad, state, params, args=batch), where model(params, *batch) gives the outputs."
        )
    return args if type(args) is tuple else (args,)
