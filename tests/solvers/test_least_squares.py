"""least_squares, curve_fit and their methods: published minima, covariances, true statuses, any scale and any shape."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import curvature
from benchmarks.mgh import PROBLEMS
from curvature import Status
from curvature.optimizers import _residual_method, _residuals
from curvature.optimizers._residual_method import Request
from curvature.transforms import _modes
from tests.oracles import assert_close, assert_trees_close

CHOSEN = ["freudenstein-roth", "meyer", "powell singular", "brown-dennis"]
METHODS = ["levenberg-marquardt", "dogleg", "gauss-newton"]
T = np.linspace(0.0, 3.0, 12)
Y = 2.5 * np.exp(-1.3 * T) + 0.4 + 0.02 * np.sin(17.0 * T)
MATRIX = np.random.default_rng(0).normal(size=(9, 4)) * np.array([1.0, 1e-6, 1e5, 1.0])
TARGET = np.random.default_rng(1).normal(size=9)


def decay(x, t, y):
    return x[0] * jnp.exp(-x[1] * t) + x[2] - y


def linear(x, matrix, target):
    return matrix @ x - target


def rosenbrock(x):
    return jnp.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


@pytest.mark.thin
@pytest.mark.parametrize("problem", [p for p in PROBLEMS if p.name in CHOSEN], ids=lambda p: p.name)
def test_published_minima(problem):
    fit = curvature.least_squares(problem.residuals, jnp.asarray(problem.start))
    assert fit.success
    best = min(problem.minima, key=lambda value: abs(value - 2 * float(fit.value)))
    np.testing.assert_allclose(2 * fit.value, best, rtol=1e-8, atol=1e-16)
    assert_close(fit.residuals, problem.residuals(fit.x), roundings=1e5)  # of the data, which they are differences of
    assert_close(fit.value, jnp.sum(fit.residuals**2) / 2)


@pytest.mark.parametrize("method", METHODS)
def test_linear_problems_take_a_step_and_have_their_closed_form(method):
    fit = curvature.least_squares(linear, jnp.zeros(4), (MATRIX, TARGET), method=method)
    assert fit.success
    assert fit.num_steps == 1
    scale = np.linalg.norm(MATRIX, axis=0)  # the closed form needs scaled columns: their squares differ by 1e22
    inverse = np.linalg.inv((MATRIX / scale).T @ (MATRIX / scale))
    solution = np.linalg.lstsq(MATRIX / scale, TARGET)[0]
    assert_close(fit.x * scale, solution, roundings=1e3)
    variance = np.sum((MATRIX / scale @ solution - TARGET) ** 2) / (9 - 4)
    assert_close(fit.covariance() * np.outer(scale, scale), variance * inverse, roundings=1e4)
    assert_close(fit.standard_errors() * scale, np.sqrt(variance * np.diag(inverse)), roundings=1e4)


def test_covariance_of_nonlinear_fits_is_that_of_scipy():
    params, covariance = curvature.curve_fit(
        lambda p, t: p["a"] * jnp.exp(-p["rate"] * t) + p["shift"], T, Y, {"a": 1.0, "rate": 1.0, "shift": 0.0}
    )
    theirs = scipy.optimize.curve_fit(
        lambda t, a, rate, shift: a * np.exp(-rate * t) + shift, T, Y, (1.0, 1.0, 0.0), ftol=1e-14, xtol=1e-14
    )
    np.testing.assert_allclose([params["a"], params["rate"], params["shift"]], theirs[0], rtol=1e-7)
    np.testing.assert_allclose(covariance, theirs[1], rtol=1e-5)


def test_covariance_is_that_of_the_exact_jacobian_where_the_sum_is_least():
    """SciPy's own data (gh-4555b); by differences its covariance is off in the sixth digit."""
    rng = np.random.default_rng(408113519974467917)
    x = np.linspace(0, 4, 50)
    data = 2.5 * np.exp(-1.3 * x) + 0.5 + 0.2 * rng.normal(size=50)
    params, covariance = curvature.curve_fit(lambda p, x: p[0] * jnp.exp(-p[1] * x) + p[2], x, data, jnp.ones(3))
    theirs = scipy.optimize.curve_fit(
        lambda x, a, b, c: a * np.exp(-b * x) + c,
        x,
        data,
        jac=lambda x, a, b, c: np.stack([np.exp(-b * x), -a * x * np.exp(-b * x), np.ones(50)], 1),
        ftol=1e-15,
        xtol=1e-15,
        gtol=1e-15,
    )
    np.testing.assert_allclose(params, theirs[0], rtol=1e-8)
    np.testing.assert_allclose(covariance, theirs[1], rtol=1e-8)


