"""The methods of minimize beyond Newton's: what each promises, against closed forms and slow oracles."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

import curvature
from curvature import Status
from curvature.linalg._gltr import krylov_model, solve_krylov_region
from curvature.linalg._subproblems import factor_model, solve_cubic, solve_region
from curvature.optimizers._lbfgs import inverse_product, no_pairs, remember
from curvature.optimizers._method import WithStatus, _localize, resolved
from tests.optimizers.problems import PROBLEMS, rosenbrock, wood
from tests.oracles import assert_close

METHODS = ["bfgs", "l-bfgs", "sr1", "newton-cg", "cubic-newton"]
methods = pytest.mark.parametrize("method", METHODS)


def symmetric(rng, n, scale=1.0):
    matrix = rng.normal(size=(n, n))
    return scale * (matrix + matrix.T)


@pytest.mark.thin
@methods
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.fun in (wood, rosenbrock)], ids=lambda p: p.name)
def test_classical_problems_in_both_precisions(method, problem, dtype):
    result = curvature.minimize(problem.fun, jnp.asarray(problem.start, dtype), method=method)
    assert result.status == Status.CONVERGED
    assert jnp.max(jnp.abs(result.grad)) <= float(jnp.finfo(dtype).eps) ** 0.5
    assert np.max(np.abs(np.asarray(result.x, float) - problem.minimizer)) < (1e-6 if dtype == jnp.float64 else 1e-2)
    assert result.num_steps <= 130


@methods
def test_the_scale_of_the_objective_changes_nothing(method):
    def scaled(x, scale):
        return scale * rosenbrock(x)

    plain, tiny, huge = (
        curvature.minimize(scaled, jnp.array([-1.2, 1.0]), (scale,), method=method, gtol=0.0, rtol=1e-8)
        for scale in (1.0, 2.0**-30, 2.0**40)  # powers of two: no rounding differs
    )
    assert plain.success
    assert plain.num_steps == tiny.num_steps == huge.num_steps
    assert_close(tiny.x, plain.x, roundings=1e4)


@methods
def test_many_starts_each_report_their_own_status(method):
    starts = np.random.default_rng(0).uniform(-2, 2, size=(50, 2))
    starts[7], starts[11] = np.nan, [1.0, 1.0]
    result = jax.vmap(lambda x: curvature.minimize(rosenbrock, x, method=method))(jnp.asarray(starts))
    assert result.status[7] == Status.NONFINITE_START
    assert (result.status[11], result.num_steps[11]) == (Status.CONVERGED, 0)
    rest = np.delete(np.arange(50), [7])
    assert jnp.all(result.status[rest] == Status.CONVERGED)
    assert jnp.max(jnp.abs(result.x[rest] - 1)) < 1e-6


@pytest.mark.thin
@methods
def test_where_the_objective_has_no_value_the_step_shrinks(method):
    result = curvature.minimize(lambda x: x[0] - jnp.log(x[0]) + (x[1] - 2) ** 2, jnp.array([9.0, 0.0]), method=method)
    assert result.success
    assert_close(result.x, jnp.array([1.0, 2.0]), roundings=1e9)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["newton", "newton-cg"])
def test_a_newton_step_to_where_there_is_no_gradient_shrinks(method):
    """From 1.5 the full step leads to -3.4, where the value is lower and the gradient NaN, as behind ``jnp.where``."""

    def f(x):
        return jnp.sum(jnp.where(x < -2, 1.1, jnp.sqrt(1 + x**2) + 0 * jnp.sqrt(x + 2)))

    x0 = jnp.full(2, 1.5)
    full = x0 - jax.grad(f)(x0) / jnp.diagonal(jax.hessian(f)(x0))
    assert f(full) < f(x0)
    assert jnp.isnan(jax.grad(f)(full)).all()
    result = curvature.minimize(f, x0, method=method)
    assert result.success
    assert_close(1 + result.x, jnp.ones(2), roundings=1e8)


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs", "sr1"])
def test_quasi_newton_methods_take_one_gradient_a_trial(method):
    calls = []

    def counted(x):
        jax.debug.callback(lambda: calls.append(1))
        return rosenbrock(x)

    trials = []
    result = curvature.minimize(
        counted, jnp.array([-1.2, 1.0]), method=method, gtol=1e-8,
        callback=lambda step: trials.append(int(step.state.num_trials)),
    )  # fmt: skip
    jax.effects_barrier()
    assert result.success
    assert len(calls) == 1 + sum(trials)


@methods
def test_a_linear_objective_falls_to_minus_infinity(method):
    result = curvature.minimize(lambda x: jnp.sum(x), jnp.ones(3, jnp.float32), method=method)
    assert result.status in (Status.UNBOUNDED, Status.MAX_STEPS)
    assert not result.success


@pytest.mark.parametrize("update", ["bfgs", "ssbfgs", "ssbroyden"])
def test_an_updated_inverse_is_positive_and_satisfies_the_secant_equation(update):
    solver = curvature.bfgs(update)
    x = jnp.array([-1.2, 1.0])
    state = solver.init(x)
    for _ in range(4):
        value, grad = jax.value_and_grad(rosenbrock)(x)
        step, state = solver.update(grad, state, x, value=value, value_fn=rosenbrock)
        x = x + step
        change = state.stored.grad - grad
        assert_close(state.inverse_hessian @ change, step, roundings=1e4)
        assert jnp.all(jnp.linalg.eigvalsh(state.inverse_hessian) > 0)


def test_the_compact_memory_is_the_product_of_its_updates():
    rng, n, m = np.random.default_rng(0), 5, 3
    matrix = np.eye(n) + symmetric(rng, n) @ symmetric(rng, n).T
    matrix = (matrix + matrix.T) / 2 + 100 * np.eye(n)
    pairs, seen = no_pairs(m, n, jnp.dtype(float)), []
    for k in range(12):
        if k == 7:  # emptied, as after a failed search
            pairs, seen = pairs._replace(count=jnp.asarray(0, jnp.int32)), []
            vector = jnp.asarray(rng.normal(size=n))
            assert_close(inverse_product(pairs, vector), vector)
        s = rng.normal(size=n)
        y, tau = matrix @ s, 1.0 if k % 2 else 1 / 3
        pairs = remember(pairs, jnp.asarray(s), jnp.asarray(y), jnp.asarray(s @ y / tau))
        seen = [*seen, (s, y, tau)][-m:]
        H = seen[-1][0] @ seen[-1][1] / (seen[-1][1] @ seen[-1][1]) * np.prod([tau for *_, tau in seen[1:]]) * np.eye(n)
        for i, (s, y, tau) in enumerate(seen):
            V = np.eye(n) - np.outer(y, s) / (s @ y)
            H = V.T @ H @ V / (tau if i else 1) + np.outer(s, s) / (s @ y)
        vector = rng.normal(size=n)
        assert_close(inverse_product(pairs, jnp.asarray(vector)), H @ vector, roundings=1e5)


def test_a_few_variables_keep_arrays_that_xla_runs_in_one_thread():
    arrays = jax.tree.leaves(curvature.lbfgs().init(jnp.zeros(4)).pairs)
    assert max(array.nbytes for array in arrays) <= 512
    assert len(curvature.lbfgs().init(jnp.zeros(5)).pairs.steps) == 20
    assert len(curvature.lbfgs(3).init(jnp.zeros(4)).pairs.steps) == 3


def test_a_pair_without_curvature_is_not_remembered():
    pairs = no_pairs(2, 3, jnp.dtype(float))
    assert remember(pairs, jnp.ones(3), -jnp.ones(3), jnp.asarray(1.0)).count == 0


@pytest.mark.parametrize("unit", [1.0, 1e-12])
def test_whether_a_pair_is_remembered_does_not_depend_on_the_units(unit):
    """The norms of a step and of a gradient in mixed units say nothing of the rounding of their product."""
    units = jnp.array([1.0, unit, 1.0], jnp.float32)
    pairs = no_pairs(2, 3, jnp.dtype(jnp.float32))
    curved, flat = jnp.array([1.0, 1.0, -1.0], jnp.float32), jnp.array([1.0, -1.0, 5e-8], jnp.float32)
    for change, count in ((curved, 1), (flat, 0)):
        assert remember(pairs, units, change / units, jnp.asarray(1.0, jnp.float32)).count == count


def test_sr1_learns_the_hessian_of_a_quadratic():
    matrix = symmetric(np.random.default_rng(1), 3) + 10 * np.eye(3)
    solver, x = curvature.sr1(), jnp.array([3.0, -2.0, 1.0])
    quadratic = lambda x: x @ jnp.asarray(matrix) @ x / 2
    state = solver.init(x)
    for _ in range(4):
        value, grad = jax.value_and_grad(quadratic)(x)
        step, state = solver.update(grad, state, x, value=value, value_fn=quadratic)
        x = x + step
    assert_close(state.hessian, matrix, roundings=1e12)  # the last steps are short, and divide by their squares


def test_sr1_keeps_what_it_knows_when_a_trial_is_nan():
    """The whole step ends where nothing is defined, a shorter one agrees with the Hessian."""
    solver, x = curvature.sr1(), jnp.array([1.0, 2.0])
    bowl = lambda x: jnp.where(jnp.sum(x**2) < 0.1, jnp.nan, jnp.sum(x**2))
    state = solver.init(x)._replace(
        hessian=2 * jnp.eye(2), num_updates=jnp.asarray(1, jnp.int32), radius=jnp.asarray(9.0)
    )
    _, state = solver.update(2 * x, state, x, value=bowl(x), grad=2 * x, value_fn=bowl)
    assert state.num_trials > 1
    assert state.num_updates <= 2  # the trial that it accepted may have taught it a rounding
    np.testing.assert_allclose(state.hessian, 2 * np.eye(2), atol=1e-12)


@pytest.mark.parametrize("size", [2, 6])
def test_sr1_learns_nothing_from_behind_a_cliff(size):
    """The first trial, a hundredth of x long, overshoots by 20 orders of magnitude in value and curvature."""
    start = jnp.array([1000.0] + [-2.0] * (size - 1), jnp.float32)

    def cliff(x):
        return (x[0] - 990) ** 2 / 2 + jnp.sum(jnp.exp(10 * x[1:]) - 10 * x[1:])

    result = curvature.minimize(cliff, start, method="sr1", max_steps=30)
    assert result.success, result.message
    assert jnp.max(jnp.abs(result.x - jnp.zeros_like(start).at[0].set(990.0))) < 1e-3


@pytest.mark.parametrize("hard", [False, True])
def test_the_cubic_model_is_minimized_wherever_its_minimizer_is(hard):
    solve = jax.jit(lambda H, g, w: solve_cubic(factor_model(H, g), w).step)
    rng = np.random.default_rng(2)
    for _ in range(20):
        scale, weight = 10.0 ** rng.integers(-4, 4, size=2)
        H, g = symmetric(rng, 4, scale), rng.normal(size=4) * 10.0 ** rng.integers(-5, 5)
        if hard:  # no part of the gradient lies along the lowest eigenvector
            vectors = np.linalg.eigh(H)[1]
            g = vectors[:, 1:] @ vectors[:, 1:].T @ g
        s = np.asarray(solve(jnp.asarray(H), jnp.asarray(g), jnp.asarray(weight)))
        mu, size = weight * np.linalg.norm(s), np.linalg.norm(H, 2)
        assert np.linalg.norm(H @ s + mu * s + g) <= 1e-9 * (np.linalg.norm(g) + size * np.linalg.norm(s))
        assert np.linalg.eigvalsh(H)[0] + mu >= -1e-9 * size


@pytest.mark.parametrize("eigenvalue", [0.0, -1.0, 2.0])
def test_the_region_of_a_multiple_eigenvalue_sees_the_whole_gradient(eigenvalue):
    """With ``H = l I`` the step is along ``-g`` whichever of its entries vanish."""
    model = factor_model(eigenvalue * jnp.eye(3), jnp.array([0.0, 3.0, 0.0]))
    expected = -1.5 if eigenvalue > 0 else -1.75
    assert_close(solve_region(model, jnp.asarray(1.75)).step, jnp.array([0.0, expected, 0.0]), roundings=1e4)


@pytest.mark.parametrize("radius", [0.1, 1e3])
@pytest.mark.parametrize("definite", [True, False])
def test_the_krylov_model_of_the_whole_space_is_the_exact_one(radius, definite):
    rng = np.random.default_rng(3)
    H = jnp.asarray(symmetric(rng, 6) + (20.0 if definite else 0.0) * np.eye(6))
    g = jnp.asarray(rng.normal(size=6))
    krylov = krylov_model(lambda v: H @ v, g, jnp.asarray(1e-12), jnp.asarray(100, jnp.int32), jnp.asarray(radius))
    got, want = solve_krylov_region(krylov, jnp.asarray(radius)), solve_region(factor_model(H, g), jnp.asarray(radius))
    assert_close(got.step, want.step, roundings=1e5)
    assert_close(got.predicted, want.predicted, roundings=1e5)
    assert got.on_boundary == want.on_boundary


def test_a_krylov_subproblem_of_few_variables_is_the_exact_one():
    """A residual of a half says nothing of the directions of low curvature; here they are the whole step."""
    diagonal, x = jnp.geomspace(1.0, 1e4, 20), jnp.ones(20)
    fun = lambda x: jnp.vdot(diagonal, x**2) / 2
    solver = curvature.trust_region("gltr", initial_radius=1e6)
    step, state = solver.update(diagonal * x, solver.init(x), x, value=fun(x), value_fn=fun)
    assert_close(step, -x, roundings=1e6)
    assert state.num_inner_steps == 0


@pytest.mark.slow
def test_the_krylov_space_stops_where_the_model_is_good_enough():
    diagonal = jnp.linspace(1.0, 2.0, 150)
    g = jnp.ones(150)
    krylov = krylov_model(
        lambda v: diagonal * v, g, jnp.asarray(0.05), jnp.asarray(100, jnp.int32), jnp.asarray(jnp.inf)
    )
    step = solve_krylov_region(krylov, jnp.asarray(1e6)).step
    assert krylov.num_steps < 5
    assert jnp.linalg.norm(diagonal * step + g) <= 0.05


def test_curvature_that_rounding_hides_is_scaled_up_to_its_square_root(dtype):
    """At shares 1, ``sqrt(eps)``, a hundredth of that, and none of the largest curvature."""
    root = float(jnp.finfo(dtype).eps) ** 0.5
    diagonal = jnp.array([4.0, 4 * root, 0.04 * root, 0.0], dtype)
    fun = lambda x: jnp.vdot(diagonal, x**2) / 2
    local, d = resolved(_localize(x := jnp.ones(4, dtype), fun(x), diagonal, fun, None, None))
    assert_close(d, jnp.array([1.0, 1.0, 0.1, root**0.5], dtype), dtype)
    assert_close(local.hessian(), jnp.diag(jnp.array([4.0, 4 * root, 4 * root, 0.0], dtype)), dtype)
    assert_close(local.value_after(jnp.array([0, 0, 0.1, 0], dtype)), fun(jnp.array([1, 1, 2, 1], dtype)), dtype)


class Drift(NamedTuple):
    status: Array


@pytest.mark.parametrize(("share", "status", "steps"), [(0.999, Status.STALLED, 100), (0.99, Status.MAX_STEPS, 300)])
def test_steps_that_bring_less_than_rounding_each_end(share, status, steps):
    """The value is 1 throughout; the gradient halves in 69 steps of a share of 0.99, in 693 of 0.999."""
    update = lambda updates, state, x, **extra: ((share - 1) * x, state)
    drift = WithStatus(lambda x: Drift(jnp.asarray(Status.RUNNING, jnp.int32)), update)
    fun = lambda x: 1 + 1e-30 * x**2
    result = curvature.minimize(fun, 1.0, method=drift, gtol=0, max_steps=300)
    assert (result.status, result.num_steps) == (status, steps)


def test_a_long_solve_is_given_time_in_proportion():
    """The gradient falls as the eighth power of the steps taken: it halves in a twelfth of them again."""
    update = lambda updates, state, x, **extra: ((x ** (-1 / 8) + 1) ** -8 - x, state)
    slow = WithStatus(lambda x: Drift(jnp.asarray(Status.RUNNING, jnp.int32)), update)
    result = curvature.minimize(lambda x: 1 + 1e-30 * x**2, 1.0, method=slow, gtol=0, max_steps=5_000)
    assert (result.status, result.num_steps) == (Status.MAX_STEPS, 5_000)


@pytest.mark.parametrize(("start", "status"), [(1e16, Status.STALLED), (0.0, Status.MAX_STEPS)])
def test_five_hundred_steps_below_the_rounding_of_the_first_value_end(start, status):
    """The value falls by 1 a step, after a first one of 1e16: 500 steps are less than a hundred roundings of that."""
    update = lambda updates, state, x, **extra: (jnp.ones_like(x), state)
    drift = WithStatus(lambda x: Drift(jnp.asarray(Status.RUNNING, jnp.int32)), update)
    fun = lambda x: jnp.where(x == 0, start, 0.0) - x
    result = curvature.minimize(fun, 0.0, method=drift, gtol=0, max_steps=600)
    assert (result.status, result.num_steps) == (status, 501 if status == Status.STALLED else 600)


def test_a_region_grows_over_ripples_on_a_slope():
    """CUTEst's LOGHAIRY: where ripples make the model poor, a region that follows it needs over a thousand steps."""

    def hairy(x):
        hair = 30 * jnp.sin(7 * x[0]) ** 2 * jnp.cos(7 * x[1]) ** 2
        slope = 100 * jnp.sqrt(0.01 + (x[0] - x[1]) ** 2) + 100 * jnp.sqrt(0.01 + x[0] ** 2)
        return jnp.log((100 + hair + slope) / 100)

    with jax.enable_x64(True):
        result = curvature.minimize(hairy, jnp.array([-500.0, -700.0]), method="trust-exact", max_steps=300)
        assert result.success
        assert result.value < 0.5  # among the hairs of the minimum, log(1.2)
