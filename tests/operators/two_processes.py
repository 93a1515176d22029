"""Products on data of which each of two processes holds a part; run by ``test_sharded.py``, once for each process."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import curvature
from tests.oracles import assert_trees_close


def model(x, a, y):
    return jnp.tanh(a @ x["in"] + x["bias"][None]) @ x["out"]


def loss(z, a, y):
    return jnp.mean((z - y) ** 2)


def objective(x, a, y):
    return loss(model(x, a, y), a, y)


def operators(x, args, chunk_size=None):
    return {
        "hessian": curvature.HessianOperator(objective, x, *args, chunk_size=chunk_size),
        "gauss_newton": curvature.GaussNewtonOperator(model, loss, x, *args, chunk_size=chunk_size),
        "empirical": curvature.FisherOperator(model, loss, x, *args, kind="empirical", chunk_size=chunk_size),
    }


@jax.jit
def products(ops, v):
    return {name: op @ v for name, op in ops.items()}


@jax.jit
def solve(op, b):
    return curvature.cg(op + curvature.damping(0.1), b, rtol=1e-10)


def main(process: int, port: int) -> None:
    """Agree with what one process finds on all data, or raise."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process, initialization_timeout=60)
    rng = np.random.default_rng(0)  # the same in both processes
    x = {"in": rng.normal(size=(3, 4)), "bias": rng.normal(size=4), "out": rng.normal(size=(4, 2))}
    v = jax.tree.map(np.cos, x)
    data = rng.normal(size=(20, 3)), rng.normal(size=(20, 2))
    mine = [leaf[process * 10 : process * 10 + 10] for leaf in data]

    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    assert jax.process_count() == 2
    assert mesh.size == 2 * jax.local_device_count()
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    args = [jax.make_array_from_process_local_data(sharding, part) for part in mine]
    assert all(array.shape == leaf.shape for array, leaf in zip(args, data, strict=True))

    want = products(operators(x, data), v)
    for chunk_size in (None, 3):
        got = products(operators(x, args, chunk_size=chunk_size), v)
        assert_trees_close(jax.tree.map(np.asarray, got), want)
    solution, info = solve(operators(x, args, chunk_size=3)["gauss_newton"], v)
    assert int(info.status) == curvature.Status.CONVERGED
    alone = solve(operators(x, data)["gauss_newton"], v)[0]
    assert_trees_close(jax.tree.map(np.asarray, solution), alone, roundings=1e6)
    print(f"process {process} agrees")
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
