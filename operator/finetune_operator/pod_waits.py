"""What the newest attempt is doing while it is open: does it run, and if not, what is it waiting for. Pure."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from finetune_api.names import PII_KEY_VOLUME
from finetune_api.reasons import Reason
from finetune_api.redact import shortened
from finetune_api.retry import PATIENCE_S
from finetune_api.status import AttemptStatus
from finetune_operator.attempt_outcome import is_stopping
from finetune_operator.clock import format_time, parse_time
from finetune_operator.observation import Blocked
from finetune_operator.observed import EPOCH, ObservedK8sJob, ObservedPod

# Waits that end the job after a while: its user has to fix something. What only the platform team can fix, such as an
# image, is waited for as long as it takes.
PATIENCE = timedelta(seconds=PATIENCE_S)
IMPATIENT_REASONS = (Reason.MISSING_REF,)
# Refused creations show only when they are tried, so the last answer stands until the Job exists.
REFUSED = (
    Reason.QUOTA_EXCEEDED, Reason.FORBIDDEN, Reason.NAME_COLLISION, Reason.RUNTIME_NOT_FOUND, Reason.INVALID_MANIFEST,
)  # fmt: skip
SLOW_START_S = 15  # a pod that has not started by then is looked into, and told of
SLOW_START = timedelta(seconds=SLOW_START_S)
AHEAD = timedelta(minutes=5)  # that a node's clock may be

_IMAGE_WAITS = (
    "ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable",
    "ImageInspectError",
)  # fmt: skip
_CONFIG_WAITS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")
_FURTHER = ("SuccessfulCreate", "Pulling", "Pulled", "Created", "Started")  # the pod exists; its volumes are mounted
TELLING_EVENTS = frozenset({
    *_FURTHER, "FailedCreate", "FailedMount", "FailedCreatePodSandBox", "FailedAttachVolume", "NodeNotReady",
    "TaintManagerEviction",
})  # fmt: skip
_NOT_FOUND = re.compile(r'(secret|configmap|serviceaccount|service account) "?([a-z0-9.-]+/)?([a-z0-9.-]+)"? not found')
_FIELDS = {
    "secret": ("Secret", "storage.secretRef"),
    "configmap": ("ConfigMap", "storage.caBundle.configMapRef"),
    "serviceaccount": ("ServiceAccount", "storage.serviceAccountName"),
    "service account": ("ServiceAccount", "storage.serviceAccountName"),
}
# What a node says of a pod that it cannot set up; nobody but the platform team can mend it.
_NODE_TROUBLE = {
    "FailedCreatePodSandBox": "the node cannot set up the pod",
    "FailedAttachVolume": "a volume of the pod cannot be attached",
}


@dataclass(frozen=True)
class PodState:
    """What the newest attempt's pod does.

    wait: what a person or the cluster has to end before it can run. ending: the trainer has ended, its pod or its Job
    not yet.
    on_its_way: it has a place and nothing is in its way, so that it will most likely run within seconds."""

    running: bool = False
    ending: bool = False
    scheduled: bool = False
    wait: Blocked | None = None
    on_its_way: bool = False


def pod_state_of(
    entry: AttemptStatus,
    job: ObservedK8sJob | None,
    pods: Sequence[ObservedPod],
    blocked: Blocked | None,
    now: datetime,
) -> PodState:
    active = [pod for pod in pods if pod.active]
    if not active:
        wait = _suspension(entry, job) or blocked or _disruption(entry, job, pods)
        return PodState(ending=bool(pods) and wait is None, wait=wait)
    pod = max(active, key=lambda p: (p.created_at, p.uid))
    lost = pod.deletion_due is not None and now > pod.deletion_due + timedelta(seconds=60)
    if lost and (pod.scheduled or pod.running):
        wait = Blocked(Reason.NODE_UNREACHABLE, f"the node of pod {pod.name} does not answer")
        return PodState(running=pod.running, scheduled=True, wait=wait)
    if pod.running:
        return PodState(running=True, scheduled=True)
    if pod.exit_code is not None:
        return PodState(ending=True, scheduled=True)
    wait = _container_wait(pod) or blocked
    if wait is None and pod.unschedulable is not None:
        wait = Blocked(Reason.UNSCHEDULABLE, f"pod {pod.name} has no node: {pod.unschedulable}")
    wait = wait or _disruption(entry, job, pods) or _not_taken(pod, now)
    return PodState(scheduled=pod.scheduled, wait=wait, on_its_way=wait is None and is_on_its_way(pod, now))


def is_on_its_way(pod: ObservedPod, now: datetime) -> bool:
    """Return True if the pod has just found a node: what is written when it starts can wait until then."""
    is_young = (now - pod.created_at).total_seconds() < SLOW_START_S
    placed = pod.active and pod.scheduled and pod.started_at is None
    return placed and is_young and _container_wait(pod) is None


def is_slow_to_start(entry: AttemptStatus, k8s_job: ObservedK8sJob, now: datetime) -> bool:
    """Return True if the attempt should run by now, and no pod of it has started."""
    waits = entry.attempt_class == "Running" and entry.started_at is None and k8s_job.live
    return waits and (now - k8s_job.created_at).total_seconds() >= SLOW_START_S


def needs_explanation(job: ObservedK8sJob | None, pods: Sequence[ObservedPod], now: datetime) -> str | None:
    """UID whose events say why nothing has started: the Job's without pods, else that of a pod without a container."""
    if (
        job is None
        or not job.live
        or job.suspended is not None
        or (now - job.created_at).total_seconds() < SLOW_START_S
    ):
        return None
    active = [pod for pod in pods if pod.active]
    if not active:
        return job.uid if not pods else None
    pod = max(active, key=lambda p: (p.created_at, p.uid))
    stuck = pod.scheduled and pod.started_at is None and _container_wait(pod) is None
    return pod.uid if stuck and (now - pod.created_at).total_seconds() >= SLOW_START_S else None


