"""Every transformation in every wrapper of optax: it gives the numbers of a loop written by hand, or raises."""

import doctest
import functools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature
from curvature import Status
from tests.oracles import assert_trees_close

PAGE = Path(__file__).parent.parent.parent / "docs" / "wrappers.md"
KEY = jax.random.key(0)
DATA = np.array([[1.0, 0.0, 1.0], [0.0, 1.0, -1.0], [1.0, 1.0, 2.0], [2.0, -1.0, 0.5]])


def model(params, data):
    return data[:, :2] @ params["w"] + params["b"] ** 2


def loss(outputs, data):
    return jnp.mean(jnp.square(outputs - data[:, 2])) / 2


def start(dtype=jnp.float64):
    return {"b": jnp.asarray(0.75, dtype), "w": jnp.asarray([0.5, -0.5], dtype)}


def made(name, model=model):
    """The transformation of that name, on ``model`` where it needs one."""
    match name:
        case "trust_region_exact":
            return curvature.trust_region("exact")
        case "projected_newton" | "lbfgsb":
            return getattr(curvature, name)(-5.0, 5.0)
        case "natural_gradient":
            return curvature.natural_gradient(model, loss)
        case "kfac":
            return curvature.kfac(model, loss, (DATA,))
        case "sophia":
            return curvature.sophia(0.1, key=KEY)
        case "adahessian":
            return curvature.adahessian(0.1, key=KEY)
        case _:
            return getattr(curvature, name)()


QUASI_NEWTON = ["bfgs", "lbfgs", "lbfgsb", "sr1"]
KINDS = {
    "values": [
        "newton", "newton_cg", "trust_region", "trust_region_exact", "cubic_newton", "projected_newton", *QUASI_NEWTON
    ],
    "residuals": ["gauss_newton", "levenberg_marquardt"],
    "judged": ["natural_gradient", "kfac"],
    "diagonal": ["sophia", "adahessian"],
}  # fmt: skip
NAMES = [name for names in KINDS.values() for name in names]
by_name = pytest.mark.parametrize("name", NAMES)
transformations = functools.cache(made)


def extras(dtype=jnp.float64, whole=lambda params: params):
    """What an update may be given: functions of the whole tree, which ``whole`` makes of what they get."""
    data = jnp.asarray(DATA, dtype)
    return {
        "value_fn": lambda params: loss(model(whole(params), data), data),
        "residual_fn": lambda params: (model(whole(params), data) - data[:, 2]) / 2,
        "args": (data,),
    }


def first(dtype=jnp.float64):
    return jax.value_and_grad(extras(dtype)["value_fn"])(start(dtype))


