"""Names of primitives, grouped by what holds for them: the one table that all readers of jaxprs share.

Each set states a property and names its readers. A primitive may be added to a set only if the property holds for all
of its parameters and dtypes. A primitive in no set is still handled: its readers take their general path or decline.

Rules are functions, and stand beside their reader, keyed by the name of the primitive:

- ``_batch_axis.axis_rule``: where the batch axis of the operands goes in the outputs;
- ``_affine.RULES``: the canonical form of an operation that is affine in a parameter;
- ``_views``: rearrangements of the entries of a parameter;
- ``_jets.RULES``: calls, branches and loops evaluated on jets;
- ``_finiteness.RANGES``: the range of an output from the ranges of the operands.
"""

CONVOLUTION = "conv_general_dilated"

# ---- equations with bodies -----------------------------------------------------------------------------------------

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat", "remat2"})
"""They evaluate their body once on their operands and do nothing else. Read by ``_jaxprs.inline``."""

JITS = frozenset({"jit", "pjit"})
"""Calls without a rule of differentiation or recomputation. Read by ``_pushforward``."""

CONTROL_FLOW = frozenset({"scan", "while", "cond"})
"""The operands are not the operands of the body, or the body runs more than once or not at all.

Read by ``_finiteness`` and ``operators._mixing``.
"""

CUSTOM_RULES = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""JAX differentiates them by the user's rule and not by their body. Read by ``_jaxprs.called_jaxpr``."""

OPAQUE = frozenset({"pure_callback", "io_callback", "ffi_call"})
"""They have no derivative in any mode. Read by ``_legality``."""

# ---- linear in the operands ----------------------------------------------------------------------------------------

ADDITIONS = frozenset({"add", "add_any", "sub"})
"""Entrywise; linear in both operands together. A shift of one operand shifts the output alike (``sub``: or negated)."""

ORDER_KEEPING = frozenset({"broadcast_in_dim", "copy", "reshape", "squeeze"})
"""One operand, whose entries are all kept, in row-major order wherever the number of entries stays.

Precondition for ``reshape``: no ``dimensions``, as after ``_jaxprs.inline``.
"""

COPIES = frozenset({"convert_element_type", "copy", "copy_p"})
"""The identity up to rounding, between real numbers. Read by ``_views``, which tests the dtypes."""

POINT_PRESERVING = ADDITIONS | ORDER_KEEPING
"""Shifting an operand shifts the output entry by entry, in the same order, where the number of entries stays.

Read by ``transforms._tap_hessian``, which excludes the second operand of ``sub``.
"""

LINEAR_UNARY = ORDER_KEEPING | {"transpose", "neg", "convert_element_type", "reduce_sum"}
"""Linear in their one operand if operand and output are floating: rounding to integers is not linear.

Read by ``_mean_structure``, which tests the dtypes.
"""

LINEAR = ADDITIONS | LINEAR_UNARY
"""Linear in all operands together, under the same condition.

Read by ``_legality``, to save a trial transposition, and by ``operators._mixing``.
"""

BILINEAR = frozenset({"mul", "dot_general", CONVOLUTION})
"""Two operands; linear in either one with the other fixed.

Read by ``_legality``, to save a trial transposition, and by ``_jets``, for the second derivative of a product.
"""

# ---- entry by entry ------------------------------------------------------------------------------------------------

LINEAR_ENTRYWISE = ADDITIONS | {"neg", "copy", "convert_element_type", "select_n"}
"""Entrywise, and linear in the operands that carry derivatives.

Their derivative is another equation of the kind, which costs less than a product with slopes of one. Read by ``_jets``.
"""

ENTRYWISE = LINEAR_ENTRYWISE | {
    "abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh", "cbrt", "ceil", "clamp", "cos", "cosh",
    "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt", "integer_pow",
    "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "not", "or", "pow",
    "rem", "round", "rsqrt", "sign", "sin", "sinh", "sqrt", "square", "stop_gradient", "tan", "tanh", "xor",
}  # fmt: skip
"""Each entry of the output is computed from the same entry of the operands, or from operands that are scalars.

Read by ``_batch_axis`` and ``_pushforward``.
"""

# ---- finite values and derivatives (read by _finiteness) -------------------------------------------------------------

SELECTIONS = ORDER_KEEPING | {
    "convert_element_type", "dynamic_slice", "expand_dims", "pcast", "pvary", "reduce_max", "reduce_min",
    "reduce_precision", "rev", "slice", "stop_gradient", "transpose",
}  # fmt: skip
"""Each entry of the output is an entry of the first operand, up to rounding, and so within its range."""

SMOOTH = SELECTIONS | ADDITIONS | {
    "abs", "asinh", "atan", "ceil", "clamp", "concatenate", "cos", "cumsum", "dot_general", "dynamic_update_slice",
    "erf", "erfc", "floor", "gather", "iota", "logistic", "max", "min", "mul", "neg", "pad", "psum", "psum_invariant",
    "reduce_sum", "round", "scatter", "scatter-add", "select_n", "sign", "sin", "split", "square", "tanh",
}  # fmt: skip
"""Values and derivatives are finite at all finite operands, short of overflow of sums and products."""

SMOOTH_AWAY_FROM_ZERO = {"div": 1, "log": 0, "sqrt": 0, "rsqrt": 0, "pow": 0}
"""Smooth where the operand of the given number stays above zero; a division also where it stays below."""

PASS_INFINITY = frozenset({"max", "min", "reduce_max", "reduce_min"})
"""An infinite literal among their operands leaves values and derivatives finite."""
