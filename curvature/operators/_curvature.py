"""The curvature matrices of losses of models: Hessian, Gauss-Newton, Fisher."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Int, PRNGKeyArray, UInt32

from curvature import _checks
from curvature._checks import _linalg
from curvature._trees import Subtree
from curvature._types import HessianMode, Objective, Tree
from curvature.operators import _likelihoods
from curvature.operators._base import (
    LinearOperator,
    Product,
    register_operator,
    replace,
    scaled,
    set_fields,
    static,
    structure_of,
)
from curvature.operators._data import DataOperator, Reduction
from curvature.operators._jacobian_operators import JacobianOperator, push_and_pull, trace_model
from curvature.programs import _traced
from curvature.transforms import _modes
from curvature.transforms._compositions import is_symmetric, linearize_program, product_of, trace_objective

FisherKind = Literal["exact", "sampled", "empirical"]
"""Over which labels scores are averaged: all that the model foresees, drawn ones, those of the data."""


@register_operator
class HessianOperator(DataOperator):
    """The Hessian ``H[i, j] = d^2 f / dx_i dx_j`` of ``f`` at ``x``.

    It is of what ``f`` returns: of the mean over a batch if ``f`` is a mean, of the sum if it is a sum.

    Args:
        f: the objective, ``f(x, *args) -> scalar``; compared by identity.
        x: the point, any tree of floating arrays.
        *args: data for ``f``, not differentiated.
        mode: the composition of modes; see ``hvp``.
        reduction: whether ``f`` is the ``"mean"`` or the ``"sum"`` over examples, the leading axis of every leaf of
            ``args`` but scalars; it matters only for data in parts: they add up weighted by size, or as they are. A
            trial on three made-up examples refuses an ``f`` that is neither, or the other.
        chunk_size: how many examples at once on a device, in one compiled loop; None takes all. The last slice may be
            smaller.
        sharding: how the examples lie on devices, such as ``NamedSharding(mesh, PartitionSpec("data"))``: each device
            then takes the product over its own, and one all-reduce of the size of ``x`` combines them. None leaves
            whole data to the compiler, which shares it out as it lies, and reads from the arrays whether data in
            slices is sharded. Inside ``jit`` arrays show that only on a mesh with explicit axes: name it there, or the
            compiler gathers all data on every device.
        batches: the data as batches instead of ``args``: an iterable, such as a list, that starts anew for each
            product; a tuple or list is the args of ``f``, anything else its only one. Products are summed on the host
            in order, one compilation for each shape of batch; such an operator cannot be traced. ``cg``, ``eigsh`` and
            the other solvers run a loop on the host for it, outside of ``jit``, ``vmap`` and ``grad``.
        progress: whether each pass over ``batches`` shows a bar (needs rich).

    Raises:
        TypeError: when ``f`` is not callable or not scalar, a leaf is not of a real floating dtype, no composition can
            differentiate ``f``, or ``batches`` can be iterated over only once; from a product with batches, if traced.
        ValueError: for an unknown option, data whose leading axes differ, or data in parts that do not add up.

    Cost: a product is about 2 gradients; a linearized one, as solvers take, about 1.5. Data in parts is not linearized:
        every product evaluates ``f`` on each part, and holds the intermediates of one part.

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
        _checks.check_callable("HessianOperator", "f", f)
        _checks.check_hashable("HessianOperator", "f", f)
        _checks.check_choice("HessianOperator", "mode", mode, HessianMode)
        set_fields(self, f=f, mode=mode)
        self._set_data(x, args, reduction, chunk_size, sharding, batches, progress)

    def _objective(self) -> tuple[str, tuple[Any, ...], Callable[..., Any]]:
        return "f", (self.f,), self.f

    def _once(self, v: Tree) -> Tree:
        return product_of(*self._composed(), v) if self.rows == self.columns == "" else super()._once(v)

    def _composed(self) -> tuple[_traced.Program, str]:
        program = trace_objective("HessianOperator", "f", self.f, self.x, self.args)
        return program, _modes.choose_composition("HessianOperator", program, self.mode)

    def _whole(self) -> Product:
        program, composition = self._composed()
        if self.rows == self.columns == "":
            return linearize_program(program, composition)[2]
        (rows, columns), x = self._parts(), program.x

        def gradient(by: Subtree, part: Tree, of: Subtree) -> Tree:
            return of.take(program.reverse.fun(by.put(x, part))[0])

        if composition == "fwd_over_rev":
            return jax.linearize(lambda part: gradient(columns, part, rows), columns.take(x))[1]
        if composition == "rev_over_rev" and is_symmetric(program):  # v' H[columns, rows] is H[rows, columns] v
            pull = jax.vjp(lambda part: gradient(rows, part, columns), rows.take(x))[1]
            return lambda v: pull(v)[0]
        product = linearize_program(program, composition)[2]
        return lambda v: rows.take(product(columns.put(jax.tree.map(jnp.zeros_like, x), v)))


