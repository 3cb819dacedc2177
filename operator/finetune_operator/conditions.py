"""From a situation to conditions and phase. Pure; a condition's time moves only when its status does."""

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Literal

from finetune_api.printable import printable
from finetune_api.reasons import Reason
from finetune_api.redact import without_secrets
from finetune_api.status import Condition, ConditionType, FineTuneJobStatus
from finetune_operator.clock import format_time

MAX_MESSAGE = 1024
MAX_COMPARED = 300
# Words that change all the time: the scheduler's with every node of the cluster, a divergence's with every step.
_FIRST_WORDS_STAY = (Reason.UNSCHEDULABLE, Reason.DIVERGING)
# Whose words are the cluster's: names of pods, numbers, ports, ids of requests and times in them change with every try.
_CLUSTERS_WORDS = (
    Reason.QUOTA_EXCEEDED, Reason.FORBIDDEN, Reason.NAME_COLLISION, Reason.IMAGE_PULL, Reason.MISSING_REF,
    Reason.NODE_UNREACHABLE, Reason.POD_NOT_STARTED, Reason.JOB_SUSPENDED, Reason.DISRUPTED, Reason.INVALID_MANIFEST,
    Reason.NO_ANSWER,
)  # fmt: skip
ConditionState = Literal["True", "False", "Unknown"]


@dataclass(frozen=True)
class ConditionUpdate:
    """One condition before it is compared with what is stored."""

    type: ConditionType
    status: ConditionState
    reason: Reason
    message: str = ""


def find(status: FineTuneJobStatus, wanted: ConditionType) -> Condition | None:
    return next((c for c in status.conditions if c.type == wanted), None)


def with_updates(
    status: FineTuneJobStatus, updates: list[ConditionUpdate], generation: int, now: datetime
) -> FineTuneJobStatus:
    """Return the status with these conditions; those that no update is about stay as they are."""
    stored = {c.type: c for c in status.conditions}
    for update in updates:
        stored[update.type] = _condition(stored.get(update.type), update, generation, now)
    order = list(ConditionType)
    return status.model_copy(update={"conditions": sorted(stored.values(), key=lambda c: order.index(c.type))})


def _condition(old: Condition | None, update: ConditionUpdate, generation: int, now: datetime) -> Condition:
    message = one_line(update.message)
    same_answer = old is not None and old.status == update.status
    if old is not None and same_answer and old.reason == update.reason:
        stays = update.reason in _FIRST_WORDS_STAY
        stays = stays or (update.reason in _CLUSTERS_WORDS and _gist(message) == _gist(old.message))
        message = old.message if stays else message
    return Condition(
        type=update.type,
        status=update.status,
        reason=update.reason.value,
        message=message,
        last_transition_time=old.last_transition_time if old is not None and same_answer else format_time(now),
        observed_generation=generation,
    )


def _gist(message: str) -> str:
    """Return what a message says, without words that hold a digit, which mean nothing to whoever has to act."""
    words = ("#" if any(map(str.isdigit, word)) else word for word in message.split())
    return " ".join(words)[:MAX_COMPARED]


@lru_cache(maxsize=512)
def one_line(text: str) -> str:
    """Return at most 1,024 printable characters on one line, without credentials: parts of it come from outside."""
    clean = printable(without_secrets(text))
    return clean if len(clean) <= MAX_MESSAGE else clean[: MAX_MESSAGE - 1] + "…"