@pytest.mark.thin
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "line",
    [
        lambda p, x: (p[0] + p[1]) * x + p[2],
        lambda p, x: p[0] * x + p[2] + 0 * p[1],
        lambda p, x: p[0] * p[1] * x + p[2],
    ],
    ids=["sum", "unused", "product"],
)
def test_a_flat_direction_makes_the_whole_covariance_of_a_curve_infinite(line, dtype):
    x = np.linspace(0, 4, 50, dtype=dtype)
    data = dtype(1.5) * x + np.cos(dtype(40) * x)
    params, covariance = curvature.curve_fit(line, x, data, np.ones(3, dtype))
    slope, offset = np.polyfit(x, data, 1)
    np.testing.assert_allclose(line(params, np.eye(2, dtype=dtype)[0]), [slope + offset, offset], rtol=1e-3)
    assert jnp.all(jnp.isinf(covariance))


def test_a_fit_without_success_has_no_covariance():
    _, covariance = curvature.curve_fit(
        lambda p, t: p[0] * jnp.exp(-p[1] * t) + p[2], T, Y, jnp.array([1.0, 50.0, 0.0]), max_steps=1
    )
    assert jnp.all(jnp.isnan(covariance))


@pytest.mark.parametrize(
    "loss",
    [
        "soft_l1",
        "huber",
        pytest.param("cauchy", marks=pytest.mark.slow),
        pytest.param("arctan", marks=pytest.mark.slow),
    ],
)
def test_robust_losses_are_those_of_scipy(loss):
    outliers = Y + np.where(np.arange(12) % 5 == 2, 2.0, 0.0)
    start = np.array([2.0, 1.0, 0.2])
    fit = curvature.least_squares(decay, start, (T, outliers), loss=loss, f_scale=0.1)
    theirs = scipy.optimize.least_squares(
        lambda x: x[0] * np.exp(-x[1] * T) + x[2] - outliers, start, loss=loss, f_scale=0.1, ftol=1e-14, xtol=1e-12
    )
    assert fit.success
    np.testing.assert_allclose(fit.value, theirs.cost, rtol=1e-8)
    np.testing.assert_allclose(fit.x, theirs.x, rtol=1e-5)

    def half_sum(x):
        return curvature.least_squares(decay, x, (T, outliers), loss=loss, f_scale=0.1, max_steps=0).value

    step = 1e-6 * np.array([1.0, -1.0, 1.0])
    at_start = curvature.least_squares(decay, start, (T, outliers), loss=loss, f_scale=0.1, max_steps=0)
    slope = (half_sum(start + step) - half_sum(start - step)) / 2
    np.testing.assert_allclose(at_start.grad @ step, slope, rtol=1e-6)


def test_units_change_nothing():
    def scaled(x, units, unit):
        return unit * rosenbrock(x * units)

    start = np.array([-1.2, 1.0])
    plain = curvature.least_squares(scaled, start, (np.ones(2), 1.0))
    for units, unit in ((np.array([2.0**40, 2.0**-30]), 1.0), (np.ones(2), 2.0**-60), (np.ones(2), 2.0**60)):
        other = curvature.least_squares(scaled, start / units, (units, unit))
        assert other.success
        assert other.num_steps == plain.num_steps
        assert_close(other.x * units, plain.x, roundings=1e4)


