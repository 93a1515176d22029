"""minimize: right minimizers, true statuses, counted evaluations, under jit and vmap, by any optax method."""

import gc
import weakref
from typing import NamedTuple

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import curvature
from curvature import Status
from tests.optimizers.problems import PROBLEMS, rosenbrock, wood
from tests.oracles import assert_close, dense_hessian
from tests.scenarios import SCENARIOS, forward_only, reverse_only

METHODS = ["newton", "trust-exact", "trust-region"]
methods = pytest.mark.parametrize("method", METHODS)


@pytest.mark.thin
@methods
@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: problem.name)
def test_classical_problems(problem, method, dtype):
    result = curvature.minimize(problem.fun, jnp.asarray(problem.start, dtype), method=method)
    single = dtype == jnp.float32
    assert result.status == Status.CONVERGED
    assert result.x.dtype == result.value.dtype == result.grad.dtype == dtype
    scale = np.maximum(np.abs(problem.minimizer), 1e-6 if problem.name == "brown_badly_scaled" else 1)
    error = np.max(np.abs(np.asarray(result.x, float) - problem.minimizer) / scale)
    assert error <= (max(1e-2, 10 * problem.accuracy) if single else problem.accuracy)
    assert result.num_steps <= 70
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(result.value, problem.fun(result.x), rtol=1e-4, atol=eps**1.5)
    # One rounding of x at the minimizer of Brown's function changes the gradient by eps * 1e12 * 2e-6.
    assert jnp.max(jnp.abs(result.grad)) <= (16 * eps * 2e6 if problem.name == "brown_badly_scaled" else eps**0.5)


@methods
@pytest.mark.parametrize("scale", [1e-9, 1e-20, 1e12])
def test_the_scale_of_the_objective_changes_nothing(method, scale):
    start = jnp.array([-1.2, 1.0])
    plain = curvature.minimize(rosenbrock, start, method=method, gtol=0, rtol=1e-8)
    scaled = curvature.minimize(lambda x: scale * rosenbrock(x), start, method=method, gtol=0, rtol=1e-8)
    assert plain.success
    assert scaled.success
    assert plain.num_steps == scaled.num_steps
    assert_close(scaled.x, plain.x, roundings=1e4)


@methods
def test_a_thousand_starts_each_report_their_own_status(method):
    starts = np.random.default_rng(0).uniform(-3, 3, size=(1000, 2))
    starts[7] = np.nan
    starts[11] = [1.0, 1.0]
    solve = jax.jit(jax.vmap(lambda x: curvature.minimize(rosenbrock, x, method=method, max_steps=35)))
    result = solve(jnp.asarray(starts))
    assert result.status.shape == result.num_steps.shape == (1000,)
    assert result.status[7] == Status.NONFINITE_START
    assert (result.status[11], result.num_steps[11]) == (Status.CONVERGED, 0)
    assert set(result.status.tolist()) <= {Status.CONVERGED, Status.MAX_STEPS, Status.NONFINITE_START}
    solved = result.status == Status.CONVERGED
    assert jnp.sum(solved) > 800
    assert len(set(result.num_steps.tolist())) > 5
    assert jnp.max(jnp.abs(jnp.where(solved[:, None], result.x - 1, 0))) < 1e-5
    assert jnp.all(jnp.where(result.status == Status.MAX_STEPS, result.num_steps == 35, True))
    assert result.message[7] == Status.NONFINITE_START.message
    alone = curvature.minimize(rosenbrock, jnp.asarray(starts[3]), method=method, max_steps=30)
    assert alone.num_steps == result.num_steps[3]


