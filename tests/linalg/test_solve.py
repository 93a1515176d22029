"""One door to all solvers: the answers agree, the statuses are true, the work is shared, derivatives are those of x."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import Status
from curvature.linalg import _solve
from curvature.operators._base import MatrixOperator, damping
from tests.linalg.operators import Diagonal, Gram, counted, rotated
from tests.oracles import assert_close, assert_trees_close, flat
from tests.typecheck import AnnotationWarning

POSITIVE = np.geomspace(1, 30, 7)
INDEFINITE = np.array([-3.0, -1.0, 0.5, 1.0, 2.0, 4.0, 5.0])
METHODS = ["auto", "cg", "minres", "cholesky", "eigh"]
B = np.arange(1.0, 8.0)
X = {"w": np.array([[0.3, -0.2, 0.5]]), "b": (np.asarray(0.1), np.array([1.0, -1.0]))}


def outputs(x):
    w, (s, v) = x["w"], x["b"]
    return jnp.stack([jnp.sum(jnp.sin(w)) + s, jnp.sum(w**2) * jnp.sum(v)])


def rtol(dtype):
    return 1e-5 if dtype == jnp.float32 else 1e-11


@pytest.mark.thin
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e12])
def test_every_method_solves_a_positive_definite_system_at_any_scale(dtype, method, scale):
    op, b = rotated(POSITIVE * scale, dtype), jnp.asarray(B, dtype)
    x, info = jax.jit(lambda op, b: curvature.solve(op, b, method=method, rtol=rtol(dtype)))(op, b)
    assert info.status == Status.CONVERGED
    assert np.linalg.norm(B - flat(op.matrix @ x)) <= 2 * rtol(dtype) * np.linalg.norm(B)
    p = info.direction / jnp.linalg.norm(info.direction)
    assert_close(info.min_curvature, p @ (op.matrix @ p), dtype, roundings=500)
    assert 0.99 <= info.min_curvature / scale <= 30


@pytest.mark.parametrize("method", ["auto", "minres", "eigh"])
def test_an_indefinite_system(dtype, method):
    op, b = rotated(INDEFINITE, dtype), jnp.asarray(B, dtype)
    x, info = jax.jit(lambda op, b: curvature.solve(op, b, method=method, rtol=rtol(dtype)))(op, b)
    assert info.status == Status.CONVERGED
    assert np.linalg.norm(B - flat(op.matrix @ x)) <= 2 * rtol(dtype) * np.linalg.norm(B)
    assert info.min_curvature < 0 or method == "minres"  # which sees curvature along its own directions only


@pytest.mark.parametrize("method", ["cg", "cholesky"])
def test_methods_for_positive_definite_systems_say_when_one_is_not(dtype, method):
    op = rotated(INDEFINITE, dtype)
    x, info = curvature.solve(op, jnp.asarray(B, dtype), method=method)
    assert info.status == Status.NEGATIVE_CURVATURE
    p = info.direction
    assert p @ (op.matrix @ p) <= 0
    assert_close(info.min_curvature, p @ (op.matrix @ p) / (p @ p), dtype, roundings=500)
    if method == "cholesky":
        assert_close(info.min_curvature, -3.0, dtype, roundings=500)
        assert_close(x, np.zeros(7))


def test_large_systems_take_iterations_and_turn_to_minres(monkeypatch):
    monkeypatch.setattr(_solve, "_SMALL", 3)
    monkeypatch.setattr(_solve, "_matrix", None)
    _, info = curvature.solve(rotated(POSITIVE), jnp.asarray(B), rtol=1e-10)
    assert info.status == Status.CONVERGED
    assert info.num_steps <= 8
    lanes = jnp.stack([rotated(POSITIVE).matrix, rotated(INDEFINITE).matrix])
    _, info = jax.vmap(lambda m: curvature.solve(lambda v: m @ v, jnp.asarray(B), rtol=1e-10))(lanes)
    assert info.status.tolist() == [Status.CONVERGED] * 2
    assert info.min_curvature[0] > 0 > info.min_curvature[1]


@pytest.mark.thin
@pytest.mark.parametrize("method", METHODS)
def test_singular_zero_one_by_one_and_nan(method):
    singular = rotated([0.0, 1.0, 2.0])
    _, info = curvature.solve(singular, jnp.ones(3), method=method, rtol=1e-8)
    assert info.status in (Status.STALLED, Status.NEGATIVE_CURVATURE)
    _, info = curvature.solve(lambda v: 0 * v, jnp.ones(2), method=method)
    assert info.status in (Status.STALLED, Status.NEGATIVE_CURVATURE)
    x, info = curvature.solve(lambda v: {"x": 4 * v["x"]}, {"x": jnp.asarray(2.0)}, method=method)
    assert info.status == Status.CONVERGED
    assert_close(x["x"], 0.5)
    x, info = curvature.solve(lambda v: v * jnp.nan, jnp.ones(2), method=method)
    assert info.status == Status.NONFINITE
    assert jnp.all(jnp.isfinite(x))


def test_the_pseudo_inverse_gives_the_shortest_least_squares_solution():
    op = rotated([0.0, -1.0, 2.0])
    b = jnp.array([1.0, 2.0, 3.0])
    x, info = curvature.solve(op, b, method="eigh")
    assert info.status == Status.STALLED
    assert_close(x, np.linalg.pinv(op.matrix) @ b, roundings=500)


@pytest.mark.parametrize("method", METHODS)
def test_an_asymmetric_operator_is_no_success(method):
    op = MatrixOperator(jnp.array([[2.0, 1.0, 0.5], [0.0, 2.0, 1.0], [0.0, 0.0, 2.0]]))
    _, info = curvature.solve(op, jnp.ones(3), method=method, rtol=1e-12, max_steps=5)
    assert info.status != Status.CONVERGED
    assert not curvature.check_symmetry(op, key=jax.random.key(0))


@pytest.mark.thin
@pytest.mark.parametrize("method", [*METHODS, "woodbury"])
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_derivatives_by_the_right_hand_side_and_by_the_operator(method, transform):
    b = {"w": jnp.array([[1.0, 2.0, 3.0]]), "b": (jnp.asarray(4.0), jnp.array([5.0, 6.0]))}

    def ours(x, b, c):
        solution, _ = curvature.solve(Gram(outputs, x, None) + damping(c), b, method=method, rtol=1e-12)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(solution))

    def dense(x, b, c):
        flat_x, unravel = jax.flatten_util.ravel_pytree(x)
        jac = jax.jacobian(lambda v: outputs(unravel(v)))(flat_x)
        matrix = jac.T @ jac + c * jnp.eye(flat_x.size)
        return jnp.sum(jnp.sin(jnp.linalg.solve(matrix, jax.flatten_util.ravel_pytree(b)[0])))

    point = (X, b, jnp.asarray(0.5))
    if transform == "grad":
        got, want = jax.grad(ours, (0, 1, 2))(*point), jax.grad(dense, (0, 1, 2))(*point)
    else:
        got, want = jax.jvp(ours, point, point), jax.jvp(dense, point, point)
    assert_trees_close(got, want, roundings=1e6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cg", "woodbury"])
def test_second_derivatives_of_a_solution(method):
    b = jax.tree.map(jnp.ones_like, X)

    def square(c):
        x, _ = curvature.solve(Gram(outputs, X, None) + damping(c), b, method=method, rtol=1e-12)
        return flat_square(x)

    def flat_square(x):
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(x))

    jac = Gram(outputs, X, None).factors()[0].as_matrix()
    dense = lambda c: jnp.sum(jnp.linalg.solve(jac.T @ jac + c * jnp.eye(6), jnp.ones(6)) ** 2)
    assert_close(jax.hessian(square)(jnp.asarray(0.5)), jax.hessian(dense)(jnp.asarray(0.5)), roundings=1e6)


@pytest.mark.parametrize("weight", [None, [2.0, 0.0]])
def test_woodbury_equals_the_dense_solution(dtype, weight):
    x = jax.tree.map(lambda leaf: leaf.astype(dtype), X)
    op = Gram(outputs, x, None if weight is None else jnp.asarray(weight, dtype)) + damping(0.1)
    b = jax.tree.map(lambda leaf: leaf + 1, x)
    got, info = curvature.solve(op, b, method="woodbury", rtol=rtol(dtype))
    assert info.status == Status.CONVERGED
    assert_close(flat(got), np.linalg.solve(np.asarray(op.as_matrix(), float), flat(b)), dtype, roundings=1e3)


@pytest.mark.parametrize("method", ["cg", "minres", "cholesky", "woodbury"])
def test_many_right_hand_sides_share_one_linearization(method):
    fun, calls = counted(outputs)
    op = Gram(fun, X, None) + damping(0.1)
    op.in_structure()
    rhs = jax.tree.map(lambda leaf: jnp.stack([leaf + i for i in range(5)]), X)
    lanes = jax.jit(jax.vmap(lambda b: curvature.solve(op, b, method=method, rtol=1e-10)))
    x, info = lanes(rhs)
    assert info.status.tolist() == [Status.CONVERGED] * 5
    assert len(calls) == (3 if method == "woodbury" else 1)  # the product, the factor J, and the shape of its outputs
    matrix = np.asarray((Gram(outputs, X, None) + damping(0.1)).as_matrix())
    for i in range(5):
        lane, b = (flat(jax.tree.map(lambda leaf, i=i: leaf[i], tree)) for tree in (x, rhs))
        assert_close(lane, np.linalg.solve(matrix, b), roundings=1e7)


def test_many_right_hand_sides_share_one_factor():
    matrix = rotated(POSITIVE).matrix
    lanes = jax.vmap(lambda b: curvature.solve(lambda v: matrix @ v, b, method="cholesky"))
    shapes = [eqn.outvars[0].aval.shape for eqn in equations(jax.make_jaxpr(lanes)(jnp.ones((5, 7))), "cholesky")]
    assert shapes == [(7, 7)]


def equations(closed, name):
    """All equations of a primitive, in inner jaxprs too."""
    for eqn in closed.eqns:
        if eqn.primitive.name == name:
            yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner, name)


def test_cg_linearizes_an_operator_once_and_follows_its_point():
    fun, calls = counted(outputs)

    @jax.jit
    def solve(x, b):
        return curvature.cg(Gram(fun, x, None) + damping(1.0), b, rtol=1e-10)

    for step in range(2):
        x = jax.tree.map(lambda leaf, step=step: leaf + step, X)
        solution, info = solve(x, X)
        assert info.status == Status.CONVERGED
        matrix = np.asarray((Gram(outputs, x, None) + damping(1.0)).as_matrix())
        assert_close(flat(solution), np.linalg.solve(matrix, flat(X)), roundings=1e7)
    assert len(calls) == 1


def test_a_preconditioner_saves_steps(dtype):
    entries = jnp.asarray(np.geomspace(1, 1e4, 60), dtype)
    op, b = Diagonal(entries) + damping(1.0), jnp.ones(60, dtype)
    plain = curvature.cg(op, b)[1]
    inverse = curvature.nystrom_preconditioner(Diagonal(entries), rank=50, key=jax.random.key(0), damping=1.0)
    for preconditioner in (curvature.diagonal_preconditioner(op), inverse):
        _, info = curvature.cg(op, b, preconditioner=preconditioner)
        assert info.status == Status.CONVERGED
        assert 2 * info.num_steps < plain.num_steps


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e12])
def test_nystrom_of_full_rank_is_the_inverse_at_any_scale(dtype, scale):
    op = rotated(POSITIVE * scale, dtype)
    inverse = curvature.nystrom_preconditioner(op, rank=7, key=jax.random.key(1), damping=scale)
    product = (inverse @ (op + damping(jnp.asarray(scale, dtype)))).as_matrix()
    assert_close(product, 2.0 * scale * np.eye(7), dtype, roundings=1e3)


def test_preconditioners_are_positive_definite():
    for op in (rotated(INDEFINITE), rotated(np.zeros(7))):
        inverses = [
            curvature.diagonal_preconditioner(op),
            curvature.nystrom_preconditioner(op, rank=4, key=jax.random.key(0), damping=0.1),
        ]
        for inverse in inverses:
            assert np.linalg.eigvalsh(inverse.as_matrix())[0] > 0


@pytest.mark.filterwarnings(f"ignore::{AnnotationWarning.__module__}.{AnnotationWarning.__name__}")
def test_errors_say_what_came():
    op = rotated(POSITIVE)
    with pytest.raises(ValueError, match="method='qr' is unknown"):
        curvature.solve(op, jnp.ones(7), method="qr")
    with pytest.raises(TypeError, match="needs one term with factors"):
        curvature.solve(op + damping(1.0), jnp.ones(7), method="woodbury")
    with pytest.raises(TypeError, match="op has no damping"):
        curvature.solve(Gram(outputs, X, None), X, method="woodbury")
    with pytest.raises(ValueError, match=r"solve: b has shape \(3,\), expected \(7,\) to match the argument of op"):
        curvature.solve(op, jnp.ones(3))
    with pytest.raises(ValueError, match="rank=8, expected an integer from 1 to 7"):
        curvature.nystrom_preconditioner(op, rank=8, key=jax.random.key(0), damping=1.0)
    assert bool(curvature.check_symmetry(op, key=jax.random.key(0)))
