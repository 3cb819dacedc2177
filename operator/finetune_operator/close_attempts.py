"""Close the attempts that ended, once, with all that was observed of their Jobs and pods, and nothing of forged ones.

Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from finetune_api import retry
from finetune_api.base import sha256_digest
from finetune_api.names import Stage
from finetune_api.reasons import Fault, Reason
from finetune_api.status import AttemptStatus, FineTuneJobStatus, OperatorRecord, UsageStatus
from finetune_operator.attempt_outcome import (
    AttemptClass,
    AttemptOutcome,
    belongs,
    is_explained,
    is_open,
    outcome_of,
    without_other_containers,
)
from finetune_operator.clock import format_time, parse_time
from finetune_operator.observation import CreatedK8sJob, Observation, PodAnswer
from finetune_operator.observed import EPOCH, ObservedK8sJob, ObservedPod
from finetune_operator.pod_waits import is_on_its_way
from finetune_operator.progress_status import checkpoints, metrics_of_result, progress_of_result

MAX_ENTRIES = 10


@dataclass(frozen=True)
class JobState:
    """The status with its attempts brought up to date, and what exists of the newest one."""

    status: FineTuneJobStatus
    outcome: AttemptOutcome | None  # of the newest attempt, if it was closed just now
    k8s_job: ObservedK8sJob | None  # of the newest attempt
    pods: tuple[ObservedPod, ...]  # of the newest attempt
    wants_live_pods: bool = False  # its Job has ended, and none of the pods that are known says why

    @property
    def last(self) -> AttemptStatus | None:
        return self.status.attempts[-1] if self.status.attempts else None

    def with_status(self, status: FineTuneJobStatus) -> "JobState":
        return replace(self, status=status)


def close_attempts(status: FineTuneJobStatus, observation: Observation, now: datetime) -> JobState:
    """Return the state after what was observed; an attempt that was closed is never opened again."""
    if _began_without_uids(status):
        status = _adopt(status, observation.k8s_jobs)
    entries = [
        given_up(e, "Superseded", Reason.SUPERSEDED, now) if is_open(e) else e for e in status.attempts[:-1]
    ] + status.attempts[-1:]
    status = status.model_copy(update={"attempts": entries})
    if not entries:
        return JobState(status, None, None, ())
    entry = entries[-1]
    k8s_job, pods = _children_of(entry, observation, any_uid=_began_without_uids(status))
    status = _count_disruptions(status, pods)
    if not is_open(entry):
        return JobState(status, None, k8s_job, pods)
    if entry.job_uid is None and k8s_job is not None and (k8s_job.outcome or _is_told_of(pods, now)):
        # Only now, with what is written then anyway: before, a Job that nobody knows is simply made again.
        entry = entry.model_copy(update={"job_uid": k8s_job.uid, "job_proof": None})
        entries = [*entries[:-1], entry]
        status = status.model_copy(update={"attempts": entries})
    if entry.started_at is None and any(p.started_at is not None for p in pods):
        # Only now: before its pod has started, a Job that vanishes is simply created again.
        created = k8s_job.created_at if k8s_job is not None else min(p.created_at for p in pods)
        entry = entry.model_copy(update={"started_at": format_time(created)})
        status = status.model_copy(update={"attempts": [*entries[:-1], entry]})
    ended_job, ended_pods = without_other_containers(k8s_job, pods, now)
    outcome = outcome_of(entry, ended_job, ended_pods, entries[:-1])
    if outcome is None:
        return JobState(status, None, k8s_job, pods)
    if not observation.pods_listed and not is_explained(ended_job, ended_pods):
        return JobState(status, None, k8s_job, pods, wants_live_pods=True)
    return JobState(_close(status, outcome, pods, observation, now), outcome, k8s_job, pods)


def _is_told_of(pods: Sequence[ObservedPod], now: datetime) -> bool:
    """Return True once a pod has started or ended, or has a node and is slow to start there."""
    begun = [pod for pod in pods if pod.scheduled or pod.started_at is not None or not pod.active]
    return any(not is_on_its_way(pod, now) for pod in begun)


def running_job_uid(status: FineTuneJobStatus) -> str | None:
    """Return the UID of the Kubernetes Job whose pods count now; None while none does."""
    last = status.attempts[-1] if status.attempts else None
    return last.job_uid if last is not None and is_open(last) else None


def has_begun(status: FineTuneJobStatus) -> bool:
    """Return True once a pod of the job was seen to run."""
    return status.plan is not None or any(entry.started_at is not None for entry in status.attempts)


def _began_without_uids(status: FineTuneJobStatus) -> bool:
    """Return True for a job that began under an operator, or has a CRD, that keeps no digests and UIDs."""
    return (status.record is None or status.record.run_digest is None) and has_begun(status)


def _children_of(
    entry: AttemptStatus, observation: Observation, *, any_uid: bool
) -> tuple[ObservedK8sJob | None, tuple[ObservedPod, ...]]:
    """Return the attempt's Kubernetes Job and its pods.

    Labels and owners are anybody's to write. A Job counts that has the UID in the status; before that is known, one
    whose annotation only its maker could know."""
    uid = entry.job_uid
    if uid is None:
        proven = (
            j.uid for j in observation.k8s_jobs if belongs(entry, j) and _is_proven(entry, j, observation.created)
        )
        uid = next(proven, None)
    k8s_jobs = [j for j in observation.k8s_jobs if belongs(entry, j) and (any_uid or j.uid == uid)]
    pods = tuple(p for p in observation.pods if belongs(entry, p) and (any_uid or p.owner_uid == uid))
    return next(iter(k8s_jobs), None), pods


def wants_live_pods(status: FineTuneJobStatus, observation: Observation, now: datetime) -> bool:
    """Return True if pods have to be listed before anything is decided: the caches of Jobs and pods are not in step."""
    return close_attempts(status, observation, now).wants_live_pods


def _is_proven(entry: AttemptStatus, k8s_job: ObservedK8sJob, created: CreatedK8sJob | None) -> bool:
    """Return True if we made the Job: by memory, which a CRD that keeps no proofs needs, else by the status."""
    if k8s_job.proof is None:
        return False
    if created is not None and (created.stage, created.attempt) == (entry.stage, entry.number):
        return k8s_job.proof == created.proof
    return entry.job_proof == digest_of_proof(k8s_job.proof)


def digest_of_proof(proof: str) -> str:
    """Return what the status holds of a Job's proof before the Job exists."""
    return sha256_digest(proof.encode(errors="replace"))


