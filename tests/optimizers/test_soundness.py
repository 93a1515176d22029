"""minimize claims no success at a plateau, and takes a finite point for the end of no solve that can go on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import Status
from curvature.solvers import _loop

FIRST_ORDER = ["bfgs", "l-bfgs", "sr1"]
METHODS = ["trust-exact", "trust-region", "newton", "newton-cg", "cubic-newton", *FIRST_ORDER]
BOUNDED = ["trust-exact", "trust-region", "l-bfgs"]
WIDE = (-1e6, 1e6)

GRID = np.linspace(0, 10, 41)


def peak_misfit(p, shift):
    """A peak in height and place; where it leaves the data, the misfit is flat at 17724.5."""
    x = jnp.asarray(GRID, p.dtype)
    data = 5000 * jnp.exp(-((x - 5.2) ** 2) / 2)
    return jnp.sum((p[0] * jnp.exp(-((x - p[1] - shift) ** 2) / 2) - data) ** 2) / 1e4


@pytest.mark.thin
@pytest.mark.parametrize(("method", "bounds"), [(m, None) for m in METHODS] + [(m, WIDE) for m in BOUNDED])
def test_a_first_step_does_not_leap_to_a_plateau(method, bounds, dtype):
    # the height of 4500 says nothing of how far the place may move; the data are without noise: the minimum is 0
    result = curvature.minimize(
        peak_misfit, jnp.array([4500, 3], dtype), (jnp.zeros((), dtype),), method=method, bounds=bounds
    )
    assert result.value < 1e-3
    np.testing.assert_allclose(result.x, [5000, 5.2], rtol=1e-4)


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs"])
@pytest.mark.parametrize("factor", [1e-25, 1e-3, 1.0, 1e3, 1e18])
def test_no_square_of_a_slope_leaves_the_range(method, factor):
    def steep(x, factor):
        return factor * (0.5 * ((x[0] - 1) ** 2 + 1e10 * (x[1] - 0.01) ** 2))

    start, factor = jnp.array([5000, 0.02], jnp.float32), jnp.float32(factor)
    result = curvature.minimize(steep, start, (factor,), method=method, gtol=0, rtol=1e-10)
    assert result.success
    np.testing.assert_allclose(result.x, [1, 0.01], rtol=0.02)


@pytest.mark.thin
@pytest.mark.parametrize("method", [*FIRST_ORDER, "trust-exact", "newton-cg"])
@pytest.mark.parametrize(("factor", "unit"), [(2.0**30, 1.0), (2.0**-80, 1.0), (1.0, 2.0**20), (1.0, 2.0**-20)])
@pytest.mark.parametrize("start", [[-1.2, 1.0], [0.0, 0.0]])
def test_other_units_change_nothing_but_the_units(method, factor, unit, start, dtype):
    def valley(x, factor, unit):
        x = x / unit
        return factor * (10 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2)

    def solve(factor, unit):
        start_, factor, unit = (jnp.asarray(number, dtype) for number in (start, factor, unit))
        return curvature.minimize(valley, unit * start_, (factor, unit), method=method, gtol=0, rtol=1e-4)

    plain, other = solve(1, 1), solve(factor, unit)
    assert plain.success
    assert other.success
    assert abs(int(other.num_steps) - int(plain.num_steps)) <= 1
    np.testing.assert_allclose(other.x / unit, plain.x, rtol=1e-3)


def warped(x, factor, unit, offset):
    """A curved valley whose value at the minimizer is ``offset``, in units of the value and of ``x``."""
    x = x / unit
    return factor * (10 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + jnp.log(1 + (x[2] - 3) ** 2) + offset)


@pytest.mark.parametrize(("method", "bounds"), [(m, None) for m in METHODS] + [(m, 0.75) for m in BOUNDED])
def test_without_an_absolute_tolerance_other_units_change_no_status(method, bounds, dtype):
    tiny, huge = (1e-22, 1e22) if dtype == jnp.float32 else (1e-90, 1e90)
    for offset in (0.0, 0.7, -3e3):
        steps = []
        for factor, unit in [(1, 1), (tiny, 1), (3e-5, 1), (huge, 1), (1, 1e-9), (1, 7e8)]:
            start = unit * jnp.array([-1.2, 1.0, 0.5], dtype)
            box = None if bounds is None else (None, unit * jnp.array([bounds, jnp.inf, jnp.inf], dtype))
            args = tuple(jnp.asarray(number, dtype) for number in (factor, unit, offset))
            result = curvature.minimize(warped, start, args, method=method, bounds=box)
            assert result.success, (offset, factor, unit, Status(int(result.status)))
            first, rtol = 1.0 if bounds is None else bounds, 2e-3 if dtype == jnp.float32 else 1e-7
            np.testing.assert_allclose(result.x / unit, [first, first**2, 3], rtol=rtol)
            steps.append(int(result.num_steps))
        assert max(steps) - min(steps) <= 4 + max(steps) // 8, steps  # roundings differ, and the ends with them


@pytest.mark.parametrize("method", METHODS)
def test_a_start_at_the_rounded_minimizer_has_converged(method, dtype):
    fun = lambda x: jnp.sum(jnp.exp(x) - 3 * x) + jnp.prod(x - float(np.log(3)))
    result = curvature.minimize(fun, jnp.full(3, np.log(3), dtype), method=method)
    assert result.success
    assert result.num_steps <= 3


@pytest.mark.parametrize("method", METHODS)
def test_variables_in_other_units_are_each_stationary(method, dtype):
    # the rounding of the steep variable makes a gradient a million times that of the other
    fun = lambda x: 0.5 * ((x[0] - 1) ** 2 + 1e10 * (x[1] - 0.01) ** 2) + 7
    result = curvature.minimize(fun, jnp.array([50, 0.02], dtype), method=method)
    assert result.success
    np.testing.assert_allclose(result.x, [1, 0.01], rtol=100 * float(jnp.finfo(dtype).eps))


def separated(w, inputs, labels):
    return jnp.mean(jnp.logaddexp(0.0, -labels * (inputs @ w)))


@pytest.mark.parametrize(("method", "bounds"), [(m, None) for m in METHODS] + [(m, WIDE) for m in BOUNDED])
def test_separated_classes_have_no_minimum(method, bounds, dtype):
    inputs = np.random.default_rng(0).normal(size=(30, 2))
    data = jnp.asarray(inputs, dtype), jnp.asarray(np.sign(inputs @ [1.0, -2.0]), dtype)
    result = curvature.minimize(separated, jnp.zeros(2, dtype), data, method=method, bounds=bounds)
    at_a_wall = bounds is not None and not jnp.any(result.grad)  # a box has a minimum, where the loss rounds to zero
    assert at_a_wall or not result.success
    if dtype == jnp.float32 and not at_a_wall:  # in double precision the value falls for a thousand steps
        assert result.status == Status.NO_MINIMUM
    assert jnp.all(data[1] * (data[0] @ result.x) > 0)  # the way x - x0 separates them


@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_levels_off_has_no_minimum_and_an_edge_or_a_valley_has_one(method, dtype):
    solve = lambda fun, start: curvature.minimize(fun, jnp.array(start, dtype), method=method)
    assert solve(lambda x: jnp.sum(jnp.tanh(x)), [0.0, 0.3]).status == Status.NO_MINIMUM
    assert solve(lambda x: jnp.sum(jnp.maximum(0, 1 - x) ** 2), [0.0, -3.0]).success
    assert solve(lambda x: (x[0] + 2 * x[1] - 3) ** 2 + 1, [5.0, 7.0]).success


@pytest.mark.parametrize("method", BOUNDED)
def test_a_minimum_at_a_bound_is_one(method, dtype):
    result = curvature.minimize(lambda x: jnp.sum(jnp.tanh(x)), jnp.zeros(2, dtype), method=method, bounds=(-5.0, None))
    assert result.success
    np.testing.assert_array_equal(result.x, -5)


def tnc38(x):
    """SciPy's test of TNC, after CUTE: least at ones, where it is 0."""
    valleys = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2 + 90 * (x[3] - x[2] ** 2) ** 2 + (1 - x[2]) ** 2
    return 1e-5 * (valleys + 10.1 * ((x[1] - 1) ** 2 + (x[3] - 1) ** 2) + 19.8 * (x[1] - 1) * (x[3] - 1))