class _ModelDataOperator(DataOperator):
    """``J' M J``: the Jacobian of a model, and a matrix ``M`` on its outputs that a subclass defines."""

    model: Callable[..., Any]
    loss: Callable[..., Any]
    likelihood: _likelihoods.Likelihood | None

    def _set_model(self, model: Callable[..., Any], loss: Callable[..., Any], likelihood: Any) -> None:
        """Set the fields above once they are known to be right."""
        function = type(self).__name__
        for name, value in {"model": model, "loss": loss}.items():
            _checks.check_callable(function, name, value)
            _checks.check_hashable(function, name, value)
        if likelihood is not None:
            _checks.check_choice(function, "likelihood", likelihood, _likelihoods.Likelihood)
        set_fields(self, model=model, loss=loss, likelihood=likelihood)

    def _objective(self) -> tuple[str, tuple[Any, ...], Callable[..., Any]]:
        return "the loss", (self.loss, self.model), lambda x, *args: self.loss(self.model(x, *args), *args)

    def _whole(self) -> Product:
        name, (rows, columns) = type(self).__name__, self._parts()
        program = trace_model(name, "model", self.model, self.x, self.args)
        outputs, push, pull = push_and_pull(name, "model", program, columns)
        if rows != columns:
            _, _, pull = push_and_pull(name, "model", program, rows)
        middle = self._on_outputs(outputs)
        return lambda v: pull(middle(push(v)))

    def factors(self) -> tuple[JacobianOperator, "OutputOperator"]:
        """``J`` and ``M``, for whole data and all of ``x``; what ``solve(..., method="woodbury")`` asks for."""
        whole = self.chunk_size is None and self.batches is None and self.rows == self.columns == ""
        _linalg.check_whole(type(self).__name__, whole)
        return JacobianOperator(self.model, self.x, *self.args), OutputOperator(self)

    def _on_outputs(self, outputs: Tree) -> Product:
        """``t -> M t`` with ``M`` the Hessian of the loss by the outputs, or the closed form of it."""
        if self.likelihood is None:
            return _likelihoods.loss_hessian(type(self).__name__, self.loss, outputs, self.args)
        return _likelihoods.information(*self._weighted_labels(outputs))

    def _weighted_labels(self, outputs: Tree) -> tuple[_likelihoods.Family, Tree, Tree]:
        """The family of the likelihood, the outputs, and the weights that the loss gives the labels."""
        name, likelihood = type(self).__name__, str(self.likelihood)
        _checks.check_logits(name, likelihood, outputs)
        family = _likelihoods.FAMILIES[likelihood]
        return family, outputs, _likelihoods.label_weights(name, self.loss, outputs, self.args, family)


@register_operator
class OutputOperator(LinearOperator):
    """The ``M`` of a Gauss-Newton or Fisher matrix ``J' M J``, on trees like the outputs of its model."""

    operator: _ModelDataOperator
    is_symmetric = True

    def mv(self, v: Tree) -> Tree:
        return self.linearize()(v)

    def linearize(self) -> Product:
        op = self.operator
        return op._on_outputs(op.model(op.x, *op.args))

    def in_structure(self) -> Tree:
        op = self.operator
        return structure_of(jax.eval_shape(op.model, op.x, *op.args))

    def out_structure(self) -> Tree:
        return self.in_structure()


