"""Laplacians by collapsed Taylor mode, and derivatives of higher order along one direction."""

import functools
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_flatten_with_path

from curvature import _checks
from curvature._errors import caller, calling, is_array_like, public
from curvature._types import Objective, Tree
from curvature.programs import _traced
from curvature.programs._jets import BY_REVERSE, Jet, Step, push_jets
from curvature.programs._legality import first_legal
from curvature.programs._pushforward import derivative_along, directional_derivative, inconsistent_rule
from curvature.transforms._jacobian import jacobian_of, map_basis, with_aux
from curvature.transforms._self_check_cases import check_laplacian

_EAGER = Step("a branch on a value", "jvp of jvp of the whole function, for each direction", "f")


@public
def laplacian(
    f: Objective, *, factor: Tree | None = None, with_value: bool = False, check: bool = False
) -> "Laplacian":
    """The Laplacian ``sum_i d^2 f / dx_i^2`` of each output of ``f``, in one pass of collapsed Taylor mode.

    With ``factor=S``, whose leaves have a leading axis of K directions ``s_k``, it is the weighted sum
    ``sum_ij D_ij d^2 f / dx_i dx_j = sum_k s_k' H s_k`` with ``D = sum_k s_k s_k'``. Entries of ``x`` that do not
    interact, such as a batch of points inside ``f``, can share directions: with ``s_k[b] = e_k`` for every point b, the
    outputs of each point get the Laplacian with respect to that point.

    Values, the K first derivatives and the sum of the second derivatives pass through ``f`` together, equation by
    equation: through calls, branches, loops and custom derivative rules. Entrywise functions of one variable are
    composed before they are multiplied by the K directions. The rule of a ``custom_vjp`` need not be the derivative of
    its function, nor need the rule of a ``custom_jvp`` that does not call its function for the value. With either in
    ``f``, the Laplacian is the sum of ``s_k' H s_k`` with the Hessian of ``jax.hessian``, the Jacobian of the gradient
    that JAX computes. ``laplacian(f).explain(x, *args)`` says how each equation was differentiated; its ``.fallbacks``
    are the equations, with their line, for which collapsed Taylor mode has no rule.

    Args:
        f: ``f(x, *args)``, which returns any tree of floating arrays.
        factor: a tree like ``x`` whose leaves have shape ``(K,) + leaf.shape``; None stands for the identity.
        with_value: whether to return ``(value, laplacian)``, at no further cost.
        check: whether to compare the sum of the second derivatives along two random directions with the sum of
            ``v' H v`` by forward over reverse mode, ``jax.jvp(jax.grad(f), (x,), (v,))``, and to raise if they differ
            by more than rounding. Traced calls are compared as by ``hessian``.

    Returns:
        A function of ``(x, *args)``, where ``x`` is any tree of floating arrays, that returns a tree like the output
        of ``f``. Map it over points with ``jax.vmap(laplacian(f), in_axes=(0, None))``. Inside ``jax.shard_map`` the
        Laplacian is that of the function of each device.

    Raises:
        TypeError: if ``f`` is not callable or an output is not floating, if a leaf of ``x`` is not of a real floating
            dtype, if ``factor`` differs from ``x`` in dtype, or if an equation has no derivative in any mode.
        ValueError: if ``x`` has no entries, or ``factor`` does not match ``x``.
        RuntimeError: if ``check`` finds a difference; the message names the leaf, and the equations and lines where it
            enters ``f``.

    Cost: 2 + K evaluations of ``f``, where K is the number of entries of ``x`` unless a factor is given: about half of
        the trace of a Hessian. Memory: K first derivatives of each intermediate, and one sum of second derivatives.
        ``check`` takes one more Laplacian along two directions and four more products ``H v``.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> curvature.laplacian(lambda x: x[0] ** 2 * x[1] + x[1] ** 3)(jnp.array([2.0, 5.0]))  # 2 y + 6 y
        Array(40., dtype=float32)

    References: Li et al., A computational framework for neural network-based variational Monte Carlo with Forward
        Laplacian, Nature Machine Intelligence (2024), arXiv:2307.08214; Dangel et al., Collapsing Taylor mode automatic
        differentiation (2025), arXiv:2505.13644.
    """
    _checks.check_callable("f", f)
    return Laplacian(f, factor, with_value, check)


