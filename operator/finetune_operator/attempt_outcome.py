"""How one attempt ended, and what that counts as. Pure; every row of the fault table is decided here."""

import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal

from finetune_api.names import Stage
from finetune_api.reasons import (
    DISK_FIELDS,
    EXIT_CODES,
    FAULTS,
    FINAL_EXIT_CODES,
    MEMORY_FIELDS,
    Fault,
    Reason,
    reason_of_exit,
    words,
)
from finetune_api.retry import failure_class, is_prepared_again
from finetune_api.run import CONTRACT_VERSION, RunResult
from finetune_api.status import AttemptStatus
from finetune_operator.job_reader import reason_of
from finetune_operator.observed import ObservedK8sJob, ObservedPod

AttemptClass = Literal["Succeeded", "Failure", "Disruption", "Suspended", "Superseded", "Waiting"]

# A running attempt with one of these reasons is being stopped by us; the reason is written before the Job is deleted.
STOPPING = (Reason.SUSPENDED, Reason.NO_PROGRESS)
NO_MESSAGE = (Reason.POD_LOST, Reason.BAD_REPORT)
FIRST_SIGNAL = 128  # exit codes above it: ended by the signal of that number above it
# What a pod may take to end once its trainer has. Then another container, which somebody puts into all pods, stays.
END_S = 60


@dataclass(frozen=True)
class AttemptOutcome:
    """How one attempt ended."""

    attempt_class: AttemptClass
    reason: Reason
    message: str
    exit_code: int | None = None
    result: RunResult | None = None
    finished_at: datetime | None = None


def is_open(entry: AttemptStatus) -> bool:
    return entry.attempt_class == "Running"


def is_stopping(entry: AttemptStatus) -> bool:
    return is_open(entry) and reason_of(entry.reason) in STOPPING


def belongs(entry: AttemptStatus, child: ObservedK8sJob | ObservedPod) -> bool:
    return child.stage == entry.stage and child.attempt == entry.number


def is_unstarted(entry: AttemptStatus, k8s_job: ObservedK8sJob | None, pods: Sequence[ObservedPod]) -> bool:
    """Return True if the attempt's Job is yet to be created: nothing of it was ever seen to run."""
    return is_open(entry) and k8s_job is None and not pods and entry.started_at is None and not is_stopping(entry)


def seconds_to_end(pod: ObservedPod, now: datetime) -> float | None:
    """Return for how long a pod whose trainer has ended may still take to end itself, below 0 once it takes longer.

    None while its trainer has not ended, and for a pod that is gone, or is being removed, which takes its own time."""
    if not pod.active or pod.disrupted or pod.deletion_due is not None or pod.exit_code is None:
        return None
    return (pod.finished_at + timedelta(seconds=END_S) - now).total_seconds() if pod.finished_at is not None else None


def without_other_containers(
    job: ObservedK8sJob | None, pods: Sequence[ObservedPod], now: datetime
) -> tuple[ObservedK8sJob | None, tuple[ObservedPod, ...]]:
    """Return an attempt's Job and pods as they would be if no other container kept an ended trainer's pod alive.

    A trainer is never started again in its pod, so nothing of the attempt can run any more."""
    kept = {pod.uid for pod in pods if (left_s := seconds_to_end(pod, now)) is not None and left_s <= 0}
    if not kept or any(pod.active and pod.uid not in kept for pod in pods):
        return job, tuple(pods)
    ended = tuple(replace(p, phase="Failed" if p.exit_code else "Succeeded") if p.uid in kept else p for p in pods)
    if job is not None and job.live:
        failed = all(pod.exit_code for pod in ended)
        job = replace(job, outcome="Failed" if failed else "Complete")
    return job, ended


