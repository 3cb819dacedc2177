"""The store and the commit protocol on a real S3 server (versitygw), over a network that may break."""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import pytest

from finetune_api import layout
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.commit import Committed
from finetune_trainer.store import PreconditionFailed, Store, open_store, s3
from versitygw import ACCESS_KEY, SECRET_KEY, Network, certificate, environment, versitygw

pytestmark = pytest.mark.control_plane

RACE = Path(__file__).resolve().parents[1] / "support" / "race.py"
ROUNDS = 20


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Generator[str]:
    with versitygw(tmp_path_factory.mktemp("s3")) as endpoint:
        yield endpoint


def connect(endpoint: str, folder: Path, ca_bundle_path: str | None = None) -> Store:
    (folder / "AWS_ACCESS_KEY_ID").write_text(ACCESS_KEY)
    (folder / "AWS_SECRET_ACCESS_KEY").write_text(SECRET_KEY)
    return open_store(
        StorageConfig(endpoint=endpoint, path_style=True, credentials_dir=str(folder), ca_bundle_path=ca_bundle_path)
    )


@pytest.fixture
def store(endpoint: str, tmp_path: Path) -> Store:
    return connect(endpoint, tmp_path)


@pytest.fixture
def base(request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}"


def test_conditions_hold(store: Store, base: str) -> None:
    uri = f"{base}/object"
    assert store.head(uri) is None
    first = store.put(uri, b"one", if_none_match=True)
    with pytest.raises(PreconditionFailed):
        store.put(uri, b"two", if_none_match=True)
    second = store.put(uri, b"two", if_match=first)
    for wrong in (uri, f"{uri}-missing"):
        with pytest.raises(PreconditionFailed):
            store.put(wrong, b"three", if_match=first)
    with pytest.raises(PreconditionFailed):
        store.read(uri, if_match=first)
    with pytest.raises(StageError) as caught:
        store.open(uri, if_match=first)
    assert caught.value.fault is Fault.INPUT_CHANGED
    assert store.read(uri, if_match=second) == (b"two", second)


def test_names_of_all_kinds_are_listed_and_matched(store: Store, base: str) -> None:
    names = ["a.jsonl", "b/a.jsonl", "b/ü 1+%2F&<>.jsonl", "b/c/#.parquet", "bb"]
    for name in names:
        store.put(f"{base}/{name}", name.encode())
    assert [info.uri for info in store.list(f"{base}/")] == sorted(f"{base}/{name}" for name in names)
    assert [info.uri for info in store.match(f"{base}/b/*.jsonl")] == sorted(f"{base}/{name}" for name in names[1:3])
    assert len(store.match(f"{base}/**/*.jsonl")) == 3
    for name in names:
        assert store.read(f"{base}/{name}")[0] == name.encode()
        assert [info.uri for info in store.match(f"{base}/{name}")] == [f"{base}/{name}"]


@pytest.mark.parametrize(
    ("uri", "fault"),
    [
        ("s3://bucket/nothing", Fault.OBJECT_NOT_FOUND),
        ("s3://no-such-bucket/object", Fault.BUCKET_NOT_FOUND),
        ("s3://not a bucket/object", Fault.CONFIG_UNREADABLE),
    ],
)
def test_what_is_not_there_is_named(store: Store, uri: str, fault: Fault) -> None:
    with pytest.raises(StageError) as caught:
        store.read(uri)
    assert caught.value.fault is fault


@pytest.mark.parametrize(("access", "secret"), [(ACCESS_KEY, "wrong"), ("nobody", SECRET_KEY)])
def test_wrong_credentials_are_named(endpoint: str, tmp_path: Path, access: str, secret: str) -> None:
    store = connect(endpoint, tmp_path)
    (tmp_path / "AWS_ACCESS_KEY_ID").write_text(access)
    (tmp_path / "AWS_SECRET_ACCESS_KEY").write_text(secret)
    for action in (store.read, store.head, store.list):
        with pytest.raises(StageError) as caught:
            action("s3://bucket/object")
        assert caught.value.fault is Fault.ACCESS_DENIED


def test_a_private_endpoint_needs_its_authority_and_says_so_at_once(tmp_path: Path) -> None:
    """Over real TLS. Without `storage.caBundle` the field to set is named and nothing is retried; with it all works."""
    tls = certificate(tmp_path, "127.0.0.1")
    with versitygw(tmp_path, tls=tls) as endpoint:
        network = Network(endpoint, lambda _connection, _answered: False)
        try:
            with pytest.raises(StageError) as caught:
                connect(network.endpoint, tmp_path).read("s3://bucket/object")
            assert caught.value.fault is Fault.CERTIFICATE_UNTRUSTED
            assert "self-signed certificate" in str(caught.value)
            assert network.connections == 1
            trusting = connect(network.endpoint, tmp_path, ca_bundle_path=str(tls.file))
            trusting.put("s3://bucket/object", b"content", if_none_match=True)
            assert trusting.read("s3://bucket/object")[0] == b"content"
        finally:
            network.close()


