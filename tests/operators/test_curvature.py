"""Hessian, Gauss-Newton, Fisher, Jacobian and kernel against dense oracles, and what they promise about cost."""

import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import curvature
from tests.operators.models import CASES, case_of, oracle, quick_jit
from tests.oracles import assert_close, assert_trees_close, flat

ROUNDINGS = 4e5  # 1e-10 relative, in double precision


def every_matrix(params, args, name, reduction, **parts):
    """All curvature matrices of a case but the sampled one."""
    case = CASES[name]
    loss, likelihood = case.loss_of(reduction), case.likelihood
    options = {"reduction": reduction, **parts}

    def objective(params, *args):
        return loss(case.model(params, *args), *args)

    given = case.model, loss, params, *args
    return {
        "hessian": curvature.HessianOperator(objective, params, *args, **options),
        "gauss_newton": curvature.GaussNewtonOperator(*given, **options),
        "exact by likelihood": curvature.FisherOperator(*given, likelihood=likelihood, **options),
        "empirical": curvature.FisherOperator(*given, kind="empirical", **options),
    }


def oracle_of(name, key, reduction):
    """What the sum over examples gives for one of these matrices."""
    truth = oracle(name)
    field = {"hessian": truth.hessian, "empirical": truth.outer_products}
    return truth.of(field.get(key, truth.gauss_newton), reduction)


def assert_oracles(matrices, name, reduction, dtype=jnp.float64, roundings=ROUNDINGS):
    for key, matrix in matrices.items():
        assert_close(matrix, oracle_of(name, key, reduction), dtype, roundings)


def dense(operators):
    return {key: op.as_matrix() for key, op in operators.items()}


@pytest.mark.thin
@pytest.mark.parametrize("name", CASES)
def test_matrices_are_sums_over_examples(name):
    """As matrices for mean losses, as products for sums."""
    case = case_of(name)
    v = jax.tree.map(jnp.cos, case.params)

    @quick_jit
    def answers(x, args):
        products = {key: op @ v for key, op in every_matrix(x, args, name, "sum").items()}
        return dense(every_matrix(x, args, name, "mean")), products

    matrices, products = answers(case.params, case.args)
    assert_oracles(matrices, name, "mean")
    for key, product in products.items():
        assert_close(flat(product), oracle_of(name, key, "sum") @ flat(v), roundings=ROUNDINGS)


@pytest.mark.parametrize("name", ["mlp", "linear"])
def test_slices_of_data_are_the_whole_data(name):
    """Seven examples in slices of three, or five, of which an argument is shared; one slice only for the sums."""
    case = case_of(name)
    v = jax.tree.map(jnp.cos, case.params)

    @quick_jit
    def answers(x, args):
        products = {key: op @ v for key, op in every_matrix(x, args, name, "sum", chunk_size=9).items()}
        return dense(every_matrix(x, args, name, "mean", chunk_size=3)), products

    matrices, products = answers(case.params, case.args)
    assert_oracles(matrices, name, "mean")
    for key, product in products.items():
        assert_close(flat(product), oracle_of(name, key, "sum") @ flat(v), roundings=ROUNDINGS)


def test_single_precision():
    case = case_of("mlp", jnp.float32)
    matrices = quick_jit(lambda x, args: dense(every_matrix(x, args, "mlp", "mean")))(case.params, case.args)
    assert all(matrix.dtype == jnp.float32 for matrix in matrices.values())
    assert_oracles(matrices, "mlp", "mean", jnp.float32, 256)


def small(reduction="mean", **options):
    """A Gauss-Newton operator of the multilayer perceptron, by its model, loss, params and args, and an oracle."""
    case = case_of("mlp")
    return curvature.GaussNewtonOperator(
        case.model, case.loss_of(reduction), case.params, *case.args, reduction=reduction, **options
    )