def types(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def step(solver, state, params, value, grad, *, with_grad=True, **given):
    """One update as optax's documentation calls it."""
    given = {**extras(), "value": value, **({"grad": grad} if with_grad else {}), **given}
    return solver.update(grad, state, params, **given)


@functools.cache
def compiled(name):
    """One step, compiled once for all tests."""
    solver = transformations(name)
    return jax.jit(lambda grad, state, params, value: solver.update(grad, state, params, value=value, **extras()))


def stand_in(name):
    """The transformation with its compiled step, where ``disable_jit`` has the wrappers run eagerly."""

    def update(updates, state, params, *, value, **_):
        with jax.disable_jit(False):
            return compiled(name)(updates, state, params, value)

    return optax.GradientTransformationExtraArgs(transformations(name).init, update)


# ---- the table -------------------------------------------------------------------------------------------------------


def table():
    """The cells of the page by wrapper and kind."""
    rows = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    kinds = rows[0][1:]
    return {row[0]: dict(zip(kinds, row[1:], strict=True)) for row in rows[1:]}


def scaled(factor, tree):
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def after(name, make):
    value, grad = first()
    solver = optax.chain(optax.identity(), make(name), optax.scale(0.5))
    updates, _ = step(solver, solver.init(start()), start(), value, grad)
    return updates, lambda of: scaled(0.5, of(grad))


def decayed(name, make):
    value, grad = first()
    solver = optax.chain(optax.add_decayed_weights(2.0), make(name))
    updates, _ = step(solver, solver.init(start()), start(), value, grad)
    return updates, lambda of: of(jax.tree.map(lambda g, x: g + 2 * x, grad, start()))


def clipped(name, make):
    value, grad = first()
    solver = optax.chain(optax.clip(0.1), make(name))
    updates, _ = step(solver, solver.init(start()), start(), value, grad)
    return updates, lambda of: of(jax.tree.map(lambda g: jnp.clip(g, -0.1, 0.1), grad))


def multiple(name, make, with_grad=True):
    value, grad = first()
    solver = optax.MultiSteps(make(name), 2, accumulator_dtype=jnp.float64)
    state = solver.init(start())
    for gradient in (scaled(0.5, grad), scaled(1.5, grad)):
        updates, state = step(solver, state, start(), value, gradient, with_grad=with_grad)
    return updates, lambda of: of(grad)


def if_finite(name, make):
    value, grad = first()
    solver = optax.apply_if_finite(make(name), 3)
    state = solver.init(start())
    bad, state = step(solver, state, start(), value, scaled(jnp.nan, grad))
    updates, _ = step(solver, state, start(), value, grad)
    return jax.tree.map(jnp.add, updates, bad), lambda of: of(grad)


def of_some(name, make):
    value, grad = first()
    solver = optax.masked(make(name), {"w": True, "b": False})
    return step(solver, solver.init(start()), start(), value, grad)[0], None


def of_parts(name, make):
    value, grad = first()
    solver = optax.partition({"a": make(name), "rest": optax.set_to_zero()}, {"w": "a", "b": "rest"})
    return step(solver, solver.init(start()), start(), value, grad)[0], None


def flattened(name, make):
    value, grad = first()
    solver = optax.flatten(make(name))
    return step(solver, solver.init(start()), start(), value, grad)[0], None


WRAPPERS = {
    "`chain(identity, m, scale)`": after,
    "`chain(add_decayed_weights, m)`": decayed,
    "`chain(clip, m)`": clipped,
    "`MultiSteps(m)` with `grad=`": multiple,
    "`MultiSteps(m)` without `grad=`": functools.partial(multiple, with_grad=False),
    "`apply_if_finite(m)`": if_finite,
    "`masked(m)`": of_some,
    '`partition({"a": m})`': of_parts,
    "`flatten(m)` with `grad=`": flattened,
}
OTHERS = {
    "`masked(m)` with functions that fill in": "test_masked_leaves_that_functions_fill_in",
    "`inject_hyperparams(...)`": "test_hyperparameters_can_be_injected",
    "`tree.map_params`, `tree.get`, `tree.set`": "test_trees_in_states_are_found",
    "`jit(donate_argnums=...)` of the state": "test_states_can_be_donated",
}
ERRORS = {
    "refused [2]": (ValueError, r"updates are other arrays than grad=.*Put \w+ first in the chain.*leave out grad="),
    "refused [4]": (TypeError, r"optax.MaskedNode instead of params\['b'\].*functions that fill in the masked"),
    "refused [5]": (TypeError, "does not support string indexing"),
    "refused [2, 5]": ((ValueError, TypeError), "updates are other arrays than grad=|does not support string indexing"),
}


@pytest.mark.thin
@by_name
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_each_pair_of_the_table(name, wrapper):
    """Refused pairs raise while tracing; the others trace, and step by step give the numbers by hand."""
    kind = next(kind for kind, names in KINDS.items() if name in names)
    cell, run = table()[wrapper][kind], WRAPPERS[wrapper]
    transformations(name)  # which keeps what it makes: not under a trace
    if cell.startswith("refused"):
        error, message = ERRORS[cell]
        with pytest.raises(error, match=message), jax.numpy_dtype_promotion("standard"):
            run(name, transformations)
        return
    with jax.numpy_dtype_promotion("standard"):  # which optax's wrappers need
        assert types(jax.eval_shape(lambda: run(name, transformations)[0])) == types(start())
        with jax.disable_jit():
            updates, reference = run(name, stand_in)
    value = first()[0]
    expected = reference(lambda grad: compiled(name)(grad, transformations(name).init(start()), start(), value)[0])
    assert_trees_close(updates, expected, roundings=1e4)


FILLED = ["newton", "lbfgs", "gauss_newton", "natural_gradient", "adahessian"]


@pytest.mark.thin
@pytest.mark.parametrize("name", FILLED)
def test_masked_leaves_that_functions_fill_in(name):
    """Steps are those of the same problem in the leaves that are left."""
    is_masked = lambda node: isinstance(node, optax.MaskedNode)
    fill = lambda leaf, whole: whole if is_masked(leaf) else leaf
    whole = lambda part: jax.tree.map(fill, part, start(), is_leaf=is_masked)
    value, grad = first()
    inner = made(name, lambda part, data: model(whole(part), data))
    solver = optax.masked(inner, {"w": True, "b": False})
    given = {"value": value, "grad": grad, **extras(whole=whole)}
    if name in KINDS["judged"]:
        del given["value_fn"]
    updates, _ = solver.update(grad, solver.init(start()), start(), **given)

    alone = made(name, lambda w, data: model({**start(), "w": w}, data))
    given = {**given, "grad": grad["w"], **extras(whole=lambda w: {**start(), "w": w})}
    expected, _ = alone.update(grad["w"], alone.init(start()["w"]), start()["w"], **given)
    assert_trees_close(updates, {"b": grad["b"], "w": expected}, roundings=1e4)


STATIC = {
    "lbfgs": "memory_size",
    "lbfgsb": "memory_size",
    "natural_gradient": ("model", "loss", "adapt_every", "max_inner_steps"),
    "kfac": ("model", "loss", "example", "adapt_every", "refresh_every", "invert_every"),
    "sophia": "refresh_every",
    "adahessian": ("refresh_every", "spatial_axes"),
}
ARGUMENTS = {
    "lbfgsb": ((-5.0, 5.0), {}),
    "projected_newton": ((-5.0, 5.0), {}),
    "trust_region": ((), {"initial_radius": 0.5}),
    "trust_region_exact": (("exact",), {"initial_radius": 0.5}),
    "levenberg_marquardt": ((), {"initial_radius": 0.5}),
    "natural_gradient": ((model, loss), {"damping": 0.125}),
    "kfac": ((model, loss, (DATA,)), {"damping": 0.125}),
    "sophia": ((0.1,), {"key": KEY, "b1": 0.5}),
    "adahessian": ((0.1,), {"key": jax.random.PRNGKey(0), "b1": 0.5}),
}


@pytest.mark.thin
@by_name
def test_hyperparameters_can_be_injected(name):
    """They are arrays of the state then, which a schedule may change: the step is the one of these numbers."""
    factory = getattr(curvature, name.removesuffix("_exact"))
    arguments, options = ARGUMENTS.get(name, ((), {}))
    value, grad = first()
    with jax.numpy_dtype_promotion("standard"):  # which optax's wrappers need
        injected = optax.inject_hyperparams(factory, static_args=STATIC.get(name, ()))(*arguments, **options)
        update = lambda state: step(injected, state, start(), value, grad)
        state = injected.init(start())
        assert types(jax.eval_shape(update, state)[1].inner_state) == types(state.inner_state)
        if name in ("trust_region", "sophia"):
            alone = factory(*arguments, **options)
            assert_trees_close(update(state)[0], step(alone, alone.init(start()), start(), value, grad)[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: optax.inject_hyperparams(curvature.lbfgs)(memory_size=5), "memory_size is the array 5"),
        (lambda: optax.inject_hyperparams(curvature.sophia)(0.1, key=KEY), "refresh_every is the array 10"),
        (lambda: optax.inject_hyperparams(curvature.adahessian)(0.1, key=KEY), "spatial_axes was called with"),
    ],
    ids=["lbfgs", "sophia", "adahessian"],
)
@pytest.mark.filterwarnings("ignore::tests.typecheck.AnnotationWarning")
def test_what_must_be_static_says_so(make, message):
    with pytest.raises(TypeError, match=f"{message}.*static_args of optax.inject_hyperparams"):
        make().init(start())


