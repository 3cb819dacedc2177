"""All threads of the operator: workers, watches, resync, progress, lease. Knows no Kopf."""

import logging
import os
import threading
import time
from collections import Counter

from finetune_operator.child_cache import ChildCache, Key, Owner
from finetune_operator.child_creator import LaterError, RefusedError
from finetune_operator.child_watch import ChildWatch
from finetune_operator.clock import utcnow
from finetune_operator.cluster import ApiError, Cluster, UnreachableError
from finetune_operator.decide import decide
from finetune_operator.health import problems
from finetune_operator.job_reader import is_finished, read_job
from finetune_operator.lease import Lease
from finetune_operator.metrics import Metrics
from finetune_operator.observation import Observation
from finetune_operator.progress import ProgressPuller
from finetune_operator.queue import WorkQueue
from finetune_operator.reconcile import Reconciler
from finetune_operator.runtimes import Runtimes
from finetune_operator.settings import Settings
from finetune_operator.watch_lag import WatchLag

log = logging.getLogger(__name__)

EXIT_LEASE_LOST = 3


class Engine:
    """`start` once the lease is to be taken, `put` for every FineTuneJob that may have changed, `stop` at the end."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises SettingsError when the runtimes file cannot be used."""
        self._settings, self._metrics = settings, metrics
        self._queue: WorkQueue[Key] = WorkQueue()
        scopes: tuple[str | None, ...] = settings.watch_namespaces or (None,)
        self._scopes = scopes
        cluster = Cluster(metrics, pool_size=settings.workers + 2 * len(scopes) + 4)
        self._cluster = cluster
        self._children = ChildCache(self._queue.put)
        self._progress = ProgressPuller(self._children, metrics, self._look_at, utcnow)
        self._watches = [ChildWatch(cluster, self._children, kind, ns) for kind in ("jobs", "pods") for ns in scopes]
        runtimes = Runtimes(settings.runtimes_file)
        self._reconciler = Reconciler(cluster, self._children, self._progress, runtimes, metrics, utcnow)
        self._lease = Lease(cluster, settings.namespace, settings.identity, settings.lease_duration_s)
        self._stop = threading.Event()
        self._watch_lag = WatchLag()
        self._names: dict[Owner, Key] = {}  # of unfinished jobs, from the last resync and from events
        self._resynced_s = time.monotonic()
        self._leading = False
        metrics.queue_depth.set_function(self._queue.depth)

    def start(self) -> bool:
        """Take the lease, fill the caches, start the workers; False when stopped before. Blocks."""
        if not self._lease.acquire():
            return False
        threading.Thread(target=self._lease.hold, args=(_lease_lost,), name="lease", daemon=True).start()
        for watch in self._watches:
            watch.last_activity_s = time.monotonic()
            threading.Thread(
                target=watch.run, args=((ApiError, UnreachableError),), name=watch.name, daemon=True
            ).start()
        threading.Thread(
            target=self._progress.run, args=(self._settings.progress_interval_s,), name="progress", daemon=True
        ).start()
        self._resynced_s = time.monotonic()
        self._leading = True
        for watch in self._watches:
            while not watch.listed.wait(1):
                if self._stop.is_set():
                    return False
        for number in range(self._settings.workers):
            threading.Thread(target=self._work, name=f"worker-{number}", daemon=True).start()
        threading.Thread(target=self._resync_for_ever, name="resync", daemon=True).start()
        return True

    def put(self, namespace: str, name: str, uid: str, generation: int) -> None:
        """The watch of FineTuneJobs says that the job was created, changed or deleted."""
        self._watch_lag.heard(uid, generation)
        self._names[namespace, uid] = (namespace, name)
        self._queue.put((namespace, name))

    def stop(self) -> None:
        """Start no more rounds and give the lease back. A round that is cut short is safe to repeat."""
        self._stop.set()
        self._lease.stop()
        self._progress.stop()
        self._queue.close()
        for watch in self._watches:
            watch.stop()
        if self._leading:
            self._lease.release()

    def problems(self) -> list[str]:
        """What stalled, in words; an operator that waits for the lease is well."""
        if not self._leading:
            return []
        now = time.monotonic()
        ages_s = {watch.name: now - watch.last_activity_s for watch in self._watches} | {
            "lease": self._lease.age_s(),
            "progress": self._progress.age_s(),
            "resync": now - self._resynced_s,
            "watch of finetunejobs": self._watch_lag.lag_s(),
        }
        return problems(ages_s, self._queue.stuck_s())

    def resync(self) -> None:
        """Ask for a round of every unfinished job, and forget what belongs to no such job."""
        owners, exported = self._children.owners(), self._reconciler.exported()
        listed: set[Key] = set()
        unfinished: dict[Owner, Key] = {}
        generations: dict[str, int] = {}
        phases: Counter[str] = Counter()
        for scope in self._scopes:
            for body in self._cluster.list_finetunejobs(scope):
                job = read_job(body)
                listed.add(job.key)
                phases[job.status.phase.value if job.status.phase else "Pending"] += 1
                generations[job.uid] = job.generation
                if not is_finished(job.status):
                    unfinished[job.owner] = job.key
                elif job.owner in owners and decide(job, Observation(*self._children.of(job.owner)), utcnow()).actions:
                    self._queue.put(job.key)  # a Job of it still wants its TTL
        self._watch_lag.listed(generations)
        self._names = unfinished
        for owner in owners - set(unfinished):
            self._children.forget(owner)
        for key in exported - listed:  # deleted, and nobody was told
            self._reconciler.forget(key)
        self._progress.retain(set(unfinished))
        self._metrics.count_phases(phases)
        for key in unfinished.values():
            self._queue.put(key)

    def _resync_for_ever(self) -> None:
        while not self._stop.is_set():
            try:
                self.resync()
                self._resynced_s = time.monotonic()
                self._metrics.last_resync.set_to_current_time()
                self._stop.wait(self._settings.resync_interval_s)
            except (ApiError, UnreachableError) as error:
                log.warning("resync failed: %s", error)
                self._stop.wait(min(10.0, self._settings.resync_interval_s))

    def _work(self) -> None:
        while (key := self._queue.get()) is not None:
            started_s = time.monotonic()
            result = self._one_round(key)
            self._metrics.reconcile_duration.labels(result).observe(time.monotonic() - started_s)

    def _one_round(self, key: Key) -> str:
        place = "/".join(key)
        try:
            again_s = self._reconciler.reconcile(key)
        except (ApiError, UnreachableError, LaterError, RefusedError) as error:
            least_s = error.retry_after_s if isinstance(error, ApiError) else 0.0
            delay_s = self._queue.retry(key, least_s)
            log.warning("%s: %s; again in %.1f s", place, error, delay_s)
            return "retry"
        except Exception:
            delay_s = self._queue.retry(key)
            log.exception("%s: bug in the operator; again in %.1f s", place, delay_s)
            return "bug"
        self._queue.done(key)
        if again_s is not None:
            self._queue.put(key, again_s)
        return "ok"

    def _look_at(self, owner: Owner) -> None:
        key = self._names.get(owner)
        if key is not None:
            self._queue.put(key)


def _lease_lost() -> None:
    log.error("the lease is lost: exiting at once, every write was safe to repeat")
    os._exit(EXIT_LEASE_LOST)
