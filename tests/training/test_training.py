"""kfac, natural_gradient, sophia, adahessian and Hessian-free steps: closed forms, and training on mini-batches."""

import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvature
from curvature.training import _damping, _stochastic
from tests.operators.models import quick_jit
from tests.oracles import assert_close, assert_trees_close, flat

KEY = jax.random.key(3)
_rng = np.random.default_rng(5)


def linear(params, inputs, targets):
    return inputs @ params["w"]


def half_squares(outputs, inputs, targets):
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1))


def network(params, inputs, labels):
    return jnp.tanh(inputs @ params["w"] + params["b"][None]) @ params["out"]


def cross_entropy(logits, inputs, labels):
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels))


def objective(params, inputs, labels):
    return cross_entropy(network(params, inputs, labels), inputs, labels)


def regression(size):
    return _rng.normal(size=(size, 3)), _rng.normal(size=(size, 2))


def batch(seed, size=16, dtype=np.float64):
    """Three classes of points, told apart by a direction each."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(size, 4))
    return inputs.astype(dtype), np.argmax(inputs[:, :3], axis=1).astype(np.int32)


def start(dtype=jnp.float64):
    rng = np.random.default_rng(1)
    shapes = {"w": (4, 5), "b": (5,), "out": (5, 3)}
    return {name: jnp.asarray(rng.normal(size=shape) / 2, dtype) for name, shape in shapes.items()}


LINEAR = {"w": _rng.normal(size=(3, 2))}
DATA, OTHER = regression(7), regression(6)


def linear_grad(params, data):
    return jax.grad(lambda params: half_squares(linear(params, *data), *data))(params)


def linear_fisher(data):
    """The Gauss-Newton matrix of the linear model: the mean of outer products of the inputs, for each output."""
    inputs = np.asarray(data[0])
    return np.kron(inputs.T @ inputs / len(inputs), np.eye(2))


@functools.partial(quick_jit, static_argnums=0, static_argnames="value_fn")
def update(method, grad, state, params, *, args=None, value_fn=None):
    """One step, compiled, since step by step even small programs are many."""
    return method.update(grad, state, params, args=args, value_fn=value_fn)


@functools.cache
def solver_of(name, dtype=np.float64):
    match name:
        case "kfac":
            return curvature.kfac(network, cross_entropy, batch(0, 2, dtype))
        case "natural_gradient":
            return curvature.natural_gradient(network, cross_entropy, damping=0.3)
        case "sophia":
            return curvature.sophia(
                0.05, key=KEY, estimator="gauss-newton-bartlett", model=network, loss=cross_entropy,
                likelihood="categorical", gamma=0.05, refresh_every=2,
            )  # fmt: skip
        case "adahessian":
            return curvature.adahessian(0.1, key=KEY)


SOLVING = ["kfac", "natural_gradient"]
solvers = pytest.mark.parametrize("name", [*SOLVING, "sophia", "adahessian"])


@functools.cache
def compiled(name):
    """One step on a gradient's batch and another of the curvature, and how often it was traced."""
    solver, traces = solver_of(name), []

    @jax.jit
    def step(params, state, of_gradient, of_curvature):
        traces.append(1)
        value, grad = jax.value_and_grad(objective)(params, *of_gradient)
        updates, state = solver.update(
            grad, state, params, value=value, value_fn=lambda params: objective(params, *of_gradient),
            args=of_curvature,
        )  # fmt: skip
        return optax.apply_updates(params, updates), state

    return step, traces


def train(name, params, state, numbers):
    step, _ = compiled(name)
    for number in numbers:
        params, state = step(params, state, batch(number), batch(100 + number))
    return params, state


# ---- what all have in common -----------------------------------------------------------------------------------------


