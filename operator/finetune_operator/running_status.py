"""The conditions and the phase of a job that is not over. Pure."""

from datetime import UTC, datetime

from finetune_api.names import HTTP_PORT, Stage
from finetune_api.reasons import FAULTS, Reason, words
from finetune_api.run import Progress, Trouble
from finetune_api.status import AttemptStatus, Condition, ConditionType, FineTuneJobStatus, Phase
from finetune_operator import quality
from finetune_operator.attempt_outcome import is_open, is_stopping
from finetune_operator.attempt_steps import held_back
from finetune_operator.clock import format_time, parse_time
from finetune_operator.close_attempts import JobState
from finetune_operator.conditions import ConditionUpdate, find, with_updates
from finetune_operator.counted_time import is_held_by_others
from finetune_operator.final_status import ended_words, planned_condition
from finetune_operator.gates import GateAnswer, Wait
from finetune_operator.job_reader import FineTuneJob, reason_of
from finetune_operator.observation import Observation, PodSilence
from finetune_operator.pod_waits import PATIENCE, REFUSED, PodState
from finetune_operator.progress_status import is_unanswered

_WAITS = (
    *REFUSED, Reason.UNSCHEDULABLE, Reason.IMAGE_PULL, Reason.MISSING_REF, Reason.NODE_UNREACHABLE, Reason.SUSPENDED,
    Reason.JOB_SUSPENDED, Reason.POD_NOT_STARTED, Reason.AWAITING_APPROVAL, Reason.WAITING_FOR_JOB,
)  # fmt: skip
# What a trainer may say that it cannot save for.
TROUBLE_REASONS = (
    Reason.STORAGE_TRANSIENT, Reason.ACCESS_DENIED, Reason.DATA_NOT_FOUND, Reason.DISK_FULL, Reason.CONFIG_INVALID,
)  # fmt: skip
_NOT_ADMITTED = (Reason.UNSCHEDULABLE, Reason.QUOTA_EXCEEDED, Reason.JOB_SUSPENDED)
_NO_FAULT = (Reason.DISRUPTED, Reason.JOB_SUSPENDED)  # waits that nobody has to mend anything for


def running_status(
    job: FineTuneJob, state: JobState, observation: Observation, pod_state: PodState, gate: GateAnswer, now: datetime
) -> FineTuneJobStatus:
    """Return the status of a job that is not over."""
    status, last = state.status, state.last
    answer = observation.answer_of(last) if last is not None and pod_state.running else None
    said = answer.progress if answer is not None else None
    suspend = isinstance(gate, Wait) and gate.reason == Reason.SUSPENDED
    stage = Stage.TRAIN if status.plan is not None else Stage.PREPARE
    doing = Reason.TRAINING if stage == Stage.TRAIN else Reason.PREPARING
    held = held_back(state, observation, gate)
    suspended = held is not None and held.reason == Reason.SUSPENDED
    waits = held if not suspended else None
    updates = [
        _planned(status, waits),
        _admitted(job.status, state, pod_state, held, doing),
        _running(job.status, state, pod_state, held, doing),
        _suspended(job.status, suspend, suspended),
        _degraded(job.status, state, pod_state, said, _unanswered(state, observation, pod_state)),
        quality.while_running(job.status, said),
        ConditionUpdate(ConditionType.SUCCEEDED, "Unknown", waits.reason if waits is not None else doing),
        ConditionUpdate(ConditionType.FINISHED, "False", waits.reason if waits is not None else doing),
        ConditionUpdate(ConditionType.READY, "True", Reason.ACCEPTED),
        ConditionUpdate(ConditionType.STALLED, "False", Reason.HEALTHY),
    ]
    status = with_updates(status, [update for update in updates if update is not None], job.generation, now)
    started = any(e.started_at is not None for e in status.attempts if e.stage == stage)
    phase = (
        Phase.PENDING
        if is_held_by_others(pod_state) or not started
        else (Phase.TRAINING if stage == Stage.TRAIN else Phase.PREPARING)
    )
    if held is not None:
        phase = Phase.SUSPENDED if suspended else Phase.WAITING
    return status.model_copy(update={"phase": phase})


