"""What the operator decides for one FineTuneJob: its new status, what to do, what to tell. Plain frozen values."""

from dataclasses import dataclass
from typing import Literal

from finetune_api.names import Stage
from finetune_api.reasons import Reason
from finetune_api.status import FineTuneJobStatus


@dataclass(frozen=True)
class CreateK8sJob:
    """Create the Kubernetes Job of this attempt, and before it the run's ConfigMap if it is missing."""

    stage: Stage
    attempt: int
    plan_digest: str | None = None


@dataclass(frozen=True)
class DeleteK8sJob:
    """Delete in the background: the pods get SIGTERM and their grace period."""

    name: str
    uid: str


@dataclass(frozen=True)
class SetK8sJobTtl:
    """Let Kubernetes remove a finished Job: this very object."""

    name: str
    uid: str
    seconds: int


Action = CreateK8sJob | DeleteK8sJob | SetK8sJobTtl


@dataclass(frozen=True)
class JobEvent:
    """One event on the FineTuneJob."""

    type: Literal["Normal", "Warning"]
    reason: Reason
    message: str


@dataclass(frozen=True)
class Decision:
    """The status is written first, then the actions are applied, then the events are sent.

    requeue_after_s: seconds until time alone changes the decision; None when only events do."""

    status: FineTuneJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[JobEvent, ...] = ()
    requeue_after_s: float | None = None