@by_name
def test_trees_in_states_are_found(name):
    """Trees like the parameters are mapped, all else is not: a matrix or a memory of flat vectors is no such tree."""
    solver, params = transformations(name), start()
    state = solver.init(params)
    specs = optax.tree.map_params(
        solver, lambda leaf, spec: (leaf.shape, spec), state, {"b": "B", "w": "W"}, transform_non_params=lambda _: None
    )
    leaves = jax.tree.leaves(specs, is_leaf=lambda node: isinstance(node, tuple) and node[1:] in (("B",), ("W",)))
    trees = {"natural_gradient": 0, "kfac": 1, "sophia": 2, "adahessian": 2, **dict.fromkeys(QUASI_NEWTON, 2)}
    assert leaves == [((), "B"), ((2,), "W")] * trees.get(name, 1)
    if name in (*KINDS["values"], *KINDS["residuals"]):
        assert optax.tree.get(state, "status") == Status.RUNNING
        assert optax.tree.get(optax.tree.set(state, status=jnp.int32(Status.STALLED)), "status") == Status.STALLED


@by_name
def test_states_can_be_donated(name):
    """No leaf shares its buffer with another one, nor with what the caller keeps."""
    params, raw = start(), jax.random.PRNGKey(0)
    solver = {
        "trust_region": lambda: curvature.trust_region("cg", initial_radius=params["b"]),
        "sophia": lambda: curvature.scale_by_sophia(key=raw),
        "adahessian": lambda: curvature.scale_by_adahessian(key=raw),
    }.get(name, lambda: transformations(name))()
    donate = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf[None], state), donate_argnums=0)
    for _ in range(2):
        donate(solver.init(params))
    assert_trees_close(params, start())
    assert raw[1] == 0  # a donated key would be gone


# ---- dtypes, gradients that are not finite, and points that were left ------------------------------------------------


