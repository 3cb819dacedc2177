"""What stands in for fields that a job leaves out: each default once, for the code and for the field's own text."""

from typing import TypeVar

T = TypeVar("T")

MAX_RETRIES = 3
MAX_DISRUPTIONS = 20
PROGRESS_DEADLINE_S = 1800


def given(value: T | None, default: T) -> T:
    """Return the value where the job gives one, 0 and false included, else the default."""
    return default if value is None else value
