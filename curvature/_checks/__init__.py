"""Input checks: everything that a user's input can raise. Callers write ``_checks.check_x``, never ``_checks._file``.

An error names the public function, the path of the leaf, what came, what was expected, and the remedy. Checks run while
tracing, before any computation.
"""

from curvature._checks._functions import check_arrays as check_arrays
from curvature._checks._functions import check_callable as check_callable
from curvature._checks._functions import check_floating_output as check_floating_output
from curvature._checks._functions import check_scalar_output as check_scalar_output
from curvature._checks._methods import check_hessian_used as check_hessian_used
from curvature._checks._methods import check_method as check_method
from curvature._checks._methods import check_pair_of_bounds as check_pair_of_bounds
from curvature._checks._methods import require_data as require_data
from curvature._checks._methods import require_extra as require_extra
from curvature._checks._methods import spelled as spelled
from curvature._checks._operators import check_operator as check_operator
from curvature._checks._operators import check_sampling as check_sampling
from curvature._checks._operators import check_scale as check_scale
from curvature._checks._operators import check_square_operator as check_square_operator
from curvature._checks._operators import check_static_function as check_static_function
from curvature._checks._operators import check_structures as check_structures
from curvature._checks._options import check_blocks as check_blocks
from curvature._checks._options import check_choice as check_choice
from curvature._checks._options import check_chunk_size as check_chunk_size
from curvature._checks._options import check_count as check_count
from curvature._checks._options import check_decay as check_decay
from curvature._checks._options import check_extra as check_extra
from curvature._checks._options import check_key as check_key
from curvature._checks._options import check_nonnegative as check_nonnegative
from curvature._checks._options import check_positive as check_positive
from curvature._checks._options import check_schedule as check_schedule
from curvature._checks._options import check_size as check_size
from curvature._checks._options import check_static_count as check_static_count
from curvature._checks._options import import_extra as import_extra
from curvature._checks._trees import check_batch as check_batch
from curvature._checks._trees import check_concrete as check_concrete
from curvature._checks._trees import check_data as check_data
from curvature._checks._trees import check_direction as check_direction
from curvature._checks._trees import check_entries as check_entries
from curvature._checks._trees import check_examples as check_examples
from curvature._checks._trees import check_point as check_point
from curvature._checks._trees import check_same_structure as check_same_structure
from curvature._checks._trees import check_start as check_start
