"""Hessian, Gauss-Newton and Fisher operators."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.tree_util import keystr, tree_flatten_with_path
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from curvature import _checks
from curvature._errors import caller, of_class
from curvature._trees import Subtree
from curvature._types import HessianMode, Objective, Tree
from curvature.operators import _likelihoods
from curvature.operators._base import LinearOperator, Product, scaled
from curvature.operators._data import DataOperator, Reduction
from curvature.operators._jacobian_operators import JacobianOperator, push_and_pull, trace_model
from curvature.operators._pytrees import register_operator, replace, set_fields, static, structure_of
from curvature.programs import _traced
from curvature.transforms import _modes
from curvature.transforms._compositions import is_symmetric, linearize_program, product_of, trace_objective

FisherKind = Literal["exact", "sampled", "empirical"]
"""The labels over which scores are averaged: the expectation under the model, samples from it, or the data."""


@register_operator
class HessianOperator(DataOperator):
    """The Hessian ``H[i, j] = d^2 f / dx_i dx_j`` of ``f`` at ``x``.

    ``H`` is scaled as ``f`` is: if ``f`` is a mean over a batch, ``H`` is the mean of the Hessians of the examples; if
    ``f`` is a sum, ``H`` is their sum.

    Args:
        f: the objective, ``f(x, *args) -> scalar``; compared by identity.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated.
        mode: the composition of modes; see ``hvp``.
        reduction: whether ``f`` is the ``"mean"`` or the ``"sum"`` over examples, which lie along the leading axis of
            every leaf of ``args`` except scalars. It matters only if the data is chunked, sharded or in batches: a
            mean weights the parts by their numbers of examples, a sum adds them. A trial on three synthetic examples
            refuses an ``f`` that is not what ``reduction`` states.
        chunk_size: the number of examples evaluated at once on a device, in one compiled loop; None evaluates all at
            once. The last chunk may be smaller.
        sharding: how the examples are sharded, such as ``NamedSharding(mesh, PartitionSpec("data"))``. Each device then
            evaluates the product for its examples, and one all-reduce of the size of ``x`` combines the products. With
            None, the compiler partitions whole data as the arrays are sharded, and chunked data takes the sharding
            of the arrays. Inside ``jit`` the arrays show their sharding only on a mesh with explicit axes: pass
            ``sharding`` there, or the compiler gathers all data on every device.
        batches: the data in batches instead of ``args``: an iterable, such as a list, that can be iterated over once
            per product. A batch that is a tuple or list holds the arguments of ``f``; any other batch is the only
            argument. Products are summed on the host in order, with one compilation per shape of batch. Such an
            operator cannot be traced: ``cg``, ``eigsh`` and the other solvers run a loop on the host for it, outside of
            ``jit``, ``vmap`` and ``grad``.
        progress: whether each pass over ``batches`` shows a progress bar (needs rich).

    Raises:
        TypeError: if ``f`` is not callable or not scalar, a leaf is not of a real floating dtype, no composition can
            differentiate ``f``, or ``batches`` can be iterated over only once; from a traced product with ``batches``.
        ValueError: for an unknown option, data whose leading axes differ, or an ``f`` that is not what ``reduction``
            states.

    Cost: about 2 gradients per product; about 1.5 per linearized product, as in solvers. Chunks and batches are not
        linearized: every product evaluates ``f`` on each part, and holds the intermediates of one part.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> op = curvature.HessianOperator(lambda x: x[0] ** 2 * x[1], jnp.array([3.0, 5.0]))
        >>> op @ jnp.array([1.0, 0.0])
        Array([10.,  6.], dtype=float32)
        >>> (op + curvature.damping(1.0)).as_matrix()
        Array([[11.,  6.],
               [ 6.,  1.]], dtype=float32)

    References: Pearlmutter, Fast exact multiplication by the Hessian (1994), doi:10.1162/neco.1994.6.1.147.
    """

    f: Objective = static()
    mode: HessianMode = static()

    @of_class
    def __init__(
        self,
        f: Objective,
        x: Tree,
        *args: Any,
        mode: HessianMode = "auto",
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
        sharding: NamedSharding | None = None,
        batches: Iterable[Any] | None = None,
        progress: bool = False,
    ) -> None:
        _checks.check_static_function("f", f)
        _checks.check_choice("mode", mode, HessianMode)
        set_fields(self, f=f, mode=mode)
        self._set_data(x, args, reduction, chunk_size, sharding, batches, progress)

    def _objective(self) -> tuple[str, tuple[Any, ...], Callable[..., Any]]:
        return "f", (self.f,), self.f

    def _apply_whole(self, v: Tree) -> Tree:
        return product_of(*self._trace(), v) if self.rows == self.columns == "" else super()._apply_whole(v)

    @of_class
    def _trace(self) -> tuple[_traced.Program, str]:
        program = trace_objective("f", self.f, self.x, self.args)
        return program, _modes.choose_composition(program, self.mode)

    def _linearize_whole(self) -> Product:
        program, composition = self._trace()
        if self.rows == self.columns == "":
            return linearize_program(program, composition)[2]
        (rows, columns), x = self._parts(), program.x

        def gradient(by: Subtree, part: Tree, of: Subtree) -> Tree:
            return of.take(program.reverse.fun(by.put(x, part))[0])

        if composition == "fwd_over_rev":
            return jax.linearize(lambda part: gradient(columns, part, rows), columns.take(x))[1]
        if composition == "rev_over_rev" and is_symmetric(program):  # H[rows, columns] v = (v' H[columns, rows])'
            pull = jax.vjp(lambda part: gradient(rows, part, columns), rows.take(x))[1]
            return lambda v: pull(v)[0]
        product = linearize_program(program, composition)[2]
        return lambda v: rows.take(product(columns.put(jax.tree.map(jnp.zeros_like, x), v)))


@register_operator
class _ModelDataOperator(DataOperator):
    """``J' M J`` with ``J`` the Jacobian of a model and ``M`` a matrix on its outputs."""

    model: Callable[..., Any] = static()
    loss: Callable[..., Any] = static()
    likelihood: _likelihoods.Likelihood | None = static()

    def _set_model(self, model: Callable[..., Any], loss: Callable[..., Any], likelihood: Any) -> None:
        """Check the arguments and set the fields above."""
        _checks.check_static_function("model", model)
        _checks.check_static_function("loss", loss)
        if likelihood is not None:
            _checks.check_choice("likelihood", likelihood, _likelihoods.Likelihood)
        set_fields(self, model=model, loss=loss, likelihood=likelihood)

    def _objective(self) -> tuple[str, tuple[Any, ...], Callable[..., Any]]:
        return "the loss", (self.loss, self.model), lambda x, *args: self.loss(self.model(x, *args), *args)

    @of_class
    def _linearize_whole(self) -> Product:
        rows, columns = self._parts()
        program = trace_model("model", self.model, self.x, self.args)
        outputs, push, pull = push_and_pull("model", program, columns)
        if rows != columns:
            _, _, pull = push_and_pull("model", program, rows)
        middle = self._output_matrix(outputs)
        return lambda v: pull(middle(push(v)))

    @of_class
    def factors(self) -> tuple[JacobianOperator, "OutputOperator"]:
        """``(J, M)`` for ``solve(..., method="woodbury")``; the data must be whole and the operator not a block."""
        if not (self.chunk_size is None and self.batches is None and self.rows == self.columns == ""):
            raise ValueError(
                f"{caller()}.factors: the data comes in slices or batches, or the operator is a block, expected whole "
                "data and all of x; use another method, such as 'cg'."
            )
        return JacobianOperator(self.model, self.x, *self.args), OutputOperator(self)

    @of_class
    def _output_matrix(self, outputs: Tree) -> Product:
        """``t -> M t``, where ``M`` is the Hessian of the loss with respect to the outputs, or its closed form."""
        if self.likelihood is None:
            return _likelihoods.loss_hessian(self.loss, outputs, self.args)
        family, weights = _likelihoods.family_and_weights(str(self.likelihood), self.loss, outputs, self.args)
        return _likelihoods.information(family, outputs, weights)


