"""The type checker behind jaxtyping's import hook.

A wrong argument warns, and warnings are errors; only ``test_bad_inputs.py`` lets them pass, to reach our own messages.
"""

from collections.abc import Callable

from beartype import BeartypeConf, beartype


class AnnotationWarning(UserWarning):
    """A value that its annotation does not allow."""


_check = beartype(
    conf=BeartypeConf(violation_type=AnnotationWarning, is_pep484_tower=True)
)  # an int will do as a float


def checked(function: Callable) -> Callable:
    """Check calls of ``function``, unless it is nested: those are made anew in every call, too slow to instrument."""
    return function if "<locals>" in function.__qualname__ else _check(function)
