"""One watched namespace, or the whole cluster: its watches, its jobs and what is wrong there.

Each stands alone. A namespace that was deleted, or that the operator may not read, costs the others nothing.
"""

import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from finetune_operator.child_cache import ChildCache, Key, Owner
from finetune_operator.cluster import ApiError, Cluster, UnreachableError
from finetune_operator.finished_jobs import FinishedJobs
from finetune_operator.metrics import Metrics
from finetune_operator.object_watch import ObjectWatch, ReadTrouble
from finetune_operator.watch_lag import WatchLag

WHOLE_CLUSTER = "*"  # of a label: no namespace is called so
REFUSED = (403, 404)  # as of a namespace whose Role is gone; 404 where the CRD is gone
GONE_S = 600.0
PROBE_AFTER_S = 50.0  # of lag; with the longest interval of the resync still below health.STALL_S


@dataclass(frozen=True)
class Listed:
    """What one list of its unfinished FineTuneJobs showed."""

    unfinished: dict[Owner, Key] = field(default_factory=dict[Owner, Key])
    versions: dict[Key, str] = field(default_factory=dict[Key, str])
    generations: dict[str, int] = field(default_factory=dict[str, int])
    phases: dict[Owner, str] = field(default_factory=dict[Owner, str])


class Scope:
    """`start` follows its Kubernetes Jobs, pods and finished FineTuneJobs; the engine lists its other FineTuneJobs and
    tells what came of it."""

    def __init__(
        self,
        namespace: str | None,
        *,
        cluster: Cluster,
        children: ChildCache,
        finished: FinishedJobs,
        metrics: Metrics,
        on_listed: Callable[[], None],
    ) -> None:
        self.namespace, self.finished = namespace, finished
        self.watch_lag = WatchLag()
        self.names: dict[Owner, Key] = {}  # of unfinished jobs, from the last list and from events
        self._heard: dict[Owner, Key] = {}  # since the list began that goes on or was the last
        self._names_lock = threading.Lock()
        self._phases: dict[Owner, str] = {}  # of unfinished jobs, from the last list
        self.resync_due_s = 0.0  # monotonic
        self.resync_wanted = False  # out of turn: rounds were put off until its Jobs and pods are known
        self.resynced_at_s: float | None = None  # Unix
        self.closed = False  # the server refuses to list its FineTuneJobs: no round is begun
        self._cluster, self._on_listed = cluster, on_listed
        self._trouble: ReadTrouble | None = None
        self._jobs, self._pods = (
            ObjectWatch(cluster, children, "jobs", namespace, self._listed),
            ObjectWatch(cluster, children, "pods", namespace, self._listed),
        )
        self._finished = ObjectWatch(cluster, finished, "finished_finetunejobs", namespace, self._listed)
        self.watches = (self._jobs, self._pods, self._finished)
        label = namespace or WHOLE_CLUSTER
        for watch in self.watches:
            metrics.watch_trouble.labels(watch.kind, label).set_function(lambda w=watch: float(w.trouble is not None))
        metrics.watch_trouble.labels("finetunejobs", label).set_function(lambda: float(self._trouble is not None))

    def start(self) -> list[threading.Thread]:
        threads = [threading.Thread(target=watch.run, name=watch.name, daemon=True) for watch in self.watches]
        for thread in threads:
            thread.start()
        return threads

    def stop(self) -> None:
        for watch in self.watches:
            watch.stop()

    @property
    def listed(self) -> bool:
        """Whether its Kubernetes Jobs and pods are known: without them every job would look as if it had none."""
        return self._jobs.listed.is_set() and self._pods.listed.is_set()

    @property
    def finished_listed(self) -> bool:
        """Whether its finished FineTuneJobs are known."""
        return self._finished.listed.is_set()

    def hear(self, owner: Owner, key: Key) -> None:
        """A watch told of an unfinished job."""
        with self._names_lock:
            self.names[owner] = self._heard[owner] = key

    def begin_list(self) -> None:
        with self._names_lock:
            self._heard = {}

    def take_list(self, found: Listed, now_s: float) -> None:
        """Take what was listed since `begin_list`, beside the jobs that were heard of since: it may lack them."""
        with self._names_lock:
            self.names = found.unfinished | self._heard
        self._phases, self.closed, self.resynced_at_s = found.phases, False, now_s
        self.watch_lag.listed(found.generations)
        self._trouble = self._deafness()

    def take_failure(self, error: ApiError | UnreachableError) -> bool:
        """The list failed; whether that is news."""
        before, self._trouble = self._trouble, ReadTrouble.after(self._trouble, error)
        self.watch_lag.excuse()
        if isinstance(error, ApiError) and error.status in REFUSED:
            self.closed, self._phases = True, {}
        return before is None or before.words != self._trouble.words

    def count_phases(self) -> Counter[str]:
        """Count its jobs by phase, each once: one of the last list may have finished since."""
        unfinished = Counter(phase for owner, phase in self._phases.items() if owner not in self.finished)
        return unfinished + self.finished.phases()

    def is_gone(self) -> bool:
        """Whether it has been refused for so long that it is taken for deleted, with its jobs."""
        return self.closed and self._trouble is not None and time.monotonic() - self._trouble.since_s > GONE_S

    def well(self) -> bool:
        """Whether its FineTuneJobs could be listed and watched when that was last tried."""
        return self._trouble is None

    def troubles(self) -> dict[str, ReadTrouble]:
        """By kind of object."""
        found = {watch.kind: watch.trouble for watch in self.watches} | {"finetunejobs": self._trouble}
        return {kind: trouble for kind, trouble in found.items() if trouble is not None}

    def notes(self) -> list[str]:
        """Return what cannot be read, in words."""
        place = f"namespace {self.namespace}" if self.namespace else "cluster"
        now_s = time.monotonic()
        troubles = sorted(self.troubles().items())
        notes = [f"{place}: {kind}: {each.words}, for {now_s - each.since_s:.0f} s" for kind, each in troubles]
        return notes if notes or self.listed else [f"{place}: its Jobs and pods are being listed for the first time"]

    def ages_s(self) -> dict[str, float]:
        """Seconds since each of its activities made progress."""
        now_s = time.monotonic()
        place = f" in {self.namespace}" if self.namespace else ""
        ages_s = {watch.name: now_s - watch.last_activity_s for watch in self.watches}
        return {**ages_s, f"watch of finetunejobs{place}": self.watch_lag.lag_s()}

    def _listed(self) -> None:
        if self.listed:
            self.resync_wanted = True
            self._on_listed()

    def _deafness(self) -> ReadTrouble | None:
        """Kopf tells nothing: ask whether the server would let it. What a restart would not mend is no stall."""
        if self._trouble is None and self.watch_lag.lag_s() < PROBE_AFTER_S:
            return None
        try:
            self._cluster.try_watch(self.namespace)
        except (ApiError, UnreachableError) as error:
            self.watch_lag.excuse()
            return ReadTrouble.after(self._trouble, error)
        return None
