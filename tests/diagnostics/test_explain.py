"""What `explain` says of a function: each way legal or why not, its figures, what auto takes, what the leaves do."""

import io
import re

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import curvature
from curvature.diagnostics import _print
from tests.oracles import assert_close
from tests.scenarios import forward_only, make_mlp, mlp_loss, reverse_only

X = np.array([0.3, 0.7])
COMPOSITIONS = ("fwd_over_rev", "rev_over_rev", "rev_over_fwd", "fwd_over_fwd")


def modes_of(report, derivative):
    return [way.mode for way in report.ways if way.derivative == derivative]


@pytest.fixture(scope="module")
def network():
    with jax.enable_x64(True):
        return curvature.explain(mlp_loss, *make_mlp((3, 4, 1), 5, jnp.float64), measure=True)


def test_a_scalar_function_has_a_row_for_every_composition(network):
    assert {way.derivative for way in network.ways} == {"gradient", "hvp", "hessian"}
    assert modes_of(network, "gradient") == ["fwd", "rev"]
    assert modes_of(network, "hvp") == list(COMPOSITIONS)
    assert modes_of(network, "hessian") == [*COMPOSITIONS, "taps"]
    assert (network.num_inputs, network.num_outputs, network.chunk) == (21, 1, None)
    assert all(way.legal for way in network.ways)
    assert network.way("hvp", "sideways") is None


def test_the_rule_of_each_equation_is_said(network):
    rules = [(site.primitive, site.leaves, site.rule) for site in network.sites]
    assert rules == [
        ("dot_general", ("0/w",), "matrix product"),
        ("add", ("0/b",), "bias"),
        ("dot_general", ("1/w",), "matrix product"),
        ("add", ("1/b",), "bias"),
    ]
    assert all(re.search(r"scenarios\.py:\d+", site.where) for site in network.sites)
    assert f"0/b: bias, add at {network.sites[1].where}" in str(network)


def test_what_is_left_to_products_is_said():
    """A parameter that enters by a power has no rule: its columns are computed one by one."""

    def fun(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"]) * params["s"] + jnp.abs(x[:, 0]) ** params["p"]) ** 2)

    params = {"p": jnp.array(1.5), "s": jnp.array(2.0), "w": jnp.ones(6)}
    sites = curvature.explain(fun, params, jax.random.normal(jax.random.key(0), (9, 6))).sites
    found = {site.leaves: (site.primitive, site.rule) for site in sites}
    assert found[("w",)] == ("dot_general", "matrix product")
    assert found[("s",)] == ("mul", "scale")
    assert found[("p",)] == ("pow", "products along 1 directions")
    assert not curvature.explain(lambda x: jnp.sum(x**3), X).sites


def test_the_figures_are_those_of_xla(network):
    args = make_mlp((3, 4, 1), 5, jnp.float64)
    v = jax.tree.map(jnp.ones_like, args[0])
    product = jax.jit(lambda x, v, *data: curvature.hvp(mlp_loss, x, v, *data, mode="rev_over_rev"))
    compiled = product.lower(args[0], v, *args[1:]).compile()
    way = network.way("hvp", "rev_over_rev")
    assert way.flops == compiled.cost_analysis()["flops"] > 0
    assert way.temporary_bytes == compiled.memory_analysis().temp_size_in_bytes
    assert way.compile_seconds > 0
    measured = {(way.derivative, way.mode) for way in network.ways if way.seconds}
    assert {("gradient", "rev"), ("hvp", "fwd_over_rev"), ("hessian", "rev_over_rev")} <= measured
    assert ("hessian", "rev_over_fwd") in measured


def test_what_is_marked_is_what_runs():
    """Whatever the choice, the function without a mode compiles to the program of the marked way."""
    cases = [lambda x: jnp.sum(jnp.sin(x)), lambda x: jnp.sum(reverse_only(x)), lambda x: jnp.sum(forward_only(x))]
    for fun in cases:
        report = curvature.explain(fun, X)
        assert [way.chosen for way in report.ways].count(True) == 3
        chosen = report.way("hvp").mode

        def text(mode, fun=fun):
            return jax.jit(lambda x, v: curvature.hvp(fun, x, v, mode=mode)).lower(X, X).as_text()

        assert text("auto") == text(chosen)
        whole = report.way("hessian").mode

        def matrix(mode, fun=fun):
            return jax.jit(lambda x: curvature.hessian(fun, mode=mode)(x)).lower(X).as_text()

        assert matrix("auto") == matrix(whole)


def test_a_way_that_is_not_legal_names_the_primitive_and_the_line():
    report = curvature.explain(lambda x: jnp.sum(forward_only(x)), X)
    way = report.way("hessian", "fwd_over_rev")
    assert not way.legal
    assert way.flops is way.compile_seconds is None
    assert way.blocker.startswith("while at ")
    assert "scenarios.py" in way.blocker
    assert "(forward_only)" in way.blocker
    assert report.way("gradient").mode == "fwd"
    assert "not legal: while at" in str(report)


def test_a_function_without_a_legal_mode_has_rows_and_no_error():
    report = curvature.explain(lambda x: jnp.sum(reverse_only(forward_only(x))), X)
    assert not any(way.legal or way.chosen for way in report.ways)
    assert report.chunk is None
    assert "No mode can differentiate f." in str(report)


def test_a_vector_function_has_a_jacobian():
    report = curvature.explain(lambda x: jnp.outer(x, x), X)
    assert [(way.derivative, way.mode, way.chosen) for way in report.ways] == [
        ("jacobian", "fwd", True),
        ("jacobian", "rev", False),
    ]
    assert (report.num_outputs, report.chunk) == (4, 2)
    assert curvature.explain(lambda x: jnp.sum(x[None] * jnp.ones((1, 2)), axis=1), X).way("jacobian").mode == "rev"


def test_a_branch_on_values_is_told_and_compiles_nothing():
    report = curvature.explain(lambda x: x[0] ** 2 if x[0] > 0 else x[1], X, measure=True)
    assert all(way.compile_seconds is None for way in report.ways)
    assert report.way("hvp").seconds > 0
    assert "f branches on values" in str(report)
    assert report.chunk is None


def test_leaves_that_do_nothing_and_leaves_without_curvature_are_named():
    def fun(x):
        return jnp.sum(jax.nn.relu(x["piecewise"]) + x["linear"]) + jnp.sum(x["curved"] ** 2)

    x = dict.fromkeys(("piecewise", "linear", "curved", "unused"), X)
    report = curvature.explain(fun, x)
    assert report.unused == ("x['unused']",)
    assert set(report.without_curvature) == {"x['piecewise']", "x['linear']", "x['unused']"}
    hessian = curvature.hessian(fun)(x)
    for path in ("piecewise", "linear", "unused"):
        assert_close(hessian[path]["curved"], np.zeros((2, 2)))
        assert_close(hessian[path][path], np.zeros((2, 2)))
    assert "f does not depend on x['unused']" in str(report)
    assert "zero in the rows and columns of x['linear'], x['piecewise']" in str(report)


def test_products_are_bilinear_and_have_curvature():
    report = curvature.explain(lambda x: x["a"] @ x["b"], {"a": X, "b": X})
    assert report.without_curvature == ()


def test_it_prints_plain_text_that_is_aligned(network):
    lines = str(network).splitlines()
    assert lines[0] == "mlp_loss: 21 inputs, 1 output"
    header = next(line for line in lines if line.startswith("derivative"))
    rows = [line for line in lines if line.startswith(("gradient", "hvp", "hessian"))]
    assert len(rows) == 11
    assert {line.index(line.split()[1]) for line in rows} == {header.index("mode")}
    assert sum("<-" in line for line in rows) == 3
    assert repr(network) == str(network)


def test_it_prints_a_rich_table_where_there_is_rich(network, monkeypatch):
    console = pytest.importorskip("rich.console")
    screen = console.Console(width=120, record=True, file=io.StringIO())
    screen.print(curvature.explain(lambda x: jnp.sum(forward_only(x)), X))
    text = screen.export_text()
    assert text.count("not legal: while at") == 1  # one reason for seven rows
    assert text.count("[1]") == 8
    monkeypatch.setattr(_print.sys.stdout, "isatty", lambda: True, raising=False)
    assert "──" in str(network)
    monkeypatch.setattr(_print, "_HAS_RICH", False)
    assert "──" not in str(network)


def test_choosing_costs_one_trace_and_no_compilation():
    """Automatic choice calls f once, as a fixed mode does, and compiles one program."""
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name == "/jax/core/compile/backend_compile_duration" else None
    )
    try:
        calls = []

        def fun(x):
            calls.append(1)
            return jnp.sum(jnp.sin(x) ** 3)

        x = jnp.arange(7.0)
        counts = []
        for mode in ("auto", "fwd_over_rev"):
            calls.clear()
            compiled.clear()
            jax.jit(lambda x, mode=mode: curvature.hvp(fun, x, x, mode=mode)).lower(x).compile()
            jax.jit(lambda x, mode=mode: curvature.hessian(fun, mode=mode)(x)).lower(x).compile()
            counts.append((len(calls), len(compiled)))
        assert counts == [(2, 2), (2, 2)]
    finally:
        jax.monitoring.clear_event_listeners()


