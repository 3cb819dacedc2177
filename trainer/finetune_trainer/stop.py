"""A request to stop, and how much time is left to obey it."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

# Before Kubernetes kills the container, the supervisor kills the trainer, so that it can still report.
_REPORT_S = 10.0
# Before the supervisor kills it, the trainer has to be done, so that it can still exit by itself.
_EXIT_S = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def hold() -> None:
    """Keep requests to stop waiting until `release`, also for the processes that are started meanwhile.

    As PID 1 a process loses every signal it has neither a handler for nor blocked: whoever imports for a second or
    more begins with this."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def release() -> None:
    """Let requests to stop come, those that waited first; only in the main thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


def kill_after_s(grace_period_s: float) -> float:
    """Seconds after SIGTERM at which the supervisor kills the trainer."""
    return max(grace_period_s - _REPORT_S, grace_period_s / 2)


def done_after_s(grace_period_s: float) -> float:
    """Seconds after SIGTERM at which the trainer has to be done."""
    return max(kill_after_s(grace_period_s) - _EXIT_S, grace_period_s / 4)


class StopFlag:
    """Set by SIGTERM or SIGINT. A second SIGINT interrupts at once, for people at a terminal."""

    def __init__(self, grace_period_s: float, clock: Callable[[], float] | None = None) -> None:
        self._grace_period_s = grace_period_s
        self._clock = clock or time.monotonic
        self._event = threading.Event()
        self._deadline_s: float | None = None

    def install(self) -> None:
        """Take over the signals; only in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def set(self, now_s: float | None = None) -> None:
        """Ask to stop; the deadline counts from the first request. `now_s` is monotonic."""
        if self._deadline_s is None:
            now_s = self._clock() if now_s is None else now_s
            self._deadline_s = now_s + done_after_s(self._grace_period_s)
        self._event.set()

    def is_set(self) -> bool:
        return self._event.is_set()

    @property
    def deadline_s(self) -> float | None:
        """Monotonic time by which the work has to be safe; None while nobody asked to stop."""
        return self._deadline_s

    def remaining_s(self) -> float:
        """Seconds until the deadline, not below 0; infinite while nobody asked to stop."""
        return float("inf") if self._deadline_s is None else max(0.0, self._deadline_s - self._clock())

    def leaves(self, seconds: float) -> bool:
        """Return whether work of `seconds` fits before the deadline; half of the time left is kept for saving it."""
        return seconds <= self.remaining_s() / 2

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.is_set():
            raise KeyboardInterrupt
        self.set()