@pytest.mark.thin
@solvers
def test_training_on_batches_and_from_a_checkpoint(name):
    """The loss falls on examples not seen, with other batches for the curvature; a restored state goes on the same."""
    params, state = start(), solver_of(name).init(start())
    params, state = train(name, params, state, range(8))
    file = io.BytesIO()
    leaves, structure = jax.tree.flatten((params, state))
    np.savez(file, *leaves)
    file.seek(0)
    saved = np.load(file)
    restored = structure.unflatten([jnp.asarray(saved[f"arr_{k}"]) for k in range(len(leaves))])
    assert_trees_close(train(name, *restored, range(8, 16)), train(name, params, state, range(8, 16)), roundings=0)
    params, state = train(name, params, state, range(8, 16))
    before, after = objective(start(), *batch(77, 200)), objective(params, *batch(77, 200))
    assert after < 0.8 * before
    assert len(compiled(name)[1]) == 1, "a new batch retraced"


@solvers
def test_the_state_keeps_its_shapes_and_single_precision(name):
    params, data = start(jnp.float32), batch(0, dtype=jnp.float32)
    solver = solver_of(name, np.float32)

    def step(params, state):
        grad = jax.grad(objective)(params, *data)
        return solver.update(grad, state, params, value_fn=lambda params: objective(params, *data), args=data)

    state = solver.init(params)
    updates, after = jax.eval_shape(step, params, state)
    shapes = lambda tree: jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
    assert shapes(after) == shapes(state)
    assert shapes(updates) == shapes(params)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert not any(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize(
    "name", ["sophia", "adahessian", *(pytest.param(one, marks=pytest.mark.slow) for one in SOLVING)]
)
def test_lanes_have_states_of_their_own(name):
    step, _ = compiled(name)
    starts = [start(), jax.tree.map(lambda leaf: 2 * leaf, start())]
    states = [solver_of(name).init(one) for one in starts]
    data = batch(0), batch(1)
    stacked = [jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees) for trees in (starts, states)]
    together, _ = jax.vmap(step, in_axes=(0, 0, None, None))(*stacked, *data)
    for lane in range(2):
        alone, _ = step(starts[lane], states[lane], *data)
        assert_trees_close(jax.tree.map(lambda leaf, i=lane: leaf[i], together), alone, roundings=1e6)


FROZEN = {"w": False, "b": True, "out": False}


def thawed(make):
    """A solver for the leaves that are not frozen: its functions see the frozen ones as optax.MaskedNode."""
    params = start()

    def whole(trainable):
        masked = lambda leaf: isinstance(leaf, optax.MaskedNode)
        return jax.tree.map(lambda leaf, kept: kept if masked(leaf) else leaf, trainable, params, is_leaf=masked)

    labels = jax.tree.map(lambda frozen: "frozen" if frozen else "trained", FROZEN)
    return optax.partition({"trained": make(whole), "frozen": optax.set_to_zero()}, labels), whole


@pytest.mark.parametrize("name", ["natural_gradient", pytest.param("kfac", marks=pytest.mark.slow), "adahessian"])
def test_frozen_leaves_stay_and_the_others_step_as_if_they_were_all(name):
    make = {
        "natural_gradient": lambda model: curvature.natural_gradient(model, cross_entropy, rtol=1e-10),
        "kfac": lambda model: curvature.kfac(model, cross_entropy, batch(0, 2)),
        "adahessian": lambda model: curvature.adahessian(0.1, key=KEY),
    }[name]
    data, params = batch(0), start()
    solver, whole = thawed(lambda whole: make(lambda params, *args: network(whole(params), *args)))
    grad = jax.grad(objective)(params, *data)
    fun = lambda trainable: objective(whole(trainable), *data)
    updates, _ = update(solver, grad, solver.init(params), params, value_fn=fun, args=data)
    assert_close(updates["b"], jnp.zeros(5))
    rest = {name: params[name] for name in ("w", "out")}
    part = lambda rest, *args: network({**rest, "b": params["b"]}, *args)
    alone = make(part)
    of_rest = lambda rest: cross_entropy(part(rest, *data), *data)
    expected, _ = update(
        alone, {name: grad[name] for name in rest}, alone.init(rest), rest, value_fn=of_rest, args=data
    )  # fmt: skip
    assert_trees_close({name: updates[name] for name in rest}, expected, roundings=1e5)


