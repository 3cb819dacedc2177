"""Pulling progress from pods that may be hostile."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from finetune_api import names
from finetune_api.names import Stage
from finetune_api.run import MAX_PROGRESS_BYTES, Progress
from finetune_operator import progress
from finetune_operator.child_cache import ChildCache, Owner
from finetune_operator.health import STALL_S
from finetune_operator.metrics import Metrics
from finetune_operator.observed import ObservedPod
from finetune_operator.progress import (
    MAX_PODS_OF_JOB,
    ProgressError,
    ProgressPuller,
    fetch,
    parse,
    write_interval_s,
)
from hand_clock import Clock
from waiting import PATIENCE_S

OWNER = ("a", "job-1")
NOW = datetime(2026, 1, 1, tzinfo=UTC)
OK = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n"
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def said(step: int) -> str:
    return Progress(stage=Stage.TRAIN, attempt=1, activity="Training", step=step, total_steps=99).model_dump_json()


GOOD = said(step=7)


@pytest.fixture(autouse=True)
def patient_puller(monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer of a busy machine comes late, and is one."""
    monkeypatch.setattr(progress, "fetch", partial(fetch, timeout_s=PATIENCE_S))


def asked(serve: Serve, timeout_s: float = PATIENCE_S) -> Progress:
    """What `fetch` makes of a server that behaves like this."""

    async def both() -> Progress:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        try:
            return await fetch("127.0.0.1", port, timeout_s)
        finally:
            server.close()

    return asyncio.run(both())


def saying(*parts: bytes) -> Serve:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for part in parts:
            writer.write(part)
        writer.close()

    return serve


def test_a_good_answer_is_read():
    assert asked(saying(OK, GOOD.encode())).step == 7


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n\r\n", "status"),
        (b"HTTP/1.0 500 no\r\n\r\n", "status"),
        (b"SSH-2.0-OpenSSH\r\n", "status"),
        (b"", "status"),
        (OK + b"{}", "schema"),
        (OK + b"[" * 5000, "schema"),
        (OK + GOOD[:-1].encode() + b',"step":-1}', "schema"),
        (OK + b"\xff\xfe", "schema"),
        (OK + b" " * (MAX_PROGRESS_BYTES + 1), "size"),
    ],
)
def test_anything_else_is_refused_with_a_word(answer: bytes, word: str):
    with pytest.raises(ProgressError, match=word):
        parse(answer)


def test_an_endless_answer_is_cut_after_20_kib():
    sent = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(OK)
        while not writer.transport.is_closing() and sent < 10**8:
            writer.write(b" " * 65536)
            sent += 65536
            try:
                await writer.drain()
            except ConnectionError:
                return

    with pytest.raises(ProgressError, match="size"):
        asked(serve)
    assert sent < 10**7


def test_an_answer_that_drips_byte_by_byte_ends_at_the_deadline():
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for byte in OK * 1000:
            if writer.transport.is_closing():
                return
            writer.write(bytes([byte]))
            await asyncio.sleep(0.02)

    with pytest.raises(ProgressError, match="timeout"):
        asked(serve, timeout_s=0.3)


def test_a_closed_port_is_unreachable():
    with pytest.raises(ProgressError, match="unreachable"):
        asyncio.run(fetch("127.0.0.1", 1, PATIENCE_S))


@pytest.mark.parametrize(("running", "interval_s"), [(0, 30), (1, 30), (300, 30), (600, 60), (5000, 500)])
def test_all_jobs_together_write_at_most_ten_times_a_second(running: int, interval_s: float):
    assert write_interval_s(running) == interval_s


def pod(attempt: int = 1) -> ObservedPod:
    return ObservedPod("p", "u", Stage.TRAIN, attempt, NOW, "Running", ip="127.0.0.1", started_at=NOW)


