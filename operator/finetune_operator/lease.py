"""One operator at a time. The lease is only a guard: deterministic names keep even two from doing harm."""

import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune_operator.cluster import ApiError, UnreachableError

log = logging.getLogger(__name__)

LEASE_NAME = "finetune-operator"
Body = dict[str, Any]


class LeaseApi(Protocol):
    """The part of Cluster that is used here."""

    def get(self, kind: Any, namespace: str, name: str) -> Body | None: ...
    def create(self, kind: Any, body: Body) -> Body: ...
    def replace_lease(self, body: Body) -> Body: ...


class Lease:
    """Held while it is renewed. Another's lease is dead when it did not change for its own duration, measured by
    our own monotonic clock: clocks of two nodes are never compared."""

    def __init__(
        self,
        api: LeaseApi,
        namespace: str,
        identity: str,
        duration_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api, self._namespace, self._identity, self._duration_s = api, namespace, identity, duration_s
        self._clock = clock
        self._seen: tuple[str, float] = ("", clock())  # version of another's lease and since when it is that
        self._renewed_at = 0.0
        self._stop = threading.Event()

    def try_acquire(self) -> bool:
        """One attempt to take or renew it. Raises UnreachableError, and ApiError but for a lost race."""
        asked_at = self._clock()  # others may count from then on, however late the answer comes
        found = self._api.get("leases", self._namespace, LEASE_NAME)
        try:
            if found is None:
                self._api.create("leases", self._body({}, {}))
            elif self._is_free(found):
                self._api.replace_lease(self._body(found["metadata"], found.get("spec") or {}))
            else:
                return False
        except ApiError as error:
            if error.status == 409:
                return False
            raise
        self._renewed_at = asked_at
        return True

    def acquire(self) -> bool:
        """Wait until it is ours; False if `stop` came first."""
        waiting = False
        while not self._stop.is_set():
            try:
                if self.try_acquire():
                    log.info("holding the lease as %s", self._identity)
                    return True
                if not waiting:
                    log.info("waiting for the lease of another operator")
                waiting = True
            except (ApiError, UnreachableError) as error:
                log.warning("no lease yet: %s", error)
            self._stop.wait(min(2.0, self._duration_s / 5))
        return False

    def hold(self, lost: Callable[[], None]) -> None:
        """Renew every third of the duration until `stop`; call `lost` when it is, or may be, another's."""
        while not self._stop.wait(self._duration_s / 3):
            try:
                if not self.try_acquire():
                    lost()
                    return
            except (ApiError, UnreachableError) as error:
                log.warning("the lease was not renewed: %s", error)
                if self._clock() - self._renewed_at > self._duration_s * 0.8:
                    lost()
                    return

    def age_s(self) -> float:
        """Seconds since it was taken or renewed."""
        return self._clock() - self._renewed_at

    def stop(self) -> None:
        self._stop.set()

    def release(self) -> None:
        """Let the next operator start at once."""
        try:
            found = self._api.get("leases", self._namespace, LEASE_NAME)
            if found is not None and (found.get("spec") or {}).get("holderIdentity") == self._identity:
                found["spec"]["holderIdentity"] = ""
                self._api.replace_lease(found)
        except (ApiError, UnreachableError) as error:
            log.warning("the lease was not released: %s", error)

    def _is_free(self, found: Body) -> bool:
        spec = found.get("spec") or {}
        holder = spec.get("holderIdentity") or ""
        if holder in ("", self._identity):
            return True
        version = str(found["metadata"].get("resourceVersion"))
        if version != self._seen[0]:
            self._seen = (version, self._clock())
        duration_s = float(spec.get("leaseDurationSeconds") or self._duration_s)
        return self._clock() - self._seen[1] > duration_s

    def _body(self, meta: Body, spec: Body) -> Body:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        mine = spec.get("holderIdentity") == self._identity
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": LEASE_NAME, "namespace": self._namespace, **meta},
            "spec": {
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, round(self._duration_s)),
                "acquireTime": spec.get("acquireTime", now) if mine else now,
                "renewTime": now,
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (not mine),
            },
        }