def test_weight_decay_has_a_mask_and_the_rate_a_schedule():
    params = {"w": jnp.ones(3), "b": jnp.ones(2)}
    fun = lambda params: jnp.sum(params["w"] ** 2) + jnp.sum(params["b"] ** 2)
    schedule = optax.piecewise_constant_schedule(0.5, {1: 0.1})
    for solver in (
        curvature.sophia(schedule, key=KEY, weight_decay=0.25, mask={"w": True, "b": False}, gamma=1e-9),
        curvature.adahessian(schedule, key=KEY, weight_decay=0.25, mask={"w": True, "b": False}),
    ):
        state = solver.init(params)
        for rate in (0.5, 0.05):
            with jax.numpy_dtype_promotion("standard"):  # which optax's schedules need
                updates, state = solver.update(jax.grad(fun)(params), state, params, value_fn=fun)
            assert_trees_close(
                updates, {"w": jnp.full(3, -1.25 * rate), "b": jnp.full(2, -rate)}, roundings=1e9
            )  # the direction is all ones, to eps=1e-8


# ---- natural gradient and Hessian-free -------------------------------------------------------------------------------


def test_one_natural_gradient_step_solves_a_linear_gaussian_model():
    solver = curvature.natural_gradient(linear, half_squares, damping=0.0, rtol=1e-13)
    step, state = update(solver, linear_grad(LINEAR, DATA), solver.init(LINEAR), LINEAR, args=DATA)
    assert_close(LINEAR["w"] + step["w"], np.linalg.lstsq(*DATA)[0], roundings=1e4)
    assert_close(state.ratio, 1.0, roundings=1e4)


@pytest.mark.parametrize("solver", ["cg", "woodbury"])
def test_the_curvature_may_be_that_of_another_batch(solver):
    method = curvature.natural_gradient(
        linear, half_squares, damping=0.1, learning_rate=0.5, solver=solver, rtol=1e-13, likelihood="normal",
        adapt_every=None,
    )  # fmt: skip
    grad = linear_grad(LINEAR, DATA)
    step, state = update(method, grad, method.init(LINEAR), LINEAR, args=OTHER)
    # a squared error summed over entries and averaged over examples has a weight of one for each
    expected = -0.5 * np.linalg.solve(linear_fisher(OTHER) + 0.1 * np.eye(6), flat(grad))
    assert_close(flat(step), expected, roundings=1e5)
    assert state.damping == 0.1
    assert state.residual < 1e-10


def test_sampled_and_empirical_fishers_draw_anew_at_each_step():
    grad = linear_grad(LINEAR, DATA)
    method = curvature.natural_gradient(
        linear, half_squares, kind="sampled", likelihood="normal", key=KEY, adapt_every=None
    )
    first, state = update(method, grad, method.init(LINEAR), LINEAR, args=DATA)
    again, _ = update(method, grad, method.init(LINEAR), LINEAR, args=DATA)
    second, _ = update(method, grad, state, LINEAR, args=DATA)
    assert_trees_close(first, again)
    assert np.abs(flat(first) - flat(second)).max() > 1e-3
    method = curvature.natural_gradient(linear, half_squares, kind="empirical", damping=0.1, rtol=1e-13)
    step, _ = update(method, grad, method.init(LINEAR), LINEAR, args=DATA)
    inputs, targets = map(np.asarray, DATA)
    scores = inputs[:, :, None] * (inputs @ np.asarray(LINEAR["w"]) - targets)[:, None, :]
    fisher = np.einsum("bi,bj->ij", scores.reshape(7, 6), scores.reshape(7, 6)) / 7
    assert_close(flat(step), -np.linalg.solve(fisher + 0.1 * np.eye(6), flat(grad)), roundings=1e6)


