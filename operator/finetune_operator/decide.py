"""Every decision of the operator, in one pure, total and idempotent function: `decide`.

Its table test is the specification. Nothing is remembered elsewhere: what a later decision needs is in the status, the
Kubernetes Jobs or the pods.
"""

from datetime import datetime, timedelta

from finetune_api.job import FineTuneJobSpec
from finetune_api.reasons import Reason
from finetune_api.status import ConditionType, FineTuneJobStatus, OperatorRecord, Phase
from finetune_operator import attempt_steps, final_status
from finetune_operator.attempt_outcome import is_open, seconds_to_end
from finetune_operator.clock import format_time, parse_time
from finetune_operator.close_attempts import JobState, close_attempts
from finetune_operator.conditions import ConditionUpdate, with_updates
from finetune_operator.counted_time import with_suspended_clock, with_wait_clock
from finetune_operator.decision import Action, Decision
from finetune_operator.final_status import Limits
from finetune_operator.gates import GateAnswer, Open, Over, Wait, ask_gates, deadline
from finetune_operator.job_events import events_between
from finetune_operator.job_reader import FineTuneJob, ttl_s_of
from finetune_operator.observation import Blocked, Observation
from finetune_operator.parent_job import with_parent
from finetune_operator.pod_waits import PATIENCE, SLOW_START_S, PodState
from finetune_operator.progress_status import is_write_due, with_age, with_progress, without_eta
from finetune_operator.running_status import running_status
from finetune_operator.status_size import bounded

PARENT_ASKED_EVERY_S = 15.0  # by a job that waits for another's adapter


def decide(job: FineTuneJob, observation: Observation, now: datetime) -> Decision:
    """Never raises; with its own status stored and its actions done, the same observation gives nothing new."""
    # A job that is going, or has its verdict, is only tidied up; one that this version cannot read is left as it is.
    if job.deleting:
        return Decision(job.status)
    if job.finished:
        return _tidy_up(job, observation)
    spec = job.spec
    if spec is None:
        return _decision(job, _rejected(job, now))
    limits = Limits.of(spec)

    # It is accepted, once: its time begins.
    status = _accepted(job, now)
    # Attempts that ended are closed, once, with everything that their pods tell.
    state = close_attempts(status, observation, now)
    # The adapter that it goes on with is taken once another job has committed it.
    state = state.with_status(with_parent(state.status, observation.parent))
    # The gates say whether it may go on.
    gate = ask_gates(spec, state.status, observation, now)
    # Where it may not, an attempt of which nothing exists yet is given up.
    state = attempt_steps.drop_unstarted(state, gate, now)
    # So is one that waits for what the platform team has mended meanwhile.
    pod_state = attempt_steps.pod_state(state, observation, now)
    state = attempt_steps.drop_outdated(state, observation, pod_state, now)
    # The clock of what a person has to fix goes on, or stops.
    pod_state = attempt_steps.pod_state(state, observation, now)
    state = with_wait_clock(state, pod_state, gate, now)
    # Kubernetes Jobs of closed attempts go, whatever comes next.
    actions = attempt_steps.delete_leftovers(state, observation)

    # It may be over: it has what it is for, or nothing is left to try.
    if final_status.is_success(state):
        return _decision(job, final_status.succeeded(state, job.generation, now), state, actions)
    if final_status.is_only_planned(spec, state):
        return _decision(job, final_status.planned(state, job.generation, now), state, actions)
    end = Blocked(gate.reason, gate.message) if isinstance(gate, Over) else None
    end = end or final_status.failure(state, pod_state, limits, now)
    if end is not None:
        status = final_status.failed(state, end, job.generation, now)
        return _decision(job, status, state, attempt_steps.delete_all(observation.k8s_jobs))

    # The attempt that runs is stopped, where the job may not go on or nothing moves.
    state = attempt_steps.stop(state, observation, gate, pod_state, limits.progress_deadline_s)
    # The next one begins, once the last has ended and nothing of it is alive.
    state = attempt_steps.begin_next(state, observation, gate, now)
    # Its Kubernetes Job is created, or deleted, as its entry in the status says.
    actions += attempt_steps.own_action(state, observation)

    # The status says what is so now.
    pod_state = attempt_steps.pod_state(state, observation, now)
    state = with_suspended_clock(state, pod_state, attempt_steps.held_back(state, observation, gate), now)
    state = state.with_status(_with_live_progress(state, observation, pod_state, now))
    status = running_status(job, state, observation, pod_state, gate, now)
    return _decision(job, status, state, actions, _requeue_after_s(spec, state, observation, pod_state, gate, now))


