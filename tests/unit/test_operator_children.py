"""The cache of Jobs and pods: deleted pods keep their last state, and memory stays flat."""

import tracemalloc
from collections.abc import Iterator
from typing import Any

from finetune_api import names
from finetune_api.names import Stage
from finetune_operator.child_cache import MAX_GONE, ChildCache
from finetune_operator.child_watch import ChildWatch

OWNER = ("a", "job-1")


def body(kind: str, uid: str, job: str = "job-1", namespace: str = "a", **more: Any) -> dict[str, Any]:
    owner = {"kind": "FineTuneJob" if kind == "jobs" else "Job", "uid": job, "controller": True}
    labels = names.child_labels("bot", job, Stage.TRAIN, 1)
    meta = {"name": uid, "namespace": namespace, "uid": uid, "labels": labels, "ownerReferences": [owner]}
    return {"metadata": meta, **more}


def ended(code: int) -> dict[str, Any]:
    state = {"terminated": {"exitCode": code, "startedAt": "2026-01-01T00:00:00Z"}}
    return {"phase": "Failed", "containerStatuses": [{"name": "trainer", "state": state}]}


def cache() -> tuple[ChildCache, list[tuple[str, str]]]:
    touched: list[tuple[str, str]] = []
    return ChildCache(touched.append), touched


def test_a_change_asks_for_a_round_of_its_job_and_a_repetition_does_not():
    children, touched = cache()
    children.take("jobs", "ADDED", body("jobs", "j"))
    children.take("jobs", "MODIFIED", body("jobs", "j"))
    assert touched == [("a", "bot")]
    children.take("jobs", "DELETED", body("jobs", "j"))
    assert touched == [("a", "bot")] * 2
    assert children.of(OWNER) == ((), ())


def test_a_deleted_pod_is_kept_in_its_last_state_until_its_job_is_forgotten():
    children, _ = cache()
    children.take("pods", "ADDED", body("pods", "p"))
    children.take("pods", "DELETED", body("pods", "p", status=ended(30)))
    (pod,) = children.of(OWNER)[1]
    assert (pod.gone, pod.exit_code, pod.active) == (True, 30, False)
    children.forget(OWNER)
    assert children.of(OWNER)[1] == ()
    assert children.owners() == set()


def test_a_list_takes_away_what_it_lacks_in_its_own_namespace_only():
    children, touched = cache()
    children.take("jobs", "ADDED", body("jobs", "j1"))
    children.take("jobs", "ADDED", body("jobs", "j2", "job-2", "b"))
    children.take("pods", "ADDED", body("pods", "p1"))
    touched.clear()
    children.keep_only("jobs", "a", set())
    children.keep_only("pods", None, set())
    assert children.of(OWNER)[0] == ()
    assert len(children.of(("b", "job-2"))[0]) == 1
    assert [pod.gone for pod in children.of(OWNER)[1]] == [True]
    assert touched == [("a", "bot")] * 2


def test_only_the_last_deleted_pods_are_kept():
    children, _ = cache()
    for number in range(100):
        children.take("pods", "DELETED", body("pods", f"p{number:03}"))
    assert len(children.of(OWNER)[1]) == MAX_GONE


def test_jobs_that_come_and_go_leave_nothing_behind():
    children = ChildCache(lambda _key: None)
    tracemalloc.start()
    try:
        for number in range(3000):
            children.take("jobs", "ADDED", body("jobs", f"j{number}"))
            children.take("jobs", "DELETED", body("jobs", f"j{number}"))
        assert tracemalloc.get_traced_memory()[0] < 50_000
    finally:
        tracemalloc.stop()


def test_a_pod_of_another_namespace_that_claims_to_be_ours_is_not():
    children, _ = cache()
    children.take("pods", "ADDED", body("pods", "forged", "job-1", "b", status=ended(0)))
    children.take("pods", "ADDED", body("pods", "ours"))
    assert [pod.name for pod in children.of(OWNER)[1]] == ["ours"]


def test_pods_without_our_labels_or_owner_are_ignored():
    children, touched = cache()
    foreign = body("pods", "p")
    foreign["metadata"]["ownerReferences"] = []
    children.take("pods", "ADDED", foreign)
    children.take("pods", "ADDED", {"metadata": {"name": "x", "namespace": "a", "uid": "x"}})
    assert touched == []


class ListAgainError(Exception):
    pass


class FakeCluster:
    """Lists one Job, is cut with 410, then lists none."""

    def __init__(self) -> None:
        self.watch_of: ChildWatch | None = None
        self.rounds = 0

    def watch(self, kind: Any, namespace: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        self.rounds += 1
        if self.rounds == 1:
            yield "ITEM", body("jobs", "j")
        yield "LISTED", {}
        if self.rounds == 1:
            yield "BOOKMARK", {}
            raise ListAgainError
        assert self.watch_of is not None
        self.watch_of.stop()
        yield "BOOKMARK", {}


def test_a_watch_that_is_gone_lists_again_and_sees_what_was_deleted_meanwhile():
    children, touched = cache()
    cluster = FakeCluster()
    watch = ChildWatch(cluster, children, "jobs", None)
    cluster.watch_of = watch
    watch.run((ListAgainError,))
    assert cluster.rounds == 2
    assert watch.listed.is_set()
    assert children.of(OWNER)[0] == ()
    assert touched == [("a", "bot")] * 2
