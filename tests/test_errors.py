"""The name at the beginning of an error message: the innermost public function, now or later, in each thread."""

import inspect
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature import _errors

NAMES = [name for name, value in vars(curvature).items() if inspect.isroutine(value) or hasattr(value, "cache_info")]
VECTOR = np.ones(2, np.float32)


def vector_valued(x, *args):
    return x


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"clear_caches", "_version"}))
def test_every_public_function_names_itself(name):
    function = getattr(curvature, name)
    inner = function.__wrapped__ if hasattr(function, "cache_info") else function  # public lies within the cache
    assert hasattr(inner, "__wrapped__"), f"{name} needs @public"
    assert inner.__name__ == name
    assert inspect.signature(function) == inspect.signature(inspect.unwrap(function))


# (the call, what its message begins with)
NESTED = {
    "within-vmap": (
        lambda: curvature.vmap(lambda x: curvature.hvp(vector_valued, x, x))(np.ones((2, 2), np.float32)),
        "hvp: ",
    ),
    "mapped-by-the-library": (
        lambda: curvature.per_example_grad(vector_valued)(VECTOR, np.ones((3, 2), np.float32)),
        "per_example_grad: ",
    ),
    "objective-calls-another": (
        lambda: curvature.minimize(lambda x: jnp.sum(curvature.hvp(vector_valued, x, x)), VECTOR),
        "hvp: ",
    ),
    "operator-in-a-solver": (
        lambda: curvature.cg(curvature.HessianOperator(vector_valued, VECTOR), VECTOR),
        "HessianOperator: ",
    ),
    "in-batches": (
        lambda: curvature.minimize_batched(vector_valued, np.ones((2, 2), np.float32)),
        "minimize_batched: ",
    ),
    "returned-and-traced-later": (
        lambda: curvature.vmap(jax.jit(curvature.hessian(lambda x: x[0])))(np.ones((2, 2), int)),
        "hessian: ",
    ),
    "update-within-another": (
        lambda: curvature.vmap(lambda x: curvature.newton().update(x, None, x))(np.ones((2, 2), np.float32)),
        "newton: ",
    ),
}


@pytest.mark.parametrize(("call", "start"), NESTED.values(), ids=NESTED)
def test_the_innermost_public_function_is_named(call, start):
    with pytest.raises((TypeError, ValueError), match=f"^{start}"):
        call()
    assert _errors.caller() == "curvature", "the name is reset after an error"


def test_a_name_outlives_the_call_that_set_it():
    with _errors.calling("outer"):
        function = _errors.later(_errors.caller)
    with _errors.calling("other"):
        assert function() == "outer"
        assert _errors.caller() == "other"


def test_threads_have_their_own_name():
    barrier = Barrier(4)

    def name_in_thread(name):
        with _errors.calling(name):
            barrier.wait()  # all four names are set before any is read
            return _errors.caller()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(name_in_thread, "abcd")) == list("abcd")
