"""Claim, fence, manifest and commit on the local store; on a real S3 server: tests/control_plane/test_store_s3.py."""

import hashlib
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from finetune_api import layout
from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_api.status import Artifact
from finetune_trainer import commit as protocol
from finetune_trainer.commit import Committed, Fence
from finetune_trainer.store import Store, open_store
from stub_s3 import Trouble, stub_s3, without_botocore_pauses

# As whole as the one that is committed, and of the same file.
_WEIGHTS = {"path": "adapter.bin", "size_bytes": 7, "sha256": f"sha256:{hashlib.sha256(b'weights').hexdigest()}"}
OTHER_MANIFEST = json.dumps({"files": [_WEIGHTS], "step": 8}).encode()


@pytest.fixture
def store() -> Store:
    return open_store(StorageConfig())


@pytest.fixture
def run_uri(tmp_path: Path) -> str:
    return f"file://{tmp_path}/out/bot-1a2b3"


def committed_artifact(store: Store, run_uri: str) -> Artifact | None:
    found = protocol.read_commit(store, run_uri)
    return found and found.artifact


def publish_adapter(store: Store, fence: Fence, run_uri: str, content: bytes = b"weights") -> Artifact:
    folder = layout.join(run_uri, layout.ADAPTER)
    store.put(f"{folder}/adapter.bin", content)
    sha256, size_bytes = store.digest(f"{folder}/adapter.bin")
    manifest: dict[str, object] = {
        "files": [{"path": "adapter.bin", "size_bytes": size_bytes, "sha256": sha256}],
        "step": 7,
    }
    manifest_uri = f"{folder}/manifest.json"
    digest = protocol.publish_manifest(store, fence, manifest_uri, manifest)
    return Artifact(type="Adapter", uri=f"{folder}/", digest=digest, manifest_uri=manifest_uri, rank=16)


def test_a_folder_is_claimed_once_and_again_by_the_same_job(store: Store, run_uri: str) -> None:
    protocol.claim(store, run_uri, "uid-1")
    protocol.claim(store, run_uri, "uid-1")
    with pytest.raises(StageError) as caught:
        protocol.claim(store, run_uri, "uid-2")
    assert caught.value.fault is Fault.OUTPUT_CONFLICT
    assert caught.value.args_by_name == {"uri": run_uri, "owner": "job uid-1"}


def test_a_claim_that_is_none_of_ours_is_a_conflict_too(store: Store, run_uri: str) -> None:
    store.put(layout.join(run_uri, layout.CLAIM), b"\xff not json")
    with pytest.raises(StageError) as caught:
        protocol.claim(store, run_uri, "uid-1")
    assert caught.value.fault is Fault.OUTPUT_CONFLICT


def test_a_store_that_ignores_conditions_is_found_out_at_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with stub_s3() as server:
        server.ignores_conditions = True
        store = open_store(StorageConfig(endpoint=server.endpoint, path_style=True))
        with pytest.raises(StageError) as caught:
            protocol.claim(store, "s3://bucket/out/bot-1a2b3", "uid-1")
    assert caught.value.fault is Fault.CONDITIONAL_WRITES_UNSUPPORTED


