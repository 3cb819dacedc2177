"""The steps of a decision that concern attempts: drop, stop, begin, create and delete. Pure, from state to state.

What an attempt does next is written into its entry first; the action follows from the entry, also after a restart.
"""

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime

from finetune_api import retry
from finetune_api.names import MAX_ATTEMPTS, Stage
from finetune_api.reasons import Reason
from finetune_api.status import AttemptStatus, ConditionType
from finetune_operator.attempt_outcome import STOPPING, belongs, is_open, is_stopping, is_unstarted
from finetune_operator.clock import parse_time
from finetune_operator.close_attempts import MAX_ENTRIES, JobState, given_up, running_entry
from finetune_operator.conditions import find
from finetune_operator.decision import CreateK8sJob, DeleteK8sJob, SetK8sJobTtl
from finetune_operator.gates import GateAnswer, Open, Wait
from finetune_operator.job_reader import reason_of
from finetune_operator.observation import Blocked, Observation
from finetune_operator.observed import ObservedK8sJob
from finetune_operator.pod_waits import REFUSED, PodState, pod_state_of


def drop_unstarted(state: JobState, gate: GateAnswer, now: datetime) -> JobState:
    """Close the newest attempt if the job is held back and nothing of it exists: there is nothing to stop."""
    last = state.last
    if not isinstance(gate, Wait) or last is None or not is_unstarted(last, state.k8s_job, state.pods):
        return state
    return _with_last(state, given_up(last, "Suspended", gate.reason, now))


def drop_outdated(state: JobState, observation: Observation, pod_state: PodState, now: datetime) -> JobState:
    """Close the newest attempt if it waits for something and its runtime has been mended: the next one gets that.

    One that a queue holds keeps its place there: nothing of its runtime is in its way."""
    last, wait = state.last, pod_state.wait
    if last is None or not is_open(last) or is_stopping(last) or last.started_at is not None:
        return state
    if not observation.runtime_changed or wait is None or wait.reason == Reason.JOB_SUSPENDED:
        return state
    return _with_last(state, given_up(last, "Superseded", Reason.SUPERSEDED, now))


def pod_state(state: JobState, observation: Observation, now: datetime) -> PodState:
    """Return what the newest attempt does while it is open; a refused creation stands until the Job exists."""
    last = state.last
    if last is None or not is_open(last):
        return PodState()
    blocked = observation.blocked
    stored = find(state.status, ConditionType.DEGRADED)
    unstarted = is_unstarted(last, state.k8s_job, state.pods)
    if unstarted and blocked is None and stored is not None and stored.status == "True":
        reason = reason_of(stored.reason)
        blocked = Blocked(reason, stored.message) if reason in REFUSED else None
    return pod_state_of(last, state.k8s_job, state.pods, blocked, now)


def delete_leftovers(state: JobState, observation: Observation) -> tuple[DeleteK8sJob, ...]:
    """Delete live Jobs but the newest attempt's: an older one, one whose attempt was given up, one that is not ours."""
    return tuple(
        DeleteK8sJob(each.name, each.uid)
        for each in observation.k8s_jobs
        if (each.live or _has_our_name(state, each)) and not each.deleting and each.uid not in _own_uids(state)
    )


def _has_our_name(state: JobState, k8s_job: ObservedK8sJob) -> bool:
    """Return True if the newest attempt, which is open, cannot be created beside this Job."""
    return state.last is not None and is_open(state.last) and belongs(state.last, k8s_job)


def delete_all(k8s_jobs: Iterable[ObservedK8sJob]) -> tuple[DeleteK8sJob, ...]:
    """Delete every Job that has not ended."""
    return tuple(DeleteK8sJob(each.name, each.uid) for each in k8s_jobs if each.live and not each.deleting)


def tidy_up(k8s_jobs: Iterable[ObservedK8sJob], ttl_s: int) -> tuple[DeleteK8sJob | SetK8sJobTtl, ...]:
    """Return what is to be done with the Jobs of a job that is finished."""
    k8s_jobs = tuple(k8s_jobs)
    ended = [each for each in k8s_jobs if not each.live and not each.deleting]
    return delete_all(k8s_jobs) + tuple(
        SetK8sJobTtl(each.name, each.uid, ttl_s) for each in ended if each.ttl_seconds != ttl_s
    )


