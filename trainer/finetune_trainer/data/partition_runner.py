"""What works on partitions, in order: this process, or the workers of `worker_pool`."""

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from finetune_trainer.data.documents.extractor import MEMORY_BYTES as EXTRACTOR_BYTES
from finetune_trainer.data.partition_messages import PartitionResult, Task
from finetune_trainer.data.partition_work import PartitionWork
from finetune_trainer.data.partitions import Partition

MAX_WORKERS = 32
MAX_EXTRACTORS = 8
PARENT_BYTES = 2**30  # what prepare takes beside its workers
WORKER_BYTES = 5 * 2**28  # of one, with the processes that run the tokenizer (0.5 GiB) and the template


def workers_for(cpu_count: float, memory_bytes: int) -> int:
    """Return how many workers a pod with these resources has: one for each core, as far as memory suffices."""
    cores = min(int(cpu_count), len(os.sched_getaffinity(0)), MAX_WORKERS)
    return max(1, min(cores, (memory_bytes - PARENT_BYTES) // WORKER_BYTES))


def extractors_for(cpu_count: float, memory_bytes: int) -> int:
    """Return how many processes may read documents beside the workers, which wait for what they give."""
    cores = min(int(cpu_count), len(os.sched_getaffinity(0)), MAX_EXTRACTORS)
    return max(1, min(cores, memory_bytes // (2 * EXTRACTOR_BYTES)))


class NoRowsError(Exception):
    """None of a dataset's first rows is one; they are in the partition before."""


class Job(NamedTuple):
    """A partition with what is to be done; known: its result, where an earlier attempt has left it."""

    partition: Partition
    task: Task
    known: PartitionResult | None = None


class Done(NamedTuple):
    """A partition that was worked on."""

    job: Job
    result: PartitionResult


class Runner(Protocol):
    """Works on jobs and yields them in order."""

    @property
    def rows_in_flight(self) -> int:
        """Rows read of partitions that were not yielded yet."""
        ...

    @property
    def share_in_flight(self) -> float:
        """Stored bytes of these rows."""
        ...

    def run(self, jobs: Iterator[Job], told: Callable[[], None]) -> Iterator[Done]:
        """Yield the jobs, in order, with their results; `told` is called whenever something was done."""
        ...

    def close(self) -> None:
        """End the processes that it started."""
        ...


class InProcess:
    """Works in this process, one partition after another."""

    def __init__(self, work: PartitionWork) -> None:
        self._work = work
        self.rows_in_flight, self.share_in_flight = 0, 0.0

    def run(self, jobs: Iterator[Job], told: Callable[[], None]) -> Iterator[Done]:
        for job in jobs:

            def count(rows: int, job: Job = job) -> None:
                self.rows_in_flight = rows
                self.share_in_flight = job.partition.stored_bytes * rows / max(1, job.partition.rows)
                told()

            result = job.known or self._work.work(job.task, count)
            self.rows_in_flight, self.share_in_flight = 0, 0.0
            yield Done(job, result)

    def close(self) -> None:
        self._work.close()