@methods
def test_one_linearization_a_step_and_no_hessian_at_a_rejected_point(method):
    """Counts by callbacks: the objective at every trial and once more at every accepted point, its Hessian there."""
    evaluations, hessians = [], []

    def observed(x):
        jax.debug.callback(lambda: evaluations.append(1))
        return rosenbrock(x)

    def observed_hessian(x):
        jax.debug.callback(lambda: hessians.append(1))
        return jax.hessian(rosenbrock)(x)

    trials = []
    start = jnp.array([-1.2, 1.0])
    result = curvature.minimize(
        observed, start, method=method, hessian=None if method == "trust-region" else observed_hessian, gtol=1e-8,
        callback=lambda step: trials.append(int(step.state.num_trials)),
    )  # fmt: skip
    jax.block_until_ready(result)
    jax.effects_barrier()
    steps = int(result.num_steps)
    assert len(trials) == steps + 1
    assert sum(trials) > steps, "no step was rejected: the count would show nothing"
    assert len(evaluations) == (steps + 1) + sum(trials)
    assert len(hessians) == (0 if method == "trust-region" else steps)


def test_calling_again_does_not_retrace():
    traces = []

    def traced(x, shift):
        traces.append(1)
        return rosenbrock(x - shift)

    curvature.minimize(traced, jnp.zeros(2), (0.5,))
    count = len(traces)
    for shift in (1.0, 2.0):
        result = curvature.minimize(traced, jnp.ones(2), (shift,), gtol=1e-6, rtol=1e-9, max_steps=200)
        assert_close(result.x, jnp.full(2, 1 + shift), roundings=1e12)
    assert len(traces) <= 2 * count  # gtol=None and a number are two programs
    count = len(traces)
    curvature.minimize(traced, jnp.zeros(2), (3.0,), gtol=1e-5, method=curvature.trust_region("exact"))
    assert len(traces) == count


@pytest.mark.thin
@methods
@pytest.mark.parametrize("scenario", SCENARIOS[1:3], ids=lambda scenario: scenario.name)
def test_trees_and_data(scenario, method):
    x0, args = scenario.make(jnp.float64)
    result = jax.jit(lambda x0, args: curvature.minimize(scenario.fun, x0, args, method=method))(x0, args)
    assert result.success
    assert jax.tree.structure(result.x) == jax.tree.structure(result.grad) == jax.tree.structure(x0)
    assert np.all(np.linalg.eigvalsh(dense_hessian(scenario.fun, result.x, *args)) > 0)


def test_a_single_argument_need_not_be_a_tuple():
    result = curvature.minimize(lambda x, c: jnp.sum((x - c) ** 2), jnp.zeros(3), jnp.arange(3.0))
    assert_close(result.x, jnp.arange(3.0))


@pytest.mark.parametrize(
    ("method", "max_steps"), [(optax.lbfgs(), 200), (optax.adam(0.05), 5000), (optax.chain(curvature.newton()), 100)]
)
def test_any_optax_transformation_is_driven(method, max_steps):
    x0 = {"a": jnp.array([-1.2]), "b": jnp.asarray(1.0)}
    fun = lambda x: rosenbrock(jnp.stack([x["a"][0], x["b"]]))
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        result = curvature.minimize(fun, x0, method=method, gtol=1e-5, max_steps=max_steps)
    assert result.success
    np.testing.assert_allclose(result.x["a"], 1.0, rtol=1e-4)


@pytest.mark.slow
def test_objectives_that_some_modes_cannot_differentiate():
    for fun in (lambda x: jnp.sum(x**2 - reverse_only(x)), lambda x: jnp.sum(forward_only(x) ** 2 + (x - 1) ** 2)):
        for method in METHODS:
            assert curvature.minimize(fun, jnp.array([0.5, -0.8]), method=method, gtol=1e-6).success


def test_rules_of_status():
    def status(fun, x0, **options):
        return Status(int(curvature.minimize(fun, jnp.asarray(x0), **options).status))

    quadratic = lambda x: jnp.sum((x - 1) ** 2)
    assert status(quadratic, [1.0, 1.0]) == Status.CONVERGED
    assert status(lambda x: 0 * jnp.sum(x) + 3, [1.0, 2.0]) == Status.CONVERGED
    assert status(quadratic, [3.0], max_steps=0) == Status.MAX_STEPS
    assert status(lambda x: jnp.sum(jnp.log(x)), [-1.0]) == Status.NONFINITE_START
    for method in METHODS:
        assert status(lambda x: -jnp.sum(x**4), [1.0, 2.0], method=method) == Status.UNBOUNDED
        assert status(quadratic, [5.0], method=method, gtol=0, rtol=0, max_steps=50) == Status.CONVERGED
        assert status(wood, [-3.0, -1, -3, -1], method=method, max_steps=3) == Status.MAX_STEPS