@dataclass(frozen=True)
class LaplacianReport:
    """How ``laplacian`` differentiated a function.

    Attributes:
        steps: for each equation that the input reaches: ``primitive``; ``rule``, one of "entry by entry", "linear",
            "bilinear", "each direction" (a JVP of a JVP of that equation alone), "each direction, by reverse mode";
            and ``where``, the user's line.
    """

    steps: tuple[Step, ...]

    @property
    def fallbacks(self) -> tuple[Step, ...]:
        """The steps without a rule in collapsed Taylor mode: no forward derivative, or no jaxpr."""
        return tuple(dict.fromkeys(step for step in self.steps if step.rule in (BY_REVERSE, _EAGER.rule)))

    def __str__(self) -> str:
        """One line for each kind of step, the most frequent first."""
        counts = Counter((step.primitive, step.rule) for step in self.steps).most_common()
        lines = [f"{count:4}  {primitive:<24}  {rule}" for (primitive, rule), count in counts]
        return "\n".join(lines + [f"fallback: {step.primitive} at {step.where}" for step in self.fallbacks])


@dataclass(frozen=True, eq=False)
class Laplacian:
    """The Laplacian as a function of ``(x, *args)``, with a report; returned by ``laplacian``."""

    f: Objective
    factor: Tree | None
    with_value: bool
    check: bool = False

    @calling("laplacian")
    def __call__(self, x: Tree, *args: Any) -> Any:
        """The Laplacian at ``x``, or ``(value, laplacian)``."""
        program, directions = self._prepare(x, args)
        if self.check and program.jaxpr is not None:
            check_laplacian(program, lambda program, directions: _evaluate(program, directions, [])[1])
        value, result = _evaluate(program, directions, [])
        return (value, result) if self.with_value else result

    @calling("laplacian")
    def explain(self, x: Tree, *args: Any) -> LaplacianReport:
        """How each equation of ``f`` is differentiated; traces ``f`` and evaluates nothing."""
        program, directions = self._prepare(x, args)
        if program.jaxpr is None:
            return LaplacianReport((_EAGER,))
        steps: list[Step] = []
        jax.eval_shape(lambda: _evaluate(program, directions, steps))
        return LaplacianReport(tuple(steps))

    def _prepare(self, x: Tree, args: tuple[Any, ...]) -> tuple[_traced.Program, Tree]:
        """``f`` traced at ``x``, and the directions."""
        x = _checks.check_point("x", x)
        _checks.check_entries("x", x)
        factor = None if self.factor is None else _check_factor("factor", self.factor, "x", x)
        program = _traced.trace(lambda x: with_aux(self.f(x, *args), False), x)
        _checks.check_floating_output("f", program.out)
        return program, map_basis(lambda v: v, x, None) if factor is None else factor


def _evaluate(program: _traced.Program, directions: Tree, steps: list[Step]) -> tuple[Any, Any]:
    """The value and the sum of second derivatives; appends to ``steps`` how each equation is differentiated."""
    x = program.x
    if program.jaxpr is None:
        each = jax.vmap(lambda v: directional_derivative(lambda x: directional_derivative(program.fun, x, v), x, v)[0])(
            directions
        )
        return program.fun(x)[0], jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), each)
    rule = inconsistent_rule(program.jaxpr.jaxpr)
    if rule is not None and program.blocker("rev") is None:
        steps.append(Step(rule.primitive, BY_REVERSE, rule.where))
        return program.fun(x)[0], _by_hessian(program, directions)
    jets = [Jet(*pair) for pair in zip(jax.tree.leaves(x), jax.tree.leaves(directions), strict=True)]
    outs = push_jets(program.jaxpr.jaxpr, program.jaxpr.consts, jets, steps)
    structure = jax.tree.structure(program.out)
    laps = [jnp.zeros_like(out.value) if out.lap is None else out.lap for out in outs]
    return structure.unflatten([out.value for out in outs]), structure.unflatten(laps)


def _by_hessian(program: _traced.Program, directions: Tree) -> Any:
    """``sum_k s_k' H s_k`` for each output; ``H`` is the Jacobian of the gradient by reverse mode."""

    def along(v: Tree) -> Any:
        def slope(x: Tree) -> tuple[Any, tuple[()]]:
            gradient = jacobian_of(program.fun, x, "rev", None)[0]
            return jax.tree.map(lambda out, rows: _contract(rows, v, out), program.out, gradient), ()

        first = _traced.trace(slope, program.x)
        return derivative_along(first_legal(first.blocker), first.fun, program.x, v)[0]

    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), jax.vmap(along)(directions))


