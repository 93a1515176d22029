"""Operators that the tests of the solvers share."""

import jax
import jax.numpy as jnp
import numpy as np

from curvature.operators._base import LinearOperator, MatrixOperator
from curvature.operators._pytrees import register_operator, static, structure_of


def rotated(eigenvalues, dtype=jnp.float64, seed=0):
    """A dense symmetric operator with these eigenvalues."""
    n = len(eigenvalues)
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))
    return MatrixOperator(jnp.asarray((q * np.asarray(eigenvalues, float)) @ q.T, dtype), is_symmetric=True)


@register_operator
class Diagonal(LinearOperator):
    """``diag(d)`` on a tree."""

    entries: object
    is_symmetric = True

    def mv(self, v):
        return jax.tree.map(jnp.multiply, self.entries, v)

    def in_structure(self):
        return structure_of(self.entries)

    def out_structure(self):
        return self.in_structure()


@register_operator
class Gram(LinearOperator):
    """``J' M J`` for a linear map of trees given by a function, which counts how often it is linearized."""

    fun: object = static()
    x: object
    weight: object  # the diagonal of M, or None
    is_symmetric = True

    def mv(self, v):
        return self.linearize()(v)

    def linearize(self):
        jac, weight = self.factors()
        forward = jac.linearize()
        backward = jax.linear_transpose(forward, self.in_structure())
        return lambda v: backward(forward(v) if weight is None else weight.mv(forward(v)))[0]

    def in_structure(self):
        return structure_of(self.x)

    def out_structure(self):
        return self.in_structure()

    def factors(self):
        return Jacobian(self.fun, self.x), None if self.weight is None else Diagonal(self.weight)


@register_operator
class Jacobian(LinearOperator):
    """The derivative of ``fun`` at ``x``."""

    fun: object = static()
    x: object

    def mv(self, v):
        return self.linearize()(v)

    def linearize(self):
        return jax.linearize(self.fun, self.x)[1]

    def in_structure(self):
        return structure_of(self.x)

    def out_structure(self):
        return jax.eval_shape(self.fun, self.x)


def counted(fun):
    """The function and the list that grows by one each time it is evaluated, or traced to be compiled."""
    calls = []

    def counting(*args):
        calls.append(1)
        return fun(*args)

    return counting, calls
