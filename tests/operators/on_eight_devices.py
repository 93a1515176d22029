"""Operators on data that lies on eight virtual devices: their values, and what the devices tell each other.

Run by ``test_sharded.py`` in a process of its own: so many devices slow every other test down.
"""

import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import curvature
from tests.oracles import assert_close, assert_trees_close, flat

P = PartitionSpec
X = {"in": np.array([[0.3, -0.2], [0.1, 0.4], [0.5, 0.2]]), "bias": np.array([0.1, -0.3]), "out": np.array([1.0, -0.5])}
N = sum(leaf.size for leaf in X.values())
V = jax.tree.map(np.cos, X)
ROUNDINGS = 1e3


def model(x, a, y):
    return jnp.tanh(a @ x["in"] + x["bias"][None]) @ x["out"]


def loss(z, a, y):
    return jnp.mean(jnp.logaddexp(z, 0) - y * z)


def objective(x, a, y):
    return loss(model(x, a, y), a, y)


def summed(x, a, y):
    return y.size * objective(x, a, y)


MATRICES = {
    "hessian": lambda *given, **options: curvature.HessianOperator(objective, *given, **options),
    "hessian of sum": lambda *given, **options: curvature.HessianOperator(summed, *given, reduction="sum", **options),
    "gauss_newton": lambda *given, **options: curvature.GaussNewtonOperator(model, loss, *given, **options),
    "exact": lambda *given, **options: curvature.FisherOperator(model, loss, *given, likelihood="bernoulli", **options),
    "empirical": lambda *given, **options: curvature.FisherOperator(model, loss, *given, kind="empirical", **options),
    "sampled": lambda *given, **options: curvature.FisherOperator(
        model, loss, *given, kind="sampled", likelihood="bernoulli", key=jax.random.key(3), **options
    ),
}


def mesh_of(*shape, axis_type=AxisType.Auto):
    return jax.make_mesh(shape, ("data", "model")[: len(shape)], axis_types=(axis_type,) * len(shape))


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(8)


@pytest.fixture
def data():
    """Forty examples: five for each device."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(40, 3)), rng.integers(0, 2, size=40).astype(float)


def sharded(data, mesh):
    return jax.device_put(data, NamedSharding(mesh, P("data")))


def product(op, v):
    return op @ v


def collectives(program):
    """What devices tell each other: the operation, how many entries, and whether once or in the body of which loop."""
    found, place = [], ""
    for line in program.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            place = "once" if line.startswith("ENTRY") else line.split()[0]
        pattern = r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(-start)?\("
        if match := re.search(pattern, line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            entries = sum(math.prod(map(int, filter(None, shape.split(",")))) for shape in shapes)
            found.append((match[2], entries, place))
    return Counter(found)


ONE = Counter({("all-reduce", N, "once"): 1})


# ---- one operator, whatever holds its data -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["hessian", "gauss_newton", "empirical", "sampled"])
def test_the_compiler_shares_whole_data_out(mesh, data, name):
    """It makes one all-reduce by itself; in a Hessian's, a leaf used in two places may take its place twice."""
    op = MATRICES[name](X, *sharded(data, mesh))
    program = jax.jit(product).lower(op, V).compile()
    ((kind, entries, _),) = collectives(program).elements()
    assert kind == "all-reduce"
    assert entries == N if name != "hessian" else N <= entries < 2 * N
    assert_trees_close(program(op, V), product(MATRICES[name](X, *data), V), roundings=ROUNDINGS)


@pytest.mark.parametrize("name", MATRICES)
def test_slices_of_sharded_data_take_one_all_reduce(mesh, data, name):
    """Each device has five examples, cut into three and two; the arrays tell that they are sharded."""
    op = MATRICES[name](X, *sharded(data, mesh), chunk_size=3)
    program = jax.jit(product).lower(op, V).compile()
    assert collectives(program) == ONE
    assert_trees_close(program(op, V), product(MATRICES[name](X, *data), V), roundings=ROUNDINGS)


