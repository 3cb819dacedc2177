"""What the API server says, as plain values: the only place that reads the shapes of Kubernetes objects.

Parsing is total. Whatever a field holds, the result is a value or None; objects that are not ours give None.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, cast

from pydantic import ValidationError

from finetune_api import names
from finetune_api.names import Stage
from finetune_api.quantity import quantity_bytes
from finetune_api.redact import without_secrets
from finetune_api.run import MAX_RESULT_BYTES, RunResult
from finetune_operator.clock import parse_time

ANNOTATION_GPUS = f"{names.GROUP}/gpus"  # on the pod, whose last state is kept when its Job is deleted
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_TEXT = 256
# Of a container that could not be begun; the kubelet says that it had started in 1970 (kubernetes#120331).
NEVER_BEGUN = ("StartError", "ContainerCannotRun")
_USUAL_WAITS = (None, "PodInitializing", "ContainerCreating")
UNSCHEDULABLE = ("Unschedulable", "SchedulingGated")
# What a scheduler says after why no node fits: that to remove other pods would not help.
_BEYOND_NEED = re.compile(r"\. (?:no new claims to deallocate|preemption: ).*", re.DOTALL)

Body = Mapping[str, Any]


@dataclass(frozen=True)
class ObservedK8sJob:
    """One Kubernetes Job of a FineTuneJob."""

    name: str
    uid: str
    stage: Stage
    attempt: int
    created_at: datetime = EPOCH
    deleting: bool = False
    outcome: Literal["Complete", "Failed"] | None = None  # set only once all its pods have ended
    message: str = ""  # of the Failed condition
    finished_at: datetime | None = None
    ttl_seconds: int | None = None
    proof: str | None = None  # what only its maker knew until it existed
    suspended: str | None = None  # by somebody else, as we never do: the words of its condition

    @property
    def live(self) -> bool:
        return self.outcome is None


@dataclass(frozen=True)
class ObservedPod:
    """One pod of such a Job; `gone` means deleted, with the last state it was seen in."""

    name: str
    uid: str
    stage: Stage
    attempt: int
    created_at: datetime = EPOCH
    phase: str = "Pending"
    ip: str | None = None
    gone: bool = False
    deletion_due: datetime | None = None
    scheduled: bool = False
    scheduled_at: datetime | None = None
    node: str | None = None
    taken_at: datetime | None = None  # by the kubelet of its node
    unschedulable: str | None = None  # the scheduler's words, or those of a gate that keeps the pod from it
    disrupted: bool = False
    evicted: bool = False  # by the kubelet, for a limit of its own
    refused: str | None = None  # why the pod failed before anything of the trainer ran
    waiting_reason: str | None = None
    waiting_message: str = ""
    waiting_container: str | None = None  # one that the cluster put before ours
    started_at: datetime | None = None
    finished_at: datetime | None = None
    exit_code: int | None = None
    oom_killed: bool = False
    memory_limit: str = "not known"  # of the trainer's container, for words
    gpus: int = 0
    owner_uid: str = ""  # of the Kubernetes Job that controls it
    result: RunResult | None = None
    bad_result: bool = False

    @property
    def active(self) -> bool:
        """Whether it may still run or come to run."""
        return not self.gone and self.phase not in ("Succeeded", "Failed")

    @property
    def running(self) -> bool:
        return self.active and self.started_at is not None and self.finished_at is None


def is_on_its_way(k8s_jobs: Sequence[ObservedK8sJob], pods: Sequence[ObservedPod]) -> bool:
    """Return True while the only live Job's pods, if there are any yet, go the usual way to their start."""
    live = [each for each in k8s_jobs if each.live]
    if len(live) != 1 or live[0].deleting or live[0].suspended is not None:
        return False
    return all(_is_starting(pod) for pod in pods if pod.owner_uid == live[0].uid)


def _is_starting(pod: ObservedPod) -> bool:
    in_order = pod.unschedulable is None and pod.waiting_reason in _USUAL_WAITS and pod.deletion_due is None
    return pod.active and pod.started_at is None and in_order and not pod.disrupted


def job_uid(body: Body) -> str | None:
    """UID of the FineTuneJob a labelled child belongs to."""
    return _text(_labels(body).get(names.LABEL_JOB_UID))