def test_hessian_free_is_a_trust_region_on_gauss_newton_products():
    method = curvature.trust_region("cg", initial_radius=1e3)
    data_fn = lambda params: half_squares(linear(params, *DATA), *DATA)

    @quick_jit
    def hessian_free(params):
        value, grad = jax.value_and_grad(data_fn)(params)
        products = curvature.GaussNewtonOperator(linear, half_squares, params, *OTHER).linearize()
        state = method.init(params)
        return grad, method.update(grad, state, params, value=value, value_fn=data_fn, hvp_fn=products)[0]

    grad, step = hessian_free(LINEAR)
    slope = np.asarray(flat(grad)) @ flat(step)
    curved = flat(step) @ linear_fisher(OTHER) @ flat(step)
    assert slope < 0
    assert -slope / curved > 1 - 1e-6  # conjugate gradients minimize the model along the step


# ---- damping ---------------------------------------------------------------------------------------------------------


def test_damping_follows_the_ratio():
    least = jnp.asarray(1e-9)
    after = lambda ratio, damping=2.0: float(_damping.adapt_damping(jnp.asarray(damping), jnp.asarray(ratio), 3, least))
    assert_close(after(0.9), 2 * 0.95**3)
    assert_close(after(0.5), 2.0)
    assert_close(after(0.1), 2 / 0.95**3)
    assert after(-0.1) == after(-np.inf) == 8
    assert after(np.nan) == 2
    assert after(0.9, 1e-9) == 1e-9
    assert after(0.9, 0.0) == 0
    ratio = lambda *numbers: float(_damping.reduction_ratio(*map(jnp.asarray, numbers)))
    assert_close(ratio(3.0, 2.0, 2.0), 0.5)
    assert_close(ratio(1e6, 1e6 + 1e-11, 1e-12), 1.0, roundings=1e13)  # rounding of the value is no failure
    assert ratio(1.0, np.nan, 1.0) == -np.inf
    assert np.isnan(ratio(1.0, 0.0, np.nan))
    assert np.isnan(ratio(1.0, np.nan, np.nan))
    assert ratio(1.0, 2.0, -1.0) == -np.inf  # a model that foresees the rise is not right for that
    assert np.isnan(ratio(1.0, 0.5, -1.0))


def test_a_step_that_raises_the_objective_is_refused():
    """The curvature's batch knows nothing of the wall that the objective has."""
    wall = lambda params: half_squares(linear(params, *DATA), *DATA) + 1e6 * jnp.sum(jnp.abs(params["w"] - LINEAR["w"]))
    grad = linear_grad(LINEAR, DATA)
    for method in (
        curvature.natural_gradient(linear, half_squares, damping=0.25),
        curvature.kfac(linear, half_squares, DATA, damping=0.25),
    ):
        step, state = update(method, grad, method.init(LINEAR), LINEAR, value_fn=wall, args=DATA)
        assert_close(step["w"], jnp.zeros((3, 2)))
        assert state.damping == 1
        assert state.ratio < 0


def test_damping_and_learning_rate_take_schedules():
    damping = lambda count: 0.1 * (count + 1.0)
    rate = lambda count: 1.0 / (count + 1.0)
    method = curvature.natural_gradient(linear, half_squares, damping=damping, learning_rate=rate, rtol=1e-13)
    grad, state = linear_grad(LINEAR, DATA), method.init(LINEAR)
    for number in (1, 2):
        step, state = update(method, grad, state, LINEAR, args=DATA)
        expected = np.linalg.solve(linear_fisher(DATA) + 0.1 * number * np.eye(6), flat(grad))
        assert_close(flat(step), -expected / number, roundings=1e5)


# ---- KFAC ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [True, False])
def test_kfac_is_gauss_newton_on_a_linear_layer(exact):
    damping = 0.3 if exact else 1e-12  # damped factors are not the factors of a damped product
    method = curvature.kfac(
        linear, half_squares, DATA, learning_rate=1.0, momentum=0.0, damping=damping, exact=exact, adapt_every=None
    )
    grad = linear_grad(LINEAR, DATA)
    step, _ = update(method, grad, method.init(LINEAR), LINEAR, args=OTHER)
    expected = -np.linalg.solve(linear_fisher(OTHER) + damping * np.eye(6), flat(grad))
    assert_close(flat(step), expected, roundings=1e5 if exact else 1e12)


