"""Operators on many devices and in many processes, and the errors about how data lies on them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

import curvature

ROOT = Path(__file__).parent.parent.parent
MESH = AbstractMesh((4, 2), ("data", "model"))


def environment(devices):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


@pytest.mark.slow
def test_the_suite_of_eight_devices_passes():
    suite = Path(__file__).with_name("on_eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    ran = subprocess.run(command, env=environment(8), cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout


@pytest.mark.slow
def test_two_processes_agree_with_one():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tests.operators.two_processes"]
    options = {"env": environment(2), "cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, str(process), str(port)], **options) for process in range(2)]
    try:
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:  # one that waits for another that failed
            process.kill()
            process.wait()
    for process in range(2):
        assert f"process {process} agrees" in printed[process], "\n".join(text[-4000:] for text in printed)


def mean(x, a):
    return jnp.mean((a @ x) ** 4)


def operator(sharding, **data):
    args = () if data else (jnp.ones((12, 2)),)
    return curvature.HessianOperator(mean, jnp.ones(2), *args, sharding=sharding, **data)


@pytest.mark.filterwarnings("ignore::tests.typecheck.AnnotationWarning")
def test_a_layout_is_of_the_axis_of_examples():
    operator(NamedSharding(MESH, PartitionSpec("data")))
    with pytest.raises(TypeError, match=r"HessianOperator: sharding is .*'data'.*, expected None or .*NamedSharding"):
        operator("data")
    for spec in (PartitionSpec(), PartitionSpec(None, "data"), PartitionSpec("data", "model")):
        with pytest.raises(ValueError, match=r"HessianOperator: sharding has spec .*, expected the axes .* examples"):
            operator(NamedSharding(MESH, spec))


def test_devices_hold_equally_many_examples():
    with pytest.raises(ValueError, match=r"args\[0\] has 12 examples, expected a multiple of 8 to share them out"):
        operator(NamedSharding(MESH, PartitionSpec(("data", "model"))))


def test_batches_lie_where_they_were_placed():
    with pytest.raises(ValueError, match=r"batches= and sharding= were given; place each batch"):
        operator(NamedSharding(MESH, PartitionSpec("data")), batches=[jnp.ones((4, 2))])
