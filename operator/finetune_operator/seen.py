"""What `plan` is given and what it gives: plain frozen values."""

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from finetune_api.names import Stage
from finetune_api.reasons import Reason
from finetune_api.run import Progress
from finetune_api.status import AttemptStatus, FineTuneJobStatus
from finetune_operator.observed import ObservedJob, ObservedPod


@dataclass(frozen=True)
class Blocked:
    """Why the current attempt cannot start, from a refused creation or from the cluster's own events."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class SeenProgress:
    """The last answer of the training pod."""

    progress: Progress
    at: datetime


@dataclass(frozen=True)
class SeenSilence:
    """A pod that can be reached but gave no usable answer, from the first to the last time it was asked."""

    stage: Stage
    attempt: int
    pod_uid: str
    since: datetime
    until: datetime


@dataclass(frozen=True)
class Seen:
    """Everything that is observed of one FineTuneJob."""

    jobs: tuple[ObservedJob, ...] = ()
    pods: tuple[ObservedPod, ...] = ()
    progress: SeenProgress | None = None
    blocked: Blocked | None = None
    progress_write_interval_s: float = 30
    silence: SeenSilence | None = None

    def answer_of(self, entry: AttemptStatus) -> SeenProgress | None:
        """The pod's last answer, if it is about this attempt."""
        said = self.progress
        mine = said is not None and (said.progress.stage, said.progress.attempt) == (entry.stage, entry.number)
        return said if mine else None

    def silent_s(self, entry: AttemptStatus) -> float:
        """Seconds for which this attempt's pod has not answered, although it was asked and could be reached."""
        silence = self.silence
        if silence is None or (silence.stage, silence.attempt) != (entry.stage, entry.number):
            return 0.0
        return (silence.until - silence.since).total_seconds()


@dataclass(frozen=True)
class CreateJob:
    """Create the Job of this attempt, and before it the run's ConfigMap if it is missing."""

    stage: Stage
    attempt: int
    plan_digest: str | None = None


@dataclass(frozen=True)
class DeleteJob:
    """Delete in the background: the pods get SIGTERM and their grace period."""

    name: str
    uid: str


@dataclass(frozen=True)
class SetTtl:
    """Let Kubernetes remove a finished Job."""

    name: str
    seconds: int


Action = CreateJob | DeleteJob | SetTtl


@dataclass(frozen=True)
class JobEvent:
    """One event on the FineTuneJob."""

    type: Literal["Normal", "Warning"]
    reason: Reason
    message: str


@dataclass(frozen=True)
class Plan:
    """The status is written first, then the actions are applied, then the events are sent."""

    status: FineTuneJobStatus
    actions: tuple[Action, ...] = ()
    events: tuple[JobEvent, ...] = ()
    requeue_after_s: float | None = None
