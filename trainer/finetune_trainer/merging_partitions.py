"""Merge what partitions come to, in the order of the rows: into accounts, decisions and the spool."""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from shutil import rmtree

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_trainer.data.accounts import RowPlace
from finetune_trainer.data.bad_rows import BadRows
from finetune_trainer.data.disk import require_rows_fit
from finetune_trainer.data.encoders import FAST, Choice, FastDiffersError
from finetune_trainer.data.partition_messages import PartitionResult, Task
from finetune_trainer.data.partition_runner import Done, Job, NoRowsError, Runner
from finetune_trainer.data.partition_work import DECISIONS
from finetune_trainer.data.partitions import Partition
from finetune_trainer.data.pipeline import template_failed
from finetune_trainer.data.progress import ReadSoFar
from finetune_trainer.data.renderer import MAX_KILLED
from finetune_trainer.data.same_ids import Probe
from finetune_trainer.data.spool import Spool
from finetune_trainer.data.taught import Taught
from finetune_trainer.data.too_long import TooLongRows
from finetune_trainer.job_partitions import JobPartitions
from finetune_trainer.kept_partitions import KeptPartitions
from finetune_trainer.reading_steps import PrepareStage


@dataclass
class Merged:
    """What the partitions came to so far, beside the ledger."""

    bad: BadRows
    too_long: TooLongRows
    taught: Taught = field(default_factory=Taught)
    probe: Probe = field(default_factory=Probe)
    special_words: Counter[str] = field(default_factory=Counter[str])
    stop_ids: set[int] = field(default_factory=set[int])
    choice: Choice | None = None
    fast_differs: bool = False  # in any process
    rendered: bool = False
    killed: int = 0  # rows that the template's process died of

    def add(self, result: PartitionResult, first_file: int) -> None:
        """Add a partition's, before its rows are added to the ledger. first_file: what its file 0 is of the job's.

        Raises FastDiffersError where one process takes the faster library that another has found to be wrong."""
        broken, long = result.first_broken, result.first_long
        broken = broken and broken._replace(file=broken.file + first_file)
        self.bad.take(broken, result.first_broken_at, len(result.broken))
        long = long and long._replace(file=long.file + first_file)
        self.too_long.take(long, result.long_dropped, result.longest, result.met_long)
        self.taught += result.taught
        for row in result.probed:
            self.probe.add(row._replace(file=row.file + first_file))
        self.special_words.update(result.special_words)
        self.stop_ids.update(result.stop_ids)
        if self.choice is None or self.choice.library != FAST:
            self.choice = result.choice
        self.fast_differs = self.fast_differs or result.choice.differs
        if self.fast_differs and self.choice.library == FAST:
            raise FastDiffersError
        self.rendered = self.rendered or result.rendered