def _planned(status: FineTuneJobStatus, waits: Wait | None) -> ConditionUpdate:
    """Whether the plan is known; where the job is held back before it has one, by what."""
    if status.plan is None and waits is not None:
        return ConditionUpdate(ConditionType.PLANNED, "Unknown", waits.reason, waits.message)
    return planned_condition(status)


def _admitted(
    old: FineTuneJobStatus, state: JobState, pod_state: PodState, held: Wait | None, doing: Reason
) -> ConditionUpdate | None:
    """Whether the cluster has given the newest attempt a place; between attempts the last answer stays.

    Of a pod that is on its way it is told with its start, which saves a write for each, unless it was waited for."""
    before = find(old, ConditionType.ADMITTED)
    can_wait = pod_state.on_its_way and before is not None and before.status == "Unknown"
    if pod_state.scheduled and not can_wait:
        return ConditionUpdate(ConditionType.ADMITTED, "True", doing)
    if pod_state.wait is not None and pod_state.wait.reason in _NOT_ADMITTED:
        return ConditionUpdate(ConditionType.ADMITTED, "False", pod_state.wait.reason, pod_state.wait.message)
    if held is not None:
        return ConditionUpdate(ConditionType.ADMITTED, "False", held.reason)
    if state.outcome is not None and state.outcome.reason == Reason.POD_NOT_STARTED:
        return ConditionUpdate(ConditionType.ADMITTED, "False", Reason.POD_NOT_STARTED, state.outcome.message)
    if state.last is not None and is_open(state.last) and not pod_state.ending:
        return ConditionUpdate(ConditionType.ADMITTED, "Unknown", doing)
    return None


def _running(
    old: FineTuneJobStatus, state: JobState, pod_state: PodState, held: Wait | None, doing: Reason
) -> ConditionUpdate | None:
    last, before = state.last, find(old, ConditionType.RUNNING)
    if held is not None:
        return ConditionUpdate(ConditionType.RUNNING, "False", held.reason, held.message)
    if pod_state.ending and before is not None:
        return None
    if pod_state.running and last is not None:
        stopping = is_stopping(last)
        reason = _stop_reason(last.reason) if stopping else doing
        message = f"attempt {last.number} of {last.stage} {'is being stopped' if stopping else 'runs'}"
        return ConditionUpdate(ConditionType.RUNNING, "True", reason, message)
    if pod_state.wait is not None:
        return ConditionUpdate(ConditionType.RUNNING, "False", pod_state.wait.reason, pod_state.wait.message)
    outcome = state.outcome
    if outcome is not None and outcome.attempt_class != "Succeeded":
        return ConditionUpdate(ConditionType.RUNNING, "False", outcome.reason, ended_words(state) + _retries(state))
    if before is not None and before.status == "False" and reason_of(before.reason) not in _WAITS:
        again = outcome is None and (before.reason != Reason.PREPARING or doing == Reason.PREPARING)
        if again:
            return None  # why the attempt before ended stays until this one runs
    return ConditionUpdate(ConditionType.RUNNING, "False", doing, "waiting for the pod to start")


def _retries(state: JobState) -> str:
    if state.outcome is None or state.outcome.attempt_class != "Failure":
        return ""
    return f"; trying again ({state.status.failures} failed so far)"


def _stop_reason(text: str | None) -> Reason:
    return Reason.SUSPENDING if reason_of(text) == Reason.SUSPENDED else reason_of(text)


def _suspended(old: FineTuneJobStatus, suspend: bool, suspended: bool) -> ConditionUpdate | None:
    before = find(old, ConditionType.SUSPENDED)
    if suspended:
        return ConditionUpdate(
            ConditionType.SUSPENDED, "True", Reason.SUSPENDED, "set spec.suspend to false to continue"
        )
    if suspend:
        return ConditionUpdate(ConditionType.SUSPENDED, "False", Reason.SUSPENDING, "the pod is checkpointing")
    if before is None:
        return ConditionUpdate(ConditionType.SUSPENDED, "False", Reason.ACCEPTED)
    if before.status == "True" or before.reason == Reason.SUSPENDING:
        return ConditionUpdate(
            ConditionType.SUSPENDED, "False", Reason.RESUMED, "spec.suspend is false, the job goes on"
        )
    return None


