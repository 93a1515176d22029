"""Examples that interact, weights of a masked mean, and losses that are no mean: refused with a reason, or exact."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvature import FisherOperator, GaussNewtonOperator, HessianOperator, KroneckerOperator
from tests.oracles import assert_close

rng = np.random.default_rng(5)
W, X, Y = rng.normal(size=(3, 2)), rng.normal(size=(6, 3)), rng.normal(size=(6, 2))
MASK = np.array([1.0, 1, 0, 1, 0, 1])


def arrays(*rest):
    return tuple(jnp.asarray(array) for array in (W, X, Y, *rest))


def linear(w, x, *args):
    return x @ w


def mean_square(outputs, x, y, *args):
    return jnp.mean(jnp.sum((outputs - y) ** 2, -1)) / 2


def total_square(outputs, x, y, *args):
    return jnp.sum((outputs - y) ** 2) / 2


def masked(outputs, x, y, mask):
    return jnp.sum(mask * jnp.sum((outputs - y) ** 2, -1)) / jnp.maximum(jnp.sum(mask), 1) / 2


def normalized(w, x, *args):
    z = x @ w
    return (z - jnp.mean(z, 0, keepdims=True)) / jnp.sqrt(jnp.var(z, 0, keepdims=True) + 1e-5)


@jax.custom_vjp
def shared_length(z):
    return z


shared_length.defvjp(lambda z: (z, None), lambda _, cotangent: (cotangent / jnp.linalg.norm(cotangent),))

MIXING = {
    "batch-norm": (normalized, r"at the earliest by reduce_sum at .*test_interactions\.py.*\(normalized\)"),
    "inside-relu": (lambda w, x, y: jax.nn.relu(normalized(w, x)), r"reduce_sum at .*\(normalized\)"),
    "attention": (lambda w, x, y: jax.nn.softmax((x @ w) @ (x @ w).T) @ x @ w, "by dot_general at"),
    "sorted": (lambda w, x, y: jnp.sort(x @ w, 0), r"by sort at .*test_interactions\.py"),
    "running-sum": (lambda w, x, y: jnp.cumsum(x @ w, 0), "by cumsum at"),
    "reversed": (lambda w, x, y: (x @ w)[::-1], "by rev at"),
    "rolled": (lambda w, x, y: jnp.roll(x @ w, 2, 0), "mixes the examples"),
    "spectrum": (lambda w, x, y: jnp.abs(jnp.fft.fft(x @ w, axis=0)), "by fft at"),
    "the-number-of-examples": (lambda w, x, y: x @ w / len(x), "mixes the examples of a batch: its outputs"),
    "the-place-in-the-batch": (lambda w, x, y: x @ w + jnp.arange(float(len(x)))[:, None], "mixes the examples"),
    "derivative-alone": (lambda w, x, y: shared_length(x @ w), "mixes the examples"),
}


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_examples_is_refused(name):
    model, message = MIXING[name]
    for make in (
        KroneckerOperator,
        jax.jit(lambda model, *rest: KroneckerOperator(model, *rest), static_argnums=(0, 1)),
    ):
        with pytest.raises(
            ValueError, match=r"KroneckerOperator: the model mixes the examples.*evaluation mode"
        ) as error:
            make(model, mean_square, *arrays())
        assert error.match(message)


@pytest.mark.slow
def test_random_numbers_are_those_of_an_example():
    def dropped(w, x, y, key):
        return x @ w * jax.random.bernoulli(key, 0.5, (len(x), 2)).astype(x.dtype)

    with pytest.raises(ValueError, match="draw random numbers from a key for each example"):
        KroneckerOperator(dropped, mean_square, *arrays(), jax.random.key(0))

    def dropped_by_keys(w, x, y, keys):
        return x @ w * jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (2,)).astype(x.dtype))(keys)

    keys = jax.random.split(jax.random.key(0), 6)
    op = KroneckerOperator(dropped_by_keys, mean_square, *arrays(), keys, approximation="ekfac")
    want = GaussNewtonOperator(dropped_by_keys, mean_square, *arrays(), keys).as_matrix()
    assert_close(op.trace(), jnp.trace(want))


def test_examples_that_only_seem_to_meet_are_accepted():
    """In statistics that are not returned, or cancel."""

    def model(w, x, y):
        z = x @ w
        jnp.mean(z, 0)
        largest = jax.lax.stop_gradient(jnp.max(z))
        return jnp.log(jnp.exp(z - largest)) + largest

    got = KroneckerOperator(model, mean_square, *arrays()).as_matrix()
    assert_close(got, np.kron(X.T @ X / 6, np.eye(2)), roundings=1e3)


def test_one_example_is_its_own_batch():
    w, x, y = arrays()
    got = KroneckerOperator(linear, lambda *args: jnp.sqrt(mean_square(*args)), w, x[:1], y[:1]).as_matrix()
    want = GaussNewtonOperator(linear, lambda *args: jnp.sqrt(mean_square(*args)), w, x[:1], y[:1]).as_matrix()
    assert_close(got, want, roundings=1e3)


def test_a_model_of_fixed_batch_size_is_refused():
    with pytest.raises(ValueError, match=r"fails on a batch of one example \(TypeError.*reshape by inputs.shape\[0\]"):
        KroneckerOperator(lambda w, x, y: x.reshape(6, 3) @ w, mean_square, *arrays())
    with pytest.raises(ValueError, match=r"returns shape \(2,\) for 6 examples and \(2,\) for one, expected shapes"):
        KroneckerOperator(lambda w, x, y: jnp.sum(w, 0), lambda o, x, y: jnp.sum(o**2), *arrays())


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o, x, y: jnp.sqrt(mean_square(o, x, y)), r"the loss mixes the outputs.*by sqrt at .*test_interactions"),
        (
            lambda o, x, y: -jnp.mean(jnp.diagonal(jax.nn.log_softmax(o @ o.T))),
            "the loss mixes the outputs.*dot_general",
        ),
        (lambda o, x, y: jnp.sum(jnp.var(o, 0)), "the loss mixes the outputs of different examples"),
    ],
)
def test_a_loss_that_couples_outputs_is_refused(loss, message):
    with pytest.raises(ValueError, match=message):
        KroneckerOperator(linear, loss, *arrays())


@pytest.mark.parametrize("likelihood", [None, "normal"])
@pytest.mark.parametrize("mask", [MASK, MASK.astype(int), MASK > 0], ids=["float", "int", "bool"])
def test_what_a_mask_leaves_out_does_not_count(mask, likelihood):
    def loss(outputs, x, y, mask):
        return masked(outputs, x, y, mask.astype(outputs.dtype))

    data = arrays(mask)
    got = jax.jit(lambda *data: KroneckerOperator(linear, loss, *data, likelihood=likelihood))(*data)
    exact = GaussNewtonOperator(linear, loss, *data).as_matrix()
    kept = X[MASK > 0]
    assert_close(got.as_matrix(), np.kron(kept.T @ kept / 4, np.eye(2)), roundings=1e3)
    assert_close(got.as_matrix(), exact, roundings=1e3)


def test_weights_are_those_of_the_whole_batch():
    """Where a leaf has its exact block, and in the trace of EKFAC, for weights other than zero and one."""

    def model(params, x, *args):
        return jnp.tanh(x @ params["w"]) * params["scale"][None]

    w, x, y, weights = arrays(rng.uniform(size=6))
    params = {"w": w, "scale": jnp.asarray(rng.normal(size=2))}
    op = KroneckerOperator(model, masked, params, x, y, weights, approximation="ekfac", chunk_size=4)
    exact = GaussNewtonOperator(model, masked, params, x, y, weights).as_matrix()
    assert_close(op.as_matrix()[:2, :2], exact[:2, :2], roundings=1e3)
    assert_close(op.trace(), jnp.trace(exact), roundings=1e3)


def test_a_batch_without_weight_is_zero():
    op = KroneckerOperator(linear, masked, *arrays(np.zeros(6)))
    assert_close(op.as_matrix(), np.zeros((6, 6)))


def test_data_of_the_loss_may_be_closed_over_and_examples_lie_along_any_axis():
    w, x, y = arrays()
    want = np.kron(X.T @ X / 6, np.eye(2))
    assert_close(KroneckerOperator(linear, lambda o, x: mean_square(o, x, y), w, x).as_matrix(), want)
    turned = KroneckerOperator(lambda w, x: (x @ w).T, lambda o, x: mean_square(o.T, x, y), w, x)
    assert_close(turned.as_matrix(), want)


def test_functions_that_hold_traced_arrays_can_be_tried():
    @jax.jit
    def traces(scale):
        model = lambda w, x, y: scale * linear(w, x)
        return KroneckerOperator(model, mean_square, *arrays()).trace()

    assert_close(traces(2.0), 4 * 2 * np.trace(X.T @ X) / 6)

    @jax.jit
    def refused(scale):
        return KroneckerOperator(lambda w, x, y: scale * normalized(w, x), mean_square, *arrays()).trace()

    with pytest.raises(ValueError, match="mixes the examples"):
        refused(2.0)


# ---- means and sums ------------------------------------------------------------------------------------------------


def of_model(loss):
    return lambda w, *args: loss(linear(w, *args), *args)


def hard_coded(outputs, x, y, *args):
    return total_square(outputs, x, y) / 6


MAKERS = {
    "hessian": lambda loss, *data, **options: HessianOperator(of_model(loss), *data, chunk_size=2, **options),
    "gauss-newton": lambda loss, *data, **options: GaussNewtonOperator(linear, loss, *data, chunk_size=2, **options),
    "fisher": lambda loss, *data, **options: FisherOperator(linear, loss, *data, kind="empirical", **options),
    "kronecker": lambda loss, *data, **options: KroneckerOperator(linear, loss, *data, **options),
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_mean_is_not_a_sum(name):
    make = MAKERS[name]
    for loss in (total_square, hard_coded):
        with pytest.raises(ValueError, match=r"reduction='mean', but .* is the sum .* pass reduction='sum'"):
            make(loss, *arrays())
    with pytest.raises(ValueError, match=r"reduction='sum', but .* is the mean .* pass reduction='mean'"):
        jax.jit(lambda *data: make(mean_square, *data, reduction="sum").as_matrix())(*arrays())


@pytest.mark.parametrize("name", ["hessian", "gauss-newton", "kronecker"])
def test_a_fixed_divisor_is_a_sum(name):
    got = MAKERS[name](hard_coded, *arrays(), reduction="sum").as_matrix()
    assert_close(got, np.kron(X.T @ X / 6, np.eye(2)))


@pytest.mark.parametrize("name", ["hessian", "gauss-newton", "fisher"])
def test_a_masked_mean_in_parts_is_neither(name):
    with pytest.raises(ValueError, match=r"neither the mean nor the sum .*chunk_size=None.* passed as a scalar"):
        MAKERS[name](masked, *arrays(MASK))


def test_a_sum_by_the_total_weight_adds_up():
    def loss(outputs, x, y, mask, total):
        return jnp.sum(mask * jnp.sum((outputs - y) ** 2, -1)) / total / 2

    data = arrays(MASK, MASK.sum())
    got = GaussNewtonOperator(linear, loss, *data, chunk_size=2, reduction="sum").as_matrix()
    assert_close(got, GaussNewtonOperator(linear, masked, *data[:-1]).as_matrix())


def test_batch_statistics_in_parts_are_refused():
    with pytest.raises(ValueError, match="neither the mean nor the sum"):
        GaussNewtonOperator(normalized, mean_square, *arrays(), chunk_size=3)


def test_batches_on_the_host_are_checked_when_the_first_one_comes():
    w, x, y = arrays()
    op = HessianOperator(of_model(total_square), w, batches=[(x[:4], y[:4]), (x[4:], y[4:])])
    with pytest.raises(ValueError, match="f of a batch is the sum"):
        op.mv(w)


def test_a_verdict_is_found_again():
    traced = []

    def f(w, x, y):
        traced.append(1)
        return of_model(mean_square)(w, x, y)

    for scale in (1.0, 2.0):
        w, x, y = arrays()
        HessianOperator(f, scale * w, scale * x, y, chunk_size=2)
    assert len(traced) == 2  # of the batch, and of one example
