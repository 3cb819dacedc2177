"""What the cluster's events say of Jobs and pods that do not start, read once for all that wait in a namespace.

Events are not in the API server's cache, and a field selector saves it no reading: it goes through all events of the
namespace for each list. A watch of them would cost as much for as long as nothing waits, as they bear no label of ours.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from finetune_operator.cluster import Body
from finetune_operator.pod_waits import TELLING_EVENTS

MAX_AGE_S = 10.0  # of what was read, when it is asked for
MAX_WAIT_S = 10.0  # for what another round reads; rounds that stand still for long make the operator look stuck
_KEPT = ("reason", "message", "lastTimestamp", "eventTime")
MAX_READ = 10_000  # events of a namespace; where there are more, one object's are asked for alone


class Events(Protocol):
    """The part of Cluster that is used here."""

    def list_events(self, namespace: str) -> Iterator[Body]: ...
    def list_events_of(self, namespace: str, uid: str) -> list[Body]: ...


@dataclass
class _Read:
    """The last reading of a namespace. by_uid: None where it has too many events."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    at_s: float = float("-inf")
    by_uid: dict[str, list[Body]] | None = None


class EventReader:
    """Thread-safe. Keeps the telling events of our own children alone, and of namespaces where one waited lately."""

    def __init__(
        self, cluster: Events, is_ours: Callable[[str], bool], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """is_ours: of the UID of a Job or pod."""
        self._cluster, self._is_ours, self._clock = cluster, is_ours, clock
        self._lock = threading.Lock()
        self._reads: dict[str, _Read] = {}

    def of(self, namespace: str, uid: str) -> list[Body]:
        """Return the telling events on one object, at most MAX_AGE_S old. Raises ApiError or UnreachableError."""
        with self._lock:
            now_s = self._clock()
            self._reads = {
                name: read
                for name, read in self._reads.items()
                if name == namespace or read.lock.locked() or now_s - read.at_s <= MAX_AGE_S
            }
            read = self._reads.setdefault(namespace, _Read())
        found = None
        if read.lock.acquire(timeout=MAX_WAIT_S):  # who comes meanwhile takes what this one reads
            try:
                if self._clock() - read.at_s > MAX_AGE_S:
                    begun_s = self._clock()
                    read.by_uid = self._read(namespace)
                    read.at_s = begun_s
                found = read.by_uid
            finally:
                read.lock.release()
        return self._cluster.list_events_of(namespace, uid) if found is None else found.get(uid, [])

    def _read(self, namespace: str) -> dict[str, list[Body]] | None:
        by_uid: defaultdict[str, list[Body]] = defaultdict(list)
        for number, event in enumerate(self._cluster.list_events(namespace)):
            if number >= MAX_READ:
                return None
            uid = str((event.get("involvedObject") or {}).get("uid"))
            if event.get("reason") in TELLING_EVENTS and self._is_ours(uid):
                made = (event.get("metadata") or {}).get("creationTimestamp")
                by_uid[uid].append({key: event.get(key) for key in _KEPT} | {"metadata": {"creationTimestamp": made}})
        return dict(by_uid)
