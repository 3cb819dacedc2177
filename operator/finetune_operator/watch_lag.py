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
        self._missed: dict[str, tuple[int, float]] = {}  # UID → generation that was listed but not told, since when
        self._heard_s = clock()

    def heard(self, uid: str, generation: int) -> None:
        with self._lock:
            self._told[uid] = max(generation, self._told.get(uid, 0))
            self._recent.add(uid)
            self._heard_s = self._clock()
            if uid in self._missed and self._missed[uid][0] <= generation:
                del self._missed[uid]

    def listed(self, generations: Mapping[str, int]) -> None:
        """All FineTuneJobs that there are, by UID."""
        with self._lock:
            now = self._clock()
            behind = {uid: number for uid, number in generations.items() if self._told.get(uid, -1) < number}
            self._missed = {uid: self._missed.get(uid, (number, now)) for uid, number in behind.items()}
            self._told = {uid: n for uid, n in self._told.items() if uid in generations or uid in self._recent}
            self._recent = set()

    def excuse(self) -> None:
        """The server lets nobody hear now: what was missed until then counts from the next list on."""
        with self._lock:
            self._missed = {}

    def lag_s(self) -> float:
        """Return for how long nothing has come through the watch, while a list showed what should have.

        A watch that tells one of thousands of objects after the other is not deaf to the last of them."""
        with self._lock:
            now = self._clock()
            missed_s = max((now - since for _, since in self._missed.values()), default=0.0)
            return min(missed_s, now - self._heard_s)