def test_kfac_is_block_gauss_newton_on_a_deep_linear_model():
    params = {"a": jnp.asarray(_rng.normal(size=(3, 4))), "b": jnp.asarray(_rng.normal(size=(4, 2)))}
    deep = lambda params, inputs, targets: inputs @ params["a"] @ params["b"]
    method = curvature.kfac(deep, half_squares, DATA, learning_rate=1.0, momentum=0.0, damping=0.2)
    grad = jax.grad(lambda params: half_squares(deep(params, *DATA), *DATA))(params)
    step, _ = update(method, grad, method.init(params), params, args=DATA)
    matrix = np.asarray(curvature.GaussNewtonOperator(deep, half_squares, params, *DATA).as_matrix())
    for name, part in {"a": slice(0, 12), "b": slice(12, 20)}.items():
        expected = -np.linalg.solve(matrix[part, part] + 0.2 * np.eye(part.stop - part.start), flat(grad[name]))
        assert_close(flat(step[name]), expected, roundings=1e5)


@pytest.mark.slow
def test_kfac_minimizes_the_exact_model_in_the_plane_of_direction_and_last_step():
    """Martens and Grosse, section 7, by a dense matrix; the factors are means over all batches, then decay."""
    method = curvature.kfac(network, cross_entropy, batch(0), damping=0.5, decay=0.6, invert_every=1, adapt_every=None)

    @quick_jit
    def all_of(state, params, data):
        grad = jax.grad(objective)(params, *data)
        ggn = curvature.GaussNewtonOperator(network, cross_entropy, params, *data).as_matrix()
        fresh = curvature.KroneckerOperator(network, cross_entropy, params, *data)
        return grad, ggn, fresh, method.update(grad, state, params, args=data)

    params, state, means, last = start(), method.init(start()), None, None
    unravel = ravel_pytree(params)[1]
    for number in range(3):
        grad, matrix, fresh, (step, state) = all_of(state, params, batch(number))
        kept = min(1 - 1 / (number + 1), 0.6)
        means = fresh if means is None else jax.tree.map(lambda a, b, k=kept: k * a + (1 - k) * b, means, fresh)
        assert_trees_close(state.factors, tuple(jax.tree.leaves(means)), roundings=1e3)
        direction = flat(means.inverse(0.5) @ grad)
        basis = np.stack([direction] if last is None else [direction, last])
        model = basis @ (matrix + 0.5 * np.eye(len(matrix))) @ basis.T
        expected = -np.linalg.solve(model, basis @ flat(grad)) @ basis
        assert_close(flat(step), expected, roundings=1e7)
        last, params = expected, optax.apply_updates(params, unravel(jnp.asarray(expected)))


def test_kfac_inverts_seldom_and_cuts_long_steps():
    method = curvature.kfac(
        linear, half_squares, DATA, learning_rate=2.0, momentum=0.5, kl_limit=1e-4, invert_every=2, adapt_every=None
    )
    grad, state = linear_grad(LINEAR, DATA), method.init(LINEAR)
    step, first = update(method, grad, state, LINEAR, args=DATA)
    natural = np.linalg.solve(linear_fisher(DATA) + 0.01 * np.eye(6), flat(grad))
    cut = np.sqrt(1e-4 / (4 * flat(grad) @ natural))
    assert_close(flat(step), -2 * cut * natural, roundings=1e5)
    again, second = update(method, grad, first, LINEAR, args=OTHER)
    assert_trees_close(second.inverse, first.inverse)
    assert np.abs(flat(second.factors) - flat(first.factors)).max() > 1e-3
    assert_close(flat(again), 1.5 * flat(step), roundings=1e5)  # the same direction and half the last step
    _, third = update(method, grad, second, LINEAR, args=OTHER)
    assert np.abs(flat(third.inverse) - flat(second.inverse)).max() > 1e-3