def observe_k8s_job(body: Body) -> ObservedK8sJob | None:
    """None for a Job that is not controlled by the FineTuneJob its label names."""
    meta, spec, status = _dict(body, "metadata"), _dict(body, "spec"), _dict(body, "status")
    place = _place(body)
    owner = _controller(meta)
    if place is None or owner.get("kind") != names.KIND or owner.get("uid") != job_uid(body):
        return None
    conditions = {_text(c.get("type")): c for c in _dicts(status, "conditions") if c.get("status") == "True"}
    ended = conditions.get("Complete") or conditions.get("Failed")
    return ObservedK8sJob(
        name=str(meta.get("name")),
        uid=str(meta.get("uid")),
        stage=place[0],
        attempt=place[1],
        created_at=parse_time(meta.get("creationTimestamp")) or EPOCH,
        deleting=meta.get("deletionTimestamp") is not None,
        outcome=None if ended is None else ("Complete" if "Complete" in conditions else "Failed"),
        message="" if ended is None else _cut(ended.get("message")),
        finished_at=None if ended is None else parse_time(ended.get("lastTransitionTime")),
        ttl_seconds=_int(spec.get("ttlSecondsAfterFinished")),
        proof=_text(_dict(meta, "annotations").get(names.ANNOTATION_PROOF)),
        suspended=_suspended(conditions) if spec.get("suspend") is True else None,
    )


def observe_pod(body: Body) -> ObservedPod | None:
    """None for a pod that no Job controls."""
    meta, status = _dict(body, "metadata"), _dict(body, "status")
    place = _place(body)
    if place is None or _controller(meta).get("kind") != "Job":
        return None
    conditions = {_text(c.get("type")): c for c in _dicts(status, "conditions")}
    scheduled = conditions.get("PodScheduled", {})
    bound = scheduled.get("status") == "True"
    container = next((c for c in _dicts(status, "containerStatuses") if c.get("name") == names.CONTAINER), {})
    state = _dict(container, "state")
    running, ended = _dict(state, "running"), _dict(state, "terminated")
    waiting_container, waiting = _waiting(status, state)
    disrupted = conditions.get("DisruptionTarget", {}).get("status") == "True"
    refused = None if disrupted else _refused(status, container)
    began = _text(ended.get("reason")) not in NEVER_BEGUN
    if refused is not None:
        ended = {}
    result, bad_result = parse_result(ended.get("message")) if began else (None, False)
    return ObservedPod(
        name=str(meta.get("name")),
        uid=str(meta.get("uid")),
        stage=place[0],
        attempt=place[1],
        owner_uid=str(_controller(meta).get("uid")),
        created_at=parse_time(meta.get("creationTimestamp")) or EPOCH,
        phase=_text(status.get("phase")) or "Pending",
        ip=_text(status.get("podIP")),
        deletion_due=parse_time(meta.get("deletionTimestamp")),
        scheduled=bound,
        scheduled_at=parse_time(scheduled.get("lastTransitionTime")) if bound else None,
        node=_cut(_dict(body, "spec").get("nodeName")) or None,
        taken_at=parse_time(status.get("startTime")),
        unschedulable=_unschedulable(scheduled),
        disrupted=disrupted,
        evicted=status.get("reason") == "Evicted" and refused is None,
        refused=refused,
        waiting_reason=_text(waiting.get("reason")),
        waiting_message=_cut(waiting.get("message")),
        waiting_container=waiting_container,
        started_at=parse_time(running.get("startedAt")) or (parse_time(ended.get("startedAt")) if began else None),
        finished_at=parse_time(ended.get("finishedAt")),
        exit_code=_int(ended.get("exitCode")),
        oom_killed=ended.get("reason") == "OOMKilled",
        memory_limit=_memory_limit(body),
        gpus=_gpus(meta),
        result=result,
        bad_result=bad_result,
    )


def _suspended(conditions: Mapping[Any, Body]) -> str:
    return _cut(conditions.get("Suspended", {}).get("message")) or "spec.suspend is true"


def _unschedulable(scheduled: Body) -> str | None:
    if scheduled.get("reason") not in UNSCHEDULABLE:
        return None
    return _cut(_BEYOND_NEED.sub("", _text(scheduled.get("message")) or "", count=1))


