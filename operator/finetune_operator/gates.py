"""What may hold a job back, or end it, whatever its attempts do: an ordered list of gates. Pure."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

from finetune_api import defaults
from finetune_api.job import FineTuneJobSpec, StartPolicy
from finetune_api.names import Stage
from finetune_api.reasons import Reason
from finetune_api.status import FineTuneJobStatus, OperatorRecord
from finetune_operator.clock import parse_time
from finetune_operator.data_policy import may_refuse, refusal
from finetune_operator.observation import Observation
from finetune_operator.parent_job import awaited_parent, kept_source


@dataclass(frozen=True)
class Open:
    """Nothing holds the job back."""


@dataclass(frozen=True)
class Wait:
    """No attempt starts, and one that runs is stopped, until the gate opens."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class Over:
    """The job ends, with this reason."""

    reason: Reason
    message: str


GateAnswer = Open | Wait | Over
Gate = Callable[[FineTuneJobSpec, FineTuneJobStatus, Observation, datetime], GateAnswer]


def is_in_time(
    spec: FineTuneJobSpec, status: FineTuneJobStatus, _observation: Observation, now: datetime
) -> GateAnswer:
    """End a job that was not done within activeDeadlineSeconds."""
    due = deadline(spec, status, now)
    if due is None or now < due:
        return Open()
    text = f"the job was not done {spec.active_deadline_seconds} s after it was accepted (activeDeadlineSeconds)"
    held_s = suspended_s(status.record, now)
    text += (
        f"; the {held_s} s in which it was suspended, or waited for approval or another job, are not counted"
        if held_s
        else ""
    )
    return Over(Reason.DEADLINE_EXCEEDED, text)


def is_allowed_by_policy(
    spec: FineTuneJobSpec, status: FineTuneJobStatus, observation: Observation, _now: datetime
) -> GateAnswer:
    """End a job that has not begun, and whose data the policy of its runtime refuses."""
    if observation.policy is None or not may_refuse(status):
        return Open()
    words = refusal(spec, observation.policy, defaults.given(spec.runtime, defaults.RUNTIME))
    return Over(Reason.REFUSED_BY_POLICY, words) if words is not None else Open()


def is_not_suspended(
    spec: FineTuneJobSpec, _status: FineTuneJobStatus, _observation: Observation, _now: datetime
) -> GateAnswer:
    """Hold back a job whose user has suspended it."""
    return Wait(Reason.SUSPENDED, "spec.suspend is true") if spec.suspend is True else Open()


def has_its_adapter(
    spec: FineTuneJobSpec, status: FineTuneJobStatus, observation: Observation, _now: datetime
) -> GateAnswer:
    """Hold back a job until the one whose adapter it goes on with has committed that; end it where none will come."""
    name = awaited_parent(spec, status)
    if name is None:
        return Open()
    parent, kept = observation.parent, kept_source(status)
    what = f"FineTuneJob {name}, whose adapter this job was to go on with (model.adapterFrom),"
    if kept is not None and (parent is None or parent.uid != kept.job_uid):
        became = "deleted" if parent is None else "deleted and created anew"
        text = f"{what} was {became} before it had one; create this job anew to wait for the job of that name"
        return Over(Reason.NO_ADAPTER_TO_COME, text)
    if parent is None:
        text = f"FineTuneJob {name} of model.adapterFrom does not exist in this namespace yet"
        return Wait(Reason.WAITING_FOR_JOB, text)
    if parent.end is not None:
        return Over(Reason.NO_ADAPTER_TO_COME, f"{what} ended without one: {parent.end}")
    if parent.circle:
        waiting = " for ".join(parent.circle)
        text = (
            f"the jobs wait for one another's adapters (model.adapterFrom): this one for {waiting}; create one of them"
        )
        return Over(Reason.NO_ADAPTER_TO_COME, f"{text} without model.adapterFrom, and those that have ended anew")
    return Wait(Reason.WAITING_FOR_JOB, f"FineTuneJob {name} of model.adapterFrom is {parent.phase}")


def is_approved(
    spec: FineTuneJobSpec, status: FineTuneJobStatus, _observation: Observation, _now: datetime
) -> GateAnswer:
    """Hold back the training of a job whose user wants to see the plan first."""
    if start_policy(spec) != StartPolicy.MANUAL or status.plan is None or has_trained(status):
        return Open()
    words = "the plan waits for approval: read status.plan, then set spec.startPolicy to Automatic"
    return Wait(Reason.AWAITING_APPROVAL, words)


# The first that is not open decides. A queue will stand here too.
GATES: tuple[Gate, ...] = (is_in_time, is_allowed_by_policy, is_not_suspended, has_its_adapter, is_approved)


def ask_gates(spec: FineTuneJobSpec, status: FineTuneJobStatus, observation: Observation, now: datetime) -> GateAnswer:
    """Return the answer of the first gate that is not open, else Open."""
    answers = (gate(spec, status, observation, now) for gate in GATES)
    return next((answer for answer in answers if not isinstance(answer, Open)), Open())


def start_policy(spec: FineTuneJobSpec) -> StartPolicy:
    """Return what follows the plan."""
    return StartPolicy(defaults.given(spec.start_policy, defaults.START_POLICY))


def has_trained(status: FineTuneJobStatus) -> bool:
    """Return True if an attempt of training was begun, for which the plan was approved.

    One that was suspended before it started is none: who suspends it may think again."""
    trained = (entry for entry in status.attempts if entry.stage == Stage.TRAIN)
    return any(entry.attempt_class != "Suspended" or entry.started_at is not None for entry in trained)


def deadline(spec: FineTuneJobSpec, status: FineTuneJobStatus, now: datetime) -> datetime | None:
    """Return when the job ends at the latest, if it is not held back from now on; None where it sets no bound."""
    accepted_at = parse_time(status.record.accepted_at) if status.record else None
    if spec.active_deadline_seconds is None or accepted_at is None:
        return None
    return accepted_at + timedelta(seconds=spec.active_deadline_seconds + suspended_s(status.record, now))


def suspended_s(record: OperatorRecord | None, now: datetime) -> int:
    """Return for how many seconds the job was suspended, or waited for approval or another job, up to now."""
    if record is None:
        return 0
    since = parse_time(record.suspended_since)
    going_on_s = max(0, int((now - since).total_seconds())) if since is not None else 0
    return (record.suspended_seconds or 0) + going_on_s
