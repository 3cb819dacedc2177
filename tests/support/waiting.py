"""Waits on a condition itself, and for so long that only what never comes is missed."""

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

PATIENCE_S = 250.0  # for what takes seconds on an idle machine


def until(check: Callable[[], T | None], what: str, timeout_s: float = PATIENCE_S, poll_s: float = 0.02) -> T:
    """Return the first truthy answer of `check`. Raises AssertionError when it has none within `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := check()):
        assert time.monotonic() < deadline_s, f"{what}: not within {timeout_s:.0f} s"
        time.sleep(poll_s)
    return found
