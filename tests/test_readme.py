"""The code of the README and of the guide runs and prints what it says; the table of names is complete."""

import doctest
import re
from pathlib import Path

import jax
import pytest

import curvature
from tests.test_architecture import public_names

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": 8, "docs/guide.md": 30}  # at least so many examples


@pytest.fixture(autouse=True)
def strict_double_precision():
    """The pages use JAX's defaults: single precision, standard promotion."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("page", PAGES)
def test_the_examples_of_a_page_run(page):
    options = doctest.NORMALIZE_WHITESPACE
    result = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=options)
    assert result.attempted >= PAGES[page]
    assert result.failed == 0


def test_the_table_lists_every_public_name():
    listed = re.findall(r"^\| `(\w+)", (ROOT / "docs" / "names.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted([*public_names(curvature), *public_names(curvature.types)])


def test_the_links_of_the_readme_lead_to_files():
    for link in re.findall(r"\]\(([^)#]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / link).exists(), link
