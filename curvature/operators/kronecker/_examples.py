"""Per-example inputs and cotangents of a model at its taps, for Kronecker factors.

For each example, vectors ``w`` like the outputs are backpropagated as gradients of ``<w, outputs>``; the loss only
determines the vectors. So the taps are the ones of ``<w, outputs>``, in which ``w`` is data. The model is evaluated on
batches of one example, after a check that their outputs equal the outputs of the whole batch. The loss is evaluated on
the whole batch only.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature import _checks
from curvature._errors import caller
from curvature._sharding import gathered
from curvature._trees import ravel
from curvature._types import Objective, Tree
from curvature.operators._interactions import OutputRows, check_loss_examples, check_model_examples, check_reduction
from curvature.operators.kronecker._outputs import OutputSide
from curvature.programs._jaxprs import Environment
from curvature.programs._taps import trace_taps
from curvature.transforms._per_example_grads import formed_gradient
from curvature.transforms._per_example_norms import formed_gradients

Captured = tuple[Any, Any]
"""For one example the inputs at the sites, and for each column ``w_c`` the cotangents of the outputs of the sites."""


class ExampleTaps:
    """A model on batches of one example, and the factors of its output Hessians.

    Attributes:
        size: the number of examples.
        rows: the leaves of the arguments that have an axis of examples.
        leaves: the leaves of the parameters.
        taps: where the parameters are combined with the data; None if the model has no reverse mode.
        sites: the sites of the taps.
        side: for each example the array from which its columns are formed.
        shares: the weight of each example in means over examples: equal, but zero for examples without curvature.
    """

    def __init__(
        self, model: Objective, loss: Objective, x: Tree, args: tuple[Any, ...], kind: OutputSide, key: Any
    ) -> None:
        self.size = _checks.check_examples("args", args)
        leaves, self._structure = jax.tree.flatten(jax.tree.map(jnp.asarray, args))
        self._is_row = [leaf.ndim > 0 for leaf in leaves]
        self.rows = [gathered(leaf) for leaf in leaves if leaf.ndim > 0]
        self._shared = [leaf for leaf in leaves if leaf.ndim == 0]
        self._model, self._kind = model, kind
        self._x, self._key, self.leaves = x, key, jax.tree.leaves(x)

        first = [leaf[0] for leaf in self.rows]
        args = self._structure.unflatten(leaves)
        whole = jax.eval_shape(lambda x: model(x, *args), x)
        _checks.check_floating_output("model", whole)
        one = self._outputs_of_one(first)
        kind.check(one)
        _checks.check_scalar_output("loss", jax.eval_shape(lambda outputs: loss(outputs, *args), whole))
        outputs = OutputRows(whole, one, self.size)
        check_model_examples(model, x, args, outputs, self.size)
        check_loss_examples(loss, args, outputs, self.size)

        def of_rows(_: Any, rows: Tree, *args: Any) -> Array:
            return loss(outputs.join(rows), *args)

        batch = outputs.structure(self.size), *args
        words, weighted = ("the loss", kind.reduction), kind.kind != "empirical"
        check_reduction(words, (loss,), of_rows, (), batch, may_be_neither=weighted)
        side = kind.of_batch(lambda rows: of_rows((), rows, *args), outputs.split(model(x, *args)))
        self.side = jax.tree.map(gathered, side)
        counted = kind.has_curvature(self.side)
        self.shares = counted / jnp.maximum(jnp.sum(counted), 1)

        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
        self._zero = zero
        self.taps = trace_taps(self._probe, x, (first, self._shared, zero, zero))
        self.sites = [] if self.taps is None else self.taps.sites
        self._values = Environment() if self.taps is None else self.taps.parameter_values(self.leaves)

    def _outputs_of_one(self, row: Sequence[Array]) -> Tree:
        """The structure of the outputs of a batch of one."""
        try:
            return jax.eval_shape(lambda x: self._model(x, *self._args(row)), self._x)
        except (TypeError, ValueError, IndexError) as error:
            raise ValueError(
                f"{caller()}: the model fails on a batch of one example ({type(error).__name__}: {error}), expected "
                "one that takes batches of any size; reshape by inputs.shape[0], not by a fixed number of examples."
            ) from error

    def _args(self, row: Sequence[Array], shared: Sequence[Array] | None = None) -> tuple[Any, ...]:
        """The arguments of a batch of one."""
        rows, others = iter(row), iter(self._shared if shared is None else shared)
        return self._structure.unflatten([next(rows)[None] if is_row else next(others) for is_row in self._is_row])

    def _probe(self, x: Tree, row: Sequence[Array], shared: Sequence[Array], w: Tree, zero: Tree) -> Array:
        """``<w, outputs + 0>``; adding zero as data gives a site to outputs that depend on parameters alone."""
        outputs = self._model(x, *self._args(row, shared))
        entries = jax.tree.map(lambda w, out, zero: w * (out + zero), w, outputs, zero)
        return jnp.sum(ravel(entries)[0])

    def capture(self, index: Array, row: Sequence[Array], side: Any, weight: Array) -> Captured:
        """Inputs and cotangents of example number ``index``; without taps, None and its gradients."""
        key = None if self._key is None else jax.random.fold_in(self._key, index)
        columns, unravel = self._kind.columns(side, key), ravel(self._zero)[1]

        def of_column(column: Float[Array, " outputs"]) -> Captured:
            data = row, self._shared, unravel(column), self._zero
            if self.taps is None:
                return None, jax.tree.leaves(formed_gradient(self._probe, self._x, data))
            return self.taps.cotangents(self._values, jax.tree.leaves(data))

        return jax.vmap(of_column, out_axes=(None, 0))(columns * weight.astype(columns.dtype))

    def gradients(self, chosen: Sequence[int]) -> Callable[[Any, Any], list[Array]]:
        """The map from the inputs and cotangents of one example and column to the gradients of the chosen leaves."""
        if self.taps is None:
            return lambda _, gradients: [gradients[k] for k in chosen]
        of_parts = formed_gradients(self.taps, self._values, self.leaves, chosen)
        return lambda captured, d: of_parts(list(zip(self.sites, captured, d, strict=True)))
