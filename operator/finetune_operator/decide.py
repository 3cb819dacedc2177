"""What to do next for a job without a verdict, and what its conditions say meanwhile. Pure."""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_api import retry
from finetune_api.job import FineTuneJobSpec
from finetune_api.names import MAX_ATTEMPTS, Stage
from finetune_api.reasons import Reason
from finetune_api.status import AttemptStatus, ConditionType, FineTuneJobStatus, OperatorRecord
from finetune_operator.attempts import belongs, is_open, is_planned, is_stopping
from finetune_operator.clock import format_time, parse_time
from finetune_operator.conditions import find
from finetune_operator.figures import is_stale, is_write_due, with_progress
from finetune_operator.fold import MAX_ENTRIES, Folded, running_entry
from finetune_operator.live import IMPATIENT_REASONS, PATIENCE, REFUSED, SLOW_START_S, Look, look
from finetune_operator.seen import Action, Blocked, CreateJob, DeleteJob, Seen
from finetune_operator.situation import describe
from finetune_operator.verdict import Limits, failed, failure, is_success, limits_of, succeeded
from finetune_operator.view import JobView, reason_of


@dataclass(frozen=True)
class Decision:
    status: FineTuneJobStatus
    actions: tuple[Action, ...] = ()
    requeue_after_s: float | None = None


def decide(job: JobView, spec: FineTuneJobSpec, folded: Folded, seen: Seen, now: datetime) -> Decision:
    limits = limits_of(spec)
    suspend = spec.suspend is True
    folded = _shelve(folded, suspend, now)
    seen_as = _look(folded, seen, now)
    folded = _with_wait_clock(folded, seen_as, suspend, now)
    deletions = _leftovers(folded, seen)
    if is_success(folded):
        return Decision(succeeded(folded, job.generation, now), deletions)
    why = failure(folded, seen_as, limits, now)
    if why is not None:
        all_live = tuple(DeleteJob(j.name, j.uid) for j in seen.jobs if j.live and not j.deleting)
        return Decision(failed(folded, why, job.generation, now), all_live)
    folded = _stop(folded, seen, suspend, seen_as, limits)
    folded, due_s = _next_attempt(folded, seen, suspend, now)
    seen_as = _look(folded, seen, now)
    actions = (*deletions, *_own_action(folded, seen))
    status = _figures(folded, seen, seen_as, now)
    folded = replace(folded, status=status)
    answer = seen.answer_of(folded.last) if folded.last is not None and seen_as.running else None
    said = answer.progress if answer is not None else None
    status = describe(job, folded, seen_as, suspend, quiet=_is_quiet(folded, seen), said=said, now=now)
    return Decision(status, actions, _requeue(folded, seen_as, limits, due_s, now))


def _shelve(folded: Folded, suspend: bool, now: datetime) -> Folded:
    """An attempt that is only planned is given up when the job is suspended; there is no Job to stop."""
    last = folded.last
    if not suspend or last is None or not is_planned(last, folded.job, folded.pods):
        return folded
    update = {"attempt_class": "Suspended", "reason": Reason.SUSPENDED.value, "finished_at": format_time(now)}
    return _with_last(folded, last.model_copy(update=update))


def _look(folded: Folded, seen: Seen, now: datetime) -> Look:
    last = folded.last
    if last is None or not is_open(last):
        return Look()
    blocked = seen.blocked
    planned = is_planned(last, folded.job, folded.pods)
    stored = find(folded.status, ConditionType.DEGRADED)
    if planned and blocked is None and stored is not None and stored.status == "True":
        reason = reason_of(stored.reason)
        blocked = Blocked(reason, stored.message) if reason in REFUSED else None
    return look(last, folded.job, folded.pods, blocked, now)


def _with_wait_clock(folded: Folded, seen_as: Look, suspend: bool, now: datetime) -> Folded:
    """Since when somebody has to fix something; the clock goes on through the attempts in between, and not at all
    while the job is suspended, as then nobody tries."""
    entries = folded.status.attempts
    record = folded.status.record or OperatorRecord()
    closed = [e for e in entries if not is_open(e)]
    waiting = bool(closed) and closed[-1].attempt_class == "Waiting"
    if seen_as.wait is not None and seen_as.wait.reason in IMPATIENT_REASONS:
        waiting = True
    since = (record.storage_wait_since or format_time(now)) if waiting and not suspend else None
    if since == record.storage_wait_since:
        return folded
    record = record.model_copy(update={"storage_wait_since": since})
    return replace(folded, status=folded.status.model_copy(update={"record": record}))


def _leftovers(folded: Folded, seen: Seen) -> tuple[Action, ...]:
    """Live Jobs of attempts that are closed: an older one, or one that was created while its attempt was given up."""
    last = folded.last
    return tuple(
        DeleteJob(j.name, j.uid)
        for j in seen.jobs
        if j.live and not j.deleting and not (last is not None and is_open(last) and belongs(last, j))
    )