@methods
def test_failure_returns_the_best_point(method):
    result = curvature.minimize(wood, jnp.array([-3.0, -1.0, -3.0, -1.0]), method=method, max_steps=5)
    assert not result.success
    assert result.value < wood(jnp.array([-3.0, -1.0, -3.0, -1.0])) / 10
    assert_close(result.value, wood(result.x))
    assert_close(result.grad, jax.grad(wood)(result.x))


def test_a_wandering_method_returns_the_lowest_point_seen():
    seen = []
    result = curvature.minimize(
        lambda x: jnp.sum(x**2), jnp.ones(2), method=optax.sgd(1.05), gtol=0, max_steps=20,
        callback=lambda step: seen.append(float(step.value)),
    )  # fmt: skip
    jax.effects_barrier()
    assert len(seen) == 21
    assert result.status == Status.MAX_STEPS
    assert_close(result.value, min(seen))


@methods
def test_nan_at_a_trial_point_means_shrink(method):
    """A barrier: the full first step leaves the domain, where the objective is NaN."""
    fun = lambda x: jnp.sum(x - jnp.log(x)) if method != "newton" else jnp.sum(x - 0.1 * jnp.log(x))
    result = curvature.minimize(fun, jnp.array([5.0, 3.0]), method=method)
    assert result.success


@methods
def test_a_nan_hessian_is_reported(method):
    def fun(x):  # value and gradient are finite at 0, the second derivative is not
        return jnp.sum(jnp.abs(x) ** 1.5) + jnp.sum(x)

    result = curvature.minimize(fun, jnp.zeros(2), method=method)
    assert result.status == Status.NONFINITE
    assert jnp.all(jnp.isfinite(result.x))


@methods
def test_saddles_are_left(method):
    fun = lambda x: x[0] ** 2 - x[1] ** 2 + x[1] ** 4
    result = curvature.minimize(fun, jnp.array([1.0, 1e-6]), method=method)
    assert result.success
    assert_close(result.value, -0.25, roundings=1e4)


@pytest.mark.thin
@pytest.mark.parametrize("x0", [2.0, jnp.asarray(2.0), jnp.array([2.0]), np.array([[2.0]]), {"s": 2.0}])
def test_scalars_and_size_one(x0):
    fun = lambda x: jnp.sum((jax.tree.leaves(x)[0] - 3) ** 2)
    result = curvature.minimize(fun, x0)
    assert result.success
    assert_close(jax.tree.leaves(result.x)[0].reshape(()), 3.0)


def test_leaves_of_low_and_different_precision():
    x0 = {"low": jnp.zeros(2, jnp.bfloat16), "single": jnp.zeros(2, jnp.float32)}

    def fun(x):
        return jnp.sum((x["low"].astype(jnp.float32) - 1) ** 2) + jnp.sum((x["single"] - 2) ** 2)

    for method in METHODS:
        result = curvature.minimize(fun, x0, method=method)
        assert result.success
        assert result.x["low"].dtype == jnp.bfloat16
        np.testing.assert_allclose(result.x["single"], 2.0, atol=0.05)  # gtol follows the lowest precision


@pytest.mark.parametrize("method", ["bfgs", "l-bfgs", "sr1"])
def test_the_test_holds_at_the_returned_point_as_its_leaves_are_rounded(method):
    """A step of 1e4 in single precision ends 5e-4 beside the sum in double precision."""
    x0 = {"single": jnp.asarray(1e4, jnp.float32), "double": jnp.asarray(0.0)}

    def fun(x):
        return (x["single"].astype(jnp.float64) - jnp.pi) ** 2 / 2 + x["double"] ** 2 / 2

    result = curvature.minimize(fun, x0, method=method)
    slope = max(abs(float(g)) for g in jax.grad(fun)(result.x).values())
    assert result.success
    assert slope <= float(jnp.finfo(jnp.float32).eps) ** 0.5


