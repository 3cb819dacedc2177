"""Follow objects of one kind by a watch with a selector, a thread for each kind and namespace."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from finetune_operator.cluster import ApiError, Body, UnreachableError, WatchedKind, brief

log = logging.getLogger(__name__)

MIN_DELAY_S = 1.0
MAX_DELAY_S = 30.0
MAX_EMPTY = 2  # watches in a row that bring nothing, not even a bookmark: then the version may be what is wrong
EXPIRED = 410
PASSING = (429, 500, 502, 503)  # of the server as it is now, not of the version that a watch goes on from


class Watcher(Protocol):
    """The part of Cluster that is used here."""

    def watch(self, kind: WatchedKind, namespace: str | None, version: str | None) -> Iterator[tuple[str, Body]]: ...


class Store(Protocol):
    """What takes the objects."""

    def take(self, kind: WatchedKind, event: str, body: Body, /) -> None:
        """One object of the list (event ITEM), or one event of the watch."""
        ...

    def keep_only(self, kind: WatchedKind, namespace: str | None, listed: set[str], /) -> None:
        """The list is over, and these UIDs are all there are: what is missing was deleted while nobody watched."""
        ...


@dataclass(frozen=True)
class ReadTrouble:
    """What keeps a kind of objects in a namespace from being read: words without text from outside."""

    words: str
    since_s: float  # monotonic

    @staticmethod
    def after(before: "ReadTrouble | None", error: ApiError | UnreachableError) -> "ReadTrouble":
        return ReadTrouble(brief(error), before.since_s if before else time.monotonic())


class ObjectWatch:
    """One thread that lists and watches one kind in one namespace (None: all), for ever.

    A watch that is cut goes on where it was; what the server has forgotten is listed anew."""

    def __init__(
        self,
        cluster: Watcher,
        store: Store,
        kind: WatchedKind,
        namespace: str | None,
        on_listed: Callable[[], None] = lambda: None,
    ) -> None:
        self.kind: WatchedKind = kind
        self.name = f"watch of {kind}" + (f" in {namespace}" if namespace else "")
        self.listed = threading.Event()
        self.last_activity_s = time.monotonic()  # an attempt that fails is one: the thread lives
        self.trouble: ReadTrouble | None = None
        self._cluster, self._store, self._namespace, self._on_listed = cluster, store, namespace, on_listed
        self._stop = threading.Event()
        self._version: str | None = None  # up to which all is known; None: list
        self._delay_s = MIN_DELAY_S
        self._empty = 0
        self._opened_s: float | None = None  # of the watch in this attempt
        self._brought = False

    def run(self) -> None:
        """Until `stop`. What brings nothing is tried again after 1, 2, 4 … 30 s."""
        while not self._stop.is_set():
            self._stop.wait(self.attempt())

    def attempt(self) -> float:
        """List where that is needed, then watch until the watch ends; seconds to wait before the next one."""
        self.last_activity_s = time.monotonic()
        self._opened_s, self._brought, failed = None, False, False
        try:
            self._follow()
        except (ApiError, UnreachableError) as error:
            failed = True
            self._note(error)
        self.last_activity_s = time.monotonic()
        if self._opened_s is not None:
            self._empty = 0 if self._brought else self._empty + 1
            self._brought = self._brought or self.last_activity_s - self._opened_s > MAX_DELAY_S
        if self._empty >= MAX_EMPTY:
            self._empty, self._version = 0, None
        if self._brought:
            self._delay_s = MIN_DELAY_S
            return MIN_DELAY_S if failed else 0.0
        delay_s, self._delay_s = self._delay_s, min(MAX_DELAY_S, self._delay_s * 2)
        return delay_s

    def stop(self) -> None:
        """The thread ends at the next event or when the server ends the watch; it is a daemon thread."""
        self._stop.set()

    def _follow(self) -> None:
        """Raises what `Cluster.watch` raises."""
        listed: set[str] = set()
        for event, body in self._cluster.watch(self.kind, self._namespace, self._version):
            self.last_activity_s = time.monotonic()
            if self._stop.is_set():
                return
            if event == "ITEM":  # taken one by one: thousands of whole pods would not fit into the memory
                listed.add(str((body.get("metadata") or {}).get("uid")))
                self._store.take(self.kind, event, body)
            elif event == "LISTED":
                self._store.keep_only(self.kind, self._namespace, listed)
                self._version = _version(body)
                self.listed.set()
                self._on_listed()
            elif event == "OPENED":
                self._opened_s = time.monotonic()
                self._end_trouble()
            else:
                self._brought, self._version = True, _version(body) or self._version
                if event != "BOOKMARK":
                    self._store.take(self.kind, event, body)

    def _note(self, error: ApiError | UnreachableError) -> None:
        if isinstance(error, ApiError) and error.status not in PASSING:
            self._version = None
        expired = isinstance(error, ApiError) and error.status == EXPIRED
        if expired or self._opened_s is not None:
            log.info("%s: %s; going on", self.name, error)
            return
        if self.trouble is None or self.trouble.words != brief(error):
            log.warning("%s: %s; trying again", self.name, error)
        self.trouble = ReadTrouble.after(self.trouble, error)

    def _end_trouble(self) -> None:
        if self.trouble is not None:
            log.info("%s: can be read again", self.name)
        self.trouble = None


def _version(body: Body) -> str | None:
    return (body.get("metadata") or {}).get("resourceVersion") or None
