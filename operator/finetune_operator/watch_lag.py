"""Notice when Kopf tells no more of FineTuneJobs: a watch that has gone deaf looks like a quiet cluster."""

import threading
import time
from collections.abc import Callable, Mapping


class WatchLag:
    """Thread-safe. Compares what the watch has told with what the resync lists; generations count, status writes
    do not."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._told: dict[str, int] = {}  # UID → newest generation
        self._recent: set[str] = set()  # told since the last list, which may not know them yet
        self._missed: dict[str, int] = {}  # UID → generation that was listed but not told
        self._missed_since_s: float | None = None  # since when every list has shown something of the kind
        self._heard_s = clock()

    def heard(self, uid: str, generation: int) -> None:
        with self._lock:
            self._told[uid] = max(generation, self._told.get(uid, 0))
            self._recent.add(uid)
            self._heard_s = self._clock()
            if self._missed.get(uid, generation + 1) <= generation:
                del self._missed[uid]
            if not self._missed:
                self._missed_since_s = None

    def listed(self, generations: Mapping[str, int]) -> None:
        """All FineTuneJobs that there are, by UID."""
        with self._lock:
            self._missed = {uid: number for uid, number in generations.items() if self._told.get(uid, -1) < number}
            if not self._missed:
                self._missed_since_s = None
            elif self._missed_since_s is None:
                self._missed_since_s = self._clock()
            self._told = {uid: n for uid, n in self._told.items() if uid in generations or uid in self._recent}
            self._recent = set()

    def excuse(self) -> None:
        """The server lets nobody hear now: what was missed until then counts from the next list on."""
        with self._lock:
            self._missed, self._missed_since_s = {}, None

    def lag_s(self) -> float:
        """Return for how long nothing has come through the watch, while every list showed what should have.

        Of which jobs does not matter, as none may live for long. A watch that tells one of thousands of objects after
        the other is not deaf to the last of them."""
        with self._lock:
            if self._missed_since_s is None:
                return 0.0
            now_s = self._clock()
            return min(now_s - self._missed_since_s, now_s - self._heard_s)
