"""Random programs (``random_programs.py``): every fast path against the derivatives of JAX alone."""

import jax
import pytest

import curvature
from tests.fuzz import failures, failures_of_graph, report
from tests.random_programs import Piece, Program, draw, shrink


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def check(seed):
    program = draw(seed)
    found = failures(program)
    assert not found, report(program, found)


def free_memory(seed):
    """Drop compiled programs, which would fill the memory, in each of two processes that take seeds by turns."""
    if seed % 20 >= 18:
        jax.clear_caches()


@pytest.mark.thin
@pytest.mark.parametrize("seed", range(10_000, 10_012))
def test_a_random_program_has_the_derivatives_of_jax(seed):
    check(seed)


@pytest.mark.parametrize("seed", range(10_000, 10_003))
def test_a_random_graph_has_the_derivatives_of_jax(seed):
    found = failures_of_graph(seed)
    assert not found, found


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_many_random_graphs_have_the_derivatives_of_jax(seed):
    found = failures_of_graph(seed)
    assert not found, found
    free_memory(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(150))
def test_many_random_programs_have_the_derivatives_of_jax(seed):
    check(seed)
    free_memory(seed)


def test_a_seed_always_gives_the_same_program():
    assert draw(7).text() == draw(7).text()
    assert draw(7).text() != draw(8).text()


def test_a_failure_shrinks_to_the_piece_that_causes_it():
    programs = (draw(seed) for seed in range(1000))
    guilty = next(program for program in programs if "recurrent" in program.names and len(program.layers) > 2)
    small = shrink(guilty, lambda program: "recurrent" in program.names)
    assert [piece.kind for piece in small.layers] == ["recurrent"]
    assert small.tails == ()
    assert (small.start.kind, small.reduction.kind) == ("features", "mean")


def test_a_wrong_derivative_is_found(monkeypatch):
    """The comparison itself: moments of doubled gradients do not pass."""
    program = Program(2, Piece("features"), (Piece("dense"),), Piece("sines"), (), Piece("mean"), "vmap", 3, 2)
    assert failures(program) == {}
    right = curvature.mean_hessian
    monkeypatch.setattr(curvature, "mean_hessian", lambda loss, **options: right(lambda *a: 2 * loss(*a), **options))
    assert "mean_hessian" in failures(program)
