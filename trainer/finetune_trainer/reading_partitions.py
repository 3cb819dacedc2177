"""Read all datasets in partitions, on as many cores as there are, and merge what they come to in the order of rows."""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import orjson

from finetune_api.errors import StageError
from finetune_api.job import DatasetFormat
from finetune_trainer.commit import Fence
from finetune_trainer.data.disk import require_tables_fit
from finetune_trainer.data.model_facts import Model
from finetune_trainer.data.partition_messages import PartitionResult, Rules, Task, rules_of_model
from finetune_trainer.data.partition_runner import InProcess, NoRowsError, Runner, workers_for
from finetune_trainer.data.partition_work import PartitionWork
from finetune_trainer.data.partitions import Partition
from finetune_trainer.data.same_ids import OwnIds
from finetune_trainer.data.spool import Spool
from finetune_trainer.data.worker_pool import WorkerPool
from finetune_trainer.job_partitions import FEW, JobPartitions
from finetune_trainer.kept_partitions import KeptPartitions
from finetune_trainer.merging_partitions import Merged, Merging
from finetune_trainer.reading_steps import PrepareStage, begin, end, require_same_ids

_PLAIN = {DatasetFormat.PROMPT_COMPLETION, DatasetFormat.TEXT}  # shapes of rows that mostly are no conversations
_TELLS_TIME = "strftime_now"  # of a chat template that does


def read_in_partitions(stage: PrepareStage, spool: Spool, fence: Fence | None) -> None:
    """Read, check, render and tokenise all datasets into the spool, keeping partitions until there is a plan.

    fence: None where nothing may be written to the job's output. Raises what `read_datasets` does."""
    ctx, model, reading = stage.ctx, stage.model, begin(stage)
    found, too_long, evaluation = reading.rendering, reading.too_long, stage.evaluation
    rules = Rules(
        **rules_of_model(model),
        spec=ctx.config.spec.model_dump(mode="json", by_alias=True, exclude_none=True),
        loss_on=stage.loss_on,
        limit_tokens=stage.limit.tokens,
        limit_source=stage.limit.source,
        too_long=too_long.policy,
        quarantine=reading.bad.quarantine,
        renderer=found,
        pii_key=None if stage.pii_key is None else stage.pii_key.hex(),
        evaluation_runs=None if evaluation is None else str(evaluation.runs.folder),
        evaluation_digest=None if evaluation is None else evaluation.runs.digest,
    )
    merged = Merged(reading.bad, too_long)
    resources = stage.resources
    require_tables_fit(stage.ledger, resources.disk_bytes)
    workers = workers_for(resources.cpu_count, resources.memory_bytes)
    job = JobPartitions(stage, reading.inputs, reading.bad, workers, resources.disk_bytes)
    with ExitStack() as stack:
        stack.callback(job.tidy)  # also where rows end the job: they lie there as they were written
        partitions = stack.enter_context(closing(job.partitions()))
        is_large, every = _begun(partitions)
        own_ids = stack.enter_context(closing(OwnIds(model.files)))
        if found is not None and set(stage.formats).difference(_PLAIN):
            own_ids.begin()
        frames = _frames(stage, rules)
        stage.in_flight_bytes = job.in_flight_bytes if is_large else 0
        if is_large and fence is not None:
            stage.kept = KeptPartitions(ctx.store, ctx.config.run_uri, fence, _identity(stage, rules), ctx.work_dir)
        runner: Runner
        if is_large and workers > 1:
            runner = WorkerPool(min(workers, job.most_partitions), frames)
        else:
            runner = InProcess(PartitionWork(rules, model))
        stack.callback(runner.close)
        merging = Merging(
            stage=stage,
            spool=spool,
            partitions=job,
            merged=merged,
            runner=runner,
            again=partial(_work_here, rules, model),
            kept=stage.kept,
        )
        merging.run(every)
        if found is not None and merged.probe.rows:
            require_same_ids(stage, own_ids, merged.probe, found)
    model.tokenizer.special_words.rows.clear()  # of the last partition that was worked on here
    model.tokenizer.special_words.rows.update(merged.special_words)
    model.tokenizer.stop_ids = merged.stop_ids
    if merged.choice is not None:
        model.tokenizer.choice = merged.choice
    end(stage, reading, merged.taught, merged.rendered)


def _begun(partitions: Iterator[Partition]) -> tuple[bool, Iterator[Partition]]:
    """Return whether there are many partitions, and all of them; what ends them is raised in its turn."""
    first: list[Partition] = []
    error: StageError | NoRowsError | None = None
    try:
        for partition in partitions:
            first.append(partition)
            if len(first) == FEW:
                break
    except (StageError, NoRowsError) as caught:
        error = caught

    def every() -> Iterator[Partition]:
        yield from first
        if error is not None:
            raise error
        yield from partitions

    return len(first) == FEW and any(each.is_full for each in first), every()


def _work_here(rules: Rules, model: Model, task: Task) -> PartitionResult:
    with closing(PartitionWork(rules, model)) as work:
        return work.work(task, lambda _: None)


def _frames(stage: PrepareStage, rules: Rules) -> list[bytes]:
    """Return what a worker is told first."""
    setup, content = stage.model.tokenizer.restartable
    return [orjson.dumps({"rules": rules, **setup}), content]


def _identity(stage: PrepareStage, rules: Rules) -> bytes:
    """Return all that is made of rows depends on, beside the rows: the time only where the template tells it, and of
    evaluation sets what they say, wherever that lies."""
    rules = replace(rules, evaluation_runs=None)
    if rules.renderer is not None and _TELLS_TIME not in rules.renderer["source"]:
        rules = replace(rules, renderer=rules.renderer | {"now": None})
    return b"".join(_frames(stage, rules))
