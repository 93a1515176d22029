"""Solvers and estimators on a mesh of eight virtual devices, inside shard_map with its default checks.

Run by ``test_on_eight_devices.py`` in a process of its own.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvature
from curvature.operators._base import LinearOperator
from curvature.operators._pytrees import register_operator, static
from tests.oracles import assert_close

N = 12
ROWS = np.random.default_rng(0).normal(size=(16, N))
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


@register_operator
class Gram(LinearOperator):
    """``sum_b a_b a_b' + I`` over the rows of this device, or of all."""

    rows: object
    summed: bool = static()
    is_symmetric = True

    def mv(self, v):
        image = self.rows.T @ (self.rows @ v)
        return v + (jax.lax.psum(image, "data") if self.summed else image)

    def in_structure(self):
        return jax.ShapeDtypeStruct(self.rows.shape[1:], self.rows.dtype)

    out_structure = in_structure


def solutions(op):
    b = jnp.arange(1.0, N + 1)
    return [curvature.solve(op, b, method=method, rtol=1e-10)[0] for method in ("cg", "minres", "eigh", "auto")]


def estimates(op):
    return (
        curvature.eigsh(op, 2, which="LA").eigenvalues,
        curvature.lanczos(op, key=KEY, num_steps=3).diagonal,
        [curvature.trace(op, key=KEY, num_samples=3, method=method) for method in ("hutchinson", "hutch++")],
        curvature.diagonal(op, key=KEY, num_samples=4),
        curvature.logdet(op, key=KEY, num_samples=2, num_steps=4),
        curvature.spectral_density(op, key=KEY, num_samples=2, num_steps=3).ritz_values,
        curvature.nystrom_preconditioner(op, rank=3, key=KEY, damping=1.0) @ jnp.arange(1.0, N + 1),
    )


def assert_answers(function, got, rows):
    want = jax.jit(function)(Gram(rows, False))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(one, other, roundings=1e7)


# JAX's custom_linear_solve asks that what varies over the mesh be the same for the operator and for b.
@pytest.mark.parametrize(("function", "check_vma"), [(solutions, False), (estimates, True)])
def test_an_operator_that_sums_over_devices_gives_what_one_device_gives(mesh, function, check_vma):
    def summed(rows):
        return function(Gram(rows, True))

    run = jax.shard_map(summed, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma)
    assert_answers(function, jax.jit(run)(jnp.asarray(ROWS)), jnp.asarray(ROWS))


@pytest.mark.parametrize("function", [solutions, estimates])
def test_each_device_answers_for_its_own_operator(mesh, function):
    def of_shard(rows):
        return jax.tree.map(lambda leaf: leaf[None], function(Gram(rows, False)))

    got = jax.jit(jax.shard_map(of_shard, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(jnp.asarray(ROWS))
    assert_answers(function, jax.tree.map(lambda leaf: leaf[3], got), jnp.asarray(ROWS[6:8]))


@pytest.mark.parametrize("function", [solutions, estimates])
def test_sharded_data_gives_what_one_device_gives(mesh, function):
    rows = jax.device_put(jnp.asarray(ROWS), NamedSharding(mesh, P("data")))
    assert_answers(function, jax.jit(lambda rows: function(Gram(rows, False)))(rows), jnp.asarray(ROWS))


def test_a_restarted_eigensolver_takes_as_many_steps_on_each_device(mesh, monkeypatch):
    monkeypatch.setattr("curvature.linalg._eigsh._DENSE", 0)
    monkeypatch.setattr("curvature.linalg._eigsh._LEAST_BASIS", 6)
    wide = np.random.default_rng(1).normal(size=(16, 40))
    run = jax.shard_map(
        lambda rows: curvature.eigsh(Gram(rows, True), 1, which="LA", rtol=1e-8).eigenvalues,
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    assert_close(jax.jit(run)(jnp.asarray(wide)), np.linalg.eigvalsh(wide.T @ wide)[-1:] + 1, roundings=1e7)