def test_products_are_linear_symmetric_and_map_over_lanes():
    case = case_of("mlp")
    v, w = (jax.tree.map(lambda leaf, k=k: jnp.cos(k + leaf), case.params) for k in (1.0, 2.0))

    @quick_jit
    def products(v, w):
        op = small()
        lanes = jax.vmap(op.mv)(jax.tree.map(lambda *leaves: jnp.stack(leaves), v, w))
        return op @ v, op @ w, op(jax.tree.map(lambda a, b: 2 * a - b, v, w)), lanes

    av, aw, combined, lanes = products(v, w)
    assert_trees_close(combined, jax.tree.map(lambda a, b: 2 * a - b, av, aw), roundings=ROUNDINGS)
    assert_close(flat(av) @ flat(w), flat(aw) @ flat(v), roundings=ROUNDINGS)
    assert_trees_close(jax.tree.map(lambda leaf: leaf[1], lanes), aw, roundings=ROUNDINGS)
    assert_close(flat(av), oracle("mlp").gauss_newton / 7 @ flat(v), roundings=ROUNDINGS)


def test_diagonals_and_blocks():
    case, truth = case_of("mlp"), oracle("mlp")
    names = {"in": slice(0, 20), "out/w": slice(24, 44), "": slice(0, 44)}

    @quick_jit
    def blocks(params, args):
        def objective(x, *args):
            return case.loss(case.model(x, *args), *args)

        whole = {
            "hessian": curvature.HessianOperator(objective, params, *args),
            "pulled": curvature.HessianOperator(objective, params, *args, mode="rev_over_rev"),
            "gauss_newton": curvature.GaussNewtonOperator(case.model, case.loss, params, *args, chunk_size=4),
        }
        pairs = [("in", "in"), ("in", "out/w"), ("out/w", "")]
        parts = {
            (key, *pair): (op.block(*pair).as_matrix(), op.block(*pair).T.as_matrix())
            for key, op in whole.items()
            for pair in pairs
        }
        return parts, whole["gauss_newton"].diagonal()

    parts, diagonal = blocks(case.params, case.args)
    for (key, rows, columns), (block, transposed) in parts.items():
        matrix = (truth.gauss_newton if key == "gauss_newton" else truth.hessian) / 7
        assert_close(block, matrix[names[rows], names[columns]], roundings=ROUNDINGS)
        assert_close(transposed, matrix[names[columns], names[rows]], roundings=ROUNDINGS)
    assert jax.tree.structure(diagonal) == jax.tree.structure(case.params)
    assert_close(flat(diagonal), np.diagonal(truth.gauss_newton) / 7, roundings=ROUNDINGS)


def test_a_block_in_forward_over_forward():
    def f(x):
        return jnp.sum(x["a"] ** 3) * x["b"]

    x = {"a": jnp.array([1.0, 2.0]), "b": jnp.array(3.0)}
    op = curvature.HessianOperator(f, x, mode="fwd_over_fwd")
    assert_close(op.block("a", "b").as_matrix(), [[3.0], [12.0]])
    assert_close(op.block("a").as_matrix(), [[18.0, 0.0], [0.0, 36.0]])


# ---- data ----------------------------------------------------------------------------------------------------------


def batches_of(args, sizes):
    """The data cut into batches."""
    edges = [0, *np.cumsum(sizes)]
    return [
        jax.tree.map(lambda leaf, i=i: leaf[edges[i] : edges[i + 1]] if leaf.ndim else leaf, args)
        for i in range(len(sizes))
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_on_the_host_are_the_whole_data(reduction):
    case = case_of("logistic")
    given = case.model, case.loss_of(reduction), case.params
    op = curvature.FisherOperator(
        *given, batches=batches_of(case.args, [3, 3, 1]), kind="empirical", reduction=reduction
    )
    want = oracle_of("logistic", "empirical", reduction)
    v = jax.tree.map(jnp.cos, case.params)
    product = op @ v
    assert_close(flat(product), want @ flat(v), roundings=ROUNDINGS)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, op @ v, product))
    assert_close(flat((2.0 * op + curvature.damping(1.0)) @ v), 2 * want @ flat(v) + flat(v), roundings=ROUNDINGS)
    assert_close(op.as_matrix(), want, roundings=ROUNDINGS)
    assert_close(flat(op.diagonal()), np.diagonal(want), roundings=ROUNDINGS)


