"""The work queue: each key at most once in it and at most once in work, with delays and back-off per key."""

import heapq
import random
import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)

MIN_BACKOFF_S = 1.0
MAX_BACKOFF_S = 60.0
MAX_STALE = 64
ROUND_LIMIT_S = 1800.0  # more than the slowest answers to all requests of a round take together


@dataclass
class _Round:
    begun_s: float
    moved_s: float


class WorkQueue(Generic[Key]):
    """Thread-safe. A key put while it is in work is handed out again after `done`; nothing is lost or doubled."""

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, jitter: Callable[[], float] = random.random
    ) -> None:
        """`clock`: monotonic seconds. `jitter`: uniform in [0, 1)."""
        self._clock = clock
        self._jitter = jitter
        self._changed = threading.Condition()
        self._due: dict[Key, float] = {}  # when each waiting key is due
        self._heap: list[tuple[float, int, Key]] = []  # the same by time; entries that _due contradicts are stale
        self._working: dict[Key, _Round] = {}
        self._again: dict[Key, float] = {}  # put while in work
        self._failures: dict[Key, int] = {}
        self._count = 0
        self._moved_s = clock()  # when a key was last taken, or a round came one step further
        self._closed = False

    def put(self, key: Key, delay_s: float = 0.0) -> None:
        """Ask for one more round of `key`; the earlier of two requests counts. A delay below zero puts it before keys
        that are due for a shorter time than that."""
        with self._changed:
            self._put(key, self._clock() + delay_s)

    def get(self) -> Key | None:
        """The next key that is due, when it is; None once closed. The caller owes `done` or `retry`."""
        with self._changed:
            while not self._closed:
                now = self._clock()
                key = self._pop(now)
                if key is not None:
                    self._working[key] = _Round(now, now)
                    self._moved_s = now
                    return key
                wait_s = self._heap[0][0] - now if self._heap else None
                self._changed.wait(None if wait_s is None else max(0.0, wait_s))
            return None

    def moved(self, key: Key) -> None:
        """The round of `key` came one step further, as an answer to one of its requests has arrived."""
        with self._changed:
            now = self._clock()
            if key in self._working:
                self._working[key].moved_s = now
                self._moved_s = now

    def is_in_work(self, key: Key) -> bool:
        with self._changed:
            return key in self._working

    def done(self, key: Key) -> None:
        """The round went well."""
        with self._changed:
            self._failures.pop(key, None)
            self._leave(key)

    def retry(self, key: Key, at_least_s: float = 0.0) -> float:
        """The round failed: once more after 1, 2, 4 … 60 s, half of it by chance. Gives the seconds."""
        with self._changed:
            count = self._failures.get(key, 0)
            self._failures[key] = count + 1
            backoff_s = min(MAX_BACKOFF_S, MIN_BACKOFF_S * 2 ** min(count, 16))
            delay_s = max(at_least_s, backoff_s * (0.5 + 0.5 * self._jitter()))
            self._again[key] = min(self._again.get(key, float("inf")), self._clock() + delay_s)
            self._leave(key)
            return delay_s

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def depth(self) -> int:
        """Keys that are due or in work."""
        with self._changed:
            now = self._clock()
            return sum(1 for due in self._due.values() if due <= now) + len(self._working)

    def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until no round is in work, at most so long; whether none is. To be called after `close`."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._working, timeout_s)

    def stuck_s(self) -> float:
        """Return for how many seconds nothing has moved: in a round in work, or with keys due that nobody takes.

        A long queue and a slow round are no standstill as long as keys are taken and requests answered."""
        with self._changed:
            now = self._clock()
            rounds = [now - work.moved_s for work in self._working.values()]
            endless = [now - work.begun_s for work in self._working.values() if now - work.begun_s > ROUND_LIMIT_S]
            due = min(self._due.values(), default=now)
            return max([0.0, *rounds, *endless, now - max(due, self._moved_s)])

    def _put(self, key: Key, due: float) -> None:
        if key in self._working:
            self._again[key] = min(due, self._again.get(key, float("inf")))
            return
        if due >= self._due.get(key, float("inf")):
            return
        self._due[key] = due
        self._count += 1
        heapq.heappush(self._heap, (due, self._count, key))
        if len(self._heap) > 2 * len(self._due) + MAX_STALE:
            # A far date that is asked for anew in every round would leave an entry behind each time.
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)
        self._changed.notify()

    def _pop(self, now: float) -> Key | None:
        while self._heap:
            due, _, key = self._heap[0]
            if self._due.get(key) != due:
                heapq.heappop(self._heap)
                continue
            if due > now:
                return None
            heapq.heappop(self._heap)
            del self._due[key]
            return key
        return None

    def _leave(self, key: Key) -> None:
        self._working.pop(key, None)
        again = self._again.pop(key, None)
        if again is not None:
            self._put(key, again)
        if self._closed and not self._working:
            self._changed.notify_all()