def outcome_of(
    entry: AttemptStatus, job: ObservedK8sJob | None, pods: Sequence[ObservedPod], earlier: Sequence[AttemptStatus]
) -> AttemptOutcome | None:
    """Return how the open attempt ended; None while it is unstarted, runs, or has pods that have not ended."""
    if is_unstarted(entry, job, pods) or (job is not None and job.live) or any(pod.active for pod in pods):
        return None
    pod = max(pods, key=lambda p: (_tells_its_end(p), p.created_at, p.uid), default=None)
    result = next((p.result for p in pods if p.exit_code == 0 and _completes(entry, p.result)), None)
    finished_at = (job and job.finished_at) or (pod and pod.finished_at) or None
    if result is not None:
        reason = Reason.PREPARED if result.stage == Stage.PREPARE else Reason.COMMITTED
        return AttemptOutcome("Succeeded", reason, words(result.fault, result.args), 0, result, finished_at)
    if pod is None or pod.exit_code is None:
        attempt_class, reason, message = _without_container(entry, job, pod, earlier)
        return AttemptOutcome(attempt_class, reason, message, None, None, finished_at)
    result = pod.result if _matches(entry, pod) else None
    attempt_class, reason, message = _with_container(entry, job, pod, result, earlier)
    return AttemptOutcome(attempt_class, reason, message, pod.exit_code, result, finished_at)


def is_explained(job: ObservedK8sJob | None, pods: Sequence[ObservedPod]) -> bool:
    """Return True if one of the pods is why the attempt has ended.

    Else the watch of pods may be behind that of Jobs, and a pod that it has not told of yet may have the verdict."""
    if job is not None and job.outcome == "Complete":
        return any(pod.exit_code == 0 for pod in pods)
    for pod in pods:
        replaced = pod.disrupted and pod.exit_code not in FINAL_EXIT_CODES  # by Kubernetes, inside the Job
        if pod.refused is not None or pod.evicted or (pod.exit_code is not None and not replaced):
            return True
    return False


def _tells_its_end(pod: ObservedPod) -> bool:
    return pod.exit_code is not None or pod.refused is not None


def _completes(entry: AttemptStatus, result: RunResult | None) -> bool:
    """Return True if a result of success brings what its stage is for."""
    if result is None or result.stage != entry.stage or result.attempt != entry.number or result.exit_code != 0:
        return False
    if result.stage == Stage.PREPARE:
        return result.fault == Fault.PREPARED and result.plan is not None and result.data is not None
    return result.fault == Fault.COMMITTED and result.artifact is not None


def _matches(entry: AttemptStatus, pod: ObservedPod) -> bool:
    """Return True if the result is of this attempt and says what the exit code says, which decides."""
    result = pod.result
    if result is None or (result.stage, result.attempt) != (entry.stage, entry.number):
        return False
    if result.contract_version != CONTRACT_VERSION or result.fault == Fault.UNRECOGNISED:
        return result.exit_code == pod.exit_code  # another release may give a fault another exit code
    return result.exit_code == pod.exit_code == EXIT_CODES[FAULTS[result.fault].reason]


def _with_container(
    entry: AttemptStatus,
    job: ObservedK8sJob | None,
    pod: ObservedPod,
    result: RunResult | None,
    earlier: Sequence[AttemptStatus],
) -> tuple[AttemptClass, Reason, str]:
    """Order matters: what the trainer decided, what we asked for, what the cluster did, then the exit code."""
    code = pod.exit_code or 0
    told = words(result.fault, result.args) if result is not None else ""
    by_code = reason_of_exit(code)
    if code in FINAL_EXIT_CODES:
        return (failure_class(entry.stage, code, earlier), by_code, told or f"the trainer ended with exit code {code}")
    if is_stopping(entry):
        return _stopped(entry)
    if pod.disrupted:
        return "Disruption", Reason.DISRUPTED, f"pod {pod.name} was evicted or preempted"
    if pod.evicted:
        return "Failure", Reason.DISK_LIMIT, _disk_words(entry, pod)
    if pod.oom_killed or by_code == Reason.HOST_OOM:
        return "Failure", Reason.HOST_OOM, told or _memory_words(entry, pod)
    if code == 0:
        return _without_message(pod, earlier, entry)
    if job is None:
        return "Failure", Reason.JOB_LOST, "its Kubernetes Job was deleted by somebody else"
    if is_prepared_again(entry.stage, code):
        told = told or "the plan is of another release of the trainer"
        return failure_class(entry.stage, code, earlier), by_code, told
    if pod.deletion_due is not None and _was_killed(pod, result):
        return "Failure", Reason.POD_LOST, _deleted_words(pod) + " and its trainer killed before it had stopped"
    if told:
        return "Failure", by_code, told
    if code > FIRST_SIGNAL:
        return "Failure", Reason.UNKNOWN, words(Fault.KILLED, {"signal": _signal_name(code - FIRST_SIGNAL)})
    return "Failure", by_code, f"the trainer ended with exit code {code} and left no message"