@register_operator
class OutputOperator(LinearOperator):
    """The matrix ``M`` of a Gauss-Newton or Fisher matrix ``J' M J``, on trees like the outputs of the model."""

    operator: _ModelDataOperator
    is_symmetric = True

    def mv(self, v: Tree) -> Tree:
        return self.linearize()(v)

    def linearize(self) -> Product:
        op = self.operator
        return op._output_matrix(op.model(op.x, *op.args))

    def in_structure(self) -> Tree:
        op = self.operator
        return structure_of(jax.eval_shape(op.model, op.x, *op.args))


@register_operator
class GaussNewtonOperator(_ModelDataOperator):
    """The generalized Gauss-Newton matrix ``G = J' M J``, the Hessian without the second derivatives of the model.

    ``J`` is the Jacobian of the outputs of ``model`` with respect to ``x``, and ``M`` the Hessian of ``loss`` with
    respect to the outputs. ``G`` is positive semidefinite if the loss is convex in the outputs. It is scaled as the
    loss is: for a mean over B examples ``G = (1/B) sum_b J_b' M_b J_b``, for a sum without ``1/B``. For a loss that is
    a negative log likelihood in its natural parameters (squared error, softmax or sigmoid cross entropy), ``G`` is the
    Fisher matrix.

    Args:
        model: ``model(x, *args) -> outputs``, any tree of floating arrays; compared by identity.
        loss: ``loss(outputs, *args) -> scalar``; compared by identity.
        x: the point, any tree of floating arrays.
        *args: data for both, not differentiated.
        likelihood: None differentiates the loss twice, which for a softmax cross entropy of V classes forms nothing
            larger than V for each row. A name asserts that the loss is a weighted sum of negative log likelihoods and
            applies ``M`` in closed form: ``"categorical"`` for softmax cross entropies over the last axis,
            ``w (p t - p (p.t))`` for each row with labels that sum to 1; ``"bernoulli"`` for sigmoid cross entropies,
            ``w p (1-p) t``; ``"normal"`` for half the squared error, ``w t``. The weights ``w``, such as ``1/B`` or a
            mask, come from one product with the Hessian of the loss at zero outputs.
        reduction: see ``HessianOperator``, with ``loss(model(x, *args), *args)`` as ``f``.
        chunk_size: see ``HessianOperator``.
        sharding: see ``HessianOperator``.
        batches: see ``HessianOperator``.
        progress: see ``HessianOperator``.

    Raises:
        TypeError: as ``HessianOperator``, and if the model has no reverse derivative.
        ValueError: as ``HessianOperator``.

    Cost: a linearized product is one JVP and one VJP of the model without its evaluation, which is less than a
        product with the Hessian.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> model, loss = lambda w, a: a * w**2, lambda z, a: jnp.sum(z**2) / 2
        >>> op = curvature.GaussNewtonOperator(model, loss, jnp.array([3.0]), jnp.array([1.0, 2.0]))
        >>> op @ jnp.array([1.0])
        Array([180.], dtype=float32)

    References: Schraudolph, Fast curvature matrix-vector products (2002), doi:10.1162/08997660260028683; Martens, New
        insights and perspectives on the natural gradient method, arXiv:1412.1193, section 8.
    """

    @of_class
    def __init__(
        self,
        model: Callable[..., Any],
        loss: Callable[..., Any],
        x: Tree,
        *args: Any,
        likelihood: _likelihoods.Likelihood | None = None,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
        sharding: NamedSharding | None = None,
        batches: Iterable[Any] | None = None,
        progress: bool = False,
    ) -> None:
        self._set_model(model, loss, likelihood)
        self._set_data(x, args, reduction, chunk_size, sharding, batches, progress)


