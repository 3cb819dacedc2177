"""One round for one job: observe, decide, write the status, act, tell. Everything that decides is in `decide`."""

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol, cast

from finetune_api import defaults, names
from finetune_api.names import Stage
from finetune_api.platform import DataPolicy
from finetune_api.status import FineTuneJobStatus, OperatorRecord
from finetune_operator.attempt_outcome import belongs
from finetune_operator.child_cache import ChildCache, Owner
from finetune_operator.child_creator import ChildCreator, Creation, LaterError, RefusedError
from finetune_operator.clock import format_time
from finetune_operator.close_attempts import digest_of_proof, running_job_uid, wants_live_pods
from finetune_operator.cluster import ApiError, Body, Cluster, UnreachableError
from finetune_operator.data_policy import may_refuse
from finetune_operator.decide import decide
from finetune_operator.decision import Action, CreateK8sJob, Decision, DeleteK8sJob, JobEvent, SetK8sJobTtl
from finetune_operator.event_reader import EventReader
from finetune_operator.job_reader import FineTuneJob, read_job
from finetune_operator.job_series import JobSeries
from finetune_operator.known_jobs import KnownJobs
from finetune_operator.metrics import Metrics
from finetune_operator.observation import CreatedK8sJob, Observation, PodAnswer, PodSilence
from finetune_operator.observed import with_live_pods
from finetune_operator.parent_job import ParentJob, awaited_parent, read_parent
from finetune_operator.pod_waits import explain_events, is_slow_to_start, needs_explanation
from finetune_operator.runtimes import Runtimes

log = logging.getLogger(__name__)

MAX_CONFLICTS = 5
MAX_CHAIN = 16  # jobs that wait one for another, in which a circle is looked for
RUNTIME_ASKED_EVERY_S = 30  # of one job; each time is a request, and a pod that starts slowly has many rounds


class Progresses(Protocol):
    """The part of ProgressPuller that is used here."""

    def answers(self, owner: Owner) -> tuple[PodAnswer, ...]: ...
    def silences(self, owner: Owner) -> tuple[PodSilence, ...]: ...
    def interval_s(self) -> float: ...
    def follow(self, owner: Owner, job_uid: str | None) -> None: ...