def _refused(status: Body, trainer: Body) -> str | None:
    """Return why the pod failed before anything of the trainer ran.

    A node lets pods fail before any of their containers begins: no such capacity any more, a device that is gone, a
    label that it lost. The kubelet has many names for it, and others with each release. Or it cannot begin the trainer,
    as where the driver of a GPU is broken. Or a container that the cluster puts before it fails."""
    if status.get("phase") != "Failed":
        return None
    ended = _dict(_dict(trainer, "state"), "terminated")
    reason = _text(ended.get("reason"))
    if reason in NEVER_BEGUN:
        return _cut(f"{reason}: {_text(ended.get('message')) or 'no more is said'}")
    before, reason = _dicts(status, "initContainerStatuses"), _text(status.get("reason"))
    if reason is None:
        return None if _began(trainer) else next(filter(None, map(_failed_before, before)), None)
    if any(_began(container) for container in (*before, *_dicts(status, "containerStatuses"))):
        return None
    return _cut(f"{reason}: {_text(status.get('message')) or 'no more is said'}")


def _began(container: Body) -> bool:
    states = (_dict(container, "state"), _dict(container, "lastState"))
    return any(_dict(state, "running") or _dict(state, "terminated") for state in states)


def _failed_before(container: Body) -> str | None:
    """Return that a container which the cluster put before ours has failed."""
    ended = _dict(_dict(container, "state"), "terminated")
    code = _int(ended.get("exitCode"))
    if not code:
        return None
    name, words = _text(container.get("name")), _text(ended.get("message")) or _text(ended.get("reason"))
    return _cut(
        f"container {name}, which the cluster puts before the trainer, ended with exit code {code}: "
        f"{words or 'no more is said'}"
    )


def _waiting(status: Body, state: Body) -> tuple[str | None, Body]:
    """Return what the pod waits for: (name, state) of a container that the cluster put before ours, else ours."""
    for container in _dicts(status, "initContainerStatuses"):
        waiting = _dict(_dict(container, "state"), "waiting")
        if _text(waiting.get("reason")) not in _USUAL_WAITS:
            return _cut(container.get("name")), waiting
    return None, _dict(state, "waiting")


def parse_result(message: object) -> tuple[RunResult | None, bool]:
    """The termination message as a RunResult, and whether there was one that cannot be used."""
    text = _text(message)
    if not text:
        return None, False
    if len(text.encode(errors="replace")) > MAX_RESULT_BYTES + 96:
        return None, True
    try:
        return RunResult.model_validate_json(text), False
    except ValidationError:
        return None, True


def as_gone(pod: ObservedPod) -> ObservedPod:
    return replace(pod, gone=True)


def with_live_pods(known: Iterable[ObservedPod], bodies: Iterable[Body]) -> tuple[ObservedPod, ...]:
    """Return the pods of a list, and as gone those that were known and are not in it."""
    live = {pod.uid: pod for pod in map(observe_pod, bodies) if pod is not None}
    return (*live.values(), *(as_gone(pod) for pod in known if pod.uid not in live))


def _place(body: Body) -> tuple[Stage, int] | None:
    labels = _labels(body)
    stage, attempt = labels.get(names.LABEL_STAGE), _text(labels.get(names.LABEL_ATTEMPT)) or ""
    if stage not in (Stage.PREPARE, Stage.TRAIN) or not attempt.isdecimal() or len(attempt) > 3 or int(attempt) < 1:
        return None
    return Stage(stage), int(attempt)


def _labels(body: Body) -> Body:
    return _dict(_dict(body, "metadata"), "labels")


def _controller(meta: Body) -> Body:
    return next((ref for ref in _dicts(meta, "ownerReferences") if ref.get("controller") is True), {})


def _memory_limit(body: Body) -> str:
    """Return the limit of the trainer's container, for words."""
    containers = _dicts(_dict(body, "spec"), "containers")
    trainer = next((c for c in containers if c.get("name") == names.CONTAINER), {})
    limit = _text(_dict(_dict(trainer, "resources"), "limits").get("memory")) or ""
    try:
        return f"{quantity_bytes(limit) / 2**30:g} GiB"
    except (ValueError, OverflowError):
        return "not known"


def _gpus(meta: Body) -> int:
    text = _text(_dict(meta, "annotations").get(ANNOTATION_GPUS)) or "0"
    return int(text) if text.isdecimal() and len(text) <= 3 else 0


def _dict(body: Body, key: str) -> Body:
    value = body.get(key)
    return cast(Body, value) if isinstance(value, dict) else {}


def _dicts(body: Body, key: str) -> list[Body]:
    value = body.get(key)
    if not isinstance(value, list):
        return []
    return [cast(Body, item) for item in cast(list[object], value) if isinstance(item, dict)]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _cut(value: object) -> str:
    text = _text(value)
    return without_secrets(text)[:MAX_TEXT] if text is not None else ""
