"""One round for one job: observe, decide, write the status, act, tell. Everything that decides is in `decide`."""

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Protocol, cast

from pydantic import ValidationError

from finetune_api import defaults, names
from finetune_api.names import Stage
from finetune_api.platform import runtime_of_snapshot
from finetune_api.reasons import Reason
from finetune_api.run import RunConfig
from finetune_api.status import FineTuneJobStatus
from finetune_operator.attempt_outcome import belongs
from finetune_operator.child_cache import ChildCache, Owner
from finetune_operator.children import prepare, train
from finetune_operator.children.base import Run
from finetune_operator.clock import format_time, parse_time
from finetune_operator.cluster import ApiError, Body, Cluster, Kind, UnreachableError
from finetune_operator.decide import decide
from finetune_operator.decision import Action, CreateK8sJob, Decision, DeleteK8sJob, JobEvent, SetK8sJobTtl
from finetune_operator.job_reader import FineTuneJob, read_job
from finetune_operator.metrics import Metrics
from finetune_operator.observation import (
    Blocked,
    Observation,
    PodAnswer,
    PodSilence,
)
from finetune_operator.observed import observe_k8s_job
from finetune_operator.pod_waits import explain_events, needs_explanation
from finetune_operator.run_config import RUNTIME_FILE, config_map, run_config
from finetune_operator.runtimes import Runtimes

log = logging.getLogger(__name__)

MAX_CONFLICTS = 5
KINDS: Mapping[str, Kind] = {"ConfigMap": "configmaps", "Job": "jobs"}  # of what is created, as the API's paths say


class Progresses(Protocol):
    """The part of ProgressPuller that is used here."""

    def last(self, owner: Owner) -> PodAnswer | None: ...
    def silence(self, owner: Owner) -> PodSilence | None: ...
    def interval_s(self) -> float: ...


class RefusedError(Exception):
    """A child cannot be created now; the job's status says why."""

    def __init__(self, blocked: Blocked) -> None:
        super().__init__(blocked.message)
        self.blocked = blocked


class LaterError(Exception):
    """What was observed is out of date; a later round will observe it anew."""


