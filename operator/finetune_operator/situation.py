"""The conditions and the phase of a job that is not over. Pure."""

from datetime import UTC, datetime

from finetune_api.names import Stage
from finetune_api.reasons import FAULTS, Reason, words
from finetune_api.run import Progress, Trouble
from finetune_api.status import Condition, ConditionType, FineTuneJobStatus, Phase
from finetune_operator import quality
from finetune_operator.attempts import is_open, is_stopping
from finetune_operator.clock import format_time, parse_time
from finetune_operator.conditions import Claim, find, with_claims
from finetune_operator.fold import Folded
from finetune_operator.live import PATIENCE, REFUSED, Look
from finetune_operator.verdict import ended_words, planned
from finetune_operator.view import JobView, reason_of

_WAITS = (
    *REFUSED, Reason.UNSCHEDULABLE, Reason.IMAGE_PULL, Reason.MISSING_REF, Reason.NODE_UNREACHABLE, Reason.SUSPENDED,
)  # fmt: skip
# What a trainer may say that it cannot save for.
TROUBLE_REASONS = (
    Reason.STORAGE_TRANSIENT, Reason.ACCESS_DENIED, Reason.DATA_NOT_FOUND, Reason.DISK_FULL, Reason.CONFIG_INVALID,
)  # fmt: skip
_NOT_ADMITTED = (Reason.UNSCHEDULABLE, Reason.QUOTA_EXCEEDED)


def describe(
    job: JobView, folded: Folded, look: Look, suspend: bool, *, quiet: bool, said: Progress | None, now: datetime
) -> FineTuneJobStatus:
    """Return the status of a job that is not over.

    `quiet`: nothing of other attempts is alive. `said`: the last answer of the pod, if it runs."""
    status, last = folded.status, folded.last
    stage = Stage.TRAIN if status.plan is not None else Stage.PREPARE
    doing = Reason.TRAINING if stage == Stage.TRAIN else Reason.PREPARING
    suspended = suspend and quiet and not (last is not None and is_open(last))
    claims = [
        planned(status),
        _admitted(folded, look, suspended, doing),
        _running(job.status, folded, look, suspended, doing),
        _suspended(job.status, suspend, suspended),
        _degraded(job.status, folded, look, said),
        quality.while_running(job.status, said),
        Claim(ConditionType.SUCCEEDED, "Unknown", doing),
        Claim(ConditionType.FINISHED, "False", doing),
        Claim(ConditionType.READY, "True", Reason.ACCEPTED),
        Claim(ConditionType.STALLED, "False", Reason.HEALTHY),
    ]
    status = with_claims(status, [claim for claim in claims if claim is not None], job.generation, now)
    started = any(e.started_at is not None for e in status.attempts if e.stage == stage)
    phase = Phase.PENDING if not started else (Phase.TRAINING if stage == Stage.TRAIN else Phase.PREPARING)
    return status.model_copy(update={"phase": Phase.SUSPENDED if suspended else phase})


def _admitted(folded: Folded, look: Look, suspended: bool, doing: Reason) -> Claim | None:
    """Whether the cluster has given the newest attempt a place; between attempts the last answer stays."""
    if look.scheduled:
        return Claim(ConditionType.ADMITTED, "True", doing)
    if look.wait is not None and look.wait.reason in _NOT_ADMITTED:
        return Claim(ConditionType.ADMITTED, "False", look.wait.reason, look.wait.message)
    if suspended:
        return Claim(ConditionType.ADMITTED, "False", Reason.SUSPENDED)
    if folded.last is not None and is_open(folded.last) and not look.ending:
        return Claim(ConditionType.ADMITTED, "Unknown", doing)
    return None


def _running(old: FineTuneJobStatus, folded: Folded, look: Look, suspended: bool, doing: Reason) -> Claim | None:
    last, before = folded.last, find(old, ConditionType.RUNNING)
    if suspended:
        return Claim(ConditionType.RUNNING, "False", Reason.SUSPENDED, "spec.suspend is true")
    if look.ending and before is not None:
        return None
    if look.running and last is not None:
        stopping = is_stopping(last)
        reason = _stop_reason(last.reason) if stopping else doing
        message = f"attempt {last.number} of {last.stage} {'is being stopped' if stopping else 'runs'}"
        return Claim(ConditionType.RUNNING, "True", reason, message)
    if look.wait is not None:
        return Claim(ConditionType.RUNNING, "False", look.wait.reason, look.wait.message)
    if folded.ended is not None and folded.ended.attempt_class != "Succeeded":
        ended = folded.ended
        return Claim(ConditionType.RUNNING, "False", ended.reason, ended_words(folded) + _retries(folded))
    if before is not None and before.status == "False" and reason_of(before.reason) not in _WAITS:
        again = folded.ended is None and (before.reason != Reason.PREPARING or doing == Reason.PREPARING)
        if again:
            return None  # why the attempt before ended stays until this one runs
    return Claim(ConditionType.RUNNING, "False", doing, "waiting for the pod to start")


