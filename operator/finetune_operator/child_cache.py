"""The Kubernetes Jobs and pods of all FineTuneJobs, as the watches last told of them.

A deleted pod is remembered in its last state, because its termination message may be the verdict, until its
FineTuneJob is forgotten; only the last few, so that memory stays flat.
"""

import threading
from collections.abc import Callable
from typing import Any

from finetune_api import names
from finetune_operator.observed import ObservedK8sJob, ObservedPod, as_gone, job_uid, observe_k8s_job, observe_pod

MAX_GONE = 20  # per FineTuneJob
Key = tuple[str, str]  # namespace, name of a FineTuneJob
Owner = tuple[str, str]  # namespace, UID of a FineTuneJob: a label may lie about the UID, nothing about the namespace
Body = dict[str, Any]


class ChildCache:
    """Thread-safe cache by FineTuneJob. `changed` is called with key and owner of each job touched."""

    def __init__(self, changed: Callable[[Key, Owner], None]) -> None:
        self._changed = changed
        self._lock = threading.Lock()
        self._jobs: dict[Owner, dict[str, ObservedK8sJob]] = {}  # by UID of the Job
        self._pods: dict[Owner, dict[str, ObservedPod]] = {}
        self._places: dict[str, tuple[Key, Owner]] = {}  # UID of a child → its FineTuneJob

    def of(self, owner: Owner) -> tuple[tuple[ObservedK8sJob, ...], tuple[ObservedPod, ...]]:
        with self._lock:
            return tuple(self._jobs.get(owner, {}).values()), tuple(self._pods.get(owner, {}).values())

    def running_pods(self) -> list[tuple[Owner, ObservedPod]]:
        """Each pod that can be asked for its progress."""
        with self._lock:
            pods = [(owner, pod) for owner, by_uid in self._pods.items() for pod in by_uid.values()]
        return [(owner, pod) for owner, pod in pods if pod.running and pod.ip]

    def job_uids(self, owner: Owner) -> set[str]:
        """Return the UIDs of the FineTuneJob's Kubernetes Jobs, and of those that its pods name as theirs."""
        jobs, pods = self.of(owner)
        return {job.uid for job in jobs} | {pod.owner_uid for pod in pods}

    def knows(self, uid: str) -> bool:
        """Whether this is the UID of a Kubernetes Job or pod of a FineTuneJob."""
        with self._lock:
            return uid in self._places

    def owners(self) -> set[Owner]:
        """The FineTuneJobs of which anything is kept."""
        with self._lock:
            return set(self._jobs) | set(self._pods)

    def forget(self, owner: Owner) -> None:
        """The FineTuneJob is gone, or its verdict stored: deleted pods are of no more use."""
        with self._lock:
            for pod in [pod for pod in self._pods.get(owner, {}).values() if pod.gone]:
                self._drop_pod(owner, pod.uid)
            self._drop_empty(owner)

    def take(self, kind: str, event: str, body: Body) -> None:
        """One event of a watch."""
        uid, place = str(body["metadata"]["uid"]), _place(body)
        touched: list[tuple[Key, Owner]] = []
        with self._lock:
            before = self._places.get(uid)
            if before is not None and (place is None or place[1] != before[1]):
                # Its labels were changed: for the job that it was of it is as if deleted.
                touched += [before] if self._remove(kind, before[1], uid) else []
                self._drop_empty(before[1])
            if place is not None:
                key, owner = place
                touched += [place] if self._put(kind, owner, key, body, deleted=event == "DELETED") else []
                self._drop_empty(owner)
        for key, owner in touched:
            self._changed(key, owner)

    def k8s_job(self, owner: Owner, uid: str) -> ObservedK8sJob | None:
        """Return one Kubernetes Job of a FineTuneJob as it is known, None if it is not."""
        with self._lock:
            return self._jobs.get(owner, {}).get(uid)

    def take_written(self, body: Body, before: ObservedK8sJob) -> None:
        """Take a Kubernetes Job that a write of ours changed, before its watch tells of that; nobody is told.

        before: as it was known when the write began. Where the watch has told more of it since, that may be newer, or
        its end, of which it would not tell once more."""
        place, uid = _place(body), str(body["metadata"]["uid"])
        with self._lock:
            if place is not None and self._jobs.get(place[1], {}).get(uid) is before:
                self._put("jobs", place[1], place[0], body, deleted=False)

    def keep_only(self, kind: str, namespace: str | None, listed: set[str]) -> None:
        """These UIDs are all there are: what is missing was deleted while nobody watched."""
        vanished: set[tuple[Key, Owner]] = set()
        with self._lock:
            store: dict[Owner, dict[str, Any]] = self._jobs if kind == "jobs" else self._pods
            for owner, by_uid in list(store.items()):
                for uid in [u for u in by_uid if u not in listed and namespace in (None, owner[0])]:
                    place = self._places.get(uid)
                    if self._remove(kind, owner, uid) and place is not None:
                        vanished.add((place[0], owner))
                self._drop_empty(owner)
        for key, owner in vanished:
            self._changed(key, owner)

    def _put(self, kind: str, owner: Owner, key: Key, body: Body, *, deleted: bool) -> bool:
        """Store the object; whether anything that is looked at changed."""
        uid = str(body["metadata"]["uid"])
        child = observe_k8s_job(body) if kind == "jobs" else observe_pod(body)
        if child is None or (kind == "jobs" and deleted):
            return self._remove(kind, owner, uid)
        self._places[uid] = (key, owner)
        if isinstance(child, ObservedPod):
            pods = self._pods.setdefault(owner, {})
            before, pods[uid] = pods.get(uid), (as_gone(child) if deleted else child)
            self._bound_gone(owner)
            return pods.get(uid) != before
        jobs = self._jobs.setdefault(owner, {})
        old, jobs[uid] = jobs.get(uid), child
        return child != old

    def _remove(self, kind: str, owner: Owner, uid: str) -> bool:
        """Whether there was anything to remove."""
        if kind == "jobs":
            self._forget_place(owner, uid)
            return self._jobs.get(owner, {}).pop(uid, None) is not None
        pod = self._pods.get(owner, {}).get(uid)
        if pod is None or pod.gone:
            return False
        self._pods[owner][uid] = as_gone(pod)
        self._bound_gone(owner)
        return True

    def _bound_gone(self, owner: Owner) -> None:
        gone = sorted((p for p in self._pods[owner].values() if p.gone), key=lambda p: (p.created_at, p.uid))
        for pod in gone[:-MAX_GONE]:
            self._drop_pod(owner, pod.uid)

    def _drop_pod(self, owner: Owner, uid: str) -> None:
        del self._pods[owner][uid]
        self._forget_place(owner, uid)

    def _forget_place(self, owner: Owner, uid: str) -> None:
        """It may be another's by now."""
        place = self._places.get(uid)
        if place is not None and place[1] == owner:
            del self._places[uid]

    def _drop_empty(self, owner: Owner) -> None:
        for store in (self._jobs, self._pods):
            if owner in store and not store[owner]:
                del store[owner]


def _place(body: Body) -> tuple[Key, Owner] | None:
    """Return whose it is by its labels."""
    meta = body.get("metadata") or {}
    uid, name = job_uid(body), (meta.get("labels") or {}).get(names.LABEL_JOB_NAME)
    if uid is None or not name:
        return None
    namespace = str(meta.get("namespace"))
    return (namespace, str(name)), (namespace, uid)