class Reconciler:
    """Thread-safe as long as no two threads work on one key, which the queue sees to."""

    def __init__(
        self,
        cluster: Cluster,
        children: ChildCache,
        progress: Progresses,
        runtimes: Runtimes,
        metrics: Metrics,
        series: JobSeries,
        known: KnownJobs,
        now: Callable[[], datetime],
    ) -> None:
        self._cluster, self._children, self._progress = cluster, children, progress
        self._creator, self._metrics, self._now = ChildCreator(cluster, runtimes), metrics, now
        self._runtimes = runtimes
        self._created: dict[Owner, CreatedK8sJob] = {}  # the last of each job
        self._runtime_asked_at: dict[Owner, datetime] = {}  # of jobs whose pod starts slowly
        self._events, self._series, self._known = EventReader(cluster, children.knows), series, known

    def reconcile(self, key: tuple[str, str]) -> float | None:
        """Bring one job on its way; seconds until it wants another round, if any.

        Raises ApiError or UnreachableError (try again later), LaterError, and RefusedError once the status says so."""
        for _ in range(MAX_CONFLICTS):
            job = self._known.take(key) or self._read(key)
            if job is None:
                self.forget(key)
                return None
            if self._series.uid_of(key) not in (None, job.uid):
                self.forget(key)  # another had the name
            try:
                return self._round(job)
            except ApiError as error:
                if not _is_stale_write(error):
                    raise
        raise LaterError(f"{MAX_CONFLICTS} conflicts in a row")

    def _read(self, key: tuple[str, str]) -> FineTuneJob | None:
        body = self._cluster.get("finetunejobs", *key)
        return read_job(body) if body is not None else None

    def forget(self, key: tuple[str, str]) -> None:
        """The job is deleted."""
        self._known.forget(key)
        uid = self._series.forget(key)
        if uid is not None:
            self._forget_children((key[0], uid))

    def _forget_children(self, owner: Owner) -> None:
        self._created.pop(owner, None)
        self._runtime_asked_at.pop(owner, None)
        self._children.forget(owner)

    def _round(self, job: FineTuneJob) -> float | None:
        observation = self._observe(job)
        decision, stored = decide(job, observation, self._now()), job
        self._progress.follow(job.owner, running_job_uid(decision.status))
        try:
            creation = self._creation(job, decision)
            if creation is not None:
                decision = with_creation(decision, creation)
            stored = self._store(job, decision)
            for action in decision.actions:
                self._act(stored, action, creation)
        except RefusedError as refused:
            return self._refused(stored, observation, refused)
        if stored.finished and not job.finished:
            return self._round(stored)  # its verdict is stored: now it is tidied up
        if stored.finished:
            self._known.forget(stored.key)
            self._forget_children(stored.owner)
        else:
            self._known.keep(stored)
        return decision.requeue_after_s

    def _creation(self, job: FineTuneJob, decision: Decision) -> Creation | None:
        """Return what is to be created, before the status is written, which holds its digests."""
        if not any(isinstance(action, CreateK8sJob) for action in decision.actions):
            return None
        found, last = self._creator.find_run(job, decision.status), decision.status.attempts[-1]
        created = self._created.get(job.owner)
        if created is None or (created.stage, created.attempt) != (last.stage, last.number):
            created = CreatedK8sJob(Stage(last.stage), last.number, secrets.token_hex(16))
            self._created[job.owner] = created
        return Creation(found, created.proof)

    def _refused(self, job: FineTuneJob, observation: Observation, refused: RefusedError) -> None:
        """Write down why nothing can be created, and do what else is to be done. Raises `refused`, to try again."""
        decision = decide(job, replace(observation, blocked=refused.blocked), self._now())
        stored = self._store(job, decision)
        for action in decision.actions:
            if not isinstance(action, CreateK8sJob):
                self._act(stored, action, None)
        if not stored.finished:
            raise refused

    def _observe(self, job: FineTuneJob) -> Observation:
        k8s_jobs, pods = self._children.of(job.owner)
        observation = Observation(
            k8s_jobs=k8s_jobs,
            pods=pods,
            answers=self._progress.answers(job.owner),
            progress_write_interval_s=self._progress.interval_s(),
            silences=self._progress.silences(job.owner),
            created=self._created.get(job.owner),
            policy=self._policy(job),
        )
        entries = job.status.attempts
        awaited = awaited_parent(job.spec, job.status) if job.spec is not None and not job.finished else None
        if awaited is not None:
            observation = replace(observation, parent=self._parent(job, awaited))
        if job.finished or job.spec is None or not entries:
            return observation
        if wants_live_pods(job.status, observation, self._now()):
            bodies = self._cluster.list_pods(job.namespace, job.uid)
            observation = replace(observation, pods=with_live_pods(pods, bodies), pods_listed=True)
        child = next((j for j in k8s_jobs if belongs(entries[-1], j)), None)
        if child is not None and is_slow_to_start(entries[-1], child, self._now()):
            observation = replace(observation, runtime_changed=self._runtime_changed(job))
        uid = needs_explanation(child, [p for p in observation.pods if belongs(entries[-1], p)], self._now())
        if uid is None:
            return observation
        events = self._events.of(job.namespace, uid)
        return replace(observation, blocked=explain_events(events, job.namespace, self._now()))

    def _parent(self, job: FineTuneJob, awaited: str) -> ParentJob | None:
        """Return the job that this one waits for, and whether that one waits for this one, be it by way of others."""

        def seen(name: str) -> ParentJob | None:
            body = self._cluster.get("finetunejobs", job.namespace, name)
            return read_parent(body) if body is not None else None

        names = [awaited]
        parent = last = seen(awaited)
        while parent is not None and last is not None and last.waits_for is not None and last.waits_for not in names:
            names.append(last.waits_for)
            if last.waits_for == job.name:
                return replace(parent, circle=tuple(names))
            if len(names) > MAX_CHAIN:
                break
            last = seen(last.waits_for)
        return parent

    def _policy(self, job: FineTuneJob) -> DataPolicy | None:
        """Return what the job's runtime says about data, until the job has begun."""
        if job.spec is None or job.finished or not may_refuse(job.status):
            return None
        return self._runtimes.policy(defaults.given(job.spec.runtime, defaults.RUNTIME))

    def _runtime_changed(self, job: FineTuneJob) -> bool:
        """Return True if the runtime was mended since the job's last attempt began; False as well if just asked."""
        now, asked_at = self._now(), self._runtime_asked_at.get(job.owner)
        if asked_at is not None and 0 <= (now - asked_at).total_seconds() < RUNTIME_ASKED_EVERY_S:
            return False
        self._runtime_asked_at[job.owner] = now
        return self._creator.runtime_changed(job)

    def _store(self, job: FineTuneJob, decision: Decision) -> FineTuneJob:
        """Write the status if it differs, then tell what changed. Return the job as it is stored then."""
        # Most rounds change nothing: comparing is cheaper than writing both down.
        unchanged = decision.status == job.status
        patch = {} if unchanged else status_patch(_dump(job.status), _dump(decision.status))
        if patch:
            job = read_job(self._cluster.patch_status(job.namespace, job.name, job.resource_version, patch))
            self._known.wrote(job)
            for event in decision.events:
                self._tell(job, event)
        self._series.show(job)
        return job

    def _act(self, job: FineTuneJob, action: Action, creation: Creation | None) -> None:
        match action:
            case CreateK8sJob():
                assert creation is not None
                self._creator.create(job, creation, action)
            case DeleteK8sJob(name, uid):
                self._cluster.delete_k8s_job(job.namespace, name, uid)
            case SetK8sJobTtl(name, uid, seconds):
                before = self._children.k8s_job(job.owner, uid)
                written = self._cluster.set_ttl(job.namespace, name, uid, seconds)
                if written is not None and before is not None:
                    self._children.take_written(written, before)

    def _tell(self, job: FineTuneJob, event: JobEvent) -> None:
        """Best effort: the status has it all, and is written already."""
        self._metrics.transitions.labels(event.reason.value).inc()
        log.info("%s/%s: %s: %s", job.namespace, job.name, event.reason.value, event.message)
        try:
            self._cluster.create("events", event_manifest(job, event, self._now()))
        except (ApiError, UnreachableError) as error:
            log.warning("%s/%s: the event was not taken: %s", job.namespace, job.name, error)


