"""Files that never end, never open or are held for ever: every call of the local store ends by a named fault."""

import fcntl
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from finetune_api.errors import StageError
from finetune_api.reasons import Fault
from finetune_api.run import StorageConfig
from finetune_trainer.store import local, open_store

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
