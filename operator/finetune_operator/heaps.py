"""Bound the heaps of the process: glibc gives threads heaps of their own, and keeps what was once read in each.

In 50 watched namespaces there are 150 threads that each read a list once: with 10,000 finished jobs the operator then
kept 330 MiB, and with two heaps 175 (`python -m bench.operator namespaces`). One thread at a time runs Python, so more
heaps save no waiting.
"""

import ctypes

HEAPS = 2
_M_ARENA_MAX = -8  # of mallopt(3); other C libraries have no such function


def bound_heaps() -> None:
    """Let all threads that begin from now on share HEAPS heaps."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, HEAPS)
