"""The stopwatch, by a clock that only the calls move."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import timing


@pytest.fixture
def took(monkeypatch):
    """A call that takes so many seconds of a made-up clock, and counts itself."""
    now, counts = [0.0], {}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def make(name, seconds):
        def call():
            counts[name] = counts.get(name, 0) + 1
            now[0] += seconds

        return call

    make.counts = counts
    return make


def test_fast_calls_are_warmed_up_and_take_turns(took):
    rows = timing.measure({"fast": took("fast", 0.125), "faster": took("faster", 0.0625)}, budget=2.0, rounds=4)
    assert took.counts == {"fast": 2 + 4 * 5, "faster": 2 + 4 * 9}  # each turn after one that does not count
    assert rows["fast"].seconds == 0.125
    assert rows["faster"].seconds == 0.0625


def test_the_first_run_of_a_slow_call_counts_and_one_that_is_overdrawn_stops(took):
    rows = timing.measure({"slow": took("slow", 9.0), "slower": took("slower", 3.0)}, budget=2.0, rounds=4)
    assert took.counts == {"slow": 1, "slower": 3}  # 9 > 4 * 2 at once; 3 + 3 + 3 > 4 * 2
    assert rows["slow"].seconds == 9.0
    assert rows["slower"].spread == (3.0, 3.0)


def test_nobody_always_follows_the_same_neighbor(took):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timing.measure(calls, budget=0.0, rounds=20)
    rounds = [tuple(order[start : start + 3]) for start in range(len(order) - 60, len(order), 3)]
    assert {tuple(sorted(turn)) for turn in rounds} == {("a", "b", "c")}
    assert {turn[0] for turn in rounds} == {"a", "b", "c"}


def test_programs_that_differ_in_names_only_are_one():
    x = jnp.arange(3.0)

    def programs(*functions):
        return [timing.prepare("", function, (x,))[0].program for function in functions]

    one, other, third = programs(lambda a: jnp.sin(a) + a, lambda b: (lambda c: c + jnp.sin(c))(b), jnp.cos)
    again, fused = programs(lambda longer_name: jnp.sin(longer_name) + longer_name, jax.jit(lambda a: jnp.sin(a) + a))
    assert one == again == fused
    assert len({one, other, third}) == 3