# ---- Sophia and AdaHessian -------------------------------------------------------------------------------------------

CURVED = {"w": np.array([[2.0, 3.0], [0.5, 1.5]]), "b": np.array([-1.0, 4.0])}  # a diagonal Hessian
POINT = {"w": np.array([[1e-3, 1.0], [-2.0, 3e-4]]), "b": np.array([0.5, 0.01])}


def separable(params):
    return 0.5 * sum(jnp.sum(CURVED[name] * params[name] ** 2) for name in params)


def test_sophia_is_the_algorithm_of_the_paper():
    solver = curvature.scale_by_sophia(key=KEY, b1=0.5, b2=0.75, gamma=0.5, refresh_every=2)
    state, params = solver.init(POINT), POINT
    x, h = flat(POINT), flat(CURVED)
    m, diagonal = np.zeros(6), np.zeros(6)
    for number in range(4):
        u, state = update(solver, jax.grad(separable)(params), state, params, value_fn=separable)
        m = 0.5 * m + 0.5 * h * x
        diagonal = 0.75 * diagonal + 0.25 * h if number % 2 == 0 else diagonal
        ratio = m / np.maximum(0.5 * diagonal, 1e-12)
        assert_close(flat(u), np.clip(ratio, -1, 1))
        assert_close(state.unclipped, np.mean(np.abs(ratio) < 1), jnp.float32)
        x = x - 0.1 * np.clip(ratio, -1, 1)
        params = jax.tree.map(lambda leaf, update: leaf - 0.1 * update, params, u)


def test_adahessian_is_the_algorithm_of_the_paper():
    solver = curvature.scale_by_adahessian(key=KEY, b1=0.5, b2=0.75, power=0.5, refresh_every=2)
    state, params = solver.init(POINT), POINT
    x, h, m, v = flat(POINT), flat(CURVED), np.zeros(6), np.zeros(6)
    for number in range(4):
        u, state = update(solver, jax.grad(separable)(params), state, params, value_fn=separable)
        m = 0.5 * m + 0.5 * h * x
        v = 0.75 * v + 0.25 * h**2 if number % 2 == 0 else v
        refreshes = number // 2 + 1
        expected = m / (1 - 0.5 ** (number + 1)) / ((v / (1 - 0.75**refreshes)) ** 0.25 + 1e-8)
        assert_close(flat(u), expected)
        x = x - 0.1 * expected
        params = jax.tree.map(lambda leaf, update: leaf - 0.1 * update, params, u)


def test_adahessian_averages_over_the_space_of_a_kernel():
    weights = jnp.asarray(_rng.uniform(1, 2, size=(3, 2, 4, 5)))
    kernel = jnp.ones((3, 2, 4, 5))
    fun = lambda kernel: jnp.sum(weights * kernel**2) / 2
    solver = curvature.scale_by_adahessian(key=KEY)
    u, _ = update(solver, weights, solver.init(kernel), kernel, value_fn=fun)
    assert_close(u, weights / np.mean(weights, axis=(0, 1), keepdims=True), roundings=1e9)  # eps is 1e-8


@pytest.mark.slow
def test_estimates_of_the_diagonal_are_unbiased():
    """Within four standard errors for every entry, from 400 estimates."""
    params, data = start(), batch(0)
    keys = jax.random.split(jax.random.key(8), 400)
    hessian = curvature.HessianOperator(objective, params, *data)
    ggn = curvature.GaussNewtonOperator(network, cross_entropy, params, *data)
    product = hessian.linearize()
    estimates = {
        "hutchinson": (jax.vmap(lambda key: _stochastic.hutchinson(params, key, product))(keys), hessian),
        "bartlett": (
            jax.vmap(
                lambda key: _stochastic.gauss_newton_bartlett(network, cross_entropy, "categorical", params, data, key)
            )(keys),
            ggn,
        ),
    }
    for samples, op in estimates.values():
        entries = np.concatenate([np.reshape(leaf, (400, -1)) for leaf in jax.tree.leaves(samples)], axis=1)
        error = np.abs(entries.mean(0) - np.diag(op.as_matrix())) / (entries.std(0) / 20)
        assert error.max() < 4


