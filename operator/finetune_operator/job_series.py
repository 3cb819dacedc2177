"""Which FineTuneJobs have series in the metrics: all that are not finished, and of the finished ones the newest."""

import threading
from dataclasses import dataclass

from finetune_api.status import ConditionType
from finetune_operator.child_cache import Key
from finetune_operator.clock import parse_time
from finetune_operator.conditions import find
from finetune_operator.job_reader import FineTuneJob
from finetune_operator.metrics import Metrics

MAX_FINISHED = 200  # about 1.5 KB of /metrics each; the figures of older ones are in their status


@dataclass(frozen=True)
class _Shown:
    uid: str
    finished_at: str | None


class JobSeries:
    """Thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._shown: dict[Key, _Shown] = {}
        self._lock = threading.Lock()

    def show(self, job: FineTuneJob) -> None:
        """Show the job's last known figures, unless MAX_FINISHED others have finished after it."""
        progress = job.status.progress
        answered = parse_time(progress.last_updated_time) if progress else None
        with self._lock:
            before = self._shown.get(job.key)
            if before is not None and before.uid != job.uid:
                self._forget(job.key)  # of another job that had the name
            self._shown[job.key] = shown = _Shown(job.uid, _finished_at(job))
            # One that is not finished pushes nobody out, and is shown with each of its writes: no search then.
            if shown.finished_at is None or self._drop_oldest() != job.key:
                self._metrics.export(job.namespace, job.name, job.status, answered.timestamp() if answered else None)

    def forget(self, key: Key, uid: str | None = None) -> str | None:
        """End the series of that name, if they are of that job, where one is given. Return the UID of their job."""
        with self._lock:
            shown = self._shown.get(key)
            if shown is None or uid not in (None, shown.uid):
                return None
            self._forget(key)
            return shown.uid

    def uid_of(self, key: Key) -> str | None:
        """Return whose series are shown under that name."""
        with self._lock:
            shown = self._shown.get(key)
        return shown.uid if shown is not None else None

    def uids(self) -> dict[Key, str]:
        """Return the jobs that have series."""
        with self._lock:
            return {key: shown.uid for key, shown in self._shown.items()}

    def _drop_oldest(self) -> Key | None:
        """Drop the finished job that is one too many, if there is one."""
        finished = [(shown.finished_at, key) for key, shown in self._shown.items() if shown.finished_at is not None]
        if len(finished) <= MAX_FINISHED:
            return None
        _, oldest = min(finished)
        self._forget(oldest)
        return oldest

    def _forget(self, key: Key) -> None:
        del self._shown[key]
        self._metrics.forget(*key)


def _finished_at(job: FineTuneJob) -> str | None:
    """Return when it got its verdict, in the text of the status, which sorts by time; None while it has none."""
    verdict = find(job.status, ConditionType.FINISHED)
    return verdict.last_transition_time if verdict is not None and job.finished else None