@pytest.mark.parametrize("name", ["hessian", "gauss_newton"])
def test_inside_jit_the_layout_is_named(mesh, data, name):
    """For whole data too, where it makes the all-reduce no larger than the point."""
    sharding = NamedSharding(mesh, P("data"))
    for chunk_size in (None, 3):

        def named(x, v, *args, chunk_size=chunk_size):
            return MATRICES[name](x, *args, sharding=sharding, chunk_size=chunk_size) @ v

        program = jax.jit(named).lower(X, V, *sharded(data, mesh)).compile()
        assert collectives(program) == ONE
        got = program(X, V, *sharded(data, mesh))
        assert_trees_close(got, product(MATRICES[name](X, *data), V), roundings=ROUNDINGS)


def test_explicit_axes_show_the_layout_inside_jit(data):
    args = sharded(data, mesh_of(8, axis_type=AxisType.Explicit))
    program = jax.jit(lambda x, v, *args: MATRICES["gauss_newton"](x, *args, chunk_size=3) @ v).lower(X, V, *args)
    assert collectives(program.compile()) == ONE
    got = program.compile()(X, V, *args)
    assert_trees_close(got, product(MATRICES["gauss_newton"](X, *data), V), roundings=ROUNDINGS)


def test_the_point_may_be_sharded_over_another_axis(data):
    mesh = mesh_of(4, 2)
    x = jax.device_put(X, {"in": NamedSharding(mesh, P(None, "model")), "bias": NamedSharding(mesh, P("model")),
                           "out": NamedSharding(mesh, P("model"))})  # fmt: skip
    args = sharded(data, mesh)
    for name in ("hessian", "empirical"):
        want = product(MATRICES[name](X, *data), V)
        for op in (MATRICES[name](x, *args), MATRICES[name](x, *args, chunk_size=4)):
            assert_trees_close(jax.jit(product)(op, V), want, roundings=ROUNDINGS)


def test_every_way_to_use_an_operator(mesh, data):
    """As a matrix, its diagonal, blocks, lanes, sums and derivatives, with a number that all examples share."""

    def scaled(x, a, y, scale):
        return scale * objective(x, a, y)

    def answers(op):
        def quadratic(x, scale):
            moved = curvature.HessianOperator(
                scaled, x, *op.args[:2], scale, chunk_size=op.chunk_size, sharding=op.sharding
            )
            return jnp.vdot(moved.mv(V)["out"], V["out"])

        lanes = jax.vmap(op.mv)(jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), V))
        blocks = op.block("in", "out").as_matrix(), op.block("in", "out").T.as_matrix()
        derivatives = jax.grad(quadratic, argnums=(0, 1))(op.x, op.args[2])
        return op.as_matrix(), op.diagonal(), blocks, lanes, (2.0 * op + curvature.damping(1.0)) @ V, derivatives

    args = *sharded(data, mesh), jnp.asarray(1.5)
    want = jax.jit(answers)(curvature.HessianOperator(scaled, X, *data, jnp.asarray(1.5)))
    for options in ({"chunk_size": 3}, {"sharding": NamedSharding(mesh, P("data"))}):
        got = jax.jit(answers)(curvature.HessianOperator(scaled, X, *args, **options))
        assert_trees_close(got, want, roundings=ROUNDINGS)


@pytest.mark.parametrize("named", [False, True])
def test_a_solve_evaluates_the_model_once_and_reduces_once_a_step(mesh, data, named):
    options = {"sharding": NamedSharding(mesh, P("data"))} if named else {}

    def solve(x, b, *args):
        op = MATRICES["gauss_newton"](x, *args, **options) + curvature.damping(0.1)
        return curvature.cg(op, b, rtol=1e-8)

    assert str(jax.make_jaxpr(solve)(X, V, *sharded(data, mesh))).count(" tanh ") == 1
    program = jax.jit(solve).lower(X, V, *sharded(data, mesh)).compile()
    found = collectives(program)
    assert {key[:2] for key in found} == {("all-reduce", N)}
    assert {count for key, count in found.items() if key[2] != "once"} == {1}  # in a step, and in a restart
    x, info = program(X, V, *sharded(data, mesh))
    assert info.status == curvature.Status.CONVERGED
    matrix = MATRICES["gauss_newton"](X, *data).as_matrix() + 0.1 * jnp.eye(N)
    assert_close(flat(x), jnp.linalg.solve(matrix, flat(V)), roundings=1e8)


