"""Partitions worked on by several processes, in order: a result is given once all before it were."""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import IO, Any, NamedTuple

import orjson

from finetune_api.errors import StageError
from finetune_trainer.data import child
from finetune_trainer.data.encoders import FastDiffersError
from finetune_trainer.data.frames import read_frame, write_frame
from finetune_trainer.data.partition_messages import PartitionResult
from finetune_trainer.data.partition_runner import Done, Job, NoRowsError
from finetune_trainer.data.partition_worker import MAX_FRAME_BYTES
from finetune_trainer.data.partitions import AHEAD
from finetune_trainer.data.tokenizer import TokenizerFailedError

_MODULE = "finetune_trainer.data.partition_worker"
SILENCE_S = 6.0 * child.REPLY_TIMEOUT_S  # of all workers; a batch may ask a child of its own several times


class Worker:
    """One process, and the job that it works on."""

    def __init__(self) -> None:
        self.process = child.start(_MODULE)
        self.job: Job | None = None
        self.rows = 0
        self.has_raised = False

    def send(self, frame: bytes) -> None:
        assert self.process.stdin is not None
        try:
            write_frame(self.process.stdin, frame)
        except BrokenPipeError:
            raise self._died() from None

    @property
    def replies(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def begin(self, job: Job) -> None:
        self.job, self.rows = job, 0
        self.send(orjson.dumps(job.task))

    def listen(self, said: "SimpleQueue[Said]") -> None:
        """Hand on all that the process says, and its end as None. Runs in a thread."""
        frame: bytes | None = b""
        while frame is not None:
            try:
                frame = read_frame(self.replies, MAX_FRAME_BYTES)
            except (ValueError, OSError):  # it is closed
                return
            said.put(Said(self, frame))

    def answer(self, frame: bytes | None) -> PartitionResult | Exception | None:
        """Return the result of the job or what it raised, None while it goes on.

        Raises MemoryError or RuntimeError where the process is gone."""
        if frame is None:
            raise self._died()
        said = orjson.loads(frame)
        if "rows" in said:
            self.rows = said["rows"]
            return None
        if "done" in said:
            return PartitionResult.from_json(said["done"].encode())
        self.has_raised = True
        return _raised(said["raised"])

    def _died(self) -> Exception:
        """Return why no reply came: most likely the kernel took the process for memory."""
        if child.was_killed(self.process):
            return MemoryError(f"{_MODULE} was killed")
        return RuntimeError(f"{_MODULE} ended with {self.process.returncode}")


class Said(NamedTuple):
    """What a worker's process said; None: it has ended."""

    worker: Worker
    frame: bytes | None


def _raised(said: dict[str, Any]) -> Exception:
    match said["kind"]:
        case "fast_differs":
            return FastDiffersError()
        case "tokenizer":
            return TokenizerFailedError(said["words"], said["readable"])
        case "memory":
            return MemoryError(f"a child of {_MODULE} was killed")
        case "os":
            return OSError(said["errno"], os.strerror(said["errno"]), said["file"])
        case _:
            return RuntimeError(f"{_MODULE}: {said['words']}")


class WorkerPool:
    """Works in several processes. frames: what each is told first. Start it in the main thread."""

    def __init__(self, count: int, frames: list[bytes]) -> None:
        self._said: SimpleQueue[Said] = SimpleQueue()
        self._workers: list[Worker] = []
        self._open: deque[Job] = deque()  # in order, not yielded
        self._done: dict[int, PartitionResult | Exception] = {}  # by the id of the job
        try:
            for _ in range(count):
                self._workers.append(Worker())
            for worker in self._workers:  # all are started by now, which takes as long as of one
                for frame in frames:
                    worker.send(frame)
                threading.Thread(target=worker.listen, args=(self._said,), daemon=True).start()
        except BaseException:
            self.close()
            raise

    @property
    def rows_in_flight(self) -> int:
        return sum(each.rows for each in self._workers) + sum(
            each.rows_in for each in self._done.values() if isinstance(each, PartitionResult)
        )

    @property
    def share_in_flight(self) -> float:
        working = [each for each in self._workers if each.job is not None]
        at_work = sum(_share(each.job, each.rows) for each in working)
        return at_work + sum(_share(job, job.partition.rows) for job in self._open if id(job) in self._done)

    def run(self, jobs: Iterator[Job], told: Callable[[], None]) -> Iterator[Done]:
        """Yield the jobs in order with their results; what ends `jobs` is raised behind those that it yielded."""
        waiting: deque[Job] = deque()
        error: StageError | NoRowsError | None = None
        is_over = False
        while True:
            while not is_over and len(self._open) < len(self._workers) + AHEAD:
                try:
                    job = next(jobs, None)
                except (StageError, NoRowsError) as caught:
                    job, error = None, caught
                if job is None:
                    is_over = True
                    break
                self._open.append(job)
                if job.known is not None:
                    self._done[id(job)] = job.known
                else:
                    waiting.append(job)
                self._assign(waiting)
                self._listen(0, waiting, told)
            while self._open and id(self._open[0]) in self._done:
                job = self._open.popleft()
                result = self._done.pop(id(job))
                if isinstance(result, Exception):
                    raise result
                yield Done(job, result)
            if is_over and not self._open:
                break
            if self._open:
                self._listen(SILENCE_S, waiting, told)
        if error is not None:
            raise error

    def _assign(self, waiting: deque[Job]) -> None:
        for worker in self._workers:
            if waiting and worker.job is None and not worker.has_raised:
                worker.begin(waiting.popleft())

    def _listen(self, timeout_s: float, waiting: deque[Job], told: Callable[[], None]) -> None:
        """Take what a worker says, waiting for it up to `timeout_s`. Raises RuntimeError where it is waited in vain."""
        try:
            worker, frame = self._said.get(timeout=timeout_s) if timeout_s else self._said.get_nowait()
        except Empty:
            if timeout_s:
                raise RuntimeError(f"{_MODULE}: none said anything for {timeout_s:g} s") from None
            return
        if worker.has_raised:  # and ends now
            return
        result = worker.answer(frame)
        if result is not None and worker.job is not None:
            self._done[id(worker.job)] = result
            worker.job, worker.rows = None, 0
        self._assign(waiting)
        told()

    def close(self) -> None:
        """End all workers, at whatever they are; their own children end with them."""
        for worker in self._workers:
            child.end(worker.process)


def _share(job: Job | None, rows: int) -> float:
    return 0.0 if job is None else job.partition.stored_bytes * rows / max(1, job.partition.rows)