@register_operator
class GaussNewtonOperator(_ModelDataOperator):
    """The generalized Gauss-Newton matrix ``G = J' M J``, the part of the Hessian that is due to the loss alone.

    ``J`` is the Jacobian of the outputs of ``model`` by ``x``, and ``M`` the Hessian of ``loss`` by the outputs: ``G``
    is positive semidefinite if the loss is convex in them. It is scaled as the loss is: for a mean over B examples
    ``G = (1/B) sum_b J_b' M_b J_b``, for a sum without ``1/B``. For a loss that is a negative log likelihood in its
    natural parameters (squared error, softmax or sigmoid cross entropy) it is the Fisher matrix.

    Args:
        model: ``model(x, *args) -> outputs``, any tree of floating arrays; compared by identity.
        loss: ``loss(outputs, *args) -> scalar``; compared by identity.
        x: the point, any tree of floating arrays.
        *args: data for both, not differentiated.
        likelihood: None differentiates the loss twice, which for a softmax cross entropy of V classes forms nothing
            larger than V for each row. A word asserts that the loss is a weighted sum of negative log likelihoods and
            applies ``M`` in closed form: ``"categorical"`` for softmax cross entropies over the last axis,
            ``w (p t - p (p.t))`` for each row with labels that sum to 1; ``"bernoulli"`` for sigmoid cross entropies,
            ``w p (1-p) t``; ``"normal"`` for half the squared error, ``w t``. One product with the Hessian of the loss
            at zero outputs tells the weights, such as those of a mean or a mask.
        reduction: as for ``HessianOperator``, with ``model`` and ``loss`` in the place of ``f``.
        chunk_size: likewise.
        sharding: likewise.
        batches: likewise.
        progress: likewise.

    Raises:
        TypeError: as ``HessianOperator``, and when the model has no reverse derivative.
        ValueError: as ``HessianOperator``.

    Cost: a linearized product is one JVP and one VJP of the model without its evaluation, less than a Hessian's.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> model, loss = lambda w, a: a * w**2, lambda z, a: jnp.sum(z**2) / 2
        >>> op = curvature.GaussNewtonOperator(model, loss, jnp.array([3.0]), jnp.array([1.0, 2.0]))
        >>> op @ jnp.array([1.0])
        Array([180.], dtype=float32)

    References: Schraudolph, Fast curvature matrix-vector products (2002), doi:10.1162/08997660260028683; Martens, New
        insights and perspectives on the natural gradient method, arXiv:1412.1193, section 8.
    """

    model: Callable[..., Any] = static()
    loss: Callable[..., Any] = static()
    likelihood: _likelihoods.Likelihood | None = static()

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
    (``w_r = 1/B`` for B rows), a sum (``w_r = 1``) or a mask. With ``J_r`` the Jacobian of a row and ``s_r`` the
    gradient of ``nll_r`` by it, the kinds differ in the labels at which scores are taken:

    - ``"exact"``: all labels, as the model foresees them, ``F = sum_r w_r J_r' E[s_r s_r'] J_r``. Given a
      ``likelihood``, the expectation is its closed form; with None, ``F`` is the Gauss-Newton matrix, which is the same
      for every negative log likelihood in natural parameters.
    - ``"sampled"``: the mean over ``num_samples`` labels of each row, drawn from the ``likelihood`` of the model; the
      same draw in every product, whatever the parts that the data comes in. Unbiased for the exact one.
    - ``"empirical"``: the labels of the data, ``F = (1/B) sum_b g_b g_b'`` for ``reduction="mean"``, without ``1/B``
      for ``"sum"``, with ``g_b`` the gradient by ``x`` of the loss of example b, all its rows together: the mean of
      outer products, not the outer product of the mean.

    For samples and the empirical kind, examples lie along the leading axis of every output; for the empirical kind,
    the outputs of one must not enter the loss of another.

    Args:
        model: ``model(x, *args) -> outputs``, any tree of floating arrays; compared by identity.
        loss: ``loss(outputs, *args) -> scalar``; compared by identity.
        x: the point, any tree of floating arrays.
        *args: data for both, not differentiated.
        kind: one of the three above.
        likelihood: ``"categorical"``, ``"bernoulli"`` or ``"normal"``, as for ``GaussNewtonOperator``.
        key: the randomness of the samples.
        num_samples: how many labels are drawn for each row; memory grows with it.
        reduction: as for ``HessianOperator``, but for the empirical kind it matters for whole data too.
        chunk_size: as for ``HessianOperator``.
        sharding: likewise.
        batches: likewise.
        progress: likewise.

    Raises:
        TypeError: as ``GaussNewtonOperator``.
        ValueError: as ``GaussNewtonOperator``, and when the samples lack their ``likelihood`` or ``key``, or an output
            has no axis of examples.

    Cost: as ``GaussNewtonOperator``; the samples are drawn once for each linearization.

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

    model: Callable[..., Any] = static()
    loss: Callable[..., Any] = static()
    likelihood: _likelihoods.Likelihood | None = static()
    kind: FisherKind = static()
    num_samples: int = static()
    key: PRNGKeyArray | UInt32[Array, "..."] | None
    first: Int[Array, ""] | None

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
        _checks.check_choice("FisherOperator", "kind", kind, FisherKind)
        _checks.check_count("FisherOperator", "num_samples", num_samples, least=1)
        sampled = kind == "sampled"
        _checks.check_sampling("FisherOperator", kind, likelihood, key)
        first = jnp.zeros((), jnp.int32) if sampled else None  # the number of the first example of this part
        set_fields(self, kind=kind, num_samples=num_samples, key=key if sampled else None, first=first)
        self._set_model(model, loss, likelihood)
        self._set_data(x, args, reduction, chunk_size, sharding, batches, progress)
        if kind == "empirical" and any(jnp.ndim(leaf) for leaf in jax.tree.leaves(args)):
            self._check_reduction(self.x, args, reduction)

    def _of(self, args: tuple[Any, ...], first: Any) -> DataOperator:
        part = super()._of(args, first)
        return part if self.first is None else replace(part, first=self.first + first)

    def _on_outputs(self, outputs: Tree) -> Product:
        if self.kind == "exact":
            return super()._on_outputs(outputs)
        examples = _checks.check_outputs_of_examples("FisherOperator", outputs)
        if self.key is not None and self.first is not None:
            family, _, weights = self._weighted_labels(outputs)
            draws = _likelihoods.draw_scores(family, self.key, outputs, self.first, self.num_samples)
            return _likelihoods.sampled_information(family, weights, draws)
        scores = _likelihoods.loss_gradient("FisherOperator", self.loss, outputs, self.args)
        scale = examples if self.reduction == "mean" else 1  # the scores of a mean hold 1/B, their squares 1/B^2
        return lambda t: scaled(scale, _likelihoods.outer_products(scores, t))
