"""minimize within bounds: minima of SciPy and of enumeration, true statuses, no point outside, one program."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

import curvature
from curvature import Status
from curvature.optimizers._bounds import Box, projected_gradient_norm, stay_inside
from tests.optimizers.problems import rosenbrock
from tests.oracles import assert_close

METHODS = ["trust-exact", "trust-region", "l-bfgs"]
methods = pytest.mark.parametrize("method", METHODS)


def chained_rosenbrock(x, scale=1.0):
    return scale * jnp.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2)


def quadratic(x, matrix, b):
    return x @ matrix @ x / 2 - b @ x


def logistic(x, inputs, labels):
    return jnp.mean(jnp.logaddexp(0.0, -labels * (inputs @ x["w"] + x["b"]))) + 1e-3 * jnp.sum(x["w"] ** 2)


def status_of(result):
    return Status(int(result.status))


def assert_stationary(result, lower, upper, tolerance=1e-6):
    """Feasible, and each entry's multiplier has the sign its bound allows: the KKT conditions in NumPy."""
    x, grad = np.asarray(result.x, float), np.asarray(result.grad, float)
    lower, upper = (np.broadcast_to(bound, x.shape) for bound in (lower, upper))
    assert np.all(lower <= x)
    assert np.all(x <= upper)
    near_lower, near_upper = x - lower <= tolerance, upper - x <= tolerance
    assert np.all((grad <= tolerance) | near_lower)
    assert np.all((grad >= -tolerance) | near_upper)


def box_minimum(matrix, b, lower, upper):
    """The minimum of a convex quadratic over a box, by solving on every face."""
    best, n = np.inf, len(b)
    for sides in itertools.product((-1, 0, 1), repeat=n):
        sides = np.array(sides)
        x, free = np.where(sides < 0, lower, upper), sides == 0
        if not np.all(np.isfinite(x[~free])):
            continue
        if free.any():
            rest = b[free] - matrix[np.ix_(free, ~free)] @ x[~free]
            x[free] = np.linalg.solve(matrix[np.ix_(free, free)], rest)
        if np.all((lower <= x) & (x <= upper)):
            best = min(best, x @ matrix @ x / 2 - b @ x)
    return best


@pytest.mark.thin
@methods
@pytest.mark.parametrize("upper", [[0.5] * 4, [2.0, np.inf, 0.3, 5.0], [-1.0, 3.0, 0.0, -0.5]])
def test_bounded_rosenbrock_agrees_with_scipy(method, upper):
    lower, start = np.full(4, -1.5), np.array([-1.2, 1.0, -0.5, 0.8])
    result = curvature.minimize(
        chained_rosenbrock, jnp.asarray(start), 1.0, method=method, bounds=(lower, np.array(upper)), gtol=1e-8
    )
    assert status_of(result) == Status.CONVERGED
    assert_stationary(result, lower, upper)
    gradient = jax.grad(chained_rosenbrock)
    best = min(
        scipy.optimize.minimize(
            chained_rosenbrock,
            np.asarray(result.x),
            jac=gradient,
            method=peer,
            bounds=list(zip(lower, upper, strict=True)),
            tol=1e-12,
        ).fun
        for peer in ("L-BFGS-B", "TNC")
    )
    np.testing.assert_allclose(result.value, best, rtol=1e-9, atol=1e-14)