def pull(body: str, target: ObservedPod) -> tuple[ProgressPuller, list[Owner], Metrics]:
    due: list[Owner] = []
    metrics = Metrics(CollectorRegistry())

    async def both() -> ProgressPuller:
        server = await asyncio.start_server(saying(OK, body.encode()), "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        children = ChildCache(lambda _key, _owner: None)
        puller = ProgressPuller(children, metrics, due.append, lambda: NOW, port)
        await puller.pull([(OWNER, target)])
        await puller.pull([(OWNER, target)])
        server.close()
        return puller

    return asyncio.run(both()), due, metrics


def test_answers_are_kept_and_looked_at_no_more_often_than_they_are_written():
    puller, due, _ = pull(GOOD, pod())
    (kept,) = puller.answers(OWNER)
    assert kept.progress.step == 7
    assert due == [OWNER]
    puller.retain(set())
    assert puller.answers(OWNER) == ()


def test_a_concern_about_the_model_is_looked_at_at_once():
    due: list[Owner] = []
    concern = json.loads(GOOD) | {"quality": {"concerns": ["Diverging"], "steps_above_start": 10}}
    answers = iter([GOOD, json.dumps(concern), json.dumps(concern)])

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await saying(OK, next(answers).encode())(reader, writer)

    async def rounds() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        metrics = Metrics(CollectorRegistry())
        puller = ProgressPuller(ChildCache(lambda _key, _owner: None), metrics, due.append, lambda: NOW, port)
        for _ in range(3):
            await puller.pull([(OWNER, pod())])
        server.close()

    asyncio.run(rounds())
    assert due == [OWNER, OWNER], "the first answer, and the one that brought the concern"


def test_the_answer_of_another_attempt_is_not_kept():
    puller, due, metrics = pull(GOOD, pod(attempt=2))
    assert puller.answers(OWNER) == ()
    assert due == []
    assert metrics.registry.get_sample_value("finetune_progress_pulls_total", {"result": "stranger"}) == 2


def test_a_pod_that_somebody_else_made_takes_no_other_pods_place():
    """Both bear the labels of one attempt; only the one that answers last used to be kept."""
    answers = iter([said(step=7), said(step=99), said(step=8)])
    due: list[Owner] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await saying(OK, next(answers).encode())(reader, writer)

    children = ChildCache(lambda _key, _owner: None)
    labels = names.child_labels("bot", OWNER[1], Stage.TRAIN, 1)
    owner = {"kind": names.KIND, "uid": OWNER[1], "controller": True}
    meta = {"name": "k", "namespace": "a", "uid": "ours", "labels": labels, "ownerReferences": [owner]}
    children.take("jobs", "ADDED", {"metadata": meta})

    async def rounds() -> ProgressPuller:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        puller = ProgressPuller(children, Metrics(CollectorRegistry()), due.append, lambda: NOW, port)
        for job_uid in ("ours", "theirs", "ours"):
            await puller.pull([(OWNER, replace(pod(), uid=f"pod of {job_uid}", owner_uid=job_uid))])
        server.close()
        return puller

    puller = asyncio.run(rounds())
    assert {each.job_uid: each.progress.step for each in puller.answers(OWNER)} == {"ours": 8, "theirs": 99}
    puller.retain({OWNER})
    assert [each.job_uid for each in puller.answers(OWNER)] == ["ours"], "of theirs nothing is known any more"


def test_the_puller_stops_at_once():
    puller = ProgressPuller(
        ChildCache(lambda _key, _owner: None), Metrics(CollectorRegistry()), lambda _owner: None, lambda: NOW
    )
    thread = threading.Thread(target=puller.run, args=(10**6,))
    thread.start()
    puller.stop()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


class BrokenChildren(ChildCache):
    def running_pods(self) -> list[tuple[Owner, ObservedPod]]:
        raise ZeroDivisionError


def test_a_puller_that_has_died_grows_old():
    clock = Clock()
    puller = ProgressPuller(
        BrokenChildren(lambda _key, _owner: None),
        Metrics(CollectorRegistry()),
        lambda _owner: None,
        lambda: NOW,
        clock=clock,
    )
    clock.now_s = 1000
    with pytest.raises(ZeroDivisionError):
        puller.run(0.001)
    assert puller.age_s() == 0
    clock.now_s += 200
    assert puller.age_s() == 200


@pytest.mark.parametrize("stage", list(Stage))
def test_pods_of_both_stages_are_asked_while_they_run(stage: Stage):
    children = ChildCache(lambda _key, _owner: None)
    labels = names.child_labels("bot", "uid-1", stage, 1)
    meta = {
        "name": "p", "namespace": "a", "uid": "u", "labels": labels,
        "ownerReferences": [{"kind": "Job", "uid": "j", "controller": True}],
    }  # fmt: skip
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    status = {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"name": "trainer", "state": state}]}
    children.take("pods", "ADDED", {"metadata": meta, "spec": {}, "status": status})
    assert [(owner, pod.stage) for owner, pod in children.running_pods()] == [(("a", "uid-1"), stage)]


def running(name: str, job_uid: str, created: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    meta = {
        "name": name, "namespace": "a", "uid": name, "creationTimestamp": created,
        "labels": names.child_labels("bot", OWNER[1], Stage.TRAIN, 1),
        "ownerReferences": [{"kind": "Job", "uid": job_uid, "controller": True}],
    }  # fmt: skip
    state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    status = {"phase": "Running", "podIP": "10.0.0.1", "containerStatuses": [{"name": "trainer", "state": state}]}
    return {"metadata": meta, "spec": {}, "status": status}


def test_only_pods_of_the_kubernetes_job_in_the_status_are_asked_and_a_few_of_them_in_a_round():
    """Else whoever makes thousands of silent pods with the labels of a job lets the answers of all others grow old."""
    children = ChildCache(lambda _key, _owner: None)
    puller = ProgressPuller(children, Metrics(CollectorRegistry()), lambda _: None, lambda: NOW)
    children.take("pods", "ADDED", running("ours", "job-ours"))
    for number in range(1000):
        children.take("pods", "ADDED", running(f"forged-{number}", f"job-{number}"))
    assert puller.next_pods() == [], "nothing counts before the status has the Job"
    puller.follow(OWNER, "job-ours")
    assert [pod.name for _, pod in puller.next_pods()] == ["ours"]
    for number in range(10):
        children.take("pods", "ADDED", running(f"also-{number}", "job-ours", "2026-01-02T00:00:00Z"))
    rounds = [[pod.name for _, pod in puller.next_pods()] for _ in range(6)]
    assert {len(each) for each in rounds} == {MAX_PODS_OF_JOB}
    assert len({name for each in rounds for name in each}) == 11, "each has its turn"
    puller.follow(OWNER, None)
    assert puller.next_pods() == []
    puller.follow(OWNER, "job-ours")
    puller.retain(set())
    assert puller.next_pods() == []


def test_a_round_over_thousands_of_silent_pods_does_not_look_like_a_standstill(monkeypatch: pytest.MonkeyPatch):
    clock, ages_s = Clock(), list[float]()
    puller = ProgressPuller(
        ChildCache(lambda _key, _owner: None), Metrics(CollectorRegistry()), lambda _: None, lambda: NOW, 1, clock
    )

    async def silent(host: str, port: int) -> Progress:
        clock.now_s += 2
        ages_s.append(puller.age_s())
        raise ProgressError("timeout")

    monkeypatch.setattr(progress, "fetch", silent)
    asyncio.run(puller.pull([(("a", str(number)), pod()) for number in range(500)]))
    assert max(ages_s) < STALL_S
