"""The cache of Jobs and pods: deleted pods keep their last state, and memory stays flat."""

import tracemalloc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from finetune_api import names
from finetune_api.names import Stage
from finetune_operator.child_cache import MAX_GONE, ChildCache
from finetune_operator.cluster import ApiError, UnreachableError
from finetune_operator.object_watch import ObjectWatch

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
    return ChildCache(lambda key, _owner: touched.append(key)), touched


def test_a_change_asks_for_a_round_of_its_job_and_a_repetition_does_not():
    children, touched = cache()
    children.take("jobs", "ADDED", body("jobs", "j"))
    children.take("jobs", "MODIFIED", body("jobs", "j"))
    assert touched == [("a", "bot")]
    children.take("jobs", "DELETED", body("jobs", "j"))
    assert touched == [("a", "bot")] * 2
    assert children.of(OWNER) == ((), ())


@pytest.mark.parametrize("kind", ["jobs", "pods"])
@pytest.mark.parametrize(
    "labels",
    [{names.LABEL_JOB_UID: "job-2"}, {names.LABEL_JOB_UID: ""}, {names.LABEL_JOB_NAME: ""}, {names.LABEL_STAGE: "x"}],
)
def test_what_gets_other_labels_is_not_alive_for_ever_for_the_job_that_it_was_of(kind: str, labels: dict[str, str]):
    """As when somebody takes a pod out of its Job to look into it. It would keep the next attempt from beginning."""
    children, touched = cache()
    children.take(kind, "ADDED", body(kind, "x"))
    touched.clear()
    other = body(kind, "x")
    other["metadata"]["labels"] |= labels
    children.take(kind, "MODIFIED", other)
    jobs, pods = children.of(OWNER)
    assert jobs == ()
    assert not any(pod.active for pod in pods)
    assert ("a", "bot") in touched
    children.take(kind, "DELETED", other)
    children.keep_only(kind, None, set())
    for owner in (OWNER, ("a", "job-2")):
        children.forget(owner)
    assert children.owners() == set()
    assert not children.knows("x")


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
    children = ChildCache(lambda _key, _owner: None)
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


class ScriptedCluster:
    """Watches that yield what `script` gives one after another, an exception at the end of each where there is one;
    `asked` has the versions that they were to go on from."""

    def __init__(self, *script: Sequence[tuple[str, dict[str, Any]] | Exception]) -> None:
        self.script = list(script)
        self.asked: list[str | None] = []

    def watch(self, kind: Any, namespace: str | None, version: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        self.asked.append(version)
        for item in self.script.pop(0):
            if isinstance(item, Exception):
                raise item
            yield item


def at(version: str) -> dict[str, Any]:
    return {"metadata": {"resourceVersion": version}}


OPENED: tuple[str, dict[str, Any]] = ("OPENED", {})
LISTED = [("LISTED", at("5")), OPENED]
CUT = UnreachableError("cut")


def watch_of(cluster: ScriptedCluster) -> ObjectWatch:
    return ObjectWatch(cluster, cache()[0], "jobs", None)


def test_a_watch_that_is_gone_lists_again_and_sees_what_was_deleted_meanwhile():
    children, touched = cache()
    expired = ApiError(410, "Expired", "")
    cluster = ScriptedCluster([("ITEM", body("jobs", "j")), *LISTED, ("BOOKMARK", at("6")), expired], LISTED)
    watch = ObjectWatch(cluster, children, "jobs", None)
    watch.attempt()
    assert watch.listed.is_set()
    assert len(children.of(OWNER)[0]) == 1
    watch.attempt()
    assert cluster.asked == [None, None]
    assert watch.trouble is None
    assert children.of(OWNER)[0] == ()
    assert touched == [("a", "bot")] * 2


def test_a_watch_that_is_cut_goes_on_after_the_last_that_it_brought():
    changed = body("jobs", "j")
    changed["metadata"]["resourceVersion"] = "7"
    cluster = ScriptedCluster(
        [*LISTED, ("MODIFIED", changed), CUT], [OPENED, ("BOOKMARK", at("9")), CUT], [OPENED], [OPENED]
    )
    watch = watch_of(cluster)
    for _ in range(3):
        watch.attempt()
    assert cluster.asked == [None, "7", "9"]


def test_what_the_server_refuses_for_now_leads_to_no_new_list():
    refused = [ApiError(status, "x", "") for status in (429, 500, 503)]
    cluster = ScriptedCluster([*LISTED, CUT], *([error] for error in refused), [CUT], [OPENED])
    watch = watch_of(cluster)
    for _ in range(6):
        watch.attempt()
    assert cluster.asked == [None] + ["5"] * 5


@pytest.mark.parametrize(
    "script",
    [
        [[ApiError(410, "Expired", "")]],
        [[ApiError(504, "Timeout", "Too large resource version")]],
        [[OPENED, CUT]],  # the second in a row that brings nothing: such a server may be one of an older backup
    ],
)
def test_a_version_that_leads_nowhere_is_given_up(script: list[Any]):
    cluster = ScriptedCluster([*LISTED, CUT], *script, LISTED)
    watch = watch_of(cluster)
    for _ in range(2 + len(script)):
        watch.attempt()
    assert cluster.asked[-1] is None


def test_the_waits_between_watches_grow_while_nothing_comes_and_begin_anew_once_something_does():
    bookmark = ("BOOKMARK", at("9"))
    nothing: list[Any] = [CUT]
    cluster = ScriptedCluster(*[nothing] * 7, [*LISTED, bookmark, CUT], nothing, nothing, [OPENED, bookmark])
    watch = watch_of(cluster)
    assert [watch.attempt() for _ in range(11)] == [1, 2, 4, 8, 16, 30, 30, 1, 1, 2, 0]


def test_what_cannot_be_read_is_told_until_it_can_and_counts_as_a_sign_of_life():
    cluster = ScriptedCluster([ApiError(403, "Forbidden", "user x")], [CUT], LISTED, [CUT])
    watch = watch_of(cluster)
    told: list[str | None] = []
    for _ in range(4):
        before_s = watch.last_activity_s
        watch.attempt()
        told.append(watch.trouble.words if watch.trouble else None)
        assert watch.last_activity_s > before_s
    assert told == ["403 Forbidden", "no answer", None, "no answer"]
