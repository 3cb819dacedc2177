"""What a job's QualityConcern says: the model, as the trainer has measured it, and never how the job runs. Pure."""

from finetune_api.quality import Quality, verdict
from finetune_api.reasons import Reason
from finetune_api.run import Progress
from finetune_api.status import ConditionType, FineTuneJobStatus
from finetune_operator.conditions import ConditionState, ConditionUpdate, find

CONCERNS = (
    Reason.WORSE_THAN_START,
    Reason.ANSWERS_DO_NOT_END,
    Reason.DIVERGING,
    Reason.CHOSEN_UNLIKELY,
    Reason.FAR_FROM_START,
    Reason.START_PREFERS_REJECTED,
)
_STATUS: dict[Reason, ConditionState] = {Reason.NO_CONCERN: "False", Reason.NOT_MEASURED: "Unknown"}


def while_running(status: FineTuneJobStatus, said: Progress | None) -> ConditionUpdate | None:
    """Return the condition that the running pod's answer asks for; None keeps the one that is stored.

    A pod that does not know its place yet knows nothing of the model either."""
    if said is None or said.total_steps == 0:
        return None
    if said.quality is not None and said.quality.concerns:
        return _update(said.quality)
    before = find(status, ConditionType.QUALITY_CONCERN)
    if before is None or before.reason != Reason.DIVERGING:
        return None  # no step takes back what was measured: an attempt that has just begun does not know it yet
    message = "the training loss is no longer far above where it began"
    return ConditionUpdate(ConditionType.QUALITY_CONCERN, "False", Reason.NO_CONCERN, message)


def at_the_end(quality: Quality | None) -> ConditionUpdate | None:
    """Return what is said of the finished model; None, which keeps what is stored, for a trainer that did not tell."""
    return None if quality is None else _update(quality)


def _update(quality: Quality) -> ConditionUpdate:
    reason, message = verdict(quality)
    return ConditionUpdate(ConditionType.QUALITY_CONCERN, _STATUS.get(reason, "True"), reason, message)