def _contract(rows: Tree, v: Tree, out: Any) -> Any:
    """The gradients of an output times a direction; ``rows`` is a tree like ``x`` with the axes of the output first."""
    pairs = zip(jax.tree.leaves(rows), jax.tree.leaves(v), strict=True)
    terms = [jnp.tensordot(row, leaf, leaf.ndim).astype(out.dtype) for row, leaf in pairs]
    return sum(terms[1:], terms[0])


@public
def directional_derivatives(f: Objective, x: Tree, v: Tree, *args: Any, order: int) -> tuple[Any, ...]:
    """The derivatives ``d^k/dt^k f(x + t v)`` at t = 0, for k = 1 to ``order``.

    Args:
        f: ``f(x, *args)``, which returns any tree of floating arrays.
        x: the point, any tree of floating arrays.
        v: the direction, with the structure, shapes and dtypes of ``x``.
        *args: data for ``f``, not differentiated.
        order: the highest order, a positive integer.

    Returns:
        A tuple of ``order`` trees like the output of ``f``: the derivatives of order 1 to ``order``.

    Raises:
        TypeError: if ``f`` is not callable or an output is not floating, if a leaf of ``x`` is not of a real floating
            dtype, or if no mode can differentiate ``f``.
        ValueError: if ``v`` does not match ``x``, or ``order`` is not a positive integer.

    Cost: ``order`` nested JVPs, with up to 2^order times the operations of ``f``; meant for small orders. A derivative
        that has no forward mode, as of a ``custom_vjp``, takes two reverse passes instead.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> f = lambda x: x[0] ** 3 + x[1]
        >>> curvature.directional_derivatives(f, jnp.array([2.0, 0.0]), jnp.array([1.0, 1.0]), order=3)
        (Array(13., dtype=float32), Array(12., dtype=float32), Array(6., dtype=float32))
    """
    _checks.check_callable("f", f)
    _checks.check_count("order", order, 1)
    x = _checks.check_point("x", x)
    v = _checks.check_direction("v", v, "x", x)
    program = _traced.trace(lambda x: (_checks.check_arrays("f", f(x, *args)), ()), x)
    _checks.check_floating_output("f", program.out)
    for _ in range(order):
        mode = first_legal(program.blocker)
        program = _traced.trace(functools.partial(derivative_along, mode, program.fun, v=v), x)
    last, lower = program.fun(x)
    derivatives = [last]
    for _ in range(order - 1):  # the aux of each derivative is the derivative of one order less, with its aux
        last, lower = lower
        derivatives.append(last)
    return tuple(reversed(derivatives))


def _check_factor(name: str, factor: Tree, x_name: str, x: Tree) -> Tree:
    """``factor`` as arrays with the structure and dtypes of ``x`` and an additional leading axis of directions."""
    _checks.check_same_structure(name, factor, x_name, x)
    (path, first), *_ = tree_flatten_with_path(factor)[0]
    first_name, num_directions = name + keystr(path), jnp.shape(first)[0] if jnp.ndim(first) else 1
    if num_directions == 0:
        raise ValueError(f"{caller()}: {first_name} has shape {jnp.shape(first)}, expected at least one direction.")
    for (path, leaf), x_leaf in zip(tree_flatten_with_path(factor)[0], jax.tree.leaves(x), strict=True):
        leaf_name = name + keystr(path)
        shape: Any = jnp.shape(leaf) if is_array_like(leaf) else ()
        if len(shape) != x_leaf.ndim + 1 or shape[1:] != x_leaf.shape:
            raise ValueError(
                f"{caller()}: {leaf_name} has shape {shape}, expected (K,) + {x_leaf.shape}: a leading axis of "
                f"K directions before the shape of {x_name}{keystr(path)}."
            )
        if shape[0] != num_directions:
            raise ValueError(
                f"{caller()}: {leaf_name} has {shape[0]} directions along its leading axis, "
                f"expected {num_directions} to match {first_name}."
            )
        if jnp.result_type(leaf) != x_leaf.dtype:
            raise TypeError(
                f"{caller()}: {leaf_name} has dtype {jnp.result_type(leaf)}, expected {x_leaf.dtype} to match "
                f"{x_name}{keystr(path)}; cast it with .astype({str(x_leaf.dtype)!r})."
            )
    return jax.tree.map(jnp.asarray, factor)
