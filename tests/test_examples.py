"""The examples run, and do what they say; each in a process of its own, since they set JAX up for themselves."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    """What a program prints."""
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    return ran.stdout


def test_pinn(tmp_path):
    for module in ("matplotlib", "rich"):
        pytest.importorskip(module)
    picture = tmp_path / "output" / "pinn.png"
    code = f"import pathlib; from examples import pinn; print(pinn.main(40, pathlib.Path({str(picture)!r})))"
    printed = run(code)
    assert "mean square residual" in printed
    assert float(printed.split()[-1]) < 0.1  # 0.001 after all steps
    assert picture.stat().st_size > 10_000