def _decision(
    job: FineTuneJob,
    status: FineTuneJobStatus,
    state: JobState | None = None,
    actions: tuple[Action, ...] = (),
    requeue_after_s: float | None = None,
) -> Decision:
    """Return the decision with one event for each transition from the stored status."""
    status = bounded(status)
    outcome = state.outcome if state is not None else None
    return Decision(status, actions, events_between(job.status, status, outcome), requeue_after_s)


def _accepted(job: FineTuneJob, now: datetime) -> FineTuneJobStatus:
    record = job.status.record or OperatorRecord()
    if record.accepted_at is None:
        record = record.model_copy(update={"accepted_at": format_time(now)})
    return job.status.model_copy(update={"record": record, "observed_generation": job.generation})


def _rejected(job: FineTuneJob, now: datetime) -> FineTuneJobStatus:
    """The spec cannot be read by this version: nothing is started, and nothing that runs is touched."""
    updates = [
        ConditionUpdate(ConditionType.READY, "False", Reason.SPEC_INVALID, job.problem),
        ConditionUpdate(ConditionType.STALLED, "True", Reason.SPEC_INVALID, job.problem),
    ]
    status = with_updates(job.status, updates, job.generation, now)
    phase = job.status.phase or Phase.PENDING
    return status.model_copy(update={"phase": phase, "observed_generation": job.generation})


def _tidy_up(job: FineTuneJob, observation: Observation) -> Decision:
    """The verdict is stored. A Kubernetes Job that is missing is never created again."""
    actions = attempt_steps.tidy_up(observation.k8s_jobs, ttl_s_of(job.spec))
    return Decision(job.status.model_copy(update={"observed_generation": job.generation}), actions)


def _with_live_progress(
    state: JobState, observation: Observation, pod_state: PodState, now: datetime
) -> FineTuneJobStatus:
    """Return the status with the running pod's last answer, as often as live figures may be written."""
    status, last, interval_s = state.status, state.last, observation.progress_write_interval_s
    if not pod_state.running and not pod_state.ending:
        status = without_eta(status)
    if last is None or not pod_state.running:
        return status
    answer = observation.answer_of(last)
    if answer is not None and is_write_due(status, answer, interval_s):
        status = with_progress(status, answer)
    return with_age(status, answer, interval_s, now)


def _requeue_after_s(
    spec: FineTuneJobSpec,
    state: JobState,
    observation: Observation,
    pod_state: PodState,
    gate: GateAnswer,
    now: datetime,
) -> float | None:
    """Return the seconds until time alone changes the decision; None when only events do."""
    record, last = state.status.record, state.last
    waiting_since = parse_time(record.storage_wait_since) if record else None
    patience_ends = waiting_since + PATIENCE if waiting_since is not None else None
    moments = [moment for moment in (deadline(spec, state.status, now), patience_ends) if moment is not None]
    waits_s = [max(1.0, (moment - now).total_seconds()) for moment in moments]
    if isinstance(gate, Wait) and gate.reason == Reason.WAITING_FOR_JOB:
        waits_s.append(PARENT_ASKED_EVERY_S)
    if isinstance(gate, Open) and attempt_steps.may_begin_next(state, observation):
        retry_s = attempt_steps.seconds_to_next(state, now)
        waits_s += [retry_s] if retry_s > 0 else []
    may_start = not pod_state.running and not pod_state.ending
    if last is not None and is_open(last) and may_start and state.k8s_job is not None:
        born = max([state.k8s_job.created_at, *(p.scheduled_at or p.created_at for p in state.pods if p.active)])
        slow_at = born + timedelta(seconds=SLOW_START_S + 1)
        waits_s += [(slow_at - now).total_seconds()] if slow_at > now else []
    waits_s += [left_s for pod in state.pods if (left_s := seconds_to_end(pod, now)) is not None and left_s > 0]
    return min(waits_s, default=None)
