"""The jobs as their last rounds left them: most rounds follow our own writes, and need not read what these answered."""

import threading
from collections import OrderedDict, deque

from finetune_operator.job_reader import FineTuneJob

Key = tuple[str, str]

MAX_KNOWN = 1024  # jobs, of some tens of KiB each: those whose rounds follow one another
MAX_WRITTEN = 8  # versions of one job: more than the watch is behind with


class KnownJobs:
    """Thread-safe, as long as no two threads work on one key.

    A job that is known may be as old as its last round. That is as safe as one that was read just before it changed:
    each write of its status asks for the version that is known, and whoever hears of another version says so before it
    asks for a round."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._jobs: OrderedDict[Key, FineTuneJob] = OrderedDict()
        self._written: dict[Key, deque[str]] = {}  # the versions of each unfinished job that our last writes made
        self._heard: dict[Key, str | None] = {}  # the last version of each, until its next round

    def offer(self, job: FineTuneJob) -> None:
        """Know a job that a watch tells of for the first time, so that its first round need not read it."""
        with self._lock:
            if job.key not in self._jobs:
                self._keep(job)

    def take(self, key: Key) -> FineTuneJob | None:
        """Return the job and know it no more, so that a round that fails reads it; None if it is to be read."""
        with self._lock:
            is_known = key not in self._heard or self._is_known(key, self._heard.pop(key))
            job = self._jobs.pop(key, None)
            return job if is_known else None

    def keep(self, job: FineTuneJob) -> None:
        """Know the job as it is stored now, in place of the one that was kept longest ago if there are too many."""
        with self._lock:
            self._keep(job)

    def wrote(self, job: FineTuneJob) -> None:
        """Remember the version that our own write of its status made."""
        with self._lock:
            self._written.setdefault(job.key, deque(maxlen=MAX_WRITTEN)).append(job.resource_version)

    def has_written(self, key: Key, version: str) -> bool:
        """Return True for a version of a job that one of our own last writes of its status made.

        Its round knew all that is in it, as the write was conditional, and what it did not end it does once more."""
        with self._lock:
            return version in self._written.get(key, ())

    def hear(self, key: Key, version: str | None) -> None:
        """Have the next round read the job, unless this version is known by then; None is no version.

        A round in work may write that very version a moment later: the watch is often quicker than the answer. A later
        version of another hand cannot hide behind it, as our write would have been refused."""
        with self._lock:
            self._heard[key] = version

    def listed(self, key: Key, version: str) -> None:
        """Have the next round read the job, unless this version is known by then. A list may be older than what a watch
        has told since it was read: where that was of another hand, it stays."""
        with self._lock:
            heard = self._heard.get(key, version)
            if heard == version or self._is_known(key, heard):
                self._heard[key] = version

    def forget(self, key: Key) -> None:
        """Forget a job that is finished or deleted."""
        with self._lock:
            self._jobs.pop(key, None)
            self._written.pop(key, None)
            self._heard.pop(key, None)

    def _is_known(self, key: Key, version: str | None) -> bool:
        job = self._jobs.get(key)
        is_last = job is not None and job.resource_version == version
        return is_last or version in self._written.get(key, ())

    def _keep(self, job: FineTuneJob) -> None:
        self._jobs[job.key] = job
        self._jobs.move_to_end(job.key)
        if len(self._jobs) > MAX_KNOWN:
            self._jobs.popitem(last=False)