def test_batches_compile_once_for_each_shape(capsys):
    traces = []

    def f(x, a):
        traces.append(a.shape)
        return jnp.mean((a @ x) ** 3)

    rng = np.random.default_rng(0)
    batches = [rng.normal(size=(n, 2)) for n in (4, 4, 3, 4)]
    ops = [curvature.HessianOperator(f, jnp.full(2, k), batches=batches, progress=True) for k in (1.0, 2.0)]
    ops[0] @ jnp.ones(2)
    first = len(traces)
    assert set(traces) == {(4, 2), (3, 2), (1, 2)}  # one example alone shows that f is a mean
    assert first <= 4
    ops[1] @ jnp.zeros(2)
    assert len(traces) == first  # a pass over the same batches at another point
    capsys.readouterr()


class Loader:
    """Batches that can be iterated over again and whose number is not known."""

    def __iter__(self):
        return iter([jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 2.0], [1.0, 1.0]])])


def test_a_bar_follows_each_pass_over_the_batches(monkeypatch):
    progress, bars = pytest.importorskip("rich.progress"), []

    def track(batches, name, **options):
        bars.append(name)
        return batches

    monkeypatch.setattr(progress, "track", track)
    for shown in (False, True):
        op = curvature.HessianOperator(lambda x, a: jnp.mean((a @ x) ** 2), X["w"], batches=Loader(), progress=shown)
        assert_close(op @ jnp.array([3.0, 0.0]), [4.0, 2.0])
        assert_close(op.as_matrix(), [[4 / 3, 2 / 3], [2 / 3, 10 / 3]])
    assert bars == ["HessianOperator"] * 2


def test_data_in_slices_holds_nothing_of_the_size_of_the_data():
    def f(x, a):
        return jnp.mean(jnp.sin(jnp.sin(a @ x)))

    def temporaries(chunk_size):
        x, a = jax.ShapeDtypeStruct((64, 64), float), jax.ShapeDtypeStruct((4096, 64), float)

        def product(x, a):
            return curvature.HessianOperator(lambda x, a: f(x, a), x, a, chunk_size=chunk_size) @ x

        return jax.jit(product).lower(x, a).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(128) < temporaries(None) / 8


# ---- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["logistic", "mlp", "linear"])
def test_samples_have_the_exact_matrix_as_their_mean(name):
    case, truth = case_of(name), oracle(name)

    @quick_jit
    def draw(key, params, args):
        options = {"kind": "sampled", "likelihood": case.likelihood, "key": key, "num_samples": 8}
        return curvature.FisherOperator(case.model, case.loss, params, *args, **options).as_matrix(None)

    draws = jnp.stack([draw(key, case.params, case.args) for key in jax.random.split(jax.random.key(3), 200)])
    error = jnp.std(draws, axis=0, ddof=1) / jnp.sqrt(200)
    distance = jnp.abs(jnp.mean(draws, axis=0) - truth.of(truth.gauss_newton, "mean"))
    assert jnp.all(distance <= 5 * error + 1e-12)
    assert jnp.max(error) > 0
    assert not jnp.array_equal(draws[0], draws[1])


def test_a_draw_depends_on_the_key_alone():
    case = case_of("logistic")
    options = {"kind": "sampled", "likelihood": "bernoulli", "num_samples": 2, "key": jax.random.key(5)}
    v = jax.tree.map(jnp.ones_like, case.params)

    @quick_jit
    def draw(params, args):
        given = case.model, case.loss, params, *args
        ops = [curvature.FisherOperator(*given, chunk_size=size, **options) for size in (None, 2)]
        return [op.as_matrix() for op in ops], ops[0] @ v

    (whole, in_parts), product = draw(case.params, case.args)
    batches = batches_of(case.args, [3, 3, 1])
    streamed = curvature.FisherOperator(case.model, case.loss, case.params, batches=batches, **options)
    assert_close(in_parts, whole, roundings=ROUNDINGS)
    assert_close(flat(streamed @ v), whole @ np.ones(4), roundings=ROUNDINGS)
    assert_close(flat(product), whole @ np.ones(4), roundings=ROUNDINGS)


def test_a_closed_form_takes_its_weights_from_the_loss():
    """A mask over tokens and a mean over what is left."""
    case = case_of("attention")
    mask = np.array([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 1, 1], [1, 1, 1]], float)

    def loss(logits, tokens, labels):
        rows = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)[..., 0]
        return -jnp.sum(mask * rows) / jnp.sum(mask)

    @quick_jit
    def products(params, args):
        v = jax.tree.map(jnp.cos, params)
        given = case.model, loss, params, *args
        return [
            curvature.GaussNewtonOperator(*given, likelihood=likelihood) @ v for likelihood in (None, "categorical")
        ]

    differentiated, closed = products(case.params, case.args)
    assert_trees_close(closed, differentiated, roundings=ROUNDINGS)


