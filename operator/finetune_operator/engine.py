"""All threads of the operator: workers, watches, resync, progress, lease. Knows no Kopf."""

import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from finetune_api import names
from finetune_api.status import FINAL_PHASES, Phase
from finetune_operator.child_cache import ChildCache, Key, Owner
from finetune_operator.child_creator import LaterError, RefusedError
from finetune_operator.clock import utcnow
from finetune_operator.cluster import ApiError, Cluster, UnreachableError, brief
from finetune_operator.finished_jobs import FinishedJobs
from finetune_operator.health import Health, problems
from finetune_operator.job_reader import read_job, verdict_at
from finetune_operator.job_series import JobSeries
from finetune_operator.known_jobs import KnownJobs
from finetune_operator.lease import Lease
from finetune_operator.metrics import Metrics
from finetune_operator.observed import is_on_its_way
from finetune_operator.phase_selectors import PhaseSelection
from finetune_operator.progress import ProgressPuller
from finetune_operator.queue import WorkQueue
from finetune_operator.reconcile import Reconciler
from finetune_operator.runtimes import Runtimes
from finetune_operator.scope import Listed, Scope
from finetune_operator.settings import Settings

log = logging.getLogger(__name__)

EXIT_LEASE_LOST = 3
RESYNC_RETRY_S = 10.0
CRD_RETRY_S = 5.0
MISSING_CRD = f"the CRD {names.PLURAL}.{names.GROUP} is not installed: it is waited for"
CHILD_DELAY_S = 0.5  # a pod is told of several times in its first second: one round for all
STARTING_DELAY_S = 3.0  # while it goes the usual way to its start, which nobody has to act on
HEAD_START_S = 60.0  # of a new job before others' further rounds, so that its prepare begins at once
STOP_S = 10.0  # for rounds in work; with the other waits of an end below the chart's terminationGracePeriodSeconds
UNREADABLE_S = 60.0  # for which no namespace can be read before the operator is not ready


