"""Products with Kronecker-factored curvature matrices, from their definition, to check operators."""


import jax
import jax.numpy as jnp

from benchmarks.models import Model, layered
from benchmarks.peers import operations

Params = dict[str, jax.Array]


def kronecker(model: Model, p: Params, v: Params, x: jax.Array, _: jax.Array, *, way: str) -> Params:
    """KFAC or EKFAC of the exact Fisher matrix, layer by layer; ``way`` is "expand", "reduce" or "ekfac".

    References: Eschenhagen et al. (2023), arXiv:2311.00636, sections 3.1 and 3.2; George et al. (2018),
        arXiv:1806.03884, equation (11).
    """
    product = {}
    block, reduce = corrected if way == "ekfac" else factored, way == "reduce"
    for layer, a, g in zip(model.layers, *inputs_and_scores(model, p, x), strict=True):
        weight = v[layer.weight]
        matrix = weight if weight.ndim == 2 else weight.transpose(2, 0, 1, 3).reshape(-1, weight.shape[3])
        found = block(a, g, matrix, reduce)
        if weight.ndim == 4:  # as patches have it: channels, rows, columns
            rows, columns, channels, _ = weight.shape
            found = found.reshape(channels, rows, columns, -1).transpose(1, 2, 0, 3)
        product[layer.weight] = found
        product[layer.bias] = block(jnp.ones((*a.shape[:2], 1)), g, v[layer.bias][None], reduce)[0]
    return product


def inputs_and_scores(model: Model, p: Params, x: jax.Array) -> tuple[list[jax.Array], list[jax.Array]]:
    """For each layer what enters, (examples, places, in), and pseudo-gradients, (examples, classes, places, out).

    The outer products of the pseudo-gradients by what leaves a layer, summed over classes, are the exact Fisher matrix.
    """
    ops = operations.for_jax()
    inputs = layered(ops, model.layers, p, x)[1]
    places = [(*rows.shape[1:-1], p[layer.bias].size) for layer, rows in zip(model.layers, inputs, strict=True)]

    def of_example(image: jax.Array) -> list[jax.Array]:
        zeros = [jnp.zeros(shape) for shape in places]

        def logits(shifts: list[jax.Array]) -> jax.Array:
            return layered(ops, model.layers, p, image[None], [shift[None] for shift in shifts])[0][0]

        q = jax.nn.softmax(logits(zeros))
        root = jnp.sqrt(q)
        roots = jnp.diag(root) - jnp.outer(q, root)  # roots @ roots.T = diag(q) - q q'
        jacobians = jax.jacrev(logits)(zeros)
        return [jnp.einsum("kc,kto->cto", roots, j.reshape(len(q), -1, j.shape[-1])) for j in jacobians]

    entered = [rows[:, None] if rows.ndim == 2 else patches(rows) for rows in inputs]
    return entered, jax.lax.map(of_example, x)


def patches(images: jax.Array) -> jax.Array:
    """What a filter of 3 x 3 sees at each place, (examples, places, channels * 9)."""
    layout = ("NHWC", "HWIO", "NHWC")
    seen = jax.lax.conv_general_dilated_patches(images, (3, 3), (1, 1), "SAME", dimension_numbers=layout)
    return seen.reshape(len(images), -1, seen.shape[-1])


def factors(a: jax.Array, g: jax.Array, reduce: bool) -> tuple[jax.Array, jax.Array]:
    count, places = a.shape[:2]
    if reduce:
        a, g, places = jnp.mean(a, axis=1, keepdims=True), jnp.sum(g, axis=2, keepdims=True), 1
    # n: example, t: place, c: class, i, j: inputs, o, p: outputs
    return jnp.einsum("nti,ntj->ij", a, a) / (count * places), jnp.einsum("ncto,nctp->op", g, g) / count


def factored(a: jax.Array, g: jax.Array, v: jax.Array, reduce: bool) -> jax.Array:
    left, right = factors(a, g, reduce)
    return left @ v @ right


def corrected(a: jax.Array, g: jax.Array, v: jax.Array, reduce: bool) -> jax.Array:
    """EKFAC: second moments of single gradients as eigenvalues, in the eigenvectors of the factors."""
    left, right = (jnp.linalg.eigh(factor)[1] for factor in factors(a, g, reduce))
    moments = jnp.mean(jnp.sum(jnp.einsum("nti,ncto->ncio", a @ left, g @ right) ** 2, axis=1), axis=0)
    return left @ (moments * (left.T @ v @ right)) @ right.T
