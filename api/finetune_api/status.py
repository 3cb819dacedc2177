"""The FineTuneJob status: what the operator reports. At most 8 KiB, every list and string bounded."""

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field, StringConstraints

from finetune_api.base import ApiModel, Count, Digest, Str64, Str256, Uri
from finetune_api.quality import FIGURE_WORDS, MAX_FIGURES

MAX_SUSPENDED_S = 10**9  # a sum of times that no calendar ends at
MAX_RESOLVED = 20  # chosen values in the status; the plan holds all


class Phase(StrEnum):
    """For people and printer columns; code reads conditions."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    TRAINING = "Training"
    WAITING = "Waiting"
    SUSPENDED = "Suspended"
    PLANNED = "Planned"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


FINAL_PHASES = (Phase.PLANNED, Phase.SUCCEEDED, Phase.FAILED)
PHASE_FIELD = "status.phase"  # the server can select by it: `kubectl get ftj --field-selector=status.phase=Failed`


class ConditionType(StrEnum):
    PLANNED = "Planned"
    ADMITTED = "Admitted"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    DEGRADED = "Degraded"
    QUALITY_CONCERN = "QualityConcern"
    SUCCEEDED = "Succeeded"
    FINISHED = "Finished"
    READY = "Ready"
    STALLED = "Stalled"


Message = Annotated[str, StringConstraints(max_length=1024)]


class Condition(ApiModel):
    """One condition, as in metav1.Condition."""

    type: ConditionType = Field(description="Which question it answers.")
    status: Literal["True", "False", "Unknown"] = Field(description="The answer.")
    reason: Str64 = Field(description="Why, from a fixed list.")
    message: Message = Field(description="Why, in words: the object, the place, what was found and what to do.")
    last_transition_time: Str64 = Field(description="When the answer last changed.")
    observed_generation: int = Field(ge=0, description="Generation of the spec that was judged.")


class ResolvedValue(ApiModel):
    """A value that was chosen because the spec left it out."""

    field: Str64 = Field(description="Path in the spec.")
    value: Str64 = Field(description="The value chosen.")
    reason: Annotated[str, StringConstraints(max_length=160)] = Field(description="Why.")


class PlanStatus(ApiModel):
    """The essence of the plan; the whole of it lies at `uri`."""

    uri: Uri = Field(description="The plan in the bucket, under its digest.")
    digest: Digest = Field(description="SHA-256 of the plan's content, ETags left out.")
    steps: Count = Field(description="Optimizer steps.")
    rows: Count | None = Field(default=None, description="Rows read over all steps, again in every epoch.")
    distinct_rows: Count | None = Field(default=None, description="Different rows among them.")
    train_tokens: Count = Field(description="Tokens read over all steps.")
    label_tokens: Count = Field(description="Tokens learned from over all steps.")
    memory_bytes: Count = Field(description="Memory the training pod is expected to need.")
    disk_bytes: Count = Field(description="Disk the training pod is expected to need.")
    resolved: list[ResolvedValue] = Field(
        max_length=MAX_RESOLVED,
        description="Values chosen, with reasons, those that people change first; all are in the plan.",
    )


class DroppedRows(ApiModel):
    """Rows left out for one reason."""

    reason: Str64 = Field(description="Why they were left out.")
    rows: Count = Field(description="How many.")


class DataStatus(ApiModel):
    """Every row accounted for: rowsIn = rowsUsed + rowsHeldOut + the sum of dropped."""

    files: Count = Field(description="Files read.")
    rows_in: Count = Field(description="Rows read.")
    rows_used: Count = Field(
        description="Rows in the training set. How many of them the steps read, and how often, is in the plan."
    )
    rows_held_out: Count = Field(description="Rows kept for evaluation.")
    dropped: list[DroppedRows] = Field(max_length=10, description="Rows left out, by reason.")
    digest: Digest = Field(description="SHA-256 over the prepared data.")
    report_uri: Uri = Field(description="report.json in the bucket: the rows of every file, for programs.")
    report_page_uri: Uri | None = Field(
        default=None,
        description="report.html in the bucket: the same for people. Absent: an older trainer has written none.",
    )


class MethodFigure(ApiModel):
    """What a method measures beside the loss."""

    name: Str64 = Field(description=f"{', '.join(FIGURE_WORDS)}.")
    value: float = Field(description="Mean over the examples of the last step.")


class ProgressStatus(ApiModel):
    """How far the running stage was when it last said so: prepare with the data, train with the steps."""

    step: Count = Field(description="Finished optimizer steps; 0 in prepare.")
    total_steps: Count = Field(description="Steps of the plan; 0 in prepare.")
    percentage: int = Field(ge=0, le=100, description="Of the steps; in prepare of the data's bytes.")
    text: Str64 = Field(description="step/totalSteps, or in prepare such as '45% of data', for the printer column.")
    estimated_remaining_seconds: Count | None = Field(default=None, description="Time left at the present speed.")
    eta: Str64 | None = Field(default=None, description="Time left, for the printer column.")
    rows_per_second: float | None = Field(
        default=None, ge=0, description="Rows read per second in prepare, on the mean since the first."
    )
    figures: list[MethodFigure] | None = Field(
        default=None,
        max_length=MAX_FIGURES,
        description="What a preference method measured beside the loss in the last step, such as reward_accuracy.",
    )
    stale: bool = Field(default=False, description="Whether the pod has not answered for a while.")
    last_updated_time: Str64 = Field(description="When the pod last answered.")


class MetricsStatus(ApiModel):
    """Last known figures."""

    train_loss: float | None = Field(default=None, description="Loss of the last step, nats per label token.")
    eval_loss: float | None = Field(default=None, description="Last loss on held-out rows.")
    base_eval_loss: float | None = Field(
        default=None, description="Loss on held-out rows of the model that training began with."
    )
    learning_rate: float | None = Field(default=None, description="Learning rate of the last step.")
    tokens_per_second: float | None = Field(default=None, description="Real tokens per second.")
    loss: Str64 | None = Field(default=None, description="Loss to three decimals, for the printer column.")


class CheckpointStatus(ApiModel):
    """A checkpoint that was published in the bucket, or found whole there by its digests."""

    step: Count = Field(description="Finished steps in it.")
    uri: Uri = Field(description="Its manifest.")
    digest: Digest = Field(description="SHA-256 of its manifest.")


class AttemptStatus(ApiModel):
    """One Kubernetes Job of this job that has ended or runs."""

    number: int = Field(ge=1, le=999, description="Number of the attempt within its stage.")
    stage: Literal["prepare", "train"] = Field(description="Stage.")
    attempt_class: Literal["Running", "Succeeded", "Failure", "Disruption", "Suspended", "Superseded", "Waiting"] = (
        Field(
            alias="class",
            description="Running, Succeeded, Failure, Disruption, Suspended, Superseded or Waiting. Only Failure uses "
            "up recovery.maxRetries. Waiting: storage was missing or denied, or the node refused the pod.",
        )
    )
    reason: Str64 | None = Field(default=None, description="Why it ended.")
    exit_code: int | None = Field(default=None, description="Exit code of the trainer.")
    job_proof: Digest | None = Field(
        default=None, description="SHA-256 of the annotation finetune.dev/proof, by which its Kubernetes Job is known."
    )
    job_uid: Str64 | None = Field(
        default=None, description="UID of its Kubernetes Job: what has another one does not count, whatever it says."
    )
    started_at: Str64 | None = Field(default=None, description="When its Kubernetes Job was created.")
    finished_at: Str64 | None = Field(default=None, description="When it ended.")
    resumed_from_step: Count | None = Field(default=None, description="Step it continued at.")
    last_step: Count | None = Field(default=None, description="Last step it was seen at.")
    lost_seconds: Count | None = Field(default=None, description="Work since the last checkpoint that was lost.")


class UsageStatus(ApiModel):
    """What the job has used over all attempts."""

    seconds: int = Field(ge=0, description="Seconds since the job was accepted.")
    gpu_seconds: int = Field(ge=0, description="Seconds times GPUs over all training pods.")


class Artifact(ApiModel):
    """What came out."""

    type: Literal["Adapter"] = Field(description="Kind of artifact.")
    uri: Uri = Field(description="Folder of the adapter, in PEFT layout.")
    digest: Digest = Field(description="SHA-256 of its manifest.")
    manifest_uri: Uri = Field(description="The manifest: every file with size and SHA-256.")
    base_digest: Digest | None = Field(default=None, description="Digest over the base model's files.")
    rank: int = Field(ge=1, le=65536, description="LoRA rank; vLLM needs --max-lora-rank at least so high.")


class AdapterSource(ApiModel):
    """The adapter that a job goes on with. uri and digest: absent until the job that makes it has committed it."""

    job_uid: Str64 = Field(description="UID of the job that makes it: one created anew under its name is another.")
    uri: Uri | None = Field(default=None, description="Folder of the adapter.")
    digest: Digest | None = Field(default=None, description="SHA-256 of its manifest.")


class OperatorRecord(ApiModel):
    """Bookkeeping of the operator, so that a restart decides alike."""

    accepted_at: Str64 | None = Field(default=None, description="When the job was accepted.")
    run_config: Str256 | None = Field(
        default=None, description="ConfigMap with the run's configuration and the runtime as it was."
    )
    run_digest: Digest | None = Field(
        default=None, description="SHA-256 of that ConfigMap's data: with another content it is not used."
    )
    adapter_from: AdapterSource | None = Field(
        default=None, description="Of model.adapterFrom.jobName: which job that is, and what it has committed."
    )
    storage_wait_since: Str64 | None = Field(default=None, description="Since when storage is missing or denied.")
    # None where nothing is to be said, not 0: a CRD that does not know these fields drops them, in every round anew.
    suspended_seconds: int | None = Field(
        default=None, ge=0, le=MAX_SUSPENDED_S, description="How long the job was suspended before it last went on."
    )
    suspended_since: Str64 | None = Field(default=None, description="Since when the job is suspended.")
    disruptions: int = Field(default=0, ge=0, description="Disrupted pods so far.")
    disrupted_pods: list[Str64] = Field(
        default_factory=list[str], max_length=20, description="UIDs of the last disrupted pods: each counts once."
    )


class FineTuneJobStatus(ApiModel):
    """What the operator knows of the job."""

    observed_generation: int | None = Field(default=None, ge=0, description="Generation of the spec last acted on.")
    phase: Phase | None = Field(default=None, description=f"{', '.join(Phase)}: for people; code reads conditions.")
    conditions: list[Condition] = Field(
        default_factory=list[Condition],
        max_length=12,
        description=", ".join(ConditionType) + ".",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    plan: PlanStatus | None = Field(default=None, description="What will be done, known before training.")
    data: DataStatus | None = Field(default=None, description="What became of the rows.")
    progress: ProgressStatus | None = Field(default=None, description="Where the training is.")
    metrics: MetricsStatus | None = Field(default=None, description="Last known figures.")
    checkpoints: list[CheckpointStatus] = Field(
        default_factory=list[CheckpointStatus],
        max_length=5,
        description="The checkpoint that the next attempt would continue at; earlier ones may lie beside it.",
    )
    attempts: list[AttemptStatus] = Field(
        default_factory=list[AttemptStatus], max_length=10, description="The last ten attempts."
    )
    failures: int = Field(default=0, ge=0, description="Attempts that count against recovery.maxRetries.")
    usage: UsageStatus | None = Field(default=None, description="What the job has used.")
    artifacts: list[Artifact] = Field(default_factory=list[Artifact], max_length=2, description="What came out.")
    record: OperatorRecord | None = Field(default=None, description="The operator's own bookkeeping.")