@pytest.mark.slow
def test_a_whole_hessian_is_pulled_where_that_is_cheaper_on_a_cpu():
    """Only with products of matrices: not with convolutions, nor where rows and columns would differ in dtype."""

    def convolve(kernel, images):
        return jnp.sum(jnp.tanh(jax.lax.conv(images, kernel, (1, 1), "SAME")))

    def quartic(x):
        flat = jnp.concatenate([leaf.astype(jnp.float64) for leaf in x])
        return jnp.sum((jnp.outer(flat, flat) @ flat) ** 2)

    def looped(x):
        return jax.lax.fori_loop(0, 2, lambda _, y: jnp.tanh(jnp.ones((4, 4)) @ y), jnp.concatenate(x)).sum()

    def chain(x):
        flat = jnp.concatenate(x)
        return jnp.sum((flat[1:] - flat[:-1] ** 2) ** 2)

    def modes(fun, *args):
        report = curvature.explain(fun, *args)
        return report.way("hvp").mode, report.way("hessian").mode, report.chunk

    kernel, images = jnp.ones((4, 2, 3, 3)), jnp.ones((24, 2, 32, 32))
    mixed, same = (jnp.ones(2, jnp.float32), jnp.ones(2, jnp.float64)), (jnp.ones(2), jnp.ones(2))
    assert modes(convolve, kernel, images) == ("fwd_over_rev", "fwd_over_rev", 72)
    assert modes(quartic, mixed) == ("fwd_over_rev", "fwd_over_rev", 4)
    assert modes(quartic, same) == ("fwd_over_rev", "rev_over_rev", 4)
    assert modes(looped, same) == ("fwd_over_rev", "rev_over_rev", 4)
    assert modes(chain, same) == ("fwd_over_rev", "fwd_over_rev", 4)


def test_what_writes_much_goes_in_chunks():
    def fun(x, rows):
        return jnp.sum(jnp.sin(rows @ x)) ** 2

    report = curvature.explain(fun, jnp.ones(100), jnp.ones((100_000, 100)))
    assert 8 <= report.chunk < 50