@pytest.mark.slow
@methods
def test_quadratics_in_boxes_agree_with_enumeration(method):
    rng = np.random.default_rng(3)
    count, n = 60, 4
    factors = rng.normal(size=(count, n, n))
    matrices = factors @ factors.transpose(0, 2, 1) + 0.05 * np.eye(n)
    b, lower = 3 * rng.normal(size=(count, n)), rng.uniform(-1, 0.3, size=(count, n))
    upper = lower + rng.choice([0.0, 0.5, 1.0, np.inf], size=(count, n))  # fixed, bounded and free variables
    lower = np.where(rng.uniform(size=lower.shape) < 0.2, -np.inf, lower)

    @jax.jit
    @jax.vmap
    def solve(matrix, b, lower, upper):
        return curvature.minimize(quadratic, jnp.zeros(n), (matrix, b), method=method, bounds=(lower, upper), gtol=1e-9)

    result = solve(*map(jnp.asarray, (matrices, b, lower, upper)))
    assert set(result.status.tolist()) == {Status.CONVERGED}
    assert np.all((lower <= result.x) & (result.x <= upper))
    want = [box_minimum(*problem) for problem in zip(matrices, b, lower, upper, strict=True)]
    np.testing.assert_allclose(result.value, want, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@methods
def test_nonnegative_least_squares_agrees_with_scipy(method):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        inputs, targets = rng.normal(size=(9, 4)), rng.normal(size=9)
        want, norm = scipy.optimize.nnls(inputs, targets)
        normal = jnp.asarray(inputs.T @ inputs), jnp.asarray(inputs.T @ targets)
        result = curvature.minimize(quadratic, jnp.ones(4), normal, method=method, bounds=(0.0, None), gtol=1e-9)
        assert result.success
        np.testing.assert_allclose(result.x, want, atol=1e-8)
        np.testing.assert_array_equal(np.asarray(result.x) == 0, want == 0)
        np.testing.assert_allclose(result.value, (norm**2 - targets @ targets) / 2, rtol=1e-12)


@pytest.mark.slow
@methods
def test_logistic_regression_with_nonnegative_weights(method, dtype):
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(80, 6))
    labels = np.sign(inputs @ [2.0, -1.0, 0.5, 0.0, -2.0, 1.0] + rng.normal(size=80))
    data = jnp.asarray(inputs, dtype), jnp.asarray(labels, dtype)
    x0 = {"w": jnp.zeros(6, dtype), "b": jnp.asarray(0.0, dtype)}
    result = curvature.minimize(logistic, x0, data, method=method, bounds=({"w": 0.0, "b": None}, None))
    assert status_of(result) == Status.CONVERGED
    assert result.x["w"].dtype == dtype

    def flat(x):
        return logistic({"w": x[:6], "b": x[6]}, jnp.asarray(inputs), jnp.asarray(labels))

    peer = scipy.optimize.minimize(
        flat, np.zeros(7), jac=jax.grad(flat), method="trust-constr", tol=1e-10, bounds=[(0, None)] * 6 + [(None, None)]
    )
    np.testing.assert_allclose(result.value, peer.fun, rtol=1e-5 if dtype == jnp.float32 else 1e-8)
    assert np.sum(np.asarray(result.x["w"]) == 0) >= 2
    assert jnp.all(result.x["w"] >= 0)


@pytest.mark.slow
@methods
def test_no_point_outside_is_ever_evaluated(method):
    """Bounds that no rounding hits by chance; evaluations are observed by callbacks."""
    lower, upper = jnp.array([-1.7, 0.1]), jnp.array([0.3, 1.3])
    seen = []

    def observed(x):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x)
        return rosenbrock(x)

    result = curvature.minimize(observed, jnp.array([-1.2, 9.0]), method=method, bounds=(lower, upper))
    jax.effects_barrier()
    assert result.success
    assert len(seen) > int(result.num_steps)
    assert all(np.all((lower <= x) & (x <= upper)) for x in seen)


@methods
def test_degenerate_boxes_and_starts(method):
    center = jnp.arange(1.0, 5.0)

    def solve(x0, lower, upper, curvatures=(1.0, 1.0, 1.0, 1.0)):
        bounds = jnp.asarray(lower, float), jnp.asarray(upper, float)
        matrix = jnp.diag(jnp.array(curvatures))
        return curvature.minimize(quadratic, jnp.full(4, x0), (matrix, center), method=method, bounds=bounds, gtol=1e-9)

    fixed = solve(0.0, [0.5, -5, -5, 4], [0.5, 5, 5, 4])
    assert fixed.success
    assert_close(fixed.x, [0.5, 2.0, 3.0, 4.0], roundings=1e6)
    nothing_free = solve(9.0, 0.5, 0.5)
    assert (status_of(nothing_free), int(nothing_free.num_steps)) == (Status.CONVERGED, 0)
    inward = solve(0.0, 0.0, np.inf)
    assert inward.success
    assert_close(inward.x, center, roundings=1e6)
    vertex = solve(-3.0, -5.0, [0.5, 0.7, 0.9, 1.1])
    assert vertex.success
    assert_close(vertex.x, [0.5, 0.7, 0.9, 1.1])
    unbounded = solve(1.0, 0.5, [2.0, 2.0, 2.0, np.inf], (1.0, 1.0, 1.0, 0.0))
    assert status_of(unbounded) == Status.UNBOUNDED
    assert jnp.all(jnp.isfinite(unbounded.x))


