"""The algebra of operators against that of matrices, their trees, and the bridges to other libraries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse.linalg

import curvature
from curvature.operators._base import LinearOperator, MatrixOperator
from curvature.operators._pytrees import register_operator, structure_of
from tests.oracles import assert_close, assert_trees_close, flat

_rng = np.random.default_rng(2)
A, B, C = _rng.normal(size=(3, 4)), _rng.normal(size=(4, 3)), _rng.normal(size=(3, 3))
S = C + C.T
V = _rng.normal(size=3)


def matrix(entries, dtype=jnp.float64, **options):
    return MatrixOperator(jnp.asarray(entries, dtype), **options)


EXPRESSIONS = {
    "sum": (lambda a, b, s: s + a @ b, S + A @ B),
    "difference": (lambda a, b, s: a @ b - s, A @ B - S),
    "multiples": (lambda a, b, s: 2 * s - s * jnp.float64(0.5) + np.float64(3.0) * s, 4.5 * S),
    "quotient": (lambda a, b, s: s / 4 - s / np.float64(2.0), -S / 4),
    "minus": (lambda a, b, s: -(a @ b), -A @ B),
    "transpose": (lambda a, b, s: (2.0 * a @ b).T, 2 * (A @ B).T),
    "transposed factors": (lambda a, b, s: (a @ b + s).T @ a, ((A @ B).T + S) @ A),
    "damped": (lambda a, b, s: s + curvature.damping(0.5), S + 0.5 * np.eye(3)),
    "damping first": (lambda a, b, s: curvature.damping(2) - a @ b, 2 * np.eye(3) - A @ B),
    "damping times": (lambda a, b, s: curvature.damping(3.0) @ s + s @ curvature.damping(0.5), 3.5 * S),
    "several dampings": (
        lambda a, b, s: s + (curvature.damping(1.0) + 2 * curvature.damping(0.25) - curvature.damping(0.5)),
        S + np.eye(3),
    ),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_algebra_is_that_of_matrices(name, dtype):
    build, want = EXPRESSIONS[name]
    op = build(matrix(A, dtype), matrix(B, dtype), matrix(S, dtype, is_symmetric=True))
    assert_close(op.as_matrix(), want, dtype)
    v, w = jnp.asarray(np.ones(want.shape[1]), dtype), jnp.asarray(V, dtype)
    assert (op @ v).dtype == dtype
    assert_close(op @ v, want @ np.ones(want.shape[1]), dtype)
    assert_close(op.linearize()(v), op(v), dtype)
    assert_close(op.T @ w, want.T @ V, dtype)
    assert op.in_structure() == jax.ShapeDtypeStruct(v.shape, dtype)
    assert op.out_structure() == jax.ShapeDtypeStruct(w.shape, dtype)
    assert not op.is_symmetric or np.array_equal(want, want.T)


def test_what_is_known_to_be_symmetric():
    a, s = matrix(C), matrix(S, is_symmetric=True)
    assert not a.is_symmetric
    assert not (s + a).is_symmetric
    assert not (s @ s).is_symmetric
    for op in [s, 2 * s, -s, s + s, s + curvature.damping(1.0), (a.T.T @ s.T).T.T.right]:
        assert op.is_symmetric
        assert op.T is op


@register_operator
class Doubling(LinearOperator):
    """A tree of two precisions to a tree of other containers: ``{"a": a, "b": b} -> (2 b, sum(a), a[0])``."""

    example: dict

    def mv(self, v):
        return 2 * v["b"], jnp.sum(v["a"], keepdims=True), v["a"][0]

    def in_structure(self):
        return structure_of(self.example)

    def out_structure(self):
        return jax.eval_shape(self.mv, self.example)


EXAMPLE = {"a": jnp.zeros(2, jnp.float32), "b": np.zeros((2, 1))}
DOUBLING = np.array([[0, 0, 2, 0], [0, 0, 0, 2], [1, 1, 0, 0], [1, 0, 0, 0]])


def test_trees_of_mixed_dtypes():
    op = Doubling(jax.tree.map(jnp.asarray, EXAMPLE))
    assert op.as_matrix().dtype == jnp.float64
    assert_close(op.as_matrix(), DOUBLING)
    assert_close(op.T.as_matrix(chunk_size=3), DOUBLING.T)
    assert_close((op.T @ op).as_matrix(), DOUBLING.T @ DOUBLING)
    diagonal = (op.T @ op + curvature.damping(1.0)).diagonal()
    assert_trees_close(diagonal, {"a": jnp.array([3.0, 2.0], jnp.float32), "b": jnp.array([[5.0], [5.0]])})
    product = (np.float64(0.5) * op) @ {"a": jnp.ones(2, jnp.float32), "b": jnp.ones((2, 1))}
    assert_trees_close(product, (jnp.ones((2, 1)), jnp.ones(1, jnp.float32), jnp.float32(0.5)))


def test_a_diagonal_next_to_infinities():
    assert_close(matrix([[1.0, np.inf], [np.inf, 2.0]]).diagonal(), [1.0, 2.0])
    op = 1.0 * matrix([[1.0, 0.0], [5.0, 2.0]])
    assert_close(op.diagonal(chunk_size=1), [1.0, 2.0])


def test_operators_are_pytrees_that_trace_once():
    traces = []

    @jax.jit
    def product(op, v):
        traces.append(1)
        return op @ v

    for k in (1.0, 2.0):
        op = k * matrix(k * A) @ matrix(B) + curvature.damping(k)
        assert_close(product(op, jnp.asarray(V)), k * k * A @ (B @ V) + k * V)
    assert len(traces) == 1
    assert_close(jax.vmap(op.mv)(jnp.eye(3)), (4 * A @ B + 2 * np.eye(3)).T)
    lanes = jax.vmap(lambda m, c: MatrixOperator(m) * c)(jnp.stack([S, C]), jnp.array([1.0, 2.0]))
    assert_close(jax.vmap(lambda op: op @ jnp.asarray(V))(lanes), np.stack([S @ V, 2 * C @ V]))
    slope = jax.grad(lambda op: jnp.sum(op @ jnp.asarray(V)))(2.0 * matrix(C))
    assert_close(slope.operator.matrix, 2 * np.broadcast_to(V, (3, 3)))
    assert_close(slope.scale, np.sum(C @ V))


def test_damping_alone_multiplies_any_tree():
    assert_trees_close(
        curvature.damping(2.0) @ {"a": jnp.ones(2), "b": jnp.float32(3)}, {"a": 2 * jnp.ones(2), "b": jnp.float32(6)}
    )


# ---- bridges ---------------------------------------------------------------------------------------------------------


def quartic(x, a):
    return jnp.sum(a * x["w"] ** 4) + x["w"][0] * x["b"] ** 2


POINT = {"w": np.array([1.0, 2.0]), "b": np.array(0.5)}


def test_scipy(dtype):
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), POINT)
    op = curvature.HessianOperator(quartic, x, jnp.array([1.0, 3.0], dtype))
    want, bridge = np.asarray(op.as_matrix()), curvature.as_scipy(op)
    assert bridge.shape == (3, 3)
    assert bridge.dtype == dtype
    assert_close(bridge @ np.eye(3), want, dtype)
    assert_close(bridge @ V, want @ V, dtype)
    assert_close(scipy.sparse.linalg.eigsh(bridge, k=1)[0], np.linalg.eigvalsh(want)[-1:], dtype, 1e3)


def test_scipy_on_a_rectangle_and_on_batches():
    bridge = curvature.as_scipy(matrix(A))
    assert_close(bridge.T @ V, A.T @ V)
    assert_close(bridge.rmatmat(np.eye(3)), A.T)
    batches = [np.array([1.0, 3.0]), np.array([5.0, 7.0])]
    streamed = curvature.HessianOperator(quartic, POINT, batches=batches, reduction="sum")
    bridge = curvature.as_scipy(streamed + curvature.damping(1.0))
    want = np.asarray(streamed.as_matrix()) + np.eye(3)
    assert_close(bridge @ V, want @ V)
    assert_close(bridge @ np.eye(3), want)
    assert bridge.matvec(np.ones((3, 1))).shape == (3, 1)


def test_scipy_compiles_once_for_all_points():
    traces = []

    def f(x):
        traces.append(1)
        return jnp.sum(x**4)

    for k in (1.0, 2.0):
        bridge = curvature.as_scipy(curvature.HessianOperator(f, jnp.array([k, 1.0])))
        for _ in range(2):
            assert_close(bridge @ np.ones(2), [12 * k**2, 12.0])
    assert len(traces) == 1


def test_lineax(dtype):
    lineax = pytest.importorskip("lineax")
    x = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), POINT)

    @jax.jit
    def solve(x, b):
        op = curvature.HessianOperator(quartic, x, jnp.array([1.0, 3.0], dtype)) + curvature.damping(1.0)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            bridge = curvature.as_lineax(op)
            assert lineax.is_symmetric(bridge)
            return lineax.linear_solve(bridge, b, lineax.GMRES(1e-6, 1e-6)).value, op.as_matrix()

    solution, dense = solve(x, x)
    assert_close(dense @ jnp.asarray(flat(solution), dtype), flat(x), dtype, 1e5 if dtype == jnp.float32 else 1e12)


# ---- errors ----------------------------------------------------------------------------------------------------------

ERRORS = {
    "shape": (
        lambda: matrix(A) @ np.ones(3),
        r"MatrixOperator: v has shape \(3,\), expected \(4,\) to match in_struct",
    ),
    "dtype": (lambda: matrix(A)(np.ones(4, np.float32)), r"MatrixOperator: v has dtype float32, expected float64"),
    "leaf": (
        lambda: Doubling(EXAMPLE) @ {"a": np.ones(3, np.float32), "b": np.ones((2, 1))},
        r"Doubling: v\['a'\] has shape \(3,\), expected \(2,\)",
    ),
    "sum": (
        lambda: matrix(A) + matrix(S),
        r"A \+ B: what B takes is float64\[3\], expected float64\[4\] to match what A",
    ),
    "sum of outputs": (lambda: matrix(A) - matrix(A[:2]), r"A \+ B: B v is float64\[2\], expected float64\[3\]"),
    "composition": (
        lambda: matrix(A) @ matrix(A),
        r"A @ B: B v is float64\[3\], expected float64\[4\] to match what A t",
    ),
    "containers": (
        lambda: Doubling(EXAMPLE) @ matrix(A),
        r"A @ B: B v does not have the tree structure of what A takes",
    ),
    "diagonal": (lambda: matrix(A).diagonal(), r"diagonal: A v is float64\[3\], expected float64\[4\] to match v"),
    "damped rectangle": (lambda: matrix(A) + curvature.damping(1.0), r"A \+ damping: A v is float64\[3\]"),
    "damping alone": (lambda: curvature.damping(1.0).as_matrix(), r"damping: c I has no structure; add it"),
    "damping's shape": (lambda: curvature.damping(1.0).out_structure(), r"damping: c I has no structure"),
    "scale": (lambda: matrix(A) * np.ones(3), r"scale \* A: an operator times an array of shape \(3,\), expected one"),
    "product of operators": (lambda: matrix(A) * matrix(B), r"expected one real number; A @ B composes"),
    "damping of text": (lambda: curvature.damping("x"), r"damping: an operator times 'x' of type str"),
    "chunk_size": (lambda: matrix(A).T.as_matrix(0) + (1.0 * matrix(A)).as_matrix(0), r"as_matrix: chunk_size=0, exp"),
}


@pytest.mark.filterwarnings("ignore::tests.typecheck.AnnotationWarning")
@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, message = ERRORS[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_a_number_is_no_operator():
    with pytest.raises(TypeError, match="unsupported operand"):
        matrix(C) + 1.0
