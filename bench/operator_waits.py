"""How long FineTuneJobs wait for their Kubernetes Jobs, those that never got one included; how far a run is."""

import contextlib
import math
import sys
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

TELL_S = 15.0


def tell(words: str) -> None:
    """Say how far a benchmark is, apart from its table."""
    print(f"{time.strftime('%H:%M:%S', time.gmtime())} {words}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def telling(words: Callable[[], str]) -> Generator[None]:
    """Say how far it is each TELL_S, and at the end."""
    ended = threading.Event()

    def go_on() -> None:
        while not ended.wait(TELL_S):
            tell(words())

    thread = threading.Thread(target=go_on, name="telling", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(TELL_S)
        tell(words())


def wait_until(holds: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until it holds, at most so long; whether it does."""
    deadline_s = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.2)
    return True


@dataclass
class Waits:
    """Seconds from a request to the watch's word that its Kubernetes Job exists; all moments are monotonic."""

    asked_s: dict[str, float] = field(default_factory=dict[str, float])
    seen_s: dict[str, float] = field(default_factory=dict[str, float])
    ended_s: float = math.nan  # when nobody looked any more

    def missing(self) -> int:
        """Count the Kubernetes Jobs that were never seen."""
        return len(self.asked_s.keys() - self.seen_s.keys())

    def percentile(self, percent: int) -> str:
        """Return the wait that so many per cent did not exceed, in seconds; one that did not end is the longest."""
        if not self.asked_s:
            return "-"
        place = max(1, math.ceil(len(self.asked_s) * percent / 100)) - 1
        wait_s = self._sorted_s(math.inf)[place]
        if wait_s < math.inf:
            return f"{wait_s:.2f}"
        return f"more than {self._sorted_s(self.ended_s)[place]:.0f}"

    def _sorted_s(self, ended_s: float) -> list[float]:
        """Return all waits, the shortest first, as if what was never seen was seen at `ended_s`."""
        return sorted(self.seen_s.get(name, ended_s) - asked_s for name, asked_s in self.asked_s.items())