@pytest.mark.slow
@methods
def test_an_objective_that_is_nan_on_the_bound(method):
    barrier = lambda x: jnp.sum(x * jnp.log(x) + 3 * x)  # NaN at 0, which is its bound; least at exp(-4)
    result = curvature.minimize(barrier, jnp.array([5.0, 0.5]), method=method, bounds=(0.0, None))
    assert result.success
    assert_close(result.x, np.full(2, np.exp(-4)), roundings=1e9)
    start = curvature.minimize(barrier, jnp.array([0.0, 0.5]), method=method, bounds=(0.0, None))
    assert status_of(start) == Status.NONFINITE_START


@pytest.mark.slow
@methods
def test_new_bounds_and_none_do_not_retrace(method):
    traces = []

    def traced(x):
        traces.append(1)
        return rosenbrock(x)

    solve = lambda *bounds: curvature.minimize(traced, jnp.array([-1.2, 1.0]), method=method, gtol=1e-8, bounds=bounds)
    solve(-1.0, 0.5)
    count = len(traces)
    assert_close(solve(None, None).x, jnp.ones(2), roundings=1e9)
    assert_close(solve(np.array([-2, -2]), jnp.array([0.25, np.inf])).x, [0.25, 0.0625], roundings=1e9)
    assert len(traces) == count


@methods
def test_the_scale_of_the_objective_changes_nothing(method):
    start, upper = jnp.array([-1.2, 1.0, -0.5, 0.8]), np.array([0.5, np.inf, 0.3, 5.0])
    solve = lambda scale: curvature.minimize(
        chained_rosenbrock, start, scale, method=method, bounds=(-1.5, upper), gtol=1e-9 * scale
    )  # bounds are in units of x, and so the test has a scale
    plain = solve(1.0)
    assert plain.success
    for scale in (2.0**-60, 2.0**10):
        assert solve(scale).success
        assert_close(solve(scale).x, plain.x, roundings=1e8)


@pytest.mark.slow
def test_single_precision_ends_with_a_true_status():
    for method, seed in itertools.product(METHODS, range(3)):
        rng = np.random.default_rng(seed)
        start = jnp.asarray(rng.uniform(-2, 2, 4), jnp.float32)
        gtol = jnp.finfo(jnp.float32).eps ** 0.5
        result = curvature.minimize(chained_rosenbrock, start, method=method, bounds=(-1.0, 0.9), gtol=gtol)
        assert status_of(result) in (Status.CONVERGED, Status.STALLED)
        norm = projected_gradient_norm(Box(jnp.full_like(start, -1), jnp.full_like(start, 0.9)), result.x, result.grad)
        assert (norm <= gtol) == bool(result.success)
        assert result.num_steps < 200


@pytest.mark.slow
def test_a_given_hessian_is_used_and_only_where_it_can_be():
    count = []

    def hessian(x):
        count.append(1)
        return jax.hessian(rosenbrock)(x)

    x0 = jnp.array([-1.2, 1.0])
    assert curvature.minimize(rosenbrock, x0, hessian=hessian, bounds=(None, 0.5)).success
    assert count
    with pytest.raises(ValueError, match=r"minimize: hessian= is for"):
        curvature.minimize(rosenbrock, x0, hessian=hessian, method="l-bfgs", bounds=(None, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        curvature.projected_newton(0.2, np.array([0.7, np.inf])),
        curvature.projected_newton(0.2, np.array([0.7, np.inf]), subproblem="exact"),
        curvature.lbfgsb(0.2, np.array([0.7, np.inf]), memory_size=3),
    ],
    ids=METHODS,
)
def test_step_by_step_as_optax_has_it(solver):
    params = jnp.array([0.2, 1.0])
    state = solver.init(params)
    value_and_grad = optax.value_and_grad_from_state(rosenbrock)

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=rosenbrock)
        return optax.apply_updates(params, updates), state

    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for _ in range(30):
        params, state = step(params, state)
        assert jnp.all(params >= 0.2)
        assert params[0] <= 0.7
    assert_close(params, [0.7, 0.49], roundings=1e8)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_a_step_to_a_bound_never_rounds_beyond_it(dtype):
    rng = np.random.default_rng(5)
    x = jnp.asarray(rng.normal(size=4000) * 10.0 ** rng.integers(-3, 4, 4000), dtype)
    upper = x + jnp.abs(jnp.asarray(rng.normal(size=4000) * 10.0 ** rng.integers(-6, 4, 4000), dtype))
    box = Box(x - 1, upper)
    landed = x + stay_inside(box, x, jnp.full_like(x, 1e9))
    assert jnp.all(landed <= upper)
    np.testing.assert_allclose(
        np.asarray(landed, float), np.asarray(upper, float), rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-2
    )
