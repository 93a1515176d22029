"""Random differentiable programs, rendered as Python text, for tests of the whole library against plain JAX.

A program is a short list of named pieces: a start that reads the data, layers, a loss, what is done to the loss, what
couples the examples of a batch, and a reduction over them. Each piece has a seed for its details, and is rendered at
the shape that comes in, so that any piece can be dropped and the rest still runs: this is what ``shrink`` does. The
text defines ``p`` (parameters), ``batch`` (data), ``per`` (the loss of one example) and ``f`` (the loss of the batch).
"""

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

_PRECISION = 'jax.config.update("jax_enable_x64", True)\n'

Shape = tuple[int, ...]
Generator = np.random.Generator


@dataclass(frozen=True)
class Piece:
    """One named part of a program.

    Attributes:
        kind: the name in the table of its category.
        view: how its parameters come from leaves, a name in ``VIEWS``.
        act: the function of the entries that follows, a name in ``ACTS``.
        wrap: the transformation around it, a name in ``WRAPS``.
        seed: for the details: sizes, orders of axes, indices.
    """

    kind: str
    view: str = "plain"
    act: str = "none"
    wrap: str = "none"
    seed: int = 0


@dataclass(frozen=True)
class Program:
    """A program as its pieces; see the module.

    ``form`` says how the losses of the examples come about: a name in ``FORMS``, or "batched", written for the whole
    batch at once; only then couplings among the layers come into play.
    """

    seed: int
    start: Piece
    layers: tuple[Piece, ...]
    loss: Piece
    tails: tuple[Piece, ...]
    reduction: Piece
    form: str
    size: int
    features: int
    dtype: str = "float64"

    def text(self) -> str:
        """The program as Python text."""
        return "\n".join(_render(self))

    @property
    def low_precision(self) -> bool:
        """Whether anything in it is of single precision."""
        return self.dtype == "float32" or "float32" in self.text()

    @property
    def names(self) -> list[str]:
        """All names that the pieces have."""
        pieces = (self.start, *self.layers, self.loss, *self.tails, self.reduction)
        return [name for piece in pieces for name in (piece.kind, piece.view, piece.act, piece.wrap)]


def namespace_of(text: str) -> dict[str, Any]:
    """The names that a text defines; whoever evaluates it has set the precision, and its own setting would remain."""
    names: dict[str, Any] = {}
    text = text.replace(_PRECISION, "")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of casts that JAX truncates
        exec(compile(text, "program", "exec"), names)
    return names


# ---- text ----------------------------------------------------------------------------------------------------------


@dataclass
class Text:
    """The body of a function that is being written.

    Attributes:
        batched: whether ``h`` has a leading axis of examples.
        size: the number of examples.
        dtype: that of the parameters.
        features: the number of features of an example.
        params: the shapes and dtypes of the leaves, shared by all functions of a program.
        lines: the lines.
        known: how often each prefix has been taken in this function.
    """

    batched: bool
    size: int
    dtype: str
    features: int
    params: dict[str, tuple[Shape, str]]
    lines: list[str] = field(default_factory=list)
    known: dict[str, int] = field(default_factory=dict)

    def leaf(self, shape: Shape, dtype: str = "") -> str:
        """A new leaf of the parameters."""
        number = self.known.setdefault("p", 0)
        self.known["p"] += 1
        self.params[f"p{number}"] = shape, dtype or self.dtype
        return f'p["p{number}"]'

    def total(self, entries: str, shape: Shape) -> str:
        """The sum over all axes but that of the examples."""
        if not self.batched:
            return f"jnp.sum({entries})"
        return f"jnp.sum({entries}, axis={tuple(range(1, len(shape) + 1))})"


def _of_shape(value: str, shape: Shape) -> str:
    return f"{value}.reshape({shape})"


def _ints(values: Any) -> str:
    return f"jnp.array({[int(value) for value in values]})"


# ---- views: how an array that a layer takes comes from leaves -------------------------------------------------------

View = Callable[[Text, Generator, Shape], str]
VIEWS: dict[str, View] = {}
LAYERS: dict[str, tuple[Callable[[Text, Generator, Shape, View], tuple[str, Shape]], bool]] = {}
STARTS: dict[str, Callable[[Text, Generator, Shape, View], tuple[str, Shape]]] = {}
LOSSES: dict[str, Callable[[Text, Generator, Shape, View], str]] = {}
TAILS: dict[str, Callable[[Text, Generator, View], str]] = {}


def view(make: View) -> View:
    """An array of a given shape as an expression of leaves."""

    def enclosed(t: Text, rng: Generator, shape: Shape) -> str:
        value = make(t, rng, shape)
        return f"({value})" if " " in value else value

    VIEWS[make.__name__.removesuffix("_")] = enclosed
    return make


def layer(any_rank: bool) -> Callable[[Any], Any]:
    """A layer; with ``any_rank`` its expression is right with axes in front, and for an example of any rank."""

    def register(make: Any) -> Any:
        LAYERS[make.__name__.removesuffix("_")] = make, any_rank
        return make

    return register


def start(make: Any) -> Any:
    STARTS[make.__name__.removesuffix("_")] = make
    return make


def loss(make: Any) -> Any:
    LOSSES[make.__name__.removesuffix("_")] = make
    return make


def tail(make: Any) -> Any:
    TAILS[make.__name__.removesuffix("_")] = make
    return make


def _factorings(size: int, rng: Generator) -> Shape:
    """Two or three factors of a size."""
    first = int(rng.choice([k for k in range(1, size + 1) if size % k == 0]))
    rest = size // first
    if rng.random() < 0.4:
        second = int(rng.choice([k for k in range(1, rest + 1) if rest % k == 0]))
        return first, second, rest // second
    return first, rest


@view
def plain(t, rng, shape):
    return t.leaf(shape)


@view
def transposed(t, rng, shape):
    return t.leaf(shape[::-1]) + ".T"


@view
def flat(t, rng, shape):
    return _of_shape(t.leaf((math.prod(shape),)), shape)


@view
def regrouped(t, rng, shape):
    return _of_shape(t.leaf(_factorings(math.prod(shape), rng)), shape)


@view
def turned_then_reshaped(t, rng, shape):
    before = _factorings(math.prod(shape), rng)
    return _of_shape(t.leaf(before) + ".T", shape)


@view
def permuted_then_reshaped(t, rng, shape):
    before = _factorings(math.prod(shape), rng)
    order = tuple(int(k) for k in rng.permutation(len(before)))
    return _of_shape(f"jnp.transpose({t.leaf(before)}, {order})", shape)


@view
def column_major(t, rng, shape):
    before = _factorings(math.prod(shape), rng)
    if rng.random() < 0.5:
        return f'jnp.reshape({t.leaf(before)}, {shape}, order="F")'
    return _of_shape(f'jnp.ravel({t.leaf(before)}, order="F")', shape)


@view
def swapped(t, rng, shape):
    before = _factorings(math.prod(shape), rng)
    return _of_shape(f"jnp.swapaxes({t.leaf(before)}, 0, {len(before) - 1})", shape)


@view
def reshaped_then_turned(t, rng, shape):
    return _of_shape(t.leaf((math.prod(shape),)), shape[::-1]) + ".T"


