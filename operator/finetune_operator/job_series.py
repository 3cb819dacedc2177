"""Which FineTuneJobs have series in the metrics: all that are not finished, and of the finished ones the newest."""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from finetune_api.status import ConditionType
from finetune_operator.child_cache import Key
from finetune_operator.clock import parse_time
from finetune_operator.conditions import find
from finetune_operator.job_reader import FineTuneJob, read_job
from finetune_operator.metrics import Metrics

MAX_FINISHED = 200  # about 1.5 KB of /metrics each; the figures of older ones are in their status


@dataclass(frozen=True)
class _Shown:
    uid: str
    resource_version: str
    finished_at: str | None


@dataclass(frozen=True)
class _Noted:
    list: object  # that brought it
    finished_at: str
    body: Mapping[str, Any]


class JobSeries:
    """Thread-safe."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._shown: dict[Key, _Shown] = {}
        self._noted: dict[str, _Noted] = {}  # the newest finished jobs of lists that go on, by UID
        self._lock = threading.Lock()

    def show(self, job: FineTuneJob) -> None:
        """Show the job's last known figures, unless they are shown or MAX_FINISHED others have finished after it."""
        progress = job.status.progress
        answered = parse_time(progress.last_updated_time) if progress else None
        with self._lock:
            before = self._shown.get(job.key)
            if before is not None and before.uid != job.uid:
                self._forget(job.key)  # of another job that had the name
            elif before is not None and job.resource_version and before.resource_version == job.resource_version:
                return
            self._shown[job.key] = shown = _Shown(job.uid, job.resource_version, _finished_at(job))
            # One that is not finished pushes nobody out, and is shown with each of its writes: no search then.
            if shown.finished_at is None or self._drop_oldest() != job.key:
                self._metrics.export(job.namespace, job.name, job.status, answered.timestamp() if answered else None)

    def note(self, of_list: object, finished_at: str, body: Mapping[str, Any]) -> None:
        """Keep what a list shows of a finished job until it is over, if there are not MAX_FINISHED newer ones."""
        meta = cast(Mapping[str, Any], body["metadata"])
        named = {name: meta.get(name) for name in ("namespace", "name", "uid")}
        status = cast(Mapping[str, Any], body.get("status") or {})
        with self._lock:
            # Only what is exported: the rest may be huge.
            self._noted[str(meta["uid"])] = _Noted(of_list, finished_at, {"metadata": named, "status": status})
            if len(self._noted) > MAX_FINISHED:
                del self._noted[min(self._noted, key=lambda uid: self._noted[uid].finished_at)]

    def show_noted(self, of_list: object, listed: set[str]) -> None:
        """Show what was noted of a list that is over now; what it did not show in the end was deleted meanwhile."""
        with self._lock:
            mine = {uid: noted for uid, noted in self._noted.items() if noted.list is of_list}
            for uid in mine:
                del self._noted[uid]
        for uid, noted in mine.items():
            if uid in listed:
                self.show(read_job(noted.body))

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
