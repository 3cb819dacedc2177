"""One operator at a time. The lease is only a guard: deterministic names keep even two from doing harm."""

import logging
import math
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune_operator.cluster import ApiError, UnreachableError, brief

log = logging.getLogger(__name__)

Body = dict[str, Any]

VALID = 0.8  # of the duration, for which a lease may be acted on after it was asked for
CALL = 0.4  # of the duration: one call, and the wait before it, end within VALID
PATIENCE = 2.0  # durations for which an operator without a word of the lease still counts as ready
RELEASE_WAIT_S = 3.0
MAX_NAME = 64


class LeaseApi(Protocol):
    """The part of Cluster that is used here."""

    def read_lease(self, namespace: str, name: str, timeout_s: float) -> Body | None: ...
    def write_lease(self, body: Body, timeout_s: float) -> Body: ...


class Lease:
    """Held while it is renewed. Another's lease is dead when it did not change for its own duration, measured by
    our own monotonic clock: clocks of two nodes are never compared.

    Thread-safe. Ours counts from before it was asked for, however late the answer comes."""

    def __init__(
        self,
        api: LeaseApi,
        namespace: str,
        name: str,
        identity: str,
        duration_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._namespace, self._name, self._identity = api, namespace, name, identity
        self._duration_s, self._clock = duration_s, clock
        self._lock = threading.Lock()  # one call at a time: nothing is renewed once it is given back
        self._stored: Body | None = None  # ours, as the server last gave it
        self._seen: tuple[str, float] = ("", clock())  # version of another's lease and since when it is that
        self._holder = ""  # another
        self._renewed_at = float("-inf")
        self._well_at = clock()  # when it was last ours, or held by another who lives
        self._trouble = "was not asked for"
        self._stop, self._lost = threading.Event(), threading.Event()

    def try_acquire(self) -> bool:
        """One attempt to take or renew it; whether it may be acted on. Raises UnreachableError or ApiError."""
        with self._lock:
            if self._stop.is_set():
                return False
            asked_at = self._clock()  # others may count from then on
            try:
                stored = self._renew() or self._take()
            except (ApiError, UnreachableError) as error:
                self._trouble = brief(error)
                raise
            if stored is None:
                return False
            self._stored, self._renewed_at, self._holder = stored, asked_at, ""
            if not self.is_valid():
                self._trouble = f"answers take {self.age_s():.0f} s"
                return False
            self._well_at = self._clock()
            return True

    def acquire(self) -> bool:
        """Wait until it is ours; False if `stop` came first."""
        told = ""
        while not self._stop.is_set():
            try:
                if self.try_acquire():
                    log.info("holding the lease as %s", self._identity)
                    return True
                words = "waiting for the lease of another operator" if self._holder else f"no lease: {self._trouble}"
            except (ApiError, UnreachableError) as error:
                words = f"no lease yet: {error}"
            if words != told:
                log.info("%s", words)
            told = words
            self._stop.wait(min(2.0, self._duration_s / 5))
        return False

    def hold(self, lost: Callable[[], None]) -> None:
        """Renew until `stop`; call `lost` when it is, or may be, another's.

        Two threads: however long a call hangs, `lost` comes in time."""
        threading.Thread(target=self._renew_for_ever, name="lease-renewal", daemon=True).start()
        while not self._stop.wait(min(0.5, self._duration_s / 20)):
            if self._lost.is_set() or not self.is_valid():
                self._stop.set()
                lost()
                return

    def is_valid(self) -> bool:
        return self.age_s() <= VALID * self._duration_s

    def age_s(self) -> float:
        """Seconds since it was taken or renewed, counted from the question; infinite when it never was."""
        return self._clock() - self._renewed_at

    def problem(self) -> str | None:
        """Why this operator neither holds it nor waits for another who lives, once that lasts; else None."""
        silent_s = self._clock() - self._well_at
        if silent_s <= PATIENCE * self._duration_s:
            return None
        return f"{self._place()}: {self._trouble}, neither ours nor another's for {silent_s:.0f} s"

    def note(self) -> str:
        """Who holds it, in words."""
        if self._holder:
            name = "".join(c if c.isprintable() else "_" for c in self._holder[:MAX_NAME])
            return f"{self._place()}: held by {name}, this operator waits"
        if self._stored is None:
            return f"{self._place()}: not ours yet, {self._trouble}"
        return f"{self._place()}: held by this operator, renewed {self.age_s():.0f} s ago"

    def stop(self) -> None:
        self._stop.set()

    def release(self) -> None:
        """Let the next operator start at once. To be called after `stop`, once nothing acts on it any more."""
        if not self._lock.acquire(timeout=RELEASE_WAIT_S):
            log.warning("the lease was not released: it is being renewed")
            return
        try:
            if self._stored is not None:
                body = {**self._stored, "spec": {**self._stored["spec"], "holderIdentity": ""}}
                self._stored = None
                self._api.write_lease(body, RELEASE_WAIT_S)
        except (ApiError, UnreachableError) as error:
            log.warning("the lease was not released: %s", error)
        finally:
            self._lock.release()

    def _renew_for_ever(self) -> None:
        wait_s = self._duration_s / 3
        while not self._stop.wait(wait_s):
            begun_at = self._clock()
            try:
                if not self.try_acquire():
                    self._lost.set()
                    return
                wait_s = max(0.0, self._duration_s / 3 - (self._clock() - begun_at))
            except (ApiError, UnreachableError) as error:
                log.warning("the lease was not renewed: %s", error)
                wait_s = self._duration_s / 15

    def _renew(self) -> Body | None:
        """Write ours with the version that we know; None when we have none, or it is that no more."""
        if self._stored is None:
            return None
        try:
            return self._write(self._stored)
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            self._stored = None
            return None

    def _take(self) -> Body | None:
        """Read it, and write it where it is free; None where it is another's, or another was faster."""
        found = self._api.read_lease(self._namespace, self._name, self._timeout_s())
        if found is not None and not self._is_free(found):
            return None
        try:
            return self._write(found or {})
        except ApiError as error:
            if error.status != 409:
                raise
            self._trouble = brief(error)
            return None

    def _is_free(self, found: Body) -> bool:
        spec = found.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if holder in ("", self._identity):
            return True
        version = str(found["metadata"].get("resourceVersion"))
        if version != self._seen[0]:
            self._seen = (version, self._clock())
        duration_s = float(spec.get("leaseDurationSeconds") or self._duration_s)
        if self._clock() - self._seen[1] > duration_s:
            return True
        self._holder, self._well_at = str(holder), self._clock()
        return False

    def _write(self, found: Body) -> Body:
        spec: Body = found.get("spec") or {}
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = spec.get("holderIdentity") == self._identity
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name, "namespace": self._namespace, **(found.get("metadata") or {})},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": math.ceil(self._duration_s),
                "acquireTime": spec.get("acquireTime", now) if mine else now,
                "renewTime": now,
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (not mine),
            },
        }
        return self._api.write_lease(body, self._timeout_s())

    def _timeout_s(self) -> float:
        return CALL * self._duration_s

    def _place(self) -> str:
        return f"lease {self._namespace}/{self._name}"
