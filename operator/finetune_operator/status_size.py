"""Keep a status small: what is cut first, when it would take more than 8 KiB. Pure."""

from finetune_api.status import FineTuneJobStatus

MAX_STATUS_BYTES = 8192


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