def _memory_words(entry: AttemptStatus, pod: ObservedPod) -> str:
    return words(Fault.HOST_OOM, {"limit": pod.memory_limit, "field": MEMORY_FIELDS[Stage(entry.stage)]})


def _disk_words(entry: AttemptStatus, pod: ObservedPod) -> str:
    return f"pod {pod.name} used more disk than its limit; raise {DISK_FIELDS[Stage(entry.stage)]}"


def _was_killed(pod: ObservedPod, result: RunResult | None) -> bool:
    """Return True if the kubelet's last means ended the trainer, or what the trainer's supervisor had begun."""
    if result is not None:
        return result.fault == Fault.KILLED and result.args.get("signal") == signal.SIGKILL.name
    return pod.exit_code == FIRST_SIGNAL + signal.SIGKILL


def _deleted_words(pod: ObservedPod) -> str:
    return f"pod {pod.name} was deleted, by whom is not known,"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


def _without_container(
    entry: AttemptStatus, job: ObservedK8sJob | None, pod: ObservedPod | None, earlier: Sequence[AttemptStatus]
) -> tuple[AttemptClass, Reason, str]:
    """No container is known to have ended: the pod is unknown, or was deleted before it ran or was last observation."""
    if is_stopping(entry):
        return _stopped(entry)
    if job is not None and job.outcome == "Complete":
        return _without_message(pod, earlier, entry)
    if pod is not None and pod.disrupted:
        return "Disruption", Reason.DISRUPTED, f"pod {pod.name} was evicted or preempted"
    if pod is not None and pod.refused is not None:
        return "Waiting", Reason.POD_NOT_STARTED, f"the pod failed before anything of the trainer ran: {pod.refused}"
    if pod is not None and pod.evicted:
        return "Failure", Reason.DISK_LIMIT, _disk_words(entry, pod)
    if job is None:
        return "Failure", Reason.JOB_LOST, "its Kubernetes Job was deleted by somebody else"
    if pod is not None and (pod.gone or pod.deletion_due is not None):
        return "Failure", Reason.POD_LOST, f"{_deleted_words(pod)} and left no result. {job.message}".strip()
    return "Failure", Reason.POD_LOST, f"its pod is gone without a result. {job.message}".strip()


def _stopped(entry: AttemptStatus) -> tuple[AttemptClass, Reason, str]:
    if reason_of(entry.reason) == Reason.SUSPENDED:
        return "Suspended", Reason.SUSPENDED, "stopped because spec.suspend is true"
    within = "within recovery.progressDeadlineSeconds"
    return "Failure", Reason.NO_PROGRESS, f"stopped because it got no further, or did not say so, {within}"


def _without_message(
    pod: ObservedPod | None, earlier: Sequence[AttemptStatus], entry: AttemptStatus
) -> tuple[AttemptClass, Reason, str]:
    """Return the outcome of an attempt that ended well and left no result.

    The first time it counts as a disruption, not as a retry: the next attempt finds what this one committed."""
    reason = Reason.BAD_REPORT if pod is not None and (pod.bad_result or pod.result is not None) else Reason.POD_LOST
    before = earlier[-1] if earlier else None
    again = before is not None and before.stage == entry.stage and reason_of(before.reason) in NO_MESSAGE
    message = "it ended with exit code 0, but left no result that can be read"
    return "Failure" if again else "Disruption", reason, message
