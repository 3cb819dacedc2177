"""Signals for a test and the processes that it starts, as if somebody else had started pytest."""

import signal
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType

Handler = Callable[[int, FrameType | None], object] | signal.Handlers


@contextmanager
def disposition(number: signal.Signals, handler: Handler) -> Generator[None]:
    """Handle a signal in this way for a while.

    pytest may have been started with signals ignored (`nohup`, `&` in a script, many CI systems), and so is what a test
    starts. A process that is started while a Python function handles the signal has the default again.
    """
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)
