"""minimize_batched: what vmap of minimize gives, each lane with its own status, in few programs."""

import jax
import jax.numpy as jnp
import numpy as np

import curvature
from curvature import Status
from curvature.solvers import _batched
from tests.optimizers.problems import rosenbrock
from tests.oracles import assert_close

LANES = 90


def test_lanes_are_those_of_vmap_whatever_their_statuses():
    """A batch of which most lanes finish early, some late, one at once, one never, and one cannot start."""
    rng = np.random.default_rng(0)
    starts = 1 + rng.uniform(-1, 1, (LANES, 2)) * np.where(np.arange(LANES) % 9 == 0, 4.0, 0.01)[:, None]
    starts[3], starts[4], starts[5] = np.nan, 1.0, (-1e4, 1e4)
    how = {"max_steps": 60, "gtol": 1e-8}  # to rounding the last step may differ between two compiled programs
    result = curvature.minimize_batched(rosenbrock, starts, **how)
    expected = jax.jit(jax.vmap(lambda x: curvature.minimize(rosenbrock, x, **how)))(jnp.asarray(starts))
    assert result.status.tolist() == expected.status.tolist()
    assert result.num_steps.tolist() == expected.num_steps.tolist()
    assert (result.status[3], result.status[4], result.num_steps[4]) == (Status.NONFINITE_START, Status.CONVERGED, 0)
    assert Status.MAX_STEPS in result.status.tolist()
    assert max(result.num_steps.tolist()) > 3 * np.median(result.num_steps)
    solved = np.asarray(result.success)
    assert solved.sum() > LANES / 2
    assert_close(result.x[solved], np.ones((solved.sum(), 2)), roundings=1e9)
    assert_close(result.value[solved], expected.value[solved] * 1.0, roundings=1e12)


def test_lanes_that_converge_to_rounding_end_each_by_itself():
    starts = np.random.default_rng(0).uniform(-2, 2, (40, 2))
    starts[3], starts[4] = np.nan, 1.0
    result = curvature.minimize_batched(rosenbrock, starts)
    expected = jax.jit(jax.vmap(lambda x: curvature.minimize(rosenbrock, x)))(jnp.asarray(starts))
    assert result.status.tolist() == expected.status.tolist()
    assert (result.status[3], int(np.sum(result.success))) == (Status.NONFINITE_START, 39)
    assert np.max(np.abs(result.num_steps - expected.num_steps)) <= 1
    assert_close(result.x[4:], np.ones((36, 2)), roundings=1e3)


def test_data_with_axes_of_its_own_and_shared_data():
    def loss(x, scales, data):
        return jnp.sum(data["weights"] * (x["w"] - scales) ** 2) + (x["b"] - data["target"]) ** 2 + data["power"] * 0.0

    starts = {"w": jnp.zeros((5, 3)), "b": jnp.zeros(5)}
    scales = jnp.arange(15.0).reshape(3, 5)  # the lanes are the columns
    data = {"weights": jnp.ones(3), "target": jnp.arange(5.0), "power": 2}
    axes = (1, {"weights": None, "target": 0, "power": None})
    result = curvature.minimize_batched(loss, starts, (scales, data), in_axes=axes, method="newton")
    assert result.success.all()
    assert_close(result.x["w"], scales.T, roundings=1e6)
    assert_close(result.x["b"], data["target"], roundings=1e6)


def test_one_argument_shared_by_all():
    fun = lambda x, targets: jnp.sum((x - targets) ** 2)
    result = curvature.minimize_batched(fun, jnp.zeros((3, 2)), jnp.arange(2.0), in_axes=None, method="newton")
    assert_close(result.x, jnp.tile(jnp.arange(2.0), (3, 1)), roundings=1e6)


def test_calling_again_compiles_nothing_and_few_sizes_are_compiled(monkeypatch):
    """Sizes are powers of two below the first; another batch of the same shape finds all of them."""
    sizes = []
    take = _batched._take
    monkeypatch.setattr(_batched, "_take", lambda tree, lanes: sizes.append(len(lanes)) or take(tree, lanes))
    traces = []

    def traced(x, stretch):
        traces.append(1)
        return rosenbrock(x) * stretch

    def solve(seed):
        starts = 1 + np.random.default_rng(seed).uniform(-3, 3, (100, 2))
        return curvature.minimize_batched(traced, starts, jnp.asarray(1.0), in_axes=None, method="newton")

    assert solve(0).success.all()
    assert sizes
    assert sizes == sorted(sizes, reverse=True)
    assert all(size in (16, 32, 64) for size in sizes)
    count = len(traces)
    assert count <= 4 * (1 + len(set(sizes)))
    solve(0)
    assert len(traces) == count