@pytest.mark.parametrize(("method", "bounds"), [(m, None) for m in METHODS] + [(m, (-10.0, 10.0)) for m in BOUNDED])
def test_a_small_scale_of_the_value_hides_no_valley(method, bounds, dtype):
    start = jnp.array([-3, -1, -3, -1], dtype)
    result = curvature.minimize(tnc38, start, method=method, bounds=bounds)
    assert result.success
    np.testing.assert_allclose(result.x, 1, rtol=2e-3 if dtype == jnp.float32 else 1e-8)


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs"])
def test_minus_infinity_ends_at_the_lowest_finite_point_seen(method, dtype):
    result = curvature.minimize(lambda x: -jnp.sum(jnp.exp(x)), jnp.zeros(2, dtype), method=method)
    assert result.status == Status.UNBOUNDED
    assert jnp.isfinite(result.value)
    assert result.value < -1e10
    assert result.num_steps > 0
    np.testing.assert_allclose(float(result.value), -np.sum(np.exp(np.asarray(result.x, "f8"))), rtol=1e-5)


@pytest.mark.thin
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [[1.0], [1.0, 2.0], [0.3]])
def test_a_pole_is_left_below_the_start_and_is_no_minimum(method, start, dtype):
    # from 1 Newton's step leads to the pole itself, where the value is minus infinity
    result = curvature.minimize(lambda x: jnp.sum(jnp.log(x**2)), jnp.array(start, dtype), method=method)
    assert result.status in (Status.UNBOUNDED, Status.SETTLED, Status.STALLED)
    assert result.value < -40
    np.testing.assert_allclose(result.value, np.sum(np.log(np.asarray(result.x, float) ** 2)), rtol=1e-6)


