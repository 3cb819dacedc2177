"""When a job is over, and what its status then says. Pure."""

from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api import defaults, retry
from finetune_api.job import FineTuneJobSpec
from finetune_api.reasons import Fault, Reason, words
from finetune_api.retry import JobEnd
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase, UsageStatus
from finetune_operator import quality
from finetune_operator.attempts import is_open
from finetune_operator.clock import format_time, parse_time
from finetune_operator.conditions import Claim, find, with_claims
from finetune_operator.fold import Folded, used
from finetune_operator.live import IMPATIENT_REASONS, Look
from finetune_operator.seen import Blocked
from finetune_operator.view import reason_of


@dataclass(frozen=True)
class Limits:
    """The job's own bounds, with the defaults of absent fields."""

    retry: retry.Limits
    progress_deadline_s: int
    deadline_s: int | None


def limits_of(spec: FineTuneJobSpec) -> Limits:
    deadline_s = spec.recovery.progress_deadline_seconds if spec.recovery else None
    return Limits(
        retry=retry.Limits.of(spec.recovery),
        progress_deadline_s=defaults.given(deadline_s, defaults.PROGRESS_DEADLINE_S),
        deadline_s=spec.active_deadline_seconds,
    )


def is_success(folded: Folded) -> bool:
    last = folded.last
    return (
        last is not None
        and last.stage == "train"
        and last.attempt_class == "Succeeded"
        and bool(folded.status.artifacts)
    )


def failure(folded: Folded, look: Look, limits: Limits, now: datetime) -> Blocked | None:
    """The final reason with its words, or None while there is hope."""
    status, last, record = folded.status, folded.last, folded.status.record
    accepted = parse_time(record.accepted_at) if record else None
    if limits.deadline_s is not None and accepted and now >= accepted + timedelta(seconds=limits.deadline_s):
        text = f"the job was not done {limits.deadline_s} s after it was accepted (activeDeadlineSeconds)"
        return Blocked(Reason.DEADLINE_EXCEEDED, text)
    if look.wait is not None and look.wait.reason == Reason.INVALID_MANIFEST:
        return look.wait
    spent = None
    allowed = limits.retry.max_disruptions
    if record is not None and record.disruptions > allowed:
        text = f"pods were evicted or preempted {record.disruptions} times, {allowed} are allowed"
        spent = Blocked(Reason.DISRUPTION_BUDGET, f"{text} (recovery.maxDisruptions)")
    if last is None:
        return spent
    since = parse_time(record.storage_wait_since) if record else None
    waited_s = (now - since).total_seconds() if since is not None else None
    minutes = retry.PATIENCE_S // 60
    if is_open(last):
        impatient = waited_s is not None and waited_s >= limits.retry.patience_s
        if impatient and look.wait is not None and look.wait.reason in IMPATIENT_REASONS:
            return Blocked(look.wait.reason, f"{look.wait.message} (waited {minutes} minutes)")
        return spent
    match retry.job_end(status.attempts, failures=status.failures, waited_s=waited_s, limits=limits.retry):
        case JobEnd.PATIENCE:
            return Blocked(reason_of(last.reason), f"{ended_words(folded)} (tried for {minutes} minutes)")
        case JobEnd.FINAL:
            return Blocked(reason_of(last.reason), ended_words(folded))
        case JobEnd.RETRIES if spent is None:
            text = f"{status.failures} attempts failed and recovery.maxRetries is {limits.retry.max_retries}"
            return Blocked(Reason.RETRIES_EXHAUSTED, f"{text}; the last one ({last.reason}): {ended_words(folded)}")
        case _:
            return spent


def ended_words(folded: Folded) -> str:
    """The sentence on how the newest attempt ended, with the place of its log."""
    ended, last = folded.ended, folded.last
    if ended is None:
        stored = find(folded.status, ConditionType.RUNNING)
        if last is not None and stored is not None and stored.status == "False" and stored.reason == last.reason:
            return stored.message
        return f"attempt {last.number} of {last.stage} ended as {last.reason}" if last is not None else ""
    log_uri = ended.report.log_uri if ended.report is not None else None
    return ended.message + (f"; log: {log_uri}" if log_uri else "")


def succeeded(folded: Folded, generation: int, now: datetime) -> FineTuneJobStatus:
    status, report = folded.status, folded.ended.report if folded.ended is not None else None
    artifact = status.artifacts[0]
    message = words(Fault.COMMITTED, {"uri": artifact.uri})
    claims = [
        planned(status),
        Claim(ConditionType.RUNNING, "False", Reason.SUCCEEDED),
        Claim(ConditionType.DEGRADED, "False", Reason.HEALTHY),
        Claim(ConditionType.SUCCEEDED, "True", Reason.SUCCEEDED, message),
        Claim(ConditionType.FINISHED, "True", Reason.SUCCEEDED, message),
        Claim(ConditionType.READY, "True", Reason.SUCCEEDED, message),
        Claim(ConditionType.STALLED, "False", Reason.HEALTHY),
    ]
    of_quality = quality.at_the_end(report.quality) if report is not None else None
    claims += [of_quality] if of_quality is not None else []
    return _over(with_claims(status, claims, generation, now), Phase.SUCCEEDED, now)


def failed(folded: Folded, why: Blocked, generation: int, now: datetime) -> FineTuneJobStatus:
    """An attempt that is still open is closed; its Job is deleted by the caller."""
    status = folded.status
    attempts = list(status.attempts)
    if attempts and is_open(attempts[-1]):
        update = {"attempt_class": "Failure", "reason": why.reason.value, "finished_at": format_time(now)}
        attempts[-1] = attempts[-1].model_copy(update=update)
        status = status.model_copy(update={"usage": used(status, folded.pods, now, now)})
    claims = [
        planned(status) if status.plan else Claim(ConditionType.PLANNED, "False", why.reason, why.message),
        Claim(ConditionType.RUNNING, "False", why.reason, why.message),
        Claim(ConditionType.SUCCEEDED, "False", why.reason, why.message),
        Claim(ConditionType.FINISHED, "True", why.reason, why.message),
        Claim(ConditionType.READY, "False", why.reason, why.message),
        Claim(ConditionType.STALLED, "True", why.reason, why.message),
    ]
    status = status.model_copy(update={"attempts": attempts})
    return _over(with_claims(status, claims, generation, now), Phase.FAILED, now)


def planned(status: FineTuneJobStatus) -> Claim:
    """Whether the plan is known."""
    if status.plan is None:
        return Claim(ConditionType.PLANNED, "Unknown", Reason.PREPARING)
    data = status.data
    if data is None:  # a status that was cut by hand
        return Claim(ConditionType.PLANNED, "True", Reason.PREPARED, f"{status.plan.steps} steps")
    told: dict[str, str | int | float] = {
        "rows_in": data.rows_in,
        "rows_used": data.rows_used,
        "rows_held_out": data.rows_held_out,
        "rows_dropped": sum(drop.rows for drop in data.dropped),
        "steps": status.plan.steps,
    }
    message = words(Fault.PREPARED, told)
    return Claim(ConditionType.PLANNED, "True", Reason.PREPARED, message)


def _over(status: FineTuneJobStatus, phase: Phase, now: datetime) -> FineTuneJobStatus:
    accepted = parse_time(status.record.accepted_at) if status.record else None
    usage = status.usage or UsageStatus(seconds=0, gpu_seconds=0)
    if accepted is not None:
        usage = usage.model_copy(update={"seconds": max(0, int((now - accepted).total_seconds()))})
    return status.model_copy(update={"phase": phase, "usage": usage})