def test_many_starts_each_report_their_own_status():
    starts = np.random.default_rng(0).uniform(-3, 3, size=(50, 2))
    starts[7] = np.nan
    starts[11] = 1.0
    fits = jax.jit(jax.vmap(lambda x: curvature.least_squares(rosenbrock, x, max_steps=60)))(starts)
    assert fits.status[7] == Status.NONFINITE_START
    assert fits.num_steps[11] == 0
    others = np.arange(50) != 7
    assert jnp.all(fits.success[others])
    np.testing.assert_allclose(fits.x[others], 1.0, rtol=1e-7)
    assert fits.covariance().shape == (50, 2, 2)
    assert fits.standard_errors().shape == (50, 2)


def test_success_is_never_claimed_without_the_test():
    def status(residuals, x0, **options):
        fit = curvature.least_squares(residuals, jnp.asarray(x0), **options)
        assert jnp.all(jnp.isfinite(fit.x))
        return Status(int(fit.status))

    decreasing = lambda x: jnp.exp(-x)  # the least sum is at infinity
    assert status(decreasing, [0.0], max_steps=20) == Status.MAX_STEPS
    assert status(decreasing, [-1e5]) == Status.NONFINITE_START
    assert status(lambda x: 1 + 0 * x, [1.0, 2.0]) == Status.CONVERGED
    # the Jacobian says down where the residuals go up
    wrong = jax.custom_jvp(lambda x: jnp.exp(x))
    wrong.defjvp(lambda primals, tangents: (jnp.exp(primals[0]), -jnp.exp(primals[0]) * tangents[0]))
    assert status(lambda x: wrong(x), [0.5]) == Status.STALLED


def test_the_rounding_of_a_far_start_is_forgotten():
    """In single precision the way from 1e8 is known to 12: what is left after one step is not."""
    fit = curvature.least_squares(lambda x: jnp.stack([x[0], x[1] ** 2 - 4]), jnp.array([1e8, 3.0], jnp.float32))
    assert fit.success
    np.testing.assert_allclose(fit.x[1], 2.0, rtol=1e-6)


def test_an_outlier_beyond_the_range_of_a_derivative_does_no_harm():
    """Of arctan: ``(r / f_scale)^4`` overflows in single precision, and the outlier weighs nothing."""
    start, data = jnp.zeros(1, jnp.float32), jnp.array([0.0, 1e-3, 3e9], jnp.float32)
    fit = curvature.least_squares(lambda x, data: x - data, start, (data,), loss="arctan", f_scale=1e-3)
    assert fit.success
    np.testing.assert_allclose(fit.x, 5e-4, rtol=1e-2)


def test_undetermined_variables_are_left_and_have_infinite_variance():
    def residuals(x):  # x[2] and the difference of x[0] and x[1] do not show
        return jnp.stack([x[0] + x[1] - 3, 2 * (x[0] + x[1]) - 6.5, x[3] - 1, x[3] - 1.5, x[3] + x[0] + x[1]])

    fit = curvature.least_squares(residuals, jnp.array([1.0, 5.0, 7.0, 0.0]))
    assert fit.success
    assert_close(fit.x[:3], jnp.array([1.0, 5.0, 7.0]) + (fit.x[0] - 1) * jnp.array([1.0, 1.0, 0.0]))
    covariance = fit.covariance()
    assert jnp.all(jnp.isinf(covariance[:3]))
    assert jnp.isfinite(covariance[3, 3])


def test_fewer_residuals_than_variables():
    fit = curvature.least_squares(lambda x: jnp.stack([jnp.sum(x**2) - 1, x[0] - x[1]]), jnp.array([1.0, 2.0, 3.0]))
    assert fit.success
    assert fit.value < 1e-20
    assert jnp.all(jnp.isinf(fit.covariance()))


