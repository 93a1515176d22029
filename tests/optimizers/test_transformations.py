"""newton and trust_region as optax transformations, exactly where optax.lbfgs() stands."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature
from curvature import Status
from tests.optimizers.problems import rosenbrock
from tests.oracles import assert_close, assert_trees_close

SOLVERS = {
    "newton": curvature.newton(),
    "newton_cg": curvature.newton_cg(),
    "cg": curvature.trust_region("cg"),
    "gltr": curvature.trust_region("gltr"),
    "exact": curvature.trust_region("exact"),
    "cubic_newton": curvature.cubic_newton(),
    "bfgs": curvature.bfgs(),
    "lbfgs": curvature.lbfgs(),
    "sr1": curvature.sr1(),
}
solvers = pytest.mark.parametrize("solver", [*SOLVERS.values(), optax.lbfgs()], ids=[*SOLVERS, "optax.lbfgs"])
ours = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)


@pytest.mark.thin
@solvers
def test_the_loop_of_optax_documentation(solver):
    params = jnp.array([-1.2, 1.0])
    state = solver.init(params)
    value_and_grad = optax.value_and_grad_from_state(rosenbrock)

    @jax.jit
    def step(params, state):
        value, grad = value_and_grad(params, state=state)
        updates, state = solver.update(grad, state, params, value=value, grad=grad, value_fn=rosenbrock)
        return optax.apply_updates(params, updates), state

    with jax.numpy_dtype_promotion("standard"):  # which optax.lbfgs needs
        for _ in range(60):
            params, state = step(params, state)
    np.testing.assert_allclose(params, 1.0, rtol=1e-5)


@pytest.mark.thin
@ours
def test_data_reaches_value_fn_by_name_and_strangers_do_not(solver):
    def loss(params, batch):
        return jnp.sum((params["w"] - batch) ** 2) + params["b"] ** 2

    params = {"w": jnp.zeros(3), "b": jnp.asarray(1.0)}
    chained = optax.chain(solver, optax.scale(1.0))
    state = chained.init(params)

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params, jnp.arange(3.0))
        updates, state = chained.update(
            grad, state, params, value=value, grad=grad, value_fn=loss, batch=jnp.arange(3.0), unrelated=7
        )
        return optax.apply_updates(params, updates), state

    for _ in range(25):
        params, state = step(params, state)
    assert_trees_close(params, {"w": jnp.arange(3.0), "b": jnp.asarray(0.0)}, roundings=1e6)


@pytest.mark.thin
@ours
def test_states_are_plain_and_keep_their_shapes(solver):
    params = {"w": jnp.ones(3), "b": jnp.asarray(1.0)}
    state = solver.init(params)
    value_fn = lambda p: jnp.sum(p["w"] ** 4) + p["b"] ** 2
    value, grad = jax.value_and_grad(value_fn)(params)
    _, after = solver.update(grad, state, params, value=value, grad=grad, value_fn=value_fn)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(after))


def test_the_same_settings_are_the_same_object():
    assert curvature.trust_region("exact", initial_radius=2.0) is curvature.trust_region("exact", initial_radius=2.0)
    assert curvature.newton() is curvature.newton()


def test_a_step_that_cannot_be_found_is_zero_and_says_why():
    params = jnp.array([1.0, 1.0])
    solver = curvature.trust_region("exact")
    value, grad = jax.value_and_grad(rosenbrock)(params + 0.1)
    wrong = lambda x: -1e3 * jnp.sum(x) + jnp.nan
    step, state = solver.update(grad, solver.init(params), params, value=value, grad=grad, value_fn=wrong)
    assert_close(step, jnp.zeros(2))
    assert state.status != Status.RUNNING


def test_the_radius_grows_where_the_model_is_good_and_bounds_the_step():
    solver = curvature.trust_region("cg", initial_radius=0.5)
    params = jnp.array([10.0, 0.0])
    quadratic = lambda x: jnp.sum(x**2) / 2
    value, grad = jax.value_and_grad(quadratic)(params)
    step, state = solver.update(grad, solver.init(params), params, value=value, grad=grad, value_fn=quadratic)
    assert_close(jnp.linalg.norm(step), 0.5)
    assert state.radius > 0.5
    assert state.num_inner_steps == 1


@pytest.mark.parametrize("name", ["newton", "exact"])
def test_one_newton_step_solves_a_quadratic(name):
    matrix = jnp.array([[4.0, 1.0], [1.0, 3.0]])
    quadratic = lambda x: x @ matrix @ x / 2 - jnp.sum(x)
    params = jnp.array([0.1, 0.2])
    solver = curvature.newton() if name == "newton" else curvature.trust_region("exact", initial_radius=100.0)
    value, grad = jax.value_and_grad(quadratic)(params)
    step, _ = solver.update(grad, solver.init(params), params, value=value, grad=grad, value_fn=quadratic)
    assert_close(params + step, jnp.linalg.solve(matrix, jnp.ones(2)))


@pytest.mark.thin
@pytest.mark.parametrize("subproblem", ["cg", "exact"])
@pytest.mark.parametrize("bad", [0.0, jnp.nan])
def test_one_bad_gradient_does_not_poison_the_state(subproblem, bad):
    quadratic = lambda x: jnp.sum((x - 1) ** 2)
    solver = curvature.trust_region(subproblem)
    params = jnp.zeros(2)
    state = solver.init(params)
    value, grad = jax.value_and_grad(quadratic)(params)
    step, state = solver.update(bad * grad, state, params, value=value, value_fn=quadratic)
    assert jnp.all(jnp.isfinite(step))
    assert jnp.isfinite(state.radius)
    for _ in range(9):
        value, grad = jax.value_and_grad(quadratic)(params)
        step, state = solver.update(grad, state, params, value=value, value_fn=quadratic)
        params = params + step
    assert_close(params, jnp.ones(2), roundings=1e4)


def test_the_radius_may_be_an_array():
    solver = curvature.trust_region(initial_radius=jnp.asarray(0.25))
    assert solver.init(jnp.zeros(3)).radius == 0.25
    with jax.numpy_dtype_promotion("standard"):  # which optax needs
        injected = optax.inject_hyperparams(curvature.trust_region)(initial_radius=0.5)
        assert injected.init(jnp.zeros(3)).inner_state.radius == 0.5
