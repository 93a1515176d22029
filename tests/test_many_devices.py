"""Runs ``eight_devices.py`` in a process that has eight virtual devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("eight_devices.py")


@pytest.mark.slow
def test_the_suite_of_eight_devices_passes():
    flags = "--xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(SUITE)]
    ran = subprocess.run(
        command, env={**os.environ, "XLA_FLAGS": flags}, cwd=SUITE.parent.parent, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert " passed" in ran.stdout
