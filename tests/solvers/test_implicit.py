"""Derivatives of minimizers: equal to the closed form, forward, reverse and nested, by arguments and by closures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.solvers import _implicit
from tests.oracles import assert_close
from tests.scenarios import forward_only, reverse_only

INPUTS = np.random.default_rng(0).normal(size=(9, 3))
TARGETS = np.random.default_rng(1).normal(size=9)
PENALTY = 0.3


def ridge(w, penalty, inputs, targets):
    return jnp.mean((inputs @ w - targets) ** 2) / 2 + penalty / 2 * jnp.sum(w**2)


def closed_form(penalty, inputs=INPUTS, targets=TARGETS):
    gram = inputs.T @ inputs / len(inputs) + penalty * jnp.eye(inputs.shape[1], dtype=inputs.dtype)
    return jnp.linalg.solve(gram, inputs.T @ targets / len(inputs))


def by_argument(penalty):
    return curvature.minimize(ridge, jnp.zeros(3), (penalty, INPUTS, TARGETS), method="newton")


def by_closure(penalty):
    return curvature.minimize(lambda w: ridge(w, penalty, INPUTS, TARGETS), jnp.zeros(3), method="newton")


@pytest.mark.slow
@pytest.mark.parametrize("solve", [by_argument, by_closure])
def test_derivatives_of_a_ridge_solution_by_its_penalty(solve):
    """Both modes for the gradient, all four compositions for the Hessian."""
    ours, exact = lambda penalty: solve(penalty).x, jax.jacfwd(closed_form)

    @jax.jit
    def all_derivatives(penalty):
        first = [mode(ours)(penalty) for mode in (jax.jacfwd, jax.jacrev)]
        second = [
            outer(inner(ours))(penalty) for outer in (jax.jacfwd, jax.jacrev) for inner in (jax.jacfwd, jax.jacrev)
        ]
        return first, second

    first, second = all_derivatives(PENALTY)
    for derivative in first:
        np.testing.assert_allclose(derivative, exact(PENALTY), rtol=1e-11)
    for derivative in second:
        np.testing.assert_allclose(derivative, jax.jacfwd(exact)(PENALTY), rtol=1e-11)


@pytest.mark.slow
def test_derivatives_of_a_ridge_solution_by_least_squares():
    """Forward, reverse and the Hessian."""

    def residuals(w, penalty, inputs, targets):
        return (inputs @ w - targets) / 3, jnp.sqrt(penalty) * w

    def solve(penalty):
        return curvature.least_squares(residuals, jnp.zeros(3), (penalty, INPUTS, TARGETS)).x

    @jax.jit
    def all_derivatives(penalty):
        return jax.jacfwd(solve)(penalty), jax.jacrev(solve)(penalty), jax.jacfwd(jax.jacrev(solve))(penalty)

    forward, reverse, second = all_derivatives(PENALTY)
    exact = jax.jacfwd(closed_form)
    np.testing.assert_allclose(forward, exact(PENALTY), rtol=1e-11)
    np.testing.assert_allclose(reverse, exact(PENALTY), rtol=1e-11)
    np.testing.assert_allclose(second, jax.jacfwd(exact)(PENALTY), rtol=1e-11)


@pytest.mark.slow
def test_residuals_and_covariance_of_a_fit_have_the_derivatives_of_their_closed_form():
    """By the place of a measurement, which moves the Jacobian; both modes and the second derivative."""
    times, data = np.linspace(0.0, 2.0, 7), TARGETS[:7]

    def design(time):
        return jnp.stack([jnp.ones(7), jnp.exp(-jnp.asarray(times).at[2].set(time))], axis=1)

    def fitted(time):
        fit = curvature.least_squares(lambda x, time: design(time) @ x - data, jnp.zeros(2), (time,))
        return fit.residuals, fit.covariance(), fit.standard_errors()

    def exact(time):
        matrix = design(time)
        residuals = matrix @ jnp.linalg.solve(matrix.T @ matrix, matrix.T @ data) - data
        covariance = residuals @ residuals / 5 * jnp.linalg.inv(matrix.T @ matrix)
        return residuals, covariance, jnp.sqrt(jnp.diagonal(covariance))

    @jax.jit
    def all_derivatives(time):
        return [
            d(f)(time) for f in (fitted, exact) for d in (jax.jacfwd, jax.jacrev, lambda f: jax.jacfwd(jax.jacrev(f)))
        ]

    found = all_derivatives(0.4)
    for ours, theirs in zip(jax.tree.leaves(found[:3]), jax.tree.leaves(found[3:]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_what_is_undetermined_leaves_the_derivatives_of_the_rest():
    """``x[0]`` and ``x[1]`` show in their sum only, whose column correlates with that of ``x[2]``."""

    def fitted(t):
        rows = lambda x: (
            jnp.asarray(TARGETS[:5]) - t * jnp.arange(5.0) * (x[0] + x[1]) - x[2] * jnp.exp(t * INPUTS[:5, 0])
        )
        fit = curvature.least_squares(rows, jnp.zeros(3), gtol=1e-12)
        return fit.covariance()[2, 2], fit.standard_errors()[2]

    def exact(t):
        matrix = jnp.stack([t * jnp.arange(5.0), jnp.exp(t * INPUTS[:5, 0])], axis=1)
        rest = TARGETS[:5] - matrix @ jnp.linalg.solve(matrix.T @ matrix, matrix.T @ TARGETS[:5])
        variance = rest @ rest / 2 * jnp.linalg.inv(matrix.T @ matrix)[1, 1]
        return variance, jnp.sqrt(variance)

    both = jax.jit(lambda t: [(f(t), d(f)(t)) for f in (fitted, exact) for d in (jax.jacfwd, jax.jacrev)])
    found = both(0.7)
    for ours, theirs in zip(jax.tree.leaves(found[:2]), jax.tree.leaves(found[2:]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("mode", [jax.jacfwd, jax.jacrev])
def test_residuals_without_forward_mode_leave_the_derivatives_of_the_solution(mode):
    """By a ``custom_vjp``: ``x = t^2``."""
    square = jax.custom_vjp(lambda t: t**2)
    square.defvjp(lambda t: (t**2, t), lambda t, ct: (2 * t * ct,))
    solve = lambda t: curvature.least_squares(lambda x, t: jnp.stack([x[0] - square(t), 0 * x[0]]), jnp.zeros(1), (t,))
    assert_close(mode(lambda t: solve(t).x[0])(3.0), 6.0)
    assert mode(lambda t: solve(t).residuals[0])(3.0) == 0


@pytest.mark.slow
def test_a_robust_fit_has_a_derivative_by_its_scale():
    """A location by soft_l1: ``sum r / sqrt(1 + (r / s)^2) = 0``."""
    solve = lambda scale: curvature.least_squares(
        lambda x: x - TARGETS, jnp.zeros(1), loss="soft_l1", f_scale=scale, gtol=1e-13
    ).x[0]
    slope = lambda x, scale: jnp.sum((x - TARGETS) / jnp.sqrt(1 + ((x - TARGETS) / scale) ** 2))
    by_x, by_scale = jax.grad(slope, argnums=(0, 1))(solve(0.5), 0.5)
    np.testing.assert_allclose(jax.jit(jax.grad(solve))(0.5), -by_scale / by_x, rtol=1e-8)


def test_the_value_has_derivatives_by_the_envelope_theorem():
    value = lambda penalty: by_argument(penalty).value
    exact = lambda penalty: ridge(closed_form(penalty), penalty, INPUTS, TARGETS)
    both = lambda f: jax.jit(lambda penalty: (jax.grad(f)(penalty), jax.jacfwd(jax.grad(f))(penalty)))
    np.testing.assert_allclose(both(value)(PENALTY), both(exact)(PENALTY), rtol=1e-10)


@pytest.mark.slow
def test_jacobians_by_all_data_at_once():
    solve = lambda *data: curvature.minimize(ridge, jnp.zeros(3), data, method="newton").x
    data = (jnp.asarray(PENALTY), INPUTS, TARGETS)
    ours = jax.jit(jax.jacrev(solve, argnums=(0, 1, 2)))(*data)
    for got, want in zip(ours, jax.jacrev(closed_form, argnums=(0, 1, 2))(*data), strict=True):
        assert_close(got, want, roundings=1e4)


@pytest.mark.slow
def test_lanes_trees_and_integer_data():
    """``x`` a tree, the data a tree with integers that pick rows, and a lane for each penalty."""
    rows = jnp.arange(9)[::-1]

    def loss(x, data):
        return ridge(x["w"], data["penalty"], data["inputs"][data["rows"]], data["targets"][data["rows"]]) + x["b"] ** 2

    def total(penalty):
        data = {"penalty": penalty, "inputs": INPUTS, "targets": TARGETS, "rows": rows}
        return jnp.sum(curvature.minimize(loss, {"w": jnp.zeros(3), "b": jnp.ones(())}, data).x["w"])

    penalties = jnp.array([0.1, 0.5])
    exact = [jax.grad(lambda penalty: jnp.sum(closed_form(penalty)))(penalty) for penalty in penalties]
    assert_close(jax.jit(jax.vmap(jax.grad(total)))(penalties), jnp.stack(exact), roundings=1e4)


def test_neither_the_start_nor_the_limits_have_derivatives_and_the_gradient_stays_zero():
    def solve(x0, gtol, shift):
        result = curvature.minimize(lambda x: jnp.sum(jnp.cosh(x - shift)), x0, method="newton", gtol=gtol)
        return result.x, result.grad

    of_x, of_grad = jax.jit(jax.jacrev(solve, argnums=(0, 1, 2)))(jnp.zeros(2), 1e-9, jnp.ones(2))
    assert_close(of_x[2], jnp.eye(2), roundings=1e4)
    for zero in (*of_x[:2], *of_grad):
        assert_close(zero, jnp.zeros(zero.shape))


@pytest.mark.slow
@pytest.mark.parametrize("second_derivative", [True, False])
def test_large_systems_are_solved_by_products(monkeypatch, second_derivative):
    monkeypatch.setattr(_implicit, "_SMALL", 0)
    solve = lambda penalty: curvature.minimize(ridge, jnp.zeros(3), (penalty, INPUTS, TARGETS), method="newton").x
    order = (lambda f: jax.jacfwd(jax.jacrev(f))) if second_derivative else jax.jacrev
    np.testing.assert_allclose(jax.jit(order(solve))(PENALTY), order(closed_form)(PENALTY), rtol=1e-8)


@pytest.mark.slow
def test_objectives_that_some_modes_cannot_differentiate():
    """A custom_vjp allows reverse over reverse alone, a while loop forward over forward alone."""
    for fun in (
        lambda x, shift: jnp.sum((x - shift) ** 2 - reverse_only(x - shift) / 2),
        lambda x, shift: jnp.sum((x - shift) ** 2 + forward_only(x - shift) ** 2),
    ):
        solve = lambda shift, fun=fun: curvature.minimize(fun, jnp.array([0.6, -0.7]), (shift,), method="newton").x
        shift = jnp.array([0.5, -0.8])
        curvature_of = jax.jit(jax.jacfwd(solve))(shift)
        assert_close(curvature_of, jnp.eye(2), roundings=1e8)


def test_single_precision():
    data = (jnp.float32(PENALTY), INPUTS.astype(jnp.float32), TARGETS.astype(jnp.float32))
    solve = lambda penalty: curvature.minimize(ridge, jnp.zeros(3, jnp.float32), (penalty, *data[1:])).x
    derivative = jax.jit(jax.jacfwd(jax.jacrev(solve)))(data[0])
    assert derivative.dtype == jnp.float32
    assert_close(derivative, jax.jacfwd(jax.jacfwd(closed_form))(PENALTY), jnp.float32, roundings=1e3)


def test_units_of_the_variables_do_not_matter_and_flat_directions_stay():
    """Curvatures of 1e-12 and 1e12 in one Hessian, and a direction with none: the minimizer does not move along it."""
    units = jnp.array([1e-6, 1e6, 1.0])

    def loss(x, shift):
        scaled = units * x
        return jnp.sum((scaled[:2] - shift) ** 2) + (scaled[0] - scaled[1] + 0 * scaled[2]) ** 2

    solve = lambda shift: units * curvature.minimize(loss, jnp.zeros(3), (shift,), method="newton", gtol=1e-12).x
    weights = jnp.array([[2.0, 1.0], [1.0, 2.0], [0.0, 0.0]]) / 3  # the closed form of least squares
    assert_close(jax.jit(jax.jacrev(solve))(jnp.array([1.0, 2.0])), weights, roundings=1e6)


def test_a_hessian_that_closes_over_what_is_differentiated_is_no_obstacle():
    def solve(scale):
        fun, hessian = lambda x: scale * jnp.sum((x - scale) ** 2), lambda x: 2 * scale * jnp.eye(2)
        return jnp.sum(curvature.minimize(fun, jnp.zeros(2), method="newton", hessian=hessian).x)

    assert_close(jax.jit(jax.grad(solve))(3.0), 2.0, roundings=1e4)


def test_the_objective_is_traced_once_and_no_rule_before_a_derivative_is_asked_for(monkeypatch):
    traces = []

    def traced(x, shift):
        traces.append(1)
        return jnp.sum((x - shift) ** 2)

    def refuse(*_):
        raise AssertionError("a derivative was prepared that nobody has asked for")

    monkeypatch.setattr(_implicit, "_solve", refuse)
    curvature.minimize(traced, jnp.zeros(2), (1.0,), method="newton")
    assert len(traces) == 1
    curvature.minimize(traced, jnp.ones(2), (2.0,), method="newton")
    assert len(traces) == 1


@pytest.mark.slow
def test_within_bounds_the_free_variables_move_by_the_reduced_system_and_the_others_with_their_bounds():
    rng = np.random.default_rng(7)
    root, b, upper = rng.normal(size=(6, 4)), 1.5 * rng.normal(size=4), np.full(4, 0.5)

    def objective(x, shift, b):
        return jnp.sum((root @ x) ** 2) / 2 + shift / 2 * jnp.sum(x**2) - b @ x

    def solve(shift, b, upper):
        return curvature.minimize(objective, jnp.zeros(4), (shift, b), bounds=(-0.5, upper), gtol=1e-12).x

    @jax.jit
    def all_derivatives(*data):
        first = jax.jacrev(solve, argnums=(0, 1, 2))
        return solve(*data), first(*data), jax.jacfwd(first)(*data)

    x, ours, by_shift = all_derivatives(0.1, b, upper)
    free, at_upper = np.abs(x) < 0.5, x == 0.5
    np.testing.assert_array_equal([free.sum(), at_upper.sum()], [2, 1])

    def reduced(shift, b, upper):
        matrix = root.T @ root + shift * jnp.eye(4)
        rest = jnp.where(at_upper, upper, jnp.where(free, 0.0, -0.5))
        moved = jnp.linalg.solve(matrix[free][:, free], (b - matrix @ rest)[free])
        return rest.at[free].set(moved)

    exact = jax.jacrev(reduced, argnums=(0, 1, 2))
    wanted = exact(0.1, b, upper), jax.jacfwd(exact)(0.1, b, upper)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-8), (ours, by_shift), wanted)
    np.testing.assert_array_equal(ours[1][~free], 0)


def test_a_start_within_the_tolerance_of_a_bound_rests_on_it():
    """It is converged where it is, and moves with the bound, not with the data."""

    def solve(shift, lower):
        result = curvature.minimize(
            lambda x, shift: (x + shift) ** 2 / 2, jnp.asarray(1e-10), (shift,), bounds=(lower, None), gtol=1e-8
        )
        return result.x, result.num_steps

    by_shift, by_lower = jax.jit(jax.grad(lambda *data: solve(*data)[0], argnums=(0, 1)))(1.0, 0.0)
    assert solve(1.0, 0.0)[1] == 0
    assert (by_shift, by_lower) == (0, 1)


def test_a_start_that_fails_at_a_bound_is_returned_as_it_was():
    result = curvature.minimize(lambda x: -jnp.sum(jnp.sqrt(x)), jnp.zeros(1), bounds=(0.0, None))
    assert not result.success
    assert result.x == 0