def explain_events(events: Sequence[Mapping[str, Any]], namespace: str, now: datetime) -> Blocked | None:
    """What the newest telling event of an object says that a person must fix.

    None when the pod has come further since: a volume that was late must not be blamed for a long image pull.
    Who tells of an event writes its time. One beyond what a node's clock may be ahead was told when the server says
    that it was made: else it would be the newest for ever."""

    def order(event: Mapping[str, Any]) -> tuple[datetime, bool]:
        told = parse_time(event.get("lastTimestamp")) or parse_time(event.get("eventTime"))
        if told is None or told > now + AHEAD:
            told = parse_time((event.get("metadata") or {}).get("creationTimestamp")) or EPOCH
        return told, event.get("reason") in _FURTHER

    for event in sorted(events, key=order, reverse=True):
        if event.get("reason") in _FURTHER:
            return None
        blocked = explain(str(event.get("reason")), str(event.get("message")), namespace)
        if blocked is not None:
            return blocked
    return None


def explain(event_reason: str, message: str, namespace: str) -> Blocked | None:
    """What an event on a Job or pod of ours means; None where it says nothing that a person must act on."""
    text = shortened(" ".join(message.split()), 512)
    if event_reason in _NODE_TROUBLE:
        return Blocked(Reason.POD_NOT_STARTED, f"{_NODE_TROUBLE[event_reason]}: {text}")
    if event_reason == "NodeNotReady" or (event_reason == "TaintManagerEviction" and text.startswith("Marking")):
        return Blocked(Reason.NODE_UNREACHABLE, "the node of the pod is not ready, and the pod has not started")
    if event_reason not in ("FailedCreate", "FailedMount"):
        return None
    missing = missing_ref(text, namespace)
    if missing is not None:
        return missing
    if event_reason == "FailedMount":
        return Blocked(Reason.MISSING_REF, f"a volume of the pod cannot be mounted: {text}")
    if "exceeded quota" in text:
        return Blocked(Reason.QUOTA_EXCEEDED, f"waiting for quota: {text}")
    return Blocked(Reason.FORBIDDEN, f"the cluster refuses the pod: {text}")


def missing_ref(text: str, namespace: str) -> Blocked | None:
    """Names the missing object and the field of the spec that asks for it; never what is in it."""
    found = _NOT_FOUND.search(text)
    if found is None:
        return None
    kind, field = _FIELDS[found[1]]
    if kind == "Secret" and f'volume "{PII_KEY_VOLUME}"' in text:
        field = "preprocessing.pii.keySecretRef"
    return Blocked(
        Reason.MISSING_REF,
        f"{kind} {namespace}/{found[3]} does not exist: create it, or name another in {field} of a new job",
    )


def _container_wait(pod: ObservedPod) -> Blocked | None:
    before = f"container {pod.waiting_container}, which the cluster puts before the trainer"
    if pod.waiting_reason in _IMAGE_WAITS:
        # While it pauses between two tries, the kubelet repeats why the last one failed.
        text = pod.waiting_message.rpartition("ErrImagePull: ")[2] or pod.waiting_reason or ""
        image = "the trainer image" if pod.waiting_container is None else f"the image of {before},"
        reason = "ErrImagePull" if pod.waiting_reason == "ImagePullBackOff" else pod.waiting_reason
        return Blocked(Reason.IMAGE_PULL, f"{image} cannot be pulled ({reason}): {text}")
    if pod.waiting_container is not None:
        return Blocked(Reason.POD_NOT_STARTED, f"{before}, waits ({pod.waiting_reason}): {pod.waiting_message}")
    if pod.waiting_reason in _CONFIG_WAITS:
        return Blocked(Reason.MISSING_REF, f"the container cannot start ({pod.waiting_reason}): {pod.waiting_message}")
    return None


def _not_taken(pod: ObservedPod, now: datetime) -> Blocked | None:
    """Return that the pod's node has not even begun with it: no event says so before the node is given up."""
    if pod.taken_at is not None or pod.scheduled_at is None or now < pod.scheduled_at + SLOW_START:
        return None
    since = f"which it was given at {format_time(pod.scheduled_at)}"
    return Blocked(
        Reason.NODE_UNREACHABLE, f"node {pod.node} has not begun with pod {pod.name}, {since}: is its kubelet away?"
    )


def _suspension(entry: AttemptStatus, job: ObservedK8sJob | None) -> Blocked | None:
    if job is None or not job.live or job.suspended is None or is_stopping(entry):
        return None
    text = f"Kubernetes Job {job.name} is suspended by somebody else, such as Kueue ({job.suspended}): waiting until"
    return Blocked(Reason.JOB_SUSPENDED, f"{text} its spec.suspend is false")


def _disruption(entry: AttemptStatus, job: ObservedK8sJob | None, pods: Sequence[ObservedPod]) -> Blocked | None:
    lost = [pod for pod in pods if pod.disrupted]
    if not lost or job is None or is_stopping(entry):
        return None
    pod = max(lost, key=lambda p: (p.created_at, p.uid))
    return Blocked(Reason.DISRUPTED, f"pod {pod.name} was evicted or preempted; a new one continues at the checkpoint")