def with_creation(decision: Decision, creation: Creation) -> Decision:
    """Return the decision with the digests of what is to be created in the status."""
    run, status = creation.found.run, decision.status
    if run.config_digest is None:  # of an earlier operator, which kept none
        return decision
    record = status.record or OperatorRecord()
    record = record.model_copy(update={"run_config": run.name, "run_digest": run.digest})
    entry = status.attempts[-1].model_copy(update={"job_proof": digest_of_proof(creation.proof)})
    status = status.model_copy(update={"record": record, "attempts": [*status.attempts[:-1], entry]})
    return replace(decision, status=status)


def status_patch(old: Mapping[str, Any], new: Mapping[str, Any]) -> Body:
    """JSON merge patch from one status to the other; empty if they are equal."""
    patch: Body = {key: None for key in old if key not in new}
    for key, value in new.items():
        before = old.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            inner = status_patch(cast(Mapping[str, Any], before), cast(Mapping[str, Any], value))
            if inner:
                patch[key] = inner
        elif before != value:
            patch[key] = value
    return patch


def event_manifest(job: FineTuneJob, event: JobEvent, now: datetime) -> Body:
    """The name is made of what is told and when, so that a repeated round does not tell it twice."""
    moment = format_time(now)
    told = json.dumps([job.uid, event.type, event.reason.value, event.message, moment])
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{job.name}.{hashlib.sha256(told.encode()).hexdigest()[:16]}",
            "namespace": job.namespace,
        },
        "involvedObject": {
            "apiVersion": names.API_VERSION,
            "kind": names.KIND,
            "name": job.name,
            "namespace": job.namespace,
            "uid": job.uid,
            "resourceVersion": job.resource_version,
        },
        "type": event.type,
        "reason": event.reason.value,
        "message": event.message,
        "source": {"component": names.FIELD_MANAGER},
        "reportingComponent": names.FIELD_MANAGER,
        "reportingInstance": names.FIELD_MANAGER,
        "firstTimestamp": moment,
        "lastTimestamp": moment,
        "count": 1,
    }


def _dump(status: FineTuneJobStatus) -> Body:
    return status.model_dump(mode="json", by_alias=True, exclude_none=True)


def _is_stale_write(error: ApiError) -> bool:
    return error.status == 409 and error.reason == "Conflict"
