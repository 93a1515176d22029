"""Gauss-Newton and Fisher operators as products, and systems with few outputs by Woodbury's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import Status
from tests.oracles import assert_close, assert_trees_close, flat

X = {"w": np.array([[0.3, -0.2, 0.5], [0.1, 0.4, -0.3]]), "b": (np.asarray(0.1), np.array([1.0, -1.0, 0.5]))}
INPUTS, LABELS = np.array([[0.5, -1.0], [2.0, 0.3]]), np.array([0, 2])


def model(x, inputs, labels):
    return jnp.tanh(inputs @ x["w"] + x["b"][0]) * x["b"][1][None]


def loss(outputs, inputs, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], axis=1))


OPERATORS = {
    "gauss-newton": lambda x: curvature.GaussNewtonOperator(model, loss, x, INPUTS, LABELS),
    "closed form": lambda x: curvature.FisherOperator(model, loss, x, INPUTS, LABELS, likelihood="categorical"),
    "empirical": lambda x: curvature.FisherOperator(model, loss, x, INPUTS, LABELS, kind="empirical"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_the_factors_make_the_matrix_and_solve_its_systems(name):
    op = OPERATORS[name](X)
    jac, middle = op.factors()
    assert_close((jac.T @ middle @ jac).as_matrix(), op.as_matrix())
    b = jax.tree.map(jnp.ones_like, X)
    damped = op + curvature.damping(1e-2)
    x, info = jax.jit(lambda op, b: curvature.solve(op, b, method="woodbury", rtol=1e-11))(damped, b)
    assert info.status == Status.CONVERGED
    assert_close(flat(x), np.linalg.solve(damped.as_matrix(), flat(b)), roundings=1e6)


def test_the_derivative_by_the_point_is_that_of_the_dense_solution():
    b = jax.tree.map(jnp.ones_like, X)

    def ours(x):
        op = OPERATORS["gauss-newton"](x) + curvature.damping(0.1)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(curvature.solve(op, b, method="woodbury")[0]))

    def dense(x):
        matrix = OPERATORS["gauss-newton"](x).as_matrix() + 0.1 * jnp.eye(10)
        return jnp.sum(jnp.linalg.solve(matrix, jnp.ones(10)) ** 2)

    assert_trees_close(jax.jit(jax.grad(ours))(X), jax.jit(jax.grad(dense))(X), roundings=1e6)


def test_data_in_parts_has_no_factors():
    op = curvature.GaussNewtonOperator(model, loss, X, INPUTS, LABELS, chunk_size=1)
    with pytest.raises(ValueError, match=r"GaussNewtonOperator.factors: the data comes in slices"):
        op.factors()
    with pytest.raises(ValueError, match=r"factors: .* or the operator is a block"):
        OPERATORS["gauss-newton"](X).block("w").factors()