@pytest.mark.thin
@by_name
@pytest.mark.parametrize(
    ("dtype", "of_value"),
    [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float32), (jnp.float32, jnp.float64)],
    ids=["bfloat16", "float16", "float32"],
)
def test_a_scan_keeps_every_dtype(name, dtype, of_value):
    """So does ``lax.cond``, whatever the dtype of the value that comes in."""
    solver = curvature.kfac(model, loss, (jnp.asarray(DATA, dtype),)) if name == "kfac" else transformations(name)
    given = extras(dtype)

    def body(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(given["value_fn"])(params)
        skip = lambda: (jax.tree.map(jnp.zeros_like, params), state)
        move = lambda: solver.update(grad, state, params, **given, value=value.astype(of_value), grad=grad)
        updates, state = jax.lax.cond(value < 10, move, skip)
        return (optax.apply_updates(params, updates), state), value

    carry = start(dtype), solver.init(start(dtype))
    assert types(jax.eval_shape(lambda: jax.lax.scan(body, carry, length=3))[0]) == types(carry)


@pytest.mark.parametrize("name", QUASI_NEWTON)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bfloat16", "float32"])
def test_optax_takes_value_and_gradient_from_the_state_in_any_precision(name, dtype):
    params, value_fn = start(dtype), extras(dtype)["value_fn"]
    take = lambda state: optax.value_and_grad_from_state(value_fn)(params, state=state)
    value, grad = jax.eval_shape(take, transformations(name).init(params))
    assert value.dtype == dtype
    assert types(grad) == types(params)


@pytest.mark.parametrize("name", [*KINDS["values"]])
@pytest.mark.parametrize("bad", ["grad", "value"])
def test_a_nan_leaves_everything_as_it_was(name, bad):
    """The step is zero, and the next one is that of a state which has not seen the NaN."""
    value, grad = first()
    params = start()
    updates, state = compiled(name)(grad, transformations(name).init(params), params, value)
    params = optax.apply_updates(params, updates)
    value, grad = jax.value_and_grad(extras()["value_fn"])(params)
    expected, _ = compiled(name)(grad, state, params, value)

    of_value, of_grad = (jnp.nan, 1.0) if bad == "value" else (1.0, jnp.nan)
    nothing, after = compiled(name)(scaled(of_grad, grad), state, params, of_value * value)
    assert_trees_close(nothing, scaled(0.0, params))
    assert after.status == Status.NONFINITE
    updates, _ = compiled(name)(grad, after, params, value)
    assert_trees_close(updates, expected)


@pytest.mark.parametrize("name", QUASI_NEWTON)
def test_a_value_stored_for_a_point_that_was_left_is_not_used(name):
    """In a chain with ``scale(0.5)`` every second update waits for a fresh gradient; the others are those by hand."""
    solver, value_fn = transformations(name), extras()["value_fn"]
    take = jax.jit(lambda params, state: optax.value_and_grad_from_state(value_fn)(params, state=state))
    params, state = start(), solver.init(start())
    by_hand, memory = start(), solver.init(start())
    for i in range(8):
        value, grad = take(params, state)
        updates, state = compiled(name)(grad, state, params, value)
        params = optax.apply_updates(params, scaled(0.5, updates))
        if i % 2 == 0:
            value, grad = jax.value_and_grad(value_fn)(by_hand)
            updates, memory = compiled(name)(grad, memory, by_hand, value)
            by_hand = optax.apply_updates(by_hand, scaled(0.5, updates))
        assert state.status == Status.RUNNING
        assert_trees_close(params, by_hand, roundings=1e6)
    assert value_fn(params) < first()[0]


@pytest.mark.parametrize("name", QUASI_NEWTON)
def test_without_a_chain_no_update_waits(name):
    solver, value_fn = transformations(name), extras()["value_fn"]
    take = jax.jit(lambda params, state: optax.value_and_grad_from_state(value_fn)(params, state=state))
    params, state = start(), solver.init(start())
    for _ in range(4):
        value, grad = take(params, state)
        updates, state = compiled(name)(grad, state, params, value)
        params = optax.apply_updates(params, updates)
        assert jnp.any(updates["w"] != 0)
        assert_trees_close(state.stored.value, value_fn(params))


def test_the_page_lists_what_is_tested():
    assert set(table()) == {*WRAPPERS, *OTHERS}
    assert all(test in globals() for test in OTHERS.values())
    assert all(
        re.fullmatch(r"works( \[\d\])?|refused \[[\d, ]+\]", cell) for row in table().values() for cell in row.values()
    )


def test_the_page_runs():
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        page = doctest.DocTestParser().get_doctest(PAGE.read_text(), {}, PAGE.name, str(PAGE), 0)
        result = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(page)
    assert result.attempted >= 8
    assert result.failed == 0
