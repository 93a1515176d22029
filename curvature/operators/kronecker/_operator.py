"""``KroneckerOperator``: KFAC and EKFAC for any model, one block per leaf, with Kronecker factors from taps."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from curvature import _checks
from curvature._errors import calling, of_class
from curvature._sharding import vary_like
from curvature._trees import leaf_paths
from curvature._types import ChunkSize, Objective, Tree
from curvature.operators._base import LinearOperator
from curvature.operators._data import Reduction
from curvature.operators._likelihoods import Likelihood
from curvature.operators._pytrees import register_operator, replace, set_fields, static, structure_of
from curvature.operators.kronecker._blocks import Block
from curvature.operators.kronecker._examples import ExampleTaps
from curvature.operators.kronecker._factors import Sharing, build_blocks, rules_of
from curvature.operators.kronecker._outputs import Kind, OutputSide
from curvature.transforms._per_example_function import LeafReport

Approximation = Literal["kfac", "ekfac"]


@register_operator
class KroneckerOperator(LinearOperator):
    """The Gauss-Newton or Fisher matrix of a model, one block per leaf, by Kronecker factors (KFAC, EKFAC).

    It approximates ``sum_b J_b' H_b J_b`` with ``J_b`` the Jacobian of the outputs of example b, and ``H_b = sum_c w_bc
    w_bc'`` the Hessian of the loss of the whole batch with respect to these outputs (or its estimate, by ``kind``). So
    ``H_b`` includes the 1/B of a mean and the weights of a mask. Where a leaf enters as ``z_s = a_s W`` at positions
    s = 1..S (tokens, pixels, steps of a scan, several uses), let ``d_sc`` be the cotangent of ``z_s`` when ``w_c`` is
    backpropagated. The block of the leaf is ``A x G``:

        expand:  A = 1/(B S) sum_bs a_s a_s'    G = sum_bcs d_sc d_sc'
        reduce:  A = 1/B sum_b a a', a = (1/S) sum_s a_s    G = sum_bc d_c d_c', d_c = sum_s d_sc

    where B counts the examples whose ``H_b`` is not zero: examples excluded by a mask do not count. The block is exact
    for one example and one position, and for the layers of a deep linear network under squared loss. EKFAC keeps the
    eigenvectors of ``A`` and ``G`` and takes the exact diagonal in that basis: ``sum_bc (U_A' (sum_s a_s d_sc')
    U_G)**2``.

    Weights of dense layers in any order of axes, convolutions, embeddings and biases (A = 1) have Kronecker factors,
    through ``jit``, ``scan`` and ``remat``, in flax, equinox and plain JAX. Layers that are scanned over, and other
    batched weights, have factors for each group. For an embedding, ``A`` is diagonal, with the share of lookups of each
    row, and is always expanded. All other leaves (scales, functions of parameters, unknown uses, a matrix that is used
    both directly and transposed) have their exact block if they are small, and its exact diagonal otherwise.
    ``report`` lists the form of each block. Blocks between leaves are zero.

    Args:
        model: ``model(x, *args) -> outputs`` for a batch: leaves of ``args`` have a leading axis of examples, except
            leaves of rank 0, which all examples share. The model is evaluated on batches of one, so examples must not
            interact, for instance through batch statistics, and must not use random numbers drawn for the batch from
            one key. A trial on three synthetic examples checks that, once for each model and its shapes.
        loss: ``loss(outputs, *args) -> scalar``, a mean, sum or weighted mean over examples of a function that is
            convex in the outputs; negative curvature is dropped. It is evaluated on the whole batch, and must not
            couple the outputs of different examples.
        x: the parameters.
        *args: the data.
        approximation: ``"kfac"`` or ``"ekfac"``.
        sharing: ``"expand"`` or ``"reduce"``, for weights that are used at several positions.
        kind: ``"exact"`` factors the Hessian ``H_b``; ``"sampled"`` takes ``num_samples`` gradients at labels drawn
            from the likelihood, whose outer products have the mean ``H_b``; ``"empirical"`` takes the gradient of the
            loss at the labels of the data.
        likelihood: asserts that the loss is a weighted sum of negative log likelihoods of one array of outputs:
            ``"categorical"`` for softmax of the last axis, ``"bernoulli"`` for a sigmoid of each, ``"normal"`` for
            squared errors. Then ``"exact"`` uses a closed form; ``"sampled"`` requires a likelihood. The weights, such
            as the factor of a mean over tokens or a mask, are computed from the loss.
        reduction: whether the loss of the batch is the ``"mean"`` or the ``"sum"`` of the losses of its examples. It
            is checked, and determines the scale of ``"empirical"``; other kinds also accept a weighted mean, such as
            over a mask.
        key: the random key for ``"sampled"``.
        num_samples: the number of labels drawn for each row, for ``"sampled"``.
        chunk_size: the number of examples evaluated at once; "auto" limits their inputs and cotangents to 32 MiB.

    Raises:
        TypeError: if a leaf of ``x`` or of the outputs is not of a real floating dtype, or the loss is not scalar.
        ValueError: for unknown options, a batch whose leaves differ in their leading axis, ``"sampled"`` without key or
            likelihood, more outputs than a Hessian can be factored for, a model or a loss that mixes examples, or a
            loss that is not what ``reduction`` states.

    Cost: two forward passes, and a backward pass for each column: one for ``"empirical"``, ``num_samples`` for
        ``"sampled"``, the number of outputs of one example for ``"exact"``; twice that for EKFAC. Memory: the inputs
        and cotangents of one chunk; the factors, ``i**2 + o**2`` entries for an i x o weight; and for ``"exact"``
        without a likelihood the Hessians ``H_b`` of all examples.

    Example:
        >>> import jax.numpy as jnp, curvature
        >>> model = lambda x, inputs, targets: inputs @ x["w"]
        >>> loss = lambda outputs, inputs, targets: 0.5 * jnp.sum((outputs - targets) ** 2)
        >>> x, inputs, targets = {"w": jnp.ones((2, 1))}, jnp.array([[1.0, 2.0], [3.0, 0.0]]), jnp.zeros((2, 1))
        >>> op = curvature.KroneckerOperator(model, loss, x, inputs, targets, reduction="sum")
        >>> op.as_matrix()
        Array([[10., 2.],
               [ 2., 4.]], dtype=float32)
        >>> print(op.report)
        w  Kronecker factors 2 x 2 and 1 x 1

    References: Martens and Grosse (arXiv:1503.05671); George et al., EKFAC (arXiv:1806.03884); Eschenhagen et al. for
        ``sharing`` (arXiv:2311.00636); Grosse and Martens for convolutions (arXiv:1602.01407).
    """

    blocks: tuple[Block, ...]
    structure: tuple[Any, tuple[jax.ShapeDtypeStruct, ...]] = static()
    routes: tuple[tuple[str, str], ...] = static()
    is_symmetric = True

    @of_class
    def __init__(
        self,
        model: Objective,
        loss: Objective,
        x: Tree,
        *args: Any,
        approximation: Approximation = "kfac",
        sharing: Sharing = "expand",
        kind: Kind = "exact",
        likelihood: Likelihood | None = None,
        reduction: Reduction = "mean",
        key: Any = None,
        num_samples: int = 1,
        chunk_size: ChunkSize = "auto",
    ) -> None:
        _checks.check_callable("model", model)
        _checks.check_callable("loss", loss)
        _checks.check_choice("approximation", approximation, Approximation)
        _checks.check_choice("sharing", sharing, Sharing)
        _checks.check_choice("kind", kind, Kind)
        _checks.check_choice("reduction", reduction, Reduction)
        if likelihood is not None:
            _checks.check_choice("likelihood", likelihood, Likelihood)
        _checks.check_count("num_samples", num_samples, 1)
        _checks.check_chunk_size(chunk_size)
        _checks.check_sampling(kind, likelihood, key)
        x = vary_like(_checks.check_point("x", x), args)
        used_key = key if kind == "sampled" else None
        side = OutputSide(kind, likelihood, num_samples, reduction)
        examples = ExampleTaps(model, loss, x, args, side, used_key)
        rules = rules_of(examples.taps, examples.leaves, sharing)
        blocks = build_blocks(examples, rules, sharing, approximation == "ekfac", chunk_size)
        leaves, structure = jax.tree.flatten(structure_of(x))
        routes = zip(leaf_paths(x), (rule.description for rule in rules), strict=True)
        set_fields(self, blocks=tuple(blocks), structure=(structure, tuple(leaves)), routes=tuple(routes))

    def mv(self, v: Tree) -> Tree:
        """The product with a tree shaped like ``x``; each block applies to its leaf in the dtype of the factors."""
        dtype = jax.tree.leaves(self.blocks)[0].dtype
        parts = zip(self.blocks, self.structure[0].flatten_up_to(v), self.structure[1], strict=True)
        products = [block.mv(jnp.asarray(leaf).astype(dtype)).astype(like.dtype) for block, leaf, like in parts]
        return self.structure[0].unflatten(products)

    def in_structure(self) -> Tree:
        return self.structure[0].unflatten(self.structure[1])

    @property
    def report(self) -> LeafReport:
        """How the block of each leaf is formed."""
        return LeafReport("KroneckerOperator", dict(self.routes))

    @calling("KroneckerOperator.inverse")
    def inverse(self, damping: ArrayLike, *, exact: bool = True) -> "KroneckerOperator":
        """The inverse of the matrix plus ``c I``, as a ``KroneckerOperator``.

        Args:
            damping: the multiple c, not negative.
            exact: True for ``(A x G + c I)^-1``, in the eigenbasis; False for the inverses of damped factors,
                ``(A + pi r I)^-1 x (G + r / pi I)^-1`` with ``r = sqrt(c)`` and ``pi**2 = (trace A / dim A) / (trace G
                / dim G)``. EKFAC and exact blocks always have the exact inverse.

        Returns:
            An operator on trees shaped like ``x``. A singular block with c = 0 gives values that are not finite.

        Cost: an eigendecomposition of every factor.

        References: Martens and Grosse (arXiv:1503.05671, sections 6.3 and 6.6).
        """
        amount = self._amount(damping)
        return replace(self, blocks=tuple(block.inverse(amount, exact) for block in self.blocks))

    @calling("KroneckerOperator.logdet")
    def logdet(self, damping: ArrayLike = 0.0) -> Float[Array, ""]:
        """``log det(matrix + damping I)``; minus infinity, or a large negative number by rounding, if singular."""
        amount = self._amount(damping)
        return jnp.sum(jnp.stack([block.logdet(amount) for block in self.blocks]))

    def trace(self) -> Float[Array, ""]:
        """The sum of the diagonal."""
        return jnp.sum(jnp.stack([block.trace() for block in self.blocks]))

    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """The diagonal, shaped like ``x``, from the diagonals of the factors; ``chunk_size`` has no effect."""
        parts = zip(self.blocks, self.structure[1], strict=True)
        return self.structure[0].unflatten([block.diagonal().astype(like.dtype) for block, like in parts])

    def _amount(self, damping: ArrayLike) -> Float[Array, ""]:
        _checks.check_nonnegative("damping", damping)
        return jnp.asarray(damping).astype(jax.tree.leaves(self.blocks)[0].dtype)
