"""The operator's threads, on a cluster that says nothing: what /healthz watches over."""

import asyncio
import queue
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import kopf
import pytest
from prometheus_client import CollectorRegistry

from finetune_api import names
from finetune_operator import engine as engine_module
from finetune_operator import handlers
from finetune_operator.engine import Engine
from finetune_operator.job_reader import read_job
from finetune_operator.metrics import Metrics
from finetune_operator.settings import Settings
from finetune_operator.watch_lag import WatchLag
from hand_clock import Clock
from status_samples import SPEC
from waiting import PATIENCE_S


class QuietCluster:
    """Has the objects that it was made with and the lease; nothing happens to them."""

    def __init__(self) -> None:
        self.end = threading.Event()
        self.lease: dict[str, Any] | None = None
        self.jobs: list[dict[str, Any]] = []  # Kubernetes Jobs
        self.finetunejobs: list[dict[str, Any]] = []
        self.rounds: queue.Queue[str] = queue.Queue()

    def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        if kind == "leases":
            return self.lease
        self.rounds.put(name)
        return None

    def rounds_until(self, name: str) -> list[str]:
        """The names that were looked at, up to this one."""
        found: list[str] = []
        while not found or found[-1] != name:
            found.append(self.rounds.get(timeout=PATIENCE_S))
        return found

    def create(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        self.lease = body
        return body

    def replace_lease(self, body: dict[str, Any]) -> dict[str, Any]:
        self.lease = body
        return body

    def list_finetunejobs(self, namespace: str | None) -> Iterator[dict[str, Any]]:
        return iter(self.finetunejobs)

    def watch(self, kind: str, namespace: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
        for job in self.jobs if kind == "jobs" else []:
            yield "ITEM", job
        yield "LISTED", {}
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

    def connect(_metrics: Metrics, pool_size: int) -> QuietCluster:
        assert pool_size > 0
        return cluster

    monkeypatch.setattr(engine_module, "Cluster", connect)
    made = Engine(Settings(runtimes_file=runtimes, workers=1), Metrics(CollectorRegistry()))
    yield made
    made.stop()


def test_an_operator_that_waits_for_the_lease_is_well(engine: Engine):
    assert engine.problems() == []


def test_every_thread_that_must_never_stand_still_is_watched_over(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    def watched(ages_s: dict[str, float], stuck_s: float) -> list[str]:
        return sorted(ages_s)

    assert engine.start()
    assert engine.problems() == []
    monkeypatch.setattr(engine_module, "problems", watched)
    assert engine.problems() == [
        "lease", "progress", "resync", "watch of finetunejobs", "watch of jobs", "watch of pods",
    ]  # fmt: skip


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


def test_what_kopf_tells_is_heard_with_its_generation(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    told: list[object] = []

    def put(*what: object) -> None:
        told.append(what)

    monkeypatch.setattr(engine, "put", put)
    raw: Any = {"metadata": {"namespace": "a", "name": "bot", "uid": "u", "generation": 3}}
    body = kopf.Body(raw)
    watching = handlers.registry(engine)._watching  # pyright: ignore[reportPrivateUsage]
    (handler,) = watching.get_all_handlers()
    arguments = {"namespace": "a", "name": "bot", "uid": "u", "meta": body.metadata, "type": "MODIFIED"}
    asyncio.run(cast(Any, handler.fn)(**arguments))
    assert told == [("a", "bot", "u", 3)]


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


def test_a_job_that_was_deleted_unheard_is_no_longer_missed(hearing: WatchLag, clock: Clock):
    hearing.listed({"a": 1})
    clock.now_s = 60
    hearing.listed({})
    assert hearing.lag_s() == 0
