"""Slow clients of a port keep nobody else out of it, and a pod that says nothing is judged by its silence."""

import asyncio
import contextlib
import http.client
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.registry import Collector

from finetune_api import connections
from finetune_api.connections import MAX_CONNECTIONS, Connections, OneAtATime
from finetune_api.names import Stage
from finetune_operator import progress
from finetune_operator.child_cache import ChildCache
from finetune_operator.health import Health, HttpServer
from finetune_operator.metrics import Metrics
from finetune_operator.observed import ObservedPod
from finetune_operator.progress import ProgressPuller
from finetune_trainer.serve import Reporter
from hand_clock import Clock
from waiting import PATIENCE_S, until

OWNER = ("team", "uid")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


@contextlib.contextmanager
def stage_port() -> Generator[tuple[int, str]]:
    reporter = Reporter(Stage.TRAIN, 1, CollectorRegistry())
    try:
        yield reporter.start(0), "/progress"
    finally:
        reporter.close()


@contextlib.contextmanager
def operator_port() -> Generator[tuple[int, str]]:
    server = HttpServer(0, CollectorRegistry(), Health)
    try:
        yield server.port, "/healthz"
    finally:
        server.close()


Port = Callable[[], contextlib.AbstractContextManager[tuple[int, str]]]
PORTS = pytest.mark.parametrize("port_of", [stage_port, operator_port])


def test_a_run_without_a_cluster_answers_this_machine_alone() -> None:
    with stage_port() as (port, _):
        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S).close()
        with pytest.raises(ConnectionRefusedError):  # another address of this machine, as one of its network would be
            socket.create_connection(("127.0.0.2", port), timeout=PATIENCE_S).close()


class Drip:
    """A client that never ends its request, and never pauses; `ended` is set when it is hung up on."""

    def __init__(self, port: int) -> None:
        self.ended = threading.Event()
        self._over = threading.Event()
        self._socket = socket.create_connection(("127.0.0.1", port))
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError), self._socket:
            self._socket.sendall(b"GET /progress HTTP/1.1\r\na: ")
            while not self._over.wait(0.02):
                self._socket.sendall(b"b")
        self.ended.set()

    def close(self) -> None:
        self._over.set()


def status_of(port: int, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@PORTS
def test_clients_that_drip_keep_nobody_else_out(port_of: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, enter = list[object](), Connections[object].enter

    def enter_and_tell(self: Connections[object], connection: object) -> None:
        enter(self, connection)
        entered.append(connection)

    monkeypatch.setattr(Connections, "enter", enter_and_tell)
    monkeypatch.setattr(connections, "CONNECTION_TIMEOUT_S", 1e9)  # none has to end for its age
    clients: list[Drip] = []
    with port_of() as (port, path):
        for number in range(1, 3 * MAX_CONNECTIONS + 1):
            clients.append(Drip(port))
            until(lambda least=number: len(entered) >= least, "the server has the connection")
        assert [status_of(port, path) for _ in range(5)] == [200] * 5
        assert not clients[-1].ended.is_set(), "the newest is still at it"
        assert all(client.ended.wait(PATIENCE_S) for client in clients[: 2 * MAX_CONNECTIONS]), "the oldest made room"
        for client in clients:
            client.close()


@PORTS
def test_a_client_that_drips_is_hung_up_on(port_of: Port, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "CONNECTION_TIMEOUT_S", 0.3)
    with port_of() as (port, _path):
        assert Drip(port).ended.wait(PATIENCE_S)


def test_the_oldest_of_too_many_connections_makes_room_and_none_stays_for_ever() -> None:
    clock, gone = Clock(), list[str]()
    table = Connections(gone.append, clock)
    names = [f"client {number}" for number in range(MAX_CONNECTIONS)]
    for name in names:
        table.enter(name)
    table.leave(names[0])
    table.enter("late")
    assert gone == []
    table.enter("later")
    assert gone == [names[1]]
    clock.now_s += connections.CONNECTION_TIMEOUT_S
    table.enter("newest")
    table.end_overdue()
    assert gone == [*names[1:], "late", "later"]


def test_a_path_that_is_none_is_not_found() -> None:
    with operator_port() as (port, _), socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S) as client:
        client.sendall(b"GET http://[/?x HTTP/1.0\r\n\r\n")
        assert b" 404 " in client.recv(100)


def test_many_who_ask_for_metrics_at_once_cost_no_more_than_one() -> None:
    class Slow(Collector):
        """Metrics that are made as long as the test wants."""

        def __init__(self) -> None:
            self.begun, self.at_once, self.most = threading.Semaphore(0), 0, 0
            self.go_on = threading.Event()

        def collect(self) -> Iterator[Metric]:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            self.begun.release()
            assert self.go_on.wait(60)
            self.at_once -= 1
            return iter(())

    slow, registry, threads = Slow(), CollectorRegistry(), list[threading.Thread]()
    server = HttpServer(0, registry, Health)
    registry.register(slow)
    try:
        for _ in range(8):
            threads.append(threading.Thread(target=status_of, args=(server.port, "/metrics"), daemon=True))
            threads[-1].start()
        assert slow.begun.acquire(timeout=60)
        assert status_of(server.port, "/healthz") == 200
        slow.go_on.set()
        for thread in threads:
            thread.join(60)
    finally:
        slow.go_on.set()
        server.close()
    assert slow.most == 1


def test_an_answer_for_all_who_wait_is_none_that_was_begun_before_they_asked() -> None:
    going, go_on, made = threading.Semaphore(0), threading.Semaphore(0), list[int]()

    def make() -> int:
        made.append(len(made) + 1)
        going.release()
        assert go_on.acquire(timeout=60)
        return made[-1]

    shared = OneAtATime(make)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(shared.get)
        assert going.acquire(timeout=60)
        later = [pool.submit(shared.get) for _ in range(3)]
        go_on.release(4)
        assert first.result(60) == 1
        assert all(each.result(60) > 1 for each in later)


def silence_after(minutes: int, behave: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """Seconds of silence that the puller has seen of a pod after asking it every minute."""
    monkeypatch.setattr(progress, "fetch", partial(progress.fetch, timeout_s=PATIENCE_S))
    now = NOW
    pod = ObservedPod("p", "u", Stage.TRAIN, 1, NOW, "Running", ip="127.0.0.1", started_at=NOW)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if behave == "rubbish":
            writer.write(b"HTTP/1.0 200 OK\r\n\r\n{}")
        writer.close()

    async def rounds() -> ProgressPuller:
        nonlocal now
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        puller = ProgressPuller(
            ChildCache(lambda _key, _owner: None), Metrics(CollectorRegistry()), lambda _owner: None, lambda: now, port
        )
        for minute in range(minutes + 1):
            if (behave == "closed" and minute == 0) or (behave == "closed later" and minute == 1):
                server.close()
                await server.wait_closed()
            await puller.pull([(OWNER, pod)])
            now += timedelta(minutes=1)
        server.close()
        return puller

    silences = asyncio.run(rounds()).silences(OWNER)
    assert all(each.unanswered_s == minutes * 60 for each in silences), "it has not answered, whosever fault that is"
    return max((each.silent_s for each in silences), default=0.0)


@pytest.mark.parametrize("behave", ["hangs up", "rubbish", "closed later"])
def test_a_pod_that_can_be_reached_and_says_nothing_is_silent(behave: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert silence_after(31, behave, monkeypatch) == 31 * 60


def test_a_pod_that_was_never_reached_may_be_behind_a_policy_of_the_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert silence_after(31, "closed", monkeypatch) == 0