def _retries(folded: Folded) -> str:
    ended = folded.ended
    if ended is None or ended.attempt_class != "Failure":
        return ""
    return f"; trying again ({folded.status.failures} failed so far)"


def _stop_reason(text: str | None) -> Reason:
    return Reason.SUSPENDING if reason_of(text) == Reason.SUSPENDED else reason_of(text)


def _suspended(old: FineTuneJobStatus, suspend: bool, suspended: bool) -> Claim | None:
    before = find(old, ConditionType.SUSPENDED)
    if suspended:
        return Claim(ConditionType.SUSPENDED, "True", Reason.SUSPENDED, "set spec.suspend to false to continue")
    if suspend:
        return Claim(ConditionType.SUSPENDED, "False", Reason.SUSPENDING, "the pod is checkpointing")
    if before is None:
        return Claim(ConditionType.SUSPENDED, "False", Reason.ACCEPTED)
    if before.status == "True" or before.reason == Reason.SUSPENDING:
        return Claim(ConditionType.SUSPENDED, "False", Reason.RESUMED, "spec.suspend is false, the job goes on")
    return None


def _degraded(old: FineTuneJobStatus, folded: Folded, look: Look, said: Progress | None) -> Claim | None:
    """Return what is to be fixed, or that nothing is; None keeps what is stored. `said`: by the pod that runs."""
    before, last, ended = find(old, ConditionType.DEGRADED), folded.last, folded.ended
    if look.wait is not None and look.wait.reason != Reason.DISRUPTED:
        return Claim(ConditionType.DEGRADED, "True", look.wait.reason, look.wait.message)
    if ended is not None and ended.attempt_class == "Waiting":
        message = f"{ended_words(folded)}; trying again until {_patience_ends(folded)}"
        return Claim(ConditionType.DEGRADED, "True", ended.reason, message)
    if ended is not None and ended.reason == Reason.BAD_REPORT:
        return Claim(ConditionType.DEGRADED, "True", Reason.BAD_REPORT, ended_words(folded))
    if said is not None and said.trouble is not None:
        return _trouble(said.trouble)
    if _still_holds(before, folded, look, said):
        return None
    closed = [e for e in folded.status.attempts if not is_open(e)]
    if closed and closed[-1].attempt_class == "Waiting" and last is not None:
        message = f"attempt {closed[-1].number} of {closed[-1].stage} waited for this; trying again"
        return Claim(ConditionType.DEGRADED, "True", reason_of(closed[-1].reason), message)
    return Claim(ConditionType.DEGRADED, "False", Reason.HEALTHY)


def _trouble(trouble: Trouble) -> Claim:
    """The training goes on, but something of it fails again and again."""
    reason = FAULTS[trouble.fault].reason
    since = format_time(datetime.fromtimestamp(trouble.since, UTC))
    message = f"progress cannot be saved since {since}: {words(trouble.fault, trouble.args)}; training goes on"
    if reason not in TROUBLE_REASONS:  # a pod may say anything
        reason = Reason.STORAGE_TRANSIENT
    return Claim(ConditionType.DEGRADED, "True", reason, f"{message}, and it is tried again")


def _still_holds(before: Condition | None, folded: Folded, look: Look, said: Progress | None) -> bool:
    """Return True if a stored Degraded is still true, although nothing that is seen now says so again."""
    if before is None or before.status != "True":
        return False
    reason = reason_of(before.reason)
    trained = any(e.stage == Stage.TRAIN and e.started_at is not None for e in folded.status.attempts)
    if reason in TROUBLE_REASONS and trained and said is None:
        return True  # until a pod that runs has said that it can save
    if folded.ended is not None:
        return False
    closed = [e for e in folded.status.attempts if not is_open(e)]
    if closed and closed[-1].attempt_class == "Waiting" and reason_of(closed[-1].reason) == reason:
        return True
    return reason == Reason.BAD_REPORT and not look.running


def _patience_ends(folded: Folded) -> str:
    since = parse_time(folded.status.record.storage_wait_since) if folded.status.record else None
    return format_time(since + PATIENCE) if since is not None else "then"