def test_jacobians_and_kernels_of_sharded_data(mesh, data):
    """Outputs stay where their examples are; only what is shaped like the point is summed over devices."""
    args = sharded(data, mesh)
    ops = [curvature.JacobianOperator(model, X, *args), curvature.NTKOperator(model, X, *args)]
    alone = [curvature.JacobianOperator(model, X, *data), curvature.NTKOperator(model, X, *data)]
    w = np.cos(np.arange(40.0))
    for op, same, v, count in ((ops[0], alone[0], V, 0), (ops[0].T, alone[0].T, w, 1), (ops[1], alone[1], w, 1)):
        at = jax.device_put(v, NamedSharding(mesh, P("data"))) if v is w else v
        program = jax.jit(product).lower(op, at).compile()
        assert collectives(program) == Counter({("all-reduce", N, "once"): count} if count else {})
        assert_trees_close(program(op, at), product(same, v), roundings=ROUNDINGS)


# ---- inside the user's own shard_map and pmap ------------------------------------------------------------------------


def test_operators_of_losses_that_reduce_by_themselves(mesh, data):
    """By a point that all devices share, the objective is the mean over all; so are its curvature matrices."""

    def all_loss(z, a, y):
        return jax.lax.pmean(loss(z, a, y), "data")

    def all_objective(x, a, y):
        return all_loss(model(x, a, y), a, y)

    def on_device(x, v, *args):
        ops = {
            "hessian": curvature.HessianOperator(all_objective, x, *args),
            "gauss_newton": curvature.GaussNewtonOperator(model, all_loss, x, *args),
            "rev_over_rev": curvature.HessianOperator(all_objective, x, *args, mode="rev_over_rev"),
        }
        return {key: op @ v for key, op in ops.items()}, ops["gauss_newton"].as_matrix()

    specs = {"mesh": mesh, "in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
    products, matrix = jax.jit(jax.shard_map(on_device, **specs))(X, V, *data)
    assert_trees_close(products.pop("rev_over_rev"), products["hessian"], roundings=ROUNDINGS)
    for name, got in products.items():
        assert_trees_close(got, product(MATRICES[name](X, *data), V), roundings=ROUNDINGS)
    assert_close(matrix, MATRICES["gauss_newton"](X, *data).as_matrix(), roundings=ROUNDINGS)


def test_each_device_has_an_operator_of_its_own_data(mesh, data):
    """At a point that is its own too; averaged by hand, the products are those of all data."""

    def on_device(x, v, *args):
        x, v = jax.lax.pcast((x, v), "data", to="varying")
        ops = [MATRICES[name](x, *args, chunk_size=size) for name in ("hessian", "empirical") for size in (None, 2)]
        return jax.lax.pmean([op @ v for op in ops], "data")

    specs = {"mesh": mesh, "in_specs": (P(), P(), P("data"), P("data")), "out_specs": P()}
    got = jax.jit(jax.shard_map(on_device, **specs))(X, V, *data)
    hessian, empirical = (product(MATRICES[name](X, *data), V) for name in ("hessian", "empirical"))
    for one, want in zip(got, (hessian, hessian, empirical, empirical), strict=True):
        assert_trees_close(one, want, roundings=ROUNDINGS)


def of_one_example(x, a, y):
    return objective(x, a[None], y[None])


def every_transform(a, y, place=lambda tree: tree):
    """All that a device can compute by itself from its own examples; ``place`` says where the point lies."""
    x, v = place(jax.tree.map(jnp.asarray, (X, V)))
    gauss_newton = MATRICES["gauss_newton"](x, a, y)
    return {
        "hvp": curvature.hvp(objective, x, v, a, y),
        "linearize_grad": curvature.linearize_grad(objective, x, a, y)[2](v),
        "hessian": curvature.hessian(objective, chunk_size=3)(x, a, y),
        "matrix": curvature.matrix_view(curvature.hessian(objective)(x, a, y), x).matrix,
        "diagonal": curvature.hessian_diagonal(objective, x, a, y),
        "jacobian": curvature.jacobian(model)(x, a, y),
        "laplacian": curvature.laplacian(objective)(x, a, y),
        "directions": curvature.directional_derivatives(objective, x, v, a, y, order=3),
        "lanes": curvature.vmap(of_one_example, in_axes=(None, 0, 0), chunk_size=2)(x, a, y),
        "gradients": curvature.per_example_grad(of_one_example)(x, a, y),
        "hessians": curvature.per_example_hessian(of_one_example)(x, a, y),
        "norms": curvature.per_example_grad_norm(of_one_example)(x, a, y),
        "moments": curvature.per_example_grad_moments(of_one_example)(x, a, y),
        "clipped": curvature.clipped_grad(of_one_example, 0.1)(x, a, y)[0],
        "mean_hessian": curvature.mean_hessian(of_one_example)(x, a, y),
        "products": [MATRICES[name](x, a, y).mv(v) for name in MATRICES],
        "slices": MATRICES["empirical"](x, a, y, chunk_size=3).mv(v),
        "kernel": curvature.NTKOperator(model, x, a, y) @ y,
        "solution": curvature.cg(gauss_newton + curvature.damping(0.1), v, rtol=1e-10)[0],
    }


@pytest.fixture
def device_by_device(data):
    """The data with an axis of devices, and what one device makes of each part."""
    parts = [leaf.reshape(8, 5, *leaf.shape[1:]) for leaf in data]
    quick = jax.jit(jax.vmap(every_transform), compiler_options={"xla_backend_optimization_level": 0})
    return parts, quick(*parts)


def test_pmap_of_every_transform(device_by_device):
    parts, want = device_by_device
    assert_trees_close(jax.pmap(every_transform)(*parts), want, roundings=1e6)


def test_every_transform_inside_shard_map(mesh, data, device_by_device):
    def on_device(a, y):
        found = every_transform(a, y, lambda tree: jax.lax.pcast(tree, "data", to="varying"))
        return jax.tree.map(lambda leaf: leaf[None], found)

    mapped = jax.shard_map(on_device, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    assert_trees_close(jax.jit(mapped)(*data), device_by_device[1], roundings=1e6)


def test_pmap_of_prepared_sparse_derivatives(data):
    pytest.importorskip("asdex", exc_type=ImportError)
    v, parts = jnp.cos(jnp.arange(6.0)), jnp.asarray(data[1]).reshape(8, 5)
    hessian = curvature.sparse_hessian(lambda v, y: jnp.sum(y * (v[1:] - v[:-1] ** 2) ** 2), v, parts[0])
    jacobian = curvature.sparse_jacobian(lambda v, y: y * (v[1:] - v[:-1] ** 2), v, parts[0])
    for prepared in (hessian, jacobian):
        got = jax.pmap(lambda y, prepared=prepared: prepared(v, y).todense())(parts)
        assert_close(got, jnp.stack([prepared(v, y).todense() for y in parts]))


def test_pmap_of_an_operator_and_a_mean_over_devices(data):
    ops = jax.vmap(lambda *args: MATRICES["hessian"](X, *args))(*(leaf.reshape(8, 5, *leaf.shape[1:]) for leaf in data))
    got = jax.pmap(lambda op: jax.lax.pmean(op @ jax.tree.map(jnp.asarray, V), "data"), axis_name="data")(ops)
    want = product(MATRICES["hessian"](X, *data), V)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[3], got), want, roundings=ROUNDINGS)