def test_a_supplied_hessian_is_used():
    x0, args = SCENARIOS[2].make(jnp.float64)
    for method in ("newton", "trust-exact"):
        result = curvature.minimize(
            SCENARIOS[2].fun, x0, args, method=method, hessian=curvature.hessian(SCENARIOS[2].fun)
        )
        plain = curvature.minimize(SCENARIOS[2].fun, x0, args, method=method)
        assert result.success
        assert result.num_steps == plain.num_steps


def test_the_callback_sees_every_iterate_in_order():
    steps = []
    result = curvature.minimize(rosenbrock, jnp.array([-1.2, 1.0]), callback=steps.append)
    jax.effects_barrier()
    assert [int(step.num_steps) for step in steps] == list(range(int(result.num_steps) + 1))
    np.testing.assert_allclose(steps[-1].value, result.value, rtol=1e-9, atol=1e-20)  # what rounding leaves of 24
    assert np.all(np.diff([float(step.value) for step in steps]) <= 0)


@pytest.mark.slow
def test_digits_agree_with_scikit_learn():
    """Multinomial logistic regression with an L2 term on real data: DESIGN's smallest honest problem."""
    images, labels = load_digits(return_X_y=True)
    images = images / 16
    l2 = 1e-3

    def loss(params, images, labels):
        logits = images @ params["weights"] + params["bias"][None]
        fit = jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))
        return fit + l2 / 2 * jnp.sum(params["weights"] ** 2)

    params = {"weights": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}
    data = (jnp.asarray(images), jnp.asarray(labels))
    result = curvature.minimize(loss, params, data, method="trust-region", gtol=1e-9)
    assert result.success
    assert result.num_steps <= 20
    peer = LogisticRegression(C=1 / (l2 * len(images)), solver="newton-cholesky", tol=1e-12, max_iter=1000)
    peer.fit(images, labels)
    theirs = loss({"weights": jnp.asarray(peer.coef_.T), "bias": jnp.asarray(peer.intercept_)}, *data)
    np.testing.assert_allclose(result.value, theirs, rtol=1e-8)


@pytest.mark.parametrize("last", [optax.scale(0.5), optax.clip_by_global_norm(0.5)], ids=["scale", "clip"])
def test_what_a_line_search_stored_counts_only_where_it_comes_last(last):
    fun = lambda x: jnp.sum((x - 3) ** 2)
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        method = optax.chain(optax.lbfgs(), last)
        result = curvature.minimize(fun, jnp.array([-1.2, 1.0]), method=method, gtol=1e-6, max_steps=10)
    assert_close(result.value, fun(result.x), roundings=1e4)
    assert_close(result.grad, 2 * (result.x - 3), roundings=1e4)
    assert result.success == (jnp.max(jnp.abs(result.grad)) <= 1e-6)


@pytest.mark.slow
@methods
def test_the_objective_may_differ_from_its_point_in_precision(method):
    data = jnp.arange(1.0, 4.0)
    mixed = lambda x, d: jnp.sum((x.astype(d.dtype) - d) ** 2)
    for x0, target in (
        (jnp.zeros(3, jnp.float32), data),
        (jnp.zeros(3), data.astype(jnp.float32)),
        (jnp.zeros(3, jnp.bfloat16), data.astype(jnp.bfloat16)),
    ):
        result = curvature.minimize(mixed, x0, (target,), method=method)
        assert result.success
        assert result.x.dtype == x0.dtype
        np.testing.assert_allclose(np.asarray(result.x, float), data, atol=0.05)


@pytest.mark.parametrize(("method", "most"), [("trust-exact", 811), ("bfgs", 785), ("l-bfgs", 840)])
def test_the_program_stays_small(method, most):
    # what the first call of a small problem takes is compilation, which goes by the number of operations; the test of
    # stationarity to rounding takes a hundred and fifty of them
    def count(jaxpr):
        bodies = [body for eqn in jaxpr.eqns for body in jex.core.jaxprs_in_params(eqn.params)]
        return len(jaxpr.eqns) + sum(map(count, bodies))

    program = jax.make_jaxpr(lambda x: curvature.minimize(rosenbrock, x, method=method))(jnp.zeros(3))
    assert count(program.jaxpr) <= most


