"""Every error that a user's input can raise, worded in one place.

Form: the public function, the path of the leaf, what came, what was expected, the remedy. All are raised while
tracing, before any computation.
"""

from curvature._checks._batches import UNMAPPED, check_batch, check_lanes, check_prefix, is_none
from curvature._checks._functions import (
    check_aux_output,
    check_callable,
    check_floating_output,
    check_scalar_output,
    illegal_mode,
    no_legal_mode,
)
from curvature._checks._options import (
    check_argnums,
    check_blocks,
    check_choice,
    check_chunk_size,
    check_count,
    check_extra,
    check_hessian_used,
    check_method,
    check_nonnegative,
    check_order,
    check_positive,
    require_extra,
)
from curvature._checks._trees import (
    check_concrete,
    check_data,
    check_direction,
    check_entries,
    check_factor,
    check_finite,
    check_hessian,
    check_index_range,
    check_path,
    check_path_pair,
    check_pattern,
    check_point,
    check_same_structure,
)

__all__ = [
    "UNMAPPED",
    "check_argnums",
    "check_aux_output",
    "check_batch",
    "check_blocks",
    "check_callable",
    "check_choice",
    "check_chunk_size",
    "check_concrete",
    "check_count",
    "check_data",
    "check_direction",
    "check_entries",
    "check_extra",
    "check_factor",
    "check_finite",
    "check_floating_output",
    "check_hessian",
    "check_hessian_used",
    "check_index_range",
    "check_lanes",
    "check_method",
    "check_nonnegative",
    "check_order",
    "check_path",
    "check_path_pair",
    "check_pattern",
    "check_point",
    "check_positive",
    "check_prefix",
    "check_same_structure",
    "check_scalar_output",
    "illegal_mode",
    "is_none",
    "no_legal_mode",
    "require_extra",
]