def _adopt(status: FineTuneJobStatus, k8s_jobs: Sequence[ObservedK8sJob]) -> FineTuneJobStatus:
    """Enter the newest Job that the attempts do not know: its status write was lost."""
    stage = Stage.TRAIN if any(j.stage == Stage.TRAIN for j in k8s_jobs) or status.plan else Stage.PREPARE
    known = max((e.number for e in status.attempts if e.stage == stage), default=0)
    newest = max((j.attempt for j in k8s_jobs if j.stage == stage), default=0)
    if newest <= known:
        return status
    entry = running_entry(stage, newest)
    return status.model_copy(update={"attempts": [*status.attempts, entry][-MAX_ENTRIES:]})


def running_entry(stage: Stage, number: int) -> AttemptStatus:
    return AttemptStatus.model_validate({"number": number, "stage": stage.value, "class": "Running"})


def given_up(entry: AttemptStatus, attempt_class: AttemptClass, reason: Reason, now: datetime) -> AttemptStatus:
    """Return the open attempt as it is closed by us, whatever its pods would have told."""
    return entry.model_copy(
        update={"attempt_class": attempt_class, "reason": reason.value, "finished_at": format_time(now)}
    )


def _count_disruptions(status: FineTuneJobStatus, pods: Sequence[ObservedPod]) -> FineTuneJobStatus:
    """Count each disrupted pod once, also when the Job itself replaced it.

    Only the last UIDs are kept, while disrupted pods may stay as long as their Job. As pods follow one another, a pod
    older than one that was counted was counted too.
    """
    record = status.record or OperatorRecord()
    disrupted = [pod for pod in pods if pod.disrupted]
    newest = max((pod.created_at for pod in disrupted if pod.uid in record.disrupted_pods), default=EPOCH)
    uncounted = {p.uid: p for p in disrupted if p.uid not in record.disrupted_pods and p.created_at >= newest}
    new = sorted(uncounted, key=lambda uid: (uncounted[uid].created_at, uid))
    if not new:
        return status
    update = {"disruptions": record.disruptions + len(new), "disrupted_pods": [*record.disrupted_pods, *new][-20:]}
    return status.model_copy(update={"record": record.model_copy(update=update)})


