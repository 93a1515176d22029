"""The README's code runs, prints what it says, and its table names what exists."""

import doctest
import re
from pathlib import Path

import jax
import pytest

import curvature
from tests.test_architecture import public_names

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(autouse=True)
def strict_double_precision():
    """The README speaks to JAX as it comes: single precision, standard promotion."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def test_the_quickstart_runs():
    result = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted >= 8
    assert result.failed == 0


def test_the_table_lists_every_public_name():
    listed = set(re.findall(r"^\| `(\w+)", README.read_text(), re.MULTILINE))
    assert listed >= set(public_names(curvature))