class Engine:
    """`start` once the lease is to be taken, `put` for every FineTuneJob that may have changed, `stop` at the end."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        """Raises SettingsError when the runtimes file cannot be used."""
        self._settings, self._metrics = settings, metrics
        self._queue: WorkQueue[Key] = WorkQueue()
        namespaces: tuple[str | None, ...] = settings.watch_namespaces or (None,)
        pool_size = settings.workers + 3 * len(namespaces) + 4
        self.selection = PhaseSelection()
        cluster = Cluster(metrics, pool_size, self.selection, self._round_moved)
        self._cluster = cluster
        self._series = JobSeries(metrics)
        self._children = ChildCache(self._child_changed)
        self._progress = ProgressPuller(self._children, metrics, self._look_at, utcnow)
        self._stop, self._wake = threading.Event(), threading.Event()
        self._scopes = {
            name: Scope(
                name,
                cluster=cluster,
                children=self._children,
                finished=FinishedJobs(self._children, self._series, self._read_again, self._queue.is_in_work),
                metrics=metrics,
                on_listed=self._wake.set,
            )
            for name in namespaces
        }
        runtimes = Runtimes(settings.runtimes_file)
        self._known = KnownJobs()
        self._reconciler = Reconciler(
            cluster, self._children, self._progress, runtimes, metrics, self._series, self._known, utcnow
        )
        self._lease = Lease(
            cluster, settings.namespace, settings.lease_name, settings.identity, settings.lease_duration_s
        )
        self._resync_moved_s = time.monotonic()
        self._in_work = threading.local()  # `key`, of the round of this thread
        self._threads: list[threading.Thread] = []
        self._missing: tuple[str, ...] = ()  # in words: the CRD, while it is waited for
        self._leading = False
        self._ending = threading.Lock()
        metrics.queue_depth.set_function(self._queue.depth)

    def start(self) -> bool:
        """Take the lease, wait for the CRD, then start everything; False when stopped before that."""
        if not self._lease.acquire():
            return False
        self._begin("lease", lambda: self._lease.hold(_lease_lost))
        if not self._wait_for_crd():
            return False
        self._resync_moved_s = time.monotonic()
        for scope in self._scopes.values():
            # Its first resync comes as soon as its Jobs and pods are known, or, to tell why, when they are not by then.
            scope.resync_due_s = time.monotonic() + min(RESYNC_RETRY_S, self._settings.resync_interval_s)
            self._threads += scope.start()
        self._begin("progress", lambda: self._progress.run(self._settings.progress_interval_s))
        for number in range(self._settings.workers):
            self._begin(f"worker-{number}", self._work)
        self._begin("resync", self._resync_for_ever)
        self._leading = True
        return True

    def hear(self, event: str | None, body: Mapping[str, Any]) -> None:
        """Take what the watch of FineTuneJobs tells. DELETED says of a job no more than that it is finished or gone."""
        meta = body["metadata"]
        namespace, name, uid = str(meta["namespace"]), str(meta["name"]), str(meta["uid"])
        scope = self._scope_of(namespace)
        if scope is None:
            return
        scope.watch_lag.heard(uid, int(meta.get("generation") or 0))
        if verdict_at(body) is not None:
            scope.finished.hear(event, body)
            if event != "DELETED":
                return
        scope.hear((namespace, uid), (namespace, name))
        version = str(meta.get("resourceVersion"))
        if not self._known.has_written((namespace, name), version):
            is_new = event != "DELETED" and not body.get("status")
            if is_new:
                self._known.offer(read_job(body))
            self._known.hear((namespace, name), version)
            self._queue.put((namespace, name), -HEAD_START_S if is_new else 0.0)

    def takes_echo(self, body: Mapping[str, Any]) -> bool:
        """Return True for a version of an unfinished job that our own write made, of which only the watch's life is
        news."""
        meta = body.get("metadata") or {}
        namespace, name, uid = (str(meta.get(each)) for each in ("namespace", "name", "uid"))
        scope = self._scope_of(namespace)
        is_ours = self._known.has_written((namespace, name), str(meta.get("resourceVersion")))
        if scope is None or not is_ours or verdict_at(body) is not None:
            return False
        scope.watch_lag.heard(uid, int(meta.get("generation") or 0))
        return True

    def stop(self) -> None:
        """Start no more rounds, wait for those in work, then give the lease back.

        One that does not end in STOP_S is cut short, which is safe to repeat, and the lease left to run out."""
        with self._ending:
            if self._stop.is_set():
                return
            self._stop.set()
            self._wake.set()
            self._progress.stop()
            self._queue.close()
            for scope in self._scopes.values():
                scope.stop()
            ended = self._queue.wait_until_idle(STOP_S)
            self._lease.stop()
            if ended:
                self._lease.release()
            else:
                log.warning("a round did not end within %.0f s: the lease is left to run out", STOP_S)

    def health(self) -> Health:
        """What stands still, what keeps it from its work, and what is good to know."""
        lease = self._lease.problem()
        notes = [self._lease.note(), *self.selection.notes()]
        if not self._leading or self._stop.is_set():
            return Health(unready=(*((lease,) if lease else ()), *self._missing), notes=tuple(notes))
        scopes = self._scopes.values()
        ages_s = {"lease": self._lease.age_s(), "progress": self._progress.age_s()}
        ages_s["resync"] = time.monotonic() - self._resync_moved_s
        for scope in scopes:
            ages_s |= scope.ages_s()
            notes += scope.notes()
        ended = [f"{thread.name}: has ended" for thread in self._threads if not thread.is_alive()]
        unready = [lease] if lease else []
        since_s = [min((each.since_s for each in scope.troubles().values()), default=None) for scope in scopes]
        if all(moment is not None and time.monotonic() - moment > UNREADABLE_S for moment in since_s):
            unready.append("no watched namespace can be read")
        return Health((*ended, *problems(ages_s, self._queue.stuck_s())), tuple(unready), tuple(notes))

    def resync(self) -> None:
        """Ask for a round of every unfinished job, and forget what belongs to no such job; each scope by itself."""
        for scope in self._scopes.values():
            self._resync_scope(scope)

    def crd_is_missing(self) -> bool:
        """Return True if the API server says that it does not know FineTuneJobs."""
        try:
            return not self._cluster.serves_finetunejobs()
        except (ApiError, UnreachableError):
            return False

    def _wait_for_crd(self) -> bool:
        """Wait until the API server knows FineTuneJobs; False when stopped before."""
        while not self._stop.is_set():
            try:
                missing = () if self._cluster.serves_finetunejobs() else (MISSING_CRD,)
            except (ApiError, UnreachableError) as error:
                missing = (f"cannot see whether the CRD is installed: {brief(error)}",)
            for news in set(missing) - set(self._missing):
                log.warning(news)
            self._missing = missing
            if not missing:
                return True
            self._stop.wait(CRD_RETRY_S)
        return False

    def _resync_scope(self, scope: Scope) -> None:
        owners = {owner for owner in self._children.owners() if scope.namespace in (None, owner[0])}
        shown = {key: uid for key, uid in self._series.uids().items() if scope.namespace in (None, key[0])}
        try:
            found = self._list(scope)
            scope.take_list(found, time.time())
            scope.resync_due_s = time.monotonic() + self._settings.resync_interval_s
        except (ApiError, UnreachableError) as error:
            if scope.take_failure(error):
                log.warning("resync of %s failed: %s", scope.namespace or "the cluster", error)
            for key in shown if scope.is_gone() else ():
                self._reconciler.forget(key)
            scope.resync_due_s = time.monotonic() + min(RESYNC_RETRY_S, self._settings.resync_interval_s)
        else:
            for owner in owners - set(found.unfinished):
                self._children.forget(owner)
            # Copies, made in one step: the thread of Kopf adds to them at any moment.
            self._progress.retain({owner for each in self._scopes.values() for owner in each.names.copy()})
            # Shown, and in neither list: finished just now, or deleted and nobody was told.
            lost = [
                k
                for k, uid in shown.items()
                if (k[0], uid) not in found.unfinished and (k[0], uid) not in scope.finished
            ]
            for key, version in found.versions.items():
                self._known.listed(key, version)
                self._queue.put(key)
            unlisted = [key for key in found.unfinished.values() if key not in found.versions]
            for key in (*unlisted, *lost, *scope.finished.wanting_rounds()):
                self._read_again(key)
        self._resync_moved_s = time.monotonic()
        self._count_phases()
        times_s = [each.resynced_at_s for each in self._scopes.values() if each.well()]
        if times_s and all(times_s):
            self._metrics.last_resync.set(min(moment for moment in times_s if moment is not None))

    def _list(self, scope: Scope) -> Listed:
        """List the unfinished jobs; where the server cannot select, the others pass by unread."""
        found = Listed()
        scope.begin_list()
        for body in self._cluster.list_unfinished(scope.namespace):
            self._resync_moved_s = time.monotonic()
            if verdict_at(body) is not None:
                continue
            job = read_job(body)
            if job.owner not in scope.finished:  # since this page was read
                found.phases[job.owner] = job.status.phase or Phase.PENDING
                found.generations[job.uid] = job.generation
                found.unfinished[job.owner] = job.key
                found.versions[job.key] = job.resource_version
        for owner, (key, phase) in scope.finished.unjudged().items():
            found.phases[owner], found.unfinished[owner] = phase, key
        return found

    def _count_phases(self) -> None:
        """Show how many jobs there are by phase; of the final ones once all of them are known."""
        open_scopes = [scope for scope in self._scopes.values() if not scope.closed]
        counts = sum((scope.count_phases() for scope in open_scopes), Counter[str]())
        complete = all(scope.finished_listed for scope in open_scopes)
        self._metrics.count_phases(counts, [phase for phase in Phase if complete or phase not in FINAL_PHASES])

    def _resync_for_ever(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            for scope in self._scopes.values():
                if (scope.resync_wanted or scope.resync_due_s <= time.monotonic()) and not self._stop.is_set():
                    scope.resync_wanted = False
                    self._resync_scope(scope)
            self._resync_moved_s = time.monotonic()
            due_s = min(scope.resync_due_s for scope in self._scopes.values())
            self._wake.wait(max(0.0, due_s - time.monotonic()))

    def _work(self) -> None:
        while (key := self._queue.get()) is not None:
            started_s = time.monotonic()
            self._in_work.key = key
            result = self._one_round(key)
            self._in_work.key = None
            self._metrics.reconcile_duration.labels(result).observe(time.monotonic() - started_s)

    def _one_round(self, key: Key) -> str:
        place = "/".join(key)
        scope = self._scope_of(key[0])
        if scope is None or not scope.listed or scope.closed:
            self._queue.done(key)  # its next resync asks again
            return "unreadable"
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

    def _round_moved(self) -> None:
        key: Key | None = getattr(self._in_work, "key", None)
        if key is not None:
            self._queue.moved(key)

    def _read_again(self, key: Key) -> None:
        self._known.hear(key, None)
        self._queue.put(key)

    def _child_changed(self, key: Key, owner: Owner) -> None:
        scope = self._scope_of(owner[0])
        # Before all are known no round is begun, and the resync that follows asks for those of unfinished jobs.
        if scope is not None and scope.listed and not scope.finished.is_at_rest(owner):
            self._queue.put(key, STARTING_DELAY_S if is_on_its_way(*self._children.of(owner)) else CHILD_DELAY_S)

    def _look_at(self, owner: Owner) -> None:
        scope = self._scope_of(owner[0])
        key = scope.names.get(owner) if scope is not None else None
        if key is not None:
            self._queue.put(key)

    def _scope_of(self, namespace: str) -> Scope | None:
        return self._scopes.get(namespace) or self._scopes.get(None)

    def _begin(self, name: str, target: Callable[[], object]) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)


def _lease_lost() -> None:
    log.error("the lease is lost: exiting at once, every write was safe to repeat")
    os._exit(EXIT_LEASE_LOST)
