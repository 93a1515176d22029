"""The examples of a model one by one: where its parameters meet the data, and what comes back there from its outputs.

Sent back is ``w``, a vector like the outputs, as the gradient of ``<w, outputs>``; the loss comes in only by the choice
of the vectors. So the taps are those of ``<w, outputs>``, in which ``w`` is data.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from curvature import _checks
from curvature._types import Objective, Tree, ravel
from curvature.operators._kronecker_outputs import OutputSide, output_columns
from curvature.transforms._accumulate import gathered
from curvature.transforms._clipped import formed_gradient
from curvature.transforms._grad_norm import formed_gradients
from curvature.transforms._jaxprs import Environment
from curvature.transforms._taps import trace_taps

Known = tuple[Any, Any]
"""What one example leaves at the sites: their inputs, and for each column the cotangents of their outputs."""


class Examples:
    """A model and its loss on a batch of which every example is evaluated as a batch of one.

    Attributes:
        size: the number of examples.
        rows: the leaves of the arguments that have an axis of examples.
        leaves: the leaves of the parameters.
        taps: where they meet the data; None where the model has no reverse mode.
        sites: those of the taps.
    """

    def __init__(
        self, name: str, model: Objective, loss: Objective, x: Tree, args: tuple[Any, ...], side: OutputSide, key: Any
    ) -> None:
        self.size = _checks.check_examples(name, "args", args)
        leaves, self._structure = jax.tree.flatten(jax.tree.map(jnp.asarray, args))
        self._is_row = [leaf.ndim > 0 for leaf in leaves]
        self.rows = [gathered(leaf) for leaf in leaves if leaf.ndim > 0]
        self._shared = [leaf for leaf in leaves if leaf.ndim == 0]
        self._name, self._model, self._loss, self._side = name, model, loss, side
        self._x, self._key, self.leaves = x, key, jax.tree.leaves(x)

        first = [leaf[0] for leaf in self.rows]
        outputs = jax.eval_shape(lambda x: model(x, *self._args(first)), x)
        _checks.check_floating_output(name, "model", outputs)
        _checks.check_likelihood(name, side.likelihood, outputs)
        _checks.check_scalar_output(name, "loss", jax.eval_shape(lambda o: loss(o, *self._args(first)), outputs))
        zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), outputs)
        self._zero = zero
        self.taps = trace_taps(name, self._probe, x, (first, self._shared, zero, zero))
        self.sites = [] if self.taps is None else self.taps.sites
        self._values = Environment() if self.taps is None else self.taps.parameter_values(self.leaves)

    def _args(self, row: Sequence[Array], shared: Sequence[Array] | None = None) -> tuple[Any, ...]:
        """The arguments of a batch of one."""
        rows, others = iter(row), iter(self._shared if shared is None else shared)
        return self._structure.unflatten([next(rows)[None] if is_row else next(others) for is_row in self._is_row])

    def _probe(self, x: Tree, row: Sequence[Array], shared: Sequence[Array], w: Tree, zero: Tree) -> Array:
        """``<w, outputs>``; the zero makes outputs of parameters alone meet the data, as a bias does."""
        outputs = self._model(x, *self._args(row, shared))
        entries = jax.tree.map(lambda w, out, zero: w * (out + zero), w, outputs, zero)
        return jnp.sum(ravel(entries)[0])

    def known(self, place: Array, row: Sequence[Array], weight: Array) -> Known:
        """What example number ``place`` leaves at the sites; without taps its gradients take the cotangents' place."""
        args = self._args(row)
        outputs = self._model(self._x, *args)
        key = None if self._key is None else jax.random.fold_in(self._key, place)
        columns = output_columns(self._name, self._side, lambda out: self._loss(out, *args), outputs, key)
        unravel = ravel(self._zero)[1]

        def of_column(column: Float[Array, " outputs"]) -> Known:
            rest = row, self._shared, unravel(column), self._zero
            if self.taps is None:
                return None, jax.tree.leaves(formed_gradient(self._name, self._probe, self._x, rest))
            return self.taps.cotangents(self._values, jax.tree.leaves(rest))

        return jax.vmap(of_column, out_axes=(None, 0))(columns * weight.astype(columns.dtype))

    def gradients(self, chosen: Sequence[int]) -> Callable[[Any, Any], list[Array]]:
        """From the inputs and cotangents of one example and one column to the gradients of some leaves, formed."""
        if self.taps is None:
            return lambda _, gradients: [gradients[k] for k in chosen]
        of_parts = formed_gradients(self.taps, self._values, self.leaves, chosen)
        return lambda captured, d: of_parts(list(zip(self.sites, captured, d, strict=True)))
