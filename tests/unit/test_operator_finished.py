"""Finished FineTuneJobs cost little: what is kept of them, when one is looked at again, and whose figures are shown."""

from collections import Counter
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from finetune_api.status import FINAL_PHASES, Phase
from finetune_operator import job_series
from finetune_operator.child_cache import ChildCache, Key
from finetune_operator.finished_jobs import FinishedJobs
from finetune_operator.job_reader import read_job
from finetune_operator.job_series import JobSeries
from finetune_operator.metrics import Metrics
from finetune_operator.phase_selectors import FINISHED, UNFINISHED
from finished_samples import ended_k8s_job, finetunejob, finished_job

KIND = "finished_finetunejobs"
DONE = ("a", "uid-done")


class Room:
    """Finished jobs with all that they touch."""

    def __init__(self) -> None:
        self.asked: list[Key] = []
        self.in_work: set[Key] = set()
        self.metrics = Metrics(CollectorRegistry())
        self.children = ChildCache(lambda _key, _owner: None)
        self.series = JobSeries(self.metrics)
        self.finished = FinishedJobs(self.children, self.series, self.asked.append, self.in_work.__contains__)

    def list(self, *bodies: dict[str, Any]) -> None:
        for body in bodies:
            self.finished.take(KIND, "ITEM", body)
        self.finished.keep_only(KIND, None, {body["metadata"]["uid"] for body in bodies})

    def shown(self) -> set[str]:
        return {name for _, name in self.series.uids()}


@pytest.fixture
def room() -> Room:
    return Room()


@pytest.mark.parametrize("phase", ["", *Phase, "OfALaterOperator"])
def test_each_job_is_in_one_of_both_selections_and_one_whose_phase_is_unknown_in_both(phase: str):
    def selected(selector: str) -> bool:
        return all(phase != term.removeprefix("status.phase!=") for term in selector.split(","))

    assert selected(UNFINISHED) == (phase not in FINAL_PHASES)
    assert selected(FINISHED) == (phase in FINAL_PHASES or phase == "OfALaterOperator")


@pytest.mark.parametrize(
    ("body", "ttl_seconds", "wanted"),
    [
        (finished_job("done"), 86400, False),
        (finished_job("done"), None, True),
        (finished_job("done", ttlSecondsAfterFinished=60), 86400, True),
        (finished_job("done", generation=2), 86400, True),
    ],
    ids=["nothing to do", "its Kubernetes Job has no TTL yet", "its TTL was changed", "a change to acknowledge"],
)
@pytest.mark.parametrize("event", ["ITEM", "ADDED", "MODIFIED"])
def test_a_finished_job_gets_a_round_only_where_that_changes_something(
    room: Room, event: str, body: dict[str, Any], ttl_seconds: int | None, wanted: bool
):
    room.children.take("jobs", "ADDED", ended_k8s_job("done", ttl_seconds))
    if event == "ITEM":
        room.list(body)
    else:
        room.finished.take(KIND, event, body)
    assert room.asked == [("a", "done")] * wanted
    assert room.finished.wanting_rounds() == [("a", "done")] * wanted
    assert room.finished.is_at_rest(DONE) == (not wanted)


def test_a_finished_job_that_is_being_deleted_gets_no_round_for_a_change_that_is_never_acknowledged(room: Room):
    going = finished_job("done", generation=2)
    going["metadata"]["deletionTimestamp"] = "2026-01-02T00:00:00Z"
    room.list(going)
    assert room.asked == []
    assert room.finished.is_at_rest(DONE)


def test_the_watch_of_unfinished_jobs_keeps_none_whose_phase_is_final(room: Room):
    """Where the server cannot select it tells of them too, and the job may be deleted by now."""
    room.finished.hear("ADDED", finished_job("done"))
    assert DONE not in room.finished


def test_what_the_watch_of_unfinished_jobs_tells_late_replaces_no_final_phase(room: Room):
    room.list(finished_job("done"))
    room.finished.hear("MODIFIED", finished_job("done", phase="OfALaterOperator"))
    room.finished.hear("DELETED", finished_job("done", phase="OfALaterOperator"))
    assert room.finished.phases() == Counter(Succeeded=1)


