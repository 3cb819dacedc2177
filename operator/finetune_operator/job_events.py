"""One event for each transition: what changed between two statuses, in the words of the conditions. Pure."""

from finetune_api.reasons import Reason
from finetune_api.status import ConditionType, FineTuneJobStatus
from finetune_operator.attempt_outcome import AttemptOutcome
from finetune_operator.conditions import find, one_line
from finetune_operator.decision import JobEvent
from finetune_operator.job_reader import is_finished, reason_of

# Ways of not running that are no news: the condition that caused them has its own event.
_QUIET = (Reason.PREPARING, Reason.TRAINING, Reason.SUCCEEDED, Reason.SUSPENDED, Reason.COMMITTED)
# Ways of waiting in which nothing is wrong.
_NO_FAULT = (Reason.JOB_SUSPENDED, Reason.AWAITING_APPROVAL, Reason.WAITING_FOR_JOB)


def events_between(
    old: FineTuneJobStatus, new: FineTuneJobStatus, outcome: AttemptOutcome | None
) -> tuple[JobEvent, ...]:
    """Return the events in the order of the job's life, each reason once.

    outcome: of the attempt that was closed just now; its failure is told even if the one before failed alike."""
    events: dict[Reason, JobEvent] = {}

    def tell(warning: bool, reason: Reason, message: str) -> None:
        events.setdefault(reason, JobEvent("Warning" if warning else "Normal", reason, one_line(message)))

    def changed(kind: ConditionType) -> bool:
        before, after = find(old, kind), find(new, kind)
        return after is not None and (before is None or (before.status, before.reason) != (after.status, after.reason))

    def tell_quality() -> None:
        before, concern = find(old, ConditionType.QUALITY_CONCERN), find(new, ConditionType.QUALITY_CONCERN)
        if concern is None or not changed(ConditionType.QUALITY_CONCERN):
            return
        if concern.status == "True" or (before is not None and before.status == "True"):
            tell(concern.status == "True", reason_of(concern.reason), concern.message)

    finished = is_finished(new)
    ready, running = find(new, ConditionType.READY), find(new, ConditionType.RUNNING)
    if ready is not None and changed(ConditionType.READY) and ready.reason == Reason.ACCEPTED:
        tell(False, Reason.ACCEPTED, "the job was accepted")
    if not finished and ready is not None and ready.status == "False" and changed(ConditionType.READY):
        tell(True, reason_of(ready.reason), ready.message)
    plan = find(new, ConditionType.PLANNED)
    if plan is not None and plan.status == "True" and changed(ConditionType.PLANNED):
        tell(False, Reason.PREPARED, plan.message)
    verdict = find(new, ConditionType.SUCCEEDED)
    if finished and verdict is not None:
        if changed(ConditionType.SUCCEEDED):
            bad = verdict.status != "True" and verdict.reason != Reason.PLANNED
            tell(bad, reason_of(verdict.reason), verdict.message)
        tell_quality()
        return tuple(events.values())
    suspended = find(new, ConditionType.SUSPENDED)
    if suspended is not None and changed(ConditionType.SUSPENDED) and suspended.reason != Reason.ACCEPTED:
        tell(False, reason_of(suspended.reason), suspended.message)
    degraded = find(new, ConditionType.DEGRADED)
    if degraded is not None and changed(ConditionType.DEGRADED):
        if degraded.status == "True":
            tell(True, reason_of(degraded.reason), degraded.message)
        elif find(old, ConditionType.DEGRADED) is not None:
            tell(False, Reason.HEALTHY, "what was in the way is gone, the job goes on")
    tell_quality()
    if running is not None and (changed(ConditionType.RUNNING) or outcome is not None):
        reason = reason_of(running.reason)
        if running.status == "True":
            tell(False, reason, running.message)
        elif reason not in _QUIET:
            tell(reason not in _NO_FAULT, reason, running.message)
    return tuple(events.values())
