"""Files that never end, never open or are held for ever: every call of the local store ends by a named fault."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.store import ObjectInfo, Store, local, open_store

MIB = 1 << 20


@pytest.mark.parametrize("action", ["read", "open", "digest"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
def test_what_is_no_file_is_not_waited_for(kind: str, action: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    store = open_store(StorageConfig())
    assert store.head(path.as_uri()) is None
    with pytest.raises(StageError) as caught:
        getattr(store, action)(path.as_uri())
    assert caught.value.fault is Fault.OBJECT_NOT_FOUND


def test_a_file_that_is_written_to_is_not_read_on_and_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * (4 * MIB))
    read_bytes = 0

    def read_all(stream: BinaryIO) -> None:
        nonlocal read_bytes
        while part := stream.read(MIB):
            read_bytes += len(part)

    with open_store(StorageConfig()).open(path.as_uri()) as stream:
        with path.open("ab") as more:  # as if it went on for ever: its end must not be looked for
            more.write(b"y" * (16 * MIB))
        with pytest.raises(StageError) as caught:
            read_all(stream)
    assert caught.value.fault is Fault.INPUT_CHANGED
    assert read_bytes <= 5 * MIB


def test_a_file_that_is_written_to_is_not_taken_into_memory(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * MIB)
    with open_store(StorageConfig()).open(path.as_uri()) as stream:
        with path.open("ab") as more:
            more.truncate(1 << 40)
        with pytest.raises(StageError) as caught:
            stream.read()
    assert caught.value.fault is Fault.INPUT_CHANGED


def test_a_folder_that_somebody_keeps_locked_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "LOCK_TIMEOUT_S", 0.2)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    try:
        with pytest.raises(StageError) as caught:
            open_store(StorageConfig()).put(f"{tmp_path.as_uri()}/object", b"content")
    finally:
        os.close(holder)
    assert caught.value.fault is Fault.STORAGE_UNAVAILABLE
    assert "another process holds a lock" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == []


ACTIONS: dict[str, Callable[[Store, str], object]] = {
    "head": lambda store, uri: store.head(uri),
    "list": lambda store, uri: store.list(f"{uri}/"),
    "match": lambda store, uri: store.match(f"{uri}*"),
    "read": lambda store, uri: store.read(uri),
    "put": lambda store, uri: store.put(uri, b"content"),
    "delete": lambda store, uri: store.delete(uri),
}


@pytest.mark.parametrize("action", ["head", "list", "read", "put", "delete"])
@pytest.mark.parametrize("name", ["a%00b", "a\ud800"])
def test_a_name_that_no_file_can_have_is_named(name: str, action: str, tmp_path: Path) -> None:
    with pytest.raises(StageError) as caught:
        ACTIONS[action](open_store(StorageConfig()), f"{tmp_path.as_uri()}/{name}")
    assert caught.value.fault is Fault.CONFIG_UNREADABLE


@pytest.mark.parametrize("name", ["loop", "x" * 300])
def test_a_link_to_itself_and_a_name_that_is_too_long_are_no_files(name: str, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "rows.jsonl").write_text("{}")
    store = open_store(StorageConfig())
    uri = f"{tmp_path.as_uri()}/{name}"
    assert store.head(uri) is None
    named_in_vain = [ObjectInfo(uri, 0, "")] if name == "loop" else []  # a link to nothing is told, not passed over
    assert ACTIONS["match"](store, uri) == named_in_vain
    assert [info.uri for info in store.list(f"{tmp_path.as_uri()}/")] == [(tmp_path / "rows.jsonl").as_uri()]
    with pytest.raises(StageError) as caught:
        store.read(uri)
    assert caught.value.fault is Fault.OBJECT_NOT_FOUND


def test_a_link_that_became_one_to_itself_leads_outside(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert open_store(StorageConfig()).leads_outside((tmp_path / "loop").as_uri(), f"{tmp_path.as_uri()}/")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken").symlink_to("/proc/self/mem")  # whose first byte nobody can read, as on a broken disk
    store = open_store(StorageConfig())
    for read in (store.read, store.digest):
        with pytest.raises(StageError) as caught:
            read((tmp_path / "broken").as_uri())
        assert caught.value.fault is Fault.STORAGE_UNAVAILABLE
        assert "Input/output error" in str(caught.value)