@pytest.mark.parametrize(("method", "bounds"), [(m, None) for m in METHODS] + [(m, WIDE) for m in BOUNDED])
def test_a_value_that_is_lost_inside_the_objective_leaves_the_gradient(method, bounds, dtype):
    # the value is exactly 0 within sqrt(eps) of 2, so the last digits of x come from the gradient alone
    fun = lambda x: jnp.sum(jnp.log(1 + (x - 2) ** 2))
    result = curvature.minimize(fun, jnp.array([-1.5, 0.4], dtype), method=method, bounds=bounds)
    assert result.success
    np.testing.assert_allclose(result.x, 2, rtol=100 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("start", [1.0, 0.3])
def test_a_kink_is_called_no_nan(method, start, dtype):
    result = curvature.minimize(lambda x: jnp.sum(jnp.abs(x)), jnp.array([start], dtype), method=method)
    assert result.status in (Status.STALLED, Status.CONVERGED)
    assert result.value < 1e-6


@pytest.mark.thin
@pytest.mark.parametrize("start", [-100.0, -30.0, -3.0])
def test_a_bounded_start_far_from_the_minimizer(start, dtype):
    fun = lambda x: jnp.sum(jnp.exp(x) - 2 * x)
    result = curvature.minimize(fun, jnp.array([start], dtype), bounds=(-1e3, 1e3), method="l-bfgs")
    assert result.success
    np.testing.assert_allclose(result.x, np.log(2), rtol=1e-3)


def logistic_misfit(p, data):
    """Of a logistic curve whose second derivatives overflow in single precision where ``p[1]`` falls below -88."""
    k = jnp.arange(27, dtype=p.dtype)
    return jnp.sum((p[0] / (1 + jnp.exp(-(p[1] + p[2] * k))) - data) ** 2)


@pytest.mark.thin
@pytest.mark.parametrize("method", METHODS)
def test_a_step_to_derivatives_that_are_not_finite_is_cut(method):
    k = np.arange(27)
    data = 1.2 / (1 + np.exp(-(-130.0 + 9 * k))) + 0.02 * np.sin(7 * k)
    result = curvature.minimize(logistic_misfit, jnp.array([1, 0, 0], "f4"), (jnp.asarray(data, "f4"),), method=method)
    assert result.status != Status.NONFINITE
    # the top alone, with the curve a step between k = 14 and 15: linear least squares, by hand
    top = np.mean(data[15:])
    least = np.sum(data[:14] ** 2) + np.sum((data[15:] - top) ** 2)
    assert float(result.value) < 1.5 * least


@pytest.mark.thin
@pytest.mark.parametrize("method", ["trust-exact", "trust-region", "newton", "newton-cg", "cubic-newton"])
@pytest.mark.parametrize("order", [1, 2])
def test_derivatives_that_end_beyond_a_wall_are_no_end(method, order, dtype):
    # the value is smooth up to 3 and beyond, but its derivative of that order is NaN there; the minimizer is 2
    @jax.custom_jvp
    def fenced(x):
        return x

    @fenced.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        return fenced(x), jnp.where(x < 3, gate(x), jnp.nan if order == 1 else gate(x)) * t

    @jax.custom_jvp
    def gate(x):
        return jnp.ones_like(x)

    @gate.defjvp
    def _(primals, tangents):
        (x,), (t,) = primals, tangents
        return gate(x), jnp.where(x < 3, jnp.zeros_like(x), jnp.nan) * t

    fun = lambda x: jnp.sum(jnp.log(1 + (fenced(x) - 2) ** 2))
    result = curvature.minimize(fun, jnp.array([-1.5, 0.4], dtype), method=method)
    assert result.success
    np.testing.assert_allclose(result.x, 2, atol=1e-3)


def test_a_power_law_in_a_box_in_single_precision():
    # The Hessian's diagonal spans ten orders of magnitude: without scaling its eigenvectors hide the offset, and the
    # fit ends at 413. The minimum is that of SciPy's least_squares in double precision, 396.0227720.
    rng = np.random.default_rng(4)
    e = np.linspace(0.5, 30, 40)
    y = 2 + 1e-3 * e**4 + 3 * rng.standard_normal(40)

    def misfit(p, e, y):
        return jnp.sum((p[0] + p[1] * e ** p[2] - y) ** 2)

    data = jnp.asarray(e, "f4"), jnp.asarray(y, "f4")
    bounds = jnp.array([-10, 0, 0], "f4"), jnp.array([10, 1, 6], "f4")
    result = curvature.minimize(misfit, jnp.array([1, 0.5, 2], "f4"), data, bounds=bounds)
    np.testing.assert_allclose(result.value, 396.0227720, rtol=1e-4)
    np.testing.assert_allclose(result.x, [1.90852806, 9.72706386e-04, 4.00813147], rtol=1e-2)


def test_a_point_on_its_way_has_not_converged():
    # columns of condition 1e5, squared by the sum: in single precision the gradient is rounding where the value is not
    t = np.linspace(-1.6, 1.6, 31)
    matrix = np.stack([t ** (2 * k) for k in range(8)], axis=1)
    data = [jnp.asarray(array, jnp.float32) for array in (matrix, 78 * np.exp(-(t**2)) + 0.1 * np.cos(5 * t))]
    start = jnp.ones(8, jnp.float32)
    result = curvature.minimize(lambda x, a, y: jnp.sum((a @ x - y) ** 2), start, tuple(data), method="trust-exact")
    assert result.value < 1e-4  # 2e-8 in double precision, and 0.007 after 64 steps


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs"])
@pytest.mark.parametrize("objective", ["parabola", "circle"])
def test_the_floor_of_a_valley_is_no_minimum(method, objective):
    # after six steps the point is on the floor to a rounding of x, and the gradient is what that rounding makes of it:
    # only from steps that lower nothing does the method learn along which way the value still falls
    if objective == "parabola":
        start, least = [-1.2, 1.0], 0.0

        def fun(x):
            return 1e6 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    else:
        start, least = [1.1, 0.1], -1.0

        def fun(x):
            return x[0] + 1e5 * (x[0] ** 2 + x[1] ** 2 - 1) ** 2

    result = curvature.minimize(fun, jnp.array(start, jnp.float32), method=method)
    assert result.value < least + 1e-2


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs"])
def test_a_valley_that_rounding_hides_is_no_success(method):
    # single precision cannot follow this floor, and any rounding of x changes the gradient by more than what it is; yet
    # these changes are across the floor, and the gradient along it is 1
    result = curvature.minimize(
        lambda x: x[0] + 1e6 * (x[0] ** 2 + x[1] ** 2 - 1) ** 2, jnp.array([1.1, 0.1], jnp.float32), method=method
    )
    assert result.value > -0.9  # the least is -1
    assert result.status == Status.STALLED


@pytest.mark.parametrize(("method", "exact"), [("trust-exact", True), ("newton", True), ("trust-region", False)])
def test_long_programs_of_few_variables_form_the_hessian_forward(method, exact, monkeypatch):
    # Kepler's equation by forty fixed-point steps: the program is long, and compiling its reverse derivative longer
    def anomaly(x):
        value = jnp.asarray(np.linspace(0.1, 3, 7), x.dtype)
        mean = value
        for _ in range(40):
            value = mean + x[0] * jnp.sin(value)
        return value * x[1]

    target = anomaly(jnp.array([0.3, 2.0]))
    chosen = []
    original = _loop.linearize_program

    def recorded(program, composition):
        chosen.append(composition)
        return original(program, composition)

    monkeypatch.setattr(_loop, "linearize_program", recorded)
    fun = lambda x: jnp.sum((anomaly(x) - target) ** 2)
    result = curvature.minimize(fun, jnp.array([0.2, 1.5]), method=method)
    assert set(chosen) == {"fwd_over_fwd" if exact else "fwd_over_rev"}
    np.testing.assert_allclose(result.x, [0.3, 2.0], rtol=1e-8)
    np.testing.assert_allclose(result.grad, jax.grad(fun)(result.x), atol=1e-10)
    chosen.clear()
    curvature.minimize(lambda x: jnp.sum((x - 1) ** 2), jnp.zeros(2), method=method)
    assert set(chosen) == {"fwd_over_rev"}


@pytest.mark.parametrize("subproblem", ["exact", "gltr", "exact in bounds"])
def test_a_rejected_update_is_zero_where_a_curvature_is_infinite(subproblem):
    def fun(x):
        return jnp.sum(x**1.5) + jnp.sum((x - 2) ** 2)

    x = jnp.array([0.0, 1.0])  # value and gradient are finite; H[0, 0] is infinite
    if subproblem == "exact in bounds":
        optimizer = curvature.projected_newton(0.0, 9.0, subproblem="exact")
    else:
        optimizer = curvature.trust_region(subproblem)
    value, grad = jax.value_and_grad(fun)(x)
    updates, state = optimizer.update(grad, optimizer.init(x), x, value=value, grad=grad, value_fn=fun)
    np.testing.assert_array_equal(updates, jnp.zeros(2))
    assert state.status != Status.RUNNING