def test_a_verdict_that_follows_a_final_phase_without_one_is_looked_for_no_more(room: Room):
    room.list(finetunejob("done", phase="Succeeded"))
    assert room.finished.unjudged() == {DONE: (("a", "done"), "Succeeded")}
    room.finished.take(KIND, "MODIFIED", finished_job("done"))
    assert room.finished.unjudged() == {}


def test_of_a_finished_job_that_is_deleted_no_pod_is_kept(room: Room):
    room.list(finished_job("done"))
    pod = {**ended_k8s_job("done", None), "spec": {}, "status": {"phase": "Succeeded"}}
    pod["metadata"] = {**pod["metadata"], "uid": "pod", "ownerReferences": [{"kind": "Job", "controller": True}]}
    room.children.take("pods", "DELETED", pod)
    assert len(room.children.of(DONE)[1]) == 1
    room.finished.take(KIND, "DELETED", finished_job("done"))
    assert room.children.of(DONE) == ((), ())


def test_a_kubernetes_job_that_is_known_later_than_its_finished_job_still_gets_its_ttl(room: Room):
    room.list(finished_job("done"))
    assert room.finished.wanting_rounds() == []
    room.children.take("jobs", "ADDED", ended_k8s_job("done", None))
    assert room.finished.wanting_rounds() == [("a", "done")]


def test_of_jobs_that_nobody_knows_nothing_is_said(room: Room):
    assert not room.finished.is_at_rest(DONE)
    assert DONE not in room.finished


def test_they_are_counted_by_phase_until_they_are_deleted(room: Room):
    room.list(finished_job("done"), finished_job("bad", phase="Failed"), finetunejob("busy", phase="Training"))
    assert room.finished.phases() == Counter(Succeeded=1, Failed=1)
    room.finished.take(KIND, "ADDED", finished_job("new"))
    room.finished.take(KIND, "DELETED", finished_job("bad", phase="Failed"))
    room.finished.take(KIND, "DELETED", finetunejob("busy"))
    assert room.finished.phases() == Counter(Succeeded=2)
    room.list(finished_job("new"))  # after a gap in the watch
    assert room.finished.phases() == Counter(Succeeded=1)
    assert room.shown() == {"new"}


def test_a_final_phase_without_a_verdict_hides_no_job(room: Room):
    """Somebody wrote it by hand: the watch of unfinished jobs does not tell of it any more."""
    room.list(finetunejob("done", phase="Succeeded"))
    assert room.asked == [("a", "done")]
    assert DONE not in room.finished


def test_a_job_that_lost_its_verdict_is_finished_no_more(room: Room):
    room.list(finished_job("done"))
    room.finished.take(KIND, "MODIFIED", finetunejob("done", phase="Training"))
    assert DONE not in room.finished


def test_after_a_list_the_newest_have_series_and_no_round_was_made(room: Room, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_series, "MAX_FINISHED", 3)
    bodies = [finished_job(f"job-{day}", at=f"2026-01-{day:02}T00:00:00Z") for day in (9, 2, 7, 3, 8, 1)]
    for body in bodies[:3]:  # a list that is cut begins anew
        room.finished.take(KIND, "ITEM", body)
    room.list(*bodies)
    assert room.shown() == {"job-9", "job-8", "job-7"}
    assert room.asked == []


def test_a_list_that_was_cut_leaves_no_series_of_a_job_that_was_deleted_since(room: Room):
    for name in ("gone", "kept"):
        room.finished.take(KIND, "ITEM", finished_job(name))
    mended = finished_job("kept")
    mended["status"]["failures"] = 2
    room.list(mended)
    assert room.shown() == {"kept"}
    figures = {"job_namespace": "a", "job_name": "kept"}
    assert room.metrics.registry.get_sample_value("finetune_job_failures", figures) == 2