def _stop(folded: Folded, seen: Seen, suspend: bool, seen_as: Look, limits: Limits) -> Folded:
    """Write down why the attempt is stopped; the deletion follows from what is written, also after a restart."""
    last = folded.last
    if last is None or not is_open(last) or is_stopping(last) or is_planned(last, folded.job, folded.pods):
        return folded
    if suspend:
        return _with_last(folded, last.model_copy(update={"reason": Reason.SUSPENDED.value}))
    said = seen.answer_of(last)
    # Silence is judged as standing still: whoever keeps a pod from answering must not keep it from being judged.
    still_s = max(said.progress.seconds_since_step if said is not None else 0.0, seen.silent_s(last))
    if seen_as.running and still_s > limits.progress_deadline_s:
        return _with_last(folded, last.model_copy(update={"reason": Reason.NO_PROGRESS.value}))
    return folded


def _next_attempt(folded: Folded, seen: Seen, suspend: bool, now: datetime) -> tuple[Folded, float | None]:
    """Plan the next attempt once the last has ended and nothing of it is left; else the seconds to wait."""
    last, status = folded.last, folded.status
    if suspend or (last is not None and is_open(last)) or not _is_quiet(folded, seen):
        return folded, None
    wait_s = retry.delay_s(status.attempts)
    ended_at = parse_time(last.finished_at) if last is not None else None
    if ended_at is not None:
        passed_s = max(0.0, (now - ended_at).total_seconds())  # another clock may be ahead of ours
        if passed_s < wait_s:
            return folded, wait_s - passed_s
    stage = Stage.TRAIN if status.plan is not None else Stage.PREPARE
    numbers = [e.number for e in status.attempts if e.stage == stage]
    numbers += [child.attempt for child in (*seen.jobs, *seen.pods) if child.stage == stage]
    number = max(numbers, default=0) + 1
    if number > MAX_ATTEMPTS:  # only with children that we never made: `failure` ends what has really had so many
        return folded, None
    entry = running_entry(stage, number)
    attempts = [*status.attempts, entry][-MAX_ENTRIES:]
    return Folded(status.model_copy(update={"attempts": attempts}), folded.ended, None, ()), None


def _own_action(folded: Folded, seen: Seen) -> tuple[Action, ...]:
    """Create or delete the Job of the newest attempt, as its entry says."""
    last, job = folded.last, folded.job
    if last is None or not is_open(last):
        return ()
    if is_stopping(last):
        return (DeleteJob(job.name, job.uid),) if job is not None and job.live and not job.deleting else ()
    if is_planned(last, job, folded.pods) and _is_quiet(folded, seen):
        stage = Stage(last.stage)
        digest = folded.status.plan.digest if folded.status.plan is not None and stage == Stage.TRAIN else None
        return (CreateJob(stage, last.number, digest),)
    return ()


def _is_quiet(folded: Folded, seen: Seen) -> bool:
    """Whether nothing of other attempts is alive: two writers at a time are never wanted."""
    last = folded.last
    own = last if last is not None and is_open(last) else None
    children = [*(j for j in seen.jobs if j.live), *(p for p in seen.pods if p.active)]
    return not any(own is None or not belongs(own, child) for child in children)


def _figures(folded: Folded, seen: Seen, seen_as: Look, now: datetime) -> FineTuneJobStatus:
    status, last, interval_s = folded.status, folded.last, seen.progress_write_interval_s
    if last is None or not seen_as.running:
        return status
    said = seen.answer_of(last)
    if said is not None and is_write_due(status, said, interval_s):
        status = with_progress(status, said)
    if status.progress is not None and last.stage == Stage.TRAIN:
        stale = is_stale(status, said, interval_s, now)
        status = status.model_copy(update={"progress": status.progress.model_copy(update={"stale": stale})})
    return status


def _requeue(folded: Folded, seen_as: Look, limits: Limits, due_s: float | None, now: datetime) -> float | None:
    """Seconds until time alone changes the decision; None when only events do."""
    moments: list[datetime] = []
    record, last = folded.status.record, folded.last
    accepted = parse_time(record.accepted_at) if record else None
    since = parse_time(record.storage_wait_since) if record else None
    if accepted is not None and limits.deadline_s is not None:
        moments.append(accepted + timedelta(seconds=limits.deadline_s))
    if since is not None:
        moments.append(since + PATIENCE)
    waits = [] if due_s is None else [due_s]
    if last is not None and is_open(last) and not seen_as.running and folded.job is not None:
        born = max([folded.job.created_at, *(pod.created_at for pod in folded.pods if pod.active)])
        slow_s = SLOW_START_S + 1 - (now - born).total_seconds()
        waits += [slow_s] if slow_s > 0 else []
    waits += [max(1.0, (moment - now).total_seconds()) for moment in moments]
    return min(waits, default=None)


def _with_last(folded: Folded, entry: AttemptStatus) -> Folded:
    attempts = [*folded.status.attempts[:-1], entry]
    status = folded.status.model_copy(update={"attempts": attempts})
    return replace(folded, status=status)
