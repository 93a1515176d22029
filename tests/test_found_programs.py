"""Hand-written programs, and those that random search found to fail once, against the derivatives of JAX alone."""

import jax
import jax.numpy as jnp
import pytest

from tests.against_jax import Case, examples_taken_apart, failures_of, over_examples
from tests.nasty_programs import OF_BATCH, PER_EXAMPLE

# Wrong once, and run by `make test`; all others by `make test-slow`.
FOUND = (
    "all_from_one_vector",
    "associative_scan",
    "carry_and_squared_outputs",
    "eigenvalues_and_squared_vectors",
    "empty_leaf",
    "gain_of_all",
    "last_carry_of_weights",
    "log_determinant",
    "two_outputs_of_a_branch",
)
ASSEMBLED = ("hessian", "mean_hessian", "clipped_grad", "per_example_grad_moments")


@pytest.fixture(autouse=True)
def _as_users_write():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def failures(case, dtype=jnp.float64):
    tolerance = 1e-8 if dtype == jnp.float64 else 2e-3
    with examples_taken_apart(True):
        return failures_of(case, tolerance, only=ASSEMBLED)


def marked(names):
    return [pytest.param(name, marks=() if name in FOUND else pytest.mark.slow) for name in names]


@pytest.mark.thin
@pytest.mark.parametrize("name", marked(PER_EXAMPLE))
def test_a_loss_of_one_example_has_the_derivatives_of_jax(name):
    nasty = PER_EXAMPLE[name]
    losses = over_examples(nasty.fun)
    case = Case(nasty.fun, lambda p, *batch: jnp.mean(losses(p, *batch)), *nasty.values())
    assert failures(case) == {}


@pytest.mark.parametrize("name", marked(OF_BATCH))
def test_a_loss_of_a_batch_has_the_hessian_of_jax(name):
    nasty = OF_BATCH[name]

    def of_one(p, *example):
        """A batch of equal examples."""
        return nasty.fun(p, *(jnp.broadcast_to(leaf, (nasty.size, *leaf.shape)) for leaf in example))

    assert failures(Case(of_one, nasty.fun, *nasty.values())) == {}