@pytest.mark.parametrize("likelihood", [None, "categorical"])
def test_nothing_of_classes_squared_is_formed(likelihood):
    case, classes = case_of("mlp"), 500
    params = case.params | {"out": {"w": jnp.ones((5, classes)), "b": jnp.ones(classes)}}
    op = curvature.GaussNewtonOperator(case.model, case.loss, params, *case.args, likelihood=likelihood)

    def sizes(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (v.aval.size for v in eqn.outvars)
            for body in jex.core.jaxprs_in_params(eqn.params):
                yield from sizes(body)

    assert max(sizes(jax.make_jaxpr(op.mv)(params).jaxpr)) <= 7 * classes


# ---- transformations and cost ---------------------------------------------------------------------------------------


def cubic(x, a):
    return jnp.mean((a @ x["w"] + x["b"]) ** 3)


def affine(x, a):
    return a @ x["w"] + x["b"]


def cubes(z, a):
    return jnp.mean(z**3)


X = {"w": np.array([1.0, 2.0]), "b": np.array(0.5)}
A = np.array([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]])


def test_a_new_point_or_batch_does_not_retrace():
    traces = []

    @jax.jit
    def product(op, v):
        traces.append(1)
        return op @ v

    for k in (1.0, 2.0):
        x = jax.tree.map(lambda leaf, k=k: k * leaf, X)
        for op in [
            curvature.HessianOperator(cubic, x, k * A) + curvature.damping(k),
            curvature.GaussNewtonOperator(affine, cubes, x, k * A, chunk_size=2),
            k * curvature.FisherOperator(affine, cubes, x, k * A, kind="empirical"),
            curvature.JacobianOperator(affine, x, k * A),
        ]:
            product(op, x)
    assert len(traces) == 4


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton", "kernel"])
def test_a_solve_evaluates_the_function_once(kind):
    calls = []

    def f(x, a):
        jax.debug.callback(lambda: calls.append(1))
        return jnp.sin(affine(x, a))

    @jax.jit
    def solve(x, a):
        if kind == "hessian":
            op = curvature.HessianOperator(lambda x, a: cubes(f(x, a), a), x, a)
        else:
            op = curvature.NTKOperator(f, x, a) if kind == "kernel" else curvature.GaussNewtonOperator(f, cubes, x, a)
        start = jnp.ones(3) if kind == "kernel" else x
        product = op.linearize()
        return jax.lax.fori_loop(0, 4, lambda _, v: product(v), start)

    jax.block_until_ready(solve(jax.tree.map(jnp.asarray, X), jnp.asarray(A)))
    jax.effects_barrier()
    assert len(calls) == 1


def test_lanes_of_operators_and_gradients_through_them():
    points = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), X)
    ops = jax.vmap(lambda x: curvature.HessianOperator(cubic, x, A))(points)
    v = jax.tree.map(jnp.ones_like, X)
    products = jax.vmap(lambda op: op @ v, in_axes=(0,))(ops)
    single = curvature.HessianOperator(cubic, jax.tree.map(lambda leaf: 2 * leaf, X), A) @ v
    assert_trees_close(jax.tree.map(lambda leaf: leaf[1], products), single, roundings=1e3)

    def curvature_along(x):
        product = curvature.GaussNewtonOperator(affine, cubes, x, A) @ v
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(product))

    slope = jax.grad(curvature_along)(jax.tree.map(jnp.asarray, X))
    u = A.sum(1) + 1  # J 1; the matrix along ones is mean(6 z u^2)
    assert_close(slope["b"], np.mean(6 * u**2))
    assert_close(slope["w"], 6 * (u**2) @ A / 3)


@jax.custom_vjp
def custom_square(x):
    return x**2


custom_square.defvjp(lambda x: (x**2, x), lambda x, w: (2 * x * w,))


