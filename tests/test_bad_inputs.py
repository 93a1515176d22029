"""Every error a user can meet: the function, the leaf, what came, what was expected, what to do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvature
from tests.scenarios import forward_only

pytestmark = pytest.mark.filterwarnings("ignore::tests.typecheck.AnnotationWarning")

X = {"w": np.ones(4), "b": np.ones(())}


def loss(x, *args):
    return jnp.sum(x["w"] ** 2) + x["b"] ** 2


def square(x, *args):
    return jnp.sum(x**2)


def with_leaf(**leaves):
    return {**X, **leaves}


# (the call, the type of error, what its message says)
CASES = {
    # the point
    "minimize-list": (
        lambda: curvature.minimize(square, [1.0, 2.0]),
        TypeError,
        r"minimize: x0 is a list of numbers \(x0\[0\] is 1\.0 of type float\), expected .* jnp\.asarray\(x0, float\)",
    ),
    "least-squares-tuple-of-integers": (
        lambda: curvature.least_squares(square, (1, 2)),
        TypeError,
        r"least_squares: x0 is a tuple of numbers \(x0\[0\] is 1 of type int\), expected an array",
    ),
    "curve-fit-nested-list": (
        lambda: curvature.curve_fit(lambda p, t: p[0] * t, np.ones(3), np.ones(3), [[1.0], [2.0]]),
        TypeError,
        r"curve_fit: p0 is a list of numbers \(p0\[0\]\[0\] is 1\.0 of type float\).*jnp\.asarray\(p0, float\)",
    ),
    "scipy-minimize-list": (
        lambda: curvature.scipy_minimize(square, [1.0, 2.0]),
        TypeError,
        r"scipy_minimize: x0 is a list of numbers",
    ),
    "hvp-integer-leaf": (
        lambda: curvature.hvp(loss, with_leaf(b=np.arange(3)), X),
        TypeError,
        r"hvp: x\['b'\] has dtype int.*, expected a floating dtype; .* through args",
    ),
    "hvp-boolean-leaf": (lambda: curvature.hvp(square, np.array([True]), X), TypeError, r"hvp: x has dtype bool"),
    "hvp-python-integer": (lambda: curvature.hvp(square, 3, 1.0), TypeError, r"hvp: x has dtype int"),
    "hvp-complex-leaf": (
        lambda: curvature.hvp(square, np.ones(2, complex), np.ones(2)),
        TypeError,
        r"hvp: x has dtype complex128; complex leaves are not supported\. .*two real leaves",
    ),
    "hvp-string-leaf": (
        lambda: curvature.hvp(loss, with_leaf(b="no"), X),
        TypeError,
        r"hvp: x\['b'\] is 'no' of type str, expected an array of floats",
    ),
    "hvp-empty-tree": (lambda: curvature.hvp(square, {}, {}), ValueError, r"hvp: x is an empty tree \(\{\}\)"),
    "linearize-integer-leaf": (
        lambda: curvature.linearize_grad(loss, with_leaf(w=np.arange(4))),
        TypeError,
        r"linearize_grad: x\['w'\] has dtype int",
    ),
    "hessian-integer-argument": (
        lambda: curvature.hessian(square)(np.arange(3)),
        TypeError,
        r"hessian: argument 0 has dtype int",
    ),
    "jacobian-integer-argument": (
        lambda: curvature.jacobian(lambda a, b: a * b, argnums=1)(1.0, {"k": 2}),
        TypeError,
        r"jacobian: argument 1\['k'\] has dtype int",
    ),
    "minimize-integer-leaf": (
        lambda: curvature.minimize(loss, with_leaf(w=np.arange(4))),
        TypeError,
        r"minimize: x0\['w'\] has dtype int.*, expected a floating dtype",
    ),
    "minimize-empty-tree": (lambda: curvature.minimize(loss, []), ValueError, r"minimize: x0 is an empty tree"),
    "minimize-nan-start": (
        lambda: curvature.minimize(loss, with_leaf(w=np.array([1.0, np.nan, 2.0, 0.0]))),
        ValueError,
        r"minimize: x0\['w'\] is nan at index \(1,\), expected finite numbers",
    ),
    "minimize-infinite-start": (lambda: curvature.minimize(square, -np.inf), ValueError, r"minimize: x0 is -inf"),
    "per-example-integer-params": (
        lambda: curvature.per_example_grad(square)(np.arange(3), np.ones(2)),
        TypeError,
        r"per_example_grad: params has dtype int",
    ),
    "newton-init-integer": (
        lambda: curvature.newton().init({"n": np.arange(2)}),
        TypeError,
        r"newton: params\['n'\] has dtype int",
    ),
    "trust-region-init-empty": (
        lambda: curvature.trust_region().init(()),
        ValueError,
        r"trust_region: params is an empty tree",
    ),
    "cg-integer": (lambda: curvature.cg(lambda v: v, np.arange(3)), TypeError, r"cg: b has dtype int"),
    # residuals
    "least-squares-scalar": (
        lambda: curvature.least_squares(square, np.ones(2)),
        TypeError,
        r"least_squares: residuals returns a scalar, expected .* curvature\.minimize takes scalar objectives",
    ),
    "least-squares-integers": (
        lambda: curvature.least_squares(lambda x: x, np.arange(2)),
        TypeError,
        r"least_squares: x0 has dtype int.*, expected a floating dtype",
    ),
    "least-squares-integer-residuals": (
        lambda: curvature.least_squares(lambda x: jnp.arange(2), np.ones(2)),
        TypeError,
        r"least_squares: the output residuals\(x\) has dtype int",
    ),
    "least-squares-no-residuals": (
        lambda: curvature.least_squares(lambda x: x[:0], np.ones(2)),
        TypeError,
        r"least_squares: residuals returns no entries",
    ),
    "least-squares-method": (
        lambda: curvature.least_squares(lambda x: x, np.ones(2), method="lm"),
        ValueError,
        r"least_squares: method='lm' is unknown, expected one of 'levenberg-marquardt', 'dogleg', 'gauss-newton'",
    ),
    "least-squares-other-transformation": (
        lambda: curvature.least_squares(lambda x: x, np.ones(2), method=optax.sgd(0.1)),
        ValueError,
        r"least_squares: method=.* curvature\.levenberg_marquardt",
    ),
    "least-squares-loss": (
        lambda: curvature.least_squares(lambda x: x, np.ones(2), loss="l1"),
        ValueError,
        r"least_squares: loss='l1' is unknown, expected one of 'linear', 'soft_l1'",
    ),
    "least-squares-scale": (
        lambda: curvature.least_squares(lambda x: x, np.ones(2), f_scale=0.0),
        ValueError,
        r"least_squares: f_scale=0\.0, expected a number > 0",
    ),
    "levenberg-marquardt-subproblem": (
        lambda: curvature.levenberg_marquardt("svd"),
        ValueError,
        r"levenberg_marquardt: subproblem='svd' is unknown",
    ),
    "levenberg-marquardt-radius": (
        lambda: curvature.levenberg_marquardt(initial_radius=-1.0),
        ValueError,
        r"levenberg_marquardt: initial_radius=-1\.0, expected a number > 0",
    ),
    "gauss-newton-solver": (
        lambda: curvature.gauss_newton("lu"),
        ValueError,
        r"gauss_newton: solver='lu' is unknown",
    ),
    "gauss-newton-without-residuals": (
        lambda: curvature.gauss_newton().update(None, curvature.gauss_newton().init(np.ones(2)), np.ones(2)),
        ValueError,
        r"gauss_newton: update\(\) needs residual_fn=; call",
    ),
    "curve-fit-integers": (
        lambda: curvature.curve_fit(lambda p, t: p * t, np.ones(3), np.arange(3), 1.0),
        TypeError,
        r"curve_fit: ydata is of dtype int64, expected an array of floats",
    ),
    "curve-fit-shape": (
        lambda: curvature.curve_fit(lambda p, t: p * t, np.ones(3), np.ones((3, 1)), 1.0),
        ValueError,
        r"curve_fit: model returns shape \(3,\), expected shape \(3, 1\) to match ydata",
    ),
    # the direction
    "hvp-wrong-shape": (
        lambda: curvature.hvp(loss, X, with_leaf(w=np.ones(3))),
        ValueError,
        r"hvp: v\['w'\] has shape \(3,\), expected \(4,\) to match x\['w'\]\.",
    ),
    "hvp-missing-leaf": (
        lambda: curvature.hvp(loss, X, {"w": np.ones(4)}),
        ValueError,
        r"hvp: v does not have the tree structure of x: v\['b'\] is missing",
    ),
    "hvp-extra-leaf": (
        lambda: curvature.hvp(loss, X, with_leaf(c=np.ones(1))),
        ValueError,
        r"hvp: .* v\['c'\] is unexpected",
    ),
    "hvp-other-container": (
        lambda: curvature.hvp(lambda x: jnp.sum(x[0]), (np.ones(2),), [np.ones(2)]),
        ValueError,
        r"hvp: v does not have the tree structure of x",
    ),
    "hvp-wrong-dtype": (
        lambda: curvature.hvp(loss, X, with_leaf(w=np.ones(4, np.float32))),
        TypeError,
        r"hvp: v\['w'\] has dtype float32, expected float64 to match x\['w'\]; cast it",
    ),
    "hvp-integer-direction": (
        lambda: curvature.hvp(square, np.ones(2), np.array([1, 0])),
        TypeError,
        r"hvp: v has dtype int64, expected float64",
    ),
    "hvp-string-direction": (
        lambda: curvature.hvp(square, np.ones(()), "up"),
        TypeError,
        r"hvp: v is 'up' of type str, expected an array to match x",
    ),
    "hvp_fn-wrong-shape": (
        lambda: curvature.linearize_grad(square, np.ones(3))[2](np.ones(2)),
        ValueError,
        r"hvp_fn: v has shape \(2,\), expected \(3,\)",
    ),
    "update-wrong-gradient": (
        lambda: update(curvature.newton(), grad={"w": np.ones(4)}),
        ValueError,
        r"newton: grad does not have the tree structure of params: grad\['b'\] is missing",
    ),
    # the function
    "hvp-not-callable": (
        lambda: curvature.hvp(3.0, X, X),
        TypeError,
        r"hvp: f is 3\.0 of type float, expected a function",
    ),
    "hessian-not-callable": (lambda: curvature.hessian("f"), TypeError, r"hessian: f is 'f' of type str"),
    "jacobian-not-callable": (lambda: curvature.jacobian(None), TypeError, r"jacobian: f is None"),
    "vmap-not-callable": (
        lambda: curvature.vmap(np.ones(2)),
        TypeError,
        r"vmap: f is an array of shape \(2,\), expected a function",
    ),
    "minimize-not-callable": (lambda: curvature.minimize(X, X), TypeError, r"minimize: fun is .* of type dict"),
    "per-example-not-callable": (
        lambda: curvature.per_example_hessian(1),
        TypeError,
        r"per_example_hessian: loss is 1",
    ),
    "cg-not-callable": (
        lambda: curvature.cg(np.eye(2), np.ones(2)),
        TypeError,
        r"cg: op is an array of shape \(2, 2\), expected a function",
    ),
    "minimize-bad-callback": (
        lambda: curvature.minimize(square, 1.0, callback="print"),
        TypeError,
        r"minimize: callback is 'print' of type str, expected a function",
    ),
    "minimize-bad-hessian": (
        lambda: curvature.minimize(square, 1.0, hessian=np.eye(1)),
        TypeError,
        r"minimize: hessian is an array of shape \(1, 1\), expected a function",
    ),
    "hvp-vector-output": (
        lambda: curvature.hvp(lambda x: x**2, np.ones(3), np.ones(3)),
        TypeError,
        r"hvp: f returns shape \(3,\), expected a scalar, shape \(\); .*curvature\.jacobian",
    ),
    "minimize-size-one-output": (
        lambda: curvature.minimize(lambda x: jnp.sum(x**2)[None], np.ones(3)),
        TypeError,
        r"minimize: fun returns shape \(1,\), expected a scalar",
    ),
    "linearize-pair-without-has-aux": (
        lambda: curvature.linearize_grad(lambda x: (jnp.sum(x), x), np.ones(3)),
        TypeError,
        r"linearize_grad: f returns a tree of 2 arrays, expected one floating scalar; .*has_aux=True",
    ),
    "linearize-has-aux-without-pair": (
        lambda: curvature.linearize_grad(square, np.ones(3), has_aux=True),
        TypeError,
        r"linearize_grad: has_aux=True, but f returns .*, expected a pair \(value, aux\)",
    ),
    "hvp-integer-output": (
        lambda: curvature.hvp(lambda x: jnp.sum(x).astype(int), np.ones(2), np.ones(2)),
        TypeError,
        r"hvp: the output f\(x\) has dtype int64, expected a real floating dtype",
    ),
    "jacobian-integer-output": (
        lambda: curvature.jacobian(lambda x: {"n": jnp.argmax(x)})(np.ones(2)),
        TypeError,
        r"jacobian: the output f\(x\)\['n'\] has dtype int64",
    ),
    "hessian-complex-output": (
        lambda: curvature.hessian(lambda x: jnp.exp(1j * x))(1.0),
        TypeError,
        r"hessian: the output f\(x\) has dtype complex128",
    ),
    "hvp-no-output": (
        lambda: curvature.hvp(lambda x: None, np.ones(2), np.ones(2)),
        TypeError,
        r"hvp: f returns a tree of 0 arrays",
    ),
    "hessian-no-output": (
        lambda: curvature.hessian(lambda x: None)(1.0),
        TypeError,
        r"hessian: f returns no array \(None\).*does it return\?",
    ),
    "per-example-vector-loss": (
        lambda: curvature.per_example_grad(lambda w, x: w * x)(np.ones(2), np.ones((3, 2))),
        TypeError,
        r"per_example_grad: loss returns shape \(2,\), expected a scalar",
    ),
    "cg-operator-shape": (
        lambda: curvature.cg(lambda v: v[:2], np.ones(3)),
        ValueError,
        r"cg: op\(b\) has shape \(2,\), expected \(3,\) to match b",
    ),
    "cg-preconditioner-shape": (
        lambda: curvature.cg(lambda v: v, np.ones(3), preconditioner=lambda r: r[:1]),
        ValueError,
        r"cg: preconditioner\(b\) has shape \(1,\), expected \(3,\)",
    ),
    "minimize-hessian-shape": (
        lambda: curvature.minimize(square, np.ones(3), method="newton", hessian=lambda x: jnp.eye(2)),
        ValueError,
        r"newton: hessian\(x\) has shape \(2, 2\), expected \(3, 3\)",
    ),
    "minimize-hessian-structure": (
        lambda: curvature.minimize(loss, X, method="newton", hessian=lambda x: jnp.eye(5)),
        ValueError,
        r"newton: hessian\(x\) is not a tree like x of trees like x",
    ),
    "minimize-hessian-unused": (
        lambda: curvature.minimize(square, np.ones(3), method="trust-region", hessian=lambda x: jnp.eye(3)),
        ValueError,
        r"minimize: hessian= is for the methods that form a Hessian.*method='trust-region' forms none",
    ),
    "minimize-no-entries": (
        lambda: curvature.minimize(square, np.ones((0, 2))),
        ValueError,
        r"minimize: x0 has no entries",
    ),
    "cg-no-entries": (lambda: curvature.cg(lambda v: v, np.ones(0)), ValueError, r"cg: b has no entries"),
    # words and numbers
    "hvp-unknown-mode": (
        lambda: curvature.hvp(loss, X, X, mode="forward"),
        ValueError,
        r"hvp: mode='forward' is unknown, expected one of 'auto', 'fwd_over_rev'",
    ),
    "hessian-unknown-mode": (
        lambda: curvature.hessian(loss, mode="fwd"),
        ValueError,
        r"hessian: mode='fwd' is unknown",
    ),
    "jacobian-unknown-mode": (
        lambda: curvature.jacobian(loss, mode="fwd_over_rev"),
        ValueError,
        r"jacobian: mode='fwd_over_rev' is unknown, expected one of 'auto', 'fwd', 'rev'",
    ),
    "hessian-zero-chunk": (
        lambda: curvature.hessian(loss, chunk_size=0),
        ValueError,
        r"hessian: chunk_size=0, expected a positive integer, None or 'auto'",
    ),
    "vmap-fractional-chunk": (lambda: curvature.vmap(loss, chunk_size=2.5), ValueError, r"vmap: chunk_size=2\.5"),
    "per-example-chunk-word": (
        lambda: curvature.per_example_grad(loss, chunk_size="all"),
        ValueError,
        r"per_example_grad: chunk_size='all'",
    ),
    "hessian-argnums-out-of-range": (
        lambda: curvature.hessian(square, argnums=2)(1.0),
        ValueError,
        r"hessian: argnums=2 names argument 2, but f was called with 1 positional",
    ),
    "jacobian-argnums-word": (
        lambda: curvature.jacobian(square, argnums="x")(1.0),
        TypeError,
        r"jacobian: argnums='x', expected an integer or a tuple of integers",
    ),
    "jacobian-argnums-twice": (
        lambda: curvature.jacobian(lambda a, b: a * b, argnums=(0, 0))(1.0, 2.0),
        ValueError,
        r"jacobian: argnums=\(0, 0\) names an argument twice.* at \[0, 0\]",
    ),
    "hessian-argnums-twice": (
        lambda: curvature.hessian(lambda a, b: a * b, argnums=(0, -2))(1.0, 2.0),
        ValueError,
        r"hessian: argnums=\(0, -2\) names an argument twice.* at \[0, 0\]",
    ),
    "jacobian-argnums-empty": (
        lambda: curvature.jacobian(square, argnums=())(1.0),
        ValueError,
        r"jacobian: argnums=\(\) is empty",
    ),
    "minimize-method-that-is-an-array": (
        lambda: curvature.minimize(square, 1.0, method=np.zeros(2)),
        ValueError,
        r"minimize: method=array\(\[0., 0.\]\) is unknown, expected one of .*'trust-exact'",
    ),
    "minimize-unknown-method": (
        lambda: curvature.minimize(square, 1.0, method="gradient-descent"),
        ValueError,
        r"minimize: method='gradient-descent' is unknown, expected one of .*'trust-exact'.* or an optax",
    ),
    "minimize-method-class": (
        lambda: curvature.minimize(square, 1.0, method=optax.adam),
        ValueError,
        r"minimize: method=<function adam .* or an optax transformation such as curvature\.newton\(\)",
    ),
    "minimize-negative-steps": (
        lambda: curvature.minimize(square, 1.0, max_steps=-1),
        ValueError,
        r"minimize: max_steps=-1, expected an integer >= 0",
    ),
    "minimize-fractional-steps": (
        lambda: curvature.minimize(square, 1.0, max_steps=1.5),
        ValueError,
        r"minimize: max_steps=1\.5, expected an integer",
    ),
    "minimize-negative-gtol": (
        lambda: curvature.minimize(square, 1.0, gtol=-1e-3),
        ValueError,
        r"minimize: gtol=-0\.001, expected a number >= 0",
    ),
    "minimize-nan-rtol": (lambda: curvature.minimize(square, 1.0, rtol=np.nan), ValueError, r"minimize: rtol=nan"),
    "minimize-history-of-traced-length": (
        lambda: jax.jit(lambda n: curvature.minimize(square, np.ones(2), max_steps=n, history=True).x)(3),
        TypeError,
        r"minimize: max_steps is traced, expected a Python integer; mark it static",
    ),
    "minimize-batched-traced": (
        lambda: jax.jit(lambda x: curvature.minimize_batched(square, x).x)(np.ones((2, 3))),
        TypeError,
        r"minimize_batched: x0_batch is traced, expected a value; call it outside jit",
    ),
    "minimize-batched-no-lanes": (
        lambda: curvature.minimize_batched(square, {"w": np.ones((2, 3)), "b": np.ones(())}),
        ValueError,
        r"minimize_batched: x0_batch\['b'\] has rank 0 and so no axis 0, expected a leading axis of problems",
    ),
    "minimize-batched-data-without-lanes": (
        lambda: curvature.minimize_batched(square, np.ones((2, 3)), (1.0,)),
        ValueError,
        r"minimize_batched: args_batch\[0\] has rank 0 and so no axis 0, expected one; use in_axes=None",
    ),
    "minimize-batched-other-size": (
        lambda: curvature.minimize_batched(square, np.ones((2, 3)), (np.ones((3, 5)),), in_axes=1),
        ValueError,
        r"minimize_batched: args_batch\[0\] has 5 problems along axis 1, expected 2 to match x0_batch\.",
    ),
    "minimize-batched-no-problems": (
        lambda: curvature.minimize_batched(square, np.ones((0, 3))),
        ValueError,
        r"minimize_batched: x0_batch has shape \(0, 3\), expected at least one problem",
    ),
    "minimize-batched-axes": (
        lambda: curvature.minimize_batched(square, np.ones((2, 3)), (np.ones(2),), in_axes=(0, 0)),
        ValueError,
        r"minimize_batched: in_axes is not a prefix",
    ),
    "minimize-batched-method": (
        lambda: curvature.minimize_batched(square, np.ones((2, 3)), method="gradient-descent"),
        ValueError,
        r"minimize_batched: method='gradient-descent' is unknown",
    ),
    "minimize-string-data": (
        lambda: curvature.minimize(square, 1.0, (np.ones(2), {"mode": "fast"})),
        TypeError,
        r"minimize: args\[1\]\['mode'\] is 'fast' of type str, expected an array",
    ),
    "trust-region-subproblem": (
        lambda: curvature.trust_region("dogleg"),
        ValueError,
        r"trust_region: subproblem='dogleg' is unknown, expected one of 'exact', 'gltr', 'cg'",
    ),
    "trust-region-radius": (
        lambda: curvature.trust_region(initial_radius=0.0),
        ValueError,
        r"trust_region: initial_radius=0\.0, expected a number > 0",
    ),
    "trust-region-inner-steps": (
        lambda: curvature.trust_region(max_inner_steps=0),
        ValueError,
        r"trust_region: max_inner_steps=0, expected an integer >= 1",
    ),
    "kfac-model": (
        lambda: curvature.kfac(3, square, ()),
        TypeError,
        r"kfac: model is 3 of type int, expected a function",
    ),
    "kfac-sampled-without-likelihood": (
        lambda: curvature.kfac(square, square, (), kind="sampled"),
        ValueError,
        r"kfac: kind='sampled' draws labels and needs likelihood=",
    ),
    "kfac-rate": (
        lambda: curvature.kfac(square, square, (), learning_rate="fast"),
        ValueError,
        r"kfac: learning_rate='fast', expected a number >= 0 or a schedule",
    ),
    "kfac-momentum": (
        lambda: curvature.kfac(square, square, (), momentum=1.0),
        ValueError,
        r"kfac: momentum=1\.0, expected a number of at least 0 and below 1",
    ),
    "kfac-invert-every": (
        lambda: curvature.kfac(square, square, (), invert_every=0),
        ValueError,
        r"kfac: invert_every=0, expected an integer >= 1",
    ),
    "natural-gradient-damping": (
        lambda: curvature.natural_gradient(square, square, damping=-1.0),
        ValueError,
        r"natural_gradient: damping=-1\.0, expected a number >= 0 or a schedule",
    ),
    "natural-gradient-solver": (
        lambda: curvature.natural_gradient(square, square, solver="lu"),
        ValueError,
        r"natural_gradient: solver='lu' is unknown, expected one of 'cg', 'woodbury'",
    ),
    "natural-gradient-without-data": (
        lambda: update(curvature.natural_gradient(square, square)),
        ValueError,
        r"natural_gradient: update\(\) needs args=, the data on which the curvature is taken; call",
    ),
    "sophia-without-key": (
        lambda: curvature.sophia(0.1, key=0),
        TypeError,
        r"scale_by_sophia: key is 0 of type int, expected a random key",
    ),
    "sophia-labels-of-nothing": (
        lambda: curvature.scale_by_sophia(key=jax.random.key(0), estimator="gauss-newton-bartlett"),
        ValueError,
        r"scale_by_sophia: estimator='gauss-newton-bartlett' draws labels and needs model=, loss= and likelihood=",
    ),
    "sophia-without-value_fn": (
        lambda: update(curvature.scale_by_sophia(key=jax.random.key(0)), value_fn=None),
        ValueError,
        r"scale_by_sophia: update\(\) needs value_fn=",
    ),
    "adahessian-decay": (
        lambda: curvature.adahessian(0.1, key=jax.random.key(0), b2=1.0),
        ValueError,
        r"scale_by_adahessian: b2=1\.0, expected a number of at least 0 and below 1",
    ),
    "adahessian-axes": (
        lambda: curvature.adahessian(0.1, key=jax.random.key(0), spatial_axes=(0,)),
        TypeError,
        r"scale_by_adahessian: spatial_axes is \(0,\) of type tuple, expected a function",
    ),
    "cg-rtol": (lambda: curvature.cg(lambda v: v, 1.0, rtol=-1), ValueError, r"cg: rtol=-1"),
    "cg-max-steps": (lambda: curvature.cg(lambda v: v, 1.0, max_steps=-3), ValueError, r"cg: max_steps=-3"),
    # bounds
    "minimize-bounds-not-a-pair": (
        lambda: curvature.minimize(square, np.ones(3), bounds=0.5),
        TypeError,
        r"minimize: bounds is 0\.5 of type float, expected a pair \(lower, upper\) of trees",
    ),
    "minimize-bounds-scipy-pairs": (
        lambda: curvature.minimize(square, np.ones(2), bounds=[(0.0, 1.0), (0.0, None)]),
        ValueError,
        r"minimize: lower does not have the tree structure of x0, nor that of a prefix of it\. Got .*expected a number",
    ),
    "minimize-bounds-shape": (
        lambda: curvature.minimize(loss, X, bounds=(None, {"w": np.ones(3), "b": None})),
        ValueError,
        r"minimize: upper\['w'\] has shape \(3,\), expected a number or \(4,\) to match x0\['w'\]",
    ),
    "minimize-bounds-string": (
        lambda: curvature.minimize(square, np.ones(2), bounds=("0", None)),
        TypeError,
        r"minimize: lower is '0' of type str, expected an array of real numbers",
    ),
    "minimize-bounds-cross": (
        lambda: curvature.minimize(square, np.ones(2), bounds=(np.array([0.0, 1.0]), np.array([1.0, 0.5]))),
        ValueError,
        r"minimize: lower is 1\.0 and upper is 0\.5 at index \(1,\), expected lower <= upper",
    ),
    "minimize-bounds-nan": (
        lambda: curvature.minimize(square, np.ones(2), bounds=(np.nan, None)),
        ValueError,
        r"minimize: lower is nan and upper is inf at index \(0,\)",
    ),
    "minimize-bounds-method": (
        lambda: curvature.minimize(square, np.ones(2), method="newton", bounds=(0.0, None)),
        ValueError,
        r"minimize: method='newton' takes no bounds; those that do are 'auto', 'trust-region', 'trust-exact', 'l-bfgs'",
    ),
    "minimize-bounds-optax": (
        lambda: curvature.minimize(square, np.ones(2), method=optax.sgd(0.1), bounds=(0.0, None)),
        ValueError,
        r"minimize: method=.* takes no bounds",
    ),
    "projected-newton-subproblem": (
        lambda: curvature.projected_newton(subproblem="newton"),
        ValueError,
        r"projected_newton: subproblem='newton' is unknown, expected one of 'exact', 'cg'",
    ),
    "projected-newton-infinite": (
        lambda: curvature.projected_newton(lower=np.inf).init(np.ones(2)),
        ValueError,
        r"projected_newton: lower is inf and upper is inf at index \(0,\), .*a finite number between them",
    ),
    "lbfgsb-memory": (
        lambda: curvature.lbfgsb(0.0, memory_size=0),
        ValueError,
        r"lbfgsb: memory_size=0, expected an integer >= 1",
    ),
    "lbfgsb-update-without-params": (
        lambda: curvature.lbfgsb(0.0).update(X, curvature.lbfgsb(0.0).init(X)),
        ValueError,
        r"lbfgsb: update\(\) needs params=",
    ),
    # SciPy's methods
    "scipy-traced": (
        lambda: jax.jit(lambda x: curvature.scipy_minimize(square, x).fun)(np.ones(2)),
        TypeError,
        r"scipy_minimize: x0 is traced, expected a value; call it outside jit",
    ),
    "scipy-unknown-method": (
        lambda: curvature.scipy_minimize(square, np.ones(2), method="l-bfgs"),
        ValueError,
        r"scipy_minimize: method='l-bfgs' is unknown, expected one of 'Nelder-Mead'.*'L-BFGS-B'",
    ),
    "scipy-bounds-method": (
        lambda: curvature.scipy_minimize(square, np.ones(2), method="BFGS", bounds=(0.0, None)),
        ValueError,
        r"scipy_minimize: method='BFGS' takes no bounds; those that do are 'Nelder-Mead'",
    ),
    "scipy-vector-output": (
        lambda: curvature.scipy_minimize(lambda x: x**2, np.ones(2)),
        TypeError,
        r"scipy_minimize: fun returns shape \(2,\), expected a scalar",
    ),
    "scipy-callback": (
        lambda: curvature.scipy_minimize(square, np.ones(2), callback="print"),
        TypeError,
        r"scipy_minimize: callback is 'print' of type str, expected a function",
    ),
    # the data of lanes and examples
    "per-example-no-batch": (
        lambda: curvature.per_example_grad(square)(np.ones(2)),
        ValueError,
        r"per_example_grad: no batch was given",
    ),
    "per-example-scalar-batch": (
        lambda: curvature.per_example_grad(square)(np.ones(2), np.ones(3), 0.5),
        ValueError,
        r"per_example_grad: batch\[1\] is a scalar, expected a leading example axis",
    ),
    "per-example-ragged-batch": (
        lambda: curvature.per_example_hessian(square)(np.ones(2), np.ones(3), {"y": np.ones(4)}),
        ValueError,
        r"per_example_hessian: batch\[1\]\['y'\] has 4 examples .*, expected 3 to match batch\[0\]",
    ),
    "per-example-empty-batch": (
        lambda: curvature.per_example_grad(square)(np.ones(2), np.ones((0, 2))),
        ValueError,
        r"per_example_grad: batch\[0\] has shape \(0, 2\), expected at least one example",
    ),
    "per-example-string-batch": (
        lambda: curvature.per_example_grad(square)(np.ones(2), "abc"),
        TypeError,
        r"per_example_grad: batch\[0\] is 'abc' of type str",
    ),
    "vmap-sizes-differ": (
        lambda: curvature.vmap(lambda a, b: a + b)(np.ones(2), np.ones(3)),
        ValueError,
        r"vmap: the mapped axes differ in size: args\[0\] has 2, args\[1\] has 3",
    ),
    "vmap-no-axis": (
        lambda: curvature.vmap(jnp.add, in_axes=(0, 1))(np.ones(2), np.ones(2)),
        ValueError,
        r"vmap: args\[1\] has rank 1, which has no axis 1 to map; use in_axes=None",
    ),
    "vmap-nothing-mapped": (
        lambda: curvature.vmap(jnp.sin, in_axes=None)(np.ones(2)),
        ValueError,
        r"vmap: no argument has an axis to map",
    ),
    "vmap-not-a-prefix": (
        lambda: curvature.vmap(jnp.add, in_axes=(0, 0, 0))(np.ones(2), np.ones(2)),
        ValueError,
        r"vmap: in_axes is not a prefix of the tree it is for",
    ),
    "vmap-axis-word": (
        lambda: curvature.vmap(jnp.add, in_axes=(0, "x"))(np.ones(2), np.ones(2)),
        TypeError,
        r"vmap: in_axes holds 'x' of type str, expected integers and None",
    ),
    # laplacian and derivatives along a direction
    "laplacian-not-a-function": (lambda: curvature.laplacian(3), TypeError, r"laplacian: f is 3 of type int"),
    "laplacian-integer-leaf": (
        lambda: curvature.laplacian(loss)(with_leaf(w=np.arange(4))),
        TypeError,
        r"laplacian: x\['w'\] has dtype int",
    ),
    "laplacian-no-entries": (lambda: curvature.laplacian(square)(np.ones(0)), ValueError, r"laplacian: x has no entr"),
    "laplacian-integer-output": (
        lambda: curvature.laplacian(jnp.argmax)(np.ones(2)),
        TypeError,
        r"laplacian: the output f\(x\) has dtype int",
    ),
    "laplacian-factor-structure": (
        lambda: curvature.laplacian(loss, factor={"w": np.ones((2, 4))})(X),
        ValueError,
        r"laplacian: factor does not have the tree structure of x: factor\['b'\] is missing",
    ),
    "laplacian-factor-shape": (
        lambda: curvature.laplacian(loss, factor=X)(X),
        ValueError,
        r"laplacian: factor\['b'\] has shape \(\), expected \(K,\) \+ \(\): a leading axis of K directions",
    ),
    "laplacian-factor-directions": (
        lambda: curvature.laplacian(loss, factor={"b": np.ones(2), "w": np.ones((3, 4))})(X),
        ValueError,
        r"laplacian: factor\['w'\] has 3 directions along its leading axis, expected 2 to match factor\['b'\]",
    ),
    "laplacian-no-directions": (
        lambda: curvature.laplacian(square, factor=np.ones((0, 4)))(np.ones(4)),
        ValueError,
        r"laplacian: factor has shape \(0, 4\), expected at least one direction",
    ),
    "laplacian-factor-dtype": (
        lambda: curvature.laplacian(square, factor=np.ones((2, 4), np.float32))(np.ones(4)),
        TypeError,
        r"laplacian: factor has dtype float32, expected float64 to match x; cast it with .astype\('float64'\)",
    ),
    "laplacian-no-derivative": (
        lambda: curvature.laplacian(lambda x: jax.pure_callback(np.sin, jax.ShapeDtypeStruct((4,), np.float64), x))(
            np.ones(4)
        ),
        TypeError,
        r"laplacian: no composition .* fwd is blocked by pure_callback at .*test_bad_inputs",
    ),
    "directional-zero-order": (
        lambda: curvature.directional_derivatives(square, np.ones(2), np.ones(2), order=0),
        ValueError,
        r"directional_derivatives: order=0, expected an integer >= 1",
    ),
    "directional-fractional-order": (
        lambda: curvature.directional_derivatives(square, np.ones(2), np.ones(2), order=1.5),
        ValueError,
        r"directional_derivatives: order=1.5, expected an integer >= 1",
    ),
    "directional-shape": (
        lambda: curvature.directional_derivatives(square, np.ones(2), np.ones(3), order=1),
        ValueError,
        r"directional_derivatives: v has shape \(3,\), expected \(2,\) to match x",
    ),
    # an optimizer's update
    "newton-without-value_fn": (
        lambda: update(curvature.newton(), value_fn=None),
        ValueError,
        r"newton: update\(\) needs value_fn=; call update\(grad, state, params, value=value",
    ),
    "trust-region-without-value": (
        lambda: update(curvature.trust_region(), value=None),
        ValueError,
        r"trust_region: update\(\) needs value=",
    ),
    "trust-region-without-params": (
        lambda: update(curvature.trust_region("exact"), params=None),
        ValueError,
        r"trust_region: update\(\) needs params=",
    ),
    # blocks and the matrix view
    "hessian-unknown-block": (
        lambda: curvature.hessian(loss, blocks=("w", "c"))(X),
        ValueError,
        r"hessian: blocks='c' is no path of x, expected one of \['b', 'w'\], a prefix of them",
    ),
    "hessian-ambiguous-block": (
        lambda: curvature.hessian(lambda x: x["a/b"] * x["a"]["b"], blocks=("a/b", ""))({"a/b": 1.0, "a": {"b": 2.0}}),
        ValueError,
        r"hessian: blocks='a/b' names 2 sub-trees, expected one; rename a key that contains '/'",
    ),
    "hessian-blocks-kind": (
        lambda: curvature.hessian(loss, blocks="w"),
        ValueError,
        r"hessian: blocks='w', expected a pair of paths \(rows, columns\), 'diagonal', or None for all",
    ),
    "matrix-view-blocks": (
        lambda: curvature.matrix_view({"w": np.ones((4, 4)), "b": np.ones(())}, X),
        ValueError,
        r"matrix_view: blocks is not a tree like x of trees like x, as curvature\.hessian returns",
    ),
    "matrix-view-shape": (
        lambda: curvature.matrix_view(np.ones((3, 2)), np.ones(3)),
        ValueError,
        r"matrix_view: blocks has shape \(3, 2\), expected \(3, 3\)",
    ),
    "matrix-view-path": (
        lambda: curvature.matrix_view(np.ones((3, 3)), np.ones(3))["w", ""],
        ValueError,
        r"MatrixView: path='w' is no path of x, expected one of \[''\]",
    ),
    "matrix-view-one-path": (
        lambda: curvature.matrix_view(np.ones((3, 3)), np.ones(3))["w"],
        ValueError,
        r"MatrixView: paths='w', expected a pair of paths",
    ),
    # the diagonal
    "diagonal-vector-function": (
        lambda: curvature.hessian_diagonal(lambda x: x**2, np.ones(3)),
        TypeError,
        r"hessian_diagonal: f returns shape \(3,\), expected a scalar",
    ),
    "diagonal-mode": (
        lambda: curvature.hessian_diagonal(square, np.ones(3), mode="fwd"),
        ValueError,
        r"hessian_diagonal: mode='fwd'",
    ),
    "diagonal-chunk-size": (
        lambda: curvature.hessian_diagonal(square, np.ones(3), chunk_size=0),
        ValueError,
        r"hessian_diagonal: chunk_size=0",
    ),
    "scaled-operator-chunk-size": (
        lambda: (2.0 * curvature.JacobianOperator(lambda x: x[:2] ** 2, np.arange(40.0))).as_matrix(chunk_size=0),
        ValueError,
        r"as_matrix: chunk_size=0",
    ),
    # sparse
    "sparse-mode": (
        lambda: curvature.sparse_hessian(square, np.ones(3), mode="fwd_over_fwd"),
        ValueError,
        r"sparse_hessian: mode='fwd_over_fwd'",
    ),
    "sparse-no-mode": (
        lambda: curvature.sparse_hessian(lambda x: jnp.sum(forward_only(x)), np.ones(3)),
        TypeError,
        r"sparse_hessian: no composition .* fwd_over_rev .*while",
    ),
    "sparse-illegal-mode": (
        lambda: curvature.sparse_jacobian(forward_only, np.ones(3), mode="rev"),
        TypeError,
        r"sparse_jacobian: mode='rev'.*while",
    ),
    "sparse-pattern-shape": (
        lambda: curvature.sparse_hessian(square, np.ones(3), pattern=np.eye(4)),
        ValueError,
        r"sparse_hessian: pattern has shape \(4, 4\), expected \(3, 3\)",
    ),
    "sparse-pattern-kind": (
        lambda: curvature.sparse_jacobian(lambda x: x, np.ones(3), pattern="diagonal"),
        TypeError,
        r"sparse_jacobian: pattern is 'diagonal' of type str, expected a sparse matrix or a boolean array",
    ),
    "sparse-pattern-traced": (
        lambda: jax.jit(lambda p: curvature.sparse_hessian(square, np.ones(3), pattern=p)(np.ones(3)).data)(np.eye(3)),
        TypeError,
        r"sparse_hessian: pattern is traced, expected a known pattern; prepare outside jit",
    ),
    "sparse-other-point": (
        lambda: curvature.sparse_hessian(square, np.ones(3))(np.ones(4)),
        ValueError,
        r"sparse_hessian: x has shape \(4,\), expected \(3,\) to match the prepared x",
    ),
    "sparse-data": (
        lambda: curvature.sparse_hessian(lambda x, p: jnp.sum(x**2), np.ones(3), 2.0)(np.ones(3), "two"),
        TypeError,
        r"sparse_hessian: args\[0\] is 'two' of type str, expected an array",
    ),
    # from taps
    "norm-not-callable": (
        lambda: curvature.per_example_grad_norm("loss"),
        TypeError,
        r"per_example_grad_norm: loss is 'loss' of type str, expected a function",
    ),
    "norm-chunk-size": (
        lambda: curvature.per_example_grad_norm(loss, chunk_size=0),
        ValueError,
        r"per_example_grad_norm: chunk_size=0",
    ),
    "norm-not-scalar": (
        lambda: curvature.per_example_grad_norm(lambda w, x: w * x)(np.ones(2), np.ones((3, 2))),
        TypeError,
        r"per_example_grad_norm: loss returns shape \(2,\), expected a scalar",
    ),
    "norm-integer-params": (
        lambda: curvature.per_example_grad_norm(square)(np.arange(3), np.ones(2)),
        TypeError,
        r"per_example_grad_norm: params has dtype int",
    ),
    "clipped-max-norm": (
        lambda: curvature.clipped_grad(loss, 0.0),
        ValueError,
        r"clipped_grad: max_norm=0\.0, expected a number > 0",
    ),
    "clipped-no-batch": (
        lambda: curvature.clipped_grad(square, 1.0)(np.ones(2)),
        ValueError,
        r"clipped_grad: no batch was given",
    ),
    "moments-ragged-batch": (
        lambda: curvature.per_example_grad_moments(square)(np.ones(2), np.ones(3), np.ones(4)),
        ValueError,
        r"per_example_grad_moments: batch\[1\] has 4 examples .*, expected 3",
    ),
    "mean-hessian-not-scalar": (
        lambda: curvature.mean_hessian(lambda w, x: w * x)(np.ones(2), np.ones((3, 2))),
        TypeError,
        r"mean_hessian: loss returns shape \(2,\), expected a scalar",
    ),
    "mean-hessian-blocks": (
        lambda: curvature.mean_hessian(loss, blocks="rows"),
        ValueError,
        r"mean_hessian: blocks='rows'",
    ),
    "mean-hessian-path": (
        lambda: curvature.mean_hessian(loss, blocks=("w", "nowhere"))(X, np.ones((2, 1))),
        ValueError,
        r"mean_hessian: .*nowhere",
    ),
    "mean-hessian-chunk-size": (
        lambda: curvature.mean_hessian(loss, chunk_size=1.5),
        ValueError,
        r"mean_hessian: chunk_size=1\.5",
    ),
    # diagnostics
    "explain-not-callable": (lambda: curvature.explain(3, X), TypeError, r"explain: f is 3 of type int"),
    "explain-integer-output": (
        lambda: curvature.explain(lambda x: jnp.argmax(x["w"]), X),
        TypeError,
        r"explain: the output f\(x\) has dtype int.*, expected a real floating dtype",
    ),
    "explain-data": (
        lambda: curvature.explain(loss, X, "mean"),
        TypeError,
        r"explain: args\[0\] is 'mean' of type str, expected an array or a number",
    ),
    "explain-traced": (
        lambda: jax.jit(lambda x: curvature.explain(square, x).chunk)(np.ones(3)),
        TypeError,
        r"explain: x is traced, expected a value; call it outside jit",
    ),
    "check-derivatives-traced": (
        lambda: jax.jit(lambda w: curvature.check_derivatives(loss, with_leaf(w=w)).ok)(np.ones(4)),
        TypeError,
        r"check_derivatives: x\['[bw]'\] is traced",
    ),
    "check-derivatives-order": (
        lambda: curvature.check_derivatives(square, np.ones(3), order=3),
        ValueError,
        r"check_derivatives: order=3, expected 1 or 2",
    ),
    "check-derivatives-directions": (
        lambda: curvature.check_derivatives(square, np.ones(3), num_directions=0),
        ValueError,
        r"check_derivatives: num_directions=0, expected an integer >= 1",
    ),
    "check-derivatives-no-mode": (
        lambda: curvature.check_derivatives(lambda x: jax.pure_callback(np.sum, x.sum(), x), np.ones(3)),
        TypeError,
        r"check_derivatives: no composition .* pure_callback at",
    ),
    "check-derivatives-no-entries": (
        lambda: curvature.check_derivatives(square, np.ones(0)),
        ValueError,
        r"check_derivatives: x has no entries",
    ),
}


def update(solver, **changes):
    given = {"params": X, "grad": X, "value": 1.0, "value_fn": loss, **changes}
    state = solver.init(X)
    params, grad = given.pop("params"), given["grad"]
    return solver.update(grad, state, params, **given)


@pytest.mark.thin
@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_refused_with_a_clear_error(name):
    call, error, message = CASES[name]
    with pytest.raises(error, match=message):
        call()


def test_bad_input_fails_while_tracing():
    with pytest.raises(ValueError, match=r"hvp: v has shape \(2,\)"):
        jax.eval_shape(lambda x: curvature.hvp(square, x, jnp.ones(2)), jax.ShapeDtypeStruct((3,), jnp.float64))


POINT = np.ones(3)
RETURNING = {
    "hessian": lambda f: curvature.hessian(f)(POINT),
    "jacobian": lambda f: curvature.jacobian(f)(POINT),
    "hvp": lambda f: curvature.hvp(f, POINT, POINT),
    "hessian_diagonal": lambda f: curvature.hessian_diagonal(f, POINT),
    "laplacian": lambda f: curvature.laplacian(f)(POINT),
    "directional_derivatives": lambda f: curvature.directional_derivatives(f, POINT, POINT, order=2),
    "HessianOperator": lambda f: curvature.HessianOperator(f, POINT) @ POINT,
    "JacobianOperator": lambda f: curvature.JacobianOperator(f, POINT) @ POINT,
    "minimize": lambda f: curvature.minimize(f, POINT),
    "least_squares": lambda f: curvature.least_squares(f, POINT),
    "explain": lambda f: curvature.explain(f, POINT),
    "check_derivatives": lambda f: curvature.check_derivatives(f, POINT),
    "per_example_grad": lambda f: curvature.per_example_grad(f)(POINT, POINT),
    "per_example_grad_norm": lambda f: curvature.per_example_grad_norm(f)(POINT, POINT),
    "mean_hessian": lambda f: curvature.mean_hessian(f)(POINT, POINT),
}


@pytest.mark.parametrize("name", RETURNING)
def test_a_function_returns_arrays_or_numbers(name):
    with pytest.raises(TypeError, match=rf"{name}: .* returns 'loss' of type str at \['kind'\], expected arrays"):
        RETURNING[name](lambda *args: {"kind": "loss"})


@pytest.mark.parametrize("name", ["hessian", "jacobian"])
def test_auxiliary_data_are_arrays_or_numbers(name):
    derivative = getattr(curvature, name)(lambda x: (jnp.sum(x**2), {"kind": "loss"}), has_aux=True)
    with pytest.raises(TypeError, match=rf"{name}: f returns 'loss' of type str at \[1\]\['kind'\].*auxiliary data"):
        derivative(POINT)


def test_no_entries_to_explain():
    with pytest.raises(ValueError, match="explain: x has no entries"):
        curvature.explain(jnp.sum, jnp.zeros(0))


def test_there_are_at_least_forty():
    assert len(CASES) >= 40
