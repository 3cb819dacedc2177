"""Fold what was observed into the attempts: open ones that ended are closed, once, with everything they tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_api import retry
from finetune_api.names import Stage
from finetune_api.reasons import Fault
from finetune_api.status import AttemptStatus, FineTuneJobStatus, OperatorRecord, UsageStatus
from finetune_operator.attempts import Ended, belongs, is_open, judge
from finetune_operator.clock import format_time, parse_time
from finetune_operator.figures import checkpoints, metrics_of_report, progress_of_report
from finetune_operator.observed import EPOCH, ObservedJob, ObservedPod
from finetune_operator.seen import Seen, SeenProgress

MAX_ENTRIES = 10


@dataclass(frozen=True)
class Folded:
    """The status with attempts brought up to date, and what the newest attempt is about."""

    status: FineTuneJobStatus
    ended: Ended | None  # the newest attempt, if it was closed just now
    job: ObservedJob | None  # of the newest attempt
    pods: tuple[ObservedPod, ...]  # of the newest attempt

    @property
    def last(self) -> AttemptStatus | None:
        return self.status.attempts[-1] if self.status.attempts else None


def fold(status: FineTuneJobStatus, seen: Seen, now: datetime) -> Folded:
    status = _adopt(status, seen.jobs)
    status = _count_disruptions(status, seen.pods)
    entries = [_superseded(e, now) if is_open(e) else e for e in status.attempts[:-1]] + status.attempts[-1:]
    status = status.model_copy(update={"attempts": entries})
    if not entries:
        return Folded(status, None, None, ())
    entry = entries[-1]
    job = next((j for j in seen.jobs if belongs(entry, j)), None)
    pods = tuple(p for p in seen.pods if belongs(entry, p))
    if not is_open(entry):
        return Folded(status, None, job, pods)
    if entry.started_at is None and any(p.started_at is not None for p in pods):
        # Only now: before its pod has started, a Job that vanishes is simply created again.
        created = job.created_at if job is not None else min(p.created_at for p in pods)
        entry = entry.model_copy(update={"started_at": format_time(created)})
        status = status.model_copy(update={"attempts": [*entries[:-1], entry]})
    ended = judge(entry, job, pods, entries[:-1])
    if ended is None:
        return Folded(status, None, job, pods)
    return Folded(_close(status, ended, pods, seen, now), ended, job, pods)


def _adopt(status: FineTuneJobStatus, jobs: Sequence[ObservedJob]) -> FineTuneJobStatus:
    """Enter the newest Job that the attempts do not know: its status write was lost."""
    stage = Stage.TRAIN if any(j.stage == Stage.TRAIN for j in jobs) or status.plan else Stage.PREPARE
    known = max((e.number for e in status.attempts if e.stage == stage), default=0)
    newest = max((j.attempt for j in jobs if j.stage == stage), default=0)
    if newest <= known:
        return status
    entry = running_entry(stage, newest)
    return status.model_copy(update={"attempts": [*status.attempts, entry][-MAX_ENTRIES:]})


def running_entry(stage: Stage, number: int) -> AttemptStatus:
    return AttemptStatus.model_validate({"number": number, "stage": stage.value, "class": "Running"})


def _superseded(entry: AttemptStatus, now: datetime) -> AttemptStatus:
    return entry.model_copy(
        update={"attempt_class": "Superseded", "reason": "Superseded", "finished_at": format_time(now)}
    )


def _count_disruptions(status: FineTuneJobStatus, pods: Sequence[ObservedPod]) -> FineTuneJobStatus:
    """Each disrupted pod counts once, also when the Job itself replaced it.

    Pods follow one another, so one older than a pod that was counted was counted too, even if its UID had to make
    room: some disrupted pods stay as long as their Job, and there may be more of them than UIDs are kept.
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
    ended: Ended,
    pods: Sequence[ObservedPod],
    seen: Seen,
    now: datetime,
) -> FineTuneJobStatus:
    """The status with the newest attempt closed and the figures of its report taken over."""
    entry = status.attempts[-1]
    progress = seen.answer_of(entry)
    finished = ended.finished_at or now
    report = ended.report
    step = report.step if report is not None else None
    resumed_from = report.resumed_from_step if report is not None else None
    if resumed_from is None:  # a supervisor that reports a killed trainer does not know
        resumed_from = progress.progress.resumed_from_step if progress is not None else entry.resumed_from_step
    closed = entry.model_copy(
        update={
            "attempt_class": ended.attempt_class,
            "reason": ended.reason.value,
            "exit_code": ended.exit_code,
            "finished_at": format_time(finished),
            "resumed_from_step": resumed_from,
            "last_step": step if step is not None else (progress.progress.step if progress else entry.last_step),
            "lost_seconds": _lost_seconds(status, entry, ended, progress, finished),
        }
    )
    update: dict[str, object] = {
        "attempts": [*status.attempts[:-1], closed],
        "failures": status.failures + (ended.attempt_class == "Failure"),
        "usage": used(status, pods, finished, now),
    }
    if report is not None and entry.stage == Stage.PREPARE and ended.attempt_class == "Succeeded":
        update |= {"plan": report.plan, "data": report.data}
    if ended.exit_code is not None and retry.is_prepared_again(entry.stage, ended.exit_code):
        update |= {"plan": None, "data": None}  # so the next attempt prepares
    elif report is not None and entry.stage == Stage.TRAIN:
        update["metrics"] = metrics_of_report(status.metrics, report)
        # After the commit all are removed but the last, which an attempt that only found the commit does not name.
        known = [] if ended.attempt_class == "Succeeded" else status.checkpoints
        update["checkpoints"] = checkpoints(known, report.checkpoint)
        update["progress"] = progress_of_report(status.progress, status.plan, report, finished)
        if report.artifact is not None and ended.attempt_class == "Succeeded":
            update["artifacts"] = [report.artifact]
    return status.model_copy(update=update)


def _lost_seconds(
    status: FineTuneJobStatus,
    entry: AttemptStatus,
    ended: Ended,
    progress: SeenProgress | None,
    finished: datetime,
) -> int | None:
    """Work after the last checkpoint. None when it is not known: the pod was never asked, or its Job never ran."""
    if entry.stage != Stage.TRAIN or ended.attempt_class == "Succeeded":
        return None
    report = ended.report
    if report is not None and report.fault == Fault.INTERRUPTED:
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