def test_a_model_without_forward_derivative():
    x = jnp.array([1.0, 2.0])

    def model(x):
        return custom_square(x) * jnp.array([1.0, 3.0])

    op = curvature.GaussNewtonOperator(model, lambda z: jnp.sum(z**2) / 2, x)
    assert_close(op.as_matrix(), [[4.0, 0.0], [0.0, 144.0]])
    jacobian = curvature.JacobianOperator(model, x)
    assert_close(jacobian.as_matrix(None), [[2.0, 0.0], [0.0, 12.0]])
    assert_close(jacobian.T.as_matrix(), [[2.0, 0.0], [0.0, 12.0]])


def looped(x):
    return jax.lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, s[1] ** 2), (0, x))[1]


def test_a_model_without_reverse_derivative():
    x = jnp.array([1.0, 1.1])
    assert_close(curvature.JacobianOperator(looped, x) @ x, 8 * x**8)
    with pytest.raises(TypeError, match=r"GaussNewtonOperator: model has no reverse derivative because of while"):
        curvature.GaussNewtonOperator(looped, jnp.sum, x) @ x


@pytest.mark.thin
@pytest.mark.parametrize("name", CASES)
def test_jacobian_and_kernel(name):
    case = case_of(name)
    vector, unravel = ravel_pytree(case.params)

    @quick_jit
    def matrices(params, args):
        jacobian = curvature.JacobianOperator(case.model, params, *args)
        kernel = curvature.NTKOperator(case.model, params, *args)
        want = jax.jacobian(lambda v: ravel_pytree(case.model(unravel(v), *args))[0])(vector)
        w = case.model(params, *args)
        products = jacobian @ params, jacobian.T @ w, kernel @ w, kernel.diagonal()
        return jacobian.as_matrix(), jacobian.T.as_matrix(2), kernel.as_matrix(), products, want

    tall, wide, kernel, (pushed, pulled, both, diagonal), want = matrices(case.params, case.args)
    outputs, want = flat(case.model(case.params, *case.args)), np.asarray(want)
    assert_close(tall, want, roundings=ROUNDINGS)
    assert_close(wide, want.T, roundings=ROUNDINGS)
    assert_close(kernel, want @ want.T, roundings=ROUNDINGS)
    assert_close(flat(pushed), want @ flat(case.params), roundings=ROUNDINGS)
    assert_close(flat(pulled), want.T @ outputs, roundings=ROUNDINGS)
    assert_close(flat(both), want @ want.T @ outputs, roundings=ROUNDINGS)
    assert_close(flat(diagonal), np.diagonal(want @ want.T), roundings=ROUNDINGS)


def test_a_jacobian_of_few_outputs():
    few = curvature.JacobianOperator(lambda x: jnp.stack([x[0] * x[1], x[2]]), jnp.array([1.0, 2.0, 3.0]))
    assert_close(few.as_matrix(), [[2.0, 1.0, 0.0], [0.0, 0.0, 1.0]])


# ---- errors ----------------------------------------------------------------------------------------------------------


def operator(**options):
    return curvature.FisherOperator(affine, cubes, X, A, **options)


