"""The operator's threads, on a cluster that says nothing: what /healthz watches over."""

import asyncio
import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import kopf
import pytest
from prometheus_client import CollectorRegistry

from finetune_api import names
from finetune_operator import engine as engine_module
from finetune_operator import handlers
from finetune_operator.child_cache import ChildCache
from finetune_operator.cluster import ApiError, UnreachableError
from finetune_operator.engine import MISSING_CRD, Engine
from finetune_operator.health import STALL_S
from finetune_operator.job_reader import read_job
from finetune_operator.metrics import Metrics
from finetune_operator.scope import Listed, Scope
from finetune_operator.settings import Settings
from finetune_operator.watch_lag import WatchLag
from hand_clock import Clock
from status_samples import SPEC
from waiting import PATIENCE_S, until


class QuietCluster:
    """Has the objects that it was made with and the lease; nothing happens to them."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.lease: dict[str, Any] | None = None
        self.jobs: list[dict[str, Any]] = []  # Kubernetes Jobs
        self.finetunejobs: list[dict[str, Any]] = []
        self.rounds: queue.Queue[str] = queue.Queue()
        self.answered: Callable[[], None] = lambda: None

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self.rounds.put(name)
        return None

    def rounds_until(self, name: str) -> list[str]:
        """The names that were looked at, up to this one."""
        found: list[str] = []
        while not found or found[-1] != name:
            found.append(self.rounds.get(timeout=PATIENCE_S))
        return found

    def read_lease(self, namespace: str, name: str, timeout_s: float) -> dict[str, Any] | None:
        return self.lease

    def write_lease(self, body: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        self.lease = body
        return body

    def list_finetunejobs(self, namespace: str | None) -> Iterator[dict[str, Any]]:
        return iter(self.finetunejobs)

    def serves_finetunejobs(self) -> bool:
        return True

    def try_watch(self, namespace: str | None) -> None:
        """Allowed."""

    def watch(self, kind: str, namespace: str | None, version: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        for job in self.jobs if kind == "jobs" else []:
            yield "ITEM", job
        yield "LISTED", {"metadata": {"resourceVersion": "1"}}
        yield "OPENED", {}
        self.end.wait()


@pytest.fixture
def cluster() -> Iterator[QuietCluster]:
    made = QuietCluster()
    yield made
    made.end.set()


@pytest.fixture
def engine(cluster: QuietCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    runtimes = tmp_path / "runtimes.yaml"
    runtimes.write_text("runtimes: {default: {image: x}}")

    def connect(_metrics: Metrics, pool_size: int, answered: Callable[[], None]) -> QuietCluster:
        assert pool_size > 0
        cluster.answered = answered
        return cluster

    monkeypatch.setattr(engine_module, "Cluster", connect)
    made = Engine(Settings(runtimes_file=runtimes, workers=1), Metrics(CollectorRegistry()))
    yield made
    made.stop()


def test_an_operator_that_waits_for_the_lease_is_well(engine: Engine):
    assert engine.health().stuck == engine.health().unready == ()


def test_an_operator_waits_for_its_crd_with_the_lease_and_ends_when_told_to(
    engine: Engine, cluster: QuietCluster, monkeypatch: pytest.MonkeyPatch
):
    answers: queue.Queue[bool | UnreachableError] = queue.Queue()

    def serves() -> bool:
        said = answers.get(timeout=PATIENCE_S)
        if isinstance(said, UnreachableError):
            raise said
        return said

    cluster.serves_finetunejobs = serves  # type: ignore[method-assign]
    monkeypatch.setattr(engine_module, "CRD_RETRY_S", 0.0)
    began: list[bool] = []
    thread = threading.Thread(target=lambda: began.append(engine.start()), daemon=True)
    thread.start()
    for answer, words in (
        (False, MISSING_CRD),
        (UnreachableError("secret words"), "cannot see whether the CRD is installed: no answer"),
        (False, MISSING_CRD),
    ):
        answers.put(answer)
        until(lambda w=words: engine.health().unready == (w,), words)
        assert engine.health().stuck == ()
    assert cluster.lease is not None
    engine.stop()
    answers.put(False)
    thread.join(PATIENCE_S)
    assert began == [False]
    assert cluster.rounds.empty()


def test_every_thread_that_must_never_stand_still_is_watched_over(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    def watched(ages_s: dict[str, float], stuck_s: float) -> list[str]:
        return sorted(ages_s)

    assert engine.start()
    assert engine.health().stuck == ()
    monkeypatch.setattr(engine_module, "problems", watched)
    assert engine.health().stuck == (
        "lease", "progress", "resync", "watch of finetunejobs", "watch of jobs", "watch of pods",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_ended_is_told_at_once(engine: Engine, cluster: QuietCluster):
    def broken(kind: str, namespace: str | None, version: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        raise KeyError(kind)

    cluster.watch = broken  # type: ignore[method-assign]
    assert engine.start()
    until(lambda: set(engine.health().stuck) == {"watch of jobs: has ended", "watch of pods: has ended"}, "told")


def test_a_round_whose_requests_are_answered_moves(
    engine: Engine, cluster: QuietCluster, monkeypatch: pytest.MonkeyPatch
):
    moved: list[tuple[str, str]] = []
    monkeypatch.setattr(engine._queue, "moved", moved.append)  # pyright: ignore[reportPrivateUsage]
    cluster.finetunejobs = [finetunejob("busy")]
    get = cluster.get

    def answered(kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        cluster.answered()
        return get(kind, namespace, name)

    cluster.get = answered  # type: ignore[method-assign]
    assert engine.start()
    cluster.rounds_until("busy")
    assert moved[0] == ("a", "busy")
    count = len(moved)
    cluster.answered()
    assert len(moved) == count  # an answer to another thread is none of a round


def test_no_round_is_begun_before_the_jobs_and_pods_of_its_namespace_are_known(engine: Engine, cluster: QuietCluster):
    know, watch = threading.Event(), cluster.watch

    def late(kind: str, namespace: str | None, version: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        know.wait(PATIENCE_S)
        yield from watch(kind, namespace, version)

    cluster.watch = late  # type: ignore[method-assign]
    cluster.finetunejobs = [finetunejob("busy")]
    assert engine.start()
    engine.put("a", "busy", "uid-busy", 1, "5")
    until(lambda: engine._queue.depth() == 0, "the key is taken")  # pyright: ignore[reportPrivateUsage]
    assert cluster.rounds.empty()
    know.set()
    assert cluster.rounds_until("busy") == ["busy"]


def test_what_our_own_write_of_the_status_is_told_as_brings_no_round(
    engine: Engine, cluster: QuietCluster, monkeypatch: pytest.MonkeyPatch
):
    def written(owner: tuple[str, str], version: str) -> bool:
        return (owner, version) == (("a", "uid-ours"), "7")

    monkeypatch.setattr(engine._reconciler, "has_written", written)  # pyright: ignore[reportPrivateUsage]
    assert engine.start()
    engine.put("a", "ours", "uid-ours", 1, "7")
    engine.put("a", "another", "uid-another", 1, "7")
    assert cluster.rounds_until("another") == ["another"]
    engine.put("a", "ours", "uid-ours", 1, "8")
    assert cluster.rounds_until("ours") == ["ours"]


def test_kopf_copies_no_object_to_look_for_differences():
    settings = kopf.OperatorSettings()
    handlers.configure(settings)
    unreadable = cast(kopf.Body, None)
    assert settings.persistence.diffbase_storage.fetch(body=unreadable) is None
    assert settings.persistence.diffbase_storage.build(body=unreadable) == {}


def test_stopping_waits_for_the_round_in_work_with_the_lease_held_and_then_gives_it_back(
    engine: Engine, cluster: QuietCluster
):
    entered, go_on = threading.Event(), threading.Event()
    holders: list[str] = []

    def slow(kind: str, namespace: str, name: str) -> None:
        entered.set()
        go_on.wait(PATIENCE_S)
        assert cluster.lease is not None
        holders.append(cluster.lease["spec"]["holderIdentity"])

    cluster.get = slow  # type: ignore[method-assign]
    cluster.finetunejobs = [finetunejob("busy")]
    assert engine.start()
    assert entered.wait(PATIENCE_S)
    threading.Timer(0.3, go_on.set).start()
    engine.stop()
    assert holders == ["finetune-operator"]
    assert cluster.lease is not None
    assert cluster.lease["spec"]["holderIdentity"] == ""


def test_a_round_that_does_not_end_keeps_no_operator_from_ending_and_the_lease_runs_out_by_itself(
    engine: Engine, cluster: QuietCluster, monkeypatch: pytest.MonkeyPatch
):
    entered, go_on = threading.Event(), threading.Event()

    def hangs(kind: str, namespace: str, name: str) -> None:
        entered.set()
        go_on.wait(PATIENCE_S)

    monkeypatch.setattr(engine_module, "STOP_S", 0.1)
    cluster.get = hangs  # type: ignore[method-assign]
    cluster.finetunejobs = [finetunejob("busy")]
    assert engine.start()
    assert entered.wait(PATIENCE_S)
    engine.stop()
    assert cluster.lease is not None
    assert cluster.lease["spec"]["holderIdentity"] == "finetune-operator"
    go_on.set()


def test_rounds_in_a_namespace_that_was_refused_are_not_begun_until_it_can_be_listed(
    engine: Engine, cluster: QuietCluster
):
    cluster.finetunejobs = [finetunejob("busy")]
    listing = cluster.list_finetunejobs

    def refused(namespace: str | None) -> Iterator[dict[str, Any]]:
        raise ApiError(403, "Forbidden", "")

    cluster.list_finetunejobs = refused  # type: ignore[method-assign]
    assert engine.start()
    engine.resync()
    engine.put("a", "gone", "uid-gone", 1, "5")
    until(lambda: engine._queue.depth() == 0, "the key is taken")  # pyright: ignore[reportPrivateUsage]
    assert cluster.rounds.empty()
    assert "cluster: finetunejobs: 403 Forbidden, for 0 s" in engine.health().notes
    cluster.list_finetunejobs = listing  # type: ignore[method-assign]
    engine.resync()
    assert cluster.rounds_until("busy") == ["busy"]
    assert len(engine.health().notes) == 1


def test_an_operator_that_can_read_no_namespace_is_not_ready_after_a_while_and_lives(
    engine: Engine, cluster: QuietCluster, monkeypatch: pytest.MonkeyPatch
):
    def refused(*_: object) -> Iterator[Any]:
        raise ApiError(403, "Forbidden", "")

    cluster.watch = cluster.list_finetunejobs = refused  # type: ignore[method-assign]
    monkeypatch.setattr(engine_module, "RESYNC_RETRY_S", 0.01)
    assert engine.start()
    until(lambda: len(engine.health().notes) == 4, "troubles with all three kinds are told")
    assert engine.health().unready == engine.health().stuck == ()
    monkeypatch.setattr(engine_module, "UNREADABLE_S", -1)
    assert engine.health().unready == ("no watched namespace can be read",)
    assert engine.health().stuck == ()


def test_a_watch_that_the_server_refuses_is_told_and_no_stall_but_one_that_says_nothing_is(clock: Clock):
    answers: list[Exception | None] = []

    class Cluster(QuietCluster):
        def try_watch(self, namespace: str | None) -> None:
            answer = answers.pop(0)
            if answer is not None:
                raise answer

    metrics = Metrics(CollectorRegistry())
    scope = Scope(cast(Any, Cluster()), ChildCache(lambda _: None), metrics, "b", lambda: None)
    scope.watch_lag = WatchLag(clock)
    found = Listed(generations={"u": 1})
    labels = {"kind": "finetunejobs", "watched_namespace": "b"}
    answers += [ApiError(403, "Forbidden", "")] * 9
    for _ in range(10):
        scope.take_list(found, 0)
        clock.now_s += 60
        assert scope.ages_s()["watch of finetunejobs in b"] <= 60
    assert any("finetunejobs: 403 Forbidden" in note for note in scope.notes())
    assert metrics.registry.get_sample_value("finetune_watch_trouble", labels) == 1
    answers += [None] * 9
    for _ in range(5):
        scope.take_list(found, 0)
        clock.now_s += 60
    assert scope.ages_s()["watch of finetunejobs in b"] > STALL_S
    assert metrics.registry.get_sample_value("finetune_watch_trouble", labels) == 0


def test_a_namespace_that_is_refused_altogether_is_no_stall_of_its_watch(clock: Clock):
    metrics = Metrics(CollectorRegistry())
    scope = Scope(cast(Any, QuietCluster()), ChildCache(lambda _: None), metrics, "b", lambda: None)
    scope.watch_lag = WatchLag(clock)
    scope.take_list(Listed(generations={"u": 1}), 0)
    clock.now_s += 60
    assert scope.take_failure(ApiError(403, "Forbidden", ""))
    assert not scope.take_failure(ApiError(403, "Forbidden", ""))  # known by now
    clock.now_s += 600
    assert scope.ages_s()["watch of finetunejobs in b"] == 0


def test_kopf_tries_what_is_refused_again_for_ever_as_it_ends_altogether_otherwise():
    settings = kopf.OperatorSettings()
    handlers.configure(settings)
    backoffs = settings.networking.error_backoffs
    assert isinstance(backoffs, handlers.Backoffs)
    for _ in range(2):
        waits_s = list(itertools.islice(backoffs, 1000))
        assert waits_s[0] == 1
        assert max(waits_s) == waits_s[-1] == 30


def finetunejob(name: str, *conditions: dict[str, Any]) -> dict[str, Any]:
    meta = {"name": name, "namespace": "a", "uid": f"uid-{name}", "generation": 1}
    return {"metadata": meta, "spec": SPEC, "status": {"conditions": conditions}}


@pytest.mark.parametrize(("ttl_seconds", "looked_at"), [(86400, ["busy"]), (None, ["done", "busy"])])
def test_a_finished_job_is_looked_at_again_only_while_its_jobs_want_a_ttl(
    engine: Engine, cluster: QuietCluster, ttl_seconds: int | None, looked_at: list[str]
):
    over = {
        "type": "Finished", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": "x",
        "observedGeneration": 1,
    }  # fmt: skip
    cluster.finetunejobs = [finetunejob("done", over), finetunejob("busy")]
    owner = {"kind": "FineTuneJob", "uid": "uid-done", "controller": True}
    labels = names.child_labels("done", "uid-done", names.Stage.TRAIN, 1)
    meta = {"name": "x", "namespace": "a", "uid": "x", "labels": labels, "ownerReferences": [owner]}
    status = {"conditions": [{"type": "Complete", "status": "True"}]}
    cluster.jobs = [{"metadata": meta, "spec": {"ttlSecondsAfterFinished": ttl_seconds}, "status": status}]
    assert engine.start()
    cluster.rounds_until("busy")
    engine.resync()
    assert cluster.rounds_until("busy") == looked_at


def test_the_figures_of_a_job_whose_deletion_nobody_heard_end_with_the_next_resync(
    engine: Engine, cluster: QuietCluster
):
    over = {
        "type": "Finished", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": "x",
        "observedGeneration": 1,
    }  # fmt: skip
    cluster.finetunejobs = [finetunejob("kept", over), finetunejob("gone", over)]
    reconciler = engine._reconciler  # pyright: ignore[reportPrivateUsage]
    for body in cluster.finetunejobs:
        reconciler._export(read_job(body))  # pyright: ignore[reportPrivateUsage]
    cluster.finetunejobs = [finetunejob("kept", over)]
    engine.resync()
    registry = engine._metrics.registry  # pyright: ignore[reportPrivateUsage]
    found = [
        registry.get_sample_value("finetune_job_failures", {"job_namespace": "a", "job_name": name})
        for name in ("kept", "gone")
    ]
    assert found == [0, None]


def test_what_kopf_tells_is_heard_with_its_generation_and_version(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    told: list[object] = []

    def put(*what: object) -> None:
        told.append(what)

    monkeypatch.setattr(engine, "put", put)
    raw: Any = {"metadata": {"namespace": "a", "name": "bot", "uid": "u", "generation": 3, "resourceVersion": "7"}}
    body = kopf.Body(raw)
    watching = handlers.registry(engine)._watching  # pyright: ignore[reportPrivateUsage]
    (handler,) = watching.get_all_handlers()
    arguments = {"namespace": "a", "name": "bot", "uid": "u", "meta": body.metadata, "type": "MODIFIED"}
    asyncio.run(cast(Any, handler.fn)(**arguments))
    assert told == [("a", "bot", "u", 3, "7")]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def hearing(clock: Clock) -> WatchLag:
    return WatchLag(clock)


def test_a_change_that_only_the_list_shows_means_that_the_watch_is_deaf(hearing: WatchLag, clock: Clock):
    hearing.heard("a", 1)
    hearing.listed({"a": 1})
    clock.now_s = 100
    hearing.listed({"a": 2})
    clock.now_s = 300
    hearing.listed({"a": 3, "b": 1})
    assert hearing.lag_s() == 200
    hearing.heard("a", 3)
    hearing.heard("b", 1)
    assert hearing.lag_s() == 0


def test_a_job_that_is_told_of_before_the_list_knows_it_is_remembered(hearing: WatchLag, clock: Clock):
    hearing.heard("new", 1)
    hearing.listed({})
    clock.now_s = 60
    hearing.listed({"new": 1})
    clock.now_s = 600
    assert hearing.lag_s() == 0


def test_a_watch_that_tells_one_job_after_the_other_is_not_deaf_to_the_last(hearing: WatchLag, clock: Clock):
    hearing.listed({str(number): 1 for number in range(100)})
    for number in range(99):
        clock.now_s += 20
        hearing.heard(str(number), 1)
    assert hearing.lag_s() == 0
    clock.now_s += 200
    assert hearing.lag_s() == 200


def test_what_the_server_lets_nobody_hear_counts_from_when_it_does(hearing: WatchLag, clock: Clock):
    hearing.listed({"a": 1})
    clock.now_s = 1000
    hearing.excuse()
    assert hearing.lag_s() == 0
    hearing.listed({"a": 1})
    clock.now_s = 1100
    assert hearing.lag_s() == 100


def test_a_job_that_was_deleted_unheard_is_no_longer_missed(hearing: WatchLag, clock: Clock):
    hearing.listed({"a": 1})
    clock.now_s = 60
    hearing.listed({})
    assert hearing.lag_s() == 0