@pytest.mark.parametrize(("generation", "asked"), [(1, []), (2, [("a", "done")])], ids=["its verdict", "a change"])
def test_the_round_that_writes_a_verdict_tidies_up_and_no_other_is_asked_for_but_for_a_change_of_the_spec(
    room: Room, generation: int, asked: list[Key]
):
    room.children.take("jobs", "ADDED", ended_k8s_job("done", None))
    room.in_work.add(("a", "done"))
    room.finished.take(KIND, "ADDED", finished_job("done", generation=generation))
    assert room.asked == asked
    room.list(finished_job("done", generation=generation))  # should that round have failed, the next list asks
    assert room.asked == [*asked, ("a", "done")]


def test_what_a_write_of_ours_made_of_a_kubernetes_job_is_known_before_its_watch_tells(room: Room):
    room.children.take("jobs", "ADDED", ended_k8s_job("done", None))
    before = room.children.k8s_job(DONE, "x")
    assert before is not None
    room.children.take_written(ended_k8s_job("done", 86400), before)
    room.list(finished_job("done"))
    assert room.asked == []


@pytest.mark.parametrize("event", ["DELETED", "MODIFIED"])
def test_what_the_watch_told_of_a_kubernetes_job_meanwhile_stays_whatever_a_write_of_ours_is_answered(
    room: Room, event: str
):
    room.children.take("jobs", "ADDED", ended_k8s_job("done", None))
    before = room.children.k8s_job(DONE, "x")
    assert before is not None
    room.children.take("jobs", event, ended_k8s_job("done", 60))  # of another hand, after our write
    told = room.children.of(DONE)
    room.children.take_written(ended_k8s_job("done", 86400), before)
    assert room.children.of(DONE) == told


def test_while_many_namespaces_are_listed_at_once_no_more_of_the_newest_are_kept(
    room: Room, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(job_series, "MAX_FINISHED", 3)
    scopes = [FinishedJobs(room.children, room.series, room.asked.append, room.in_work.__contains__) for _ in range(4)]
    listed: set[str] = set()
    for number in range(5):
        for place, scope in enumerate(scopes):
            body = finished_job(f"job-{number}-{place}", at=f"2026-01-0{number + 1}T00:00:0{place}Z")
            scope.take(KIND, "ITEM", body)
            listed.add(body["metadata"]["uid"])
    assert len(room.series._noted) == 3  # pyright: ignore[reportPrivateUsage]
    for scope in scopes:
        scope.keep_only(KIND, None, listed)
    assert room.shown() == {"job-4-1", "job-4-2", "job-4-3"}
    assert room.series._noted == {}  # pyright: ignore[reportPrivateUsage]


def test_of_the_newest_no_more_is_kept_for_their_series_than_their_status(room: Room):
    body = finished_job("done")
    body["metadata"]["annotations"] = {"x": "y" * 256 * 1024}
    room.finished.take(KIND, "ITEM", body)
    assert "annotations" not in str(room.series._noted)  # pyright: ignore[reportPrivateUsage]


def test_series_are_of_all_unfinished_jobs_and_of_the_newest_finished_ones(room: Room, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(job_series, "MAX_FINISHED", 2)
    for number in range(5):
        room.series.show(read_job(finetunejob(f"busy-{number}", phase="Training")))
    for day in (3, 1, 2):
        room.series.show(read_job(finished_job(f"done-{day}", at=f"2026-01-{day:02}T00:00:00Z")))
    assert room.shown() == {*(f"busy-{number}" for number in range(5)), "done-3", "done-2"}
    failures = room.metrics.registry.get_sample_value
    figures = {name: failures("finetune_job_failures", {"job_namespace": "a", "job_name": name}) for name in
               ("busy-0", "done-1", "done-2")}  # fmt: skip
    assert figures == {"busy-0": 0, "done-1": None, "done-2": 0}
    ended = finished_job("busy-0", at="2026-02-01T00:00:00Z")
    ended["metadata"]["resourceVersion"] = "2"
    room.series.show(read_job(ended))
    assert room.shown() == {*(f"busy-{number}" for number in range(5)), "done-3"}


def test_a_deleted_job_takes_no_series_of_another_that_has_its_name(room: Room):
    room.list(finished_job("done"))
    another = finetunejob("done")
    another["metadata"]["uid"] = "uid-2"
    room.series.show(read_job(another))
    room.finished.take(KIND, "DELETED", finished_job("done"))
    assert room.series.uids() == {("a", "done"): "uid-2"}