ERRORS = {
    "direction": (
        lambda: operator() @ {"w": np.ones(3), "b": np.ones(())},
        r"FisherOperator: v\['w'\] has shape \(3,\), expected \(2,\) to match in_structure\(\)\['w'\]",
    ),
    "point": (
        lambda: curvature.HessianOperator(cubic, {"w": np.arange(2)}),
        r"HessianOperator: x\['w'\] has dtype int",
    ),
    "kernel point": (lambda: curvature.NTKOperator(affine, {}), r"NTKOperator: x is an empty tree"),
    "function": (
        lambda: curvature.JacobianOperator(3, X),
        r"JacobianOperator: f is 3 of type int, expected a function",
    ),
    "loss": (lambda: curvature.GaussNewtonOperator(affine, None, X, A), r"GaussNewtonOperator: loss is None"),
    "vector loss": (
        lambda: curvature.GaussNewtonOperator(affine, lambda z, a: z, X, A) @ X,
        r"GaussNewtonOperator: loss returns shape \(3,\), expected a scalar",
    ),
    "loss without an array": (
        lambda: curvature.GaussNewtonOperator(affine, lambda z, a: "text", X, A) @ X,
        r"GaussNewtonOperator: loss returns 'text' of type str, expected arrays and numbers",
    ),
    "integer outputs": (
        lambda: curvature.GaussNewtonOperator(lambda x: x["b"] > 0, cubes, X) @ X,
        r"GaussNewtonOperator: the output model\(x\) has dtype bool",
    ),
    "data": (lambda: curvature.HessianOperator(cubic, X, "no"), r"HessianOperator: args\[0\] is 'no' of type str"),
    "reduction": (lambda: operator(reduction="max"), r"FisherOperator: reduction='max' is unknown"),
    "kind": (lambda: operator(kind="true"), r"FisherOperator: kind='true' is unknown"),
    "likelihood": (lambda: operator(likelihood="poisson"), r"FisherOperator: likelihood='poisson' is unknown"),
    "no likelihood": (lambda: operator(kind="sampled"), r"FisherOperator: kind='sampled' .*needs likelihood="),
    "no key": (lambda: operator(kind="sampled", likelihood="normal"), r"FisherOperator: .*needs key="),
    "num_samples": (lambda: operator(num_samples=0), r"FisherOperator: num_samples=0, expected an integer >= 1"),
    "scalar output": (
        lambda: curvature.FisherOperator(lambda x: x["b"], lambda z: z**2, X, kind="empirical") @ X,
        r"FisherOperator: the output model\(x\) is a scalar, expected a leading axis of examples",
    ),
    "scalar logits": (
        lambda: curvature.FisherOperator(lambda x: x["b"], lambda z: z**2, X, likelihood="categorical") @ X,
        r"FisherOperator: likelihood='categorical', but the output model\(x\) is a scalar",
    ),
    "chunk_size": (lambda: operator(chunk_size=0), r"FisherOperator: chunk_size=0, expected an integer >= 1"),
    "nothing to cut": (
        lambda: curvature.HessianOperator(cubic, X, 1.0, chunk_size=2),
        r"HessianOperator: args has no array with a leading axis of examples",
    ),
    "uneven data": (
        lambda: curvature.HessianOperator(cubic, X, {"a": A, "y": np.ones(2)}, chunk_size=2),
        r"HessianOperator: args\[0\]\['y'\] has 2 examples along its leading axis, expected 3 to match args",
    ),
    "one-shot": (
        lambda: curvature.HessianOperator(cubic, X, batches=(a for a in [A])),
        r"HessianOperator: batches is <generator .* iterated over only once, but every product .*give a list",
    ),
    "no iterable": (
        lambda: curvature.HessianOperator(cubic, X, batches=3),
        r"HessianOperator: batches is 3 of t",
    ),
    "two sources": (
        lambda: curvature.HessianOperator(cubic, X, A, batches=[A]),
        r"HessianOperator: batches= and 1 args were given",
    ),
    "two ways to cut": (
        lambda: curvature.HessianOperator(cubic, X, batches=[A], chunk_size=2),
        r"HessianOperator: batches= and chunk_size were given",
    ),
    "no batch": (
        lambda: curvature.HessianOperator(cubic, X, batches=[]) @ X,
        r"HessianOperator: batches is empty, expected at least one batch",
    ),
    "batch of text": (
        lambda: curvature.HessianOperator(cubic, X, batches=["a"]) @ X,
        r"HessianOperator: args\[0\] is 'a' of type str",
    ),
    "traced batches": (
        lambda: jax.jit(lambda op, v: op @ v)(curvature.HessianOperator(cubic, X, batches=[A]), X),
        r"HessianOperator: x or v is traced, but batches= are summed on the host.*chunk_size=, pass op itself.*as_sci",
    ),
    "block": (
        lambda: operator().block("w", "nowhere"),
        r"FisherOperator\.block: columns='nowhere' is no path of x, expected one of \['b', 'w'\]",
    ),
}


class Unhashable:
    __hash__ = None

    def __call__(self, x, a):
        return cubic(x, a)


def test_a_function_that_cannot_be_hashed():
    with pytest.raises(TypeError, match=r"HessianOperator: f is .*Unhashable, which cannot be hashed; give a plain"):
        curvature.HessianOperator(Unhashable(), X, A)


@pytest.mark.filterwarnings("ignore::tests.typecheck.AnnotationWarning")
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()
