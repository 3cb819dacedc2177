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

from finetune_operator import engine as engine_module
from finetune_operator import handlers
from finetune_operator.child_cache import ChildCache
from finetune_operator.cluster import ApiError, UnreachableError
from finetune_operator.engine import MISSING_CRD, Engine
from finetune_operator.finished_jobs import FinishedJobs
from finetune_operator.health import STALL_S
from finetune_operator.job_reader import read_job
from finetune_operator.job_series import JobSeries
from finetune_operator.metrics import Metrics
from finetune_operator.phase_selectors import PhaseSelection
from finetune_operator.scope import Listed, Scope
from finetune_operator.settings import Settings
from finetune_operator.watch_lag import WatchLag
from finished_samples import ended_k8s_job, finetunejob, finished_job
from hand_clock import Clock
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

    def list_unfinished(self, namespace: str | None) -> Iterator[dict[str, Any]]:
        return iter(self.finetunejobs)

    def serves_finetunejobs(self) -> bool:
        return True

    def try_watch(self, namespace: str | None) -> None:
        """Allowed."""

    def watch(self, kind: str, namespace: str | None, version: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        for body in {"jobs": self.jobs, "pods": []}.get(kind, self.finetunejobs):
            yield "ITEM", body
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

    def connect(_metrics: Metrics, pool_size: int, _: PhaseSelection, answered: Callable[[], None]) -> QuietCluster:
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
        "lease", "progress", "resync", "watch of finetunejobs", "watch of finished_finetunejobs", "watch of jobs",
        "watch of pods",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_has_ended_is_told_at_once(engine: Engine, cluster: QuietCluster):
    def broken(kind: str, namespace: str | None, version: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        raise KeyError(kind)

    cluster.watch = broken  # type: ignore[method-assign]
    assert engine.start()
    kinds = ("jobs", "pods", "finished_finetunejobs")
    until(lambda: set(engine.health().stuck) == {f"watch of {kind}: has ended" for kind in kinds}, "told")


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
    engine.hear("ADDED", finetunejob("busy"))
    until(lambda: engine._queue.depth() == 0, "the key is taken")  # pyright: ignore[reportPrivateUsage]
    assert cluster.rounds.empty()
    know.set()
    assert cluster.rounds_until("busy") == ["busy"]


def test_a_job_that_nobody_has_looked_at_goes_before_more_rounds_of_others(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    rounds, go_on = list[str](), threading.Event()

    def reconcile(key: tuple[str, str]) -> None:
        rounds.append(key[1])
        go_on.wait(PATIENCE_S)

    monkeypatch.setattr(engine._reconciler, "reconcile", reconcile)  # pyright: ignore[reportPrivateUsage]
    assert engine.start()
    for name in ("in work", "busy", "busier"):
        engine.hear("MODIFIED", {**finetunejob(name), "status": {"phase": "Preparing"}})
        until(lambda: bool(rounds), "the only worker is in work")
    engine.hear("ADDED", finetunejob("new"))
    go_on.set()
    until(lambda: len(rounds) == 4, "all have had a round")
    assert rounds == ["in work", "new", "busy", "busier"]


def test_what_our_own_write_of_the_status_is_told_as_brings_no_round(
    engine: Engine, cluster: QuietCluster, monkeypatch: pytest.MonkeyPatch
):
    def written(key: tuple[str, str], version: str) -> bool:
        return (key, version) == (("a", "ours"), "7")

    monkeypatch.setattr(engine._known, "has_written", written)  # pyright: ignore[reportPrivateUsage]
    assert engine.start()
    engine.hear("MODIFIED", finetunejob("ours", version="7"))
    engine.hear("MODIFIED", finetunejob("another", version="7"))
    assert cluster.rounds_until("another") == ["another"]
    engine.hear("MODIFIED", finetunejob("ours", version="8"))
    assert cluster.rounds_until("ours") == ["ours"]


@pytest.mark.usefixtures("cluster")
def test_kopf_is_not_told_of_our_own_writes_and_the_watch_is_not_taken_for_deaf(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    heard: list[str] = []

    def hear(uid: str, _generation: int) -> None:
        heard.append(uid)

    def written(_key: tuple[str, str], version: str) -> bool:
        return version == "7"

    monkeypatch.setattr(engine._scopes[None].watch_lag, "heard", hear)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(engine._known, "has_written", written)  # pyright: ignore[reportPrivateUsage]
    verdict = {"type": "Finished", "status": "True", "lastTransitionTime": "2026-11-27T12:00:00Z"}
    finished = finetunejob("done", version="7") | {"status": {"conditions": [verdict]}}
    bodies = [finetunejob("ours", version="7"), finetunejob("ours", version="8"), finished, {}]
    assert [engine.takes_echo(body) for body in bodies] == [True, False, False, False]
    assert heard == [bodies[0]["metadata"]["uid"]]


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
    listing = cluster.list_unfinished

    def refused(namespace: str | None) -> Iterator[dict[str, Any]]:
        raise ApiError(403, "Forbidden", "")

    cluster.list_unfinished = refused  # type: ignore[method-assign]
    assert engine.start()
    engine.resync()
    engine.hear("ADDED", finetunejob("gone"))
    until(lambda: engine._queue.depth() == 0, "the key is taken")  # pyright: ignore[reportPrivateUsage]
    assert cluster.rounds.empty()
    assert "cluster: finetunejobs: 403 Forbidden, for 0 s" in engine.health().notes
    cluster.list_unfinished = listing  # type: ignore[method-assign]
    engine.resync()
    assert cluster.rounds_until("busy") == ["busy"]
    assert len(engine.health().notes) == 1


def test_an_operator_that_can_read_no_namespace_is_not_ready_after_a_while_and_lives(
    engine: Engine, cluster: QuietCluster, monkeypatch: pytest.MonkeyPatch
):
    def refused(*_: object) -> Iterator[Any]:
        raise ApiError(403, "Forbidden", "")

    cluster.watch = cluster.list_unfinished = refused  # type: ignore[method-assign]
    monkeypatch.setattr(engine_module, "RESYNC_RETRY_S", 0.01)
    assert engine.start()
    until(lambda: len(engine.health().notes) == 5, "troubles with all four kinds are told")
    assert engine.health().unready == engine.health().stuck == ()
    monkeypatch.setattr(engine_module, "UNREADABLE_S", -1)
    assert engine.health().unready == ("no watched namespace can be read",)
    assert engine.health().stuck == ()


def scope_of(cluster: QuietCluster, metrics: Metrics) -> Scope:
    children = ChildCache(lambda _key, _owner: None)
    finished = FinishedJobs(children, JobSeries(metrics), lambda _key: None, lambda _key: False)
    return Scope(
        "b", cluster=cast(Any, cluster), children=children, finished=finished, metrics=metrics, on_listed=lambda: None
    )


def test_a_job_that_finished_after_the_list_is_counted_once():
    scope = scope_of(QuietCluster(), Metrics(CollectorRegistry()))
    scope.take_list(Listed(phases={("a", "uid-done"): "Training", ("a", "uid-busy"): "Training"}), 0)
    scope.finished.take("finished_finetunejobs", "ADDED", finished_job("done"))
    assert scope.count_phases() == {"Training": 1, "Succeeded": 1}


def test_a_watch_that_the_server_refuses_is_told_and_no_stall_but_one_that_says_nothing_is(clock: Clock):
    answers: list[Exception | None] = []

    class Cluster(QuietCluster):
        def try_watch(self, namespace: str | None) -> None:
            answer = answers.pop(0)
            if answer is not None:
                raise answer

    metrics = Metrics(CollectorRegistry())
    scope = scope_of(Cluster(), metrics)
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
    scope = scope_of(QuietCluster(), metrics)
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


@pytest.mark.parametrize(("ttl_seconds", "looked_at"), [(86400, ["busy"]), (None, ["busy", "done"])])
def test_a_finished_job_is_looked_at_only_while_its_jobs_want_a_ttl(
    engine: Engine,
    cluster: QuietCluster,
    ttl_seconds: int | None,
    looked_at: list[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(engine_module, "CHILD_DELAY_S", 0.0)
    cluster.finetunejobs = [finished_job("done"), finetunejob("busy")]
    cluster.jobs = [ended_k8s_job("done", ttl_seconds)]
    assert engine.start()
    (scope,) = engine._scopes.values()  # pyright: ignore[reportPrivateUsage]
    until(lambda: scope.listed and scope.finished_listed, "everything is known")
    cluster.rounds_until("busy")
    until(lambda: engine._queue.depth() == 0, "nothing is left to do")  # pyright: ignore[reportPrivateUsage]
    cluster.rounds = queue.Queue()
    for _ in range(2):
        engine.resync()
        assert cluster.rounds_until(looked_at[-1]) == looked_at


def test_what_comes_before_a_pod_starts_is_looked_at_later_than_what_stands_in_its_way(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    delays_s: list[float] = []

    def put(_key: tuple[str, str], delay_s: float = 0.0) -> None:
        delays_s.append(delay_s)

    assert engine.start()
    (scope,) = engine._scopes.values()  # pyright: ignore[reportPrivateUsage]
    until(lambda: scope.listed, "its Jobs are known")
    monkeypatch.setattr(engine._queue, "put", put)  # pyright: ignore[reportPrivateUsage]
    live = ended_k8s_job("busy", None)
    live["status"] = {}
    for body in (live, {**live, "spec": {"suspend": True}}):
        engine._children.take("jobs", "MODIFIED", body)  # pyright: ignore[reportPrivateUsage]
    assert delays_s == [engine_module.STARTING_DELAY_S, engine_module.CHILD_DELAY_S]


@pytest.mark.parametrize(("event", "is_known"), [("ADDED", True), (None, True), ("DELETED", False)])
def test_a_job_that_was_deleted_before_its_first_round_is_not_taken_for_a_new_one(
    engine: Engine, event: str | None, is_known: bool
):
    """Its round would write a status that nothing has any more."""
    engine.hear(event, finetunejob("new"))
    assert (engine._known.take(("a", "new")) is not None) == is_known  # pyright: ignore[reportPrivateUsage]
    assert engine._queue.depth() == 1, "either way a round looks at it"  # pyright: ignore[reportPrivateUsage]


def test_the_first_list_of_kubernetes_jobs_brings_no_round_as_most_may_be_of_finished_jobs(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine_module, "CHILD_DELAY_S", 0.0)
    engine._children.take("jobs", "ITEM", ended_k8s_job("done", 86400))  # pyright: ignore[reportPrivateUsage]
    assert engine._queue.depth() == 0  # pyright: ignore[reportPrivateUsage]


def test_the_figures_of_a_job_whose_deletion_nobody_heard_end_after_the_next_resync(
    engine: Engine, cluster: QuietCluster
):
    series = engine._series  # pyright: ignore[reportPrivateUsage]
    cluster.finetunejobs = [finished_job("kept")]
    for body in (finished_job("kept"), finished_job("gone"), finetunejob("gone-too")):
        series.show(read_job(body))
    assert engine.start()
    until(lambda: set(series.uids()) == {("a", "kept")}, "the figures of both end")


def test_jobs_are_counted_by_phase_and_finished_ones_only_once_all_are_known(engine: Engine, cluster: QuietCluster):
    cluster.finetunejobs = [finetunejob("new"), finished_job("one"), finished_job("two")]
    engine.resync()
    count = engine._metrics.registry.get_sample_value  # pyright: ignore[reportPrivateUsage]
    assert count("finetune_jobs", {"phase": "Pending"}) == 1
    assert count("finetune_jobs", {"phase": "Succeeded"}) is None
    assert engine.start()
    until(lambda: count("finetune_jobs", {"phase": "Succeeded"}) == 2, "they are counted")
    assert count("finetune_jobs", {"phase": "Failed"}) == 0


@pytest.mark.parametrize(
    ("event", "body", "looked_at"),
    [
        ("ADDED", finetunejob("x"), True),
        ("DELETED", finetunejob("x"), True),  # finished, or deleted
        ("DELETED", finished_job("x"), True),
        (None, finished_job("x"), False),  # from a server that cannot select
        ("MODIFIED", finished_job("x", generation=2), False),  # the watch of finished ones tells of it, or has told
        ("MODIFIED", finished_job("x", phase="Training", generation=2), True),  # that one does not
    ],
)
def test_what_kopf_tells_leads_to_a_round_but_for_a_finished_job_that_wants_none(
    engine: Engine, event: str | None, body: dict[str, Any], looked_at: bool
):
    engine.hear(event, body)
    assert engine._queue.depth() == looked_at  # pyright: ignore[reportPrivateUsage]


def test_what_kopf_tells_is_heard(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    told: list[object] = []

    def hear(*what: object) -> None:
        told.append(what)

    monkeypatch.setattr(engine, "hear", hear)
    body = kopf.Body(cast(Any, finetunejob("bot")))
    watching = handlers.registry(engine)._watching  # pyright: ignore[reportPrivateUsage]
    (handler,) = watching.get_all_handlers()
    arguments = {"namespace": "a", "name": "bot", "uid": "u", "body": body, "type": "MODIFIED"}
    asyncio.run(cast(Any, handler.fn)(**arguments))
    assert told == [("MODIFIED", body)]


def test_a_final_phase_without_a_verdict_hides_no_job_that_is_listed_before_its_namespace_is_known(
    engine: Engine, cluster: QuietCluster
):
    """Somebody wrote the phase by hand: no list and no watch of unfinished jobs shows it."""
    know, watch = threading.Event(), cluster.watch

    def late(kind: str, namespace: str | None, version: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        if kind != "finished_finetunejobs":
            know.wait(PATIENCE_S)
        yield from watch(kind, namespace, version)

    cluster.watch = late  # type: ignore[method-assign]
    cluster.finetunejobs = [finetunejob("hidden", phase="Succeeded")]
    cluster.list_unfinished = lambda namespace: iter(())  # type: ignore[method-assign]
    assert engine.start()
    (scope,) = engine._scopes.values()  # pyright: ignore[reportPrivateUsage]
    until(lambda: scope.finished_listed, "the finished ones are listed")
    until(lambda: engine._queue.depth() == 0, "the key is taken")  # pyright: ignore[reportPrivateUsage]
    assert cluster.rounds.empty()
    know.set()
    assert cluster.rounds_until("hidden") == ["hidden"]


@pytest.mark.parametrize("phase", ["Succeeded", "Training"])
def test_what_kopf_tells_late_of_a_finished_job_that_is_deleted_keeps_nothing_of_it(engine: Engine, phase: str):
    """From a server that cannot select, or of a phase written by hand: Kopf may be behind the other watch."""
    (scope,) = engine._scopes.values()  # pyright: ignore[reportPrivateUsage]
    body = finished_job("gone", phase=phase)
    scope.finished.take("finished_finetunejobs", "DELETED", body)
    for event in (None, "MODIFIED", "DELETED"):
        engine.hear(event, body)
    assert scope.finished.phases() == {}


def test_a_job_whose_final_phase_is_mended_by_hand_is_not_taken_for_a_deleted_one(engine: Engine):
    """Its old phase leaves the selection of Kopf's watch, and the new one enters the other: in any order."""
    (scope,) = engine._scopes.values()  # pyright: ignore[reportPrivateUsage]
    engine.hear("MODIFIED", finished_job("done", phase="Training"))
    scope.finished.take("finished_finetunejobs", "ADDED", finished_job("done"))
    engine.hear("DELETED", finished_job("done", phase="Training"))
    assert scope.finished.phases() == {"Succeeded": 1}


def test_a_job_that_is_told_of_while_a_list_goes_on_is_known_after_it(engine: Engine, cluster: QuietCluster):
    """The list may have passed it by. Answers of its pod would be for nobody until the next one."""
    (scope,) = engine._scopes.values()  # pyright: ignore[reportPrivateUsage]

    def listing(namespace: str | None) -> Iterator[dict[str, Any]]:
        yield finetunejob("busy")
        engine.hear("ADDED", finetunejob("new"))

    cluster.list_unfinished = listing  # type: ignore[method-assign]
    engine.resync()
    assert set(scope.names.values()) == {("a", "busy"), ("a", "new")}
    cluster.list_unfinished = lambda namespace: iter(())  # type: ignore[method-assign]
    engine.resync()
    assert scope.names == {}, "and no longer than it is listed"


def test_a_job_that_is_told_of_while_a_resync_goes_on_ends_no_thread(engine: Engine, cluster: QuietCluster):
    (scope,) = engine._scopes.values()  # pyright: ignore[reportPrivateUsage]

    class Names(dict[Any, Any]):
        def __iter__(self) -> Iterator[Any]:
            for number, name in enumerate(super().__iter__()):
                engine.hear("ADDED", finetunejob(f"new-{number}"))  # as the thread of Kopf may at any moment
                yield name

    take_list = scope.take_list

    def with_names(found: Listed, now_s: float) -> None:
        take_list(found, now_s)
        scope.names = Names(scope.names)

    scope.take_list = with_names  # type: ignore[method-assign]
    cluster.finetunejobs = [finetunejob("busy")]
    engine.resync()
    assert engine.health().stuck == ()


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


def test_a_deaf_watch_is_noticed_where_no_job_lives_as_long_as_that_takes(hearing: WatchLag, clock: Clock):
    for number in range(10):
        hearing.listed({str(number): 1, str(number + 1): 1})
        clock.now_s += 60
    assert hearing.lag_s() == 600
    hearing.heard("10", 1)
    assert hearing.lag_s() == 0
    hearing.listed({"11": 1})
    clock.now_s += 60
    assert hearing.lag_s() == 60


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
