"""KFAC and EKFAC for any model: one block for each leaf, in Kronecker factors from taps."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from curvature import _checks
from curvature._sharding import vary_like
from curvature._trees import leaf_paths
from curvature._types import ChunkSize, Objective, Tree
from curvature.operators._base import LinearOperator
from curvature.operators._data import Reduction
from curvature.operators._likelihoods import Likelihood
from curvature.operators._pytrees import register_operator, replace, set_fields, static, structure_of
from curvature.operators.kronecker._blocks import Block
from curvature.operators.kronecker._examples import Examples
from curvature.operators.kronecker._factors import Sharing, build_blocks, rules_of
from curvature.operators.kronecker._outputs import Kind, OutputSide
from curvature.transforms._per_example_function import LeafReport

Approximation = Literal["kfac", "ekfac"]


@register_operator
class KroneckerOperator(LinearOperator):
    """The Gauss-Newton or Fisher matrix of a model, one block for each leaf, in Kronecker factors (KFAC, EKFAC).

    The matrix approximated is ``sum_b J_b' H_b J_b`` with ``J_b`` the Jacobian of the outputs of example b, and ``H_b =
    sum_c w_bc w_bc'`` the Hessian of the loss of the whole batch by these outputs (or what ``kind`` says), which holds
    the 1/B of a mean and the weights of a mask. Where a leaf enters as ``z_s = a_s W`` at positions s = 1..S (tokens,
    pixels, steps of a scan, several uses), with ``d_sc`` the cotangent of ``z_s`` when ``w_c`` is sent back, its block
    is ``A x G``:

        expand:  A = 1/(B S) sum_bs a_s a_s'    G = sum_bcs d_sc d_sc'
        reduce:  A = 1/B sum_b a a', a = (1/S) sum_s a_s    G = sum_bc d_c d_c', d_c = sum_s d_sc

    with ``A`` over the B examples whose ``H_b`` is not zero, so that what a mask leaves out does not count. It is the
    exact block for one example and one position, and for the layers of a deep linear network under squared loss. EKFAC
    keeps the eigenvectors of ``A`` and ``G`` and has the exact diagonal in that basis: ``sum_bc (U_A' (sum_s a_s d_sc')
    U_G)**2``.

    Weights of dense layers in any order of axes, convolutions, embeddings and biases (A = 1) have such factors, through
    ``jit``, ``scan`` and ``remat``, in flax, equinox and your own code alike: layers that are scanned over, and other
    batched weights, have their own for each group. The ``A`` of a lookup is the diagonal of how often each row is
    picked, and always expanded. All other leaves - scales, functions of parameters, unknown uses, a matrix that is used
    as it is and transposed - have their exact block if they are small, and its exact diagonal otherwise. ``report``
    says which leaf has which. Between leaves the matrix is zero.

    Args:
        model: ``model(x, *args) -> outputs``, on a batch: leaves of ``args`` have a leading axis of examples, but for
            leaves of rank 0, which all examples share. It is evaluated on batches of one, so that examples must not
            depend on each other, as by batch statistics, nor on random numbers drawn for the batch from one key: a
            trial on three made-up examples refuses that, once for each model and its shapes.
        loss: ``loss(outputs, *args) -> scalar``, a mean, sum or weighted mean over examples of something convex in the
            outputs; negative curvature is left out. It is evaluated on the whole batch, and must not couple the
            outputs of different examples.
        x: the parameters.
        *args: the data.
        approximation: ``"kfac"`` or ``"ekfac"``.
        sharing: ``"expand"`` or ``"reduce"``, for weights that are used at several positions.
        kind: ``"exact"`` factors the Hessian ``H_b``; ``"sampled"`` takes ``num_samples`` gradients at labels drawn
            from the likelihood, whose outer products have that mean; ``"empirical"`` the gradient of the loss itself.
        likelihood: that the loss is a weighted sum of negative log-likelihoods of one array of outputs:
            ``"categorical"`` for softmax of the last axis, ``"bernoulli"`` for a sigmoid of each, ``"normal"`` for
            squared errors. Then ``"exact"`` has a closed form; ``"sampled"`` needs it. The weights, as of the mean over
            tokens or of a mask, are found from the loss.
        reduction: ``"mean"`` or ``"sum"``: what the loss of the batch is of those of its examples. That is held
            against the loss, and used for ``"empirical"``; other kinds take weighted means, as over a mask, too.
        key: for ``"sampled"``.
        num_samples: for ``"sampled"``.
        chunk_size: how many examples at once; "auto" keeps what is known of them at once within 32 MiB.

    Raises:
        TypeError: when a leaf of ``x`` or of the outputs is not of a real floating dtype, or the loss is not scalar.
        ValueError: for unknown options, a batch whose leaves differ in their leading axis, ``"sampled"`` without key or
            likelihood, more outputs than a Hessian can be factored for, a model or a loss that mixes examples, a loss
            that is not what ``reduction`` says.

    Cost: two forward passes, and a backward pass for each column: one for ``"empirical"``, ``num_samples`` for
        ``"sampled"``, the number of outputs of one example for ``"exact"``; twice that for EKFAC. Memory for the inputs
        and cotangents of one chunk, the factors, ``i**2 + o**2`` entries for an i x o weight, and for ``"exact"``
        without a likelihood the Hessians of all examples by their outputs.

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
        name = type(self).__name__
        _checks.check_callable(name, "model", model)
        _checks.check_callable(name, "loss", loss)
        for option, value, words in [
            ("approximation", approximation, Approximation),
            ("sharing", sharing, Sharing),
            ("kind", kind, Kind),
            ("reduction", reduction, Reduction),
        ]:
            _checks.check_choice(name, option, value, words)
        if likelihood is not None:
            _checks.check_choice(name, "likelihood", likelihood, Likelihood)
        _checks.check_count(name, "num_samples", num_samples, 1)
        _checks.check_chunk_size(name, chunk_size)
        _checks.check_sampling(name, kind, likelihood, key)
        x = vary_like(_checks.check_point(name, "x", x), args)
        used_key = key if kind == "sampled" else None
        side = OutputSide(kind, likelihood, num_samples, reduction)
        examples = Examples(name, model, loss, x, args, side, used_key)
        rules = rules_of(examples.taps, examples.leaves, sharing)
        blocks = build_blocks(examples, rules, sharing, approximation == "ekfac", chunk_size)
        leaves, structure = jax.tree.flatten(structure_of(x))
        routes = zip(leaf_paths(x), (rule.told for rule in rules), strict=True)
        set_fields(self, blocks=tuple(blocks), structure=(structure, tuple(leaves)), routes=tuple(routes))

    def mv(self, v: Tree) -> Tree:
        """The product with a tree shaped like ``x``."""
        parts = zip(self.blocks, self._leaves_of(v), self.structure[1], strict=True)
        products = [block.mv(leaf).astype(like.dtype) for block, leaf, like in parts]
        return self.structure[0].unflatten(products)

    def in_structure(self) -> Tree:
        return self.structure[0].unflatten(self.structure[1])

    def out_structure(self) -> Tree:
        return self.in_structure()

    @property
    def report(self) -> LeafReport:
        """How the block of each leaf is found."""
        return LeafReport("KroneckerOperator", dict(self.routes))

    def inverse(self, damping: ArrayLike, *, exact: bool = True) -> "KroneckerOperator":
        """The inverse of the matrix plus a multiple of the identity, as an operator of the same kind.

        Args:
            damping: the multiple c, not negative.
            exact: whether it is ``(A x G + c I)^-1``, in the eigenbasis, or that of damped factors, ``(A + pi r I)^-1 x
                (G + r / pi I)^-1`` with ``r = sqrt(c)`` and ``pi**2 = (trace A / dim A) / (trace G / dim G)``. EKFAC
                and exact blocks have an exact inverse in either case.

        Returns:
            An operator on trees shaped like ``x``. Where a block is singular and c = 0 it is not finite.

        Cost: an eigendecomposition of every factor.

        References: Martens and Grosse (arXiv:1503.05671, sections 6.3 and 6.6).
        """
        amount = self._amount("inverse", damping)
        return replace(self, blocks=tuple(block.inverse(amount, exact) for block in self.blocks))

    def logdet(self, damping: ArrayLike = 0.0) -> Float[Array, ""]:
        """``log det(matrix + damping I)``: minus infinity, or what rounding leaves of it, where that is singular."""
        amount = self._amount("logdet", damping)
        return jnp.sum(jnp.stack([block.logdet(amount) for block in self.blocks]))

    def trace(self) -> Float[Array, ""]:
        """The sum of the diagonal."""
        return jnp.sum(jnp.stack([block.trace() for block in self.blocks]))

    def diagonal(self, chunk_size: ChunkSize = "auto") -> Tree:
        """The diagonal, shaped like ``x``, from the diagonals of the factors; ``chunk_size`` has nothing to cut."""
        parts = zip(self.blocks, self.structure[1], strict=True)
        return self.structure[0].unflatten([block.diagonal().astype(like.dtype) for block, like in parts])

    def _amount(self, method: str, damping: ArrayLike) -> Float[Array, ""]:
        _checks.check_nonnegative(f"KroneckerOperator.{method}", "damping", damping)
        return jnp.asarray(damping).astype(jax.tree.leaves(self.blocks)[0].dtype)

    def _leaves_of(self, v: Tree) -> list[Array]:
        """The leaves of a direction, in the dtype of the factors."""
        leaves = self.structure[0].flatten_up_to(v)
        return [jnp.asarray(leaf).astype(jax.tree.leaves(self.blocks)[0].dtype) for leaf in leaves]