@register_operator
class FisherOperator(_ModelDataOperator):
    """The Fisher information matrix of the likelihood of a model, exact, sampled or empirical.

    The loss is ``sum_r w_r nll_r`` over rows r of the outputs (examples; tokens; entries), with the weights of a mean
    (``w_r = 1/B`` for B rows), a sum (``w_r = 1``) or a mask. Let ``J_r`` be the Jacobian of row r and ``s_r`` the
    score, the gradient of ``nll_r`` with respect to row r. The kinds differ in the labels at which scores are taken:

    - ``"exact"``: the expectation over the labels under the model, ``F = sum_r w_r J_r' E[s_r s_r'] J_r``. With a
      ``likelihood`` the expectation has its closed form. With None, ``F`` is the Gauss-Newton matrix, which equals the
      Fisher matrix for every negative log likelihood in natural parameters.
    - ``"sampled"``: the mean over ``num_samples`` labels per row, drawn from the ``likelihood`` of the model. Every
      product uses the same draw, however the data is chunked, sharded or batched. It is an unbiased estimate of the
      exact matrix.
    - ``"empirical"``: the labels of the data, ``F = (1/B) sum_b g_b g_b'`` for ``reduction="mean"``, without ``1/B``
      for ``"sum"``, where ``g_b`` is the gradient with respect to ``x`` of the loss of example b, all its rows
      together: the mean of outer products, not the outer product of the mean.

    For ``"sampled"`` and ``"empirical"``, examples lie along the leading axis of every output. For ``"empirical"``, the
    outputs of one example must not enter the loss of another.

    Args:
        model: ``model(x, *args) -> outputs``, any tree of floating arrays; compared by identity.
        loss: ``loss(outputs, *args) -> scalar``; compared by identity.
        x: the point, any tree of floating arrays.
        *args: data for both, not differentiated.
        kind: ``"exact"``, ``"sampled"`` or ``"empirical"``, as above.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"normal"``; see ``GaussNewtonOperator``.
        key: the random key for ``"sampled"``.
        num_samples: the number of labels drawn for each row; memory grows with it.
        reduction: see ``HessianOperator``; for ``"empirical"`` it matters for whole data too.
        chunk_size: see ``HessianOperator``.
        sharding: see ``HessianOperator``.
        batches: see ``HessianOperator``.
        progress: see ``HessianOperator``.

    Raises:
        TypeError: as ``GaussNewtonOperator``.
        ValueError: as ``GaussNewtonOperator``, and if ``"sampled"`` lacks a ``likelihood`` or ``key``, or an output has
            no axis of examples.

    Cost: as ``GaussNewtonOperator``; labels are drawn once per linearization.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> model, loss = lambda w, a, y: a @ w, lambda z, a, y: jnp.mean((z - y) ** 2) / 2
        >>> data = jnp.array([[1.0, 0.0], [1.0, 2.0]]), jnp.array([0.0, 1.0])
        >>> curvature.FisherOperator(model, loss, jnp.ones(2), *data).as_matrix()
        Array([[1., 1.],
               [1., 2.]], dtype=float32)
        >>> curvature.FisherOperator(model, loss, jnp.ones(2), *data, kind="empirical").as_matrix()
        Array([[2.5, 4. ],
               [4. , 8. ]], dtype=float32)

    References: Martens, arXiv:1412.1193, sections 5, 9 and 11; Kunstner, Balles and Hennig, Limitations of the
        empirical Fisher approximation (2019), arXiv:1905.12558.
    """

    kind: FisherKind = static()
    num_samples: int = static()
    key: PRNGKeyArray | UInt32[Array, "..."] | None
    first: Int[Array, ""] | None

    @of_class
    def __init__(
        self,
        model: Callable[..., Any],
        loss: Callable[..., Any],
        x: Tree,
        *args: Any,
        kind: FisherKind = "exact",
        likelihood: _likelihoods.Likelihood | None = None,
        key: PRNGKeyArray | UInt32[Array, "..."] | None = None,
        num_samples: int = 1,
        reduction: Reduction = "mean",
        chunk_size: int | None = None,
        sharding: NamedSharding | None = None,
        batches: Iterable[Any] | None = None,
        progress: bool = False,
    ) -> None:
        _checks.check_choice("kind", kind, FisherKind)
        _checks.check_count("num_samples", num_samples, least=1)
        _checks.check_sampling(kind, likelihood, key)
        sampled = kind == "sampled"
        first = jnp.zeros((), jnp.int32) if sampled else None  # the index of the first example in all of the data
        set_fields(self, kind=kind, num_samples=num_samples, key=key if sampled else None, first=first)
        self._set_model(model, loss, likelihood)
        self._set_data(x, args, reduction, chunk_size, sharding, batches, progress)
        if kind == "empirical" and any(jnp.ndim(leaf) for leaf in jax.tree.leaves(args)):
            self._check_reduction(self.x, args, reduction)

    def _on_part(self, args: tuple[Any, ...], first: Any) -> DataOperator:
        part = super()._on_part(args, first)
        return part if self.first is None else replace(part, first=self.first + first)

    @of_class
    def _output_matrix(self, outputs: Tree) -> Product:
        if self.kind == "exact":
            return super()._output_matrix(outputs)
        for path, leaf in tree_flatten_with_path(outputs)[0]:
            if not leaf.ndim:
                raise ValueError(
                    f"{caller()}: the output model(x){keystr(path)} is a scalar, expected a leading axis of examples."
                )
        examples = _checks.check_examples("model(x)", outputs)
        if self.key is not None and self.first is not None:
            family, weights = _likelihoods.family_and_weights(str(self.likelihood), self.loss, outputs, self.args)
            draws = _likelihoods.draw_scores(family, self.key, outputs, self.first, self.num_samples)
            return _likelihoods.sampled_information(family, weights, draws)
        scores = _likelihoods.loss_gradient(self.loss, outputs, self.args)
        scale = examples if self.reduction == "mean" else 1  # a score of a mean has the factor 1/B, its square 1/B^2
        return lambda t: scaled(scale, _likelihoods.outer_products(scores, t))
