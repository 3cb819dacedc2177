"""Every decision of the operator, in one pure, total and idempotent function.

`plan(job, seen, now)` gives the new status, what to do, and what to tell. Its table test is the specification.
Nothing is remembered elsewhere: what a later decision needs is in the status, the Jobs or the pods.
"""

from dataclasses import replace
from datetime import datetime

from finetune_api import defaults
from finetune_api.reasons import Reason
from finetune_api.status import ConditionType, FineTuneJobStatus, OperatorRecord, Phase
from finetune_operator.clock import format_time
from finetune_operator.conditions import Claim, with_claims
from finetune_operator.decide import decide
from finetune_operator.fold import fold
from finetune_operator.seen import Action, DeleteJob, Plan, Seen, SetTtl
from finetune_operator.transitions import transitions
from finetune_operator.view import JobView

MAX_STATUS_BYTES = 8192


def plan(job: JobView, seen: Seen, now: datetime) -> Plan:
    """Never raises; with its own status stored and its actions done, the same observation gives nothing new."""
    if job.deleting:
        return Plan(job.status)
    if job.finished:
        return _after_verdict(job, seen)
    if job.spec is None:
        status = _rejected(job, now)
        return Plan(status, (), transitions(job.status, status, None))
    accepted = _accepted(job, now)
    folded = fold(accepted.status, seen, now)
    made = decide(accepted, job.spec, folded, seen, now)
    status = bounded(made.status)
    return Plan(status, made.actions, transitions(job.status, status, folded.ended), made.requeue_after_s)


def _accepted(job: JobView, now: datetime) -> JobView:
    record = job.status.record or OperatorRecord()
    if record.accepted_at is None:
        record = record.model_copy(update={"accepted_at": format_time(now)})
    status = job.status.model_copy(update={"record": record, "observed_generation": job.generation})
    return replace(job, status=status)


def _rejected(job: JobView, now: datetime) -> FineTuneJobStatus:
    """The spec cannot be read by this version: nothing is started, and nothing that runs is touched."""
    claims = [
        Claim(ConditionType.READY, "False", Reason.SPEC_INVALID, job.problem),
        Claim(ConditionType.STALLED, "True", Reason.SPEC_INVALID, job.problem),
    ]
    status = with_claims(job.status, claims, job.generation, now)
    phase = job.status.phase or Phase.PENDING
    return bounded(status.model_copy(update={"phase": phase, "observed_generation": job.generation}))


def _after_verdict(job: JobView, seen: Seen) -> Plan:
    """The verdict is stored: only tidy up. A missing Job is never created again."""
    ttl = job.spec.ttl_seconds_after_finished if job.spec is not None else None
    seconds = defaults.given(ttl, defaults.TTL_S)
    actions: list[Action] = [DeleteJob(j.name, j.uid) for j in seen.jobs if j.live and not j.deleting]
    actions += [
        SetTtl(j.name, seconds) for j in seen.jobs if not j.live and not j.deleting and j.ttl_seconds != seconds
    ]
    return Plan(job.status.model_copy(update={"observed_generation": job.generation}), tuple(actions))


def bounded(status: FineTuneJobStatus) -> FineTuneJobStatus:
    """At most 8 KiB: long words are cut first, then what lies whole in the bucket, then the past.

    Words come anew in every round, so the last cut is of them: else a round would undo what the one before did."""
    for cut in (_short_words, _few_resolved, _one_checkpoint, _few_attempts, _bare_words):
        if _size(status) <= MAX_STATUS_BYTES:
            break
        status = cut(status)
    return status


def _short_words(status: FineTuneJobStatus, size_bytes: int = 256) -> FineTuneJobStatus:
    def short(text: str) -> str:
        return text.encode(errors="replace")[:size_bytes].decode(errors="ignore")

    conditions = [c.model_copy(update={"message": short(c.message)}) for c in status.conditions]
    return status.model_copy(update={"conditions": conditions})


def _few_resolved(status: FineTuneJobStatus) -> FineTuneJobStatus:
    while status.plan is not None and status.plan.resolved and _size(status) > MAX_STATUS_BYTES:
        plan_status = status.plan.model_copy(update={"resolved": status.plan.resolved[:-1]})
        status = status.model_copy(update={"plan": plan_status})
    return status


def _one_checkpoint(status: FineTuneJobStatus) -> FineTuneJobStatus:
    return status.model_copy(update={"checkpoints": status.checkpoints[-1:]})


def _few_attempts(status: FineTuneJobStatus) -> FineTuneJobStatus:
    record = status.record and status.record.model_copy(update={"disrupted_pods": status.record.disrupted_pods[-5:]})
    return status.model_copy(update={"attempts": status.attempts[-5:], "record": record})


def _bare_words(status: FineTuneJobStatus) -> FineTuneJobStatus:
    return _short_words(status, 64)


def _size(status: FineTuneJobStatus) -> int:
    return len(status.model_dump_json(exclude_none=True).encode(errors="replace"))