@pytest.mark.parametrize("size_bytes", [0, 1, 20_000_001, s3.MULTIPART_THRESHOLD_BYTES + 1])
def test_files_of_any_size_arrive_as_they_were(store: Store, base: str, tmp_path: Path, size_bytes: int) -> None:
    (tmp_path / "file").write_bytes(os.urandom(size_bytes))
    info = store.upload(tmp_path / "file", f"{base}/file")
    assert info.size_bytes == size_bytes
    digest = store.download(info.uri, tmp_path / "copy", if_match=info.etag)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
    assert store.digest(info.uri) == (digest, size_bytes)
    with pytest.raises(PreconditionFailed):
        store.upload(tmp_path / "file", info.uri, if_none_match=True)
    store.delete(info.uri)
    store.delete(info.uri)
    assert store.head(info.uri) is None


def test_transfers_survive_a_network_that_cuts_connections(endpoint: str, base: str, tmp_path: Path) -> None:
    network = Network(endpoint, lambda connection, answered: answered > 3_000_000 and connection <= 8)
    try:
        store = connect(network.endpoint, tmp_path)
        (tmp_path / "file").write_bytes(os.urandom(20_000_000))
        store.upload(tmp_path / "file", f"{base}/file")
        store.download(f"{base}/file", tmp_path / "copy")
    finally:
        network.close()
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "file").read_bytes()
    assert network.cuts >= 4


def test_a_conditional_write_whose_answer_is_lost_is_known_to_have_won(
    endpoint: str, base: str, tmp_path: Path
) -> None:
    network = Network(endpoint, lambda connection, _answered: connection == 1)
    try:
        store = connect(network.endpoint, tmp_path)
        store.put(f"{base}/object", b"mine", if_none_match=True)
        assert network.cuts == 1
        assert store.read(f"{base}/object")[0] == b"mine"
        with pytest.raises(PreconditionFailed):
            store.put(f"{base}/object", b"mine", if_none_match=True)
    finally:
        network.close()


def test_of_two_processes_writing_at_once_exactly_one_wins_every_time(endpoint: str, base: str, store: Store) -> None:
    command = [sys.executable, str(RACE), endpoint]
    racers = {
        name: subprocess.Popen(
            [*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        for name in ("a", "b")
    }
    try:
        assert [_line(racer.stdout) for racer in racers.values()] == ["ready", "ready"]
        for number in range(ROUNDS):
            uri = f"{base}/{number}"
            etag = store.put(f"{uri}/pointer", b"before")
            for racer in racers.values():
                assert racer.stdin is not None
                racer.stdin.write(f"{uri} {etag}\n")
                racer.stdin.flush()
            outcomes = {name: json.loads(_line(racer.stdout)) for name, racer in racers.items()}
            _check_round(store, uri, outcomes)
    finally:
        for racer in racers.values():
            racer.kill()
            racer.wait(60)


def _check_round(store: Store, uri: str, outcomes: dict[str, dict[str, object]]) -> None:
    for prize, key in (("created", "object"), ("moved", "pointer")):
        winners = [name for name, outcome in outcomes.items() if outcome[prize] is True]
        assert len(winners) == 1, (prize, outcomes)
        assert store.read(f"{uri}/{key}")[0] == winners[0].encode()
    claimed = [name for name, outcome in outcomes.items() if outcome["claimed"] is True]
    assert len(claimed) == 1, outcomes
    assert json.loads(store.read(f"{uri}/claimed/{layout.CLAIM}")[0])["job_uid"] == claimed[0]

    assert sorted(str(outcome["epoch"]) for outcome in outcomes.values()) == ["1", "2"]
    committed = Committed.model_validate_json(store.read(f"{uri}/run/{layout.COMMITTED}")[0])
    assert outcomes[committed.artifact.digest[-1]]["committed"] is True
    for outcome in outcomes.values():
        assert outcome["committed"] is True or (outcome["committed"], outcome["epoch"]) == ("Superseded", 1)
    latest = Committed.model_validate_json(store.read(f"{uri}/{layout.LATEST}")[0])
    assert latest == committed


def test_of_eight_threads_creating_at_once_exactly_one_wins(store: Store, base: str) -> None:
    def won(writer: int, number: int) -> bool:
        try:
            store.put(f"{base}/{number}", b"%d" % writer, if_none_match=True)
        except PreconditionFailed:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for number in range(ROUNDS):
            outcomes = list(pool.map(won, range(8), [number] * 8))
            assert outcomes.count(True) == 1
            assert store.read(f"{base}/{number}")[0] == b"%d" % outcomes.index(True)


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline().strip()
