"""What every stage is given: its configuration, its store, and where to report."""

from dataclasses import dataclass
from pathlib import Path

from finetune_api.names import Stage
from finetune_api.run import RunConfig
from finetune_trainer.serve import Reporter
from finetune_trainer.store import Store


@dataclass(frozen=True)
class StageContext:
    """One attempt of one stage."""

    config: RunConfig
    stage: Stage
    attempt: int
    pod_uid: str  # names the writer in the epoch fence; any unique string without a cluster
    plan_digest: str | None  # train: the digest prepare reported, so that no other plan is followed
    work_dir: Path
    store: Store
    reporter: Reporter
    result_file: Path | None = None  # for a stage that has to end its process itself, as when a step hangs