def stop(
    state: JobState, observation: Observation, gate: GateAnswer, pod_state: PodState, progress_deadline_s: float
) -> JobState:
    """Write down why the newest attempt is to stop, if it is."""
    last = state.last
    if last is None or not is_open(last) or is_stopping(last) or is_unstarted(last, state.k8s_job, state.pods):
        return state
    if isinstance(gate, Wait) and gate.reason in STOPPING:
        return _with_last(state, last.model_copy(update={"reason": gate.reason.value}))
    answer, silence = observation.answer_of(last), observation.silence_of(last)
    # Silence is judged as standing still: whoever keeps a pod from answering must not keep it from being judged.
    silent_s = silence.silent_s if silence is not None else 0.0
    still_s = max(answer.progress.seconds_since_step if answer is not None else 0.0, silent_s)
    if pod_state.running and still_s > progress_deadline_s:
        return _with_last(state, last.model_copy(update={"reason": Reason.NO_PROGRESS.value}))
    return state


def begin_next(state: JobState, observation: Observation, gate: GateAnswer, now: datetime) -> JobState:
    """Enter the next attempt, if the job is not held back, nothing of the last one is alive, and its delay is over."""
    if not isinstance(gate, Open) or not may_begin_next(state, observation) or seconds_to_next(state, now) > 0:
        return state
    status = state.status
    stage = Stage.TRAIN if status.plan is not None else Stage.PREPARE
    numbers = [entry.number for entry in status.attempts if entry.stage == stage]
    numbers += [child.attempt for child in (*observation.k8s_jobs, *observation.pods) if child.stage == stage]
    number = max(numbers, default=0) + 1
    if number > MAX_ATTEMPTS:  # only with children that we never made: `failure` ends what has really had so many
        return state
    attempts = [*status.attempts, running_entry(stage, number)][-MAX_ENTRIES:]
    return JobState(status.model_copy(update={"attempts": attempts}), state.outcome, None, ())


def held_back(state: JobState, observation: Observation, gate: GateAnswer) -> Wait | None:
    """Return what the job waits for, such as its user who has suspended it, once nothing of it runs any more."""
    return gate if isinstance(gate, Wait) and may_begin_next(state, observation) else None


def may_begin_next(state: JobState, observation: Observation) -> bool:
    """Return True if the last attempt has ended, and nothing of any attempt is alive."""
    return (state.last is None or not is_open(state.last)) and nothing_else_alive(state, observation)


def seconds_to_next(state: JobState, now: datetime) -> float:
    """Return how long the next attempt has to wait after the last one."""
    last = state.last
    ended_at = parse_time(last.finished_at) if last is not None else None
    if ended_at is None:
        return 0.0
    passed_s = max(0.0, (now - ended_at).total_seconds())  # another clock may be ahead of ours
    return max(0.0, retry.delay_s(state.status.attempts) - passed_s)


def own_action(state: JobState, observation: Observation) -> tuple[CreateK8sJob | DeleteK8sJob, ...]:
    """Create or delete the Job of the newest attempt, as its entry says."""
    last, k8s_job = state.last, state.k8s_job
    if last is None or not is_open(last):
        return ()
    if is_stopping(last):
        if k8s_job is None or not k8s_job.live or k8s_job.deleting:
            return ()
        return (DeleteK8sJob(k8s_job.name, k8s_job.uid),)
    if is_unstarted(last, k8s_job, state.pods) and nothing_else_alive(state, observation):
        stage, plan = Stage(last.stage), state.status.plan
        return (CreateK8sJob(stage, last.number, plan.digest if plan is not None and stage == Stage.TRAIN else None),)
    return ()


def nothing_else_alive(state: JobState, observation: Observation) -> bool:
    """Return True if nothing of other attempts is alive: two writers at a time are never wanted."""
    alive = [*(j for j in observation.k8s_jobs if j.live), *(p for p in observation.pods if p.active)]
    return all(child.uid in _own_uids(state) for child in alive)


def _own_uids(state: JobState) -> set[str]:
    """Return the UIDs of what exists of the newest attempt, while it is open."""
    if state.last is None or not is_open(state.last):
        return set()
    return {child.uid for child in (state.k8s_job, *state.pods) if child is not None}


def _with_last(state: JobState, entry: AttemptStatus) -> JobState:
    attempts = [*state.status.attempts[:-1], entry]
    return replace(state, status=state.status.model_copy(update={"attempts": attempts}))
