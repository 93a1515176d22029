"""Every model is one formula: its loss, gradient, product and Hessian are the same in each library there is."""

import jax
import numpy as np
import pytest

from benchmarks import models
from benchmarks.cases import Choice
from benchmarks.peers import autograd_ways, flat, jax_ways, tensorflow_ways, torch_ways

SMALL = {
    "logistic": lambda: models.logistic(5, 12),
    "mlp": lambda: models.mlp((4, 5, 3), 7),
    "tanh network": lambda: models.tanh_network((4, 5, 2), 7),
    "convolutional": lambda: models.convolutional((2, 3), 12, 3),
    "transformer": lambda: models.transformer(4, 3, 2),
    "neural-ode": lambda: models.neural_ode(3, 4, 5),
    "pinn": lambda: models.pinn(3, 6),
}
WAYS: dict = {"torch": torch_ways, "tensorflow": tensorflow_ways, "autograd": autograd_ways}
LACKING = {("tensorflow", "pinn"), ("autograd", "pinn"), ("autograd", "convolutional")}
CHOICE = Choice(quick=True, dtype="float64")

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about themselves


@pytest.fixture(autouse=True)
def biases_broadcast():
    """As in a benchmark: every library adds a bias to a batch so."""
    with jax.numpy_rank_promotion("allow"):
        yield


def run(library, problem, derivative):
    """The answer of each contestant of a library that compiles nothing."""
    options = {"torch": {"compiled": False}, "tensorflow": {"executions": ("eager",)}}.get(library, {})
    for contestant in WAYS[library].contestants(problem, derivative, CHOICE, **options):
        yield contestant.name, np.asarray(contestant.read(contestant.make()()))


@pytest.mark.parametrize("library", WAYS)
@pytest.mark.parametrize("name", SMALL)
def test_gradients_agree(library, name):
    pytest.importorskip(library)
    model = SMALL[name]()
    problem = flat.of_model(model)
    if (library, name) in LACKING:
        with pytest.raises(NotImplementedError, match=f"{library} has no "):
            list(run(library, problem, "gradient"))
        return
    expected = jax_ways.reference(model, "gradient")
    for way, got in run(library, problem, "gradient"):
        np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12, err_msg=way)


@pytest.mark.parametrize("library", WAYS)
@pytest.mark.parametrize("derivative", ["hvp", "products", "hessian"])
def test_second_derivatives_agree(library, derivative):
    pytest.importorskip(library)
    model = SMALL["mlp"]()
    expected = jax_ways.reference(model, derivative)
    for way, got in run(library, flat.of_model(model, derivative), derivative):
        np.testing.assert_allclose(got, expected, rtol=1e-8, atol=1e-10, err_msg=way)


@pytest.mark.slow
def test_losses_are_means_over_examples():
    """What ``is_mean`` says, by which ``mean_hessian`` takes batches of one."""
    from benchmarks.peers.operations import for_jax

    for make in SMALL.values():
        model = make()
        loss, (params, batch) = model.loss, (model.params(), model.batch)
        one_by_one = [loss(for_jax(), params, *(part[i : i + 1] for part in batch)) for i in range(len(batch[0]))]
        np.testing.assert_allclose(loss(for_jax(), params, *batch), np.mean(one_by_one), rtol=1e-12, err_msg=model.name)
