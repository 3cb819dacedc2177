"""When a job is over, and what its status then says. Pure."""

from dataclasses import dataclass
from datetime import datetime

from finetune_api import defaults, retry
from finetune_api.job import FineTuneJobSpec, StartPolicy
from finetune_api.names import MAX_ATTEMPTS
from finetune_api.reasons import Fault, Reason, words
from finetune_api.retry import JobEnd
from finetune_api.status import ConditionType, FineTuneJobStatus, Phase, UsageStatus
from finetune_operator import quality
from finetune_operator.attempt_outcome import is_open
from finetune_operator.clock import parse_time
from finetune_operator.close_attempts import JobState, given_up, used
from finetune_operator.conditions import ConditionUpdate, find, with_updates
from finetune_operator.gates import has_trained, start_policy
from finetune_operator.job_reader import reason_of
from finetune_operator.observation import Blocked
from finetune_operator.pod_waits import IMPATIENT_REASONS, PodState
from finetune_operator.progress_status import without_eta


@dataclass(frozen=True)
class Limits:
    """The job's own bounds, with the defaults of absent fields."""

    retry: retry.Limits
    progress_deadline_s: int

    @classmethod
    def of(cls, spec: FineTuneJobSpec) -> "Limits":
        deadline_s = spec.recovery.progress_deadline_seconds if spec.recovery else None
        return cls(
            retry=retry.Limits.of(spec.recovery),
            progress_deadline_s=defaults.given(deadline_s, defaults.PROGRESS_DEADLINE_S),
        )


def is_success(state: JobState) -> bool:
    last = state.last
    return (
        last is not None
        and last.stage == "train"
        and last.attempt_class == "Succeeded"
        and bool(state.status.artifacts)
    )


def is_only_planned(spec: FineTuneJobSpec, state: JobState) -> bool:
    """Return True if the plan is made and is all that the job is for."""
    status = state.status
    return start_policy(spec) == StartPolicy.PLAN_ONLY and status.plan is not None and not has_trained(status)


def failure(state: JobState, pod_state: PodState, limits: Limits, now: datetime) -> Blocked | None:
    """Return why the job ends after what its attempts did, or None while another may help."""
    status, last, record = state.status, state.last, state.status.record
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
        if impatient and pod_state.wait is not None and pod_state.wait.reason in IMPATIENT_REASONS:
            return Blocked(pod_state.wait.reason, f"{pod_state.wait.message} (waited {minutes} minutes)")
        return spent
    match retry.job_end(status.attempts, failures=status.failures, waited_s=waited_s, limits=limits.retry):
        case JobEnd.PATIENCE:
            return Blocked(reason_of(last.reason), f"{ended_words(state)} (tried for {minutes} minutes)")
        case JobEnd.FINAL:
            return Blocked(reason_of(last.reason), ended_words(state))
        case JobEnd.RETRIES if spent is None:
            text = f"{status.failures} attempts failed and recovery.maxRetries is {limits.retry.max_retries}"
            if status.failures <= limits.retry.max_retries:  # the others waited, such as for a node, or were disrupted
                text = f"{MAX_ATTEMPTS} attempts are all that a job may have"
            return Blocked(Reason.RETRIES_EXHAUSTED, f"{text}; the last one ({last.reason}): {ended_words(state)}")
        case _:
            return spent


def ended_words(state: JobState) -> str:
    """Return the sentence on how the newest attempt ended, with the place of its log."""
    outcome, last = state.outcome, state.last
    if outcome is None:
        stored = find(state.status, ConditionType.RUNNING)
        if last is not None and stored is not None and stored.status == "False" and stored.reason == last.reason:
            return stored.message
        return f"attempt {last.number} of {last.stage} ended as {last.reason}" if last is not None else ""
    log_uri = outcome.result.log_uri if outcome.result is not None else None
    return outcome.message + (f"; log: {log_uri}" if log_uri else "")


def succeeded(state: JobState, generation: int, now: datetime) -> FineTuneJobStatus:
    """Return the status of a job whose adapter is committed."""
    status, result = state.status, state.outcome.result if state.outcome is not None else None
    artifact = status.artifacts[0]
    message = words(Fault.COMMITTED, {"uri": artifact.uri})
    updates = _nothing_wrong(status, ConditionUpdate(ConditionType.SUCCEEDED, "True", Reason.SUCCEEDED, message))
    of_quality = quality.at_the_end(result.quality) if result is not None else None
    updates += [of_quality] if of_quality is not None else []
    return _over(with_updates(status, updates, generation, now), Phase.SUCCEEDED, now)


