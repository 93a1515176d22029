"""The restriction of a function to lines through a point, compiled once for all directions."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from curvature._trees import ravel
from curvature._types import Objective, Tree
from curvature.diagnostics._differences import STEPS
from curvature.programs import _traced
from curvature.transforms import _modes
from curvature.transforms._hessian import hvp
from curvature.transforms._jacobian import gradient_of

_WIDER = 1e-3  # Heuristic: a tiny entry moves by at least this share of the largest entry of its leaf, or of 1


def scales_of(x: Tree) -> Tree:
    """The unit of each entry: its absolute value; if it is zero, the largest in its leaf, or 1 if all are zero."""

    def of_leaf(leaf: Array) -> Array:
        largest = jnp.max(jnp.abs(leaf), initial=0)
        of_zeros = jnp.where(largest > 0, largest, jnp.ones_like(largest))
        return jnp.where(leaf == 0, of_zeros, jnp.abs(leaf))

    return jax.tree.map(of_leaf, x)


class Direction(NamedTuple):
    """A direction with its name, in units of the scales of ``x``: a coordinate, or a random direction."""

    label: str
    vector: np.ndarray

    @property
    def is_coordinate(self) -> bool:
        """Whether it moves one entry of ``x``, whose name is then the label."""
        return self.label.startswith("x")


class Line:
    """``z -> fun(x + scales * z)`` for vectors ``z``: values and gradients along lines through 0, derivatives at 0."""

    def __init__(self, fun: Objective, x: Tree, order: int) -> None:
        """Trace ``fun`` at ``x`` and choose its modes."""
        flat, unravel = ravel(x)
        scales, _ = ravel(scales_of(x))
        self.size, self.scales = flat.size, np.asarray(scales, np.float64)
        self.program = _traced.trace(lambda z: (fun(unravel(flat + scales * z)), None), jnp.zeros_like(flat))
        self.gradient_mode = _modes.choose_jacobian(self.program, "auto")
        if order == 2:
            self.composition = _modes.choose_composition(self.program, "auto")
        self.out_dtype = self.program.out.dtype
        self.eps = float(max(jnp.finfo(self.out_dtype).eps, jnp.finfo(flat.dtype).eps))
        self.leaves = self._spans(x)
        self._steps = jnp.asarray(np.concatenate([STEPS, -STEPS]), flat.dtype)
        self._jit: Callable[..., Any] = jax.jit if self.program.jaxpr is not None else lambda fun: fun
        self._values_along = self._jit(self._along(lambda z: self.program.fun(z)[0]))
        self._gradients_along = self._jit(self._along(self._gradient))
        self._product = self._jit(lambda v: self._hvp(v, self.composition))

    def _spans(self, x: Tree) -> list[tuple[str, int, int]]:
        spans, start = [], 0
        self._shapes = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(x)[0]:
            spans.append(("x" + jax.tree_util.keystr(path), start, start + leaf.size))
            self._shapes.append(leaf.shape)
            start += leaf.size
        return spans

    def entry_name(self, i: int) -> str:
        """The path and index of entry ``i`` of ``x``."""
        for (path, start, stop), shape in zip(self.leaves, self._shapes, strict=True):
            if start <= i < stop and shape:
                index = ", ".join(str(int(k)) for k in np.unravel_index(i - start, shape))
                return f"{path}[{index}]"
            if start <= i < stop:
                return path
        raise IndexError(i)

    def unit(self, direction: Direction) -> float:
        """The distance by which a coordinate direction moves its entry of ``x``; 1 for a random direction."""
        vector = direction.vector
        return float(self.scales[np.argmax(vector)] * np.max(vector)) if direction.is_coordinate else 1.0

    def wider(self, i: int) -> float:
        """The factor by which entry ``i`` moves farther if its size is tiny in its leaf; 1 if it is not."""
        _, start, stop = next(span for span in self.leaves if span[1] <= i < span[2])
        return max(_WIDER * max(float(np.max(self.scales[start:stop])), 1.0) / self.scales[i], 1.0)

    def _along(self, fun: Callable[[Array], Array]) -> Callable[[Array], Array]:
        if self.program.jaxpr is None:
            return lambda d: jnp.stack([fun(t * d) for t in self._steps])
        return lambda d: jax.lax.map(lambda t: fun(t * d), self._steps)

    def _gradient(self, z: Array) -> Array:
        return gradient_of(self.program, z, self.gradient_mode)[0]

    def _hvp(self, v: Array, mode: Any) -> Array:
        return hvp(lambda z: self.program.fun(z)[0], self.program.x, v, mode=mode)

    def _direction(self, direction: np.ndarray) -> Array:
        return jnp.asarray(direction, self.program.x.dtype)

    def center(self) -> tuple[np.ndarray, np.ndarray]:
        """Value and gradient at 0."""
        value, gradient = self._jit(lambda z: (self.program.fun(z)[0], self._gradient(z)))(self.program.x)
        return np.asarray(value, np.float64), np.asarray(gradient, np.float64)

    def values(self, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The values at ``h`` and at ``-h`` for each step."""
        return self._halves(self._values_along, direction)

    def gradients(self, direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The gradients at ``h`` and at ``-h`` for each step, along axis 0."""
        return self._halves(self._gradients_along, direction)

    def _halves(self, along: Callable[[Array], Array], direction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        plus, minus = np.split(np.asarray(along(self._direction(direction)), np.float64), 2)
        return plus, minus

    def product(self, direction: np.ndarray) -> np.ndarray:
        """The Hessian at 0 times a direction, by the composition that ``auto`` chooses."""
        return np.asarray(self._product(self._direction(direction)), np.float64)

    def products_by(self, modes: Sequence[str], direction: np.ndarray) -> dict[str, np.ndarray]:
        """The Hessian at 0 times a direction, by several compositions."""
        products = self._jit(lambda v: {mode: self._hvp(v, mode) for mode in modes})(self._direction(direction))
        return {mode: np.asarray(product, np.float64) for mode, product in products.items()}

    def gradients_by(self, modes: Sequence[str]) -> dict[str, np.ndarray]:
        """The gradient at 0 by several modes."""
        gradients = self._jit(lambda z: {mode: gradient_of(self.program, z, mode)[0] for mode in modes})
        return {mode: np.asarray(gradient, np.float64) for mode, gradient in gradients(self.program.x).items()}