def _close(
    status: FineTuneJobStatus,
    outcome: AttemptOutcome,
    pods: Sequence[ObservedPod],
    observation: Observation,
    now: datetime,
) -> FineTuneJobStatus:
    """Return the status with the newest attempt closed and the figures of its result taken over."""
    entry = status.attempts[-1]
    progress = observation.answer_of(entry)
    finished = outcome.finished_at or now
    result = outcome.result
    last_step = result.step if result is not None else None
    if last_step is None:
        last_step = progress.progress.step if progress is not None else entry.last_step
    resumed_from = result.resumed_from_step if result is not None else None
    if resumed_from is None:  # a supervisor that reports a killed trainer does not know
        resumed_from = progress.progress.resumed_from_step if progress is not None else entry.resumed_from_step
    closed = entry.model_copy(
        update={
            "attempt_class": outcome.attempt_class,
            "reason": outcome.reason.value,
            "exit_code": outcome.exit_code,
            "finished_at": format_time(finished),
            "resumed_from_step": resumed_from,
            "last_step": last_step if entry.stage == Stage.TRAIN else None,
            "lost_seconds": _lost_seconds(status, entry, outcome, progress, finished),
        }
    )
    update: dict[str, object] = {
        "attempts": [*status.attempts[:-1], closed],
        "failures": status.failures + (outcome.attempt_class == "Failure"),
        "usage": used(status, pods, finished, now),
    }
    if result is not None and entry.stage == Stage.PREPARE and outcome.attempt_class == "Succeeded":
        update |= {"plan": result.plan, "data": result.data, "progress": None}  # of the data: all is read
    if outcome.exit_code is not None and retry.is_prepared_again(entry.stage, outcome.exit_code):
        update |= {"plan": None, "data": None}  # so the next attempt prepares
    elif result is not None and entry.stage == Stage.TRAIN:
        update["metrics"] = metrics_of_result(status.metrics, result)
        # After the commit all are removed but the last, which an attempt that only found the commit does not name.
        known = [] if outcome.attempt_class == "Succeeded" else status.checkpoints
        update["checkpoints"] = checkpoints(known, result.checkpoint)
        update["progress"] = progress_of_result(status.progress, status.plan, result, finished)
        if result.artifact is not None and outcome.attempt_class == "Succeeded":
            update["artifacts"] = [result.artifact]
    return status.model_copy(update=update)


def _lost_seconds(
    status: FineTuneJobStatus,
    entry: AttemptStatus,
    outcome: AttemptOutcome,
    progress: PodAnswer | None,
    finished: datetime,
) -> int | None:
    """Work after the last checkpoint. None when it is not known: the pod was never asked, or its Job never ran."""
    if entry.stage != Stage.TRAIN or outcome.attempt_class == "Succeeded":
        return None
    result = outcome.result
    if result is not None and result.fault == Fault.INTERRUPTED:
        return 0
    if progress is not None:
        return int(progress.progress.seconds_since_checkpoint + max(0.0, (finished - progress.at).total_seconds()))
    started = parse_time(entry.started_at)
    if started is not None and not status.checkpoints:
        return max(0, int((finished - started).total_seconds()))
    return None


def used(status: FineTuneJobStatus, pods: Sequence[ObservedPod], finished: datetime, now: datetime) -> UsageStatus:
    """Usage with the pods of one more attempt, which ended at `finished` where a pod does not say."""
    ran = sum(p.gpus * ((p.finished_at or finished) - p.started_at).total_seconds() for p in pods if p.started_at)
    accepted = parse_time(status.record.accepted_at) if status.record else None
    before = status.usage.gpu_seconds if status.usage else 0
    return UsageStatus(
        seconds=max(0, int((now - accepted).total_seconds())) if accepted else 0,
        gpu_seconds=before + max(0, int(ran)),
    )
