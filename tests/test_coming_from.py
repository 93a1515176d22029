"""The page for those who come from other libraries: its code runs, and so does every call in its tables."""

import doctest
import re
from pathlib import Path

import jax
import pytest

PAGE = Path(__file__).parent.parent / "docs" / "coming_from.md"


@pytest.fixture(autouse=True)
def strict_double_precision():
    """The page speaks to JAX as it comes: single precision, standard promotion."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def run_page():
    """What the page's blocks define, and how their doctests went."""
    page = doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, PAGE.name, str(PAGE), 0)
    names = page.globs
    result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(page, clear_globs=False)
    return names, result


def test_the_page_runs():
    _, result = run_page()
    assert result.attempted >= 15
    assert result.failed == 0


@pytest.mark.slow
def test_every_call_in_its_tables_runs():
    names, _ = run_page()
    calls = re.findall(r"^\| .* \| `([^|]*)` \|$", PAGE.read_text(), re.MULTILINE)
    assert len(calls) >= 25
    for call in calls:
        jax.block_until_ready(eval(call, dict(names)))
