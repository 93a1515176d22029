"""Solvers on operators whose data are batches on the host: the answers of data in memory, few passes, clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from tests.oracles import assert_close

KEY = jax.random.key(3)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(11, 6)), RNG.normal(size=11)
POINT = {"a": RNG.normal(size=2), "b": RNG.normal(size=4)}
B = {"a": np.array([1.0, -1.0]), "b": np.array([0.5, 2.0, 0.0, 1.0])}


class Batches:
    """The data as batches of unequal sizes, and how often it was gone over."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        for first, last in ((0, 4), (4, 8), (8, 11)):
            yield X[first:last], Y[first:last]


def model(w, x, y):
    return jnp.tanh(x[:, :2] @ w["a"]) + x[:, 2:] @ w["b"]


def loss(z, x, y):
    return jnp.mean((z - y) ** 2)


def objective(w, x, y):
    return loss(model(w, x, y), x, y) + jnp.sum(w["a"] ** 4)


def build(kind, *args, **options):
    if kind == "hessian":
        return curvature.HessianOperator(objective, POINT, *args, **options)
    if kind == "gauss_newton":
        return curvature.GaussNewtonOperator(model, loss, POINT, *args, **options)
    return curvature.FisherOperator(model, loss, POINT, *args, kind="empirical", **options)


def pair(kind):
    """The operator on the data in memory, the one on batches, and the batches."""
    batches = Batches()
    return build(kind, X, Y), build(kind, batches=batches), batches


SOLVERS = {
    # the call, and the passes over the data that it may take
    "cg": (lambda op: curvature.cg(op, B, rtol=1e-9), 12),
    "minres": (lambda op: curvature.minres(op, B, rtol=1e-9)[0], 14),
    "solve": (lambda op: curvature.solve(op, B, rtol=1e-9), 3),
    "solve by cg": (lambda op: curvature.solve(op, B, rtol=1e-9, method="cg"), 12),
    "preconditioned": (
        lambda op: curvature.cg(op, B, rtol=1e-9, preconditioner=curvature.diagonal_preconditioner(op))[0],
        13,
    ),
    "nystrom": (
        lambda op: curvature.nystrom_preconditioner(op, rank=2, key=KEY, damping=0.1).coefficients,
        1,
    ),
    "eigsh": (lambda op: curvature.eigsh(op, 2).eigenvalues, 2),
    "lanczos": (lambda op: curvature.lanczos(op, key=KEY, num_steps=3), 3),
    "trace": (lambda op: curvature.trace(op, key=KEY, num_samples=7), 1),
    "hutch++": (lambda op: curvature.trace(op, key=KEY, num_samples=2, method="hutch++"), 1),
    "hutch++, probes": (lambda op: curvature.trace(op @ op, key=KEY, num_samples=1 + 1, method="hutch++"), 12),
    "diagonal": (lambda op: curvature.diagonal(op), 1),
    "diagonal, probes": (lambda op: curvature.diagonal(op, key=KEY, num_samples=4), 2),
    "logdet": (lambda op: curvature.logdet(op, key=KEY, num_samples=2, num_steps=2), 3),
    "spectral_density": (lambda op: curvature.spectral_density(op, key=KEY, num_samples=3, num_steps=4), 4),
    "check_symmetry": (lambda op: curvature.check_symmetry(op, key=KEY), 1),
}


CASES = [("hessian", name) for name in SOLVERS]
CASES += [(kind, name) for kind in ("gauss_newton", "fisher") for name in ("cg", "trace", "diagonal")]


@pytest.mark.thin
@pytest.mark.parametrize(("kind", "name"), CASES)
def test_batches_give_what_data_in_memory_gives(kind, name):
    solver, passes = SOLVERS[name]
    whole, streamed, batches = pair(kind)
    shift = curvature.damping(3.0)
    want = solver(whole + shift)
    batches.passes = 0
    got = solver(streamed + shift)
    assert batches.passes <= passes
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-7)


