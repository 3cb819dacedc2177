"""Keep the two clocks of a job in its status: how long it was suspended, and since when somebody has to mend something.

Pure, from state to state.
"""

from datetime import datetime, timedelta

from finetune_api.reasons import Reason
from finetune_api.status import MAX_SUSPENDED_S, OperatorRecord
from finetune_operator.attempt_outcome import is_open
from finetune_operator.clock import format_time, parse_time
from finetune_operator.close_attempts import JobState
from finetune_operator.gates import GateAnswer, Wait, suspended_s
from finetune_operator.pod_waits import IMPATIENT_REASONS, PodState

# A pod that has run for so long did not only find out that something is missing.
GOOD_WORK = timedelta(minutes=5)


def with_wait_clock(state: JobState, pod_state: PodState, gate: GateAnswer, now: datetime) -> JobState:
    """Note since when somebody has to mend something.

    The clock goes on through the attempts in between. It stops while the job is held back, as nobody tries then, and
    begins anew after good work: what was waited for is there, and what is missing now is something else."""
    record = state.status.record or OperatorRecord()
    closed = [entry for entry in state.status.attempts if not is_open(entry)]
    waiting = bool(closed) and closed[-1].attempt_class == "Waiting" and closed[-1].reason != Reason.POD_NOT_STARTED
    if pod_state.wait is not None and pod_state.wait.reason in IMPATIENT_REASONS:
        waiting = True
    worked_until = _worked_until(state, now)
    works = pod_state.running and worked_until == now
    held = isinstance(gate, Wait) or is_held_by_others(pod_state)
    since = None
    if waiting and not works and not held:
        began = parse_time(record.storage_wait_since) or now
        since = format_time(max(began, worked_until) if worked_until is not None else began)
    if since == record.storage_wait_since:
        return state
    return _with_record(state, record.model_copy(update={"storage_wait_since": since}))


def with_suspended_clock(state: JobState, pod_state: PodState, held_back: Wait | None, now: datetime) -> JobState:
    """Note for how long the job was held back: suspended, by its user or, its Kubernetes Job, by somebody else such
    as Kueue, or waiting for approval.

    held_back: by one of the gates, and nothing of it runs any more."""
    record = state.status.record or OperatorRecord()
    since = parse_time(record.suspended_since)
    if held_back is not None or is_held_by_others(pod_state):
        if since is not None:
            return state
        return _with_record(state, record.model_copy(update={"suspended_since": format_time(now)}))
    if record.suspended_since is None:
        return state
    seconds = min(suspended_s(record, now), MAX_SUSPENDED_S)
    return _with_record(state, record.model_copy(update={"suspended_since": None, "suspended_seconds": seconds}))


def is_held_by_others(pod_state: PodState) -> bool:
    """Return True if somebody else has suspended the newest Kubernetes Job."""
    return pod_state.wait is not None and pod_state.wait.reason == Reason.JOB_SUSPENDED


def _worked_until(state: JobState, now: datetime) -> datetime | None:
    """Return until when a pod of the newest attempt did good work; None if none did."""
    runs = [(pod.started_at, pod.finished_at or (now if pod.running else None)) for pod in state.pods]
    ends = [end for start, end in runs if start is not None and end is not None and end - start >= GOOD_WORK]
    return min(now, max(ends)) if ends else None


def _with_record(state: JobState, record: OperatorRecord) -> JobState:
    return state.with_status(state.status.model_copy(update={"record": record}))