@dataclass(kw_only=True)
class Merging:
    """Merges partitions as they are worked on. again: works on one here; kept: None where nothing is kept."""

    stage: PrepareStage
    spool: Spool
    partitions: JobPartitions
    merged: Merged
    runner: Runner
    again: Callable[[Task], PartitionResult]
    kept: KeptPartitions | None
    _ahead: deque[Partition] = field(default_factory=deque[Partition])  # cut and not merged
    _keys: dict[Path, str] = field(default_factory=dict[Path, str])
    _ended_by: StageError | NoRowsError | None = None  # what the partitions end with, once that is known
    _progress: ReadSoFar = field(init=False)

    def __post_init__(self) -> None:
        self._progress = ReadSoFar(self.partitions.total_bytes, time.monotonic())

    def run(self, partitions: Iterator[Partition]) -> None:
        """Merge all partitions. Raises what they, or their rows, end the job with."""
        jobs = self._jobs(partitions)
        try:
            for done in self.runner.run(jobs, self._tell):
                self._ahead.popleft()
                self._merge(done)
                if self.merged.bad.failing:
                    self.partitions.count_on(self._behind(jobs), done.job.partition.dataset)
                self._store(done)
                self._tell()
        except NoRowsError:
            raise self.merged.bad.error() from None

    def _jobs(self, partitions: Iterator[Partition]) -> Iterator[Job]:
        try:
            for partition in partitions:
                self._ahead.append(partition)
                yield self._job(partition)
        except (StageError, NoRowsError) as error:
            self._ended_by = error
            raise

    def _job(self, partition: Partition) -> Job:
        task = self.partitions.task(partition)
        if self.kept is None:
            return Job(partition, task)
        self._keys[partition.path] = key = self.kept.key(partition, task)
        return Job(partition, task, self.kept.find(key, Path(task.out)))

    def _behind(self, jobs: Iterator[Job]) -> Iterator[Partition]:
        yield from list(self._ahead)
        for job in jobs:
            yield job.partition
        if self._ended_by is not None:  # before they were asked for
            raise self._ended_by

    def _tell(self) -> None:
        """Tell how far reading is. What the workers have done of their partitions counts."""
        rows = self.stage.ledger.rows_read + self.runner.rows_in_flight
        figures = self._progress.figures(rows, int(self.runner.share_in_flight), time.monotonic())
        self.stage.ctx.reporter.update(**figures)
        self.stage.ctx.reporter.touch()

    def _merge(self, done: Done) -> None:
        """Add a partition's counts. Raises what ended it."""
        (partition, task, known), result = done
        stage, merged, first_file = self.stage, self.merged, partition.first_file
        ends = (self._rows_until_hopeless(done), self._rows_until_too_long(done))
        rows = min((end for end in ends if end is not None), default=None)
        if rows is not None:
            result = self.again(replace(task, most_rows=rows))
        merged.add(result, first_file)
        for file, each in enumerate(result.files, first_file):
            stage.ledger.take(file, each)
        stage.ledger.take_counted(result.counted)
        for name, places in result.places.items():
            stage.ledger.take_places(name, places, first_file)
        stage.ledger.changes.update(result.changes)
        for name, count in result.ignored_fields.items():
            stage.ledger.ignore_fields([name], count)
        stage.ledger.take_decisions(Path(task.out) / DECISIONS)
        for name, seconds in result.seconds.items():
            stage.timings.seconds[name] += 0.0 if known else seconds
        self._progress.add(partition.stored_bytes, result.rows_in, is_known=known is not None)
        stage.kept_rows += result.rows_in if known else 0
        self._require_living(result, first_file)
        if result.error is not None:
            merged.too_long.check_none()
            raise result.error
        if rows is not None:
            raise merged.bad.error()

    def _rows_until_hopeless(self, done: Done) -> int | None:
        """Return how many of a partition's rows are read until too many of the job's are broken, if ever."""
        partition, broken = done.job.partition, done.result.broken
        places = [where._replace(file=where.file + partition.first_file) for where in broken]
        return self.merged.bad.rows_until_hopeless(self.partitions.sizes_of(partition), places)

    def _rows_until_too_long(self, done: Done) -> int | None:
        """Return how many of a partition's rows are read until one ends the job as too long, if any does.

        Those behind it that were read as well depend on where partitions, and batches of their rows, end."""
        partition, result = done.job.partition, done.result
        if result.fault != Fault.TOO_MANY_LONG_ROWS or result.first_long is None:
            return None
        file, number, _ = result.first_long
        found = RowPlace(file + partition.first_file, number)
        return next(read for read, (where, _) in enumerate(self.partitions.sizes_of(partition), 1) if where == found)

    def _require_living(self, result: PartitionResult, first_file: int) -> None:
        """Raise TEMPLATE_FAILED where the template's process died of more rows than it may, over all partitions."""
        before, self.merged.killed = self.merged.killed, self.merged.killed + len(result.killed)
        if self.merged.killed > MAX_KILLED:
            file, number = result.killed[max(0, MAX_KILLED - before)]
            problem = f"its process died of it, as of {MAX_KILLED} rows before it"
            raise template_failed(self.stage.model, self.stage.ledger.files[first_file + file].uri, number, problem)

    def _store(self, done: Done) -> None:
        """Put a partition's rows into the spool, keep it finished for another attempt, and free the disk."""
        (partition, task, known), result = done
        out = Path(task.out)
        self.spool.take(out, partition.first_file)
        if self.kept is not None and known is None:
            self.kept.keep(self._keys.pop(partition.path), out, result)
        rows, limit_bytes = self.stage.ledger.rows_read, self.stage.resources.disk_bytes
        require_rows_fit(self.partitions.folder, self.spool.folder, rows, limit_bytes)
        rmtree(out)
        partition.path.unlink()