def test_large_systems_by_restarts(monkeypatch):
    monkeypatch.setattr("curvature.linalg._eigsh._DENSE", 0)
    monkeypatch.setattr("curvature.linalg._eigsh._LEAST_BASIS", 2)
    monkeypatch.setattr("curvature.linalg._eigsh._LEAST_BLOCKS", 1)
    data = np.random.default_rng(1).normal(size=(40, 30)) * np.geomspace(1, 10, 30)
    f = lambda w, x: jnp.mean((x @ w) ** 2)
    streamed = curvature.HessianOperator(f, jnp.ones(30), batches=[data[:25], data[25:]])
    pairs = curvature.eigsh(streamed, 2, which="LA", rtol=1e-7, max_steps=500)
    assert bool(jnp.all(pairs.converged))
    assert_close(pairs.eigenvalues, np.linalg.eigvalsh(data.T @ data / 20)[::-1][:2], roundings=1e5)


def test_a_negative_direction_is_reported_and_followed_by_minres():
    f = lambda w, x: jnp.mean(x @ jnp.array([1.0, 2.0]) * 0 + x[:, 0] ** 2 * (w[0] ** 2 - w[1] ** 2))
    data = np.array([[1.0, 0.0], [2.0, 1.0], [3.0, 1.0]])
    streamed = curvature.HessianOperator(f, jnp.ones(2), batches=[data[:2], data[2:]])
    _, info = curvature.cg(streamed, jnp.array([1.0, 2.0]))
    assert info.status == curvature.Status.NEGATIVE_CURVATURE
    x, info = curvature.solve(streamed, jnp.array([1.0, 2.0]))
    assert info.status == curvature.Status.CONVERGED
    assert_close(x, np.array([1.0, -2.0]) / (2 * 14 / 3), roundings=1e3)


def test_matrices_and_diagonals_of_sums_take_one_pass():
    whole, streamed, batches = pair("hessian")
    for form in (lambda op: op.as_matrix(), lambda op: op.diagonal()):
        batches.passes = 0
        got = form(2.0 * streamed + curvature.damping(0.5))
        assert batches.passes == 1
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(form(2.0 * whole + curvature.damping(0.5))), strict=True):
            assert_close(a, b, roundings=1e3)


def test_a_second_call_compiles_nothing(monkeypatch):
    _, streamed, _ = pair("gauss_newton")
    curvature.cg(streamed + curvature.damping(1.0), B)
    traced = []
    again = curvature.GaussNewtonOperator(model, loss, jax.tree.map(np.ones_like, POINT), batches=Batches())
    monkeypatch.setattr("curvature.linalg._host_loop._cut", traced.append)
    curvature.cg(again + curvature.damping(2.0), jax.tree.map(np.ones_like, B))
    assert not traced


@pytest.mark.parametrize(
    "transformed",
    [
        lambda op: jax.jit(lambda b: curvature.cg(op, b)[0])(B),
        lambda op: jax.grad(lambda b: curvature.cg(op, b)[0]["a"][0])(B),
        lambda op: jax.vmap(lambda b: curvature.cg(op, b)[0])(jax.tree.map(lambda leaf: leaf[None], B)),
        lambda op: jax.jit(lambda op: curvature.cg(op, B)[0])(op),
    ],
)
def test_transformations_are_refused_with_the_remedy(transformed):
    _, streamed, _ = pair("hessian")
    match = r"cg: called inside jit, vmap, grad .*batches=.*call cg outside of it, or give the data .* chunk_size="
    with pytest.raises(TypeError, match=match):
        transformed(streamed)


def test_products_in_a_function_are_refused_with_the_remedy():
    _, streamed, _ = pair("hessian")
    with pytest.raises(
        TypeError, match=r"HessianOperator: x or v is traced, but batches= .* pass op itself to a solver"
    ):
        curvature.cg(lambda v: streamed @ v, B)


def test_woodbury_refuses_batches():
    _, streamed, _ = pair("gauss_newton")
    with pytest.raises(ValueError, match=r"GaussNewtonOperator.factors: the data comes in slices or batches"):
        curvature.solve(streamed + curvature.damping(1.0), B, method="woodbury")