def _degraded(
    old: FineTuneJobStatus,
    state: JobState,
    pod_state: PodState,
    said: Progress | None,
    unanswered: PodSilence | None,
) -> ConditionUpdate | None:
    """Return what is to be fixed, or that nothing is; None keeps what is stored. `said`: by the pod that runs."""
    before, last, outcome = find(old, ConditionType.DEGRADED), state.last, state.outcome
    if pod_state.wait is not None and pod_state.wait.reason not in _NO_FAULT:
        return ConditionUpdate(ConditionType.DEGRADED, "True", pod_state.wait.reason, pod_state.wait.message)
    if outcome is not None and outcome.attempt_class == "Waiting":
        until = f" until {_patience_ends(state)}" if outcome.reason != Reason.POD_NOT_STARTED else ""
        message = f"{ended_words(state)}; trying again{until}"
        return ConditionUpdate(ConditionType.DEGRADED, "True", outcome.reason, message)
    if outcome is not None and outcome.reason == Reason.BAD_REPORT:
        return ConditionUpdate(ConditionType.DEGRADED, "True", Reason.BAD_REPORT, ended_words(state))
    if unanswered is not None:
        return _no_answer(unanswered)
    if said is not None and said.trouble is not None:
        return _trouble(said.trouble)
    if _still_holds(before, state, pod_state, said):
        return None
    waited = _waited(state, pod_state)
    if waited is not None and last is not None:
        message = f"attempt {waited.number} of {waited.stage} waited for this; trying again"
        return ConditionUpdate(ConditionType.DEGRADED, "True", reason_of(waited.reason), message)
    return ConditionUpdate(ConditionType.DEGRADED, "False", Reason.HEALTHY)


def _unanswered(state: JobState, observation: Observation, pod_state: PodState) -> PodSilence | None:
    """Return the silence of the pod that runs, if it is worth telling."""
    silence = observation.silence_of(state.last) if state.last is not None and pod_state.running else None
    return silence if is_unanswered(silence, observation.progress_write_interval_s) else None


def _no_answer(silence: PodSilence) -> ConditionUpdate:
    """The pod runs, and nobody knows how far it is."""
    message = (
        f"the pod has not answered since {format_time(silence.since)}, but may go on: see whether a NetworkPolicy or "
        f"its node keeps the operator from port {HTTP_PORT}"
    )
    return ConditionUpdate(ConditionType.DEGRADED, "True", Reason.NO_ANSWER, message)


def _trouble(trouble: Trouble) -> ConditionUpdate:
    """The training goes on, but something of it fails again and again."""
    reason = FAULTS[trouble.fault].reason
    since = format_time(datetime.fromtimestamp(trouble.since, UTC))
    message = f"progress cannot be saved since {since}: {words(trouble.fault, trouble.args)}; training goes on"
    if reason not in TROUBLE_REASONS:  # a pod may say anything
        reason = Reason.STORAGE_TRANSIENT
    return ConditionUpdate(ConditionType.DEGRADED, "True", reason, f"{message}, and it is tried again")


def _still_holds(before: Condition | None, state: JobState, pod_state: PodState, said: Progress | None) -> bool:
    """Return True if a stored Degraded is still true, although nothing that is seen now says so again."""
    if before is None or before.status != "True":
        return False
    reason = reason_of(before.reason)
    trained = any(e.stage == Stage.TRAIN and e.started_at is not None for e in state.status.attempts)
    if reason in TROUBLE_REASONS and trained and said is None:
        return True  # until a pod that runs has said that it can save
    if state.outcome is not None:
        return False
    waited = _waited(state, pod_state)
    if waited is not None and reason_of(waited.reason) == reason:
        return True
    return reason == Reason.BAD_REPORT and not pod_state.running


def _waited(state: JobState, pod_state: PodState) -> AttemptStatus | None:
    """Return the attempt that ended last, if what it ended for is not seen to be mended yet."""
    closed = next((e for e in reversed(state.status.attempts) if not is_open(e)), None)
    if closed is None or closed.attempt_class != "Waiting":
        return None
    begun = pod_state.running and closed.reason == Reason.POD_NOT_STARTED  # what was denied may be denied again
    return None if begun else closed


def _patience_ends(state: JobState) -> str:
    since = parse_time(state.status.record.storage_wait_since) if state.status.record else None
    return format_time(since + PATIENCE) if since is not None else "then"