@pytest.mark.parametrize("again", [Trouble("PUT", status=503, code="SlowDown"), Trouble("PUT", lose_answer=True)])
@pytest.mark.parametrize("write", [0, 1])
def test_a_store_that_is_busy_at_the_claim_is_not_said_to_ignore_conditions(
    monkeypatch: pytest.MonkeyPatch, again: Trouble, write: int
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    without_botocore_pauses(monkeypatch)
    with stub_s3() as server:
        store = open_store(StorageConfig(endpoint=server.endpoint, path_style=True))
        server.troubles = [*[Trouble("PUT")] * write, again]
        protocol.claim(store, "s3://bucket/out/bot-1a2b3", "uid-1")
        protocol.claim(store, "s3://bucket/out/bot-1a2b3", "uid-1")
        assert not server.troubles


def test_a_newer_attempt_supersedes_all_older_ones(store: Store, run_uri: str) -> None:
    first = protocol.raise_epoch(store, run_uri, 1, "pod-a")
    first.check()
    second = protocol.raise_epoch(store, run_uri, 1, "pod-b")
    third = protocol.raise_epoch(store, run_uri, 2, "pod-c")
    assert (first.epoch, second.epoch, third.epoch) == (1, 2, 3)
    third.check()
    for old in (first, second):
        with pytest.raises(StageError) as caught:
            old.check()
        assert caught.value.fault is Fault.SUPERSEDED
    assert caught.value.args_by_name == {"newer": 3, "own": 2}


def test_a_superseded_attempt_can_publish_nothing(store: Store, run_uri: str) -> None:
    old = protocol.raise_epoch(store, run_uri, 1, "pod-a")
    artifact = publish_adapter(store, old, run_uri)
    protocol.raise_epoch(store, run_uri, 2, "pod-b")
    with pytest.raises(StageError) as caught:
        protocol.publish_manifest(store, old, f"{run_uri}/.job/late.json", {"files": [_file()]})
    assert caught.value.fault is Fault.SUPERSEDED
    with pytest.raises(StageError) as caught:
        protocol.commit(store, old, run_uri, artifact)
    assert caught.value.fault is Fault.SUPERSEDED
    assert store.head(f"{run_uri}/.job/late.json") is None
    assert protocol.read_commit(store, run_uri) is None


def _file() -> dict[str, object]:
    return {"path": "adapter.bin", "size_bytes": 1, "sha256": f"sha256:{'0' * 64}"}


def test_a_manifest_is_published_again_but_never_replaced(store: Store, run_uri: str) -> None:
    fence = protocol.raise_epoch(store, run_uri, 1, "pod-a")
    uri = f"{run_uri}/.job/manifest.json"
    digest = protocol.publish_manifest(store, fence, uri, {"files": [_file()], "step": 1})
    assert protocol.publish_manifest(store, fence, uri, {"step": 1, "files": [_file()]}) == digest
    with pytest.raises(ValueError, match="another manifest"):
        protocol.publish_manifest(store, fence, uri, {"files": [_file()], "step": 2})


@pytest.mark.parametrize("files", [None, [], [{"path": "a"}], "a", [{**_file(), "sha256": "md5:1"}]])
def test_a_manifest_that_vouches_for_nothing_is_refused(store: Store, run_uri: str, files: object) -> None:
    fence = protocol.raise_epoch(store, run_uri, 1, "pod-a")
    with pytest.raises(ValueError):
        protocol.publish_manifest(store, fence, f"{run_uri}/.job/manifest.json", {"files": files})


def test_a_commit_is_read_back_verified_and_found_by_a_second_run(store: Store, run_uri: str, tmp_path: Path) -> None:
    assert protocol.read_commit(store, run_uri) is None
    fence = protocol.raise_epoch(store, run_uri, 1, "pod-a")
    artifact = publish_adapter(store, fence, run_uri)
    protocol.move_latest(store, protocol.commit(store, fence, run_uri, artifact))
    assert committed_artifact(store, run_uri) == artifact
    latest = Committed.model_validate_json((tmp_path / "out/latest.json").read_bytes())
    assert (latest.run_uri, latest.artifact) == (run_uri, artifact)

    before = store.read(layout.join(run_uri, layout.COMMITTED))
    again = protocol.raise_epoch(store, run_uri, 2, "pod-b")
    late = artifact.model_copy(update={"digest": f"sha256:{'1' * 64}"})
    assert protocol.commit(store, again, run_uri, late).artifact == artifact, "what stands is told, not what came late"
    assert store.read(layout.join(run_uri, layout.COMMITTED)) == before
    assert committed_artifact(store, run_uri) == artifact


def test_a_commit_whose_pointer_was_not_moved_is_finished_by_the_next_attempt(
    store: Store, run_uri: str, tmp_path: Path
) -> None:
    fence = protocol.raise_epoch(store, run_uri, 1, "pod-a")
    artifact = publish_adapter(store, fence, run_uri)
    protocol.commit(store, fence, run_uri, artifact)  # and the pod is killed before it moves the pointer
    protocol.move_latest(
        store, protocol.commit(store, protocol.raise_epoch(store, run_uri, 2, "pod-b"), run_uri, artifact)
    )
    assert Committed.model_validate_json((tmp_path / "out/latest.json").read_bytes()).run_uri == run_uri


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter/adapter.bin", b"weightz"),
        ("adapter/adapter.bin", b"weights and more"),
        ("adapter/manifest.json", b"{}"),
        ("adapter/manifest.json", OTHER_MANIFEST),
        ("_COMMITTED.json", b"{}"),
    ],
)
def test_damage_after_the_commit_is_noticed(store: Store, run_uri: str, name: str, content: bytes) -> None:
    fence = protocol.raise_epoch(store, run_uri, 1, "pod-a")
    protocol.commit(store, fence, run_uri, publish_adapter(store, fence, run_uri))
    store.put(f"{run_uri}/{name}", content)
    with pytest.raises(StageError) as caught:
        protocol.read_commit(store, run_uri)
    assert caught.value.fault is Fault.CORRUPT_TRANSFER
    assert str(caught.value.args_by_name["uri"]).endswith(name)


def test_latest_is_moved_in_a_store_that_has_only_if_none_match_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    with stub_s3() as server:
        store = open_store(StorageConfig(endpoint=server.endpoint, path_style=True))
        for run in ("bot-11111", "bot-22222"):
            run_uri = f"s3://bucket/out/{run}"
            fence = protocol.raise_epoch(store, run_uri, 1, "pod")
            artifact = publish_adapter(store, fence, run_uri)
            # Of the second run: its commit has If-None-Match, the pointer's move If-Match.
            first = run == "bot-11111"
            server.troubles = [] if first else [Trouble("PUT"), Trouble("PUT", status=501, code="NotImplemented")]
            protocol.move_latest(store, protocol.commit(store, fence, run_uri, artifact))
        latest, _etag = store.read("s3://bucket/out/latest.json")
    assert Committed.model_validate_json(latest).run_uri == "s3://bucket/out/bot-22222"


def test_latest_moves_only_forward(store: Store, run_uri: str, tmp_path: Path) -> None:
    fence = protocol.raise_epoch(store, run_uri, 1, "pod-a")
    artifact = publish_adapter(store, fence, run_uri)
    noon = datetime(2026, 1, 1, 12, tzinfo=UTC)

    def committed(name: str, minutes: int) -> Committed:
        return Committed(
            run_uri=f"file://{tmp_path}/out/{name}",
            artifact=artifact,
            epoch=1,
            committed_at=noon + timedelta(minutes=minutes),
        )

    def latest() -> str:
        return Path(Committed.model_validate_json((tmp_path / "out/latest.json").read_bytes()).run_uri).name

    assert protocol.move_latest(store, committed("b", 1))
    assert protocol.move_latest(store, committed("b", 1)), "moving to oneself again is fine"
    assert not protocol.move_latest(store, committed("a", 0))
    assert latest() == "b"
    assert protocol.move_latest(store, committed("c", 2))
    assert latest() == "c"
    naive = committed("z", 9).model_dump_json().replace("Z", "").encode()
    for content in (b"hand-made", naive):
        (tmp_path / "out/latest.json").write_bytes(content)
        assert protocol.move_latest(store, committed("a", 0))
        assert latest() == "a"