def test_sophia_takes_products_of_another_batch():
    solver = curvature.scale_by_sophia(key=KEY, b2=0.0)
    grad = jax.grad(objective)(start(), *batch(0))
    product = lambda v: curvature.hvp(objective, start(), v, *batch(1))
    _, state = solver.update(grad, solver.init(start()), start(), hvp_fn=product)
    expected = _stochastic.hutchinson(start(), jax.random.fold_in(KEY, 0), product)
    assert_trees_close(state.diagonal, expected, roundings=1e3)


# ---- minimize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["natural_gradient", "kfac"])
def test_minimize_hands_over_its_data(name):
    ridge = lambda outputs, inputs, labels: cross_entropy(outputs, inputs, labels) + 0.05 * jnp.sum(outputs**2) / 16
    affine = lambda params, inputs, labels: inputs @ params["w"]
    params, data = {"w": jnp.zeros((4, 3))}, batch(0)
    method = {
        "natural_gradient": lambda: curvature.natural_gradient(affine, ridge),
        "kfac": lambda: optax.chain(curvature.kfac(affine, ridge, data)),
    }[name]()
    result = curvature.minimize(
        lambda params, *args: ridge(affine(params, *args), *args), params, data, method=method, max_steps=300
    )
    assert result.success
    assert result.num_steps < 100


# ---- what is not finite, and half precision -------------------------------------------------------------------------


def steps_of(name, dtype):
    """A compiled step of a solver on one batch, for gradient and curvature."""
    solver = solver_of(name, dtype)

    @jax.jit
    def step(params, state, data):
        value, grad = jax.value_and_grad(objective)(params, *data)
        value_fn = lambda params: objective(params, *data)
        updates, state = solver.update(grad, state, params, value=value, value_fn=value_fn, args=data)
        return optax.apply_updates(params, updates), state

    return solver, step


@pytest.mark.thin
@solvers
@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_batch_that_is_not_finite_is_skipped(name, bad):
    solver, step = steps_of(name, np.float64)
    params = start()
    params, state = step(params, solver.init(params), batch(0))
    inputs, labels = batch(1)
    inputs[2, 0] = bad
    after, skipped = step(params, state, (inputs, labels))
    assert_trees_close(after, params, roundings=0)
    jax.tree.map(np.testing.assert_array_equal, skipped, state)
    values = [float(objective(params, *batch(0)))]
    for _ in range(3):
        after, skipped = step(after, skipped, batch(0))
        values.append(float(objective(after, *batch(0))))
    assert values[-1] < values[0]


@pytest.mark.thin
@solvers
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_trains(name, dtype):
    solver, step = steps_of(name, dtype)
    params, data = start(dtype), batch(0, dtype=dtype)
    state, first = solver.init(params), float(objective(params, *data))
    for _ in range(8):
        params, state = step(params, state, data)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert float(objective(params, *data)) < 0.95 * first


def test_adahessian_in_half_precision_is_that_in_single():
    """``b2 = 0.999`` rounds to 1 in bfloat16."""

    def after(dtype):
        params, solver = {"a": jnp.array([1.0, 2.0], dtype)}, curvature.scale_by_adahessian(key=KEY)
        fun = lambda params: jnp.sum(jnp.array([1.0, 4.0], dtype) * params["a"] ** 2)
        state = solver.init(params)
        for _ in range(3):
            updates, state = solver.update(jax.grad(fun)(params), state, params, value_fn=fun)
        assert updates["a"].dtype == dtype
        return updates["a"]

    assert_close(after(jnp.bfloat16), after(jnp.float32), jnp.bfloat16, roundings=1)
    assert_close(after(jnp.float32), np.array([1.0, 2.0]), jnp.float32)