def test_calling_again_traces_and_compiles_nothing():
    events = []

    def solve():
        return curvature.minimize(rosenbrock, x0, gtol=1e-6, rtol=1e-6, max_steps=100)

    def listen(event, duration_secs, **_):
        events.append(event)

    x0 = jnp.zeros(2)
    first = solve()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        again = solve()
        compiled = list(events)
        jax.jit(lambda x: x + 1)(x0)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled
    assert events, "the listener hears nothing: the count would show nothing"
    np.testing.assert_array_equal(again.x, first.x)


@pytest.mark.slow
@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda solve: jax.jit(jax.vmap(solve))])
def test_options_of_compilation_are_left_to_the_outermost_program(transform):
    def solve(start):  # alone it sets options, which JAX refuses of a program inside another
        return curvature.minimize(near, start).x

    def near(x):
        return jnp.sum((x - 1) ** 2)

    start = jnp.zeros((2, 2))
    alone = solve(start)
    assert_close(alone, jnp.ones((2, 2)), roundings=1e3)
    assert_close(transform(solve)(start), alone, roundings=1e3)
    np.testing.assert_array_equal(solve(start), alone)


@methods
def test_limits_of_any_type_find_the_same_program(method):
    traces = []

    def traced(x):
        traces.append(1)
        return rosenbrock(x)

    x0 = jnp.zeros(2, jnp.float32)
    curvature.minimize(traced, x0, method=method)
    count = len(traces)
    for rtol in (0, 1e-3, np.float32(1e-3), np.float64(1e-3), jnp.float32(1e-3)):
        curvature.minimize(traced, x0, method=method, gtol=1e-3, rtol=rtol, max_steps=jnp.int32(50))
    assert len(traces) == count


@pytest.mark.slow
def test_an_objective_is_not_kept_alive_nor_answered_from_an_older_state():
    class Model:
        shift = 1.0

        def loss(self, x):
            return jnp.sum((x - self.shift) ** 2)

    model = Model()
    assert_close(curvature.minimize(model.loss, jnp.zeros(2)).x, jnp.ones(2), roundings=1e6)
    model.shift = 5.0
    assert_close(curvature.minimize(model.loss, jnp.zeros(2)).x, jnp.full(2, 5.0), roundings=1e6)

    def closure(x):
        return model.loss(x)

    curvature.minimize(closure, jnp.zeros(2))
    reference = weakref.ref(closure)
    del closure
    gc.collect()
    assert reference() is None


@pytest.mark.slow
def test_closing_over_tracers_leaks_nothing():
    targets = jnp.arange(6.0).reshape(3, 2)
    with jax.checking_leaks():
        solve = jax.vmap(lambda a: curvature.minimize(lambda x: jnp.sum((x - a) ** 2), jnp.zeros(2)))
        assert_close(solve(targets).x, targets, roundings=1e6)


def test_a_given_hessian_frees_the_objective_from_second_derivatives():
    @jax.custom_vjp
    def opaque(x):
        return jax.pure_callback(lambda x: np.sum((np.asarray(x) - 1) ** 2), jax.ShapeDtypeStruct((), x.dtype), x)

    opaque.defvjp(lambda x: (opaque(x), x), lambda x, ct: (ct * 2 * (x - 1),))
    for method in ("newton", "trust-exact", "auto"):
        result = curvature.minimize(opaque, jnp.zeros(2), method=method, hessian=lambda x: 2 * jnp.eye(2))
        assert result.success
        assert_close(result.x, jnp.ones(2), roundings=1e6)


def test_a_named_tuple_is_one_argument():
    class Batch(NamedTuple):
        inputs: jax.Array
        targets: jax.Array

    batch = Batch(jnp.eye(2), jnp.array([1.0, 2.0]))
    result = curvature.minimize(lambda w, b: jnp.sum((b.inputs @ w - b.targets) ** 2), jnp.zeros(2), batch)
    assert_close(result.x, batch.targets, roundings=1e6)


