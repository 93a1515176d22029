"""The examples run, and do what they say; each in a process of its own, since they set JAX up for themselves."""

import math
import re
import subprocess
import sys
from pathlib import Path
from statistics import NormalDist

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    """What a program prints."""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


@pytest.mark.slow
def test_pinn(tmp_path):
    for module in ("matplotlib", "rich"):
        pytest.importorskip(module)
    picture = tmp_path / "output" / "pinn.png"
    code = f"import pathlib; from examples import pinn; print(pinn.main(40, pathlib.Path({str(picture)!r})))"
    printed = run(code)
    assert "mean square residual" in printed
    assert float(printed.split()[-1]) < 0.1  # 0.001 after all steps
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_private_digits():
    for module in ("sklearn", "rich"):
        pytest.importorskip(module)
    code = """
import jax, jax.numpy as jnp, numpy as np
from examples import private_digits as example
data, _ = example.load()
private_grad, key = jax.jit(example.private_grad), jax.random.key(5)
ways = [private_grad(example.start(), key, jnp.asarray(noise), *data) for noise in (0.0, 4.0)]
noise = jax.tree.map(lambda quiet, noisy: np.ravel(noisy - quiet), *ways)
found = example.main(20)
print(np.std(np.concatenate(jax.tree.leaves(noise))) * len(data.labels) / example.MAX_NORM, example.epsilon(20, 4.0))
print(*found.values())
"""
    *printed, told, accuracies = run(code).splitlines()
    assert any("Clipping costs" in line for line in printed)
    multiplier, epsilon = map(float, told.split())
    assert abs(multiplier - 4) < 0.3  # five standard errors of 2,730 numbers
    # What 20 steps of this noise leave at epsilon, exactly: Dong, Roth and Su (arXiv:1905.02383), corollary 2.13.
    mu, cdf = 20**0.5 / 4, NormalDist().cdf
    delta = cdf(-epsilon / mu + mu / 2) - math.exp(epsilon) * cdf(-epsilon / mu - mu / 2)
    assert 1e-7 < delta <= 1e-5
    plain, *others = map(float, accuracies.split())
    assert plain > 0.85
    assert min(others) > 0.5


@pytest.mark.slow
def test_which_mode():
    pytest.importorskip("rich")
    printed = run("from examples import which_mode; which_mode.main()")
    assert "x['scale'] is never used" in printed
    assert re.search(r"jacobian +fwd +<-", printed)
    assert "while at" in printed
    assert "(looping)" in printed
    assert "the Hessian is made by rev_over_rev" in printed
    assert "checks did not pass" in printed
    assert "The loop's derivatives are right" in printed


@pytest.mark.slow
def test_training(tmp_path):
    for module in ("matplotlib", "rich", "sklearn", "equinox"):
        pytest.importorskip(module)
    picture = tmp_path / "output" / "training.png"
    code = f"""
import pathlib
from examples import training
print(*training.main(8, pathlib.Path({str(picture)!r}), 2).values())
"""
    *printed, losses = run(code).splitlines()
    assert any("KFAC, batches apart" in line for line in printed)
    adam, *others = map(float, losses.split())
    assert max(adam, *others) < 1.5  # of 2.4 at the start
    hessian_free, natural, *kfac = others[2:]
    assert max(natural, *kfac) < 0.1
    assert hessian_free < adam
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_sharded_hvp():
    pytest.importorskip("rich")
    printed = " ".join(run("from examples import sharded_hvp; sharded_hvp.main()").split())
    assert "2048 examples on 8 devices" in printed
    rows = re.findall(
        r"(Hessian|Gauss-Newton|Fisher) (?:whole|in slices).*? (\S+) 1 all-reduce of ([\d,]+) num", printed
    )
    assert len(rows) == 7
    differences = [float(row[1]) for row in rows]
    differences += map(float, re.findall(r"(\S+) apart from (?:one device\.|the whole|one process)", printed))
    assert len(differences) == 11
    assert max(differences) < 1e-4
    assert [row[2] for row in rows].count("2,752") == 6  # a whole Hessian takes more
    assert "CONVERGED" in printed
    assert "Process 1 of 2 holds 1024 examples" in printed


@pytest.mark.slow
def test_laplace(tmp_path):
    for module in ("matplotlib", "rich"):
        pytest.importorskip(module)
    picture = tmp_path / "output" / "laplace.png"
    code = f"import pathlib; from examples import laplace; print(*laplace.main(3, pathlib.Path({str(picture)!r})))"
    printed = run(code)
    assert "The evidence is largest" in printed
    in_gap, near = map(float, printed.split()[-2:])
    assert 0.02 < near < 0.15  # the noise of 0.2 over the root of the points nearby
    assert in_gap > 3 * near
    assert picture.stat().st_size > 10_000


@pytest.mark.slow
def test_spectrum(tmp_path):
    for module in ("matplotlib", "rich", "sklearn"):
        pytest.importorskip(module)
    picture = tmp_path / "output" / "spectrum.png"
    code = f"""
import pathlib, numpy as np
from examples import spectrum
spectra = spectrum.main(5, pathlib.Path({str(picture)!r}))
print(*[float(np.trapezoid(found.density.density, found.density.grid)) for found in spectra.values()])
"""
    *printed, integrals = run(code).splitlines()
    assert any("After training" in line for line in printed)
    assert all(abs(float(integral) - 1) < 1e-3 for integral in integrals.split())
    assert picture.stat().st_size > 10_000
