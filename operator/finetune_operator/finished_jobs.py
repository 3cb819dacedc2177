"""The finished FineTuneJobs of one watched namespace, as a watch of their own tells: little of each, as many are kept.

A round is made only where it would change something: a Kubernetes Job wants another TTL, or a change of the spec is not
acknowledged yet.
"""

import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from sys import intern
from typing import Any, cast

from finetune_api.status import FINAL_PHASES
from finetune_operator.attempt_steps import tidy_up
from finetune_operator.child_cache import ChildCache, Key, Owner
from finetune_operator.job_reader import read_spec, ttl_s_of, verdict_at
from finetune_operator.job_series import JobSeries


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """What is kept of one: a few hundred bytes."""

    key: Key
    phase: str
    ttl_s: int
    acknowledged: bool  # the status was written for the spec as it is; of one that is being deleted it never will be


class FinishedJobs:
    """Thread-safe. `changed` is called with the key of a job that wants a round; `is_in_work` says whether one goes on,
    which tidies up once it has written its verdict."""

    def __init__(
        self,
        children: ChildCache,
        series: JobSeries,
        changed: Callable[[Key], None],
        is_in_work: Callable[[Key], bool],
    ) -> None:
        self._children, self._series, self._changed, self._is_in_work = children, series, changed, is_in_work
        self._lock = threading.Lock()
        self._jobs: dict[Owner, FinishedJob] = {}
        self._unjudged: dict[Owner, tuple[Key, str]] = {}  # and their phases

    def __contains__(self, owner: Owner) -> bool:
        with self._lock:
            return owner in self._jobs

    def phases(self) -> Counter[str]:
        """Count them by phase."""
        with self._lock:
            return Counter(job.phase for job in self._jobs.values())

    def is_at_rest(self, owner: Owner) -> bool:
        """Return True if it is known that this job is finished and wants no round."""
        with self._lock:
            job = self._jobs.get(owner)
        return job is not None and not self._wants_round(owner, job)

    def wanting_rounds(self) -> list[Key]:
        with self._lock:
            jobs = list(self._jobs.items())
        with_children = self._children.owners()
        asked = [(owner, job) for owner, job in jobs if owner in with_children or not job.acknowledged]
        return [job.key for owner, job in asked if self._wants_round(owner, job)]

    def unjudged(self) -> dict[Owner, tuple[Key, str]]:
        """Return the jobs with a final phase and no verdict, written by another hand: no list of unfinished jobs has
        them."""
        with self._lock:
            return dict(self._unjudged)

    def take(self, _kind: str, event: str, body: Mapping[str, Any]) -> None:
        """One object of the list (event ITEM), or one event of their watch; also of jobs that are not finished."""
        owner, key = _owner_and_key(body)
        finished_at, phase = verdict_at(body), _phase(body)
        if event == "DELETED":
            self._drop(owner)
            return
        if finished_at is None:
            with self._lock:
                self._jobs.pop(owner, None)
                self._unjudged.pop(owner, None)
                if phase in FINAL_PHASES:
                    self._unjudged[owner] = (key, phase)
            if phase in FINAL_PHASES:
                self._changed(key)
            return
        job = _read(key, body)
        with self._lock:
            self._jobs[owner] = job
            self._unjudged.pop(owner, None)
        if event == "ITEM":
            self._series.note(self, finished_at, body)
        elif self._wants_round(owner, job) and not (job.acknowledged and self._is_in_work(key)):
            self._changed(key)

    def hear(self, event: str | None, body: Mapping[str, Any]) -> None:
        """Take what the watch of unfinished jobs tells of one that has a verdict, as its phase is not final.

        Where it is, the server cannot select, and their own watch has told of it, or will. That may be ahead, and the
        job be deleted by now: it would be kept for ever."""
        owner, _ = _owner_and_key(body)
        with self._lock:
            known = self._jobs.get(owner)
        if _phase(body) in FINAL_PHASES or (known is not None and known.phase in FINAL_PHASES):
            return
        if event == "DELETED":
            self._drop(owner)
        else:
            self.take("finetunejobs", "MODIFIED", body)

    def keep_only(self, _kind: str, _namespace: str | None, listed: set[str]) -> None:
        """The list is over: what it does not show was deleted. The newest get their series, without a round."""
        with self._lock:
            gone = [owner for owner in (*self._jobs, *self._unjudged) if owner[1] not in listed]
        for owner in gone:
            self._drop(owner)
        self._series.show_noted(self, listed)
        for key in self.wanting_rounds():
            self._changed(key)

    def _wants_round(self, owner: Owner, job: FinishedJob) -> bool:
        k8s_jobs, _ = self._children.of(owner)
        return not job.acknowledged or bool(tidy_up(k8s_jobs, job.ttl_s))

    def _drop(self, owner: Owner) -> None:
        with self._lock:
            job = self._jobs.pop(owner, None)
            self._unjudged.pop(owner, None)
        if job is not None:
            self._series.forget(job.key, owner[1])
            self._children.forget(owner)


def _owner_and_key(body: Mapping[str, Any]) -> tuple[Owner, Key]:
    meta = cast(Mapping[str, Any], body.get("metadata") or {})
    namespace = intern(str(meta.get("namespace", "")))
    return (namespace, str(meta.get("uid", ""))), (namespace, str(meta.get("name", "")))


def _status(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], body.get("status") or {})


def _phase(body: Mapping[str, Any]) -> str:
    return intern(str(_status(body).get("phase", "")))


def _read(key: Key, body: Mapping[str, Any]) -> FinishedJob:
    """Read the few fields that are kept: the whole status of thousands would take seconds."""
    spec, _ = read_spec(body.get("spec"))
    meta = cast(Mapping[str, Any], body.get("metadata") or {})
    acknowledged = _status(body).get("observedGeneration") == meta.get("generation") or "deletionTimestamp" in meta
    return FinishedJob(key, _phase(body), ttl_s_of(spec), acknowledged)