@pytest.mark.parametrize("method", ["trust-exact", "trust-region"])
def test_a_linear_objective_falls_to_minus_infinity(method, dtype):
    result = curvature.minimize(lambda x: jnp.sum(x), jnp.ones(3, dtype), method=method)
    assert result.status == Status.UNBOUNDED
    assert jnp.isfinite(result.value)


def test_history_keeps_every_point_and_nothing_after_the_last():
    seen = []
    solve = lambda x0: curvature.minimize(rosenbrock, x0, method="newton", max_steps=40, history=True)
    result = jax.jit(jax.vmap(solve))(jnp.array([[-1.2, 1.0], [1.0, 1.0]]))
    assert result.history.value.shape == result.history.grad_norm.shape == (2, 41)
    curvature.minimize(rosenbrock, jnp.array([-1.2, 1.0]), method="newton", max_steps=40, callback=seen.append)
    jax.effects_barrier()
    values, norms = (np.asarray(column)[0] for column in result.history)
    assert len(seen) == result.num_steps[0] + 1
    np.testing.assert_allclose(values[: len(seen)], [step.value for step in seen], rtol=1e-6, atol=1e-15)
    np.testing.assert_allclose(norms[: len(seen)], [step.grad_norm for step in seen], rtol=1e-6, atol=1e-8)
    assert np.all(np.isnan(values[len(seen) :]))
    assert np.all(np.isnan(result.history.value[1, 1:]))
    assert_close(result.history.value[1, 0], 0.0)
    assert curvature.minimize(rosenbrock, jnp.ones(2), method="newton").history is None


def test_progress_speaks_seldom_and_says_how_it_ended(capsys):
    """A thousand quick steps: the host is asked after 1, 19, 199 steps and so on, and once at the end."""
    solve = lambda shift: curvature.minimize(
        lambda x: jnp.sum((x - shift) ** 2), jnp.ones(2), method=optax.sgd(1e-2), gtol=1e-6, progress=True
    )
    result = jax.block_until_ready(solve(0.0))
    jax.effects_barrier()
    lines = capsys.readouterr().err.split("\r")[1:]
    assert result.success
    assert 3 <= len(lines) <= 30
    assert lines[0].startswith(f"[{20 * '-'}] step      0  value  2.000000e+00  max|grad| 2.0e+00 of 1.0e-06")
    assert lines[-1].startswith(f"[{20 * '#'}] step {int(result.num_steps):6}")
    assert lines[-1].endswith("\n")
    assert_close(jax.grad(lambda shift: jnp.sum(solve(shift).x))(0.5), 2.0)
    jax.effects_barrier()


def test_progress_bears_gradients_that_single_precision_does_not_hold(capsys):
    result = curvature.minimize(lambda x: 1e40 * jnp.sum(x**2), jnp.ones(2), gtol=1e20, progress=True)
    jax.effects_barrier()
    assert result.success
    assert "max|grad| 2.0e+40 of 1.0e+20" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spelling", "name", "bounds"),
    [
        ("trust_region", "trust-region", None),
        ("trust_region", "trust-region", (-5.0, 5.0)),
        ("LBFGS", "l-bfgs", None),
        ("LBFGS", "l-bfgs", (-5.0, 5.0)),
        ("Newton_CG", "newton-cg", None),
        ("BFGS", "bfgs", None),
    ],
)
def test_a_method_may_be_spelled_as_its_function_in_any_case(spelling, name, bounds):
    spelled, named = (
        curvature.minimize(rosenbrock, jnp.zeros(3), method=method, bounds=bounds) for method in (spelling, name)
    )
    assert spelled.status == Status.CONVERGED
    np.testing.assert_array_equal(spelled.x, named.x)


def test_a_method_for_residuals_may_be_spelled_as_its_function():
    fit = curvature.least_squares(lambda x: x - 3, jnp.ones(2), method="Levenberg_Marquardt")
    np.testing.assert_allclose(fit.x, 3)