def test_single_precision_and_trees():
    def residuals(x, t, y):
        return {"fit": x["a"] * jnp.exp(-x["b"][0] * t) + x["b"][1] - y, "prior": 0.01 * x["a"]}

    x0 = {"a": jnp.float32(2.0), "b": jnp.array([1.0, 0.0], jnp.float32)}
    fit = curvature.least_squares(residuals, x0, (T.astype(np.float32), Y.astype(np.float32)))
    assert fit.success
    assert jax.tree.structure(fit.x) == jax.tree.structure(fit.grad) == jax.tree.structure(fit.standard_errors())
    assert fit.x["b"].dtype == fit.value.dtype == jnp.float32
    np.testing.assert_allclose(fit.x["b"], [1.3, 0.4], atol=0.1)
    assert fit.residuals["fit"].shape == (12,)


@pytest.mark.parametrize("method", [curvature.levenberg_marquardt("cg"), curvature.gauss_newton("cg")])
def test_without_the_jacobian(method):
    fit = curvature.least_squares(decay, jnp.array([2.0, 1.0, 0.2]), (T, Y), method=method, rtol=1e-6)
    dense = curvature.least_squares(decay, jnp.array([2.0, 1.0, 0.2]), (T, Y))
    assert fit.success
    np.testing.assert_allclose(fit.x, dense.x, rtol=1e-4)
    with pytest.raises(ValueError, match=r"covariance\(\) needs the Jacobian"):
        fit.covariance()


