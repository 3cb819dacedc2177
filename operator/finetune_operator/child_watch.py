"""Follow Kubernetes Jobs and pods of FineTuneJobs by label-selected watches, a thread for each kind and namespace."""

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from finetune_operator.child_cache import Body, ChildCache

log = logging.getLogger(__name__)


class Watcher(Protocol):
    """The part of Cluster that is used here."""

    def watch(self, kind: Any, namespace: str | None) -> Iterator[tuple[str, Body]]: ...


class ChildWatch:
    """One thread that lists and watches one kind in one namespace (None: all), for ever."""

    def __init__(self, cluster: Watcher, children: ChildCache, kind: str, namespace: str | None) -> None:
        self.name = f"watch of {kind}" + (f" in {namespace}" if namespace else "")
        self.listed = threading.Event()
        self.last_activity_s = time.monotonic()
        self._cluster, self._children, self._kind, self._namespace = cluster, children, kind, namespace
        self._stop = threading.Event()

    def run(self, retry: tuple[type[Exception], ...]) -> None:
        """Until `stop`. Errors of the kinds in `retry` lead to a new list after 1 to 30 s."""
        delay_s = 1.0
        while not self._stop.is_set():
            try:
                self._cycle()
                delay_s = 1.0
            except retry as error:
                log.warning("%s: %s; listing again in %.0f s", self.name, error, delay_s)
                self._stop.wait(delay_s)
                delay_s = min(30.0, delay_s * 2)

    def stop(self) -> None:
        """The thread ends at the next event or when the server ends the watch; it is a daemon thread."""
        self._stop.set()

    def _cycle(self) -> None:
        listed: set[str] = set()
        for event, body in self._cluster.watch(self._kind, self._namespace):
            self.last_activity_s = time.monotonic()
            if self._stop.is_set():
                return
            if event == "ITEM":  # taken one by one: thousands of whole pods would not fit into the memory
                listed.add(str((body.get("metadata") or {}).get("uid")))
                self._children.take(self._kind, "MODIFIED", body)
            elif event == "LISTED":
                self._children.keep_only(self._kind, self._namespace, listed)
                self.listed.set()
            elif event != "BOOKMARK":
                self._children.take(self._kind, event, body)