class Reconciler:
    """Thread-safe as long as no two threads work on one key, which the queue sees to."""

    def __init__(
        self,
        cluster: Cluster,
        children: ChildCache,
        progress: Progresses,
        runtimes: Runtimes,
        metrics: Metrics,
        now: Callable[[], datetime],
    ) -> None:
        self._cluster, self._children, self._progress = cluster, children, progress
        self._runtimes, self._metrics, self._now = runtimes, metrics, now
        self._exported: dict[tuple[str, str], str] = {}  # key → UID
        self._lock = threading.Lock()

    def reconcile(self, key: tuple[str, str]) -> float | None:
        """Bring one job on its way; seconds until it wants another round, if any.

        Raises ApiError or UnreachableError (try again later), LaterError, and RefusedError once the status says so."""
        namespace, name = key
        for _ in range(MAX_CONFLICTS):
            body = self._cluster.get("finetunejobs", namespace, name)
            if body is None:
                self.forget(key)
                return None
            try:
                return self._round(read_job(body))
            except ApiError as error:
                if not _is_stale_write(error):
                    raise
        raise LaterError(f"{MAX_CONFLICTS} conflicts in a row")

    def forget(self, key: tuple[str, str]) -> None:
        """The job is deleted."""
        with self._lock:
            uid = self._exported.pop(key, None)
        if uid is not None:
            self._children.forget((key[0], uid))
            self._metrics.forget(*key)

    def exported(self) -> set[tuple[str, str]]:
        """Return the keys of the jobs that have series in the metrics."""
        with self._lock:
            return set(self._exported)

    def _round(self, job: FineTuneJob) -> float | None:
        observation = self._observe(job)
        decision = decide(job, observation, self._now())
        stored = self._store(job, decision)
        try:
            for action in decision.actions:
                self._act(stored, action)
        except RefusedError as refused:
            again = decide(stored, replace(observation, blocked=refused.blocked), self._now())
            if self._store(stored, again).finished:
                return None
            raise
        if stored.finished:
            self._children.forget(stored.owner)
        return decision.requeue_after_s

    def _observe(self, job: FineTuneJob) -> Observation:
        k8s_jobs, pods = self._children.of(job.owner)
        observation = Observation(
            k8s_jobs=k8s_jobs,
            pods=pods,
            progress=self._progress.last(job.owner),
            progress_write_interval_s=self._progress.interval_s(),
            silence=self._progress.silence(job.owner),
        )
        entries = job.status.attempts
        if job.finished or not entries:
            return observation
        child = next((j for j in k8s_jobs if belongs(entries[-1], j)), None)
        uid = needs_explanation(child, [p for p in pods if belongs(entries[-1], p)], self._now())
        if uid is None:
            return observation
        events = self._cluster.list_events(job.namespace, uid)
        return replace(observation, blocked=explain_events(events, job.namespace))

    def _store(self, job: FineTuneJob, decision: Decision) -> FineTuneJob:
        """Write the status if it differs, then tell what changed. Return the job as it is stored then."""
        patch = status_patch(_dump(job.status), _dump(decision.status))
        if patch:
            job = read_job(self._cluster.patch_status(job.namespace, job.name, job.resource_version, patch))
            for event in decision.events:
                self._tell(job, event)
        self._export(job)
        return job

    def _act(self, job: FineTuneJob, action: Action) -> None:
        match action:
            case CreateK8sJob(stage, attempt, digest):
                self._create(job, stage, attempt, digest)
            case DeleteK8sJob(name, uid):
                self._cluster.delete_k8s_job(job.namespace, name, uid)
            case SetK8sJobTtl(name, seconds):
                self._cluster.set_ttl(job.namespace, name, seconds)

    def _create(self, job: FineTuneJob, stage: Stage, attempt: int, digest: str | None) -> None:
        if job.spec is None:
            return
        # The watch may be behind: what exists now decides whether a second writer would come to life.
        wanted = names.child_name(job.name, job.uid, stage, attempt)
        existing = [observe_k8s_job(body) for body in self._cluster.list_children(job.namespace, job.uid)]
        if any(child is not None and child.live and child.name != wanted for child in existing):
            raise LaterError("another Job of this FineTuneJob is alive")
        if any(child is not None and child.name == wanted for child in existing):
            return
        run = self._run(job)
        manifests = prepare.render(run, attempt) if stage == Stage.PREPARE else train.render(run, attempt, digest)
        for manifest in manifests:
            self._create_ours(job, manifest)
            log.info("%s/%s: created %s %s", job.namespace, job.name, manifest["kind"], manifest["metadata"]["name"])

    def _run(self, job: FineTuneJob) -> Run:
        """Return the run as it was when its ConfigMap was made, which is made if missing."""
        name = names.run_name(job.name, job.uid)
        stored = self._cluster.get("configmaps", job.namespace, name)
        if stored is None:
            assert job.spec is not None
            asked = defaults.given(job.spec.runtime, defaults.RUNTIME)
            runtime = self._runtimes.get(asked)
            if runtime is None:
                text = f"this cluster has no runtime {asked}: ask the platform team, or name another in a new job"
                raise RefusedError(Blocked(Reason.RUNTIME_NOT_FOUND, text))
            stored = self._create_ours(job, config_map(Run(job, run_config(job, job.spec, runtime), runtime)))
        if not _is_ours(stored, job):
            raise RefusedError(_collision("ConfigMap", job.namespace, name))
        data = cast(Mapping[str, str], stored.get("data") or {})
        try:
            config = RunConfig.model_validate_json(data.get(names.CONFIG_FILE, ""))
            return Run(job, config, runtime_of_snapshot(data.get(RUNTIME_FILE, "")))
        except ValidationError as error:
            text = f"ConfigMap {job.namespace}/{name} is of another version"
            raise RefusedError(Blocked(Reason.INVALID_MANIFEST, f"{text}; create a new job")) from error

    def _create_ours(self, job: FineTuneJob, manifest: Body) -> Body:
        """Create, or find what a round before created. Raises RefusedError for what only a person can fix."""
        kind, name = KINDS[manifest["kind"]], manifest["metadata"]["name"]
        try:
            return self._cluster.create(kind, manifest)
        except ApiError as error:
            what = f"{manifest['kind']} {job.namespace}/{name}"
            if error.status == 409:
                found = self._cluster.get(kind, job.namespace, name)
                if found is None:
                    raise LaterError(f"{what} has just vanished") from error
                if _is_ours(found, job):
                    return found
                raise RefusedError(_collision(manifest["kind"], job.namespace, name)) from error
            if error.status in (400, 422):
                raise RefusedError(Blocked(Reason.INVALID_MANIFEST, f"{what} is refused: {error.message}")) from error
            if error.status == 403:
                quota = "exceeded quota" in error.message
                reason = Reason.QUOTA_EXCEEDED if quota else Reason.FORBIDDEN
                raise RefusedError(Blocked(reason, f"{what} may not be created: {error.message}")) from error
            raise

    def _tell(self, job: FineTuneJob, event: JobEvent) -> None:
        """Best effort: the status has it all, and is written already."""
        self._metrics.transitions.labels(event.reason.value).inc()
        log.info("%s/%s: %s: %s", job.namespace, job.name, event.reason.value, event.message)
        try:
            self._cluster.create("events", event_manifest(job, event, self._now()))
        except (ApiError, UnreachableError) as error:
            log.warning("%s/%s: the event was not taken: %s", job.namespace, job.name, error)

    def _export(self, job: FineTuneJob) -> None:
        progress = job.status.progress
        answered = parse_time(progress.last_updated_time) if progress else None
        with self._lock:
            before = self._exported.get(job.key, job.uid)
            self._exported[job.key] = job.uid
        if before != job.uid:
            self._metrics.forget(*job.key)  # of another job that had the name
        self._metrics.export(job.namespace, job.name, job.status, answered.timestamp() if answered else None)


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


def _is_ours(body: Body, job: FineTuneJob) -> bool:
    owners = cast(list[Body], body.get("metadata", {}).get("ownerReferences") or [])
    return any(owner.get("uid") == job.uid and owner.get("controller") is True for owner in owners)


def _collision(kind: str, namespace: str, name: str) -> Blocked:
    return Blocked(
        Reason.NAME_COLLISION, f"{kind} {namespace}/{name} exists and is not of this job: remove it, or rename the job"
    )


def _is_stale_write(error: ApiError) -> bool:
    return error.status == 409 and error.reason == "Conflict"