def test_large_problems_never_form_it():
    n = 20_000

    def chain(x):
        return jnp.concatenate([10 * (x[1:] - x[:-1] ** 2), 1 - x[:-1]])

    solve = jax.jit(lambda x: curvature.least_squares(chain, x))
    compiled = solve.lower(jnp.full(n, 0.5)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 200 * n * 8
    fit = compiled(jnp.full(n, 0.5))
    assert fit.success
    np.testing.assert_allclose(fit.x, 1.0, atol=1e-6)


def test_the_same_function_and_shapes_are_traced_once():
    traces = []

    def traced(x, target):
        traces.append(1)
        return rosenbrock(x) - target

    curvature.least_squares(traced, jnp.array([-1.2, 1.0]), (jnp.zeros(2),))
    count = len(traces)
    curvature.least_squares(traced, np.array([0.5, 1.0]), (jnp.ones(2),), gtol=1e-3, max_steps=7, f_scale=2.0)
    assert len(traces) == count


@pytest.mark.slow
@pytest.mark.parametrize("solver", [curvature.levenberg_marquardt(), curvature.gauss_newton()], ids=["lm", "gn"])
def test_step_by_step_as_optax_does(solver):
    def residuals(params, data):
        return params["w"] ** 2 + params["b"] - data

    params = {"w": jnp.array([1.0, 2.0, 0.5]), "b": jnp.asarray(0.1)}
    data = jnp.array([4.0, 1.0, 2.0])
    loss = lambda params: jnp.sum(residuals(params, data) ** 2) / 2
    chained = optax.chain(solver, optax.scale(1.0))
    state = chained.init(params)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for _ in range(12):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = chained.update(
            grad, state, params, value=value, grad=grad, value_fn=loss, residual_fn=residuals, data=data, unrelated=7
        )
        params = optax.apply_updates(params, updates)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert loss(params) < 1e-20


def test_the_same_settings_are_the_same_object():
    assert curvature.levenberg_marquardt("dogleg") is curvature.levenberg_marquardt("dogleg")
    assert curvature.gauss_newton() is curvature.gauss_newton()


FALLING = np.linspace(0.0, 4.0, 40)


def parabola(x, of_x, of_r):
    return of_r * ((of_x * x) ** 2 + 5)


@pytest.mark.thin
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("method", METHODS)
def test_the_jacobian_may_vanish_at_the_solution(method, dtype):
    for of_x, of_r in ((1.0, 1.0), (1e6, 1e-6), (1e-6, 1e6)):
        units = (dtype(of_x), dtype(of_r))
        fit = curvature.least_squares(parabola, np.array([1 / of_x], dtype), units, method=method)
        assert fit.success
        np.testing.assert_allclose(fit.value, of_r**2 * 12.5, rtol=1e-6)


@pytest.mark.parametrize("method", ["levenberg-marquardt", "dogleg"])
@pytest.mark.parametrize(
    ("loss", "least"), [("soft_l1", np.sqrt(26) - 1), ("huber", 4.5), ("cauchy", np.log(26) / 2)], ids=lambda v: str(v)
)
def test_the_jacobian_may_vanish_under_robust_losses(loss, least, method, dtype):
    """The last step may be rejected because all values are level: then the decrement is still to be asked."""
    fit = curvature.least_squares(lambda x: x**2 + 5, jnp.ones(1, dtype), loss=loss, method=method)
    assert fit.success
    np.testing.assert_allclose(fit.value, least, rtol=64 * jnp.finfo(dtype).eps)


@pytest.mark.parametrize("method", ["levenberg-marquardt", "dogleg"])
@pytest.mark.parametrize(
    ("fun", "least"),
    [(lambda x: jnp.stack([x[0] ** 2 + 5, x[1] - 1]), 12.5), (lambda x: jnp.sum(x**2)[None] + 1, 0.5)],
    ids=["one of two", "fewer residuals"],
)
def test_newton_steps_where_the_jacobian_leads_nowhere(fun, least, method, dtype):
    """In single precision the sum is level to rounding before the decrement is small."""
    starts = np.random.default_rng(0).normal(size=(24, 2)).astype(dtype)
    fits = jax.jit(jax.vmap(lambda x: curvature.least_squares(fun, x, method=method)))(starts)
    assert jnp.all(fits.success)
    np.testing.assert_allclose(fits.value, least, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("power", [2, 4])
def test_one_column_may_vanish_at_the_solution(power):
    """The best offset is negative, and no power gives it: then it is zero, and the other two parameters are fitted."""
    data = 2 * np.exp(-FALLING) - 0.1
    params, covariance = curvature.curve_fit(
        lambda p, t: p[0] * jnp.exp(-p[2] * t) + p[1] ** power, FALLING, data, np.array([1.0, 0.5, 0.5])
    )
    theirs = scipy.optimize.curve_fit(lambda t, a, rate: a * np.exp(-rate * t), FALLING, data, (1.0, 0.5))[0]
    np.testing.assert_allclose(params[::2], theirs, rtol=1e-6)
    np.testing.assert_allclose(params[1], 0.0, atol=1e-3)
    assert not jnp.any(jnp.isnan(covariance))


def test_a_maximum_at_which_the_jacobian_vanishes_is_no_success():
    fit = curvature.least_squares(lambda x: 5 - x**2, jnp.zeros(1))
    np.testing.assert_allclose(abs(fit.x), np.sqrt(5), rtol=1e-12)  # the Hessian curves down, and leads to a root
    for method in ("dogleg", "gauss-newton"):
        assert not curvature.least_squares(lambda x: 5 - x**2, jnp.zeros(1), method=method).success


def test_a_plateau_is_left_though_the_sum_is_level_there(dtype):
    """Far out the three columns are parallel up to rounding, and in single precision no step lowers the sum.

    The Hessian curves down, and shows the way back to the data.
    """
    t = np.linspace(0, 0.09, 100)
    widths = np.array([0.01, 0.015, 0.02, 0.025, 0.03])
    data = np.exp(-(((t - 0.045) / widths[:, None]) ** 2)) + 0.05

    def peak(p, t, y):
        return p[0] * jnp.exp(-((t - p[1]) ** 2) / p[2] ** 2) - y

    start = np.array([1, 0, 1], dtype)
    fits = jax.jit(jax.vmap(lambda y: curvature.least_squares(peak, start, (t.astype(dtype), y))))(data.astype(dtype))
    least = [
        scipy.optimize.least_squares(peak, [1.0, 0.045, w], args=(t, y)).cost for w, y in zip(widths, data, strict=True)
    ]
    assert jnp.all(fits.success)
    np.testing.assert_allclose(fits.value, least, rtol=1e-5)


@pytest.mark.parametrize("solver", [curvature.levenberg_marquardt(), curvature.gauss_newton()], ids=["lm", "gn"])
def test_what_the_jacobian_knows_is_not_lost_in_its_square(solver):
    """The columns differ by 1e-4, whose square is lost beside 1; a step along their difference removes 0.005."""
    x = jnp.zeros(2, jnp.float32)
    state = solver.update(
        None,
        solver.init(x),
        x,
        residual_fn=lambda x: jnp.stack([x[0] + x[1], 1e-4 * x[1] - 5e-3, 1 + 0 * x[0]]),
        request=Request(decrement=jnp.asarray(True), shorter=jnp.asarray(False)),
    )[1]
    np.testing.assert_allclose(state.decrement, 5e-3, rtol=1e-2)


def test_a_saddle_where_two_terms_merge_is_left():
    """SciPy's data of gh-4555: its own fit ends beside the saddle, at 3.793."""
    rng = np.random.default_rng(408113519974467917)
    x = np.arange(100.0)
    data = np.linspace(2, 7, 100) + rng.random(100)
    fit = curvature.least_squares(
        lambda p, x, y: p[0] * jnp.log(x + 1 + p[1]) + p[2] * jnp.log(x + 1 + p[3]) + p[4] - y, np.ones(5), (x, data)
    )
    assert fit.success
    np.testing.assert_allclose(fit.value, 3.7166137347, rtol=1e-9)


def test_the_saddle_where_two_terms_merge_is_no_success_in_single_precision():
    """There the Hessian is singular up to the rounding of ``sum_i r_i H_i``, which is far below that of ``J'J``.

    Only its fourth order says that the sum may fall on: what the Jacobian leaves of the second derivative along the
    merging direction is small, and a thousand times its rounding.
    """
    rng = np.random.default_rng(408113519974467917)
    x = np.arange(100.0, dtype=np.float32)
    data = np.float32(np.linspace(2, 7, 100) + rng.random(100))

    def merging(p, x, y):
        return p[0] * jnp.log(x + 1 + p[1]) + p[2] * jnp.log(x + 1 + p[3]) + p[4] - y

    starts = np.float32(1 + 1e-6 * np.random.default_rng(0).normal(size=(24, 5)))
    fits = jax.jit(jax.vmap(lambda start: curvature.least_squares(merging, start, (x, data))))(starts)
    assert not jnp.any(fits.success & (fits.value > 3.72))


@pytest.mark.thin
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("amplitude", [0.1, 1.0])
@pytest.mark.parametrize("start", [(1.0, 1.0), (-1.0, 20.0), (30.0, 0.01)])
def test_second_derivatives_that_are_not_finite_are_left_out(start, amplitude, dtype):
    # a root with a guard at zero: in reverse mode, and so in second derivatives, its derivative there is zero times inf
    t = np.linspace(0, 4, 9)
    y = 2 * np.exp(-np.sqrt(0.7 * t)) + amplitude * np.cos(7 * t)

    def residuals(p, t, y):
        return p[0] * jnp.exp(-jnp.where(t > 0, jnp.sqrt(p[1] * t), 0.0)) - y

    fit = curvature.least_squares(residuals, jnp.asarray(start, dtype), (jnp.asarray(t, dtype), jnp.asarray(y, dtype)))
    want = scipy.optimize.least_squares(
        lambda p: p[0] * np.exp(-np.sqrt(p[1] * t)) - y, [2.0, 0.7], bounds=([-99, 1e-9], 99), xtol=1e-15, ftol=1e-15
    )
    assert fit.success
    np.testing.assert_allclose(fit.value, want.cost, rtol=1e-5 if dtype == np.float32 else 1e-10)


def test_steps_to_where_derivatives_are_not_finite_are_taken_back():
    """In single precision ``exp(-p1)`` overflows on the way: the value is finite there, and its derivative NaN."""
    k = np.arange(27.0)
    data = 1.2 / (1 + np.exp(130 - 9 * k)) + 0.02 * np.sin(7 * k)
    fit = curvature.least_squares(
        lambda p, k, y: p[0] / (1 + jnp.exp(-(p[1] + p[2] * k))) - y,
        np.array([1, 0, 0], np.float32),
        (np.float32(k), np.float32(data)),
    )
    assert Status(int(fit.status)) not in (Status.NONFINITE, Status.NONFINITE_START)
    assert jnp.all(jnp.isfinite(fit.grad))
    assert fit.x[1] < -85  # up to 88.7, where exp overflows: the lowest sum with derivatives
    assert fit.value < 0.0040


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_gauss_newton_takes_steps_back_too(solver):
    def residuals(x):  # finite everywhere, with the derivative NaN beyond 0.2, to where the first step leads
        beyond = x > 0.2
        return jnp.exp(x) - 1 + jnp.where(beyond, jnp.sqrt(jnp.where(beyond, x - x, 1)), 0)

    fit = curvature.least_squares(residuals, jnp.array([-0.7]), method=curvature.gauss_newton(solver))
    assert fit.success
    np.testing.assert_allclose(fit.x, 0, atol=1e-7)


@pytest.mark.parametrize("loss", ["linear", "huber"])
def test_the_decrement_is_compiled_only_for_fits_that_ask_for_it(monkeypatch, loss):
    traced, newton = [], _residual_method.newton
    monkeypatch.setattr(_residual_method, "newton", lambda *args: traced.append(args) or newton(*args))
    t = jnp.linspace(0.0, 2.0, 9)

    def decay(p, y):
        return p[0] * jnp.exp(-p[1] * t) - y

    fit = curvature.least_squares(decay, jnp.ones(2), 2 * jnp.exp(-0.5 * t), loss=loss)
    assert fit.status == Status.CONVERGED
    assert not traced
    # Where the residuals do not reach zero the Jacobian vanishes at the minimizer, and only the Hessian can tell.
    fit = curvature.least_squares(lambda x: x**2 + 5, jnp.ones(1), loss=loss)
    assert fit.status == Status.CONVERGED
    assert traced
    steps = jax.jit(lambda x: curvature.least_squares(lambda x: x**2 + 5, x, loss=loss).num_steps)(jnp.ones(1))
    assert fit.num_steps == steps  # one program or two: the same solve


@pytest.mark.parametrize("loss", ["linear", "huber", "cauchy"])
@pytest.mark.parametrize("tested", [None, True])
def test_the_hessians_of_residuals_are_those_of_jax_with_few_variables_and_with_many(loss, tested, monkeypatch):
    x, data = jnp.array([2.0, 1.1, 0.3]), (jnp.asarray(T), jnp.asarray(Y))
    found = []
    for few in (10, 0):
        monkeypatch.setattr(_modes, "_FORWARD_VARIABLES", few)
        linear = _residuals.linearize_residuals(
            lambda x: decay(x, *data), x, loss=loss, scale=jnp.asarray(0.5), dense=True
        )
        found.append(linear.second_order(None if tested is None else jnp.asarray(tested)))
    assert_trees_close(*found)
    if loss == "linear":
        want = jnp.einsum("m,mij->ij", decay(x, *data), jax.hessian(lambda x: decay(x, *data))(x))
        assert_close(found[0].matrix, want)
