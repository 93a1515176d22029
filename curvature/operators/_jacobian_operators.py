"""Jacobian and neural tangent kernel operators."""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from curvature import _checks, _trees
from curvature._errors import caller, of_class
from curvature._trees import Subtree, select
from curvature._types import ChunkSize, Tree
from curvature.operators._base import LinearOperator, Product, matrix_of_products
from curvature.operators._pytrees import register_operator, set_fields, static, structure_of
from curvature.programs import _traced
from curvature.transforms import _modes
from curvature.transforms._jacobian import map_basis, with_aux


def trace_model(name: str, model: Callable[..., Any], x: Tree, args: tuple[Any, ...]) -> _traced.Program:
    """``model`` traced at ``x``; its outputs must be floating arrays."""
    program = _traced.trace(lambda x: with_aux(model(x, *args), False, name), x)
    _checks.check_floating_output(name, program.out)
    return program


def push_and_pull(name: str, program: _traced.Program, part: Subtree) -> tuple[Tree, Product, Product]:
    """The outputs, ``v -> J v`` and ``w -> J' w`` with respect to a sub-tree of ``x``, all from one evaluation."""
    blocker = program.blocker("rev")
    if blocker is not None:
        raise TypeError(
            f"{caller()}: {name} has no reverse derivative because of {blocker}, and J' w needs it; "
            "scan, or fori_loop with constant bounds, has both."
        )
    x = part.take(program.x)

    def fun(x: Tree) -> Tree:
        return program.fun(part.put(program.x, x))[0]

    if program.blocker("fwd") is None:
        outputs, push = jax.linearize(fun, x)
        return outputs, push, _transposed(push, x)
    outputs, vjp = jax.vjp(fun, x)  # custom_vjp has no JVP, so J is the transpose of J'

    def pull(w: Tree) -> Tree:
        return vjp(w)[0]

    return outputs, _transposed(pull, outputs), pull


def _transposed(product: Product, like: Tree) -> Product:
    transposed = jax.linear_transpose(product, like)
    return lambda w: transposed(w)[0]


@register_operator
class _ModelOperator(LinearOperator):
    """The base of ``JacobianOperator`` and ``NTKOperator``: a function, its point, its data."""

    f: Callable[..., Any] = static()
    x: Tree
    args: tuple[Any, ...]

    @of_class
    def __init__(self, f: Callable[..., Any], x: Tree, *args: Any) -> None:
        _checks.check_static_function("f", f)
        _checks.check_data(args)
        set_fields(self, f=f, x=_checks.check_point("x", x), args=args)

    @of_class
    def _program(self) -> _traced.Program:
        return trace_model("f", self.f, self.x, self.args)

    @of_class
    def _push_and_pull(self) -> tuple[Tree, Product, Product]:
        program = self._program()
        return push_and_pull("f", program, select("", program.x, ""))

    def mv(self, v: Tree) -> Tree:
        return self.linearize()(self._checked(v))

    def out_structure(self) -> Tree:
        return structure_of(self._program().out)


@register_operator
class JacobianOperator(_ModelOperator):
    """The Jacobian ``J[o, i] = d f_o / d x_i`` at ``x``: ``J @ v`` is a JVP, ``J.T @ w`` a VJP.

    Args:
        f: a function ``f(x, *args)`` whose outputs are floating arrays; compared by identity.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated.

    Raises:
        TypeError: if ``f`` is not callable, a leaf is not of a real floating dtype, or ``f`` has no derivative in the
            mode that a product needs.

    Cost: a product evaluates ``f`` and costs about as much again; a linearized product does not evaluate ``f``.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> op = curvature.JacobianOperator(lambda x: x[:2] * x[1:], jnp.array([1.0, 2.0, 3.0]))
        >>> op @ jnp.array([1.0, 0.0, 0.0]), op.T @ jnp.array([1.0, 1.0])
        (Array([2., 0.], dtype=float32), Array([2., 4., 2.], dtype=float32))
    """

    __init__ = _ModelOperator.__init__

    def linearize(self) -> Product:
        program = self._program()
        if program.blocker("fwd") is not None:
            return self._push_and_pull()[1]
        return jax.linearize(lambda x: program.fun(x)[0], self.x)[1]

    def in_structure(self) -> Tree:
        return structure_of(self.x)

    @of_class
    def as_matrix(self, chunk_size: ChunkSize = "auto") -> Float[Array, "m n"]:
        """As for every operator; formed by rows (reverse mode) if there are fewer rows than columns."""
        program = self._program()
        if _modes.choose_jacobian(program, "auto") == "fwd":
            return super().as_matrix(chunk_size)
        rows = map_basis(self._push_and_pull()[2], program.out, chunk_size)
        return matrix_of_products(rows, _trees.num_entries(program.out))


@register_operator
class NTKOperator(_ModelOperator):
    """The empirical neural tangent kernel ``K = J J'`` of a function at ``x``, a symmetric matrix over its outputs.

    ``J[o, i] = d f_o / d x_i``. The operator takes and returns trees like the outputs of ``f``, and has no factor such
    as ``1/B``.

    Args:
        f: a function ``f(x, *args)`` whose outputs are floating arrays; compared by identity.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated.

    Raises:
        TypeError: as ``JacobianOperator``.

    Cost: a linearized product is one VJP and one JVP; a single product evaluates ``f`` first.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> op = curvature.NTKOperator(lambda x: x[:2] * x[1:], jnp.array([1.0, 2.0, 3.0]))
        >>> op.as_matrix()
        Array([[ 5.,  3.],
               [ 3., 13.]], dtype=float32)

    References: Jacot, Gabriel and Hongler, Neural tangent kernel (2018), arXiv:1806.07572.
    """

    is_symmetric = True
    __init__ = _ModelOperator.__init__

    def linearize(self) -> Product:
        _, push, pull = self._push_and_pull()
        return lambda w: push(pull(w))

    def in_structure(self) -> Tree:
        return self.out_structure()
