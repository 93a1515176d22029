"""The same calls on a mesh of eight virtual devices, inside shard_map with its default checks and on sharded data.

Run by ``test_many_devices.py`` in a process of its own: so many devices slow every other test down.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import curvature
from tests.oracles import assert_close

P = PartitionSpec


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@pytest.fixture
def inputs():
    return jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)))


def loss(x, inputs):
    return jnp.sum(jnp.sin(inputs @ x) ** 2) + jnp.sum(x**2)


X = np.array([0.3, -0.2, 0.5])


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_each_device_forms_the_hessian_of_its_own_shard(mesh, inputs, chunk_size):
    def of_shard(inputs):
        x = jax.lax.pcast(jnp.asarray(X), "data", to="varying")
        return curvature.hessian(loss, chunk_size=chunk_size)(x, inputs)[None]

    got = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(inputs)
    want = jax.vmap(jax.hessian(loss), (None, 0))(X, inputs.reshape(8, 2, 3))
    assert_close(got, want)


def test_by_a_replicated_point_the_hessian_is_jaxs(mesh, inputs):
    """JAX sums a derivative by what all devices share; so do we."""

    def both(inputs):
        return curvature.hessian(loss, chunk_size=2)(X, inputs), jax.hessian(loss)(X, inputs)

    got, want = jax.jit(jax.shard_map(both, mesh=mesh, in_specs=P("data"), out_specs=P()))(inputs)
    assert_close(got, want)


def residual(x, inputs):
    return jnp.concatenate([jnp.sin(inputs @ x), jnp.prod(x) * inputs[0]])


@pytest.mark.parametrize("mode", ["auto", "fwd", "rev"])
def test_by_a_replicated_point_each_device_has_the_jacobian_of_its_own_function(mesh, inputs, mode):
    def of_shard(x, inputs):
        vector = curvature.jacobian(residual, mode=mode)(x, inputs)
        scalar = curvature.jacobian(loss, mode=mode)(x, inputs)
        return vector[None], scalar[None]

    specs = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P("data")}
    vector, scalar = jax.jit(jax.shard_map(of_shard, **specs))(X, inputs)
    shards = inputs.reshape(8, 2, 3)
    assert_close(vector, jax.vmap(jax.jacfwd(residual), (None, 0))(X, shards))
    assert_close(scalar, jax.vmap(jax.grad(loss), (None, 0))(X, shards))


@pytest.mark.parametrize("mode", ["auto", "fwd", "rev"])
def test_the_jacobian_of_a_sum_over_devices_is_that_of_the_sum(mesh, inputs, mode):
    def summed(x, inputs):
        return jax.lax.psum(jnp.concatenate([jnp.sin(inputs @ x), x**2]), "data")

    def whole(x, inputs):
        return curvature.jacobian(summed, mode=mode)(x, inputs)

    got = jax.jit(jax.shard_map(whole, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(X, inputs)
    parts = jax.vmap(lambda a: jax.jacfwd(lambda x: jnp.concatenate([jnp.sin(a @ x), x**2]))(X))
    assert_close(got, jnp.sum(parts(inputs.reshape(8, 2, 3)), axis=0))


def test_reverse_mode_does_not_cross_a_sum_over_devices_to_the_function_of_one(mesh, inputs):
    """The part of the derivative that the other devices hold would have to come back; forward mode brings it along."""

    def mixed(x, inputs):
        return jnp.sin(inputs @ x) * jax.lax.psum(jnp.sum(inputs @ x), "data")

    def of_shard(x, inputs, mode):
        return curvature.jacobian(mixed, mode=mode)(x, inputs)[None]

    def run(mode):
        fun = lambda x, a: of_shard(x, a, mode)
        return jax.jit(jax.shard_map(fun, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))(X, inputs)

    want = jax.vmap(lambda a: jax.jacfwd(lambda x: jnp.sin(a @ x) * jnp.sum(inputs @ x))(X))
    assert_close(run("auto"), want(inputs.reshape(8, 2, 3)))
    with pytest.raises(TypeError, match="jacobian: mode='rev' is not legal for f because of psum"):
        run("rev")


COMPOSITIONS = ["auto", "fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd"]


@pytest.mark.parametrize("mode", COMPOSITIONS)
def test_by_a_replicated_point_every_mode_gives_jaxs_hessian_of_the_sum(mesh, inputs, mode):
    v = np.array([1.0, -2.0, 0.5])

    def everything(x, inputs):
        _, grad, hvp_fn = curvature.linearize_grad(loss, x, inputs, mode=mode)
        hessian = curvature.hessian(loss, mode=mode)(x, inputs)
        hessians = curvature.hessian(residual, mode=mode)(x, inputs)
        diagonal = curvature.hessian_diagonal(loss, x, inputs, mode=mode)
        return hessian, hessians, diagonal, curvature.hvp(loss, x, v, inputs, mode=mode), hvp_fn(v), grad

    run = jax.shard_map(everything, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    hessian, hessians, diagonal, product, linearized, grad = jax.jit(run)(X, inputs)
    shards = inputs.reshape(8, 2, 3)
    want = jnp.sum(jax.vmap(jax.hessian(loss), (None, 0))(X, shards), axis=0)
    assert_close(hessian, want)
    assert_close(hessians, jnp.sum(jax.vmap(jax.hessian(residual), (None, 0))(X, shards), axis=0))
    assert_close(diagonal, jnp.diag(want))
    assert_close(product, want @ v)
    assert_close(linearized, want @ v)
    assert_close(grad, jnp.sum(jax.vmap(jax.grad(loss), (None, 0))(X, shards), axis=0))


@pytest.mark.parametrize("mode", COMPOSITIONS)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_by_replicated_parameters_the_derivatives_of_an_example_are_its_own(mesh, inputs, mode, chunk_size):
    one = lambda w, x: jnp.sum(jnp.sin(w * x)) ** 2

    def of_shard(w, inputs):
        grads = curvature.per_example_grad(one, chunk_size=chunk_size)(w, inputs)
        return grads, curvature.per_example_hessian(one, mode=mode, chunk_size=chunk_size)(w, inputs)

    specs = {"mesh": mesh, "in_specs": (P(), P("data")), "out_specs": P("data")}
    grads, hessians = jax.jit(jax.shard_map(of_shard, **specs))(X, inputs)
    assert_close(grads, jax.vmap(jax.grad(one), (None, 0))(X, inputs))
    assert_close(hessians, jax.vmap(jax.hessian(one), (None, 0))(X, inputs))


OF_PARAMETERS_ALONE = {
    "penalty": lambda w, x: jnp.sin(x @ w) ** 2 + 0.1 * jnp.sum(w**2),
    "scale": lambda w, x: jnp.exp(-2.0 * w[0]) * jnp.sin(x @ w) ** 2 + w[0],
    "normalized": lambda w, x: jnp.sin(x @ (w / jnp.sqrt(jnp.sum(w**2) + 0.1))) ** 2,
}


@pytest.mark.parametrize("name", OF_PARAMETERS_ALONE)
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_functions_of_replicated_parameters_enter_the_mean_hessian_of_a_shard(mesh, inputs, name, chunk_size):
    one = OF_PARAMETERS_ALONE[name]

    def of_shard(w, inputs):
        return jax.lax.pmean(curvature.mean_hessian(one, chunk_size=chunk_size)(w, inputs), "data")

    got = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(X, inputs)
    assert_close(got, jnp.mean(jax.vmap(jax.hessian(one), (None, 0))(X, inputs), axis=0))


def test_the_laplacian_at_a_replicated_point_is_that_of_each_devices_function(mesh, inputs):
    run = lambda x, a: curvature.laplacian(loss)(x, a)[None]
    got = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))(X, inputs)
    assert_close(got, jax.vmap(lambda a: jnp.trace(jax.hessian(loss)(X, a)))(inputs.reshape(8, 2, 3)))


def test_each_device_solves_with_its_own_operator(mesh, inputs):
    def of_shard(inputs):
        x, info = curvature.cg(lambda v: inputs.T @ (inputs @ v) + v, inputs[0], rtol=1e-10)
        return x[None], info.status[None]

    specs = {"mesh": mesh, "in_specs": P("data"), "out_specs": P("data")}
    x, status = jax.jit(jax.shard_map(of_shard, **specs))(inputs)
    shards = inputs.reshape(8, 2, 3)
    want = jax.vmap(lambda a: jnp.linalg.solve(a.T @ a + jnp.eye(3), a[0]))(shards)
    assert jnp.all(status == curvature.Status.CONVERGED)
    assert_close(x, want, roundings=1e6)


def test_each_device_minimizes_its_own_problems(mesh, inputs):
    def distance(x, a):
        return jnp.sum((x - a) ** 2 + jnp.cosh(x - a))

    def of_shard(starts):
        return jax.vmap(lambda a: curvature.minimize(distance, a + 1, (a,), method="trust-region").x)(starts)

    got = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(inputs)
    assert_close(got, inputs, roundings=1e8)


MINIMIZERS = {
    **{
        method: lambda x0, a, method=method: curvature.minimize(decay, x0, (a,), method=method, gtol=1e-9)
        for method in ("trust-exact", "trust-region", "newton", "newton-cg", "cubic-newton", "bfgs", "l-bfgs", "sr1")
    },
    "bounds": lambda x0, a: curvature.minimize(decay, x0, (a,), bounds=(-10.0, 10.0), gtol=1e-9),
    "lbfgsb": lambda x0, a: curvature.minimize(decay, x0, (a,), method="l-bfgs", bounds=(-10.0, 10.0), gtol=1e-9),
    **{
        method: lambda x0, a, method=method: curvature.least_squares(residuals, x0, (a,), method=method)
        for method in ("levenberg-marquardt", "dogleg", "gauss-newton")
    },
    "products": lambda x0, a: curvature.least_squares(
        residuals, x0, (a,), method=curvature.levenberg_marquardt("cg"), rtol=1e-9
    ),
}


def residuals(x, a):
    return jnp.concatenate([x - a, 0.1 * jnp.sinh(x - a)])


def decay(x, a):
    return jnp.sum(residuals(x, a) ** 2)


@pytest.mark.parametrize("solve", MINIMIZERS.values(), ids=MINIMIZERS)
def test_from_a_start_that_all_share_each_device_solves_its_own_problem(mesh, solve):
    """And differentiates it: the minimizer is ``a``."""

    def of_shard(a):
        def solution(a):
            return solve(jnp.zeros(3), a).x

        return solution(a[0])[None], jax.jacobian(solution)(a[0])[None]

    a = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)))
    x, derivative = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(a)
    assert_close(x, a, roundings=1e8)
    assert_close(derivative, np.broadcast_to(np.eye(3), (8, 3, 3)), roundings=1e8)


def test_a_summed_loss_is_minimized_on_all_devices_together(mesh, inputs):
    def whole(inputs):
        def summed(x, inputs):
            return jax.lax.psum(jnp.sum(jnp.sin(inputs @ x) ** 2), "data") + jnp.sum((x - 1) ** 2)

        return curvature.minimize(summed, X, (inputs,), method="trust-region").x

    got = jax.jit(jax.shard_map(whole, mesh=mesh, in_specs=P("data"), out_specs=P()))(inputs)
    one = curvature.minimize(lambda x, a: jnp.sum(jnp.sin(a @ x) ** 2) + jnp.sum((x - 1) ** 2), X, (inputs,))
    assert_close(got, one.x, roundings=1e8)


def test_sharded_data_gives_what_one_device_gives(mesh, inputs):
    sharded = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    v = jnp.ones(3)
    product = jax.jit(lambda x, v, a: curvature.hvp(loss, x, v, a))
    assert_close(product(X, v, sharded), product(X, v, inputs))
    assert_close(jax.jit(curvature.hessian(loss))(X, sharded), jax.hessian(loss)(X, inputs))
    one, many = (curvature.minimize(loss, X, (a,)).x for a in (inputs, sharded))
    assert_close(X + many, X + one)  # the minimizer is 0: measured by where the solves started


def test_pmap_composes(inputs):
    got = jax.pmap(lambda a: curvature.hvp(loss, jnp.asarray(X), jnp.ones(3), a))(inputs.reshape(8, 2, 3))
    want = jax.vmap(lambda a: jax.hessian(loss)(X, a) @ jnp.ones(3))(inputs.reshape(8, 2, 3))
    assert_close(got, want)


@pytest.mark.parametrize("act", [jnp.tanh, jax.nn.relu])
def test_each_device_takes_the_laplacian_at_its_own_points(mesh, inputs, act):
    def network(x, w):
        return jax.lax.scan(lambda c, _: (act(w @ c), jnp.sum(c)), x, length=2)[1][1] ** 2

    laplacian = jax.vmap(curvature.laplacian(network), (0, None))
    w = jnp.asarray(np.random.default_rng(1).normal(size=(3, 3)))
    got = jax.jit(jax.shard_map(laplacian, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")))(inputs, w)
    assert_close(got, jax.vmap(lambda x: jnp.trace(jax.hessian(network)(x, w)))(inputs))
    sharded = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    assert_close(jax.jit(laplacian)(sharded, w), got)


def test_by_a_replicated_point_the_laplacian_is_that_of_the_sum(mesh, inputs):
    def summed(x, inputs):
        return jax.lax.psum(jnp.sum(jnp.sin(inputs @ x) ** 2), "data") + jnp.sum(x**4)

    def on_shard(inputs):
        return curvature.laplacian(summed)(X, inputs)

    got = jax.jit(jax.shard_map(on_shard, mesh=mesh, in_specs=P("data"), out_specs=P()))(inputs)
    want = jnp.trace(jax.hessian(lambda x: jnp.sum(jnp.sin(inputs @ x) ** 2) + jnp.sum(x**4))(jnp.asarray(X)))
    assert_close(got, want)


def test_each_device_forms_the_diagonal_and_a_block_of_its_own_shard(mesh, inputs):
    def tree_loss(x, inputs):
        return loss(jnp.concatenate([x["a"], x["b"]]), inputs)

    def of_shard(inputs):
        x = jax.lax.pcast({"a": jnp.asarray(X[:1]), "b": jnp.asarray(X[1:])}, "data", to="varying")
        diagonal = curvature.hessian_diagonal(tree_loss, x, inputs, chunk_size=1)
        block = curvature.hessian(tree_loss, blocks=("b", "a"), chunk_size=1)(x, inputs)
        blocks = curvature.hessian(tree_loss, blocks="diagonal", chunk_size=1)(x, inputs)
        return jax.tree.map(lambda leaf: leaf[None], (diagonal, block, blocks))

    got = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(inputs)
    want = jax.vmap(jax.hessian(loss), (None, 0))(X, inputs.reshape(8, 2, 3))
    diagonal, block, blocks = got
    assert_close(jnp.concatenate([diagonal["a"], diagonal["b"]], 1), jnp.diagonal(want, axis1=1, axis2=2))
    assert_close(block, want[:, 1:, :1])
    assert_close(blocks["b"], want[:, 1:, 1:])


def test_the_diagonal_on_sharded_data_is_that_of_one_device(mesh, inputs):
    sharded = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    diagonal = jax.jit(lambda x, a: curvature.hessian_diagonal(loss, x, a, chunk_size=2))
    assert_close(diagonal(X, sharded), jnp.diag(jax.hessian(loss)(X, inputs)))


def example_loss(w, x):
    return jnp.tanh(jnp.tanh(x @ w["in"]) @ w["out"]) ** 2


W = {"in": np.array([[0.3, -0.2], [0.1, 0.4], [0.5, 0.2]]), "out": np.array([1.0, -0.5])}


def test_functions_from_taps_see_the_examples_of_their_device(mesh, inputs):
    def of_shard(inputs):
        norms = curvature.per_example_grad_norm(example_loss)(W, inputs)
        clipped, _ = curvature.clipped_grad(example_loss, 0.1)(W, inputs)
        hessian = curvature.mean_hessian(example_loss, chunk_size=1)(W, inputs)
        return norms, jax.tree.map(lambda leaf: leaf[None], (clipped, hessian))

    norms, rest = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(inputs)
    assert_close(norms, curvature.per_example_grad_norm(example_loss)(W, inputs))
    whole = curvature.clipped_grad(example_loss, 0.1)(W, inputs)[0], curvature.mean_hessian(example_loss)(W, inputs)
    for got, want in zip(jax.tree.leaves(rest), jax.tree.leaves(whole), strict=True):
        assert_close(jnp.mean(got, axis=0), want, roundings=1e3)


def test_functions_from_taps_on_sharded_data(mesh, inputs):
    sharded = jax.device_put(inputs, NamedSharding(mesh, P("data")))
    for function in (curvature.per_example_grad_norm(example_loss), curvature.mean_hessian(example_loss)):
        got, want = jax.jit(function)(W, sharded), function(W, inputs)
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_close(one, other, roundings=1e3)


def test_many_problems_stay_on_their_devices(mesh):
    stretch = np.where(np.arange(96) % 6 == 0, 3.0, 0.02)[:, None]
    starts = jnp.asarray(1 + stretch * np.random.default_rng(0).uniform(-1, 1, (96, 2)))
    fun = lambda x: 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
    sharded = jax.device_put(starts, NamedSharding(mesh, P("data")))
    result = curvature.minimize_batched(fun, sharded, method="trust-region")
    assert result.success.all()
    assert result.x.sharding.spec == P("data")
    alone = curvature.minimize_batched(fun, starts, method="trust-region")
    assert result.num_steps.tolist() == alone.num_steps.tolist()


@pytest.fixture
def explicit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with jax.sharding.set_mesh(mesh) if hasattr(jax.sharding, "set_mesh") else jax.set_mesh(mesh):
        yield lambda array: jax.device_put(array, NamedSharding(mesh, P("data")))


def mean_loss(w, x):
    return jnp.mean(jax.vmap(example_loss, (None, 0))(w, x))


BY_EXAMPLES = {
    "per_example_grad": lambda w, x, size: curvature.per_example_grad(example_loss, chunk_size=size)(w, x),
    "per_example_hessian": lambda w, x, size: curvature.per_example_hessian(example_loss, chunk_size=size)(w, x),
    "per_example_grad_norm": lambda w, x, size: curvature.per_example_grad_norm(example_loss, chunk_size=size)(w, x),
    "norms from one output": lambda w, x, size: curvature.per_example_grad_norm(
        lambda w, x: jnp.tanh(x @ w["in"][:, 0]) ** 2, chunk_size=size
    )(w, x),
    "clipped_grad": lambda w, x, size: curvature.clipped_grad(example_loss, 0.1, chunk_size=size)(w, x),
    "moments": lambda w, x, size: tuple(curvature.per_example_grad_moments(example_loss, chunk_size=size)(w, x)),
    "mean_hessian": lambda w, x, size: curvature.mean_hessian(example_loss, chunk_size=size)(w, x),
    "hessian of a closure": lambda w, x, size: curvature.hessian(lambda w: mean_loss(w, x), chunk_size=size)(w),
    "hessian": lambda w, x, size: curvature.hessian(mean_loss, chunk_size=size)(w, x),
    "jacobian": lambda w, x, size: curvature.jacobian(
        lambda w: jnp.tanh(x @ w["in"]) @ w["out"], mode="rev", chunk_size=size
    )(w),
    "vmap": lambda w, x, size: curvature.vmap(lambda x: x @ w["in"], chunk_size=size)(x),
    "kronecker": lambda w, x, _: (
        curvature.KroneckerOperator(lambda w, x: jnp.tanh(x @ w["in"]), lambda z, x: jnp.mean(jnp.sum(z**2, -1)), w, x)
        @ w
    ),
}


@pytest.mark.parametrize("name", BY_EXAMPLES)
@pytest.mark.parametrize("chunk_size", ["auto", 3])
def test_on_an_explicit_mesh_examples_may_be_sharded(explicit, inputs, name, chunk_size):
    fun = lambda x: BY_EXAMPLES[name](jax.tree.map(jnp.asarray, W), x, chunk_size)
    want, sharded = fun(inputs), explicit(inputs)
    for got in (fun(sharded), jax.jit(fun)(sharded)):
        for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert_close(np.asarray(one), np.asarray(other), roundings=1e4)