@view
def twice_reshaped(t, rng, shape):
    size = math.prod(shape)
    inner = _of_shape(t.leaf(_factorings(size, rng)) + ".T", _factorings(size, rng))
    return _of_shape(inner + ".T", shape)


@view
def square_turned_reshaped(t, rng, shape):
    """The transpose brought back to the shape of the leaf, which is no identity."""
    return _of_shape(t.leaf(shape) + ".T", shape)


@view
def sliced(t, rng, shape):
    lows = rng.integers(0, 2, len(shape))
    highs = rng.integers(0, 2, len(shape))
    full = tuple(int(n + low + high) for n, low, high in zip(shape, lows, highs, strict=True))
    cuts = ", ".join(f"{low}:{low + n}" for n, low in zip(shape, lows, strict=True))
    return f"{t.leaf(full)}[{cuts}]"


@view
def strided(t, rng, shape):
    return f"{t.leaf((2 * shape[0], *shape[1:]))}[::2]"


@view
def reversed_(t, rng, shape):
    return f"{t.leaf(shape)}[::-1]"


@view
def rolled(t, rng, shape):
    return f"jnp.roll({t.leaf(shape)}, 1, axis={int(rng.integers(len(shape)))})"


@view
def concatenated(t, rng, shape):
    first = max(1, shape[0] // 2)
    if first == shape[0]:
        return t.leaf(shape)
    parts = [t.leaf((first, *shape[1:])), t.leaf((shape[0] - first, *shape[1:]))]
    if rng.random() < 0.3:
        parts[1] = f"{parts[0]}[:1]" if shape[0] - first == 1 else parts[1]
    return f"jnp.concatenate([{', '.join(parts)}])"


@view
def stacked(t, rng, shape):
    parts = [t.leaf(shape[1:]) for _ in range(shape[0])]
    return f"jnp.stack([{', '.join(parts)}])"


@view
def broadcast(t, rng, shape):
    kept = [int(n) if rng.random() < 0.5 else 1 for n in shape]
    return f"jnp.broadcast_to({t.leaf(tuple(kept))}, {shape})"


@view
def of_scalar(t, rng, shape):
    return f"jnp.full({shape}, {t.leaf(())})"


@view
def padded(t, rng, shape):
    inner = (max(1, shape[0] - 1), *shape[1:])
    return f"jnp.pad({t.leaf(inner)}, {[(shape[0] - inner[0], 0)] + [(0, 0)] * (len(shape) - 1)})"


@view
def gathered(t, rng, shape):
    rows = shape[0] + 1
    return f"{t.leaf((rows, *shape[1:]))}[{_ints(rng.integers(0, rows, shape[0]))}]"


@view
def scattered(t, rng, shape):
    places = _ints(rng.permutation(math.prod(shape)))
    return _of_shape(
        f"jnp.zeros({math.prod(shape)}, jnp.{t.dtype}).at[{places}].set({t.leaf((math.prod(shape),))})", shape
    )


@view
def exponential(t, rng, shape):
    return f"jnp.exp({t.leaf(shape)})"


@view
def squared(t, rng, shape):
    return f"{t.leaf(shape)} ** 2"


@view
def softmaxed(t, rng, shape):
    return f"jax.nn.softmax({t.leaf(shape)}, axis={int(rng.integers(len(shape)))})"


@view
def lower_triangle(t, rng, shape):
    return f"jnp.tril({t.leaf(shape)})" if len(shape) > 1 else t.leaf(shape)


@view
def normalized(t, rng, shape):
    leaf = t.leaf(shape)
    return f"{leaf} / jnp.linalg.norm({leaf})"


@view
def weight_normalized(t, rng, shape):
    leaf = t.leaf(shape)
    return f"{t.leaf(shape[-1:])} * {leaf} / jnp.sqrt(jnp.sum({leaf} ** 2, axis=0))"


@view
def standardized(t, rng, shape):
    leaf = t.leaf(shape)
    return f"({leaf} - jnp.mean({leaf}, axis=0)) / jnp.sqrt(jnp.var({leaf}, axis=0) + 0.1)"


@view
def low_rank(t, rng, shape):
    if len(shape) != 2:
        return t.leaf(shape)
    return f"{t.leaf((shape[0], 1))} @ {t.leaf((1, shape[1]))}"


@view
def adapted(t, rng, shape):
    if len(shape) != 2:
        return f"{t.leaf(shape)} + {t.leaf(shape)}"
    return f"{t.leaf(shape)} + {t.leaf((shape[0], 1))} @ {t.leaf((1, shape[1]))}"


@view
def outer(t, rng, shape):
    return f"jnp.outer({t.leaf(shape[:1])}, {t.leaf(shape[1:])})" if len(shape) == 2 else t.leaf(shape)


@view
def symmetric(t, rng, shape):
    leaf = t.leaf(shape)
    return f"{leaf} + {leaf}.T" if len(shape) == 2 and shape[0] == shape[1] else leaf


@view
def scaled_by_leaf(t, rng, shape):
    return f"{t.leaf(())} * {t.leaf(shape)}"


@view
def scaled_by_constant(t, rng, shape):
    return f"0.5 * {t.leaf(shape)}"


@view
def negated(t, rng, shape):
    return f"(-{t.leaf(shape)})"


@view
def masked(t, rng, shape):
    mask = (np.arange(math.prod(shape)) % 3 > 0).astype(int).tolist()
    return f"{t.leaf(shape)} * jnp.array({mask}, jnp.{t.dtype}).reshape({shape})"


@view
def cast(t, rng, shape):
    if t.dtype == "float32":
        return f"{t.leaf(shape)}.astype(jnp.float64).astype(jnp.float32)"
    return f"{t.leaf(shape, 'float32')}.astype(jnp.float64)"


@view
def turned_cast_reshaped(t, rng, shape):
    before = _factorings(math.prod(shape), rng)
    if t.dtype == "float32":
        return _of_shape(f"{t.leaf(before)}.T.astype(jnp.float64)", shape) + ".astype(jnp.float32)"
    return _of_shape(f"{t.leaf(before, 'float32')}.T.astype(jnp.float64)", shape)


@view
def through_complex(t, rng, shape):
    return f"jnp.real({t.leaf(shape)} * (1 + 2j))"


@view
def tied(t, rng, shape):
    """A leaf that has been used before, by whatever moves its entries into place."""
    found = [name for name, (other, dtype) in t.params.items() if math.prod(other) == math.prod(shape)]
    names = [name for name in found if int(name[1:]) < t.known.get("p", 0) and t.params[name][1] == t.dtype]
    if not names:
        return t.leaf(shape)
    name = names[int(rng.integers(len(names)))]
    value = f'p["{name}"]'
    other = t.params[name][0]
    if other == shape:
        return value
    return f"{value}.T" if other == shape[::-1] and rng.random() < 0.7 else _of_shape(value, shape)


@view
def part_of_earlier(t, rng, shape):
    """A slice of a leaf that has been used before."""
    for number in range(t.known.get("p", 0)):
        other, dtype = t.params[f"p{number}"]
        fits = len(other) == len(shape) and all(n >= m for n, m in zip(other, shape, strict=True))
        if fits and dtype == t.dtype:
            return f'p["p{number}"][{", ".join(f":{n}" for n in shape)}]'
    return t.leaf(shape)


# ---- starts: from the data of an example to h -----------------------------------------------------------------------


@start
def features(t, rng, shape, view):
    return "x", shape


@start
def features_with_zeros(t, rng, shape, view):
    return "x * jnp.round(jnp.abs(x))", shape


@start
def scaled_features(t, rng, shape, view):
    return f"x * {view(t, rng, shape)}", shape


@start
def first_dense(t, rng, shape, view):
    out = int(rng.integers(1, 4))
    return f"x @ {view(t, rng, (shape[0], out))}", (out,)


@start
def repeated_features(t, rng, shape, view):
    """A sequence made of one vector."""
    return "jnp.stack([x, 2 * x], axis=-2)", (2, *shape)


@start
def embedded(t, rng, shape, view):
    """The signs of the features as tokens."""
    out = int(rng.integers(1, 4))
    return f"{view(t, rng, (2, out))}[(x > 0).astype(int)]", (*shape, out)


@start
def embedded_label(t, rng, shape, view):
    return f"x * {view(t, rng, (3, *shape))}[k]", shape


@start
def one_hot_label(t, rng, shape, view):
    return f"x + jax.nn.one_hot(k, 3, dtype=x.dtype) @ {view(t, rng, (3, *shape))}", shape


@start
def convolved(t, rng, shape, view):
    """A convolution along the features."""
    width, out = int(rng.integers(1, 3)), int(rng.integers(1, 3))
    kernel = view(t, rng, (width, 1, out))
    data = "x[:, :, None]" if t.batched else "x[None, :, None]"
    done = f'jax.lax.conv_general_dilated({data}, {kernel}, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))'
    return done if t.batched else f"{done}[0]", (*shape, out)


@start
def complex_data(t, rng, shape, view):
    out = int(rng.integers(1, 4))
    return f"jnp.abs(x * (1 + 1j) @ {view(t, rng, (shape[0], out))} + 1j * y[..., None]) ** 2", (out,)


@start
def spectrum(t, rng, shape, view):
    return f"jnp.abs(jnp.fft.fft(x * {view(t, rng, shape)})) ** 2", shape


@start
def turned_data(t, rng, shape, view):
    """The weight stands on the left."""
    out = int(rng.integers(1, 4))
    weight = view(t, rng, (out, shape[0]))
    return (f"({weight} @ x.T).T" if t.batched else f"{weight} @ x"), (out,)


# ---- layers: from h to h --------------------------------------------------------------------------------------------


@layer(any_rank=True)
def dense(t, rng, s, view):
    out = int(rng.integers(1, 4))
    form = int(rng.integers(7))
    if form < 3:
        return f"h @ {view(t, rng, (s[-1], out))}", (*s[:-1], out)
    if form == 3:
        return f'jnp.einsum("...i,oi->...o", h, {view(t, rng, (out, s[-1]))})', (*s[:-1], out)
    if form == 4:
        return f"jnp.tensordot(h, {view(t, rng, (s[-1], out))}, 1)", (*s[:-1], out)
    if form == 5:
        return f"jnp.sum(h[..., :, None] * {view(t, rng, (s[-1], out))}, axis=-2)", (*s[:-1], out)
    return f"({view(t, rng, (out, s[-1]))} @ h[..., None])[..., 0]", (*s[:-1], out)


@layer(any_rank=True)
def affine(t, rng, s, view):
    out = int(rng.integers(1, 4))
    return f"h @ {view(t, rng, (s[-1], out))} + {view(t, rng, (out,))}", (*s[:-1], out)


@layer(any_rank=True)
def square_dense(t, rng, s, view):
    return f"h @ {view(t, rng, (s[-1], s[-1]))}", s


@layer(any_rank=True)
def residual(t, rng, s, view):
    return f"h + jnp.tanh(h @ {view(t, rng, (s[-1], s[-1]))})", s


@layer(any_rank=True)
def there_and_back(t, rng, s, view):
    """One weight for both, as in a tied autoencoder."""
    out = int(rng.integers(1, 4))
    weight = view(t, rng, (s[-1], out))
    return f"(lambda w: jnp.tanh(h @ w) @ w.T)({weight})", s


@layer(any_rank=True)
def bias(t, rng, s, view):
    return f"h + {view(t, rng, s[-1:])}", s


@layer(any_rank=True)
def bias_of_all(t, rng, s, view):
    return f"h + {view(t, rng, s)}", s


@layer(any_rank=True)
def scale(t, rng, s, view):
    return f"h * {view(t, rng, s[-1:])}", s


@layer(any_rank=True)
def scale_on_the_left(t, rng, s, view):
    return f"{view(t, rng, s[-1:])} * h", s


@layer(any_rank=True)
def scalar_scale(t, rng, s, view):
    return f"h * {t.leaf(())}", s


@layer(any_rank=True)
def divided(t, rng, s, view):
    return f"h / (1 + {view(t, rng, s[-1:])} ** 2)", s


@layer(any_rank=True)
def subtracted(t, rng, s, view):
    return f"{view(t, rng, s[-1:])} - h", s


@layer(any_rank=True)
def powered(t, rng, s, view):
    return f"(1.5 + jnp.tanh(h)) ** {view(t, rng, s[-1:])}", s


@layer(any_rank=True)
def ensembles(t, rng, s, view):
    """Members with one weight each."""
    members = s[-1]
    out = int(rng.integers(1, 3))
    weight = view(t, rng, (members, 1, out))
    done = f'jnp.einsum("...ei,eih->...eh", h[..., None], {weight})'
    return f"{done}.reshape(*h.shape[:-1], {members * out})", (*s[:-1], members * out)


@layer(any_rank=True)
def grouped(t, rng, s, view):
    out = int(rng.integers(1, 3))
    return f'jnp.einsum("...g,go->...go", h, {view(t, rng, (s[-1], out))})', (*s, out)


@layer(any_rank=True)
def merged_heads(t, rng, s, view):
    """Two heads by one array of rank three."""
    weight = view(t, rng, (s[-1], 2, 2))
    return f'jnp.einsum("...i,iah->...ah", h, {weight})', (*s[:-1], 2, 2)


@layer(any_rank=True)
def bilinear(t, rng, s, view):
    weight = view(t, rng, (s[-1], 2, s[-1]))
    return f'jnp.einsum("...i,ioj,...j->...o", h, {weight}, h)', (*s[:-1], 2)


@layer(any_rank=True)
def gated(t, rng, s, view):
    return f"h * jax.nn.sigmoid(h @ {view(t, rng, (s[-1], s[-1]))})", s


@layer(any_rank=True)
def layer_norm(t, rng, s, view):
    centered = "(h - jnp.mean(h, -1, keepdims=True)) / jnp.sqrt(jnp.var(h, -1, keepdims=True) + 0.1)"
    return f"{centered} * {view(t, rng, s[-1:])} + {view(t, rng, s[-1:])}", s


@layer(any_rank=False)
def recurrent(t, rng, s, view):
    """The same weights at each step of a scan over the entries."""
    size = math.prod(s)
    weight, of_input = view(t, rng, (2, 2)), view(t, rng, (2,))
    step = f"lambda c, a: (jnp.tanh(c @ {weight} + a * {of_input}), None)"
    return f"jax.lax.scan({step}, jnp.zeros(2, h.dtype), h.reshape({size}))[0]", (2,)


@layer(any_rank=True)
def scanned_stack(t, rng, s, view):
    """A scan over a stack of weights, as over the layers of a network."""
    weights = view(t, rng, (2, s[-1], s[-1]))
    return f"jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, {weights})[0]", s


@layer(any_rank=True)
def scanned_twice(t, rng, s, view):
    weight = view(t, rng, (s[-1], s[-1]))
    return f"jax.lax.scan(lambda h, _: (jnp.tanh(h @ {weight}), None), h, None, length=2)[0]", s


@layer(any_rank=True)
def fori(t, rng, s, view):
    weight = view(t, rng, (2, s[-1]))
    return f"jax.lax.fori_loop(0, 2, lambda i, h: jnp.sin(h) * {weight}[i], h)", s


@layer(any_rank=False)
def carried(t, rng, s, view):
    """A parameter is where a scan starts."""
    size = math.prod(s)
    step = "lambda c, a: (jnp.tanh(c * a) + c, None)"
    return f"jax.lax.scan({step}, {view(t, rng, (3,))}, h.reshape({size}))[0]", (3,)


@layer(any_rank=False)
def attention(t, rng, s, view):
    if len(s) != 2:
        return f"h.reshape(-1) * {view(t, rng, (math.prod(s),))}", (math.prod(s),)
    q, k, v = (view(t, rng, (s[1], 2)) for _ in range(3))
    return f"jax.nn.softmax((h @ {q}) @ (h @ {k}).T) @ (h @ {v})", (s[0], 2)


@layer(any_rank=True)
def mixture(t, rng, s, view):
    """Gates choose among experts."""
    gate, experts = view(t, rng, (s[-1], 2)), view(t, rng, (2, s[-1], 2))
    return f'jnp.einsum("...e,...i,eio->...o", jax.nn.softmax(h @ {gate}), h, {experts})', (*s[:-1], 2)


@layer(any_rank=False)
def expert_of_label(t, rng, s, view):
    size = math.prod(s)
    return f"h.reshape(-1) @ {view(t, rng, (3, size, 2))}[k]", (2,)


@layer(any_rank=False)
def dynamic_part(t, rng, s, view):
    size = math.prod(s)
    return f"h.reshape(-1) * jax.lax.dynamic_slice({view(t, rng, (size + 2,))}, (k,), ({size},))", (size,)


@layer(any_rank=False)
def hypernetwork(t, rng, s, view):
    """The data makes the weights."""
    size = math.prod(s)
    made = f"jnp.tanh(x @ {view(t, rng, (t.features, size * 2))})"
    return f"h.reshape(-1) @ {made}.reshape({size}, 2)", (2,)


@layer(any_rank=True)
def complex_weight(t, rng, s, view):
    """Two real leaves make one complex weight."""
    out = int(rng.integers(1, 4))
    shape = s[-1], out
    real, imaginary = view(t, rng, shape), view(t, rng, shape)
    made = f"jax.lax.complex({real}, {imaginary})" if rng.random() < 0.5 else f"({real} + 1j * {imaginary})"
    return f"jnp.abs(h @ {made}) ** 2", (*s[:-1], out)


@layer(any_rank=True)
def complex_constant(t, rng, s, view):
    out = int(rng.integers(1, 4))
    part = str(rng.choice(["jnp.real", "jnp.imag"]))
    return f"{part}((h @ {view(t, rng, (s[-1], out))}) * (1 + 2j) * jnp.exp(1j * y[..., None]))" if len(
        s
    ) == 1 else f"{part}((h @ {view(t, rng, (s[-1], out))}) ** 2 * (1 + 2j))", (*s[:-1], out)


@layer(any_rank=True)
def complex_scale(t, rng, s, view):
    return f"jnp.abs(h * (1 + 1j) * {view(t, rng, s[-1:])} + 1j) ** 2", s


@layer(any_rank=True)
def phase(t, rng, s, view):
    return f"jnp.real(jnp.exp(1j * h * {view(t, rng, s[-1:])}) * (1 - 2j))", s


@layer(any_rank=True)
def fourier(t, rng, s, view):
    """A filter between a transform and its inverse."""
    width = s[-1] // 2 + 1
    weight = f"jax.lax.complex({view(t, rng, (width,))}, {view(t, rng, (width,))})"
    return f"jnp.fft.irfft(jnp.fft.rfft(h) * {weight}, n={s[-1]})", s


@layer(any_rank=False)
def convolution(t, rng, s, view):
    size, out = math.prod(s), int(rng.integers(1, 3))
    kernel = view(t, rng, (2, 1, out))
    data = f"h.reshape(1, {size}, 1)"
    done = f'jax.lax.conv_general_dilated({data}, {kernel}, (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))'
    return f"{done}[0]", (size, out)


@layer(any_rank=False)
def correlation(t, rng, s, view):
    size = math.prod(s)
    return f'jnp.convolve(h.reshape(-1), {view(t, rng, (2,))}, mode="same")', (max(size, 2),)


@layer(any_rank=True)
def appended(t, rng, s, view):
    """A parameter beside the features."""
    added = view(t, rng, (2,))
    return f"jnp.concatenate([h, jnp.broadcast_to({added}, (*h.shape[:-1], 2))], axis=-1)", (*s[:-1], s[-1] + 2)


@layer(any_rank=True)
def padded_by_leaf(t, rng, s, view):
    p = t.leaf(())  # JAX cannot transpose a pad whose operand is a constant
    return f"jax.lax.pad(h + 0 * {p}, {p}, [(0, 0, 0)] * (h.ndim - 1) + [(1, 0, 0)])", (*s[:-1], s[-1] + 1)


@layer(any_rank=True)
def larger_of(t, rng, s, view):
    return f"jnp.maximum(h, {view(t, rng, s[-1:])})", s


@layer(any_rank=True)
def chosen(t, rng, s, view):
    return f"jnp.where(h > 0, h * {view(t, rng, s[-1:])}, {view(t, rng, s[-1:])})", s


@layer(any_rank=True)
def shuffled(t, rng, s, view):
    return f"h[..., {_ints(rng.permutation(s[-1]))}]", s


@layer(any_rank=True)
def sorted_features(t, rng, s, view):
    return "jnp.sort(h, axis=-1)", s


@layer(any_rank=True)
def running_sums(t, rng, s, view):
    return "jnp.cumsum(h, axis=-1)", s


@layer(any_rank=True)
def softmax(t, rng, s, view):
    return "jax.nn.softmax(h, axis=-1)", s


@layer(any_rank=True)
def pooled(t, rng, s, view):
    pool = str(rng.choice(["sum", "mean", "max"]))
    return (f"jnp.{pool}(h, axis=-2)", (*s[:-2], s[-1])) if len(s) > 1 else ("h", s)


@layer(any_rank=True)
def low_precision(t, rng, s, view):
    return f"jnp.sin(h * {view(t, rng, s[-1:])}).astype(jnp.float32).astype(jnp.{t.dtype})", s


@layer(any_rank=True)
def gradient_of_potential(t, rng, s, view):
    """A derivative inside, as for the forces of an energy."""
    return f"jax.grad(lambda h: jnp.sum(jnp.sin(h @ {view(t, rng, (s[-1], 2))})))(h)", s


@layer(any_rank=True)
def solved(t, rng, s, view):
    matrix = f"(2 * jnp.eye({s[-1]}) + 0.1 * {view(t, rng, (s[-1], s[-1]))})"
    return f"jnp.linalg.solve({matrix}.astype(h.dtype), h[..., None])[..., 0]", s


@layer(any_rank=True)
def power_of_weight(t, rng, s, view):
    weight = view(t, rng, (s[-1], s[-1]))
    return f"(lambda w: h @ (w @ w))({weight})", s


# ---- functions of the entries, or of the last axis ------------------------------------------------------------------

ACTS = {
    "none": "{}",
    "tanh": "jnp.tanh({})",
    "relu": "jax.nn.relu({})",
    "softplus": "jax.nn.softplus({})",
    "silu": "jax.nn.silu({})",
    "gelu": "jax.nn.gelu({})",
    "sin": "jnp.sin({})",
    "abs": "jnp.abs({})",
    "square": "({}) ** 2",
    "elu": "jax.nn.elu({})",
    "leaky_relu": "jax.nn.leaky_relu({})",
    "sigmoid": "jax.nn.sigmoid({})",
    "clip": "jnp.clip({}, -1, 1)",
    "root": "jnp.sqrt(1 + ({}) ** 2)",
    "log_softmax": "jax.nn.log_softmax({}, axis=-1)",
    "bump": "bump({})",
    "unit": "unit({})",
    "unit_of_all": "unit_of_all({})",
    "guarded": "guarded({})",
    "ratio": "ratio({})",
    "where_ratio": "where_ratio({})",
    "doubled": "doubled({})",
    "clipped_back": "clipped_back({})",
    "reversed_back": "reversed_back({})",
    "straight_through": "straight_through({})",
    "stopped": "stopped({})",
}

HELPERS = {
    "bump": """
@jax.custom_jvp
def bump(h):
    return jnp.tanh(h) + 0.1 * h


@bump.defjvp
def _(primals, tangents):
    return bump(*primals), (1.1 - jnp.tanh(primals[0]) ** 2) * tangents[0]
""",
    "unit": """
@jax.custom_jvp
def unit(h):
    return h / jnp.sqrt(1 + jnp.sum(h**2, axis=-1, keepdims=True))


@unit.defjvp
def _(primals, tangents):
    (h,), (dh,) = primals, tangents
    r = 1 / jnp.sqrt(1 + jnp.sum(h**2, axis=-1, keepdims=True))
    return h * r, dh * r - h * r**3 * jnp.sum(h * dh, axis=-1, keepdims=True)
""",
    "unit_of_all": """
@jax.custom_jvp
def unit_of_all(h):
    return h / jnp.sqrt(1 + jnp.sum(h**2))


@unit_of_all.defjvp
def _(primals, tangents):
    (h,), (dh,) = primals, tangents
    r = 1 / jnp.sqrt(1 + jnp.sum(h**2))
    return h * r, dh * r - h * r**3 * jnp.sum(h * dh)
""",
    "guarded": """
@jax.custom_jvp
def guarded(h):
    return jnp.sin(h)


@guarded.defjvp
def _(primals, tangents):
    return guarded(*primals), jnp.nan_to_num(jnp.cos(primals[0]) * tangents[0])
""",
    "ratio": """
@jax.custom_jvp
def ratio(h):
    return jnp.where(h == 0, 1.0, jnp.expm1(h) / h)


@ratio.defjvp
def _(primals, tangents):
    (h,), (dh,) = primals, tangents
    safe = jnp.where(h == 0, 1.0, h)
    return ratio(h), jnp.where(h == 0, 0.5 + h / 3, (jnp.exp(safe) - ratio(safe)) / safe) * dh
""",
    "where_ratio": """
def where_ratio(h):
    safe = jnp.where(h == 0, 1.0, h)
    return jnp.where(h == 0, 1 + h / 2, jnp.expm1(safe) / safe)
""",
    "doubled": """
@jax.custom_vjp
def doubled(h):
    return jnp.sin(2 * h)


doubled.defvjp(lambda h: (doubled(h), h), lambda h, d: (2 * jnp.cos(2 * h) * d,))
""",
    "clipped_back": """
@jax.custom_vjp
def clipped_back(h):
    return jnp.tanh(h)


clipped_back.defvjp(lambda h: (jnp.tanh(h), h), lambda h, d: (jnp.clip((1 - jnp.tanh(h) ** 2) * d, -0.1, 0.1),))
""",
    "reversed_back": """
@jax.custom_vjp
def reversed_back(h):
    return jnp.sin(h)


reversed_back.defvjp(lambda h: (jnp.sin(h), h), lambda h, d: (-jnp.cos(h) * d,))
""",
    "straight_through": """
def straight_through(h):
    return h + jax.lax.stop_gradient(jnp.round(h) - h)
""",
    "stopped": """
def stopped(h):
    return h * jax.lax.stop_gradient(jnp.tanh(h))
""",
}


# ---- transformations around a layer ---------------------------------------------------------------------------------

WRAPS = {
    "none": "layer(h)",
    "jit": "jax.jit(layer)(h)",
    "remat": "jax.checkpoint(layer)(h)",
    "remat_of_jit": "jax.checkpoint(jax.jit(layer))(h)",
    "cond": "jax.lax.cond(jnp.sum(h) > 0.1, layer, lambda h: 0.5 * layer(h), h)",
    "cond_on_label": "jax.lax.cond(jnp.sum(k) > 1, layer, lambda h: layer(2 * h), h)",
    "switch": "jax.lax.switch(jnp.sum(k) % 2, [layer, lambda h: layer(-h)], h)",
    "scan_of_one": "jax.lax.scan(lambda c, _: (c, layer(h)), 0.0, None, length=1)[1][0]",
    "mean_of_scan": "jnp.mean(jax.lax.scan(lambda c, a: (c, layer(a * h)), 0.0, jnp.array([1.0, 2.0], h.dtype))[1], 0)",
    "vmap": "jax.vmap(layer)(jnp.stack([h, 2 * h])).sum(0)",
    "vmap_out": "jnp.sum(jax.vmap(layer, out_axes=-1)(jnp.stack([h, -h])), -1)",
    "map": "jnp.max(jax.lax.map(layer, jnp.stack([h, 2 * h])), axis=0)",
    "jvp": "jax.jvp(layer, (h,), (jnp.sin(h),))[1]",
    "while_of_constants": "layer(jax.lax.fori_loop(0, 2, lambda i, h: jnp.sin(h) + i, h))",
}


# ---- from the loss of an example to those of a batch ---------------------------------------------------------------

FORMS = {
    "vmap": "jax.vmap(per, (None, 0, 0, 0))(p, x, y, k)",
    "vmap_of_jit": "jax.vmap(jax.jit(per), (None, 0, 0, 0))(p, x, y, k)",
    "jit_of_vmap": "jax.jit(jax.vmap(per, (None, 0, 0, 0)))(p, x, y, k)",
    "vmap_of_remat": "jax.vmap(jax.checkpoint(per), (None, 0, 0, 0))(p, x, y, k)",
    "remat_of_vmap": "jax.checkpoint(jax.vmap(per, (None, 0, 0, 0)))(p, x, y, k)",
    "vmap_along_last": "jax.vmap(per, (None, -1, 0, 0))(p, x.T, y, k)",
    "vmap_of_copies": (
        "jax.vmap(per)(jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(y), *leaf.shape)), p), x, y, k)"
    ),
    "halves": (
        "jnp.concatenate([jax.vmap(per, (None, 0, 0, 0))(p, *half) for half in "
        "[(x[:2], y[:2], k[:2]), (x[2:], y[2:], k[2:])]])"
    ),
    "map": "jax.lax.map(lambda example: per(p, *example), (x, y, k))",
    "scan": "jax.lax.scan(lambda c, example: (c, per(p, *example)), None, (x, y, k))[1]",
    "loop": "jnp.stack([per(p, x[b], y[b], k[b]) for b in range(len(y))])",
    "shuffled": "jax.vmap(per, (None, 0, 0, 0))(p, x[::-1], y[::-1], k[::-1])",
    "of_neighbors": "jax.vmap(per, (None, 0, 0, 0))(p, x - jnp.roll(x, 1, axis=0), y, k)",
    "of_centered": "jax.vmap(per, (None, 0, 0, 0))(p, x - jnp.mean(x, axis=0), y, k)",
}


# ---- losses of an example -------------------------------------------------------------------------------------------


@loss
def squares(t, rng, s, view):
    target = "y" + "[..., None]" * 1 if not t.batched or len(s) == 1 else "y.reshape(-1" + ", 1" * len(s) + ")"
    return t.total(f"(h - {target}) ** 2", s)


@loss
def mean_of_squares(t, rng, s, view):
    return f"{t.total('h ** 2', s)} / {math.prod(s)}"


@loss
def entropy(t, rng, s, view):
    scores = "h" if len(s) == 1 else ("h.reshape(len(h), -1)" if t.batched else "h.reshape(-1)")
    picked = f"jnp.take_along_axis({scores}, k[..., None] % {math.prod(s)}, axis=-1)[..., 0]"
    return f"jax.nn.logsumexp({scores}, axis=-1) - {picked}"


@loss
def entropy_of_one_hot(t, rng, s, view):
    scores = "h" if len(s) == 1 else ("h.reshape(len(h), -1)" if t.batched else "h.reshape(-1)")
    hot = f"jax.nn.one_hot(k, {math.prod(s)}, dtype=h.dtype)"
    return f"-jnp.sum({hot} * jax.nn.log_softmax({scores}), axis=-1)"


@loss
def logistic(t, rng, s, view):
    return f"jnp.logaddexp(0.0, -jnp.sign(y) * {t.total('h', s)})"


@loss
def sums(t, rng, s, view):
    return t.total("h", s)


@loss
def sines(t, rng, s, view):
    return t.total("jnp.sin(h)", s)


@loss
def absolute_complex(t, rng, s, view):
    return t.total("jnp.abs(h * (2 - 1j) + 1j) ** 2", s)


@loss
def product(t, rng, s, view):
    return f"jnp.prod({'h.reshape(len(h), -1)' if t.batched else 'h.reshape(-1)'}, axis=-1)"


@loss
def first_entry(t, rng, s, view):
    return f"{'h.reshape(len(h), -1)[:, 0]' if t.batched else 'h.reshape(-1)[0]'} * y"


@loss
def weighted_entries(t, rng, s, view):
    return t.total(f"h * {view(t, rng, s)}", s)


@loss
def huber(t, rng, s, view):
    return t.total("jnp.where(jnp.abs(h) < 1, 0.5 * h**2, jnp.abs(h) - 0.5)", s)


@loss
def largest(t, rng, s, view):
    return f"jnp.max({'h.reshape(len(h), -1)' if t.batched else 'h.reshape(-1)'}, axis=-1)"


@loss
def mixture_density(t, rng, s, view):
    flat = "h.reshape(len(h), -1)" if t.batched else "h.reshape(-1)"
    return f"-jax.nn.logsumexp(-(({flat} - y[..., None]) ** 2) + {view(t, rng, (math.prod(s),))}, axis=-1)"


CONVEX = {"squares", "mean_of_squares", "entropy", "entropy_of_one_hot", "logistic"}
"""The losses that are convex in h, and have no parameters."""


# ---- what is done to the loss of an example -------------------------------------------------------------------------


def _any_leaf(t: Text, rng: Generator) -> str:
    if not t.known.get("p"):
        return t.leaf((2,))
    return f'p["p{int(rng.integers(t.known["p"]))}"]'


@tail
def times_scalar(t, rng, view):
    return f"{t.leaf(())} * l"


@tail
def learned_uncertainty(t, rng, view):
    scalar = t.leaf(())
    return f"jnp.exp(-{scalar}) * l + {scalar}"


@tail
def times_function(t, rng, view):
    return f"jnp.sum(jnp.sin({_any_leaf(t, rng)})) * l"


@tail
def over_norm(t, rng, view):
    return f"l / (1 + jnp.sum({_any_leaf(t, rng)} ** 2))"


@tail
def penalty(t, rng, view):
    return f"l + 0.1 * jnp.sum({_any_leaf(t, rng)} ** 2)"


@tail
def penalty_of_all(t, rng, view):
    return "l + 0.1 * sum(jnp.sum(leaf**2).astype(l.dtype) for leaf in p.values())"


@tail
def penalty_of_absolutes(t, rng, view):
    return f"l + jnp.sum(jnp.abs({_any_leaf(t, rng)}))"


@tail
def penalty_of_function(t, rng, view):
    return f"l + jax.nn.logsumexp({_any_leaf(t, rng)})"


@tail
def penalty_of_view(t, rng, view):
    return f"l + jnp.sum(jnp.cos({view(t, rng, (2, 3))}))"


@tail
def product_of_penalty(t, rng, view):
    return f"l + y * jnp.prod(jnp.cos({_any_leaf(t, rng)}))"


@tail
def squared_loss(t, rng, view):
    return "l**2"


@tail
def log_loss(t, rng, view):
    return "jnp.log1p(l**2)"


@tail
def plus_linear(t, rng, view):
    return f"l + {t.leaf(())}"


@tail
def power_of_loss(t, rng, view):
    return f"(1 + l**2) ** {t.leaf(())}"


@tail
def remat_of_loss(t, rng, view):
    return f"jax.checkpoint(lambda s, l: jnp.sin(s * l))({t.leaf(())}, l)"


# ---- what couples the examples of a batch ---------------------------------------------------------------------------

COUPLINGS = {
    "batch_norm": "(h - jnp.mean(h, 0)) / jnp.sqrt(jnp.var(h, 0) + 0.1)",
    "centered": "h - jnp.mean(h, axis=0, keepdims=True)",
    "sorted": "jnp.sort(h, axis=0)",
    "cumulated": "jnp.cumsum(h, axis=0)",
    "rolled_batch": "h * jnp.roll(h, 1, axis=0)",
    "permuted": "h + h[{perm}] ** 2",
    "reversed_batch": "h * h[::-1]",
    "segments": "h - jax.ops.segment_sum(h, k, num_segments=3)[k]",
    "softmax_over_batch": "jax.nn.softmax(h, axis=0)",
    "smoothed": "jnp.tensordot(jnp.cos(x[:, :1] - x[:, 0]), h, 1)",
    "lagged": "h - jnp.concatenate([h[:1] * 0, h[:-1]])",
    "first_of_batch": "h * h[0]",
    "fft_over_batch": "jnp.real(jnp.fft.fft(h, axis=0))",
    "mixed_by_reshape": "h * jnp.moveaxis(h, 0, -1).reshape(h.shape)",
    "reshaped_and_back": "jnp.tanh(h.reshape(-1, 1)).reshape(h.shape)",
    "over_norm_of_batch": "h / (1 + jnp.linalg.norm(h))",
    "largest_of_batch": "h / (1 + jnp.max(jnp.abs(h), axis=0))",
    "scanned_over_batch": "jax.lax.scan(lambda c, a: (jnp.tanh(c) + a, jnp.tanh(c) * a), h[0] * 0, h)[1]",
    "associative": "jax.lax.associative_scan(jnp.add, h)",
    "convolved_over_batch": "jnp.moveaxis(jax.vmap(lambda r: jnp.convolve(r, jnp.array([1.0, 2.0], h.dtype), mode='same'))(jnp.moveaxis(h.reshape(h.shape[0], -1), 0, 1)), 0, 1).reshape(h.shape)",  # noqa: E501
    "attended": "jnp.tensordot(jax.nn.softmax(jnp.sum(h, -1).reshape(h.shape[0], -1) @ jnp.sum(h, -1).reshape(h.shape[0], -1).T), h, 1)",  # noqa: E501
}


REDUCTIONS = {
    "mean": "jnp.mean(l)",
    "sum": "jnp.sum(l)",
    "sum_over_size": "jnp.sum(l) / len(l)",
    "half_mean": "0.5 * jnp.mean(l)",
    "weighted": "jnp.dot(y, l)",
    "weighted_mean": "jnp.average(l, weights=1 + y**2)",
    "masked_mean": "jnp.sum(jnp.where(k > 0, l, 0)) / jnp.sum(k > 0)",
    "masked_product": "jnp.sum((k > 0) * l) / jnp.maximum(jnp.sum(k > 0), 1)",
    "mean_squared": "jnp.mean(l) ** 2",
    "mean_of_squared": "jnp.mean(l**2)",
    "logsumexp": "jax.nn.logsumexp(l)",
    "product_of_means": "jnp.mean(l) * jnp.mean(jnp.sin(l))",
    "sum_of_means": "jnp.mean(l) - 2 * jnp.sum(jnp.sin(l) * y)",
    "scaled_mean": "jnp.exp({scalar}) * jnp.mean(l)",
    "scaled_sum": "jnp.sum({scalar} * l)",
    "uncertainty": "jnp.exp(-{scalar}) * jnp.mean(l) + {scalar}",
    "penalized_mean": "jnp.mean(l) + 0.1 * sum(jnp.sum(leaf**2).astype(l.dtype) for leaf in p.values())",
    "penalized_by_product": "jnp.mean(l) + jnp.prod(jnp.cos({leaf}))",
    "plus_leaf": "jnp.mean(l + {scalar})",
    "lagged_squares": "jnp.mean((l[1:] - l[:-1]) ** 2)",
    "lagged_first_order": "jnp.mean(l[1:] - l[:-1])",
    "all_but_first": "jnp.mean(l[1:])",
    "one_of_batch": "l[1]",
    "last_cumulated": "jnp.cumsum(l)[-1]",
    "sorted_first": "jnp.mean(jnp.sort(l)[:2])",
    "largest": "jnp.max(l)",
    "permuted_weights": "jnp.dot(l[::-1], y)",
    "gram": "jnp.sum(jnp.tanh(jnp.outer(l, l)))",
    "contrastive": "-jnp.mean(jax.nn.log_softmax(-((l[:, None] - l[None]) ** 2), axis=1)[:, 0])",
    "deviation": "jnp.std(l)",
    "of_segments": "jnp.sum(jax.ops.segment_sum(l, k, num_segments=3) ** 2)",
    "linear_segments": "jnp.sum(jax.ops.segment_sum(l, k, num_segments=3))",
    "fft": "jnp.sum(jnp.abs(jnp.fft.fft(l)) ** 2)",
    "scan_sum": "jax.lax.scan(lambda c, a: (c + a, None), jnp.zeros((), l.dtype), l)[0]",
    "scan_product": "jax.lax.scan(lambda c, a: (c + jnp.tanh(c) * a, None), jnp.ones((), l.dtype), l)[0]",
    "fori_sum": "jax.lax.fori_loop(0, len(l), lambda i, c: c + l[i], jnp.zeros((), l.dtype))",
    "vdot": "jnp.vdot(l, l) / len(l)",
    "einsum": 'jnp.einsum("b,b->", l, jnp.cos(y))',
    "matrix_form": "(l @ jnp.diag(y)) @ l",
    "reshaped": "jnp.mean(jnp.sum(l.reshape(1, -1), axis=0))",
    "one_half_each": "jnp.mean(l[: len(l) // 2]) + jnp.mean(l[len(l) // 2 :])",
    "two_times": "jnp.mean(l) + jnp.mean(l[::-1] * y)",
    "product_with_data_sum": "jnp.mean(l) * jnp.sum(y)",
    "divided_by_data": "jnp.sum(l) / (1 + jnp.sum(y**2))",
    "divided_by_loss": "jnp.sum(l) / (1 + jnp.sum(l**2))",
}


# ---- rendering ------------------------------------------------------------------------------------------------------


def _body(program: Program, batched: bool, params: dict[str, tuple[Shape, str]]) -> tuple[Text, Shape]:
    """The lines from the data to the loss: of one example, or of a batch."""
    t = Text(batched, program.size, program.dtype, program.features, params)
    piece = program.start
    rng = np.random.default_rng(piece.seed)
    value, shape = STARTS[piece.kind](t, rng, (program.features,), VIEWS[piece.view])
    t.lines.append(f"h = {ACTS[piece.act].format(value)}")
    for piece in program.layers:
        shape = _render_layer(t, piece, shape)
    return t, shape


def _render_layer(t: Text, piece: Piece, shape: Shape) -> Shape:
    rng = np.random.default_rng(piece.seed)
    if piece.kind in COUPLINGS:
        if t.batched:
            perm = _ints(rng.permutation(t.size))
            t.lines.append(f"h = {COUPLINGS[piece.kind].format(perm=perm)}")
        return shape
    make, any_rank = LAYERS[piece.kind]
    value, after = make(t, rng, shape, VIEWS[piece.view])
    value = ACTS[piece.act].format(value)
    if t.batched and not any_rank:
        value = f"jax.vmap(lambda h, x, y, k: {value})(h, x, y, k)"
    if piece.wrap == "none":
        t.lines.append(f"h = {value}")
    else:
        t.lines += ["", "def layer(h):", f"    return {value}", "", f"h = {WRAPS[piece.wrap]}"]
    return after


def _render(program: Program) -> Iterator[str]:
    params: dict[str, tuple[Shape, str]] = {}
    bodies = []
    for batched in (False, True):
        t, shape = _body(program, batched, params)
        outputs = list(t.lines)
        piece = program.loss
        rng = np.random.default_rng(piece.seed)
        t.lines = [f"l = {LOSSES[piece.kind](t, rng, shape, VIEWS[piece.view])}"]
        ending = len(t.lines)
        for piece in program.tails:
            rng = np.random.default_rng(piece.seed)
            t.lines.append(f"l = {TAILS[piece.kind](t, rng, VIEWS[piece.view])}")
        bodies.append((outputs, t.lines[:ending], t.lines[ending:], t))
    (outputs, losses, tails, _), (outputs_batched, losses_batched, tails_batched, t) = bodies
    rng = np.random.default_rng(program.reduction.seed)
    expression = REDUCTIONS[program.reduction.kind]
    if "{scalar}" in expression:
        expression = expression.replace("{scalar}", t.leaf(()))
    if "{leaf}" in expression:
        expression = expression.replace("{leaf}", _any_leaf(t, rng))
    signature = "(p, x, y, k)"
    functions = ["def per" + signature + ":", *_indented(outputs + losses + tails + ["return l"]), "", ""]
    if program.form == "batched":
        functions += ["def f" + signature + ":", *_indented(outputs_batched + losses_batched + tails_batched)]
    else:
        functions += ["def f" + signature + ":", f"    l = {FORMS[program.form]}"]
    functions.append(f"    return {expression}")
    if program.loss.kind in CONVEX and not program.tails:
        functions += ["", "", "def output" + signature + ":", *_indented([*outputs, "return h"])]
        functions += ["", "", "def loss_of_output(h, x, y, k):", *_indented([*losses, "return l"])]
    body = "\n".join(functions)
    yield "import jax\nimport jax.numpy as jnp\nimport numpy as np\n"
    yield _PRECISION
    for name, source in HELPERS.items():
        if f"{name}(" in body:
            yield source
    yield f"rng = np.random.default_rng({program.seed})"
    yield "p = {"
    for name, (shape, dtype) in params.items():
        yield f'    "{name}": jnp.asarray(rng.normal(size={shape}), jnp.{dtype}),'
    yield "}"
    yield f"x = jnp.asarray(rng.normal(size=({program.size}, {program.features})), jnp.{program.dtype})"
    yield f"y = jnp.asarray(rng.normal(size={program.size}), jnp.{program.dtype})"
    yield f"k = jnp.asarray(rng.integers(0, 3, {program.size}))"
    yield "batch = x, y, k\n\n"
    yield body


def _indented(lines: list[str]) -> list[str]:
    return [f"    {line}" if line else "" for line in lines]


# ---- drawing and shrinking ------------------------------------------------------------------------------------------


def _draw(rng: Generator, names: Any, plain: str = "", chance: float = 0.0) -> str:
    """One of the names, or the plain one with a chance."""
    if plain and rng.random() < chance:
        return plain
    return str(rng.choice(sorted(names)))


def _draw_piece(rng: Generator, kinds: Any, plainly: float = 0.3) -> Piece:
    return Piece(
        _draw(rng, kinds),
        _draw(rng, VIEWS, "plain", plainly),
        _draw(rng, ACTS, str(rng.choice(["none", "tanh", "sin"])), 0.6),
        _draw(rng, WRAPS, "none", 0.7),
        int(rng.integers(1000)),
    )


def draw(seed: int) -> Program:
    """The program of a seed."""
    rng = np.random.default_rng(seed)
    size, features = int(rng.integers(3, 6)), int(rng.integers(1, 6))
    if rng.random() < 0.25:
        features = size  # which axis is that of the examples?
    form = "batched" if rng.random() < 0.55 else _draw(rng, FORMS, "vmap", 0.6)
    layers = []
    for _ in range(rng.integers(1, 4)):
        plainly = float(rng.choice([0.2, 0.7]))
        kinds = ["dense", "affine"] if rng.random() < 0.25 else LAYERS
        layers.append(_draw_piece(rng, kinds, plainly))
        if form == "batched" and rng.random() < 0.12:
            layers.append(Piece(_draw(rng, COUPLINGS), seed=int(rng.integers(1000))))
    tails = [_draw_piece(rng, TAILS) for _ in range(rng.choice([0, 1, 2], p=[0.55, 0.35, 0.1]))]
    return Program(
        seed=seed,
        start=_draw_piece(rng, ["features"] if rng.random() < 0.4 else STARTS),
        layers=tuple(layers),
        loss=_draw_piece(rng, LOSSES),
        tails=tuple(tails),
        reduction=Piece(_draw(rng, REDUCTIONS, "mean", 0.3), seed=int(rng.integers(1000))),
        form=form,
        size=size,
        features=features,
        dtype="float32" if rng.random() < 0.1 else "float64",
    )


def _simpler(program: Program) -> Iterator[Program]:
    """Programs with one piece less, or one that is simpler."""
    for n in range(len(program.tails)):
        yield replace(program, tails=program.tails[:n] + program.tails[n + 1 :])
    for n in range(len(program.layers)):
        yield replace(program, layers=program.layers[:n] + program.layers[n + 1 :])
    if program.start.kind != "features":
        yield replace(program, start=Piece("features"))
    if program.reduction.kind != "mean":
        yield replace(program, reduction=Piece("mean"))
    for kind in ("sums", "mean_of_squares"):
        if program.loss.kind not in ("sums", kind):
            yield replace(program, loss=Piece(kind))
    if program.form != "vmap":
        yield replace(program, form="vmap")
    if program.dtype != "float64":
        yield replace(program, dtype="float64")
    for n, piece in enumerate(program.layers):
        for field_, simple in (("wrap", "none"), ("act", "none"), ("view", "plain"), ("kind", "dense"), ("seed", 0)):
            if getattr(piece, field_) != simple and piece.kind not in COUPLINGS:
                changed = replace(piece, **{field_: simple})
                yield replace(program, layers=(*program.layers[:n], changed, *program.layers[n + 1 :]))
    for part in ("start", "loss"):
        piece = getattr(program, part)
        for field_, simple in (("act", "none"), ("view", "plain")):
            if getattr(piece, field_) != simple:
                yield replace(program, **{part: replace(piece, **{field_: simple})})
    for size, features in ((3, program.features), (program.size, 2), (program.size, 1)):
        if size < program.size or features < program.features:
            yield replace(program, size=size, features=features)


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """A program that still fails, and of which no piece can be dropped or made simpler."""
    shrunk = True
    while shrunk:
        shrunk = False
        for candidate in _simpler(program):
            if fails(candidate):
                program, shrunk = candidate, True
                break
    return program
