"""Everything that is observed of one FineTuneJob, as plain frozen values."""

from dataclasses import dataclass
from datetime import datetime

from finetune_api.names import Stage
from finetune_api.platform import DataPolicy
from finetune_api.reasons import Reason
from finetune_api.run import Progress
from finetune_api.status import AttemptStatus
from finetune_operator.observed import ObservedK8sJob, ObservedPod
from finetune_operator.parent_job import ParentJob


@dataclass(frozen=True)
class Blocked:
    """Why the current attempt cannot start, from a refused creation or from the cluster's own events."""

    reason: Reason
    message: str


@dataclass(frozen=True)
class PodAnswer:
    """The last answer of a pod. job_uid: of the Kubernetes Job that controls the pod."""

    progress: Progress
    at: datetime
    job_uid: str


@dataclass(frozen=True)
class PodSilence:
    """A pod that gave no usable answer, from the first to the last time that it was asked in vain.

    job_uid: of the Kubernetes Job that controls the pod. reached_since: since when it can be reached and says nothing;
    None where the network may be what keeps us apart."""

    stage: Stage
    attempt: int
    job_uid: str
    pod_uid: str
    since: datetime
    until: datetime
    reached_since: datetime | None = None

    @property
    def unanswered_s(self) -> float:
        """Seconds for which it has not answered, whosever fault that is."""
        return (self.until - self.since).total_seconds()

    @property
    def silent_s(self) -> float:
        """Seconds for which it has not answered, although it could be reached."""
        return (self.until - self.reached_since).total_seconds() if self.reached_since is not None else 0.0


@dataclass(frozen=True)
class CreatedK8sJob:
    """The Kubernetes Job that this process creates or created last for a FineTuneJob. proof: by which it is known."""

    stage: Stage
    attempt: int
    proof: str


@dataclass(frozen=True)
class Observation:
    """Everything that is observed of one FineTuneJob."""

    k8s_jobs: tuple[ObservedK8sJob, ...] = ()
    pods: tuple[ObservedPod, ...] = ()
    answers: tuple[PodAnswer, ...] = ()  # of whatever pods bear the job's labels
    blocked: Blocked | None = None
    progress_write_interval_s: float = 30
    silences: tuple[PodSilence, ...] = ()
    created: CreatedK8sJob | None = None
    runtime_changed: bool = False  # since the run was made; looked at only while nothing of the job runs
    parent: ParentJob | None = None  # looked at while its adapter is waited for; None then: there is no such job
    policy: DataPolicy | None = None  # of the runtime; looked at until the job has begun
    pods_listed: bool = False  # the pods were listed after the Jobs were seen: none that there is, is missing

    def answer_of(self, entry: AttemptStatus) -> PodAnswer | None:
        """Return the last answer about this attempt of a pod of its Kubernetes Job.

        Labels are anybody's to write: no pod is believed before the status has the UID of the attempt's Job."""
        mine = (
            answer
            for answer in self.answers
            if (answer.progress.stage, answer.progress.attempt, answer.job_uid)
            == (entry.stage, entry.number, entry.job_uid)
        )
        return next(mine, None)

    def silence_of(self, entry: AttemptStatus) -> PodSilence | None:
        """Return the silence of the pod of this attempt's Kubernetes Job."""
        mine = (
            silence
            for silence in self.silences
            if (silence.stage, silence.attempt, silence.job_uid) == (entry.stage, entry.number, entry.job_uid)
        )
        return next(mine, None)