def planned(state: JobState, generation: int, now: datetime) -> FineTuneJobStatus:
    """Return the status of a job that was to be planned only. It has no adapter, so it has not succeeded."""
    status = state.status
    message = (
        "planned, as startPolicy: PlanOnly asks; nothing was trained. To train, apply it under another name without "
        "startPolicy, or delete this one first"
    )
    updates = [
        ConditionUpdate(ConditionType.ADMITTED, "False", Reason.PLANNED),
        *_nothing_wrong(status, ConditionUpdate(ConditionType.SUCCEEDED, "False", Reason.PLANNED, message)),
    ]
    return _over(with_updates(status, updates, generation, now), Phase.PLANNED, now)


def _nothing_wrong(status: FineTuneJobStatus, verdict: ConditionUpdate) -> list[ConditionUpdate]:
    """Return the conditions of a job that ended as it was to end; `verdict`: whether with an adapter."""
    reason, message = verdict.reason, verdict.message
    return [
        planned_condition(status),
        ConditionUpdate(ConditionType.RUNNING, "False", reason),
        ConditionUpdate(ConditionType.DEGRADED, "False", Reason.HEALTHY),
        verdict,
        ConditionUpdate(ConditionType.FINISHED, "True", reason, message),
        ConditionUpdate(ConditionType.READY, "True", reason, message),
        ConditionUpdate(ConditionType.STALLED, "False", Reason.HEALTHY),
    ]


def failed(state: JobState, why: Blocked, generation: int, now: datetime) -> FineTuneJobStatus:
    """Return the status of a job that ends with `why`. An open attempt is closed; the caller deletes its Job."""
    status = state.status
    attempts = list(status.attempts)
    if attempts and is_open(attempts[-1]):
        attempts[-1] = given_up(attempts[-1], "Failure", why.reason, now)
        status = status.model_copy(update={"usage": used(status, state.pods, now, now)})
    updates = [
        planned_condition(status)
        if status.plan
        else ConditionUpdate(ConditionType.PLANNED, "False", why.reason, why.message),
        ConditionUpdate(ConditionType.RUNNING, "False", why.reason, why.message),
        ConditionUpdate(ConditionType.SUCCEEDED, "False", why.reason, why.message),
        ConditionUpdate(ConditionType.FINISHED, "True", why.reason, why.message),
        ConditionUpdate(ConditionType.READY, "False", why.reason, why.message),
        ConditionUpdate(ConditionType.STALLED, "True", why.reason, why.message),
    ]
    status = status.model_copy(update={"attempts": attempts})
    return _over(with_updates(status, updates, generation, now), Phase.FAILED, now)


def planned_condition(status: FineTuneJobStatus) -> ConditionUpdate:
    """Return whether the plan is known, and in short what it is."""
    if status.plan is None:
        return ConditionUpdate(ConditionType.PLANNED, "Unknown", Reason.PREPARING)
    data = status.data
    if data is None:  # a status that was cut by hand
        return ConditionUpdate(ConditionType.PLANNED, "True", Reason.PREPARED, f"{status.plan.steps} steps")
    told: dict[str, str | int | float] = {
        "rows_in": data.rows_in,
        "rows_used": data.rows_used,
        "rows_held_out": data.rows_held_out,
        "rows_dropped": sum(drop.rows for drop in data.dropped),
        "steps": status.plan.steps,
    }
    message = words(Fault.PREPARED, told)
    return ConditionUpdate(ConditionType.PLANNED, "True", Reason.PREPARED, message)


def _over(status: FineTuneJobStatus, phase: Phase, now: datetime) -> FineTuneJobStatus:
    accepted = parse_time(status.record.accepted_at) if status.record else None
    usage = status.usage or UsageStatus(seconds=0, gpu_seconds=0)
    if accepted is not None:
        usage = usage.model_copy(update={"seconds": max(0, int((now - accepted).total_seconds()))})
    return without_eta(status).model_copy(update={"phase": phase, "usage": usage})
